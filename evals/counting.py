"""Figures of counts of true and false: CHAIR's from mentions, POPE's from answers; used for public data and the lab alike.

Where nothing is counted (no mention, no "yes"), a rate is 0.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
from numpy.typing import NDArray

from evals.common import Figure, over_images, rate


def count(number: int) -> Figure:
    """A plain number, exact and without an interval."""
    return {"value": int(number), "ci": None}


def chair_figures(mentions: Sequence[Sequence[tuple[str, bool]]], there: Sequence[Set[str]]) -> dict[str, Figure]:
    """CHAIR of captions, one per image (Rohrbach et al. 2018).

    mentions: per caption, in order, the category that is named and whether that is false
    there:    per caption, the categories in the image

    chair_s:  captions with a false mention / captions; chair_i: false mentions / mentions, repeats counted
    recall:   categories named rightly / categories there
    precision: categories named rightly / categories named
    f1:       of these two; all three are sums over captions of sets within a caption
    """
    false = [[wrong for _, wrong in caption] for caption in mentions]
    named = [len({kind for kind, _ in caption}) for caption in mentions]
    right = [len({kind for kind, wrong in caption if not wrong}) for caption in mentions]
    sizes = [len(kinds) for kinds in there]
    return {
        "chair_s": rate([any(f) for f in false], [1] * len(false)),
        "chair_i": rate([sum(f) for f in false], [len(f) for f in false]),
        "recall": rate(right, sizes),
        "precision": rate(right, named),
        "f1": rate([2 * r for r in right], [n + s for n, s in zip(named, sizes, strict=True)]),
    }


def pope_figures(
    labels: Sequence[str], answers: Sequence[str], images: Sequence[str], positive: str = "yes"
) -> dict[str, Figure]:
    """Figures of yes/no answers; the draws of the intervals are of images, each with all its questions.

    labels:  "yes" or "no"
    answers: the same, or anything else, which is wrong and not positive
    images:  the image of each question

    precision, recall (TPR), FPR, F1 and Matthews' correlation (MCC) are of the positive answer, ``yes_rate`` is of "yes".
    """
    at, number = indexed(images)
    label, answer = np.asarray(labels), np.asarray(answers)
    true, positives = label == positive, answer == positive

    def total(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.bincount(at, mask, number)

    each, tp, fp, fn, tn = (
        total(m) for m in (true | ~true, true & positives, ~true & positives, true & ~positives, ~true & ~positives)
    )

    def mcc(drawn: NDArray[np.int64]) -> float:
        a, b, c, d = (float(drawn @ counts) for counts in (tp, fp, fn, tn))
        spread = (a + b) * (a + c) * (d + b) * (d + c)
        return (a * d - b * c) / spread**0.5 if spread else 0.0

    return {
        "accuracy": rate(total(label == answer), each),
        "precision": rate(tp, tp + fp),
        "recall": rate(tp, tp + fn),
        "f1": rate(2 * tp, 2 * tp + fp + fn),
        "yes_rate": rate(total(answer == "yes"), each),
        "mcc": over_images(number, mcc),
        "fpr": rate(fp, fp + tn),
        "tpr": rate(tp, tp + fn),
    }


def indexed(images: Sequence[str]) -> tuple[NDArray[np.int64], int]:
    """Images by number, (questions,) int64, in the order in which they first come, and how many there are."""
    order = {image: i for i, image in enumerate(dict.fromkeys(images))}
    return np.array([order[image] for image in images], np.int64), len(order)
