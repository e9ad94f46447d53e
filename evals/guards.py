"""Guards that several evaluations compare: the lab's own, one that uses the text alone, and ones with random heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from gazeguard import lab
from gazeguard.detection import features
from gazeguard.detection.detector import Detector
from gazeguard.guard import GazeGuard
from gazeguard.lab.labels import caption_and_label
from gazeguard.lab.training.tiny_fit import TEXT_ONLY
from gazeguard.lab.worlds import world
from gazeguard.policy import Policy

SEED = 400  # of the random heads
# Features of the logit lens on image tokens. In the lab the image encoder's warm-up has trained every patch to predict the
# name of what it shows, so that these alone know all about objects, whatever the heads attend to. What attention and output of
# the heads are worth is measured without them, and so is the choice of heads.
LOGIT_LENS = ("attended_logprob", "internal_confidence")


def without_logit_lens(heads: Sequence[tuple[int, int]]) -> list[str]:
    """The names of all features but `LOGIT_LENS`."""
    return [name for name in features.names(heads) if name not in LOGIT_LENS]


@functools.cache
def lab_guard() -> GazeGuard:
    """A guard with policy ``mark`` over the lab's model; one per process."""
    return GazeGuard(*lab.load())


@functools.cache
def text_only_guard() -> GazeGuard:
    """A guard whose detector uses the text features alone."""
    known = lab_guard()
    return GazeGuard(known.model, known.processor, heads=known.heads, detector=lab.checkpoint_path() / TEXT_ONLY)


@functools.cache
def random_heads_guard() -> GazeGuard:
    """A guard whose gaze heads are random ones of the same layers, without a detector."""
    known = lab_guard()
    heads = known.heads.with_heads(known.heads.matched(np.random.default_rng(SEED)))
    return GazeGuard(known.model, known.processor, heads=heads)


@functools.cache
def random_detector_guard() -> GazeGuard:
    """A guard with random heads and a detector that is fitted to their traces."""
    return fit_random_guard(lab_guard(), 100, 1)


def fit_random_guard(guard: GazeGuard, captions: int, seed: int, policy: str | Policy = "mark") -> GazeGuard:
    """A guard over as many random heads of the same layers, with a detector fitted as the lab's own was.

    Args:
        guard: The guard whose model and number of heads are used.
        captions: Greedy and as many sampled captions of training drawings to fit to; half as many of validation drawings
            calibrate.
        seed: Of the heads and the captions.
        policy: Of the new guard.

    Returns:
        A guard whose detector does without `LOGIT_LENS`.
    """
    heads = guard.heads.with_heads(guard.heads.matched(np.random.default_rng(seed)))
    plain = GazeGuard(guard.model, guard.processor, heads=heads)
    train, held_out = (
        caption_and_label(plain, world(), split, n, seed) for split, n in (("train", captions), ("validation", captions // 2))
    )
    detector = Detector.fit(train.x, train.false, train.kind, heads, without_logit_lens(heads.heads))
    detector = detector.calibrated(held_out.x, held_out.false, held_out.kind, held_out.image)
    return GazeGuard(guard.model, guard.processor, policy=policy, heads=heads, detector=detector)
