"""Logistic regression of one kind of claim, kept as numbers.

A gradient boosting on the same features was .003 of AUROC better in the lab: not worth a file that is no table of numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gazeguard.detection.calibration import calibration_error, log_odds, logistic, platt, reliability
from gazeguard.detection.features import meaning
from gazeguard.detection.metrics import auroc
from gazeguard.errors import given

MIN_CLAIMS = 5  # false claims of a kind, and true ones, from which anything is fitted to them
ROUNDING = 1e-9


def _rounded(value: Any) -> Any:
    """A share without what rounding put outside of 0 to 1: scikit-learn returns average precisions of 1 + 2e-16."""
    return min(1.0, max(0.0, value)) if isinstance(value, float) and -ROUNDING < value < 1 + ROUNDING else value


Share = Annotated[float, BeforeValidator(_rounded), Field(ge=0, le=1)]


class ValidationMetrics(BaseModel):
    """Metrics on the validation data that set a regression's probabilities and thresholds. Immutable.

    ece:            expected calibration error over 15 bins of equal mass
    bins:           (mean risk, share that is false, claims) of ten bins of equal mass
    data:           fingerprint of the features and labels
    auroc_interval: 95 %, by a bootstrap of images; None in files of earlier versions
    cross_fitted:   the data are those of the fit, each image judged by a fit to the others; otherwise they are others
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    claims: int
    false: int
    images: int
    auroc: Share
    average_precision: Share
    brier: Share
    ece: Share
    bins: tuple[tuple[Share, Share, int], ...]
    data: str
    auroc_interval: tuple[Share, Share] | None = None
    cross_fitted: bool = False

    @classmethod
    def measure(
        cls,
        x: NDArray[np.float64],
        risk: NDArray[np.float64],
        false: NDArray[np.bool_],
        image: NDArray[np.int64],
        cross_fitted: bool = False,
    ) -> ValidationMetrics:
        """Measure risks (claims,) of features (claims, F) by their labels (claims,) and images (claims,)."""
        from sklearn.metrics import average_precision_score, brier_score_loss

        area = auroc(false, risk, np.unique(image, return_inverse=True)[1])

        return cls(
            claims=len(x),
            false=int(false.sum()),
            images=len(np.unique(image)),
            auroc=area.value,
            average_precision=float(average_precision_score(false, risk)),
            brier=float(brier_score_loss(false, risk)),
            ece=calibration_error(risk, false),
            bins=tuple(reliability(risk, false, 10)),
            data=fingerprint(x, false),
            auroc_interval=area.interval,
            cross_fitted=cross_fitted,
        )

    @property
    def area(self) -> str:
        """The AUROC in words, with its interval."""
        interval = "" if self.auroc_interval is None else " ({:.3f} to {:.3f})".format(*self.auroc_interval)
        return f"{self.auroc:.3f}{interval}"


