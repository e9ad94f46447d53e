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

from gazeguard import lab
from gazeguard.claims.parse import Claim, claims
from gazeguard.decoding.verification import ask
from gazeguard.detection import features
from gazeguard.detection.detector import Detector
from gazeguard.guard import GazeGuard
from gazeguard.heads.discovery import find_heads
from gazeguard.lab.truth import Mention, judged
from gazeguard.report import Report
from gazeguard.vision.encoding import encode

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
    """The claims of many captions that are clearly true or false.

    x:       (claims, F) `features`
    false:   (claims,) bool
    kind:    (claims,) "object", "attribute" or "location"
    image:   (claims,) whose caption each is from
    claims:  the claims themselves; mentions: the things that they are about
    """

    x: NDArray[np.float64]
    false: NDArray[np.bool_]
    kind: NDArray[np.str_]
    image: NDArray[np.int64]
    claims: tuple[Claim, ...]
    mentions: tuple[Mention, ...]

    def of(self, chosen: NDArray[np.bool_]) -> Table:
        """Some of the claims: ``chosen`` (claims,)."""
        at = np.flatnonzero(chosen)
        picked = (tuple(each[i] for i in at) for each in (self.claims, self.mentions))
        return Table(self.x[at], self.false[at], self.kind[at], self.image[at], *picked)


def tabulate(samples: Sequence[lab.Sample], reports: Sequence[Report]) -> Table:
    """The features and the truth of what the captions claim."""
    rows, image, found = [], [], []
    for number, (sample, report) in enumerate(zip(samples, reports, strict=True)):
        known = judged(sample.picture, report.caption)
        if report.trace is None or not known:
            continue
        said = claims(report.caption)
        rows.append(features.features(report.trace, said)[[said.index(claim) for claim, _, _ in known]])
        image += [number] * len(known)
        found += known
    said, mentions, false = zip(*found, strict=True)
    return Table(np.concatenate(rows), np.array(false), np.array([c.kind for c in said]), np.array(image), said, mentions)


def captions_of(guard: GazeGuard, split: str, n: int, seed: int) -> Table:
    """``n`` greedy and ``n`` sampled captions of different pictures of a split."""
    torch.manual_seed(seed)
    samples = lab.samples(split, 2 * n, seed)
    reports = write_captions(guard, samples[:n], do_sample=False) + write_captions(guard, samples[n:], do_sample=True)
    return tabulate(samples, reports)


def answers_of(guard: GazeGuard, samples: Sequence[lab.Sample], table: Table, batch_size: int = 25) -> NDArray[np.float64]:
    """(claims,) log-odds of yes: what the model says when it is asked whether the thing of each claim is there.

    NaN for places, about which nobody asks. samples: those that the captions of the ``table`` are of
    """
    said = np.full(len(table.claims), np.nan)
    groups = [range(i, min(i + batch_size, len(samples))) for i in range(0, len(samples), batch_size)]
    for group in track(groups, "asking about them", console=Console(stderr=True), transient=True):
        of = np.flatnonzero((table.kind != "location") & (table.image >= group.start) & (table.image < group.stop))
        images, prompts = zip(*((samples[i].image, samples[i].prompt) for i in group), strict=True)
        rows, things = (table.image[of] - group.start).tolist(), [table.claims[i].phrase for i in of]
        said[of] = ask(guard.model, guard.processor, images, prompts, rows, things).cpu().numpy()
    return said


def fit(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the lab's checkpoint.")] = lab.checkpoint_path(),  # noqa: B008
    captions: Annotated[int, typer.Option(help="Greedy and as many sampled captions to learn from.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the pictures; training of the VLM used others.")] = 1,
) -> None:
    """Find the gaze heads and fit the detector of a lab checkpoint."""
    model, processor = lab.load(checkpoint)
    heads = find_heads(model, processor)
    heads.save_pretrained(checkpoint)
    guard = GazeGuard(model, processor, heads=heads)
    learnt, held_out = (captions_of(guard, split, n, seed) for split, n in (("train", captions), ("validation", captions // 2)))
    answered = answers_of(guard, lab.samples("validation", captions // 2 * 2, seed), held_out)
    for names, folder in ((features.names(heads.heads), checkpoint), (features.TEXT_FEATURES, checkpoint / TEXT_ONLY)):
        detector = Detector.fit(learnt.x, learnt.false, learnt.kind, heads, names)
        detector = detector.calibrated(held_out.x, held_out.false, held_out.kind, held_out.image)
        risk = detector.risk(held_out.x, held_out.kind)
        detector.fit_answers(risk, answered, held_out.false, held_out.kind).save_pretrained(folder)


if __name__ == "__main__":
    typer.run(fit)
