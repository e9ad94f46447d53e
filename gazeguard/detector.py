"""Is it made up? A logistic regression on gaze and text features, saved as numbers in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve
from sklearn.preprocessing import StandardScaler

from gazeguard import features
from gazeguard.errors import InputError, MismatchError
from gazeguard.heads import GazeHeads, read_json

FILE_NAME = "detector.json"


class Detector(BaseModel):
    """The probability that a phrase is made up: ``sigmoid((x - mean) / scale @ weights + bias)``. Immutable.

    It belongs to one model and one set of gaze heads, and refuses others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: str = Field(description="fingerprint of the model whose traces it was fitted on")
    heads: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    threshold: float = Field(ge=0, le=1, description="risk from which a phrase is flagged; set on validation data")
    phrases: int = Field(description="number of phrases it was fitted on")
    invented: int = Field(description="how many of them were made up")

    @model_validator(mode="after")
    def _fits_together(self) -> Detector:
        for name in ("mean", "scale", "weights"):
            if len(getattr(self, name)) != len(self.names):
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers for {len(self.names)} features")
        if unknown := sorted(set(self.names) - set(features.names(self.heads))):
            raise ValueError(f"these heads have no feature {unknown[0]!r}")
        if not np.isfinite([*self.mean, *self.scale, *self.weights, self.bias]).all() or 0 in self.scale:
            raise ValueError("every number must be finite and no scale zero")
        return self

    # --------------------------------------------------------------------------------------------------- fitting

    @classmethod
    def fit(
        cls,
        x: NDArray[np.float64],
        invented: NDArray[np.bool_],
        heads: GazeHeads,
        names: tuple[str, ...] | None = None,
        regularisation: float = 1.0,
    ) -> Detector:
        """Fit on features (phrases, F) and labels (phrases,); the threshold is 0.5 until `with_threshold`.

        names: the columns of ``x`` when they are not all of `features.names`, for example the text features alone
        """
        names = features.names(heads.heads) if names is None else names
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=regularisation, max_iter=5000).fit(scaler.transform(x), invented)
        return cls(
            model=heads.model,
            heads=heads.heads,
            names=names,
            mean=tuple(scaler.mean_.tolist()),
            scale=tuple(scaler.scale_.tolist()),
            weights=tuple(model.coef_[0].tolist()),
            bias=float(model.intercept_[0]),
            threshold=0.5,
            phrases=len(x),
            invented=int(invented.sum()),
        )

    def with_threshold(self, x: NDArray[np.float64], invented: NDArray[np.bool_]) -> Detector:
        """The same detector with the threshold of the best F1 on validation data.

        Raises `InputError` when nothing in them is invented, or everything.
        """
        if invented.all() or not invented.any():
            raise InputError(
                f"{int(invented.sum())} of {len(invented)} validation phrases are invented; a threshold needs both kinds. "
                "Take more captions."
            )
        precision, recall, thresholds = precision_recall_curve(invented, self.risk(x))
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        return self.model_copy(update={"threshold": float(thresholds[np.argmax(f1[:-1])])})

    # ----------------------------------------------------------------------------------------------------- using

    def _pull(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each feature adds to the logit, (phrases, F)."""
        return (x - np.array(self.mean)) / np.array(self.scale) * np.array(self.weights)

    def risk(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(phrases,) float64: the probability that each phrase is made up, from features (phrases, F)."""
        logit = self._pull(x).sum(-1) + self.bias
        return 0.5 * (1 + np.tanh(logit / 2))  # the logistic function, without overflow

    def reasons(self, x: NDArray[np.float64], most: int = 2) -> list[tuple[str, ...]]:
        """For each phrase the features that raise its risk most, in words, strongest first; heads' votes are summed."""
        found = []
        for row, pull in zip(x, self._pull(x), strict=True):
            votes: dict[str, float] = {}
            for name, value, usual, vote in zip(self.names, row, self.mean, pull, strict=True):
                text = features.meaning(name, high=bool(value > usual))
                votes[text] = votes.get(text, 0.0) + float(vote)
            strongest = sorted(votes, key=votes.__getitem__, reverse=True)[:most]
            found.append(tuple(text for text in strongest if votes[text] > 0))
        return found

    def check_heads(self, heads: GazeHeads) -> None:
        """Raise `MismatchError` unless the detector was fitted on traces of these heads of this model."""
        if (self.model, self.heads) != (heads.model, heads.heads):
            raise MismatchError(
                f"This detector was fitted for model {self.model} with heads {list(self.heads)}; the guard has model "
                f"{heads.model} with heads {list(heads.heads)}. Fit a detector on traces of these heads."
            )

    # --------------------------------------------------------------------------------------------------- keeping

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``detector.json`` into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.model_dump(), indent=1)
        (Path(folder) / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Detector:
        """Read a detector from a folder or a file. Raises `ArtifactError` for anything else."""
        path = Path(path)
        return read_json(cls, path / FILE_NAME if path.is_dir() else path, "a detector", "Detector.save_pretrained")
