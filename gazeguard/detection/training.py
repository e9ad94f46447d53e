"""Training of the regressions of a detector, one per kind of claim, on features with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gazeguard.claims.parse import Kind
from gazeguard.detection import features
from gazeguard.detection.calibration import thresholds
from gazeguard.detection.regression import MIN_CLAIMS, Regression, ValidationMetrics
from gazeguard.errors import InputError

F64 = NDArray[np.float64]
Heads = Sequence[tuple[int, int]]


def known_features(x: F64, heads: Heads) -> tuple[str, ...]:
    """The features (claims, F) that are finite in every claim; a model that reads images by cross-attention has no lens."""
    return tuple(name for name, column in zip(features.names(heads), x.T, strict=True) if np.isfinite(column).all())


def too_few(false: NDArray[np.bool_], kind: str) -> str:
    """Why claims of a kind with these labels (claims,) are too few for a detector, and how many are missing; "" if not."""
    counts = {"false": int(false.sum()), "true": int((~false).sum())}
    missing = [f"{MIN_CLAIMS - n} more {label}" for label, n in counts.items() if n < MIN_CLAIMS]
    if not missing:
        return ""
    return (
        f"{counts['false']} of all {len(false)} {kind} claims are false; a detector needs at least {MIN_CLAIMS} false and "
        f"{MIN_CLAIMS} true ones: {' and '.join(missing)}."
    )


def fit_regressions(
    x: F64,
    false: NDArray[np.bool_],
    kinds: NDArray[np.str_],
    heads: Heads,
    names: Sequence[str],
    regularisation: float,
    weights: F64 | None,
) -> dict[str, Regression]:
    """One regression per kind of claim with enough claims; see `Detector.fit`."""
    weights = np.ones(len(x)) if weights is None else weights
    chosen = features.pick(x, heads, names)
    enough = [k for k in np.unique(kinds) if MIN_CLAIMS <= false[kinds == k].sum() <= (kinds == k).sum() - MIN_CLAIMS]
    if "object" not in enough:
        raise InputError(f"{too_few(false[kinds == 'object'], 'object')} Add more captions.")
    by_kind = {str(kind): kinds == kind for kind in enough}
    return {k: Regression.fit(chosen[rows], false[rows], names, regularisation, weights[rows]) for k, rows in by_kind.items()}


def calibrate_regressions(
    regressions: Mapping[Kind, Regression],
    heads: Heads,
    x: F64,
    false: NDArray[np.bool_],
    kinds: NDArray[np.str_],
    image: NDArray[np.int64],
    weights: F64 | None,
) -> dict[Kind, Regression]:
    """Copies with probabilities and thresholds from validation data; see `Detector.calibrated`."""
    from sklearn.metrics import roc_auc_score

    weights = np.ones(len(x)) if weights is None else weights
    calibrated: dict[Kind, Regression] = {}
    for kind, regression in regressions.items():
        rows = kinds == kind
        if false[rows].all() or not false[rows].any():
            raise InputError(
                f"{int(false[rows].sum())} of {int(rows.sum())} validation claims of kind {kind!r} are false; thresholds "
                "need both true and false ones. Add more captions."
            )
        columns = features.pick(x[rows], heads, regression.names)
        if (area := float(roc_auc_score(false[rows], regression.logit(columns)))) < 0.5:
            raise InputError(
                f"On the validation data, {kind} claims with a high risk are not the false ones (AUROC {area:.3f}). Check that "
                "false=true marks claims that are wrong, not those that are right."
            )
        regression = regression.calibrated(columns, false[rows], weights[rows])
        risk = regression.risk(columns)
        update = {
            "thresholds": thresholds(risk, false[rows], image[rows]),
            "validation": ValidationMetrics.measure(columns, risk, false[rows], image[rows]),
        }
        calibrated[kind] = regression.model_copy(update=update)
    return calibrated
