"""Ranking metrics with bootstrap intervals over images.

The claims of one caption depend on each other, so every resample draws images, never claims: a statistic is a function of
how often each image is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES, FEW_RESAMPLES, FEW_IMAGES = 1000, 300, 100  # fewer images than the last need no finer percentiles

Statistic = Callable[[NDArray[np.int64]], Any]


class Estimate(NamedTuple):
    """A value with its 95 % percentile interval; None where there is too little for one."""

    value: float
    interval: tuple[float, float] | None


def draws(count: int, seed: int = 0) -> NDArray[np.int64]:
    """How often each of ``count`` images is drawn: (1 + resamples, count), the first row once each; one image has no resample.

    Equal seeds draw equal images, so that differences of statistics on the same rows are paired.
    """
    resamples = 0 if count < 2 else FEW_RESAMPLES if count < FEW_IMAGES else RESAMPLES
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate((np.ones((1, count), np.int64), drawn))


def estimate(values: NDArray[np.float64]) -> Estimate:
    """A statistic of all images and its 95 % percentile interval, from its values (1 + resamples,) on `draws`.

    Resamples without a value, as of a ranking whose claims are all true, are left out.
    """
    known = values[1:][~np.isnan(values[1:])]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return Estimate(float(values[0]), (float(low), float(high)) if len(known) else None)


def bootstrap_images(count: int, statistic: Statistic, seed: int = 0) -> Estimate:
    """A statistic over images with its interval.

    Args:
        count: Number of images. One image alone gives no interval.
        statistic: Gets how often each image is drawn, (count,) int64, all ones at first.
        seed: Of the resamples; equal seeds draw equal images, so that differences are paired.

    Returns:
        The statistic of all images, and its 95 % percentile interval.
    """
    return estimate(np.array([statistic(drawn) for drawn in draws(count, seed)], float))


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
        The statistic; NaN where no bin has both classes. It takes several draws (..., images) at once.
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

    def area(drawn: NDArray[np.int64]) -> Any:
        drawn = drawn.astype(float)  # products of floats are fast
        total, size = np.zeros(drawn.shape[:-1]), np.zeros(drawn.shape[:-1])
        for won, bad, good in tables:
            pairs = (drawn @ bad) * (drawn @ good)
            weight = np.where(pairs > 0, drawn @ (bad + good), 0.0)
            total += weight * ((drawn @ won) * drawn).sum(-1) / np.maximum(pairs, 1)
            size += weight
        return np.where(size > 0, total / np.maximum(size, 1), np.nan)

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


def wilson(events: int, trials: int) -> Estimate:
    """The share of events among independent trials, with its 95 % interval (Wilson 1927), which holds near 0 and 1, too."""
    if not trials:
        return Estimate(np.nan, None)
    z = 1.959964  # the 97.5 % quantile of the normal distribution
    share, spread = events / trials, z**2 / trials
    middle, half = share + spread / 2, np.sqrt(share * (1 - share) * spread + spread**2 / 4)
    return Estimate(share, (max(0.0, float((middle - half) / (1 + spread))), min(1.0, float((middle + half) / (1 + spread)))))
