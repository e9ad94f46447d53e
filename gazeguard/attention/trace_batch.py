"""Trace figures of a batch: from a recorder's tensors to arrays, and from these to one `GazeTrace` per caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.attention.attribution import token_statistics
from gazeguard.attention.backbone import Backbone, Head
from gazeguard.attention.buffers import CapturedActivations
from gazeguard.attention.logit_lens import LogitLens, attended_logprobs
from gazeguard.trace import F32, GazeTrace
from gazeguard.vision.grid import ImageGrid


@dataclass(frozen=True, eq=False)
class TraceBatch:
    """The figures of a `GazeTrace` for the captions of a batch, all float32 on the CPU; all but the last for each token.

    Attributes:
        logprobs: (batch, T), nats.
        entropy: (batch, T), nats.
        gaze: (batch, T, H, N), attention on each image token.
        segment_mass: (batch, T, H, 4), attention by segment.
        attribution: (batch, T, H), logits.
        attended_logprob: (batch, T), nats; NaN when unknown.
        internal_confidence: (batch, T), nats; NaN when unknown.
        image_state: (batch, width), mean normed state of the image tokens, NaN when unknown; None without a logit lens.
    """

    logprobs: F32
    entropy: F32
    gaze: F32
    segment_mass: F32
    attribution: F32
    attended_logprob: F32
    internal_confidence: F32
    image_state: F32 | None = None

    def __len__(self) -> int:
        """Tokens of each row."""
        return self.logprobs.shape[1]

    def concatenate(self, later: TraceBatch) -> TraceBatch:
        """These tokens, followed by ``later`` ones of the same batch."""
        return replace(self, **{n: np.concatenate((getattr(self, n), getattr(later, n)), axis=1) for n in PER_TOKEN})

    def with_token(self, row: int, step: int, other: TraceBatch) -> TraceBatch:
        """The same with another token at one step of a row, the only one of ``other``."""

        def replaced(name: str) -> F32:
            value = getattr(self, name).copy()
            value[row, step] = getattr(other, name)[0, 0]
            return value

        return replace(self, **{name: replaced(name) for name in PER_TOKEN})

    def select(self, row: int, steps: Sequence[int]) -> TraceBatch:
        """The tokens of one row at some steps, a batch of one."""
        state = None if self.image_state is None else self.image_state[row : row + 1]
        return replace(self._each_token(lambda value: value[row : row + 1, steps]), image_state=state)

    def _each_token(self, change: Callable[[F32], F32]) -> TraceBatch:
        return replace(self, **{name: change(getattr(self, name)) for name in PER_TOKEN})

    def trace(
        self,
        row: int,
        steps: Sequence[int] | slice,
        token_ids: NDArray[np.int64],
        text: str,
        offsets: NDArray[np.int64],
        grid: ImageGrid,
        **other: Any,
    ) -> GazeTrace:
        """The trace of one caption.

        Args:
            row: Which row of the batch.
            steps: The decoding steps that generated its tokens.
            token_ids: (T,) int64, the tokens.
            text: The caption.
            offsets: (T, 2) int64, the characters of each token.
            grid: The image grid of its prompt.
            **other: The other fields of `GazeTrace`.
        """
        figures = {name: getattr(self, name)[row, steps] for name in PER_TOKEN}
        if self.image_state is not None and np.isfinite(self.image_state[row]).all():
            other["image_state"] = self.image_state[row]
        figures["gaze"] = figures["gaze"][..., : len(grid)]
        ids = np.asarray(token_ids, np.int64)
        return GazeTrace(text=text, token_ids=ids, offsets=offsets, grid=grid, **figures, **other)


PER_TOKEN = tuple(field.name for field in fields(TraceBatch) if field.name != "image_state")


def trace_batch(
    backbone: Backbone, heads: Sequence[Head], captured: CapturedActivations, token_ids: Tensor, lens: LogitLens | None
) -> TraceBatch:
    """The figures of generated tokens, from the activations at the steps that predicted them.

    Args:
        backbone: The model's parts.
        heads: The H recorded heads.
        captured: The activations of T steps.
        token_ids: (batch, T) int64, the generated tokens.
        lens: The logit lens on the image tokens; None leaves attended log-probability and internal confidence NaN.
    """
    statistics = token_statistics(backbone, heads, captured, token_ids)
    values = [statistics.logprobs, statistics.entropy, captured.gaze, captured.segment_mass, statistics.attribution]
    if lens is None:
        values += [torch.full_like(statistics.logprobs, torch.nan)] * 2
    else:
        device = lens.known.device
        values += [*attended_logprobs(lens, captured.gaze.to(device), token_ids.to(device)), lens.mean_states()]
    return TraceBatch(*_on_host(values))


def _on_host(values: Sequence[Tensor]) -> list[F32]:
    """The values as float32 arrays; from a GPU in one transfer, since the host waits for each."""
    if all(value.device.type == "cpu" for value in values):
        return [value.float().numpy() for value in values]
    flat = [value.to(values[0].device).float().flatten() for value in values]
    parts = torch.cat(flat).cpu().split([len(each) for each in flat])
    return [part.view(value.shape).numpy() for part, value in zip(parts, values, strict=True)]
