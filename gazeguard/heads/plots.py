"""Figures of gaze heads: their scores, their panel matrix, and one narration's staircase."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from gazeguard.heads.artifact import GazeHeads

INK, MARK = "cividis", "#d62728"  # cividis reads the same with every kind of colour vision
MOST_NUMBERS = 12  # panels of a matrix whose values are printed
MOST_TOKENS = 40  # tokens of a staircase that are printed


def draw_heads(heads: GazeHeads) -> Figure:
    """The three figures of a heads file, 16 x 5 inches; ``figure.savefig`` writes them.

    Shades go from 0 to 1 whatever the heads are, so that the figures of two models compare.
    """
    figure = Figure(figsize=(16, 5), layout="constrained")
    scores, matrix, stairs = figure.subplots(1, 3, width_ratios=(1.1, 1, 2))
    _scores(scores, heads)
    _matrix(matrix, heads)
    _staircase(stairs, heads)
    verdict = heads.unusable.split(":")[0] or f"{len(heads.heads)} gaze heads"
    figure.suptitle(f"{heads.model_class}: {verdict}", x=0.01, ha="left")
    return figure


def _scores(axes: Axes, heads: GazeHeads) -> None:
    """Contrast by layer and head; gaze heads framed."""
    layers = max(layer for layer, _ in heads.all_heads) + 1
    contrast = np.full((layers, max(head for _, head in heads.all_heads) + 1), np.nan)
    for (layer, head), value in zip(heads.all_heads, heads.score().contrast, strict=True):
        contrast[layer, head] = value
    image = axes.imshow(contrast, cmap=INK, aspect="auto", origin="lower", vmin=0, vmax=1)
    for layer, head in heads.heads:
        axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=2))
    for axis in (axes.xaxis, axes.yaxis):  # there is no head 1.5
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="head", ylabel="layer", title=f"{heads.ranked_by} contrast (gaze heads framed)")
    axes.figure.colorbar(image, ax=axes)


def _matrix(axes: Axes, heads: GazeHeads) -> None:
    """Mean attention of the gaze heads on each panel while each panel is described."""
    matrix = np.array(heads.score().matrix)
    axes.imshow(matrix, cmap=INK, vmin=0, vmax=1)
    if len(matrix) <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(matrix):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.5 else "k")
    axes.set_xticks(range(len(matrix)), [str(panel) for panel in range(1, len(matrix) + 1)])
    axes.set_yticks(range(len(matrix)), [str(panel) for panel in range(1, len(matrix) + 1)])
    axes.set(xlabel="attended panel", ylabel="described panel", title="attention mass of the gaze heads")


def _staircase(axes: Axes, heads: GazeHeads) -> None:
    """Token by token, the attention of the gaze heads (shade) and the panel that is being described (frame)."""
    if not heads.staircase:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no narration: the strips came without one", ha="center", va="center")
        return
    axes.imshow(np.array([step.panel_mass for step in heads.staircase]).T, cmap=INK, aspect="auto", vmin=0, vmax=1)
    for token, step in enumerate(heads.staircase):
        if step.described_panel is not None:
            corner = (token - 0.5, step.described_panel - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MARK, linewidth=0.8))
    every = max(1, len(heads.staircase) // MOST_TOKENS)
    texts = [step.text for step in heads.staircase[::every]]
    axes.set_xticks(range(0, len(heads.staircase), every), texts, rotation=90, fontsize=7, parse_math=False)
    panels = len(heads.staircase[0].panel_mass)
    axes.set_yticks(range(panels), [str(panel) for panel in range(1, panels + 1)])
    axes.set(ylabel="panel", title="one narration: attention mass (shade) and described panel (frame)")
