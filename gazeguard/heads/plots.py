"""What does it look like? Pictures of gaze heads, and of how far a detector's probabilities can be believed."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gazeguard.heads.artifact import GazeHeads

INK, MARK = "cividis", "#d62728"  # cividis reads the same with every kind of colour vision


def draw_heads(heads: GazeHeads) -> Figure:
    """The three panels of a heads file, 16 x 5 inches; ``figure.savefig`` writes it."""
    figure = Figure(figsize=(16, 5), layout="constrained")
    scores, matrix, stairs = figure.subplots(1, 3, width_ratios=(1.1, 1, 2))
    _scores(scores, heads)
    _matrix(matrix, heads)
    _staircase(stairs, heads)
    figure.suptitle(
        f"{heads.model_class}: {heads.unusable.split(':')[0] or f'{len(heads.heads)} gaze heads'}", x=0.01, ha="left"
    )
    return figure


def _scores(axes: Axes, heads: GazeHeads) -> None:
    """Contrast by layer and head; gaze heads framed."""
    layers = max(layer for layer, _ in heads.all_heads) + 1
    score = np.full((layers, max(head for _, head in heads.all_heads) + 1), np.nan)
    for (layer, head), value in zip(heads.all_heads, heads.score().contrast, strict=True):
        score[layer, head] = value
    shown = axes.imshow(score, cmap=INK, aspect="auto", origin="lower")
    for layer, head in heads.heads:
        axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=2))
    axes.set(xlabel="head", ylabel="layer", title=f"{heads.ranked_by}: contrast (gaze heads framed)")
    axes.figure.colorbar(shown, ax=axes)


def _matrix(axes: Axes, heads: GazeHeads) -> None:
    """Mean attention of the gaze heads on each panel while each panel is said."""
    matrix = np.array(heads.score().matrix)
    axes.imshow(matrix, cmap=INK, vmin=0)
    if len(matrix) <= 12:
        for (row, column), value in np.ndenumerate(matrix):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < matrix.max() / 2 else "k")
    ticks = {"xticks": range(len(matrix)), "yticks": range(len(matrix))}
    labels = {"xticklabels": range(1, len(matrix) + 1), "yticklabels": range(1, len(matrix) + 1)}
    axes.set(xlabel="panel attended", ylabel="panel said", title="mass of the gaze heads", **ticks, **labels)


def _staircase(axes: Axes, heads: GazeHeads) -> None:
    """Token by token, where the gaze heads look (shade) and which panel is being described (line)."""
    if not heads.staircase:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no narration: the strips came without words", ha="center", va="center")
        return
    axes.imshow(np.array([step.looked for step in heads.staircase]).T, cmap=INK, aspect="auto", vmin=0)
    for at, step in enumerate(heads.staircase):
        if step.said is not None:
            axes.add_patch(Rectangle((at - 0.5, step.said - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=0.8))
    few = max(1, len(heads.staircase) // 40)
    words = [step.text for step in heads.staircase[::few]]
    axes.set_xticks(range(0, len(heads.staircase), few), words, rotation=90, fontsize=7, parse_math=False)
    panels = len(heads.staircase[0].looked)
    axes.set_yticks(range(panels), range(1, panels + 1))
    axes.set(ylabel="panel", title="one narration: the look (shade) and the panel that is described (frame)")
