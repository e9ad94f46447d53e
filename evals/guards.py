"""Guards that several evaluations compare: the subject's own, one that uses the text alone, and ones with random heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evals.subject import Chosen, subject
from gazeguard import lab
from gazeguard.artifacts import HEADS_FILE
from gazeguard.detection import features
from gazeguard.detection.cross_fitting import cross_fit
from gazeguard.detection.table import ClaimTable
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.labels import caption_and_label
from gazeguard.lab.training.tiny_fit import TEXT_ONLY
from gazeguard.lab.worlds import World, world
from gazeguard.policy import Policy

SEED = 400  # of the random heads
RANDOM = "random"  # folder of the control with random heads
# Features of the logit lens on image tokens. In the lab the image encoder's warm-up has trained every patch to predict the
# name of what it shows, so that these alone know all about objects, whatever the heads attend to. What attention and output of
# the heads are worth is measured without them, and so is the choice of heads.
LOGIT_LENS = ("attended_logprob", "internal_confidence")


class Setup(NamedTuple):
    """A subject and its controls, by names that other processes can read.

    chosen:   the subject
    controls: folder that `fit_controls` wrote; None for the text-only detector that the tiny lab ships, and random heads with
              a detector that is fitted when it is needed
    """

    chosen: Chosen = Chosen()
    controls: str | None = None


def without_logit_lens(heads: Sequence[tuple[int, int]]) -> list[str]:
    """The names of all features but `LOGIT_LENS`."""
    return [name for name in features.names(heads) if name not in LOGIT_LENS]


@functools.cache
def lab_guard(chosen: Chosen = Chosen()) -> GazeGuard:  # noqa: B008 (a value)
    """A guard with policy ``mark`` over the subject's model; one per process."""
    return subject(chosen).full_guard()


@functools.cache
def text_only_guard(setup: Setup = Setup()) -> GazeGuard:  # noqa: B008
    """A guard whose detector uses the text features alone."""
    known = lab_guard(setup.chosen)
    folder = Path(setup.controls) if setup.controls else lab.checkpoint_path()
    return GazeGuard(known.model, known.processor, heads=known.heads, detector=folder / TEXT_ONLY)


@functools.cache
def random_heads_guard(setup: Setup = Setup()) -> GazeGuard:  # noqa: B008
    """A guard whose gaze heads are random ones of the same layers, without a detector."""
    known = lab_guard(setup.chosen)
    if setup.controls:
        heads = GazeHeads.from_pretrained(Path(setup.controls) / RANDOM / HEADS_FILE)
    else:
        heads = known.heads.with_heads(known.heads.matched(np.random.default_rng(SEED)))
    return GazeGuard(known.model, known.processor, heads=heads)


@functools.cache
def random_detector_guard(setup: Setup = Setup()) -> GazeGuard:  # noqa: B008
    """A guard with random heads and a detector that is fitted to their traces."""
    if not setup.controls:
        return fit_random_guard(lab_guard(setup.chosen), 100, 1)
    known = lab_guard(setup.chosen)
    return GazeGuard(known.model, known.processor, artifacts=Path(setup.controls) / RANDOM)


def fit_random_guard(guard: GazeGuard, captions: int, seed: int, policy: str | Policy = "mark") -> GazeGuard:
    """A guard over as many random heads of the same layers, with a detector fitted as the tiny lab's own was.

    Args:
        guard: The guard whose model and number of heads are used.
        captions: Greedy and as many sampled captions of training images to fit to.
        seed: Of the heads and the captions.
        policy: Of the new guard.

    Returns:
        A guard whose detector does without `LOGIT_LENS`.
    """
    heads, table = _control_captions(guard, world(), captions, seed)
    detector = cross_fit(table, heads, without_logit_lens(heads.heads)).detector
    return GazeGuard(guard.model, guard.processor, policy=policy, heads=heads, detector=detector)


def fit_controls(chosen: Chosen, captions: int, folder: Path) -> Setup:
    """Write a text-only detector for the subject's heads, and random heads with their detector, fitted to the same captions.

    Args:
        chosen: The subject.
        captions: As for `fit_random_guard`.
        folder: Where they are written.
    """
    guard = lab_guard(chosen)
    heads, table = _control_captions(guard, subject(chosen).world, captions, SEED)
    heads.save_pretrained(folder / RANDOM)
    cross_fit(table, heads, without_logit_lens(heads.heads)).detector.save_pretrained(folder / RANDOM)
    text_only = cross_fit(table, heads, features.TEXT_FEATURES).detector
    text_only.model_copy(update={"heads": guard.heads.heads, "domain": None}).save_pretrained(folder / TEXT_ONLY)
    return Setup(chosen, str(folder))


def _control_captions(guard: GazeGuard, shown: World, captions: int, seed: int) -> tuple[GazeHeads, ClaimTable]:
    """Random heads of the same layers, and labelled training captions with their features."""
    heads = guard.heads.with_heads(guard.heads.matched(np.random.default_rng(seed)))
    plain = GazeGuard(guard.model, guard.processor, heads=heads)
    return heads, caption_and_label(plain, shown, "train", captions, seed).table
