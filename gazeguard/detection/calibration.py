"""Calibration of risks: reliability, expected calibration error, and thresholds, also with a conformal bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def logistic(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probability of log-odds, without overflow."""
    return 0.5 * (1 + np.tanh(logit / 2))


def log_odds(risk: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log-odds of a probability, which is clipped to 1e-15 and 1 - 1e-15 so that they are finite."""
    risk = np.clip(risk, 1e-15, 1 - 1e-15)
    return np.log(risk) - np.log1p(-risk)


def platt(logit: NDArray[np.float64], false: NDArray[np.bool_], weights: NDArray[np.float64]) -> tuple[float, float]:
    """The slope and shift that turn log-odds into calibrated ones (Platt 1999), robustly.

    Targets are Platt's own, (n + 1) / (n + 2) and 1 / (n + 2), so that perfectly ranked claims have a finite slope.
    Log-odds far outside of those with the same label (Tukey's outer fences) count as if they lay on the fence. The log of
    the slope has a standard normal prior: the slope is positive whatever the data, so that no ranking is turned round, and
    near 1 where data are few.

    Args:
        logit: (claims,) log-odds.
        false: (claims,) labels.
        weights: (claims,) how much each claim counts.
    """
    from scipy.optimize import minimize

    logit = logit.copy()
    for of_label in (false, ~false):  # apart, as the false ones are few and all far from the true ones
        low, high = np.quantile(logit[of_label], (0.25, 0.75)) if of_label.any() else (0.0, 0.0)
        if high > low:
            logit[of_label] = np.clip(logit[of_label], low - 3 * (high - low), high + 3 * (high - low))
    unit = np.abs(logit).max(initial=1.0)
    positive, negative = float(weights @ false), float(weights @ ~false)
    target = np.where(false, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slope = np.exp(parameters[0])
        z = slope * logit + parameters[1] * unit
        error = weights * (logistic(z) - target)
        value = weights @ (np.logaddexp(0, z) - target * z) + parameters[0] ** 2 / 2
        return float(value), np.array([error @ logit * slope + parameters[0], error.sum() * unit])

    log_slope, shift = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=((-12, 12), (None, None))).x
    return float(np.exp(log_slope)), float(shift * unit)


def calibrated_loss(logit: NDArray[np.float64], false: NDArray[np.bool_], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(claims,): the weighted log-loss, nats, of each claim by its log-odds on a calibrated scale; arguments as of `platt`."""
    slope, shift = platt(logit, false, weights)
    z = slope * logit + shift
    return weights * (np.logaddexp(0, z) - false * z)


def reliability(risk: NDArray[np.float64], false: NDArray[np.bool_], bins: int) -> list[tuple[float, float, int]]:
    """The reliability diagram as numbers.

    Args:
        risk: (claims,) probabilities.
        false: (claims,) whether each claim is false.
        bins: Number of bins of equal mass; with fewer claims there are fewer bins.

    Returns:
        For each bin its mean risk, the share of its claims that are false, and their number.
    """
    parts = [part for part in np.array_split(np.argsort(risk, kind="stable"), bins) if len(part)]
    return [(float(risk[part].mean()), float(false[part].mean()), len(part)) for part in parts]


def calibration_error(risk: NDArray[np.float64], false: NDArray[np.bool_]) -> float:
    """Expected calibration error over 15 bins of equal mass."""
    return sum(abs(mean_risk - share) * count for mean_risk, share, count in reliability(risk, false, 15)) / len(risk)


def thresholds(risk: NDArray[np.float64], false: NDArray[np.bool_], image: NDArray[np.int64]) -> dict[str, float]:
    """Thresholds from which claims are flagged, by rule.

    Args:
        risk: (claims,) probabilities.
        false: (claims,) whether each claim is false.
        image: (claims,) index of the image of each claim.

    Returns:
        By name of the rule; a rule that the data cannot satisfy is left out.

        f1:                     the threshold with the best F1
        precision_0.9:          the lowest from which at least 90 % of the flagged claims are false
        bound_0.05, bound_0.02: `conformal` with that alpha
    """
    from sklearn.metrics import precision_recall_curve

    precision, recall, candidates = precision_recall_curve(false, risk)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    by_rule = {"f1": float(candidates[np.argmax(f1[:-1])])}
    if (precise := precision[:-1] >= 0.9).any():
        by_rule["precision_0.9"] = float(candidates[np.argmax(precise)])
    for alpha in (0.05, 0.02):
        if (bound := conformal(risk, false, image, alpha)) is not None:
            by_rule[f"bound_{alpha}"] = bound
    return by_rule


def conformal(risk: NDArray[np.float64], false: NDArray[np.bool_], image: NDArray[np.int64], alpha: float) -> float | None:
    """The threshold that keeps, in expectation, at most ``alpha`` false claims per claim of a new caption.

    Conformal risk control (Angelopoulos et al. 2024, eq. 4) with the image as the unit, since the claims of one caption
    depend on each other. The loss of an image, false claims kept over all its claims, never falls with the threshold, so the
    largest threshold is taken for which ``n / (n + 1) * mean loss + 1 / (n + 1) <= alpha`` over the n images. The bound
    holds for captions like these alone: the same model, prompt, decoder and kind of image.

    Args:
        risk: (claims,) probabilities.
        false: (claims,) whether each claim is false.
        image: (claims,) index of the image of each claim.
        alpha: The share of false claims that may stay.

    Returns:
        The threshold, or None when there is none, which takes fewer than ``1 / alpha - 1`` images.
    """
    _, image = np.unique(image, return_inverse=True)
    claims_per_image = np.bincount(image)
    n = len(claims_per_image)
    order = np.argsort(risk, kind="stable")
    # Flagging from the k-th lowest risk on keeps the k claims below it; equal risks are kept or flagged together.
    kept = np.concatenate(([0.0], np.cumsum((false / claims_per_image[image])[order]))) / n
    edges = np.concatenate((risk[order], [1.0]))
    first = np.searchsorted(risk[order], edges, side="left")
    allowed = np.flatnonzero((n * kept[first] + 1) / (n + 1) <= alpha)
    return float(edges[allowed[-1]]) if len(allowed) else None


def least_flagged(false_share: float, alpha: float) -> float:
    """The share of claims that any filter must flag to leave at most ``alpha`` false, given their share (arXiv 2606.29054)."""
    return max(0.0, (false_share - alpha) / (1 - alpha))
