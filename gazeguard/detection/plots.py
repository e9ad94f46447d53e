"""Reliability diagram of a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_reliability(bins: Mapping[str, Sequence[tuple[float, float, int]]]) -> Figure:
    """The reliability diagram, 4.5 x 4 inches.

    Args:
        bins: For each kind of claim (mean risk, share that is false, claims) of each bin; see `calibration.reliability`.

    Returns:
        A figure that is not registered with pyplot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for (kind, points), marker in zip(bins.items(), "os^", strict=False):
        risk, false, counts = zip(*points, strict=True)
        axes.plot(risk, false, f"{marker}-", label=f"{kind} ({sum(counts):,} claims)")
    if bins:
        axes.legend()
    axes.set(xlabel="predicted risk", ylabel="share that is false", title="reliability (validation, bins of equal mass)")
    return figure
