"""Cross-fitting of a detector: every claim helps to fit and to calibrate, and none is judged by a fit to its own image.

Images are dealt into folds. The claims of each fold get their log-odds from a regression on the other folds, whose strength of
regularisation was chosen within those (nested validation); probabilities, thresholds and metrics come from these log-odds, the
weights from all claims. Where claims are too few for a regression to rank them better than the direct logit attribution of
the gaze heads does without any training, that attribution is the detector, on a calibrated scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from gazeguard.claims.parse import JUDGED, Kind
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
FOLDS, INNER_FOLDS = 5, 3


class CrossFit(NamedTuple):
    """A detector, and the risk (claims,) of each claim by a fit without its image; NaN for claims of kinds left out."""

    detector: Detector
    risk: F64


class _Candidate(NamedTuple):
    """A regression on all claims of a kind, the log-odds (claims,) by fits without their images, and their AUROC."""

    regression: Regression
    held_out: F64
    auroc: float


def cross_fit(
    table: ClaimTable, heads: GazeHeads, names: Sequence[str] | Mapping[str, Sequence[str]] | None = None, scope: str = ""
) -> CrossFit:
    """Fit, calibrate and validate a detector on the same claims, one regression per kind.

    Args:
        table: The claims.
        heads: The gaze heads whose traces the features are from.
        names: The features to use, for all kinds or by kind (see `choose_features`); by default all that are finite in every
            claim. Where "attribution" is not among those for all kinds, it is no substitute for the regression either.
        scope: What the claims are about, in words; see `Domain`.

    Returns:
        The detector with its domain, and the cross-fitted risks. Kinds with fewer than `regression.MIN_CLAIMS` false or true
        claims, or whose claims are not ranked better than chance, are left out and named in `Detector.left_out`. Where that
        holds of the objects, the detector's gate is not usable.

    Raises:
        InputError: There are too few false or true claims of kind "object".
    """
    known = known_features(table.x, heads.heads)
    by_kind = names if isinstance(names, Mapping) else dict.fromkeys(JUDGED, known if names is None else tuple(names))
    untrained = names is None or isinstance(names, Mapping) or "attribution" in names
    regressions: dict[Kind, Regression] = {}
    left_out: dict[Kind, str] = {}
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
        regression, of_kind = _fit_kind(claims, heads, by_kind.get(kind, known), untrained)
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


def _fit_kind(table: ClaimTable, heads: GazeHeads, names: Sequence[str], may_use: bool) -> tuple[Regression, F64]:
    """The better of regression and, where it may be used, attribution on claims of one kind; and cross-fitted risks."""
    untrained = _attribution(table, heads)
    learnt = _regression(table, heads, names)
    prefers_untrained = learnt is None or (may_use and learnt.auroc < untrained.auroc)
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


def _regression(table: ClaimTable, heads: GazeHeads, names: Sequence[str]) -> _Candidate | None:
    """The regression on the features, or None where some part without a fold has no false or no true claim."""
    from sklearn.metrics import roc_auc_score

    x = features.pick(table.x, heads.heads, names)
    held_out = np.full(len(x), np.nan)
    for train, test in folds(table, FOLDS):
        if table.false[train].all() or not table.false[train].any():
            return None
        part = table.select(train)
        chosen = choose_regularisation(x[train], part, names)
        held_out[test] = Regression.fit(x[train], part.false, names, chosen, part.weights).logit(x[test])
    if np.isnan(held_out).any():
        return None
    regression = Regression.fit(x, table.false, names, choose_regularisation(x, table, names), table.weights)
    return _Candidate(regression, held_out, float(roc_auc_score(table.false[table.calibrating], held_out[table.calibrating])))


def choose_regularisation(x: F64, table: ClaimTable, names: Sequence[str]) -> float:
    """The strongest regularisation whose held-out log-loss is within one standard error of the best (Breiman et al. 1984).

    The log-loss is that of calibrated probabilities, over folds of images.

    Args:
        x: (claims, F) the features that are used.
        table: The claims, all of one kind.
        names: The names of the features.
    """
    losses = []
    splits = [(train, test) for train, test in folds(table, INNER_FOLDS) if 0 < table.false[train].sum() < len(train)]
    for regularisation in REGULARISATIONS:
        held_out = np.zeros(len(x))
        for train, test in splits:
            part = table.select(train)
            held_out[test] = Regression.fit(x[train], part.false, names, regularisation, part.weights).logit(x[test])
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
