"""Scores of attention heads, from the attention mass that each has on the panels of comic strips.

Every probe gives for each strip and head a matrix of (described panel x attended panel) attention mass, and the mass on sinks.

* *Mass* is the mean of the matrix's diagonal; *selectivity* the same after each row is divided by its sum, so that a head that
  attends to images whatever is described scores 1/panels (Das 2026, arXiv 2609.14174).
* *Contrast* is the diagonal minus the mean of the rest; heads are ranked by it. It keeps the scale of mass and takes away what
  does not move with the narration.
* *Hit rate* is how often the most attended panel is the described one.
* *Shuffled mass*, the chance level of mass, is the mass after a shuffle of which panel was described.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.heads.artifact import Score

MAX_SHARE = 0.25  # at most this share of all heads are gaze heads


def contrast(matrices: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Diagonal minus the mean of the rest: (..., panels, panels) -> (...)."""
    panels = matrices.shape[-1]
    diagonal = np.trace(matrices, axis1=-2, axis2=-1) / panels
    rest = (matrices.sum((-2, -1)) - diagonal * panels) / (panels * (panels - 1))
    return diagonal - rest


def hits(matrices: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Whether the most attended panel is the described one: (..., described, attended) -> (..., described)."""
    return matrices.argmax(-1) == np.arange(matrices.shape[-1])


def score(matrices: NDArray[np.float32], rng: np.random.Generator, chosen: Sequence[int] = ()) -> Score:
    """The scores of all heads.

    Args:
        matrices: (strips, H, described, attended + 1) attention mass, that on sinks last.
        rng: Shuffles the described panels.
        chosen: Which of the H heads the matrix in the result is the mean of.
    """
    matrices, sinks = matrices[..., :-1], matrices[..., -1]
    mean = matrices.mean(0, dtype=np.float64)
    diagonal = np.arange(mean.shape[-1])
    shares = mean / np.maximum(mean.sum(-1, keepdims=True), 1e-12)
    shuffled = np.stack([matrix[:, rng.permutation(len(diagonal))] for matrix in matrices]).mean(0)
    return Score(
        mass=rounded(mean[:, diagonal, diagonal].mean(-1)),
        selectivity=rounded(shares[:, diagonal, diagonal].mean(-1)),
        contrast=rounded(contrast(mean)),
        hit_rate=rounded(hits(matrices).mean((0, 2))),
        shuffled_mass=rounded(shuffled[:, diagonal, diagonal].mean(-1)),
        sink_mass=rounded(sinks.mean((0, 2))),
        matrix=tuple(rounded(row) for row in mean[list(chosen)].mean(0)) if len(chosen) else (),
    )


def rounded(values: NDArray[np.floating[Any]]) -> tuple[float, ...]:
    """The values with six decimals, as a file holds them."""
    return tuple(round(float(value), 6) for value in values)


def outstanding(scores: NDArray[np.floating[Any]]) -> int:
    """How many heads stand out: the cut of the ranked scores that leaves the most variance between its two sides.

    That is Otsu's threshold (1979, IEEE Transactions on Systems, Man, and Cybernetics 9, 62-66). It weighs all scores, so that
    noise in two neighbouring ones does not move it, as it moves the largest drop. At most `MAX_SHARE` of the heads.
    """
    ranked = np.sort(scores)[::-1]
    above = np.arange(1, len(ranked))
    sums = np.cumsum(ranked)[:-1]
    between = (sums / above - (ranked.sum() - sums) / (len(ranked) - above)) ** 2 * above * (len(ranked) - above)
    return int(np.argmax(between[: max(1, int(len(ranked) * MAX_SHARE))])) + 1


def top_heads(matrices: NDArray[np.float32], k: int | None = None) -> frozenset[int]:
    """The ``k`` heads of highest contrast, by default those that stand out; ``matrices``: (strips, H, described, attended)."""
    ranking = contrast(matrices.mean(0))
    return frozenset(np.argsort(-ranking)[: outstanding(ranking) if k is None else k].tolist())


def split_half(matrices: NDArray[np.float32], k: int) -> float:
    """Share of the top ``k`` heads that both halves of the strips agree on."""
    halves = [top_heads(matrices[half::2], k) for half in (0, 1)]
    return len(halves[0] & halves[1]) / k


def overlap(heads: Collection[Any], others: Collection[Any]) -> float:
    """The share of heads in both sets among the heads in either set."""
    return len(set(heads) & set(others)) / max(1, len(set(heads) | set(others)))


def settled(matrices: NDArray[np.float32], patience: int = 8) -> bool:
    """Whether more strips would choose the same heads.

    That is so when both halves agree on them, and the last ``patience`` strips changed nothing.

    Args:
        matrices: (strips, H, described, attended + 1).
        patience: Strips; three times as many are the least.
    """
    if len(matrices) < 3 * patience:
        return False
    matrices = matrices[..., :-1]
    top = top_heads(matrices)
    return top == top_heads(matrices[:-patience]) and split_half(matrices, len(top)) == 1


def unusable_reason(mean: NDArray[np.float32], k: int, all_heads: int) -> str:
    """Why the ``k`` chosen heads are no gaze heads, or "" when they are.

    They must attend to the described panel most in at least half of what chance leaves (heads whose attention is fixed in
    space are at chance), and have on it at least half of their mass on all panels, or twice what a shuffle leaves.

    Args:
        mean: (strips, described, attended), the mean of the chosen heads.
        k: Their number.
        all_heads: The number of all heads.
    """
    panels = mean.shape[-1]
    rate, chance = float(hits(mean).mean()), 1 / panels
    mass = float(np.trace(mean.mean(0)) / panels)
    share = mass / max(1e-12, float(mean.sum(-1).mean()))
    least_rate, least_share = (1 + chance) / 2, min(0.5, 2 * chance)
    if rate >= least_rate and share >= least_share:
        return ""
    return (
        f"No usable gaze heads: the best {k} of {all_heads} heads attend most to the panel that is being described in "
        f"{rate:.0%} of the cases (chance {chance:.0%}, needed {least_rate:.0%}) and have {share:.0%} of their attention mass "
        f"on it (chance {chance:.0%}, needed {least_share:.0%}). Where this model attends cannot be read from these strips; "
        "try strips of another style, or of your own. The words may be the cause, too: this model may be used to another "
        'prompt, other leads ("In panel one there is") or other questions. JSON files of pages of '
        "your own set them: docs/fitting.md has their format."
    )
