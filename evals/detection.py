"""Can gaze tell invented things from real ones? AUROC on test captions, beside what needs no gaze.

The positive class is *invented*: nothing of that name is in the picture. A thing that is in the picture but not in the
panel or place that is said is neither, and counted apart. The detectors are the shipped ones: fitted on captions of
training pictures, threshold from validation. ``text_only`` is the same regression on position, order of mention,
repetition, log-probability and entropy alone; ``random_heads`` is the readout of ten sets of other heads, as many and
in the same layers where there are enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from evals.common import Figure, Out, Quick, auroc, figure, within_bins, write
from gazeguard import features, lab
from gazeguard.detector import Detector
from gazeguard.guard import GazeGuard
from gazeguard.heads import GazeHeads
from gazeguard.lab.fit import TEXT_ONLY, Table, tabulate, write_captions
from gazeguard.report import Report

SEED = 200
ORDER_BINS = (0, 1, 2, 3, 4, 6, 8, 99)


def scores(table: Table, detector: Detector, text_only: Detector) -> dict[str, NDArray[np.float64]]:
    """Every score, higher for more likely invented."""
    plain = ("readout", "surprise", "entropy", "position")
    column = dict(zip(plain, features.pick(table.x, detector.heads, plain).T, strict=True))
    return {
        "detector": detector.risk(table.x),
        "readout": -column["readout"],
        "text_only": text_only.risk(features.pick(table.x, detector.heads, text_only.names)),
        "surprise": column["surprise"],
        "entropy": column["entropy"],
        "position": column["position"],
    }


def random_heads(guard: GazeGuard, samples: Sequence[lab.Sample], reports: Sequence[Report], table: Table) -> list[float]:
    """AUROC of the readout of ten random sets of other heads, from a replay of the same captions with all heads heard."""
    heads = guard.heads
    everything = GazeHeads.model_validate(heads.model_dump() | {"heads": heads.all_heads})
    listener = GazeGuard(guard.model, guard.processor, heads=everything)
    readouts = []
    for start in range(0, len(samples), 25):
        group, told = samples[start : start + 25], reports[start : start + 25]
        replayed = listener.check_all([s.image for s in group], [r.caption for r in told], [s.prompt for s in group])
        readouts += [report.trace.readout for report in replayed]
    at = [
        readouts[number][reports[number].trace.tokens(m.phrase.head.start, m.phrase.head.end).start]
        for number, m in zip(table.image, table.mentions, strict=True)
    ]
    each = np.stack(at)  # (phrases, all heads)
    rng = np.random.default_rng(SEED)
    areas = []
    for _ in range(10):
        chosen: set[tuple[int, int]] = set()
        for layer, _ in heads.heads:
            left = [head for head in heads.others() if head not in chosen]
            near = [head for head in left if head[0] == layer] or left
            chosen.add(near[rng.integers(len(near))])
        where = [heads.all_heads.index(head) for head in chosen]
        areas.append(auroc_of(table, -each[:, where].sum(1)))
    return areas


def auroc_of(table: Table, score: NDArray[np.float64]) -> float:
    """AUROC without an interval, of the phrases that are either true or invented."""
    return float(roc_auc_score(table.invented[table.clear], score[table.clear]))


def main(out: Out, quick: Quick = False) -> None:
    """Measure the detector."""
    torch.manual_seed(SEED)
    guard = GazeGuard(*lab.load())
    text_only = Detector.from_pretrained(lab.checkpoint_path() / TEXT_ONLY)
    samples = lab.samples("test", 80 if quick else 500, SEED)
    figures: dict[str, Figure] = {}
    for way, do_sample in (("sampled", True), ("greedy", False)):
        reports = write_captions(guard, samples, do_sample)
        table = tabulate(samples, reports)
        clear = table.clear
        invented, image = table.invented[clear], table.image[clear]
        bins = np.digitize([mention.order for mention in table.mentions], ORDER_BINS)[clear]
        made = scores(table, guard.detector, text_only)
        for name, score in made.items():
            figures[f"auroc_{name}_{way}"] = auroc(invented, score[clear], image)
        for name in ("detector", "readout", "text_only"):
            figures[f"auroc_{name}_within_order_{way}"] = within_bins(invented, made[name][clear], bins, image)
        risk = made["detector"][clear]
        flagged = risk >= guard.detector.threshold
        figures |= {
            f"average_precision_detector_{way}": figure(average_precision_score(invented, risk)),
            f"precision_{way}": figure(precision_score(invented, flagged)),
            f"recall_{way}": figure(recall_score(invented, flagged)),
            f"f1_{way}": figure(f1_score(invented, flagged)),
            f"base_rate_{way}": figure(invented.mean()),
            f"phrases_{way}": figure(clear.sum()),
            f"misplaced_phrases_{way}": figure((~clear).sum()),
        }
        if (~clear).any():
            wrong = ~clear | table.invented
            figures[f"auroc_detector_misplaced_or_invented_{way}"] = auroc(wrong, made["detector"], table.image)
        if do_sample:
            areas = random_heads(guard, samples, reports, table)
            figures["auroc_random_heads_mean_sampled"] = figure(np.mean(areas))
            figures["auroc_random_heads_best_sampled"] = figure(max(areas))
    write(out, figures, quick, [sample.id for sample in samples], seed=SEED, heads=[list(h) for h in guard.heads.heads])


if __name__ == "__main__":
    typer.run(main)
