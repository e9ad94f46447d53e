"""Table of labelled claims: what detectors are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.errors import InputError
from gazeguard.trace import F32

F64 = NDArray[np.float64]

_OF_NO_CLAIM = ("states", "wording_nll")  # columns whose rows are images, or captions


@dataclass(frozen=True, eq=False)
class ClaimTable:
    """Claims with features and labels. Immutable.

    Attributes:
        x: (claims, F) `features`.
        false: (claims,) whether each claim is false.
        kinds: (claims,) the kind of each claim.
        image: (claims,) the number of the image of each; no image is ever on both sides of a split.
        weights: (claims,) how much each claim counts; by default all alike.
        caption: (claims,) the number of the caption of each; by default each image has one.
        calibrating: (claims,) whether each sets probabilities, thresholds and metrics, as claims like those that the detector
            will judge do; the others only help to fit the weights. By default all do.
        states: (images, width) `GazeTrace.image_state` by the number of the image, NaN where unknown; None where no image
            has one.
        wording_nll: (captions,) `features.wording_nll` of captions that the model itself wrote; None where unknown.
    """

    x: F64
    false: NDArray[np.bool_]
    kinds: NDArray[np.str_]
    image: NDArray[np.int64]
    weights: F64 = None  # type: ignore[assignment]
    caption: NDArray[np.int64] = None  # type: ignore[assignment]
    calibrating: NDArray[np.bool_] = None  # type: ignore[assignment]
    states: NDArray[np.floating[Any]] | None = None
    wording_nll: F64 | None = None

    def __post_init__(self) -> None:
        """Fill in the defaults; raises `InputError` for columns of different lengths."""
        object.__setattr__(self, "weights", np.ones(len(self.x)) if self.weights is None else np.asarray(self.weights, float))
        object.__setattr__(self, "caption", self.image if self.caption is None else self.caption)
        object.__setattr__(self, "calibrating", np.ones(len(self.x), bool) if self.calibrating is None else self.calibrating)
        for field in fields(self):
            column = getattr(self, field.name)
            if field.name not in _OF_NO_CLAIM and len(column) != len(self.x):
                raise InputError(f"{field.name} has {len(column)} rows, the features have {len(self.x)}; expected as many.")

    def __len__(self) -> int:
        return len(self.x)

    def select(self, rows: NDArray[Any]) -> ClaimTable:
        """Some of the claims, by number or by a mask; image numbers stay."""
        return replace(
            self, **{field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name not in _OF_NO_CLAIM}
        )


def stack_states(states: Sequence[F32 | None]) -> F32 | None:
    """(images, width): `GazeTrace.image_state` of each image, NaN where it has none; None where no image has one."""
    if (width := next((len(state) for state in states if state is not None), None)) is None:
        return None
    return np.stack([np.full(width, np.nan, np.float32) if state is None else state for state in states])
