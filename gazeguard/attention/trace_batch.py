"""Trace figures of a batch: from a recorder's tensors to arrays, and from these to one `GazeTrace` per caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """The figures of a `GazeTrace` for the tokens of a batch, all float32 on the CPU.

    Attributes:
        logprobs: (batch, T), nats.
        entropy: (batch, T), nats.
        gaze: (batch, T, H, N), attention on each image token.
        segment_mass: (batch, T, H, 4), attention by segment.
        attribution: (batch, T, H), logits.
        attended_logprob: (batch, T), nats; NaN when unknown.
        internal_confidence: (batch, T), nats; NaN when unknown.
    """

    logprobs: F32
    entropy: F32
    gaze: F32
    segment_mass: F32
    attribution: F32
    attended_logprob: F32
    internal_confidence: F32

    def __len__(self) -> int:
        """Tokens of each row."""
        return self.logprobs.shape[1]

    def truncate(self, tokens: int) -> TraceBatch:
        """So many tokens of each row, from the first on."""
        return self if tokens >= len(self) else TraceBatch(*(value[:, :tokens] for value in vars(self).values()))

    def concatenate(self, later: TraceBatch) -> TraceBatch:
        """These tokens, followed by ``later`` ones of the same batch."""
        return TraceBatch(
            *(np.concatenate(pair, axis=1) for pair in zip(vars(self).values(), vars(later).values(), strict=True))
        )

    def select(self, row: int, steps: Sequence[int]) -> TraceBatch:
        """The tokens of one row at some steps, a batch of one."""
        return TraceBatch(*(value[row : row + 1, steps] for value in vars(self).values()))

    def with_logit_lens(self, lens: LogitLens | None, token_ids: Tensor) -> TraceBatch:
        """The same with attended log-probability and internal confidence.

        Args:
            lens: The logit lens on the image tokens; None adds nothing.
            token_ids: (batch, T) int64, the generated tokens.
        """
        if lens is None:
            return self
        gaze, token_ids = (tensor.to(lens.known.device) for tensor in (torch.from_numpy(self.gaze), token_ids))
        attended, confidence = (value.cpu().numpy() for value in attended_logprobs(lens, gaze, token_ids))
        return replace(self, attended_logprob=attended, internal_confidence=confidence)

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
        figures = {name: value[row, steps] for name, value in vars(self).items()}
        figures["gaze"] = figures["gaze"][..., : len(grid)]
        ids = np.asarray(token_ids, np.int64)
        return GazeTrace(text=text, token_ids=ids, offsets=offsets, grid=grid, **figures, **other)


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
    unknown = torch.full_like(statistics.logprobs, torch.nan)
    tensors = (
        *(statistics.logprobs, statistics.entropy, captured.gaze, captured.segment_mass, statistics.attribution),
        *(unknown, unknown),
    )
    return TraceBatch(*(tensor.float().cpu().numpy() for tensor in tensors)).with_logit_lens(lens, token_ids)
