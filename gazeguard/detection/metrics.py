"""Ranking metrics with bootstrap intervals over images.

The claims of one caption depend on each other, so every resample draws images, never claims: a statistic is a function of
how often each image is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES, FEW_RESAMPLES, FEW_IMAGES = 1000, 300, 100  # fewer images than the last need no finer percentiles

Statistic = Callable[[NDArray[np.int64]], float]


class Estimate(NamedTuple):
    """A value with its 95 % percentile interval; None where there is too little for one."""

    value: float
    interval: tuple[float, float] | None


def bootstrap_images(count: int, statistic: Statistic, seed: int = 0) -> Estimate:
    """A statistic over images with its interval.

    Args:
        count: Number of images. One image alone gives no interval.
        statistic: Gets how often each image is drawn, (count,) int64, all ones at first.
        seed: Of the resamples; equal seeds draw equal images, so that differences are paired.

    Returns:
        The statistic of all images, and its 95 % percentile interval.
    """
    value = float(statistic(np.ones(count, np.int64)))
    if count < 2:
        return Estimate(value, None)
    from scipy.stats import bootstrap

    interval = bootstrap(
        (np.arange(count),),
        lambda images: statistic(np.bincount(images, minlength=count)),
        vectorized=False,
        n_resamples=FEW_RESAMPLES if count < FEW_IMAGES else RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    defined = np.isfinite(interval).all()  # a resample of one class only has no area
    return Estimate(value, (float(interval.low), float(interval.high)) if defined else None)


def ranking(
    false: NDArray[np.bool_], score: NDArray[np.float64], image: NDArray[np.int64], bins: NDArray[np.int64] | None = None
) -> Statistic:
    """The area under the ROC curve with *false* as the positive class, as a statistic over images.

    Pairs are counted per pair of images once, so that a resample costs a product.

    Args:
        false: (claims,) whether each claim is false.
        score: (claims,) higher for more likely false.
        image: (claims,) index of the image of each claim.
        bins: (claims,) the statistic is the mean of the areas within them, weighted by their size; bins of one class only
            have none.

    Returns:
        The statistic; NaN where no bin has both classes.
    """
    bins = np.zeros(len(score), np.int64) if bins is None else bins
    count = int(image.max()) + 1 if len(image) else 0
    tables = []
    for value in np.unique(bins):
        bad, good = (np.flatnonzero((bins == value) & (false == is_bad)) for is_bad in (True, False))
        if len(bad) and len(good):
            higher = (score[bad][:, None] > score[good]) + 0.5 * (score[bad][:, None] == score[good])
            of_bad, of_good = (np.eye(count)[image[claims]] for claims in (bad, good))
            tables.append((of_bad.T @ higher @ of_good, of_bad.sum(0), of_good.sum(0)))

    def area(drawn: NDArray[np.int64]) -> float:
        areas, sizes = [], []
        for won, bad, good in tables:
            pairs = (drawn @ bad) * (drawn @ good)
            if pairs:
                areas.append(drawn @ won @ drawn / pairs)
                sizes.append(drawn @ (bad + good))
        return float(np.average(areas, weights=sizes)) if areas else float("nan")

    return area


def auroc(
    false: NDArray[np.bool_], score: NDArray[np.float64], image: NDArray[np.int64], bins: NDArray[np.int64] | None = None
) -> Estimate:
    """`ranking` with its interval."""
    return bootstrap_images(int(image.max()) + 1, ranking(false, score, image, bins))


def lift(
    false: NDArray[np.bool_],
    score: NDArray[np.float64],
    baseline: NDArray[np.float64],
    image: NDArray[np.int64],
    bins: NDArray[np.int64] | None = None,
) -> Estimate:
    """How much further a score ranks than a baseline does on the same claims: the paired difference of two `ranking`."""
    ours, theirs = (ranking(false, each, image, bins) for each in (score, baseline))
    return bootstrap_images(int(image.max()) + 1, lambda drawn: ours(drawn) - theirs(drawn))
