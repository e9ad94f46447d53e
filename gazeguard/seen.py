"""What was heard of each word, in numbers? From the tap's tensors to arrays, and from these to one `GazeTrace` per caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.grid import ImageGrid
from gazeguard.tap import Backbone, Head, Rows, content, judge_words
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

    def then(self, later: Seen) -> Seen:
        """These words, followed by ``later`` ones of the same batch."""
        return Seen(*(np.concatenate(pair, axis=1) for pair in zip(vars(self).values(), vars(later).values(), strict=True)))

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


def seen(
    backbone: Backbone, heads: Sequence[Head], rows: Rows, written: Tensor, states: Tensor | None, lies: bool = True
) -> Seen:
    """What the ``rows`` that predicted the words ``written`` (batch, T) int64 tell of them.

    states: see `Tap.states`; lies: whether what lies under the gaze is wanted, which is NaN otherwise and without states
    """
    words = judge_words(backbone, heads, rows, written)
    if lies and states is not None:
        under, named = content(backbone, states, rows.gaze, written)
    else:
        under = named = torch.full_like(words.logprobs, torch.nan)
    tensors = (words.logprobs, words.entropy, rows.gaze, rows.shares, words.readout, under, named)
    return Seen(*(tensor.float().cpu().numpy() for tensor in tensors))
