"""Key layout: which keys of a batch of prompts are image tokens, other prompt, the first token, or padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyLayout:
    """The P keys of a batch of prompts: its tokens, or what stands for them in `visual_keys.VisualKeys`.

    Attributes:
        columns: (batch, N) int64, the column of each image token; rows with fewer repeat column 0.
        valid: (batch, N) bool, which of the columns are real.
        segments: (batch, P, 4) float32, one-hot over `gazeguard.trace.SEGMENTS`; all zero for padding.
        real: (batch, P) bool, False for padding.
        last: The position of the query that predicts the first generated token.
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
        """The layout of a batch of prompt ids, or of visual keys: ``KeyLayout.from_ids(*visual_keys(...))``.

        Args:
            input_ids: (batch, P) int64.
            attention_mask: (batch, P), 0 for padding; without it nothing is padding.
            tokens: The ids that stand for image tokens.
            last: The position of the query that predicts the first generated token; by default P - 1.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        image = torch.isin(input_ids, torch.as_tensor(tokens, device=input_ids.device)) & real
        count = int(image.sum(1).max())
        # A stable sort brings each row's image positions to the front, in order.
        order = torch.argsort(~image, dim=1, stable=True)[:, :count]
        valid = image.gather(1, order)
        first = torch.zeros_like(real).scatter_(1, real.int().argmax(1, keepdim=True), True) & real & ~image
        prompt = real & ~image & ~first
        segments = torch.stack((image, prompt, torch.zeros_like(real), first), dim=-1).float()
        last = input_ids.shape[1] - 1 if last is None else last
        return cls(order.masked_fill(~valid, 0), valid, segments, real, last)

    @property
    def keys(self) -> int:
        """P, the number of keys."""
        return self.real.shape[1]

    def repeated(self, times: int) -> KeyLayout:
        """Each prompt ``times`` over, as ``generate`` does for beams and for several captions per prompt."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        repeated: dict[str, Any] = {name: tensor.repeat_interleave(times, dim=0) for name, tensor in tensors.items()}
        return replace(self, **repeated)

    def image_columns(self, offset: int = 0) -> tuple[Tensor, Tensor]:
        """``columns`` and ``valid`` when the first ``offset`` keys have left the cache; negative when others stand in front."""
        if not offset:
            return self.columns, self.valid
        columns = self.columns - offset
        return columns.clamp(min=0), self.valid & (columns >= 0)

    def image_attention(self, weights: Tensor, offset: int = 0) -> Tensor:
        """The part of attention (batch, K, r, S) that is on the image tokens: (batch, K, r, N)."""
        columns, valid = self.image_columns(offset)
        return weights.gather(3, columns[:, None, None].expand(-1, *weights.shape[1:3], -1)) * valid[:, None, None]

    def segment_attention(self, weights: Tensor, offset: int = 0) -> Tensor:
        """Attention (batch, K, r, S) summed by segment: (batch, K, r, 4). Keys beyond the prompt are generated text."""
        segments, before = self.segments[:, max(0, offset) :], max(0, -offset)
        after = before + segments.shape[1]
        mass = weights[..., before:after] @ segments[:, None]
        mass[..., 2] += weights[..., :before].sum(-1) + weights[..., after:].sum(-1)
        return mass
