"""What is the lab's VLM made of? A stock Idefics3 class at the scale of a laptop, and its processor, from nothing.

One 144 x 144 page is cut into 12 x 12 patches of 12 pixels, each of which becomes one image token of the language model.
"""

from __future__ import annotations

from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from gazeguard.lab.world import CELL, CELLS, PAGE, lessons

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
    """A byte-level BPE learnt from the lab's own sentences, Idefics3's PIL image processor, and the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, BOS, EOS, IMAGE, USER, ASSISTANT, FAKE_IMAGE, GLOBAL_IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = (turn for sample in islice(lessons(0, 0), 3000) for turn in sample.turns)
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
    return Idefics3Processor(images, fast, image_seq_len=CELLS * CELLS, chat_template=CHAT_TEMPLATE)


def build_model(processor: Idefics3Processor, width: int = 192, layers: int = 6) -> Idefics3ForConditionalGeneration:
    """The untrained model for this processor's vocabulary: heads are 32 wide, the encoder has two thirds of the layers."""
    tokenizer = processor.tokenizer
    heads = width // 32
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Idefics3Config(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": width * 8 // 3,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            **special,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": width * 8 // 3,
            "num_hidden_layers": layers * 2 // 3,
            "num_attention_heads": heads,
            "image_size": PAGE,
            "patch_size": CELL,
        },
        scale_factor=1,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
        **special,
    )
    return Idefics3ForConditionalGeneration(config)
