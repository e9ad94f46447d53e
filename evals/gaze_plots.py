"""Plots of gaze heads: steering by number of heads and by strength, the staircase, stability, and the map of all heads.

``python -m evals.gaze_plots`` draws those of the result files anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot

from evals import plots
from gazeguard import lab
from gazeguard.heads.artifact import GazeHeads
from gazeguard.heads.plots import draw_heads

DRAWN = ("gaze_heads", "gaze_heads_llava")  # result files that have a plot
PANELS = (  # key in the result file, label of the x axis, title
    ("steer_panel_by_k", "heads that are steered (validation)", "steering: answers about the target panel"),
    ("steer_panel_by_strength", "strength (validation)", "steering: answers about the target panel"),
    ("staircase_by_tokens_since_the_sentence_began", "tokens since the sentence began (test)", "described panel attended most"),
    ("agreement_by_strips", "strips in each half", "top heads that both halves share"),
)


def sweeps(figures: Mapping[str, Any], meta: Mapping[str, Any]) -> Plot:
    """The sweeps of `evals.gaze_heads` as shares from 0 to 1, beside random head sets and chance.

    Args:
        figures: Of the result file.
        meta: Of the result file.
    """
    plot, axes = plots.axes_of(15, 3.8, len(PANELS), sharey=True)
    for ax, (key, label, title) in zip(axes, PANELS, strict=True):
        x, y = zip(*((float(at), share) for at, share in meta[key].items()), strict=True)
        if key == "steer_panel_by_strength":
            ax.set_xscale("log")
            ax.set_xticks((0.5, 1, 2, 5, 10, 50), ("0.5", "1", "2", "5", "10", "50"))
            ax.minorticks_off()
        else:
            plots.whole_numbers(ax)
        ax.plot(x, y, "o-", color=plots.OURS, linewidth=2.6, markersize=4, clip_on=False)
        ax.set(xlabel=label, title=title)
        ax.title.set_fontsize(10)
        plots.shares(ax, "y", figures["chance"]["value"] if key != "agreement_by_strips" else None)
    for ax, default in zip(axes, (len(meta["heads"]), meta["strength"]), strict=False):
        _beside(ax, meta["steer_panel_random_sets"], default)
    plot.suptitle(meta["model"], x=0.01, ha="left", fontsize=10)
    return plot


def _beside(ax: Axes, random_sets: list[float], default: float) -> None:
    """The range of random head sets as a band, and the default as a line, each with its name at it."""
    low, high = min(random_sets), max(random_sets)
    ax.axhspan(low, high, color="0.9", zorder=0)
    at, said = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}, {"color": "0.4", "fontsize": 8}
    ax.annotate("random\nheads\n(test)", (1, (low + high) / 2), (3, 0), va="center", **at, **said)
    ax.axvline(default, color=plots.GREY, linestyle="--", linewidth=1)
    ax.annotate(f"default {default:g}", (default, 0.4), (3, 0), textcoords="offset points", **said)


def save_map(heads: GazeHeads, path: Path) -> None:
    """Write the map of all heads."""
    plots.save(draw_heads(heads), path)


def main() -> None:
    """Draw the plots of the result files anew."""
    for name in DRAWN:
        result = json.loads((plots.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        plots.save(sweeps(result["figures"], result["meta"]), plots.RESULTS / f"{name}.png")
    save_map(GazeHeads.from_pretrained(lab.checkpoint_path()), plots.RESULTS / "gaze_heads_map.png")


if __name__ == "__main__":
    typer.run(main)
