"""Packing of captions: several captions of one image and prompt follow it in one row, so that prompt and image are read once.

Each caption attends to the prompt and to itself alone, and its positions go on from the prompt, as if it were the only one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from gazeguard.vision.inputs import append_tokens

# Families whose prompt attends both ways, by token types of which a mask of four dimensions would say nothing.
ATTEND_BOTH_WAYS = ("paligemma", "molmo2")


MAX_MASK = 2**28  # bytes of a batch's attention mask, which grows with the square of its rows' length


class Packing(NamedTuple):
    """Where packed captions are.

    Attributes:
        rows: For each caption the row of the batch that it is in.
        steps: (captions, longest T) int64, the decoding step of each token in its row, counted from the first token after the
            prompt; 0 behind a caption's end.
    """

    rows: Sequence[int]
    steps: NDArray[np.int64]


def worth_packing(rows: Sequence[int]) -> bool:
    """Whether a model reads less when captions with these rows are packed.

    As if each caption were as long as its prompt, which holds the image and is longer: then what is padded counts in full.
    """
    counts = np.bincount(rows)
    return bool(len(counts) * (1 + counts.max()) < 2 * len(rows))


def fits(prompt_length: int, token_ids: Sequence[NDArray[np.int64]], rows: Sequence[int]) -> bool:
    """Whether the attention mask of packed captions is small enough; of the arguments of `pack`, and a prompt's tokens."""
    longest = int(np.bincount(rows, [len(ids) for ids in token_ids]).max())
    return bool((max(rows) + 1) * (prompt_length + longest) ** 2 <= MAX_MASK)


def pack(
    model: PreTrainedModel, inputs: Mapping[str, Any], token_ids: Sequence[NDArray[np.int64]], rows: Sequence[int]
) -> tuple[dict[str, Any], Packing]:
    """A batch of prompts, each followed by all its captions.

    Args:
        model: A model whose text decoder takes a mask of four dimensions and positions.
        inputs: The prompts, padded on the left, as the processor makes them.
        token_ids: The captions, (T,) each.
        rows: For each caption its prompt; every prompt has one.

    Returns:
        What one forward pass takes, its attention mask (batch, 1, S, S) bool, and where the captions are in it.
    """
    own: list[list[int]] = [[] for _ in inputs["input_ids"]]
    for number, row in enumerate(rows):
        own[row].append(number)
    joined = append_tokens(model, inputs, [np.concatenate([token_ids[number] for number in numbers]) for numbers in own])
    prompt, length = inputs["input_ids"].shape[1], joined["input_ids"].shape[1]
    caption_of = np.zeros((len(own), length), np.int64)  # 0 in the prompt, its number + 1 in a caption
    column_in_caption = np.zeros((len(own), length - prompt), np.int64)
    steps = np.zeros((len(token_ids), max(map(len, token_ids))), np.int64)
    for row, numbers in enumerate(own):
        start = 0
        for number in numbers:
            count = len(token_ids[number])
            caption_of[row, prompt + start : prompt + start + count] = number + 1
            column_in_caption[row, start : start + count] = range(count)
            steps[number, 1:count] = range(start + 1, start + count)  # the first token follows the prompt's own last query
            start += count
    device = joined["input_ids"].device
    owner, columns = torch.from_numpy(caption_of).to(device), torch.from_numpy(column_in_caption).to(device)
    positions = _prompt_positions(model, inputs)
    joined["position_ids"] = torch.cat((positions, positions[..., -1:] + 1 + columns), dim=-1)
    joined["attention_mask"] = _mask(joined["attention_mask"].bool(), owner)
    return joined, Packing(rows, steps)


def _mask(real: Tensor, owner: Tensor) -> Tensor:
    """(batch, 1, S, S) bool: which keys a query attends to, of ``real`` ones (batch, S) that belong to an ``owner``."""
    length = real.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    seen = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])
    itself = torch.eye(length, dtype=torch.bool, device=real.device)  # padding, too: a query without keys has no softmax
    return ((seen & real[:, None] & causal) | itself)[:, None]


def _prompt_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """(..., batch, P): the positions of the prompts' tokens, in as many dimensions as the model has."""
    rope_index = getattr(getattr(model, "model", model), "get_rope_index", None)
    if rope_index is None:
        return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    known = inspect.signature(rope_index).parameters
    return rope_index(**{name: value for name, value in inputs.items() if name in known})[0]
