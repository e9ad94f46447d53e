"""Encoding of images, prompts and captions into a batch: one way in for live captions, replay and head discovery.

A batch of prompts is left-padded, so that every caption starts at the same position P; captions that are replayed follow
from P on and are padded on the right, where causal attention never reaches. In an encoder-decoder the prompt is the
encoder's, padded on the right, and captions follow the decoder's own start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from gazeguard.errors import InputError
from gazeguard.vision.inputs import append_tokens, check_inputs, context_length, decoder_prompt
from gazeguard.vision.packing import Packing, fits, pack
from gazeguard.vision.text import TOKENIZER_LOCK, check_text, tokenize

# Processors that put the image before every prompt themselves, where others want a token in the text.
INSERTS_IMAGE_TOKEN = ("Florence2Processor",)
PROCESSOR_PARTS = ("tokenizer", "image_processor", "chat_template")  # chat_template may be None
TOKENIZER_PARTS = (
    "__call__",
    "decode",
    "is_fast",
    "all_special_ids",
    "all_special_tokens",
    "added_tokens_decoder",
    "unk_token",
)
PER_PROMPT_TOKEN = ("input_ids", "attention_mask")  # what every processor's output has for each token of the prompt


class Processor(Protocol):
    """What a processor must have; those of transformers have it, and one's own may be any class.

    Its output, of either method, is a mapping (a plain dict will do) with ``input_ids`` and ``attention_mask``, (rows, P) int64
    tensors, the pixels, and what the model's ``forward`` needs besides: ``image_grid_thw`` and ``mm_token_type_ids`` for models
    with M-RoPE. Rows are padded on the side that the call asks for.

    Attributes:
        tokenizer: A tokenizer of transformers, or an object with the same methods.
        image_processor: What prepares the images; some layouts of image tokens are read from its settings.
        chat_template: The template that `apply_chat_template` fills in; None for a model without chat, whose prompt is
            ``image_token`` (if there is such an attribute, else "<image>") and then the text.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    chat_template: str | None

    def __call__(self, *, images: Any, text: Any, padding: bool, padding_side: str, return_tensors: str) -> Mapping[str, Any]:
        """Encode images and texts; called where there is no chat template."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Mapping[str, Any]:
        """Encode conversations whose content holds images; called where there is a chat template."""
        ...


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of prompts, and the captions that follow them if there are any.

    Attributes:
        prompt: What the processor made.
        inputs: The same, extended by the captions.
        caption_ids: For each caption (T,) int64.
        offsets: For each caption (T, 2) int64, the characters of it that each token covers.
        packing: Where the captions are, if several share a row; None where each has its own.
    """

    prompt: dict[str, Any]
    inputs: dict[str, Any]
    caption_ids: tuple[NDArray[np.int64], ...] = ()
    offsets: tuple[NDArray[np.int64], ...] = ()
    packing: Packing | None = None

    @property
    def rows(self) -> Sequence[int]:
        """For each caption the row that it is in."""
        return range(len(self.caption_ids)) if self.packing is None else self.packing.rows

    @property
    def prompt_ids(self) -> Tensor:
        """(batch, P) int64."""
        return self.prompt["input_ids"]

    @property
    def prompt_mask(self) -> Tensor:
        """(batch, P) int64, 0 for padding."""
        return self.prompt["attention_mask"]


def check_processor(processor: Any) -> None:
    """Raise `InputError` for what is no vision-language processor, and say what it lacks."""
    if processor is None:
        raise InputError("There is no processor. Pass AutoProcessor.from_pretrained(...) of the model.")
    if isinstance(processor, PreTrainedTokenizerBase):
        raise InputError(
            f"{type(processor).__name__} is a tokenizer; expected the model's whole processor, with its image_processor. "
            "Pass AutoProcessor.from_pretrained(...) of the model."
        )
    missing = [part for part in PROCESSOR_PARTS if not hasattr(processor, part)]
    if "chat_template" not in missing:
        method = "__call__" if processor.chat_template is None else "apply_chat_template"
        missing += [] if hasattr(processor, method) else [method]
    if not missing:
        missing = [f"tokenizer.{part}" for part in TOKENIZER_PARTS if not hasattr(processor.tokenizer, part)]
    if missing:
        raise InputError(
            f"{type(processor).__name__} is not a vision-language processor: it has no {' and no '.join(missing)}. "
            "Pass AutoProcessor.from_pretrained(...) of the model, or one of your own that has what "
            "gazeguard.vision.encoding.Processor lists."
        )


