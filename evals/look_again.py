"""What does looking again find? Things that captions left out, and what is made up instead.

``GazeGuard.find_missed_objects`` is asked once for every caption, for ``regions`` places. What it returns is counted as if it were
written behind the caption: ``recall_change`` and ``chair_i_change``, in segment_mass; ``named`` things per caption, of which
``new_share`` are in the picture and were left out, ``false_share`` are not in the picture, and the others were known under
another colour. ``random_*``: other heads of the same layers are turned.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from evals.common import Figure, Out, Quick, over_images, rate, write
from evals.mitigation import WAYS, counts, lab_guard, random_detector, share
from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.lab.training.tiny_fit import write_captions
from gazeguard.report import Report

SEED = 420  # of the pictures
PICTURES, QUICK = 120, 10


def looked(guard: GazeGuard, samples: list[lab.Sample], reports: list[Report]) -> list[str]:
    """What the guard finds when it looks again behind each caption."""
    more = []
    for sample, report in zip(
        samples, track(reports, "looking again", console=Console(stderr=True), transient=True), strict=True
    ):
        found = guard.find_missed_objects(sample.image, report) if report.findings else []
        more.append(" ".join(own.caption for own in found))
    return more


def measured(samples: list[lab.Sample], captions: list[str], more: list[str]) -> dict[str, Figure]:
    """The figures of one way of writing."""
    before, added = counts(samples, captions), counts(samples, more)
    after = counts(samples, [f"{one} {two}" for one, two in zip(captions, more, strict=True)])

    def change(name: str, drawn: NDArray[np.int64]) -> float:
        return share(after, name, drawn) - share(before, name, drawn)

    return {
        "recall_change": over_images(len(samples), functools.partial(change, "recall")),
        "chair_i_change": over_images(len(samples), functools.partial(change, "chair_i")),
        "named": rate(added["mentions"], added["captions"]),
        "new_share": rate(after["right"] - before["right"], added["mentions"]),
        "false_share": rate(added["false"], added["mentions"]),
    }


def main(out: Out, quick: Quick = False) -> None:
    """Measure looking again, behind greedy and sampled captions."""
    samples = lab.samples("test", QUICK if quick else PICTURES, SEED)
    figures: dict[str, Figure] = {}
    others = {"": lab_guard()} | ({} if quick else {"random_": random_detector()})
    for way, do_sample in WAYS.items():
        torch.manual_seed(SEED)
        reports = write_captions(lab_guard(), samples, do_sample)
        for name, other in others.items():
            made = measured(samples, [report.caption for report in reports], looked(other, samples, reports))
            figures |= {f"{name}{key}_{way}": own for key, own in made.items()}
    write(out, figures, quick, [sample.id for sample in samples], seed=SEED)


if __name__ == "__main__":
    typer.run(main)
