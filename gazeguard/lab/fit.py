"""What makes the lab's VLM watchable? Finds its gaze heads and fits its detector, and puts both beside the weights.

``python -m gazeguard.lab.fit`` after ``python -m gazeguard.lab.train``. The detector learns from captions of training
pictures, sampled and greedy; its threshold is set on validation pictures. The test splits are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from gazeguard import features, lab
from gazeguard.detector import Detector
from gazeguard.guard import HEADS_FILE, GazeGuard
from gazeguard.heads import find_heads
from gazeguard.inputs import encode
from gazeguard.lab.truth import Mention, mentions
from gazeguard.phrases import things
from gazeguard.report import Report

TEXT_ONLY = "text-only"  # folder of the detector that knows the words but not the gaze


def write_captions(guard: GazeGuard, samples: Sequence[lab.Sample], do_sample: bool, batch_size: int = 25) -> list[Report]:
    """One guarded caption per sample, greedy or sampled at temperature 1."""
    reports: list[Report] = []
    groups = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    for group in track(groups, "writing captions", console=Console(stderr=True), transient=True):
        batch = encode(guard.model, guard.processor, [s.image for s in group], [s.prompt for s in group])
        guard.generate(**batch.inputs, max_new_tokens=200, do_sample=do_sample)
        reports += guard.reports
    return reports


@dataclass(frozen=True)
class Table:
    """Object phrases of many captions: features (phrases, F), whose caption each is from, and what is true of it."""

    x: NDArray[np.float64]
    image: NDArray[np.int64]
    mentions: tuple[Mention, ...]

    @property
    def invented(self) -> NDArray[np.bool_]:
        """(phrases,): nothing of that name is in the picture."""
        return np.array([not mention.present for mention in self.mentions])

    @property
    def clear(self) -> NDArray[np.bool_]:
        """(phrases,): in the place that is said, or nowhere. What is merely misplaced is neither true nor invented."""
        return np.array([mention.placed or not mention.present for mention in self.mentions])


def tabulate(samples: Sequence[lab.Sample], reports: Sequence[Report]) -> Table:
    """The features and the truth of every thing that the captions name."""
    rows, image, found = [], [], []
    for number, (sample, report) in enumerate(zip(samples, reports, strict=True)):
        named = mentions(sample.picture, report.caption)
        if report.trace is None or not named:
            continue
        phrases = things(report.caption)
        kept = [phrases.index(mention.phrase) for mention in named]
        rows.append(features.features(report.trace, phrases)[kept])
        image += [number] * len(named)
        found += named
    return Table(np.concatenate(rows), np.array(image), tuple(found))


def captions_of(guard: GazeGuard, split: str, n: int, seed: int) -> Table:
    """``n`` greedy and ``n`` sampled captions of different pictures of a split."""
    torch.manual_seed(seed)
    samples = lab.samples(split, 2 * n, seed)
    reports = write_captions(guard, samples[:n], do_sample=False) + write_captions(guard, samples[n:], do_sample=True)
    return tabulate(samples, reports)


def fit(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the lab's checkpoint.")] = lab.checkpoint_path(),  # noqa: B008
    captions: Annotated[int, typer.Option(help="Greedy and as many sampled captions to learn from.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the pictures; training of the VLM used others.")] = 1,
) -> None:
    """Find the gaze heads and fit the detector of a lab checkpoint."""
    model, processor = lab.load(checkpoint)
    heads = find_heads(model, processor)
    heads.save(checkpoint / HEADS_FILE)
    guard = GazeGuard(model, processor, heads=heads)
    learnt, held_out = (captions_of(guard, split, n, seed) for split, n in (("train", captions), ("validation", captions // 2)))
    for names, folder in ((features.names(heads.heads), checkpoint), (features.TEXT_FEATURES, checkpoint / TEXT_ONLY)):
        x, x_held_out = (features.pick(table.x[table.clear], heads.heads, names) for table in (learnt, held_out))
        detector = Detector.fit(x, learnt.invented[learnt.clear], heads, names)
        detector.with_threshold(x_held_out, held_out.invented[held_out.clear]).save_pretrained(folder)


if __name__ == "__main__":
    typer.run(fit)
