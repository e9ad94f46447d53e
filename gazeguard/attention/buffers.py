"""TODO attention.buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK, WIDTH = 64, 256  # rows that are kept in one piece of memory; what the width of kept masks is a multiple of


@dataclass(frozen=True)
class KeyLayout:
    """Where things are among the P keys of a batch of prompts: its tokens, or what stands in their place in `Keys`.

    columns: (batch, N) int64, the place of each image cell; rows with fewer repeat place 0
    valid:   (batch, N) bool, which of the columns are real
    segments: (batch, P, 4) float32, one-hot over `gazeguard.trace.SEGMENTS`; all zero for padding
    real:    (batch, P) bool, False for padding
    last:    the position of the query that predicts the first written token
    """

    columns: Tensor
    valid: Tensor
    segments: Tensor
    real: Tensor
    last: int

    @classmethod
    def from_ids(
        cls, input_ids: Tensor, attention_mask: Tensor | None, tokens: int | tuple[int, ...], last: int | None = None
    ) -> KeyLayout:
        """Read off a batch of prompt ids (batch, P), or off what `visual_keys` says: ``KeyLayout.from_ids(*visual_keys(...))``."""
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        image = torch.isin(input_ids, torch.as_tensor(tokens, device=input_ids.device)) & real
        cells = int(image.sum(1).max())
        # A stable sort brings each row's image positions to the front, in order.
        order = torch.argsort(~image, dim=1, stable=True)[:, :cells]
        valid = image.gather(1, order)
        first = torch.zeros_like(real).scatter_(1, real.int().argmax(1, keepdim=True), True) & real & ~image
        prompt = real & ~image & ~first
        kinds = torch.stack((image, prompt, torch.zeros_like(real), first), dim=-1).float()
        last = input_ids.shape[1] - 1 if last is None else last
        return cls(order.masked_fill(~valid, 0), valid, kinds, real, last)

    def repeated(self, times: int) -> KeyLayout:
        """Each prompt ``times`` over, as ``generate`` does for beams and for several captions per prompt."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.repeat_interleave(times, dim=0) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class CapturedActivations:
    """What was heard: for each row b and each t, the query that predicted token P + t. Tensors on the model's device.

    gaze:   (batch, T, H, N) float32, attention on each image cell
    segment_mass: (batch, T, H, 4) float32, attention on `gazeguard.trace.SEGMENTS`
    output: (batch, T, H, width per head) float32, each head's output before the output projection; zeros after a narrow
            head's own width where layers differ; divided by what `Backbone.norms` divide by
    hidden: (batch, T, model width), the last layer's state before the final norm, in the model's dtype
    top_ids: (batch, T, `NUM_CONTRAST_TOKENS` + 1) int64, the likeliest next words by the logits that the model gave while it ran; -1 where
            it gave none, as for most words of a replay
    top_logprobs: (batch, T, `NUM_CONTRAST_TOKENS` + 1) float32, nats, their log-probabilities; 0 where there were no logits
    entropy: (batch, T) float32, nats, of all words; 0 where there were no logits
    """

    gaze: Tensor
    segment_mass: Tensor
    output: Tensor
    hidden: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    entropy: Tensor


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts along ``dim``, each filled up with zeros to the widest: in Gemma4 some layers have wider heads."""
    widths = [part.shape[-1] for part in parts]
    widest = max(widths)
    if min(widths) < widest:
        parts = [F.pad(part, (0, widest - width)) for part, width in zip(parts, widths, strict=True)]
    return torch.cat(parts, dim=dim)


class RowBuffer:
    """CapturedActivations in the order of their positions; dimension 1 of every tensor. What is heard again replaces what was heard.

    They are copied into blocks of `BLOCK` rows. A small tensor kept of every pass would lie on the heap between the large ones
    that a growing cache leaves behind, which then cannot be joined and used again.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[int, Tensor]] = []
        self.block: Tensor | None = None  # the last one, whose first rows are used
        self.used = 0

    def __len__(self) -> int:
        return self.parts[-1][0] + self.parts[-1][1].shape[1] if self.parts else 0

    def cut(self, start: int) -> None:
        """Forget the rows from ``start`` on."""
        while self.parts and self.parts[-1][0] >= start:
            self.parts.pop()
        if len(self) > start:
            at, rows = self.parts[-1]
            self.parts[-1] = at, rows[:, : start - at]

    def put(self, start: int, rows: Tensor) -> None:
        self.cut(start)
        count, shape = rows.shape[1], self.block.shape if self.block is not None else ()
        if shape[:1] + shape[2:] != rows.shape[:1] + rows.shape[2:] or shape[1] < self.used + count:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
                self.block = rows.new_empty((rows.shape[0], max(BLOCK, count), *rows.shape[2:]))
            self.used = 0
        kept = self.block[:, self.used : self.used + count]
        self.parts.append((start, kept.copy_(rows.detach())))
        self.used += count

    def row(self, at: int) -> Tensor:
        start, rows = next(part for part in reversed(self.parts) if part[0] <= at)
        return rows[:, at - start]

    def joined(self, start: int = 0) -> Tensor:
        """The rows from ``start`` on."""
        return _side_by_side([rows[:, max(0, start - at) :] for at, rows in self.parts if at + rows.shape[1] > start], dim=1)

    def over(self, blank: Tensor, start: int = 0) -> Tensor:
        """``blank`` (batch, T, ...), with the rows from ``start`` on where there are any."""
        for at, rows in self.parts:
            if at + rows.shape[1] > start:
                blank[:, max(0, at - start) : at + rows.shape[1] - start] = rows[:, max(0, start - at) :]
        return blank


class LayerBuffers:
    """What a recorder heard of one layer: the rows read, the rows pending, and the keys to read them with."""

    def __init__(self, heads: Tensor, width: int) -> None:
        self.heads, self.width = heads, width  # those that are watched, and numbers per head of the layer's output
        self.gaze, self.segment_mass, self.output = RowBuffer(), RowBuffer(), RowBuffer()
        self.pending: list[tuple[int, int]] = []  # position and number of keys of rows whose attention is not computed yet
        self.queries = RowBuffer()  # of the chosen heads in the pending rows, (batch, r, K, d)
        self.openings = (
            RowBuffer()
        )  # of the pending rows, (batch or 1, r, heads or 1, S or more) float32; empty if all are open
        self.key: Tensor | None = None
        self.scaling, self.group = 0.0, 1
