"""What was heard of each word, in numbers? From the tap's tensors to arrays, and from these to one `GazeTrace` per caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.grid import ImageGrid
from gazeguard.tap import Backbone, Cells, Head, Rows, content, judge_words
from gazeguard.trace import F32, GazeTrace


@dataclass(frozen=True, eq=False)
class Seen:
    """The numbers of a `GazeTrace` for the words of a batch, all float32 on the CPU: gaze (batch, T, H, N), shares (batch, T,
    H, 4), readout (batch, T, H), the others (batch, T).
    """

    logprobs: F32
    entropy: F32
    gaze: F32
    shares: F32
    readout: F32
    content: F32
    named: F32

    def __len__(self) -> int:
        """Words of each row."""
        return self.logprobs.shape[1]

    def first(self, words: int) -> Seen:
        """So many words of each row, from the first on."""
        return self if words >= len(self) else Seen(*(value[:, :words] for value in vars(self).values()))

    def then(self, later: Seen) -> Seen:
        """These words, followed by ``later`` ones of the same batch."""
        return Seen(*(np.concatenate(pair, axis=1) for pair in zip(vars(self).values(), vars(later).values(), strict=True)))

    def of(self, row: int, passes: Sequence[int]) -> Seen:
        """The words of one row at some passes, a batch of one."""
        return Seen(*(value[row : row + 1, passes] for value in vars(self).values()))

    def over(self, cells: Cells | None, written: Tensor) -> Seen:
        """The same with what lies under the gaze, read off the image ``cells``; None adds nothing.

        written: (batch, T) int64, the words
        """
        if cells is None:
            return self
        gaze, written = (tensor.to(cells.known.device) for tensor in (torch.from_numpy(self.gaze), written))
        under, named = (value.cpu().numpy() for value in content(cells, gaze, written))
        return replace(self, content=under, named=named)

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


def seen(backbone: Backbone, heads: Sequence[Head], rows: Rows, written: Tensor, cells: Cells | None) -> Seen:
    """What the ``rows`` that predicted the words ``written`` (batch, T) int64 tell of them.

    cells: of the images, see `Tap.cells`; without them what lies under the gaze is NaN
    """
    words = judge_words(backbone, heads, rows, written)
    unknown = torch.full_like(words.logprobs, torch.nan)
    tensors = (words.logprobs, words.entropy, rows.gaze, rows.shares, words.readout, unknown, unknown)
    return Seen(*(tensor.float().cpu().numpy() for tensor in tensors)).over(cells, written)
