"""Cross-fitting of a detector: every claim helps to fit and to calibrate, and none is judged by a fit to its own image.

Images are dealt into folds. The claims of each fold get their log-odds from a regression on the other folds, whose strength of
regularisation was chosen within those (nested validation); probabilities, thresholds and metrics come from these log-odds, the
weights from all claims. Where claims are too few for a regression to rank them better than the direct logit attribution of
the gaze heads does without any training, that attribution is the detector, on a calibrated scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from gazeguard.claims.parse import JUDGED, ClaimKind, Kind
from gazeguard.detection import features
from gazeguard.detection.calibration import calibrated_loss, logistic, platt, thresholds
from gazeguard.detection.detector import Detector
from gazeguard.detection.domain import Domain
from gazeguard.detection.gate import Gate
from gazeguard.detection.regression import Regression, ValidationMetrics
from gazeguard.detection.table import ClaimTable
from gazeguard.detection.training import known_features, too_few
from gazeguard.errors import InputError, given
from gazeguard.heads.artifact import GazeHeads

F64 = NDArray[np.float64]

REGULARISATIONS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # scikit-learn's C, from strong to weak
TEXT_REGULARISATION = 0.1  # of `beside_text`
FOLDS, INNER_FOLDS = 5, 3
# Features (claims, F), the claims, the names of the features and the regularisation -> a regression on them.
Fit = Callable[[F64, ClaimTable, Sequence[str], float], Regression]


class CrossFit(NamedTuple):
    """A detector, and the risk (claims,) of each claim by a fit without its image; NaN for claims of kinds left out."""

    detector: Detector
    risk: F64


class _Candidate(NamedTuple):
    """A regression on all claims of a kind, the log-odds (claims,) by fits without their images, and their AUROC."""

    regression: Regression
    held_out: F64
    auroc: float


def jointly(x: F64, table: ClaimTable, names: Sequence[str], regularisation: float) -> Regression:
    """All features at once, to all claims."""
    return Regression.fit(x, table.false, names, regularisation, table.weights)


def beside_text(x: F64, table: ClaimTable, names: Sequence[str], regularisation: float) -> Regression:
    """Text features first, to the claims that calibrate; then all others, to all claims, beside these log-odds.

    Names are in the order of `features.names`, text first.

    What the text alone knows is never unlearnt for what holds among constructed claims: with strong regularisation the gaze
    heads can help, and hardly hurt.
    """
    is_text = np.array([name in features.TEXT_FEATURES for name in names])
    own = table.select(table.calibrating)
    if not is_text.any() or own.false.all() or not own.false.any():
        return jointly(x, table, names, regularisation)
    of_text, others = ([name for name, text in zip(names, is_text, strict=True) if text == wanted] for wanted in (True, False))
    text = Regression.fit(x[table.calibrating][:, is_text], own.false, of_text, TEXT_REGULARISATION, own.weights)
    return text.fit_beside(x[:, is_text], x[:, ~is_text], table.false, others, regularisation, table.weights)


def cross_fit(
    table: ClaimTable,
    heads: GazeHeads,
    names: Sequence[str] | None = None,
    scope: str = "",
    fit: Fit = jointly,
) -> CrossFit:
    """Fit, calibrate and validate a detector on the same claims, one regression per kind.

    Args:
        table: The claims.
        heads: The gaze heads whose traces the features are from.
        names: The features to use; by default all that are finite in every claim. Where "attribution" is not among them, it is
            no substitute for the regression either.
        scope: What the claims are about, in words; see `Domain`.
        fit: How a regression is fitted.

    Returns:
        The detector with its domain, and the cross-fitted risks. Kinds with fewer than `regression.MIN_CLAIMS` false or true
        claims, or whose claims are not ranked better than chance, are left out and named in `Detector.left_out`. Where that
        holds of the objects, the detector's gate is not usable.

    Raises:
        InputError: There are too few false or true claims of kind "object".
    """
    names = known_features(table.x, heads.heads) if names is None else tuple(names)
    regressions: dict[Kind, Regression] = {}
    left_out: dict[ClaimKind, str] = {}
    risk, gate = np.full(len(table), np.nan), None
    for kind in cast(tuple[Kind, ...], JUDGED):
        rows = np.flatnonzero(table.kinds == kind)
        claims = table.select(rows)
        if not len(claims) and kind != "object":
            continue
        if reason := too_few(claims.false[claims.calibrating], kind):
            if kind == "object":
                raise InputError(f"{reason} Add more captions.")
            left_out[kind] = reason
            continue
        regression, of_kind = _fit_kind(claims, heads, names, fit)
        if (reason := _no_better_than_chance(regression, kind)) and kind != "object":
            left_out[kind] = reason
            continue
        if reason:
            gate = _closed(regression, reason)
        regressions[kind], risk[rows] = regression, of_kind
    domain = Domain.fit(table, heads.heads, scope)
    detector = Detector(model=heads.model, heads=heads.heads, kinds=regressions, left_out=left_out, gate=gate, domain=domain)
    return CrossFit(detector, risk)


def _no_better_than_chance(regression: Regression, kind: str) -> str:
    metrics = given(regression.validation)
    if metrics.auroc_interval is not None and metrics.auroc_interval[0] > 0.5:
        return ""
    hint = " Check that false=true marks claims that are wrong, not those that are right." if metrics.auroc < 0.5 else ""
    return f"on held-out images {kind} claims are ranked no better than by chance: AUROC {metrics.area}.{hint}"


def _closed(regression: Regression, reason: str) -> Gate:
    """The gate of a detector whose objects are ranked no better than by chance."""
    metrics = given(regression.validation)
    low, high = metrics.auroc_interval or (0.0, 1.0)
    return Gate(usable=False, reason=reason, figures={"auroc": metrics.auroc, "auroc_low": low, "auroc_high": high})


def _fit_kind(table: ClaimTable, heads: GazeHeads, names: Sequence[str], fit: Fit) -> tuple[Regression, F64]:
    """The better of regression and, where it is among the features, attribution on claims of a kind; and cross-fitted risks."""
    untrained = _attribution(table, heads)
    learnt = _regression(table, heads, names, fit)
    prefers_untrained = learnt is None or ("attribution" in names and learnt.auroc < untrained.auroc)
    best = untrained if prefers_untrained else given(learnt)
    own = table.calibrating
    slope, shift = platt(best.held_out[own], table.false[own], table.weights[own])
    risk = logistic(slope * best.held_out + shift)
    columns, judged = features.pick(table.x[own], heads.heads, best.regression.names), table.select(own)
    update = {
        "thresholds": thresholds(risk[own], judged.false, judged.image),
        "validation": ValidationMetrics.measure(columns, risk[own], judged.false, judged.image, cross_fitted=True),
    }
    return best.regression.scaled(slope, shift).model_copy(update=update), risk


def _attribution(table: ClaimTable, heads: GazeHeads) -> _Candidate:
    """The direct logit attribution summed over the gaze heads: the lower, the riskier. Nothing is learnt."""
    from sklearn.metrics import roc_auc_score

    regression = Regression.attribution(features.pick(table.x, heads.heads, ["attribution"]), table.false)
    logit = regression.logit(features.pick(table.x, heads.heads, ["attribution"]))
    return _Candidate(regression, logit, float(roc_auc_score(table.false[table.calibrating], logit[table.calibrating])))


def _regression(table: ClaimTable, heads: GazeHeads, names: Sequence[str], fit: Fit) -> _Candidate | None:
    """The regression on the features, or None where some part without a fold has no false or no true claim."""
    from sklearn.metrics import roc_auc_score

    x = features.pick(table.x, heads.heads, names)
    held_out = np.full(len(x), np.nan)
    for train, test in folds(table, FOLDS):
        if table.false[train].all() or not table.false[train].any():
            return None
        part = table.select(train)
        held_out[test] = fit(x[train], part, names, choose_regularisation(x[train], part, names, fit)).logit(x[test])
    if np.isnan(held_out).any():
        return None
    regression = fit(x, table, names, choose_regularisation(x, table, names, fit))
    return _Candidate(regression, held_out, float(roc_auc_score(table.false[table.calibrating], held_out[table.calibrating])))


def choose_regularisation(x: F64, table: ClaimTable, names: Sequence[str], fit: Fit = jointly) -> float:
    """The strongest regularisation whose held-out log-loss is within one standard error of the best (Breiman et al. 1984).

    The log-loss is that of calibrated probabilities, over folds of images.

    Args:
        x: (claims, F) the features that are used.
        table: The claims, all of one kind.
        names: The names of the features.
        fit: How a regression is fitted.
    """
    losses = []
    splits = [(train, test) for train, test in folds(table, INNER_FOLDS) if 0 < table.false[train].sum() < len(train)]
    for regularisation in REGULARISATIONS:
        held_out = np.zeros(len(x))
        for train, test in splits:
            held_out[test] = fit(x[train], table.select(train), names, regularisation).logit(x[test])
        losses.append(calibrated_loss(held_out, table.false, table.weights * table.calibrating))
    best = min(losses, key=np.sum)
    _, image = np.unique(table.image, return_inverse=True)
    for regularisation, loss in zip(REGULARISATIONS, losses, strict=True):
        excess = np.bincount(image, loss - best)  # per image, whose claims depend on each other
        if excess.sum() <= excess.std() * np.sqrt(len(excess)):
            return regularisation
    return REGULARISATIONS[-1]


def folds(table: ClaimTable, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Folds of images, as (claims that fit, claims that are judged), with false claims spread evenly; fewer for few images."""
    from sklearn.model_selection import StratifiedGroupKFold

    images = [len(np.unique(table.image[rows])) for rows in (table.false, ~table.false)]
    if (count := min(most, *images)) >= 2:
        yield from StratifiedGroupKFold(count, shuffle=True, random_state=0).split(table.x, table.false, table.image)
