"""Rows of claims that a detector is fitted to: features, labels, and where each claim is from; saved as plain arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gazeguard.errors import ArtifactError
from gazeguard.trace import F32

F64 = NDArray[np.float64]
Origin = Literal["own", "swapped", "wrong", "blank", "picture", "picture-swapped", "picture-wrong", "picture-blank", "labelled"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Claims with features and labels. Immutable.

    Attributes:
        x: (claims, F) `features`.
        false: (claims,) labels.
        kinds: (claims,) kind of each claim.
        image: (claims,) number of the image that the model was shown or, for constructed claims, of the image whose caption
            was altered; no number is on both sides of a split.
        caption: (claims,) number of the caption of each.
        origin: (claims,) `Origin` of each: the model's own claim, or how it was made false; of a drawing or a user's image.
        style: (claims,) style of the drawing; "" for a user's image.
        answer: (claims,) log-odds of yes to the question whether the claim's object is there; NaN where it was not asked.
    """

    x: F64
    false: NDArray[np.bool_]
    kinds: NDArray[np.str_]
    image: NDArray[np.int64]
    caption: NDArray[np.int64]
    origin: NDArray[np.str_]
    style: NDArray[np.str_]
    answer: F64

    def __len__(self) -> int:
        return len(self.x)

    def select(self, rows: NDArray[Any]) -> Rows:
        """Some of the claims, by number or by a mask."""
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    def of(self, *origins: Origin) -> NDArray[np.bool_]:
        """(claims,): whether each is of one of these origins."""
        return np.isin(self.origin, origins)

    @classmethod
    def empty(cls, width: int) -> Rows:
        """No claims, with ``width`` features."""
        text = np.zeros(0, "U16")
        number = np.zeros(0, np.int64)
        return cls(np.zeros((0, width)), np.zeros(0, bool), text, number, number, text, text, np.zeros(0))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """All claims of several tables."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True, eq=False)
class Recorded:
    """What was recorded of some images. Immutable.

    Attributes:
        rows: The claims.
        captions: The captions that the model wrote.
        images: (captions,) the number of the image of each.
        states: (captions, width) `GazeTrace.image_state` of each; width 0 where there is none.
        wording_nll: (captions,) `features.wording_nll` of each; of none in files of earlier versions.
    """

    rows: Rows
    captions: tuple[str, ...]
    images: NDArray[np.int64]
    states: F32
    wording_nll: F64

    def save(self, path: Path) -> None:
        """Write to a file of arrays, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part.npz")
        captions = np.array(self.captions, dtype=str)
        arrays = {name: getattr(self, name) for name in ("images", "states", "wording_nll")}
        np.savez_compressed(temporary, captions=captions, **arrays, **vars(self.rows))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Recorded:
        """Read what `save` wrote.

        Raises:
            ArtifactError: The file is damaged.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                rows = Rows(**{field.name: arrays[field.name] for field in fields(Rows)})
                wording_nll = arrays.get("wording_nll", np.zeros(0))
                return cls(rows, tuple(map(str, arrays["captions"])), arrays["images"], arrays["states"], wording_nll)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ArtifactError(
                f"{path} cannot be read as an intermediate result of fit ({error}). Delete it; fit makes it anew."
            ) from error
