"""Detectors of the laboratories' models, fitted to captions of training images whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gazeguard.artifacts import DETECTOR_FILE
from gazeguard.detection.cross_fitting import cross_fit
from gazeguard.detection.detector import Detector
from gazeguard.detection.rerank_evidence import RerankEvidence
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.labels import caption_and_label, self_verification_answers
from gazeguard.lab.worlds import World

SCOPE = "the drawings of the lab, which are all that its model knows"


def fit_detectors(
    guard: GazeGuard, world: World, captions: int, seed: int, feature_sets: Sequence[Sequence[str]]
) -> list[Detector]:
    """Fit a detector on each set of features: weights to training images, probabilities and thresholds to validation images.

    Args:
        guard: Over the model with its gaze heads.
        world: Draws the images.
        captions: Greedy and as many sampled captions to fit to; half as many to calibrate on.
        seed: Of the images.
        feature_sets: The names of the features that each detector uses.
    """
    train = caption_and_label(guard, world, "train", captions, seed)
    held_out = caption_and_label(guard, world, "validation", captions // 2, seed)
    answers = self_verification_answers(guard, world.samples("validation", captions // 2 * 2, seed), held_out)
    detectors = []
    for names in feature_sets:
        detector = cross_fit(train.table, guard.heads, names, SCOPE).detector
        detector = detector.calibrated(held_out.x, held_out.false, held_out.kind, held_out.image)
        risk = detector.risk(held_out.x, held_out.kind.tolist())
        detectors.append(detector.fit_answers(risk, answers, held_out.table))
    return detectors


def measured_before(folder: Path, heads: GazeHeads) -> RerankEvidence | None:
    """What was measured for rerank with the same heads of the same model; `gazeguard.fitting.rerank` measures it anew."""
    if not (folder / DETECTOR_FILE).is_file():
        return None
    before = Detector.from_pretrained(folder)
    return before.rerank if (before.model, before.heads) == (heads.model, heads.heads) else None
