"""How do pictures and words become a batch? One way in for live captions, replay and head finding.

A batch of prompts is left-padded, so that every caption starts at the same position P; captions that are replayed follow
from P on and are padded on the right, where causal attention never looks. In an encoder-decoder the prompt is the encoder's,
padded on the right, and captions follow the decoder's own start.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from gazeguard.errors import InputError, UnsupportedError
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.layouts.rules import (
    Prompt,
    canvas_of,
    canvases_of,
    find_grid,
    image_cells,
    next_told,
    pictures_told,
    video_token_id,
)

# What processors tell of each picture, one row per picture of the batch.
PER_PICTURE = ("image_grid_thw", "image_grid_hw", "image_grids", "image_merge_sizes", "image_position_ids", "image_sizes")
# The same of each video.
PER_VIDEO = ("video_grid_thw", "video_merge_sizes")
# What they tell of each picture or tile that is an unbroken run of image tokens, and of each image token.
PER_RUN = ("spatial_shapes", "target_sizes")
PER_CELL = ("image_token_pooling",)
# What they tell of each row's pictures, one row per prompt.
PER_ROW = ("aspect_ratio_ids",)
# What processors tell of each token of the prompt in more than one number; every written token is as the last one.
PER_TOKEN = ("cross_attention_mask", "image_attention_mask")
NO_WORD = -1  # stands for image cells where the model type has no token for them and keeps them away from its words
KEPT_AWAY = ("idefics",)
PUTS_PICTURES_ITSELF = ("Florence2Processor",)  # before every prompt, where others want a token in the text
_TOKENIZING = threading.Lock()  # a fast tokenizer keeps in itself how the newest call wants to pad


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of prompts, and the captions that follow them if there are any.

    prompt:      what the processor made
    inputs:      the same, extended by the captions
    caption_ids: for each row (T,) int64
    offsets:     for each row (T, 2) int64, the characters of its caption that each token covers
    """

    prompt: dict[str, Any]
    inputs: dict[str, Any]
    caption_ids: tuple[NDArray[np.int64], ...] = ()
    offsets: tuple[NDArray[np.int64], ...] = ()

    @property
    def prompt_ids(self) -> Tensor:
        """(batch, P) int64."""
        return self.prompt["input_ids"]

    @property
    def prompt_mask(self) -> Tensor:
        """(batch, P) int64, 0 for padding."""
        return self.prompt["attention_mask"]


def image_token_id(model: PreTrainedModel) -> int:
    """The id that marks image cells among keys. Raises `UnsupportedError` for a model that has none."""
    if model.config.model_type in KEPT_AWAY:
        return NO_WORD
    for name in ("image_token_id", "image_token_index", "video_token_id", "video_token_index"):
        if (value := getattr(model.config, name, None)) is not None:
            return int(value)
    why = "it is a text-only model, or it takes its pictures in by a way that GazeGuard does not know"
    if model.config.is_encoder_decoder:
        why = "it reads a picture without a prompt of words, or nothing in the prompt says which encoder states are the picture"
    raise UnsupportedError(
        f"{type(model).__name__} has no image token in its configuration: {why}. Use a vision-language model with image tokens."
    )


def image_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that mark cells of pictures and, if they have one of their own, of videos: see `image_token_id`."""
    video = video_token_id(model)
    return (image_token_id(model), *(() if video is None else (int(video),)))


def context_of(model: PreTrainedModel) -> float:
    """How many tokens the model's decoder can read; infinite where its configuration does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def encode(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    captions: Sequence[str] = (),
) -> EncodedBatch:
    """One picture and one prompt per row, through the processor's chat template; on the model's device.

    Raises `InputError` for a prompt that names special tokens or, without captions, is longer than the model's context.
    """
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise InputError(
            f"{type(processor).__name__} is not a vision-language processor. "
            "Pass AutoProcessor.from_pretrained(...) of the model."
        )
    for prompt in dict.fromkeys(prompts):
        check_prompt(processor, prompt)
    with _TOKENIZING:
        made = _processed(processor, images, prompts, "right" if model.config.is_encoder_decoder else "left")
    tokens, limit = int(made["attention_mask"].sum(1).max()), context_of(model)
    if not captions and not model.config.is_encoder_decoder and tokens > limit:
        raise InputError(f"The prompt has {tokens} tokens, more than the model's context of {limit}. Make it shorter.")
    prompt = dict(made.to(model.device))
    forced = getattr(model.generation_config, "forced_bos_token_id", None)
    if model.config.is_encoder_decoder and forced is not None:  # BART: generate would write it before every caption
        prompt["decoder_input_ids"] = F.pad(decoder_prompt(model, prompt), (0, 1), value=forced)
    if not captions:
        return EncodedBatch(prompt, prompt)
    told = [tokenize(processor.tokenizer, caption) for caption in captions]
    whole = followed_by(model, prompt, [caption_ids for caption_ids, _ in told])
    return EncodedBatch(prompt, whole, *map(tuple, zip(*told, strict=True)))