class Regression(BaseModel):
    """The probability that a claim of one kind is false: ``sigmoid((x - mean) / scale @ weights + bias)``. Immutable.

    thresholds: risks from which a claim is flagged, by the rule that set them on validation data; see `thresholds`
    method:     "regression" where the weights were learnt; "attribution" where the claims were too few to learn them, and the
                risk is the direct logit attribution of the gaze heads, which needs no training, on a calibrated scale
    answer:     weights of the risk's log-odds and of the self-verification answer's (yes against no), and a bias; None when
                they were not fitted; see `update_with_answers`
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
    data: str = Field(description="fingerprint of the features and labels it was fitted on")
    validation: ValidationMetrics | None = None
    answer: tuple[float, float, float] | None = None
    method: Literal["regression", "attribution"] = "regression"

    @model_validator(mode="after")
    def _fits_together(self) -> Regression:
        for name in ("mean", "scale", "weights"):
            if len(getattr(self, name)) != len(self.names):
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers for {len(self.names)} features")
        if not np.isfinite([*self.mean, *self.scale, *self.weights, self.bias, *(self.answer or ())]).all() or 0 in self.scale:
            raise ValueError("every number must be finite and no scale zero")
        if "f1" not in self.thresholds:
            raise ValueError("thresholds lack the default, 'f1'")
        return self

    @classmethod
    def fit(
        cls,
        x: NDArray[np.float64],
        false: NDArray[np.bool_],
        names: Sequence[str],
        regularisation: float,
        weights: NDArray[np.float64] | None = None,
    ) -> Regression:
        """Fit to features (claims, F), labels (claims,) and weights of claims (claims,), by default all alike.

        The threshold is 0.5 until validation data set it.
        """
        from sklearn.linear_model import LogisticRegression

        mean = np.average(x, axis=0, weights=weights)
        spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
        scale = np.where(spread > 1e-9 * np.maximum(1, np.abs(mean)), spread, 1.0)  # a constant feature is none
        model = LogisticRegression(C=regularisation, max_iter=5000).fit((x - mean) / scale, false, sample_weight=weights)
        return cls(
            names=tuple(names),
            mean=tuple(mean.tolist()),
            scale=tuple(scale.tolist()),
            weights=tuple(model.coef_[0].tolist()),
            bias=float(model.intercept_[0]),
            thresholds={"f1": 0.5},
            claims=len(x),
            false=int(false.sum()),
            data=fingerprint(x, false),
        )

    @classmethod
    def attribution(cls, x: NDArray[np.float64], false: NDArray[np.bool_]) -> Regression:
        """The untrained detector: the lower the direct logit attribution (claims, 1), the higher the risk."""
        return cls(
            names=("attribution",),
            mean=(float(x.mean()),),
            scale=(float(x.std()) or 1.0,),
            weights=(-1.0,),
            bias=0.0,
            thresholds={"f1": 0.5},
            claims=len(x),
            false=int(false.sum()),
            data=fingerprint(x, false),
            method="attribution",
        )

    # A file may hold numbers near the largest float; the judge refuses the risk that they give.
    @np.errstate(invalid="ignore", over="ignore")
    def contributions(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims, F): what each feature contributes to the logit."""
        return (x - np.array(self.mean)) / np.array(self.scale) * np.array(self.weights)

    @np.errstate(invalid="ignore", over="ignore")
    def logit(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims,): the log-odds that each claim is false."""
        return self.contributions(x).sum(-1) + self.bias

    def risk(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims,): the probability that each claim is false."""
        return logistic(self.logit(x))

    def reasons(self, x: NDArray[np.float64], most: int) -> tuple[str, ...]:
        """The reasons that raise the risk of one claim (1, F) most, strongest first.

        Contributions of features with the same reason, as those of the heads, are summed.
        """
        totals: dict[str, float] = {}
        for name, value, usual, contribution in zip(self.names, x[0], self.mean, self.contributions(x)[0], strict=True):
            text = meaning(name, high=bool(value > usual))
            totals[text] = totals.get(text, 0.0) + float(contribution)
        strongest = sorted(totals, key=totals.__getitem__, reverse=True)[:most]
        return tuple(text for text in strongest if totals[text] > 0)

    def update_with_answers(self, risk: NDArray[np.float64], answer: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims,): the risk given the self-verification answer, from the risk before and the answer's log-odds (claims,)."""
        risk_weight, answer_weight, bias = given(self.answer)
        return logistic(risk_weight * log_odds(risk) + answer_weight * answer + bias)

    def fit_answers(self, risk: NDArray[np.float64], answer: NDArray[np.float64], false: NDArray[np.bool_]) -> Regression:
        """A copy with ``answer`` fitted to claims that were asked about (claims,); unchanged when they are too few."""
        if not MIN_CLAIMS <= false.sum() <= len(false) - MIN_CLAIMS:
            return self
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(max_iter=5000).fit(np.stack((log_odds(risk), answer), axis=1), false)
        return self.model_copy(update={"answer": (*model.coef_[0].tolist(), float(model.intercept_[0]))})

    def calibrated(
        self, x: NDArray[np.float64], false: NDArray[np.bool_], weights: NDArray[np.float64] | None = None
    ) -> Regression:
        """A copy with the same ranking and probabilities fitted to validation data; see `platt`."""
        slope, shift = platt(self.logit(x), false, np.ones(len(x)) if weights is None else weights)
        return self.scaled(slope, shift)

    def scaled(self, slope: float, shift: float) -> Regression:
        """A copy whose log-odds are ``slope`` times its own, plus ``shift``."""
        steeper = tuple(weight * slope for weight in self.weights)
        return self.model_copy(update={"weights": steeper, "bias": self.bias * slope + shift})


def fingerprint(x: NDArray[np.float64], false: NDArray[np.bool_]) -> str:
    """16 hex digits of the SHA-256 of features and labels."""
    return hashlib.sha256(np.ascontiguousarray(x).tobytes() + np.ascontiguousarray(false).tobytes()).hexdigest()[:16]
