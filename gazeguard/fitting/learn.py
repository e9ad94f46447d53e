"""Detector from recorded claims: weights of what was constructed, features that hold elsewhere, calibration, and the gate.

The model's own claims about drawn images set probabilities, thresholds and metrics, each image judged by a fit to the others.
Constructed claims only help to fit the weights: they are never what a user's captions consist of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from gazeguard.claims.parse import JUDGED, ClaimKind, parse
from gazeguard.detection import features
from gazeguard.detection.cross_fitting import beside_text, cross_fit
from gazeguard.detection.detector import Detector
from gazeguard.detection.domain import Domain
from gazeguard.detection.gate import Gate
from gazeguard.detection.metrics import Estimate, auroc, lift, ranking
from gazeguard.detection.regression import MIN_CLAIMS, Regression
from gazeguard.detection.table import ClaimTable, stack_states
from gazeguard.detection.training import known_features
from gazeguard.fitting.rows import Origin, Rows
from gazeguard.heads.artifact import GazeHeads
from gazeguard.trace import F32

F64 = NDArray[np.float64]

# How much a claim counts. What a model says of a user's image is mostly true: it counts less, and the less the riskier it
# seems, so that its loss is bounded; see `learn`.
WEIGHTS: Mapping[Origin, float] = {
    "own": 1.0, "swapped": 0.5, "wrong": 0.25, "blank": 0.1,
    "picture": 0.3, "picture-swapped": 0.5, "picture-wrong": 0.25, "picture-blank": 0.1,
    "labelled": 1.0,
}  # fmt: skip
LABELLED_SHARE = 2.0  # labelled claims together weigh so many times what all others do
MIN_OWN = 10  # false claims about objects of drawings, and true ones, that the gate asks for
MIN_PICTURE_AUROC = 0.6  # lower end of the interval, of swapped claims on the user's images
MIN_IMAGE_AUROC = 0.6  # lower end of the interval, of true claims against the same captions with another image
LIKE = 0.7  # area from which a user's images are called unlike the drawn ones
# What a detector learns from drawings has to hold for other images. How often claims are false at a position, or when repeated,
# is a fact about the captions of a fit: on a held-out model `repeated` had a weight of -2.7, which passed what was invented
# twice. The columns of single heads fit the style that is drawn: with them a model of the scenes lab that was fitted on
# pictographs ranked OpenMoji validation scenes less well, and a blind model seemed to see (`evals.fit`).
TRANSFERRED = ("token_nll", "entropy", *features.GAZE_FEATURES)
TEXT_FREE = (*features.GAZE_FEATURES, *features.HEAD_FEATURES)


class Learnt(NamedTuple):
    """A detector with its gate, and figures for its card."""

    detector: Detector
    figures: dict[str, float]


def learn(
    rows: Rows,
    heads: GazeHeads,
    states: Mapping[int, F32] | None = None,
    names: Sequence[str] | None = None,
    wording_nll: F64 | None = None,
) -> Learnt:
    """Fit, calibrate and gate a detector.

    Args:
        rows: The recorded claims.
        heads: The gaze heads.
        states: By number of an image, the state of its tokens, for the detector's domain.
        names: The features; by default those of `TRANSFERRED` that the model has.
        wording_nll: (captions,) `features.wording_nll` of the model's own captions, for the domain.

    Raises:
        InputError: There are too few false or true claims about objects to fit anything.
    """
    names = tuple(n for n in known_features(rows.x, heads.heads) if n in TRANSFERRED) if names is None else tuple(names)
    weights = base_weights(rows)
    noisy = rows.of("picture")
    fitted = cross_fit(table(rows, weights), heads, names, fit=beside_text)
    if noisy.any():  # once more, with the doubts of the first fit
        doubt = np.nan_to_num(fitted.risk[noisy])
        weights = weights.copy()
        weights[noisy] = WEIGHTS["picture"] * (1 - doubt)
        fitted = cross_fit(table(rows, weights), heads, names, fit=beside_text)
    own = calibrating(rows)
    detector = fitted.detector.fit_answers(fitted.risk[own], rows.answer[own], table(rows, weights).select(own))
    figures = gate_figures(rows, heads, fitted.risk)
    update = {"gate": detector.gate or decide(figures), "domain": domain(rows, heads, states or {}, wording_nll)}
    return Learnt(detector.model_copy(update=update), figures)


def left_out(detector: Detector, captions: Iterable[str]) -> dict[ClaimKind, str]:
    """Why a detector does not judge each other kind of claim, and how many claims are missing.

    Args:
        detector: The detector, with the reasons that its fit gives.
        captions: All that the model wrote for the fit.
    """
    made = Counter(claim.kind for text in captions for claim in parse(text).claims)
    reasons = dict(detector.left_out)
    for kind in get_args(ClaimKind):
        if kind not in {*detector.kinds, *reasons}:
            decided = "" if kind in JUDGED else " Neither drawings nor labels decide this kind."
            reasons[kind] = (
                f"the truth of none of the {made[kind]} {kind} claims in the fit's captions is known: {MIN_CLAIMS} false and "
                f"{MIN_CLAIMS} true ones are missing.{decided}"
            )
    return reasons


def domain(rows: Rows, heads: GazeHeads, states: Mapping[int, F32], wording_nll: F64 | None = None) -> Domain | None:
    """The domain of the model's own captions of drawings and, if there are any, of a user's images."""
    own = rows.select(rows.of("own", "picture", "labelled"))
    images, image = np.unique(own.image, return_inverse=True)
    known = stack_states([states.get(number) for number in images.tolist()])
    claims = ClaimTable(own.x, own.false, own.kinds, image, caption=own.caption, states=known, wording_nll=wording_nll)
    scope = "drawings and your images" if own.of("picture").any() else "drawings"
    return Domain.fit(claims, heads.heads, scope)


def base_weights(rows: Rows) -> F64:
    """(claims,): how much each claim counts; labelled ones together more than all others."""
    weights = np.array([WEIGHTS[origin] for origin in rows.origin.tolist()])
    labelled = rows.of("labelled")
    if labelled.any():
        rest = float(weights[~labelled].sum())
        weights[labelled] = max(1.0, LABELLED_SHARE * rest / int(labelled.sum()))
    return weights


def calibrating(rows: Rows) -> NDArray[np.bool_]:
    """(claims,): the model's own claims whose truth is known; labelled ones alone, where there are enough of them."""
    labelled = rows.of("labelled")
    if min((labelled & rows.false).sum(), (labelled & ~rows.false).sum()) >= MIN_OWN:
        return labelled
    return labelled | rows.of("own")


