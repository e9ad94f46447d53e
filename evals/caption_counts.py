"""Counts of captions of lab drawings, per image, and the figures that they give: CHAIR, recall, length, and changes of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evals.common import Figure, over_images
from gazeguard import lab
from gazeguard.lab.truth import mentions

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


def count_captions(samples: Sequence[lab.Sample], captions: Sequence[str]) -> Counts:
    """The counts of one caption per image.

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
        named = mentions(sample.drawing, caption)
        false = sum(not mention.present for mention in named)
        misplaced = sum(mention.present and not mention.located for mention in named)
        nouns = {mention.phrase.head.text.lower() for mention in named}
        present = {each.noun for each in sample.drawing.objects}
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


def chair_at_recall(curve: Sequence[tuple[float, float]], recall: float) -> float:
    """The least CHAIR_i of a curve of points (recall, CHAIR_i) at this recall or more.

    Means of two neighbouring points count as points; where none has so much recall, that of the point with the most is taken.
    """
    points = sorted(curve, reverse=True)
    best = np.minimum.accumulate([chair for _, chair in points])
    return float(np.interp(recall, [own for own, _ in reversed(points)], best[::-1]))


def difference_at_equal_recall(counts: Counts, curve: Sequence[Counts]) -> Figure:
    """CHAIR_i of captions less that of a curve at equal recall."""

    def difference(drawn: NDArray[np.int64]) -> float:
        points = [(ratio(each, "recall", drawn), ratio(each, "chair_i", drawn)) for each in curve]
        return ratio(counts, "chair_i", drawn) - chair_at_recall(points, ratio(counts, "recall", drawn))

    return over_images(len(counts["captions"]), difference)
