"""Architectures and processors of the tiny lab models: stock classes at the scale of a laptop.

One 144 x 144 page is cut into 12 x 12 patches of 12 pixels, each of which becomes one image token of the language model.
The model that ships is of the Idefics3 class; a second one, of the LLaVA class, is there for comparison.
"""

from __future__ import annotations

from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from gazeguard.lab.world import PAGE, PATCH, PATCHES, conversations

BOS, EOS, PAD, IMAGE, USER, ASSISTANT = "<s>", "<end_of_utterance>", "<pad>", "<image>", "<user>", "<assistant>"
FAKE_IMAGE, GLOBAL_IMAGE = "<fake_token_around_image>", "<global-img>"  # names that Idefics3Processor expects

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_processor() -> Idefics3Processor:
    """A byte-level BPE trained on the lab's own sentences, Idefics3's PIL image processor, and the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, BOS, EOS, IMAGE, USER, ASSISTANT, FAKE_IMAGE, GLOBAL_IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = (turn for sample in islice(conversations(0, 0), 3000) for turn in sample.turns)
    tokenizer.train_from_iterator((text for turn in turns for text in (turn.prompt, turn.answer)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=2048,
    )
    page = {"longest_edge": PAGE}
    images = Idefics3ImageProcessorPil(size=page, max_image_size=page, do_image_splitting=False)
    return Idefics3Processor(images, fast, image_seq_len=PATCHES * PATCHES, chat_template=CHAT_TEMPLATE)


def build_model(processor: Idefics3Processor, width: int = 192, layers: int = 6) -> Idefics3ForConditionalGeneration:
    """The untrained model for this processor's vocabulary: heads are 32 wide, the encoder has two thirds of the layers."""
    config = Idefics3Config(
        text_config={"model_type": "llama", **_text(processor.tokenizer, width, layers)},
        vision_config=_vision(width, layers),
        scale_factor=1,
        **_tokens(processor.tokenizer),
    )
    return Idefics3ForConditionalGeneration(config)


def build_llava_processor() -> LlavaProcessor:
    """The same tokenizer and chat template with CLIP's PIL image processor, configured for pixels from -1 to 1."""
    page = {"height": PAGE, "width": PAGE}
    half = [0.5] * 3
    images = CLIPImageProcessorPil(size=page, crop_size=page, image_mean=half, image_std=half)
    tokenizer = build_processor().tokenizer
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        chat_template=CHAT_TEMPLATE,
    )


def build_llava(processor: LlavaProcessor, width: int = 192, layers: int = 6) -> LlavaForConditionalGeneration:
    """The untrained second model: a CLIP tower, a projector and a language model like the first one's."""
    config = LlavaConfig(
        text_config={"model_type": "llama", **_text(processor.tokenizer, width, layers)},
        vision_config={"model_type": "clip_vision_model", **_vision(width, layers)},
        vision_feature_layer=-1,
        **_tokens(processor.tokenizer),
    )
    return LlavaForConditionalGeneration(config)


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def _tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | bool]:
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    return {"image_token_id": image, "tie_word_embeddings": True, **_special(tokenizer)}


def _text(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> dict[str, int | bool]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **_special(tokenizer),
    }


def _vision(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers * 2 // 3,
        "num_attention_heads": width // 32,
        "image_size": PAGE,
        "patch_size": PATCH,
    }
