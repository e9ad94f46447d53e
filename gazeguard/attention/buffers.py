"""Buffers of captured activations, in the order of decoding steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gazeguard.attention.kernels import additive_mask
from gazeguard.errors import given

BLOCK = 64  # rows that are kept in one piece of memory
MASK_WIDTH = 256  # the width of kept masks is a multiple of this, so that many rows share a block


def sent(values: Sequence[Any], device: torch.device) -> Tensor:
    """The host's numbers as a tensor on the device; the host waits for none of its own."""
    return torch.tensor(values).to(device, non_blocking=True)


@dataclass(frozen=True)
class CapturedActivations:
    """Captured activations of a batch: for each row and each t, the query that predicted token P + t.

    Tensors are on the model's device.

    Attributes:
        gaze: (batch, T, H, N) float32, attention on each image token.
        segment_mass: (batch, T, H, 4) float32, attention on `gazeguard.trace.SEGMENTS`.
        output: (batch, T, H, width per head) float32, each head's output before the output projection; zeros after a narrow
            head's own width where layers differ; divided by the scales of `Backbone.norms`.
        hidden: (batch, T, model width), the last layer's state before the final norm, in the model's dtype.
        top_ids: (batch, T, k) int64, the most probable next tokens by the logits that the model gave while it ran; -1 where it
            gave none, as at most steps of a replay. k is `NUM_CONTRAST_TOKENS` + 1, or the vocabulary if that is smaller.
        top_logprobs: (batch, T, k) float32, nats, their log-probabilities; 0 where there were no logits.
        entropy: (batch, T) float32, nats, of the whole distribution; 0 where there were no logits.
    """

    gaze: Tensor
    segment_mass: Tensor
    output: Tensor
    hidden: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    entropy: Tensor


def concatenate_padded(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts along ``dim``, each padded with zeros to the widest: in Gemma4 some layers have wider heads."""
    widths = [part.shape[-1] for part in parts]
    widest = max(widths)
    if min(widths) < widest:
        parts = [F.pad(part, (0, widest - width)) for part, width in zip(parts, widths, strict=True)]
    return torch.cat(list(parts), dim=dim)


class RowBuffer:
    """Rows along dimension 1, in the order of their steps; a row that is put again replaces what was there.

    Rows are copied into blocks of `BLOCK`. A small tensor kept of every pass would lie on the heap between the large ones
    that a growing cache leaves behind, which then cannot be joined and used again.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[int, Tensor]] = []  # (first step, rows)
        self.block: Tensor | None = None  # the newest block, whose first rows are used
        self.used = 0

    def __len__(self) -> int:
        return self.parts[-1][0] + self.parts[-1][1].shape[1] if self.parts else 0

    def cut(self, start: int) -> None:
        """Remove the rows from step ``start`` on."""
        while self.parts and self.parts[-1][0] >= start:
            self.parts.pop()
        if len(self) > start:
            first, rows = self.parts[-1]
            self.parts[-1] = first, rows[:, : start - first]

    def put(self, start: int, rows: Tensor) -> None:
        """Copy rows (batch, r, ...) in from step ``start`` on, in place of the rows from there on."""
        self.cut(start)
        count = rows.shape[1]
        kept = None if self.block is None else self.block[:, self.used : self.used + count]
        if kept is None or kept.shape != rows.shape:  # of another shape, or no room
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
                self.block = rows.new_empty((rows.shape[0], max(BLOCK, count), *rows.shape[2:]))
            self.used, kept = 0, self.block[:, :count]
        self.parts.append((start, kept.copy_(rows.detach())))
        self.used += count

    def scale_last(self, scale: Tensor) -> None:
        """Multiply the rows that were put last."""
        start, rows = self.parts[-1]
        self.parts[-1] = start, rows * scale

    def row(self, step: int) -> Tensor:
        """One row, (batch, ...)."""
        start, rows = next(part for part in reversed(self.parts) if part[0] <= step)
        return rows[:, step - start]

    def joined(self, start: int = 0) -> Tensor:
        """The rows from step ``start`` on, (batch, T, ...)."""
        return concatenate_padded(
            [rows[:, max(0, start - first) :] for first, rows in self.parts if first + rows.shape[1] > start], dim=1
        )

    def write_over(self, default: Tensor, start: int = 0) -> Tensor:
        """``default`` (batch, T, ...), overwritten with the rows from step ``start`` on where there are any."""
        for first, rows in self.parts:
            if first + rows.shape[1] > start:
                default[:, max(0, first - start) : first + rows.shape[1] - start] = rows[:, max(0, start - first) :]
        return default