def table(rows: Rows, weights: F64) -> ClaimTable:
    """The rows as a table to fit to."""
    return ClaimTable(rows.x, rows.false, rows.kinds, rows.image, weights, rows.caption, calibrating=calibrating(rows))


# ------------------------------------------------------------------------------------------------------------- gate


def gate_figures(rows: Rows, heads: GazeHeads, risk: F64) -> dict[str, float]:
    """What decides whether a detector is usable, from cross-fitted risks (claims,).

    Returns:
        ``auroc``, ``text_auroc`` and ``lift`` on the objects of drawings with the ends of the interval of the lift, their
        numbers; ``image_auroc``: true claims about objects against the same captions with another drawing, which no text tells
        apart; on a user's images ``pictures_auroc`` of swapped objects with its lower end, and ``pictures_unlike``: how well
        a classifier tells the claims about them from those about drawings, .5 for not at all, 1 for always.
    """
    figures: dict[str, float] = {}
    own = np.flatnonzero(calibrating(rows) & (rows.kinds == "object") & np.isfinite(risk))
    claims = rows.select(own)
    figures |= {"false_objects": float(claims.false.sum()), "true_objects": float((~claims.false).sum())}
    if 0 < claims.false.sum() < len(claims):
        image = np.unique(claims.image, return_inverse=True)[1]
        text, every = _text_only(claims, heads), np.ones(int(image.max()) + 1, np.int64)
        figures |= {
            "auroc": ranking(claims.false, risk[own], image)(every),
            "text_auroc": ranking(claims.false, text, image)(every),
            **_named("lift", lift(claims.false, risk[own], text, image)),
        }
    true = rows.of("own") & ~rows.false
    figures |= _ranked(rows, risk, true | rows.of("wrong"), "image_auroc")
    on_images = _ranked(rows, risk, rows.of("picture", "picture-swapped"), "pictures_auroc")
    if on_images:
        figures |= on_images | {"pictures_unlike": two_sample(rows, heads)}
    return {name: float(value) for name, value in figures.items() if np.isfinite(value)}


