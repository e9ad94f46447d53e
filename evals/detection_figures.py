"""Figures of detection: areas under the ROC curve with paired differences, calibration, and the conformal bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, precision_score, recall_score

from evals.common import Figure, auroc, figure, over_images
from gazeguard.detection import features
from gazeguard.detection.calibration import calibration_error, conformal, least_flagged
from gazeguard.detection.detector import Detector
from gazeguard.detection.metrics import draws, estimate, ranking
from gazeguard.fitting.rows import Rows
from gazeguard.lab.labels import LabelledClaims

BIN = 10  # tokens
RESPLITS, SPLIT_SEED = 20, 200
OURS = ("detector", "dla", "without_logit_lens")  # what is no baseline

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def position_bins(labelled: LabelledClaims | Rows, heads: Sequence[tuple[int, int]]) -> I64:
    """(claims,) bins of `BIN` tokens."""
    return (np.expm1(features.pick(labelled.x, heads, ("position",))[:, 0]).round().astype(np.int64)) // BIN


def summary(values: F64) -> Figure:
    """The figure of a statistic on all `draws`."""
    return figure(*estimate(values))


class Areas:
    """Areas under the ROC curve on all `draws` of the images, (1 + resamples,) each, so that differences are paired.

    Args:
        objects: The claims.
        chosen: (claims,) which of them count.
        bins: (claims,) bins within which claims are compared; None for all together.
    """

    def __init__(self, objects: LabelledClaims, chosen: NDArray[np.bool_] | None = None, bins: I64 | None = None) -> None:
        rows = np.flatnonzero(np.ones(len(objects.false), bool) if chosen is None else chosen)
        self.rows, self.false, self.image = rows, objects.false[rows], objects.image[rows]
        self.bins = None if bins is None else bins[rows]
        self.drawn = draws(int(objects.image.max()) + 1)[:, : int(self.image.max()) + 1]

    def of(self, score: F64) -> F64:
        """The area of a score (claims,)."""
        return ranking(self.false, score[self.rows], self.image, self.bins)(self.drawn)


def auroc_figures(objects: LabelledClaims, scores: Mapping[str, F64], heads: Sequence[tuple[int, int]]) -> dict[str, Figure]:
    """Areas of every score overall, within bins of position, and of first mentions there; and the detector's paired lifts.

    ``lift`` is over the text alone, ``lift_over_best_baseline`` over the baseline that does best on these very captions.
    """
    first = features.pick(objects.x, heads, ("repeated",))[:, 0] == 0
    bins = position_bins(objects, heads)
    found = {}
    for part, chosen, inside in (("", None, None), ("_within_bins", None, bins), ("_first_within_bins", first, bins)):
        of = Areas(objects, chosen, inside).of
        areas = {name: of(score) for name, score in scores.items()}
        found |= {f"auroc_{name}{part}": summary(area) for name, area in areas.items()}
        found[f"lift{part}"] = summary(areas["detector"] - areas["text_only"])
        if part == "_within_bins":
            baselines = {name: area for name, area in areas.items() if name not in OURS}
            found |= {f"lift_over_{name}{part}": summary(areas["detector"] - area) for name, area in baselines.items()}
            best = max(baselines, key=lambda name: baselines[name][0])
            found[f"lift_over_best_baseline{part}"] = found[f"lift_over_{best}{part}"]
    return found


def control_figures(
    objects: LabelledClaims,
    heads: Sequence[tuple[int, int]],
    trained: Sequence[F64],
    untrained: Sequence[F64],
    best: Mapping[str, int],
    matched: int,
) -> dict[str, Figure]:
    """Gaze heads against random sets, within bins: a regression on each set, and its DLA alone, not fitted.

    Args:
        objects: The claims.
        heads: The gaze heads.
        trained, untrained: Scores by the gaze heads, then by every random set; the first ``matched`` are layer-matched.
        best: "trained" and "untrained" -> number of the random set that is best on validation captions.
        matched: How many sets are layer-matched.
    """
    of = Areas(objects, None, position_bins(objects, heads)).of
    found = {}
    for name, gaze_name, scores, best_set in (
        ("random_heads", "without_logit_lens", trained, best["trained"]),
        ("random_dla", "dla", untrained, best["untrained"]),
    ):
        areas = np.stack([of(score) for score in scores])
        gaze, others = areas[0], areas[1:]
        for prefix, some in (("", others[:matched]), ("any_", others[matched:])):
            if len(some):
                found[f"auroc_{prefix}{name}_mean_within_bins"] = summary(some.mean(0))
        found |= {
            f"auroc_{gaze_name}_of_replay_within_bins": summary(gaze),
            f"auroc_best_{name}_within_bins": summary(areas[best_set]),
            f"auroc_best_{name}_on_test_within_bins": figure(others[:, 0].max()),
            f"lift_of_gaze_heads_over_mean_{name}_within_bins": summary(gaze - others.mean(0)),
            f"lift_of_gaze_heads_over_best_{name}_within_bins": summary(gaze - areas[best_set]),
        }
    return found


def split_figures(
    detector: Detector, objects: LabelledClaims, other: LabelledClaims, heads: Sequence[tuple[int, int]], split: str
) -> dict[str, Figure]:
    """The detector on another split, and how much less it ranks there than on the test split (other images: not paired)."""
    found = {}
    for part in ("", "_within_bins"):
        areas = []
        for seed, each in enumerate((objects, other)):
            bins = position_bins(each, heads) if part else None
            risk = detector.risk(each.x, each.kind)
            drawn = draws(int(each.image.max()) + 1, seed)
            areas.append(ranking(each.false, risk, each.image, bins)(drawn))
        test, shifted = (area[: min(map(len, areas))] for area in areas)
        found[f"auroc_{split}{part}"] = summary(areas[1])
        found[f"auroc_{'shift' if split == 'shifted' else split}_drop{part}"] = summary(test - shifted)
    return found


def calibration_figures(false: NDArray[np.bool_], image: I64, risk: F64, threshold: float) -> dict[str, Figure]:
    """Calibration, the shipped threshold, and the conformal bound over resplits."""
    count, flagged = int(image.max()) + 1, risk >= threshold
    found = {
        "ece": over_images(count, lambda drawn: calibration_error(*(np.repeat(v, drawn[image]) for v in (risk, false)))),
        "brier": figure(brier_score_loss(false, risk)),
        "average_precision": figure(average_precision_score(false, risk)),
        "precision": figure(precision_score(false, flagged, zero_division=0)),
        "recall": figure(recall_score(false, flagged)),
        "f1": figure(f1_score(false, flagged)),
        "base_rate": figure(false.mean()),
        "claims": figure(len(false)),
    }
    rng = np.random.default_rng(SPLIT_SEED)
    splits = [np.isin(image, rng.permutation(count)[: count // 2]) for _ in range(RESPLITS)]
    for alpha in (0.05, 0.02):
        lost, dropped = [], []
        for half in splits:
            if (limit := conformal(risk[half], false[half], image[half], alpha)) is None:
                continue
            kept = (risk[~half] < limit) & false[~half]
            claims = np.bincount(image[~half], minlength=count)
            per_image = np.bincount(image[~half], kept, minlength=count)[claims > 0] / claims[claims > 0]
            lost.append(per_image.mean())
            dropped.append((risk[~half] >= limit).mean())
        if lost:
            found[f"conformal_{alpha}_false_kept"] = figure(np.mean(lost), tuple(np.quantile(lost, (0.025, 0.975))))
            found[f"conformal_{alpha}_flagged"] = figure(np.mean(dropped))
        found[f"conformal_{alpha}_least_flagged"] = figure(least_flagged(false.mean(), alpha))
    return found


def kind_figures(part: LabelledClaims, scores: Mapping[str, F64], name: str) -> dict[str, Figure]:
    """Areas of claims of another kind, by score; none where all are true or all are false."""
    found = {f"claims_{name}": figure(len(part.false))}
    if part.false.any() and not part.false.all():
        for prefix, score in scores.items():
            found[f"auroc_{prefix}{name}"] = auroc(part.false, score, part.image)
    return found