class LayerBuffers:
    """The captured activations of one layer, and the deferred queries with the keys to compute their attention from.

    Args:
        heads: (K,) int64, the recorded heads of the layer.
        columns: Their indices among all recorded heads.
        width: Numbers per head of the layer's attention output.
    """

    def __init__(self, heads: Tensor, columns: Sequence[int], width: int) -> None:
        self.heads, self.columns, self.width = heads, list(columns), width
        self.gaze, self.segment_mass, self.output = RowBuffer(), RowBuffer(), RowBuffer()
        self.deferred: list[tuple[int, int]] = []  # (step, number of keys) of queries whose attention is not computed yet
        self.queries = RowBuffer()  # the deferred ones of the recorded heads, (batch, r, K, d)
        self.masks = RowBuffer()  # theirs, (batch or 1, r, heads or 1, S or more) float32; empty if nothing is masked
        self.key: Tensor | None = None  # (batch, kv heads, S, d), the newest
        self.scaling, self.group = 0.0, 1  # of the scores; query heads per key head

    @property
    def first_deferred(self) -> int | None:
        """The step of the first deferred query, None when there is none."""
        return self.deferred[0][0] if self.deferred else None

    def is_last_deferred(self, step: int) -> bool:
        """Whether a step's query is the newest of the deferred ones."""
        return bool(self.deferred) and self.deferred[-1][0] == step

    def drop_deferred(self, start: int) -> None:
        """Remove the deferred queries from step ``start`` on: they run again."""
        while self.deferred and self.deferred[-1][0] >= start:
            self.deferred.pop()
        self.masks.cut(start)

    def accepts(self, mask: Tensor | None) -> bool:
        """Whether a query with this mask can join the deferred ones: masks of another shape cannot be concatenated."""
        shape = [] if mask is None else [mask.shape[:2]]
        return not self.deferred or [rows.shape[:3:2] for _, rows in self.masks.parts[-1:]] == shape

    def defer(self, step: int, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        """Keep a query (batch, K, 1, d), whose attention is over these keys, or over what they grow to."""
        keys = key.shape[2]
        if mask is not None:
            self.masks.put(step, F.pad(mask, (0, -keys % MASK_WIDTH)).transpose(1, 2))
        self.queries.put(step, query.transpose(1, 2))
        self.deferred.append((step, keys))
        self.key = key

    def deferred_attention(self, start: int) -> Tensor:
        """Attention (batch, K, r, S) of the deferred queries from step ``start`` on."""
        query = self.queries.joined(start).transpose(1, 2).float()  # (batch, K, r, d)
        key = given(self.key).index_select(1, self.heads // self.group).float()
        scores = query @ key.transpose(2, 3) * self.scaling
        keys = scores.shape[3]
        lengths = [length for step, length in self.deferred if step >= start]
        if min(lengths) < keys:
            ends = sent(lengths, key.device)
            scores += additive_mask(torch.arange(keys, device=key.device) < ends[:, None])
        if self.masks.parts:
            scores += self.masks.joined(start).transpose(1, 2)[..., :keys]
        return scores.softmax(-1)

    def clear_deferred(self) -> None:
        """Forget the deferred queries, whose attention has been computed."""
        start = self.deferred[0][0]
        self.deferred, self.key = [], None
        self.queries.cut(start)
        self.masks.cut(start)


class TopTokenBuffers:
    """The model's own statistics at each step, as `attribution.top_k_statistics` gives them, where it gave logits."""

    def __init__(self) -> None:
        self.ids, self.logprobs, self.entropy = RowBuffer(), RowBuffer(), RowBuffer()

    def cut(self, start: int) -> None:
        """Remove the rows from step ``start`` on."""
        for rows in (self.ids, self.logprobs, self.entropy):
            rows.cut(start)

    def put(self, start: int, statistics: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep ids (batch, r, k), log-probabilities (batch, r, k) and entropy (batch, r) from step ``start`` on."""
        for rows, values in zip((self.ids, self.logprobs, self.entropy), statistics, strict=True):
            rows.put(start, values)

    def joined(self, like: Tensor, count: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, log-probabilities and entropy from step ``start`` on, -1 and 0 where the model gave no logits.

        Args:
            like: (batch, T, ...), whose batch, steps and device they have.
            count: k, the number of tokens at each step.
            start: The first step.
        """
        entropy = like.new_zeros(like.shape[:2], dtype=torch.float32)
        logprobs = entropy[..., None].repeat(1, 1, count)
        ids = torch.full_like(logprobs, -1, dtype=torch.int64)
        return (
            self.ids.write_over(ids, start),
            self.logprobs.write_over(logprobs, start),
            self.entropy.write_over(entropy, start),
        )