def _processed(
    processor: ProcessorMixin, images: Sequence[Image.Image], prompts: Sequence[str], padding_side: str
) -> BatchFeature:
    """What the processor makes of one picture and one prompt per row."""
    if processor.chat_template is None:
        own = type(processor).__name__ in PUTS_PICTURES_ITSELF
        token = "" if own else getattr(processor, "image_token", "<image>")
        return processor(
            images=[[image] for image in images],
            text=[f"{token}{prompt}" for prompt in prompts],
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        for image, prompt in zip(images, prompts, strict=True)
    ]
    return processor.apply_chat_template(
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )


def followed_by(model: PreTrainedModel, inputs: Mapping[str, Any], written: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    """A batch of prompts, each followed by what was written after it, (T,) ids per row; padded on the right."""
    ids = inputs["input_ids"]
    length = max(len(own) for own in written)
    made = dict(inputs)
    if model.config.is_encoder_decoder:
        start = decoder_prompt(model, inputs)
        made["decoder_input_ids"] = F.pad(start, (0, length))
        for row, own in zip(made["decoder_input_ids"], written, strict=True):
            row[start.shape[1] : start.shape[1] + len(own)] = torch.from_numpy(own).to(row.device)
        return made
    for name, value in inputs.items():
        if name in PER_TOKEN:
            last = value[:, ids.shape[1] - 1 : ids.shape[1]]
            made[name] = torch.cat((value[:, : ids.shape[1]], last.expand(-1, length, *value.shape[2:])), dim=1)
        # Everything that runs along the sequence (mask, token types) goes on with it; a caption is plain text. In
        # PaliGemma type 0 is the prompt, which attends both ways, and 1 is what is written after it.
        if isinstance(value, Tensor) and value.shape == ids.shape:
            kind = int(name == "token_type_ids" and model.config.model_type == "paligemma")
            made[name] = torch.cat((value, value.new_full((len(written), length), kind)), dim=1)
    for row, own in enumerate(written):
        end = ids.shape[1] + len(own)
        made["input_ids"][row, ids.shape[1] : end] = torch.from_numpy(own).to(ids.device)
        made["attention_mask"][row, ids.shape[1] : end] = 1
    return made


def decoder_prompt(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """What an encoder-decoder's decoder reads before its first word, (batch, D) int64: as ``generate`` makes it."""
    given, configs = inputs.get("decoder_input_ids"), (model.generation_config, model.config.get_text_config(decoder=True))
    starts = [getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id") for config in configs]
    start = next(value for value in starts if value is not None)
    rows = len(inputs["input_ids"] if given is None else given)
    first = torch.as_tensor(start, device=model.device).view(-1, 1).expand(rows, 1)
    if given is None:
        return first
    return torch.cat((first, given), dim=1) if (given[:, :1] != first).all() else given


def has_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether a picture is among what a forward pass is given: only pixels are not whole numbers."""
    return any(isinstance(value, Tensor) and value.is_floating_point() and value.numel() for value in inputs.values())


def model_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What one forward pass needs: the inputs, and positions that do not count padding, as ``generate`` makes them."""
    takes = inspect.signature(model.forward).parameters
    made = {name: value for name, value in inputs.items() if name in takes}
    if model.config.is_encoder_decoder:  # each finds its own positions
        return {**made, "decoder_input_ids": decoder_prompt(model, inputs)}
    rotates_in_space = hasattr(getattr(model, "model", model), "get_rope_index")  # M-RoPE models find their own positions
    if "position_ids" in takes and not rotates_in_space:
        made["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return made


def check_text(text: Any, what: str) -> None:
    """Raise `InputError` for what is no text, or none that could be written down."""
    if not isinstance(text, str):
        raise InputError(f"The {what} is no text, but of type {type(text).__name__}. Pass a str.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"Character {error.start} of the {what} is half of a surrogate pair, which is no text. Repair its encoding."
        ) from error


def check_prompt(processor: ProcessorMixin, prompt: Any) -> None:
    """Raise `InputError` for a prompt that names special tokens, which a processor would take for the tokens themselves."""
    check_text(prompt, "prompt")
    tokenizer = processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {*tokenizer.all_special_tokens, getattr(processor, "image_token", "")} - {tokenizer.unk_token, None, ""}
    if found := sorted(name for name in special if name in prompt):
        raise InputError(
            f"The prompt holds {found[0]!r}, which the model would not read as words: it is a special token. Take it out."
        )


def tokenize(tokenizer: PreTrainedTokenizerBase, caption: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids (T,) and the characters that each covers (T, 2), without special tokens: ``<image>`` in a caption is text."""
    check_text(caption, "caption")
    more = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    with _TOKENIZING:
        made = tokenizer(caption, add_special_tokens=False, split_special_tokens=True, **more)
    ids = np.array(made["input_ids"], np.int64)
    if tokenizer.is_fast:
        return ids, np.array(made["offset_mapping"], np.int64).reshape(-1, 2)
    return ids, decode(tokenizer, ids)[1]


def decode(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64]) -> tuple[str, NDArray[np.int64]]:
    """The text of ``ids`` (T,) and the characters that each covers (T, 2).

    A fast tokenizer that turns the text into the same ids again says it itself. Otherwise a token's characters are what it
    adds to the text of the few tokens before it, so that the cost grows with T and a tokenizer's rules about leading spaces
    are respected. Tokens that together make one character share it.
    """

    def text(part: NDArray[np.int64]) -> str:
        return tokenizer.decode(part.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    whole = text(ids)
    if tokenizer.is_fast:
        again, offsets = tokenize(tokenizer, whole)
        if np.array_equal(again, ids):
            return whole, offsets
    special = set(tokenizer.all_special_ids)
    offsets = np.zeros((len(ids), 2), np.int64)
    at, start, before = 0, 0, 0  # before: the length of the text of ids[start:i]
    for i, token in enumerate(ids.tolist()):
        if i - start == 16:
            start = i - 4
            before = len(text(ids[start:i]))
        now = len(text(ids[start : i + 1]))
        end = min(len(whole), at + max(0, now - before))
        before = now
        shared = end == at and at > 0 and token not in special
        offsets[i] = (at - 1 if shared else at, end)
        at = end
    return whole, offsets


def image_grids(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: Mapping[str, Any],
    ids: Tensor,
    mask: Tensor | None,
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    known: ImageGrid | None = None,
) -> list[ImageGrid]:
    """The image grid of every row of a batch of prompts (batch, P), or of what stands in their place in `gazeguard.recorder.Keys`.

    sizes: for each row the (width, height) in pixels of its pictures; by default what the processor made of them
    known: the grid of every row, for a layout that no rule knows
    A video is one picture, whose cells come once for each of its frames. (Qwen-VL makes one frame of two.)
    Raises `InputError` for a row without a picture, `UnsupportedError` for a layout that no rule knows.
    """
    tokens = image_token_ids(model)
    rows = ids.cpu().numpy()
    real = np.ones_like(rows, bool) if mask is None else mask.cpu().numpy().astype(bool)
    names = (*PER_PICTURE, *PER_VIDEO, *PER_RUN, *PER_CELL)
    told = {name: np.asarray(inputs[name].cpu()) for name in names if inputs.get(name) is not None}
    queues = pictures_told(model, told)
    seen, views = 0, 0  # image tokens and runs of them in the rows before
    grids = []
    for number, (row, is_real) in enumerate(zip(rows, real, strict=True)):
        own = row[is_real]
        runs, cells = image_cells(own, tokens), own[np.isin(own, tokens)]
        if not runs:
            raise InputError(
                f"Row {number} of the batch has no image token (id {tokens[0]}): the picture did not reach the prompt. Put an "
                'image into the message, {"type": "image", "image": ...}, and pass the processor\'s output whole.'
            )
        if known is not None:
            grids.append(_fitted(known, len(cells), sizes[number] if sizes is not None else None))
            continue
        if (cells == video_token_id(model)).any() and "video_grid_thw" not in told:
            raise UnsupportedError(
                f"Row {number} of the batch holds a video, and no rule says where in its frames the {len(cells)} image tokens "
                f"of {type(model).__name__} lie: only video_grid_thw tells. Pass grid=ImageGrid(...) with one box per token, "
                "or leave the video out."
            )
        share: dict[str, Any] = {name: told[name][views : views + len(runs)] for name in PER_RUN if name in told}
        share |= {name: told[name][seen : seen + len(cells)] for name in PER_CELL if name in told}
        views, seen, given = views + len(runs), seen + len(cells), None
        if queues is not None:
            mine = next_told(model, queues, cells)
            for what, parts in (("image", PER_PICTURE), ("video", PER_VIDEO)):
                chosen = [picture for kind, picture, _ in mine if kind == what]
                share |= {name: told[name][chosen] for name in parts if name in told and chosen}
            given = [canvas_of(model, told, what, picture) for what, picture, _ in mine]
        elif "image_sizes" in told:
            share["image_sizes"] = told["image_sizes"][_pictures_of(number, len(rows), len(told["image_sizes"]), sizes)]
        share |= {name: np.asarray(inputs[name][number].cpu()) for name in PER_ROW if inputs.get(name) is not None}
        if sizes is not None:
            given = sizes[number]
        elif not given:
            given = _processed_sizes(model, inputs, share, len(runs))
        with _TOKENIZING:  # some rules ask the tokenizer
            grids.append(find_grid(Prompt(own, runs, share, tuple(given), model, processor, sizes is not None)))
    return grids


def one_picture_a_row(inputs: Mapping[str, Any], rows: int) -> bool:
    """Whether all that a processor told of pictures, videos and their parts is one thing for each of the ``rows``."""
    names = (*PER_PICTURE, *PER_VIDEO, *PER_RUN, *PER_CELL)
    return all(len(inputs[name]) == rows for name in names if inputs.get(name) is not None)


def _pictures_of(number: int, rows: int, pictures: int, sizes: Sequence[Sequence[tuple[int, int]]] | None) -> slice:
    """Which pictures of a batch belong to a row: as many as it has sizes, or an equal share when nobody said."""
    if sizes is not None:
        start = sum(len(own) for own in sizes[:number])
        return slice(start, start + len(sizes[number]))
    each = pictures // rows
    return slice(number * each, (number + 1) * each)


def _fitted(known: ImageGrid, cells: int, sizes: Sequence[tuple[int, int]] | None) -> ImageGrid:
    """A grid that the caller knows, for a prompt with so many image tokens and, if given, pictures of these sizes."""
    if len(known) != cells:
        raise InputError(
            f"The grid that was passed has {len(known)} cells, but the prompt has {cells} image tokens. "
            "Pass one box per image token, or no grid for a layout that GazeGuard knows."
        )
    return known if sizes is None else replace(known, sizes=tuple(sizes))


def _processed_sizes(model: PreTrainedModel, inputs: Mapping[str, Any], share: Mapping[str, Any], runs: int) -> Any:
    """(width, height) of each picture as the vision encoder sees it, for callers who kept no original."""
    if "image_sizes" in share:
        return [(int(width), int(height)) for height, width in share["image_sizes"]]
    if "aspect_ratio_ids" in share:
        edge = model.config.vision_config.image_size
        return [(columns * edge, rows * edge) for rows, columns in canvases_of(model, share)]
    pixels = inputs.get("pixel_values")
    if pixels is not None and model.config.model_type in KEPT_AWAY:
        runs = pixels.shape[1]
    if pixels is not None and pixels.ndim >= 4:
        return [(int(pixels.shape[-1]), int(pixels.shape[-2]))] * runs
    # generate has turned the pixels into features already; most encoders take one square size
    side = getattr(getattr(model.config, "vision_config", None), "image_size", 1)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return [(int(width), int(height))] * runs
