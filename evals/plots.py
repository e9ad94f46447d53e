"""Style of all plots, and the headline figure: ``python -m evals.plots`` draws it anew from the result files.

At most `MOST_LINES` lines, in colours that stay apart for colour-blind readers (Okabe and Ito 2008). What is ours is drawn
thick, baselines thin and labelled at the line's end, so that no legend lies over the data; shares are shown from 0 to 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

RESULTS = Path(__file__).parent / "results"
HEADLINE = RESULTS / "headline.png"
OURS, TEXT, OTHER, GREY = "#0072B2", "#E69F00", "#999999", "0.6"
COLOURS = (OURS, "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MOST_LINES = len(COLOURS)
LABS = {"detection": "tiny lab (4 M parameters)", "detection_scenes": "scenes lab (SmolLM2-135M)"}
# Row of the headline figure -> score.
ROWS = {
    "GazeGuard's detector": "detector",
    "its gaze heads' DLA, untrained": "dla",
    "text alone": "text_only",
    "yes/no question to the model": "self_verification",
    "all heads (HaloProbe)": "haloprobe",
    "lookback ratio": "lookback",
    "internal confidence": "confidence",
    "five samples agree": "samples",
    "attention on the image (SVAR)": "svar",
    "token log-probability": "token_nll",
}
SATURATED = 0.995
LINE_END = "line end"  # mark of the labels that `line` writes
LABEL_WIDTH, LABEL_HEIGHT = 90, 14  # pixels that a label takes


def axes_of(width: float, height: float, columns: int, **options: Any) -> tuple[Plot, list[Axes]]:
    """A plot with one row of axes in the common style."""
    plot = Plot(figsize=(width, height), layout="constrained")
    axes = list(np.atleast_1d(plot.subplots(1, columns, **options)))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return plot, axes


def line(ax: Axes, x: Sequence[float], y: Sequence[float], label: str, number: int, ours: bool, **options: Any) -> None:
    """A curve with its label at its end; ``number`` chooses the colour.

    Raises:
        ValueError: There are more lines than colours.
    """
    if number >= MOST_LINES:
        raise ValueError(f"Line {number + 1} of a plot; at most {MOST_LINES} can be told apart. Leave some out.")
    colour = COLOURS[number]
    ax.plot(x, y, color=colour, linewidth=2.6 if ours else 1.1, **options)
    end = (x[-1], y[-1])
    ax.annotate(label, end, (4, 0), textcoords="offset points", color=colour, fontsize=8, va="center", gid=LINE_END)


def shares(ax: Axes, which: str = "both", chance: float | None = None) -> None:
    """Fix axes to 0 to 1, and mark chance on the y axis."""
    if which in ("x", "both"):
        ax.set_xlim(0, 1)
    if which in ("y", "both"):
        ax.set_ylim(0, 1)
    if chance is not None:
        ax.axhline(chance, color=GREY, linestyle=":", linewidth=1)
        ax.annotate("chance", (ax.get_xlim()[0], chance), (3, 3), textcoords="offset points", color=GREY, fontsize=8)


def whole_numbers(ax: Axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _part_labels(ax: Axes) -> None:
    """Move labels at the ends of lines that lie over each other apart, upwards, by whole lines of text."""
    labels = [text for text in ax.texts if isinstance(text, Annotation) and text.get_gid() == LINE_END]
    taken: list[tuple[float, float]] = []
    for label in sorted(labels, key=lambda each: each.xy[1]):
        x, y = ax.transData.transform(label.xy)
        shift = 0.0
        while any(abs(x - other) < LABEL_WIDTH and abs(y + shift - height) < LABEL_HEIGHT for other, height in taken):
            shift += 2
        taken.append((x, y + shift))
        label.xyann = (4, shift * 72 / ax.figure.dpi)


def save(plot: Plot, path: Path) -> None:
    """Write the picture; equal plots give equal files."""
    plot.draw_without_rendering()
    for ax in plot.axes:
        _part_labels(ax)
    plot.savefig(path, dpi=110, metadata={"Software": None})


def headline(results: Mapping[str, Mapping[str, Any]]) -> Plot:
    """Bars of AUROC within bins with their intervals, one panel per lab.

    Args:
        results: Title of the panel -> figures of `evals.detection`.
    """
    plot, axes = axes_of(5.2 * len(results), 4.2, len(results), sharey=True)
    at = np.arange(len(ROWS))[::-1]
    for ax, (title, figures) in zip(axes, results.items(), strict=True):
        for y, (label, name) in zip(at, ROWS.items(), strict=True):
            figure = figures.get(f"auroc_{name}_within_bins_sampled")
            if figure is None:
                ax.annotate("not measured", (0.51, y), color=GREY, fontsize=8, va="center")
                continue
            value, (low, high) = figure["value"], figure["ci"]
            colour = OURS if label in list(ROWS)[:2] else TEXT if name == "text_only" else OTHER
            ax.barh(y, value, color=colour, height=0.8 if name == "detector" else 0.6)
            ax.plot((low, high), (y, y), color="black", linewidth=1.2)
            said = f"> {SATURATED} (saturates)" if value > SATURATED else f"{value:.2f}"
            ax.annotate(said, (0.02, y), color="white" if colour == OURS else "black", fontsize=8, va="center")
        ax.set_yticks(at, list(ROWS))
        ax.set(xlim=(0, 1), xlabel="AUROC within ten tokens (95 % interval)", title=title)
        ax.axvline(0.5, color="black", linestyle=":", linewidth=1)
        ax.annotate("chance", (0.5, at[0] + 0.55), (2, 0), textcoords="offset points", fontsize=8)
    return plot


def main() -> None:
    """Draw the headline figure."""
    files = {title: RESULTS / f"{name}.json" for name, title in LABS.items()}
    read = {title: json.loads(path.read_text(encoding="utf-8"))["figures"] for title, path in files.items() if path.is_file()}
    save(headline(read), HEADLINE)


if __name__ == "__main__":
    typer.run(main)