def _ranked(rows: Rows, risk: F64, chosen: NDArray[np.bool_], name: str) -> dict[str, float]:
    """AUROC of some claims about objects, with its interval; nothing where they are all false or all true."""
    part = chosen & (rows.kinds == "object") & np.isfinite(risk)
    if not 0 < rows.false[part].sum() < part.sum():
        return {}
    image = np.unique(rows.image[part], return_inverse=True)[1]
    return _named(name, auroc(rows.false[part], risk[part], image))


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval or (float("nan"), float("nan"))
    return {name: estimate.value, f"{name}_low": low, f"{name}_high": high}


def _text_only(claims: Rows, heads: GazeHeads) -> F64:
    """(claims,): cross-fitted log-odds of a regression on text features alone."""
    x = features.pick(claims.x, heads.heads, features.TEXT_FEATURES)
    return _held_out(x, claims.false, claims.image, np.ones(len(x)))


def _held_out(x: F64, label: NDArray[np.bool_], image: NDArray[np.int64], weights: F64) -> F64:
    """(claims,): log-odds of a label by regressions without the image of each claim."""
    from sklearn.model_selection import GroupKFold

    scores = np.zeros(len(x))
    for train, test in GroupKFold(min(5, len(np.unique(image)))).split(x, groups=image):
        if 0 < label[train].sum() < len(train):
            fitted = Regression.fit(x[train], label[train], [str(i) for i in range(x.shape[1])], 0.1, weights[train])
            scores[test] = fitted.logit(x[test])
    return scores


def two_sample(rows: Rows, heads: GazeHeads) -> float:
    """How unlike the claims about a user's images are those about drawings: the AUROC of a cross-fitted classifier of the two.

    A classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv 1610.06545) on the features of the gaze heads.
    """
    from sklearn.metrics import roc_auc_score

    chosen = rows.select(rows.of("own", "picture") & (rows.kinds == "object"))
    names = [n for n in known_features(chosen.x, heads.heads) if n.partition("@")[0] in TEXT_FREE]
    is_picture = chosen.of("picture")
    balanced = np.where(is_picture, 0.5 / max(1, is_picture.sum()), 0.5 / max(1, (~is_picture).sum())) * len(chosen)
    scores = _held_out(features.pick(chosen.x, heads.heads, names), is_picture, chosen.image, balanced)
    return float(roc_auc_score(is_picture, scores)) if 0 < is_picture.sum() < len(chosen) else float("nan")


def decide(figures: Mapping[str, float]) -> Gate:
    """Whether a detector with these figures is usable; the first reason why not."""
    kept = {name: float(f"{value:.4g}") for name, value in figures.items()}
    least = min(kept["false_objects"], kept["true_objects"])
    if least < MIN_OWN:
        reason = (
            f"{kept['false_objects']:.0f} false and {kept['true_objects']:.0f} true claims about objects of drawings; the gate "
            f"asks for {MIN_OWN} of each. Fit with a larger --budget, or with labelled captions (--captions)"
        )
    elif not kept.get("lift_low", 0) > 0:
        reason = (
            f"its AUROC of {kept['auroc']:.3f} is not above that of the text alone, {kept['text_auroc']:.3f}: lift "
            f"{kept['lift']:+.3f}, 95 % interval {kept['lift_low']:+.3f} to {kept['lift_high']:+.3f}"
        )
    elif not kept.get("image_auroc_low", 0) > MIN_IMAGE_AUROC:
        reason = (
            f"the same captions with another image seem hardly less true to it: AUROC {kept.get('image_auroc', 0.5):.3f}, 95 % "
            f"interval from {kept.get('image_auroc_low', 0):.3f}; the gate asks for {MIN_IMAGE_AUROC}. The model may not use "
            "its images"
        )
    elif kept.get("pictures_auroc_low", 1) < MIN_PICTURE_AUROC:
        reason = (
            f"on your images it ranks swapped claims with AUROC {kept['pictures_auroc']:.3f}, 95 % interval from "
            f"{kept['pictures_auroc_low']:.3f}; the gate asks for {MIN_PICTURE_AUROC}"
        )
    else:
        return Gate(usable=True, reason="", figures=kept)
    return Gate(usable=False, reason=reason, figures=kept)