def check_output(processor: Any, output: Any, rows: int, padding_side: str) -> None:
    """Raise `InputError` for what no model could read as the batch of ``rows`` prompts, and say what is missing."""
    name = type(processor).__name__
    if not isinstance(output, Mapping):
        raise InputError(
            f"{name} returns a {type(output).__name__}; expected a mapping of tensors, as transformers' processors do."
        )
    for part in PER_PROMPT_TOKEN:
        value = output.get(part)
        if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != rows:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            given = f"no {part}" if value is None else f"{part} of {shape}"
            raise InputError(f"The output of {name} has {given}; expected a tensor of shape ({rows}, tokens) under {part!r}.")
    if padding_side == "left" and not output["attention_mask"][:, -1].all():
        raise InputError(
            f"The output of {name} is padded on the right, so that captions would continue the padding; expected padding on "
            "the side that the call asks for, padding_side='left'."
        )


def check_prompt(processor: ProcessorMixin, prompt: Any) -> None:
    """Raise `InputError` for a prompt that names special tokens, which a processor would take for the tokens themselves."""
    check_text(prompt, "prompt")
    tokenizer = processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {*tokenizer.all_special_tokens, getattr(processor, "image_token", "")} - {tokenizer.unk_token, None, ""}
    if named := sorted(name for name in special if name in prompt):
        raise InputError(
            f"The prompt contains the special token {named[0]!r}, which the model would not read as text. Take it out."
        )


def encode(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    captions: Sequence[str] = (),
    rows: Sequence[int] = (),
) -> EncodedBatch:
    """One image and one prompt per row, through the processor's chat template; on the model's device.

    Args:
        model: The model that will read the batch.
        processor: Its processor.
        images: One per row.
        prompts: One per row.
        captions: Empty, or one per row: what follows the prompt.
        rows: For each caption its row, to pack several captions into one; by default, and where a row would be too long,
            every caption has a row.

    Raises:
        InputError: The processor is none, a prompt names special tokens or, without captions, is longer than the model's
            context.
    """
    check_processor(processor)
    for prompt in dict.fromkeys(prompts):
        check_prompt(processor, prompt)
    encoder_decoder = model.config.is_encoder_decoder
    padding_side = "right" if encoder_decoder else "left"
    with TOKENIZER_LOCK:
        output = _processed(processor, images, prompts, padding_side)
    check_output(processor, output, len(prompts), padding_side)
    check_inputs(model, output)
    length, limit = int(output["attention_mask"].sum(1).max()), context_length(model)
    if not captions and not encoder_decoder and length > limit:
        raise InputError(f"The prompt has {length} tokens, more than the model's context of {limit}. Make it shorter.")
    batch = {name: _for_model(model, value) if isinstance(value, Tensor) else value for name, value in output.items()}
    forced = getattr(model.generation_config, "forced_bos_token_id", None)
    if encoder_decoder and forced is not None:  # BART: generate would put it before every caption
        batch["decoder_input_ids"] = F.pad(decoder_prompt(model, batch), (0, 1), value=forced)
    if not captions:
        return EncodedBatch(batch, batch)
    caption_ids, offsets = zip(*(tokenize(processor.tokenizer, caption) for caption in captions), strict=True)
    if not rows:
        return EncodedBatch(batch, append_tokens(model, batch, caption_ids), caption_ids, offsets)
    if not fits(batch["input_ids"].shape[1], caption_ids, rows):  # one endless caption is enough
        return encode(model, processor, [images[row] for row in rows], [prompts[row] for row in rows], captions)
    inputs, packing = pack(model, batch, caption_ids, rows)
    return EncodedBatch(batch, inputs, caption_ids, offsets, packing)


def _processed(
    processor: ProcessorMixin, images: Sequence[Image.Image], prompts: Sequence[str], padding_side: str
) -> Mapping[str, Any]:
    """What the processor makes of one image and one prompt per row."""
    if processor.chat_template is None:
        inserts = type(processor).__name__ in INSERTS_IMAGE_TOKEN
        token = "" if inserts else getattr(processor, "image_token", "<image>")
        return processor(
            images=[[image] for image in images],
            text=[f"{token}{prompt}" for prompt in prompts],
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        for image, prompt in zip(images, prompts, strict=True)
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )


def _for_model(model: PreTrainedModel, value: Tensor) -> Tensor:
    """An input on the model's device; pixels in its dtype, since not every vision encoder casts them."""
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
