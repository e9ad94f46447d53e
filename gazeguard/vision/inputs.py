"""Inputs of a forward pass: prompts with the tokens that follow them, a decoder's start, positions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from gazeguard.errors import InputError

# What processors say of each token of the prompt in more than one number; generated tokens have that of the last one.
PER_TOKEN = ("cross_attention_mask", "image_attention_mask")
GRIDS = ("image_grid_thw", "video_grid_thw")  # sizes of images and videos, for M-RoPE
# The token type of generated text. In PaliGemma type 0 is the prompt, which attends both ways.
TEXT_TYPE = {"paligemma": 1}


def context_length(model: PreTrainedModel) -> float:
    """How many tokens the model's decoder can read; infinite where its configuration does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def has_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether an image is among the inputs of a forward pass: only pixels are not whole numbers."""
    return any(isinstance(value, Tensor) and value.is_floating_point() and value.numel() for value in inputs.values())


def check_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Raise `InputError` where a model with M-RoPE lacks what it computes the positions of image tokens from.

    Without the sizes it would count image tokens like words, in silence.
    """
    rope_index = getattr(getattr(model, "model", model), "get_rope_index", None)
    if rope_index is None:
        return
    needed = set(inspect.signature(rope_index).parameters)
    missing = [] if "image_grid_thw" not in needed or any(inputs.get(name) is not None for name in GRIDS) else GRIDS[:1]
    if "mm_token_type_ids" in needed and inputs.get("mm_token_type_ids") is None:
        missing = (*missing, "mm_token_type_ids")
    if missing:
        raise InputError(
            f"The inputs of {type(model).__name__} have no {' and no '.join(missing)}, which say where its image tokens lie. "
            "Pass all that the processor of the model returns."
        )


def append_tokens(model: PreTrainedModel, inputs: Mapping[str, Any], token_ids: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    """A batch of prompts, each followed by the tokens that were generated after it; padded on the right.

    Args:
        model: The model that reads them.
        inputs: A batch as the processor makes it; ``input_ids`` (batch, P).
        token_ids: For each row (T,) int64, T of its own.

    Returns:
        The batch with ids, mask and token types of (batch, P + longest T); those of the decoder in an encoder-decoder.
    """
    longest = max(map(len, token_ids))
    if model.config.is_encoder_decoder:
        start = decoder_prompt(model, inputs)
        decoder_ids = F.pad(start, (0, longest))
        for row, ids in zip(decoder_ids, token_ids, strict=True):
            row[start.shape[1] : start.shape[1] + len(ids)] = torch.from_numpy(ids).to(row.device)
        return {**inputs, "decoder_input_ids": decoder_ids}
    prompt_ids = inputs["input_ids"]
    length, extended = prompt_ids.shape[1], dict(inputs)
    for name, value in inputs.items():
        if name in PER_TOKEN:
            last = value[:, length - 1 : length]
            extended[name] = torch.cat((value[:, :length], last.expand(-1, longest, *value.shape[2:])), dim=1)
        # Everything that runs along the sequence (mask, token types) goes on with it; a caption is plain text.
        if isinstance(value, Tensor) and value.shape == prompt_ids.shape:
            fill = TEXT_TYPE.get(model.config.model_type, 0) if name == "token_type_ids" else 0
            extended[name] = torch.cat((value, value.new_full((len(token_ids), longest), fill)), dim=1)
    for row, ids in enumerate(token_ids):
        extended["input_ids"][row, length : length + len(ids)] = torch.from_numpy(ids).to(prompt_ids.device)
        extended["attention_mask"][row, length : length + len(ids)] = 1
    return extended


def decoder_prompt(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """What an encoder-decoder's decoder reads before its first generated token, (batch, D) int64: as ``generate`` makes it."""
    given, configs = inputs.get("decoder_input_ids"), (model.generation_config, model.config.get_text_config(decoder=True))
    starts = [getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id") for config in configs]
    start = next(value for value in starts if value is not None)
    rows = len(inputs["input_ids"] if given is None else given)
    first = torch.as_tensor(start, device=model.device).view(-1, 1).expand(rows, 1)
    if given is None:
        return first
    return torch.cat((first, given), dim=1) if (given[:, :1] != first).all() else given


def model_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What one forward pass takes: the inputs that it knows, and positions that do not count padding, as in ``generate``.

    Positions that are given stay.
    """
    known = inspect.signature(model.forward).parameters
    passed = {name: value for name, value in inputs.items() if name in known}
    if model.config.is_encoder_decoder:  # computes its own positions
        return {**passed, "decoder_input_ids": decoder_prompt(model, inputs)}
    has_spatial_positions = hasattr(getattr(model, "model", model), "get_rope_index")  # M-RoPE models compute their own
    if "position_ids" in known and "position_ids" not in passed and not has_spatial_positions:
        passed["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return passed
