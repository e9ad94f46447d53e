"""What was heard of each word, in numbers? From the recorder's tensors to arrays, and from these to one `GazeTrace` per caption."""

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
    """The numbers of a `GazeTrace` for the words of a batch, all float32 on the CPU: gaze (batch, T, H, N), segment_mass (batch, T,
    H, 4), attribution (batch, T, H), the others (batch, T).
    """

    logprobs: F32
    entropy: F32
    gaze: F32
    segment_mass: F32
    attribution: F32
    attended_logprob: F32
    internal_confidence: F32

    def __len__(self) -> int:
        """Words of each row."""
        return self.logprobs.shape[1]

    def truncate(self, words: int) -> TraceBatch:
        """So many words of each row, from the first on."""
        return self if words >= len(self) else TraceBatch(*(value[:, :words] for value in vars(self).values()))

    def concatenate(self, later: TraceBatch) -> TraceBatch:
        """These words, followed by ``later`` ones of the same batch."""
        return TraceBatch(
            *(np.concatenate(pair, axis=1) for pair in zip(vars(self).values(), vars(later).values(), strict=True))
        )

    def select(self, row: int, passes: Sequence[int]) -> TraceBatch:
        """The words of one row at some passes, a batch of one."""
        return TraceBatch(*(value[row : row + 1, passes] for value in vars(self).values()))

    def with_logit_lens(self, cells: LogitLens | None, written: Tensor) -> TraceBatch:
        """The same with what lies under the gaze, read off the image ``cells``; None adds nothing.

        written: (batch, T) int64, the words
        """
        if cells is None:
            return self
        gaze, written = (tensor.to(cells.known.device) for tensor in (torch.from_numpy(self.gaze), written))
        under, named = (value.cpu().numpy() for value in attended_logprobs(cells, gaze, written))
        return replace(self, attended_logprob=under, internal_confidence=named)

    def trace(
        self,
        row: int,
        passes: Sequence[int] | slice,
        token_ids: NDArray[np.int64],
        text: str,
        offsets: NDArray[np.int64],
        grid: ImageGrid,
        **about: Any,
    ) -> GazeTrace:
        """The trace of one caption, whose words are those of ``row`` at ``passes``; ``about`` are its other fields."""
        own = {name: value[row, passes] for name, value in vars(self).items()}
        own["gaze"] = own["gaze"][..., : len(grid)]
        ids = np.asarray(token_ids, np.int64)
        return GazeTrace(text=text, token_ids=ids, offsets=offsets, grid=grid, **own, **about)


def trace_batch(
    backbone: Backbone, heads: Sequence[Head], rows: CapturedActivations, written: Tensor, cells: LogitLens | None
) -> TraceBatch:
    """What the ``rows`` that predicted the words ``written`` (batch, T) int64 tell of them.

    cells: of the images, see `AttentionRecorder.logit_lens`; without them what lies under the gaze is NaN
    """
    words = token_statistics(backbone, heads, rows, written)
    unknown = torch.full_like(words.logprobs, torch.nan)
    tensors = (words.logprobs, words.entropy, rows.gaze, rows.segment_mass, words.attribution, unknown, unknown)
    return TraceBatch(*(tensor.float().cpu().numpy() for tensor in tensors)).with_logit_lens(cells, written)
