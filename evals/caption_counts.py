"""Counts of captions of lab images, per image, and the figures that they give: CHAIR, recall, length, and changes of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.common import Figure, figure, over_images
from gazeguard.detection.metrics import draws, estimate
from gazeguard.fitting.rerank import chair_at_recall
from gazeguard.lab.worlds import World

Counts = Mapping[str, NDArray[np.float64]]  # per image
# The figures that are a ratio of two counts.
RATIOS = {
    "chair_i": ("false", "mentions"),
    "chair_s": ("with_false", "captions"),
    "misplaced": ("misplaced", "mentions"),
    "wrong": ("wrong", "mentions"),
    "recall": ("right", "present"),
    "mentions": ("mentions", "captions"),
    "words": ("words", "captions"),
}


def count_captions(shown: World, samples: Sequence[Any], captions: Sequence[str]) -> Counts:
    """The counts of one caption per image of a world.

    false:      mentions of objects that are not in the image
    misplaced:  mentions of objects that are in the image, but not at the location that is named
    wrong:      both
    mentions:   all mentions
    with_false: whether any mention is false
    right:      nouns that are named and in the image
    present:    nouns in the image
    nouns:      nouns that are named
    words, captions
    """
    rows = []
    for sample, caption in zip(samples, captions, strict=True):
        named, present = shown.named(sample, caption), shown.nouns(sample)
        false = sum(not each.present for each in named)
        misplaced = sum(each.present and not each.located for each in named)
        nouns = {each.noun for each in named}
        of_mentions = (false, misplaced, false + misplaced, len(named), false > 0)
        rows.append((*of_mentions, len(nouns & present), len(present), len(nouns), len(caption.split()), 1))
    names = ("false", "misplaced", "wrong", "mentions", "with_false", "right", "present", "nouns", "words", "captions")
    return dict(zip(names, np.array(rows, float).T, strict=True))


def add_counts(several: Sequence[Counts]) -> Counts:
    """The counts of several captions per image."""
    return {name: np.sum([each[name] for each in several], axis=0) for name in several[0]}


def ratio(counts: Counts, name: str, drawn: NDArray[np.int64]) -> float:
    """One of `RATIOS`; ``drawn`` (images,) is how often each image is drawn."""
    top, bottom = RATIOS[name]
    return float((counts[top] @ drawn) / max(1e-12, counts[bottom] @ drawn))


def f1(counts: Counts, drawn: NDArray[np.int64]) -> float:
    """Harmonic mean of precision and recall of nouns."""
    return float(2 * (counts["right"] @ drawn) / max(1e-12, (counts["nouns"] + counts["present"]) @ drawn))


def caption_figures(counts: Counts) -> dict[str, Figure]:
    """The figures of captions by themselves."""
    images = len(counts["captions"])
    figures = {name: over_images(images, functools.partial(ratio, counts, name)) for name in RATIOS}
    return figures | {"f1": over_images(images, functools.partial(f1, counts))}


def compare(counts: Counts, plain: Counts) -> dict[str, Figure]:
    """The figures of captions against plain ones of the same images."""
    images = len(counts["captions"])

    def relative(name: str, drawn: NDArray[np.int64]) -> float:
        return ratio(counts, name, drawn) / max(1e-12, ratio(plain, name, drawn)) - 1

    return {
        "chair_i_reduction": over_images(images, lambda drawn: -relative("chair_i", drawn)),
        "wrong_reduction": over_images(images, lambda drawn: -relative("wrong", drawn)),
        "words_change": over_images(images, functools.partial(relative, "words")),
        "recall_change": over_images(images, lambda drawn: ratio(counts, "recall", drawn) - ratio(plain, "recall", drawn)),
    }


def differences_at_equal_recall(counts: Counts, curve: Sequence[Counts]) -> NDArray[np.float64]:
    """CHAIR_i of captions less that of a curve at equal recall, on all `draws` of the images: (1 + resamples,)."""
    drawn = draws(len(counts["captions"]))

    def on_draws(each: Counts, name: str) -> NDArray[np.float64]:
        top, bottom = RATIOS[name]
        return (drawn @ each[top]) / np.maximum(1e-12, drawn @ each[bottom])

    recalls, chairs = (np.stack([on_draws(each, name) for each in curve], axis=1) for name in ("recall", "chair_i"))
    at = [
        chair_at_recall(list(zip(*points, strict=True)), recall)
        for *points, recall in zip(recalls, chairs, on_draws(counts, "recall"), strict=True)
    ]
    return on_draws(counts, "chair_i") - np.array(at)


def difference_at_equal_recall(counts: Counts, curve: Sequence[Counts]) -> Figure:
    """CHAIR_i of captions less that of a curve at equal recall."""
    return figure(*estimate(differences_at_equal_recall(counts, curve)))


def holm(p_values: Mapping[str, float], level: float) -> frozenset[str]:
    """The hypotheses that Holm's step-down correction (1979) rejects at a level for all of them together."""
    rejected = []
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        if p_values[name] > level / (len(p_values) - rank):
            break
        rejected.append(name)
    return frozenset(rejected)


def frontier_figures(methods: Mapping[str, Counts], frontier: Sequence[Counts], level: float = 0.025) -> dict[str, Figure]:
    """For each method whether its captions lie under a frontier: a lower CHAIR_i at equal recall.

    Args:
        methods: Name -> counts of its captions.
        frontier: Counts of the captions that make the frontier, on the same images; the best of them is taken in every
            resample, which favours the frontier.
        level: One-sided, for all methods together (Holm).

    Returns:
        ``NAME_vs_frontier``, the difference in CHAIR_i (below 0 is better), and ``NAME_under_frontier``, 1 or 0.
    """
    values = {name: differences_at_equal_recall(counts, frontier) for name, counts in methods.items()}
    below = holm({name: (1 + (each[1:] >= 0).sum()) / len(each) for name, each in values.items()}, level)
    figures = {f"{name}_vs_frontier": figure(*estimate(each)) for name, each in values.items()}
    return figures | {f"{name}_under_frontier": figure(float(name in below)) for name in values}
