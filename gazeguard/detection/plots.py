"""TODO detection.plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def draw_reliability(bins: Mapping[str, Sequence[tuple[float, float, int]]]) -> Figure:
    """The reliability diagram, 4.5 x 4 inches. bins: for each kind of claim (mean risk, share that is false, claims)."""
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for (kind, points), marker in zip(bins.items(), "os^", strict=False):
        risk, false, _ = zip(*points, strict=True)
        axes.plot(risk, false, f"{marker}-", label=f"{kind} ({sum(count for *_, count in points):,} claims)")
    if bins:
        axes.legend()
    axes.set(xlabel="risk said", ylabel="share that is false", title="reliability (validation, bins of equal mass)")
    return figure
