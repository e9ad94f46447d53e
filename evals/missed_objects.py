"""Objects that captions left out: what `GazeGuard.find_missed_objects` finds, and what it makes up instead.

It is called once for every caption. What it returns is counted as if it were written behind the caption: ``recall_change``
and ``chair_i_change`` are differences of rates; ``named`` objects per caption, of which ``new_share`` are in the image and
were left out, ``false_share`` are not in the image, and the others were known under another colour. ``random_*``: attention
of random heads of the same layers is steered."""

from __future__ import annotations

import functools

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from evals.caption_counts import count_captions, ratio
from evals.common import DECODING, Figure, Out, Quick, over_images, rate, write
from evals.guards import lab_guard, random_detector_guard
from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.lab.labels import write_captions
from gazeguard.lab.worlds import world
from gazeguard.report import Report

SEED = 420  # of the images
IMAGES, QUICK_IMAGES = 120, 10


def missed_objects(guard: GazeGuard, samples: list[lab.Sample], reports: list[Report]) -> list[str]:
    """The text that the guard adds to each caption."""
    added = []
    progress = track(reports, "finding missed objects", console=Console(stderr=True), transient=True)
    for sample, report in zip(samples, progress, strict=True):
        more = guard.find_missed_objects(sample.image, report) if report.findings else []
        added.append(" ".join(each.caption for each in more))
    return added


def measure(samples: list[lab.Sample], captions: list[str], added: list[str]) -> dict[str, Figure]:
    """The figures of one decoding method and one set of heads."""
    count = functools.partial(count_captions, world("tiny"), samples)
    before, of_added = count(captions), count(added)
    after = count([f"{one} {two}" for one, two in zip(captions, added, strict=True)])

    def change(name: str, drawn: NDArray[np.int64]) -> float:
        return ratio(after, name, drawn) - ratio(before, name, drawn)

    return {
        "recall_change": over_images(len(samples), functools.partial(change, "recall")),
        "chair_i_change": over_images(len(samples), functools.partial(change, "chair_i")),
        "named": rate(of_added["mentions"], of_added["captions"]),
        "new_share": rate(after["right"] - before["right"], of_added["mentions"]),
        "false_share": rate(of_added["false"], of_added["mentions"]),
    }


def main(out: Out, quick: Quick = False) -> None:
    """Measure the search for missed objects behind greedy and sampled captions."""
    samples = lab.samples("test", QUICK_IMAGES if quick else IMAGES, SEED)
    figures: dict[str, Figure] = {}
    guards = {"": lab_guard()} | ({} if quick else {"random_": random_detector_guard()})
    for decoding, do_sample in DECODING.items():
        torch.manual_seed(SEED)
        reports = write_captions(lab_guard(), samples, do_sample)
        for prefix, guard in guards.items():
            measured = measure(samples, [report.caption for report in reports], missed_objects(guard, samples, reports))
            figures |= {f"{prefix}{key}_{decoding}": each for key, each in measured.items()}
    write(out, figures, quick, [sample.id for sample in samples], seed=SEED)


if __name__ == "__main__":
    typer.run(main)
