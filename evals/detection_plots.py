"""Plots of detection: reliability, and CHAIR_i against recall when the riskiest objects are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve

from evals import plots
from evals.recorded import Recorded
from gazeguard.claims.english import singular
from gazeguard.lab.worlds import World

F64 = NDArray[np.float64]
LINES = {"detector": "detector", "dla": "DLA, untrained", "text_only": "text alone", "haloprobe": "HaloProbe", "svar": "SVAR"}
SHOWN = 0.4  # share of the objects that are dropped at most


def selective(world: World, test: Recorded, score: F64) -> tuple[F64, F64]:
    """CHAIR_i and recall when the riskiest objects are dropped, for every number of dropped ones."""
    of_noun: dict[tuple[int, str], int] = {}  # a noun is recalled as long as one true mention of it is kept
    table, order = test.labelled, np.argsort(-score, kind="stable")
    there = sum(len(world.nouns(sample)) for sample in test.samples)
    nouns = [(int(image), singular(word.lower())) for image, word in zip(table.image, test.words, strict=True)]
    for noun, false in zip(nouns, table.false, strict=True):
        of_noun[noun] = of_noun.get(noun, 0) + (not false)
    left, bad, recalled = len(order), int(table.false.sum()), sum(count > 0 for count in of_noun.values())
    chair, recall = [bad / left], [recalled / there]
    for i in order[:-1]:
        left, bad = left - 1, bad - int(table.false[i])
        if not table.false[i]:
            of_noun[nouns[i]] -= 1
            recalled -= of_noun[nouns[i]] == 0
        chair.append(bad / left)
        recall.append(recalled / there)
    return np.array(chair), np.array(recall)


def draw(path: Path, world: World, test: Recorded, scores: Mapping[str, F64]) -> None:
    """Reliability, and recall against CHAIR_i when the riskiest objects are dropped."""
    plot, (left, right) = plots.axes_of(10, 4.2, 2)
    share, risk = calibration_curve(test.labelled.false, scores["detector"], n_bins=10)
    left.plot([0, 1], [0, 1], color=plots.GREY, linewidth=1)
    left.plot(risk, share, "o-", color=plots.OURS, linewidth=2.6)
    plots.shares(left)
    left.set(xlabel="predicted risk", ylabel="share that is false", title="reliability (ten bins, test)")
    for number, (name, label) in enumerate(LINES.items()):
        chair, recall = selective(world, test, scores[name])
        some = slice(0, max(2, int(len(chair) * SHOWN)))
        plots.line(right, chair[some], recall[some], label, number, name == "detector")
    plots.shares(right, "y")
    right.set_xlim(left=0)
    right.set(xlabel="CHAIR_i of what is kept", ylabel="recall", title="dropping the riskiest objects")
    plots.save(plot, path)
