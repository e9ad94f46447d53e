"""Is it made up? One logistic regression per kind of claim on gaze and text features, saved as numbers in JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve
from sklearn.preprocessing import StandardScaler

from gazeguard import features
from gazeguard.errors import InputError, MismatchError
from gazeguard.heads import GazeHeads, read_json
from gazeguard.phrases import Kind

FILE_NAME = "detector.json"
FEWEST = 20  # false claims of a kind, and true ones, from which a regression on them is worth having
Share = Annotated[float, Field(ge=0, le=1)]


class Regression(BaseModel):
    """The probability that a claim of one kind is false: ``sigmoid((x - mean) / scale @ weights + bias)``. Immutable.

    thresholds: risks from which a claim is flagged, by the rule that set them on validation data; see `thresholds`
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    thresholds: dict[str, Share]
    claims: int = Field(description="number of claims it was fitted on")
    false: int = Field(description="how many of them were false")

    @model_validator(mode="after")
    def _fits_together(self) -> Regression:
        for name in ("mean", "scale", "weights"):
            if len(getattr(self, name)) != len(self.names):
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers for {len(self.names)} features")
        if not np.isfinite([*self.mean, *self.scale, *self.weights, self.bias]).all() or 0 in self.scale:
            raise ValueError("every number must be finite and no scale zero")
        if "f1" not in self.thresholds:
            raise ValueError("thresholds lack the default, 'f1'")
        return self

    @classmethod
    def fit(cls, x: NDArray[np.float64], false: NDArray[np.bool_], names: Sequence[str], regularisation: float) -> Regression:
        """Fitted on features (claims, F) and labels (claims,); flags from 0.5 until it has thresholds of its own."""
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=regularisation, max_iter=5000).fit(scaler.transform(x), false)
        return cls(
            names=tuple(names),
            mean=tuple(scaler.mean_.tolist()),
            scale=tuple(scaler.scale_.tolist()),
            weights=tuple(model.coef_[0].tolist()),
            bias=float(model.intercept_[0]),
            thresholds={"f1": 0.5},
            claims=len(x),
            false=int(false.sum()),
        )

    def pull(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each feature adds to the logit, (claims, F)."""
        return (x - np.array(self.mean)) / np.array(self.scale) * np.array(self.weights)

    def logit(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims,): the log-odds that each claim is false."""
        return self.pull(x).sum(-1) + self.bias

    def risk(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims,): the probability that each claim is false."""
        return 0.5 * (1 + np.tanh(self.logit(x) / 2))  # the logistic function, without overflow

    def calibrated(self, x: NDArray[np.float64], false: NDArray[np.bool_]) -> Regression:
        """The same ranking with probabilities fitted to validation data (Platt 1999): logit * slope + shift, folded in."""
        platt = LogisticRegression(C=np.inf, max_iter=5000).fit(self.logit(x)[:, None], false)
        slope, shift = float(platt.coef_[0, 0]), float(platt.intercept_[0])
        if slope <= 0:
            raise InputError("On the validation data high risks are not the false claims. Are the labels the right way round?")
        weights = tuple(weight * slope for weight in self.weights)
        return self.model_copy(update={"weights": weights, "bias": self.bias * slope + shift})


class Detector(BaseModel):
    """The probability that a claim of a caption is false, from its features. Immutable.

    It belongs to one model and one set of gaze heads, and refuses others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    model: str = Field(description="fingerprint of the model whose traces it was fitted on")
    heads: tuple[tuple[int, int], ...]
    kinds: dict[Kind, Regression]

    @model_validator(mode="after")
    def _fits_together(self) -> Detector:
        if "object" not in self.kinds:
            raise ValueError("kinds lack 'object'")
        known = set(features.names(self.heads))
        for kind, regression in self.kinds.items():
            if unknown := sorted(set(regression.names) - known):
                raise ValueError(f"kinds.{kind}: these heads have no feature {unknown[0]!r}")
        return self

    # --------------------------------------------------------------------------------------------------- fitting

    @classmethod
    def fit(
        cls,
        x: NDArray[np.float64],
        false: NDArray[np.bool_],
        kinds: NDArray[np.str_],
        heads: GazeHeads,
        names: Sequence[str] | None = None,
        regularisation: float = 1.0,
    ) -> Detector:
        """Fit one regression per kind on `features` (claims, F), labels (claims,) and kinds (claims,).

        names: the features to use; by default all that are finite in every claim (of a model that takes its pictures through
        cross-attention, what lies under the gaze is not known). A kind with fewer than `FEWEST` true or false claims gets
        none; raises `InputError` when objects are such a kind.
        """
        if names is None:
            names = [name for name, column in zip(features.names(heads.heads), x.T, strict=True) if np.isfinite(column).all()]
        chosen = features.pick(x, heads.heads, names)
        enough = [k for k in np.unique(kinds) if FEWEST <= false[kinds == k].sum() <= (kinds == k).sum() - FEWEST]
        if "object" not in enough:
            of = kinds == "object"
            raise InputError(
                f"{int(false[of].sum())} of {int(of.sum())} objects are invented; a detector needs at least {FEWEST} invented "
                f"and {FEWEST} real ones. Take more captions."
            )
        fitted = {str(k): Regression.fit(chosen[kinds == k], false[kinds == k], names, regularisation) for k in enough}
        return cls(model=heads.model, heads=heads.heads, kinds=fitted)

    def tuned(
        self, x: NDArray[np.float64], false: NDArray[np.bool_], kinds: NDArray[np.str_], image: NDArray[np.int64]
    ) -> Detector:
        """The same detector with probabilities and thresholds from validation data.

        image: (claims,) whose caption each claim is from; see `thresholds`. Raises `InputError` for data of one label only.
        """
        made = {}
        for kind, regression in self.kinds.items():
            of = kinds == kind
            if false[of].all() or not false[of].any():
                raise InputError(
                    f"{int(false[of].sum())} of {int(of.sum())} validation claims of kind {kind!r} are false; thresholds need "
                    "both kinds. Take more captions."
                )
            mine = features.pick(x[of], self.heads, regression.names)
            better = regression.calibrated(mine, false[of])
            found = thresholds(better.risk(mine), false[of], image[of])
            made[kind] = better.model_copy(update={"thresholds": found})
        return self.model_copy(update={"kinds": made})

    # ----------------------------------------------------------------------------------------------------- using

    def uses(self, *names: str) -> bool:
        """Whether any of these features counts for any kind of claim."""
        return any(name in regression.names for regression in self.kinds.values() for name in names)

    def unknown(self, x: NDArray[np.float64], kinds: Sequence[str]) -> str:
        """The first feature that counts for a claim and is not finite, as where a model's numbers overflowed; or ""."""
        for row, kind in zip(x, kinds, strict=True):
            names = self.kinds[kind].names
            if not (finite := np.isfinite(features.pick(row[None], self.heads, names)[0])).all():
                return names[int(np.argmin(finite))]
        return ""

    def risk(self, x: NDArray[np.float64], kinds: Sequence[str]) -> NDArray[np.float64]:
        """(claims,): the probability that each claim is false, from `features` (claims, F); NaN for kinds it does not know."""
        kinds, risk = np.asarray(kinds, str), np.full(len(x), np.nan)
        for kind, regression in self.kinds.items():
            of = kinds == kind
            risk[of] = regression.risk(features.pick(x[of], self.heads, regression.names))
        return risk

    def reasons(self, x: NDArray[np.float64], kinds: Sequence[str], most: int = 2) -> list[tuple[str, ...]]:
        """For each claim the features that raise its risk most, in words, strongest first; heads' votes are summed."""
        found = []
        for row, kind in zip(x, kinds, strict=True):
            regression = self.kinds[kind]
            values = features.pick(row[None], self.heads, regression.names)
            votes: dict[str, float] = {}
            for name, value, usual, vote in zip(
                regression.names, values[0], regression.mean, regression.pull(values)[0], strict=True
            ):
                text = features.meaning(name, high=bool(value > usual))
                votes[text] = votes.get(text, 0.0) + float(vote)
            strongest = sorted(votes, key=votes.__getitem__, reverse=True)[:most]
            found.append(tuple(text for text in strongest if votes[text] > 0))
        return found

    def threshold(self, kind: str, rule: str | float) -> float:
        """The risk from which claims of a kind are flagged: by a named rule, or the number itself.

        Raises `MismatchError` for a rule for which no threshold could be set.
        """
        if not isinstance(rule, str):
            return rule
        known = self.kinds[kind].thresholds
        if rule not in known:
            raise MismatchError(
                f"This detector has no threshold {rule!r} for claims of kind {kind!r}; it has {', '.join(known)}. Name one of "
                "these in the policy, give a number, or tune the detector on more captions."
            )
        return known[rule]

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


# ------------------------------------------------------------------------------------------------------- thresholds


def thresholds(risk: NDArray[np.float64], false: NDArray[np.bool_], image: NDArray[np.int64]) -> dict[str, float]:
    """Risks (claims,) from which to flag, by rule; a rule that the data cannot satisfy is left out.

    f1:                     the best F1
    precision_0.9:          the lowest from which at least 90 % of the flagged claims are false
    bound_0.05, bound_0.02: `conformal` with that alpha
    """
    precision, recall, at = precision_recall_curve(false, risk)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    found = {"f1": float(at[np.argmax(f1[:-1])])}
    if (enough := precision[:-1] >= 0.9).any():
        found["precision_0.9"] = float(at[np.argmax(enough)])
    for alpha in (0.05, 0.02):
        if (bound := conformal(risk, false, image, alpha)) is not None:
            found[f"bound_{alpha}"] = bound
    return found


def conformal(risk: NDArray[np.float64], false: NDArray[np.bool_], image: NDArray[np.int64], alpha: float) -> float | None:
    """The risk from which to flag so that a new caption keeps, in expectation, at most ``alpha`` false claims per claim made.

    Conformal risk control (Angelopoulos et al. 2024, eq. 4) with the image as the unit, since the claims of one caption
    depend on each other. The loss of an image, false claims kept over claims made, never falls with the threshold, so the
    largest threshold is taken for which ``n / (n + 1) * mean loss + 1 / (n + 1) <= alpha`` over the n images; None when
    there is none, which takes fewer than ``1 / alpha - 1`` images. The bound holds for captions like these alone: the same
    model, prompt, decoder and kind of picture.
    """
    _, image = np.unique(image, return_inverse=True)
    made = np.bincount(image)
    n = len(made)
    order = np.argsort(risk, kind="stable")
    # Flagging from the k-th lowest risk on keeps the k claims below it; equal risks are kept or flagged together.
    kept = np.concatenate(([0.0], np.cumsum((false / made[image])[order]))) / n
    edges = np.concatenate((risk[order], [1.0]))
    first = np.searchsorted(risk[order], edges, side="left")
    allowed = np.flatnonzero((n * kept[first] + 1) / (n + 1) <= alpha)
    return float(edges[allowed[-1]]) if len(allowed) else None


def least_flagged(false_share: float, alpha: float) -> float:
    """The share of claims that any filter must flag to leave at most ``alpha`` false, when so many are (arXiv 2606.29054)."""
    return max(0.0, (false_share - alpha) / (1 - alpha))
