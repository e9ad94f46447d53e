"""Packing of lessons: many conversations about one image in one sequence, none of which sees another.

The image prefix is computed once; every conversation attends to the prefix and to itself, and its positions continue the
prefix. To the model each conversation is exactly what the chat template makes of it alone (a test compares the two).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaProcessor

from gazeguard.lab.scenes.captions import Turn
from gazeguard.lab.scenes.model import END, IMAGE_TOKEN, START
from gazeguard.lab.scenes.world import GRID

IGNORED = -100
YES_NO_WEIGHT = 3.0  # of the one token that answers a yes/no question
PADDING = -1  # the segment of padding
PACKED = "gazeguard_packed"  # the attention implementation of training


@dataclass(frozen=True)
class PackedLesson:
    """One packed lesson. All lists have one entry per token.

    segments: 0 for the image prefix, then 1, 2, ... per conversation
    targets:  the next token where it belongs to an answer, else IGNORED
    """

    ids: list[int]
    positions: list[int]
    segments: list[int]
    targets: list[int]
    weights: list[float]


class Packer:
    """Turns conversations into packed token sequences."""

    def __init__(self, processor: LlavaProcessor) -> None:
        tokenizer = processor.tokenizer
        self.pad = tokenizer.pad_token_id
        start, end, image = (tokenizer.convert_tokens_to_ids(token) for token in (START, END, IMAGE_TOKEN))
        self.encode = lru_cache(maxsize=65536)(lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids))
        self.end = end
        self.prefix = [start, *self.encode("user\n"), *[image] * GRID * GRID]
        self.to_assistant = [end, *self.encode("\n"), start, *self.encode("assistant\n")]
        self.to_user = [*self.encode("\n"), start, *self.encode("user\n")]
        self.decisive = {self.encode("Yes.")[0], self.encode("No.")[0]}

    def conversation(self, turns: Sequence[Turn]) -> tuple[list[int], list[int], list[float]]:
        """Token ids after the image prefix, targets and weights of one conversation."""
        ids: list[int] = []
        answer: list[float] = []  # the weight of a token as a target, 0 where it is given
        for number, turn in enumerate(turns):
            question_ids = [*(self.to_user if number else ()), *self.encode(turn.prompt), *self.to_assistant]
            answer_ids = [*self.encode(turn.answer), self.end]
            first = YES_NO_WEIGHT if answer_ids[0] in self.decisive and len(answer_ids) == 3 else 1.0
            ids += question_ids + answer_ids
            answer += [0.0] * len(question_ids) + [first] + [1.0] * (len(answer_ids) - 1)
        targets = [token if weight else IGNORED for token, weight in zip(ids[1:], answer[1:], strict=True)]
        return ids, [*targets, IGNORED], [*answer[1:], 0.0]

    def pack(self, conversations: Sequence[Sequence[Turn]]) -> PackedLesson:
        """The image prefix and all conversations."""
        ids, length = list(self.prefix), len(self.prefix)
        positions, segments = list(range(length)), [0] * length
        targets, weights = [IGNORED] * length, [0.0] * length
        for number, turns in enumerate(conversations, 1):
            tokens, following, weight = self.conversation(turns)
            ids += tokens
            targets += following
            weights += weight
            positions += range(length, length + len(tokens))
            segments += [number] * len(tokens)
        return PackedLesson(ids, positions, segments, targets, weights)

    def collate(self, sequences: Sequence[PackedLesson]) -> dict[str, Tensor]:
        """Right-padded tensors (batch, tokens); the length is a multiple of 16."""
        length = -(-max(len(item.ids) for item in sequences) // 16) * 16

        def padded(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor([[*row, *[fill] * (length - len(row))] for row in values], dtype=dtype)

        return {
            "ids": padded([item.ids for item in sequences], self.pad, torch.int64),
            "positions": padded([item.positions for item in sequences], 0, torch.int64),
            "segments": padded([item.segments for item in sequences], PADDING, torch.int64),
            "targets": padded([item.targets for item in sequences], IGNORED, torch.int64),
            "weights": padded([item.weights for item in sequences], 0.0, torch.float32),
        }


def attention_mask(segments: Tensor) -> Tensor:
    """Additive mask from segments: (batch, tokens) to (batch, 1, tokens, tokens) float32, 0 where a token attends."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, :], segments[:, :, None]
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)  # padding attends to itself alone
    attends = (causal & (keys >= 0) & ((keys == 0) | (keys == queries))) | itself
    return torch.zeros(attends.shape, device=segments.device).masked_fill_(~attends, -1e9)[:, None]


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention by plain matrix products; with a dense mask on a CPU four times as fast as the fused kernel.

    Args:
        module: The attention layer.
        query: (batch, heads, tokens, width).
        key: (batch, key heads, tokens, width), as ``value``.
        value: See key.
        attention_mask: (batch, 1, tokens, tokens), added to the scores.
        scaling: Of the scores.

    Returns:
        (batch, tokens, heads, width), and no weights.
    """
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    grouped = (query * scaling).reshape(batch, groups, heads // groups * tokens, width)
    scores = (grouped @ key.transpose(2, 3)).view(batch, groups, heads // groups, tokens, tokens)
    weights = (scores + attention_mask[:, :, None].to(scores.dtype)).softmax(-1)
    output = weights.view(batch, groups, heads // groups * tokens, tokens) @ value
    return output.reshape(batch, heads, tokens, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED, packed_attention)
