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

from gazeguard.detection.calibration import calibration_error, log_odds, logistic, platt, reliability, thresholds
from gazeguard.detection.features import INCLUDES, meaning
from gazeguard.detection.metrics import auroc
from gazeguard.errors import given

MIN_CLAIMS = 5  # false claims of a kind, and true ones, from which anything is fitted to them
ANSWER_FOLDS = 5
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
    verified:   as ``thresholds``, of the risk that is left once the model has been asked about what would be flagged; empty
                where ``answer`` is None, and in files of earlier versions
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
    verified: dict[str, Share] = Field(default_factory=dict)
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

        mean, scale = _standard(x, weights)
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

    def fit_beside(
        self,
        x: NDArray[np.float64],
        further: NDArray[np.float64],
        false: NDArray[np.bool_],
        names: Sequence[str],
        regularisation: float,
        weights: NDArray[np.float64],
    ) -> Regression:
        """A copy with further features, fitted to what this regression leaves unexplained: its own weights stay.

        Args:
            x: (claims, F) the features of this regression.
            further: (claims, G) the further ones.
            false: (claims,) labels.
            names: The names of the further features.
            regularisation: Inverse strength of the L2 penalty of their weights, scikit-learn's ``C``.
            weights: (claims,) how much each claim counts.
        """
        from scipy.optimize import minimize

        mean, scale = _standard(further, weights)
        columns, known = (further - mean) / scale, self.logit(x)

        def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            own, shift = parameters[:-1], parameters[-1]
            z = known + columns @ own + shift
            error = regularisation * weights * (logistic(z) - false)
            value = regularisation * weights @ (np.logaddexp(0, z) - false * z) + own @ own / 2
            return float(value), np.append(columns.T @ error + own, error.sum())

        *own, shift = minimize(loss, np.zeros(columns.shape[1] + 1), jac=True, method="L-BFGS-B").x.tolist()
        update = {
            "names": (*self.names, *names),
            "mean": (*self.mean, *mean.tolist()),
            "scale": (*self.scale, *scale.tolist()),
            "weights": (*self.weights, *own),
            "bias": self.bias + shift,
            "claims": len(x),
            "false": int(false.sum()),
            "data": fingerprint(np.concatenate((x, further), axis=1), false),
        }
        return self.model_copy(update=update)

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

        Contributions of features with the same reason, as those of the heads, are summed, and so are those of a reason and one
        that it includes.
        """
        totals: dict[str, float] = {}
        for name, value, usual, contribution in zip(self.names, x[0], self.mean, self.contributions(x)[0], strict=True):
            text = meaning(name, high=bool(value > usual))
            totals[text] = totals.get(text, 0.0) + float(contribution)
        for wider, narrower in INCLUDES.items():
            if totals.get(wider, 0) > 0 and totals.get(narrower, 0) > 0:
                totals[wider] += totals.pop(narrower)
        strongest = sorted(totals, key=totals.__getitem__, reverse=True)[:most]
        return tuple(text for text in strongest if totals[text] > 0)

    def update_with_answers(self, risk: NDArray[np.float64], answer: NDArray[np.float64]) -> NDArray[np.float64]:
        """(claims,): the risk given the self-verification answer, from the risk before and the answer's log-odds (claims,)."""
        return _answered(given(self.answer), risk, answer)

    def fit_answers(
        self,
        risk: NDArray[np.float64],
        answer: NDArray[np.float64],
        false: NDArray[np.bool_],
        image: NDArray[np.int64],
    ) -> Regression:
        """A copy with ``answer``, and ``verified`` thresholds, from claims of which some were asked about.

        The thresholds are those of the least risk that asking can leave of a claim, the smaller one of before and after. What a
        policy keeps is then never more than what they were set on, from whatever risk it asks: a bound holds for each.

        Args:
            risk: (claims,) the risk before any answer.
            answer: (claims,) log-odds of yes, NaN where it was not asked.
            false: (claims,) labels.
            image: (claims,) index of the image of each claim.

        Returns:
            The copy; where fewer than `MIN_CLAIMS` false or true claims were asked about, the regression as it is.
        """
        asked = ~np.isnan(answer)
        if not _enough(false[asked]):
            return self
        weights = _answer_weights(risk[asked], answer[asked], false[asked])
        least = np.fmin(risk, _held_out_answered(risk, answer, false, image, weights))  # fmin: NaN where it was not asked
        return self.model_copy(update={"answer": weights, "verified": thresholds(least, false, image)})

    def rules(self, verified: bool) -> dict[str, float]:
        """The thresholds by rule, of the risk as it is, or as the model's answers leave it where it is asked."""
        if not verified or self.answer is None:
            return self.thresholds
        # A file of an earlier version has none of after. The best F1 of before is near it, but a bound would be void.
        return self.verified or {rule: risk for rule, risk in self.thresholds.items() if not rule.startswith("bound")}

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


AnswerWeights = tuple[float, float, float]


def _enough(false: NDArray[np.bool_]) -> bool:
    """Whether claims with these labels are enough to fit to."""
    return bool(MIN_CLAIMS <= false.sum() <= len(false) - MIN_CLAIMS)


def _answer_weights(risk: NDArray[np.float64], answer: NDArray[np.float64], false: NDArray[np.bool_]) -> AnswerWeights:
    """Weights of a risk's log-odds and of an answer, and a bias; of answered claims (claims,)."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=5000).fit(np.stack((log_odds(risk), answer), axis=1), false)
    risk_weight, answer_weight = model.coef_[0].tolist()
    return risk_weight, answer_weight, float(model.intercept_[0])


def _answered(weights: AnswerWeights, risk: NDArray[np.float64], answer: NDArray[np.float64]) -> NDArray[np.float64]:
    """(claims,): the risk given an answer (claims,), log-odds of yes; NaN where that is NaN."""
    risk_weight, answer_weight, bias = weights
    return logistic(risk_weight * log_odds(risk) + answer_weight * answer + bias)


def _held_out_answered(
    risk: NDArray[np.float64],
    answer: NDArray[np.float64],
    false: NDArray[np.bool_],
    image: NDArray[np.int64],
    weights: AnswerWeights,
) -> NDArray[np.float64]:
    """`_answered` with weights that were fitted without the image of each claim; ``weights`` where the others are too few."""
    from sklearn.model_selection import GroupKFold

    updated = _answered(weights, risk, answer)
    if (images := len(np.unique(image))) < 2:
        return updated
    for others, own in GroupKFold(min(ANSWER_FOLDS, images)).split(risk, groups=image):
        known = others[~np.isnan(answer[others])]
        if _enough(false[known]):
            updated[own] = _answered(_answer_weights(risk[known], answer[known], false[known]), risk[own], answer[own])
    return updated


def _standard(x: NDArray[np.float64], weights: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(F,) mean and (F,) standard deviation of features (claims, F); the latter 1 for a constant feature, which is none."""
    mean = np.average(x, axis=0, weights=weights)
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    return mean, np.where(spread > 1e-9 * np.maximum(1, np.abs(mean)), spread, 1.0)


def fingerprint(x: NDArray[np.float64], false: NDArray[np.bool_]) -> str:
    """16 hex digits of the SHA-256 of features and labels."""
    return hashlib.sha256(np.ascontiguousarray(x).tobytes() + np.ascontiguousarray(false).tobytes()).hexdigest()[:16]
