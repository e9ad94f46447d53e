"""Gaze heads and detector of the tiny lab model, fitted and saved beside its weights.

``python -m gazeguard.lab.training.tiny_fit`` after ``python -m gazeguard.lab.training.tiny_train``. The detector is fitted to
captions of training drawings, sampled and greedy; its thresholds are set on validation drawings. The test splits are not used.
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

from gazeguard import lab
from gazeguard.claims.parse import Claim, claims
from gazeguard.decoding.verification import ask
from gazeguard.detection import features
from gazeguard.detection.detector import Detector
from gazeguard.guard import GazeGuard
from gazeguard.heads.discovery import find_heads
from gazeguard.lab.truth import Mention, decided_claims
from gazeguard.lab.world import Split
from gazeguard.progress import track
from gazeguard.report import Report
from gazeguard.vision.encoding import encode

TEXT_ONLY = "text-only"  # folder of the detector that uses `TEXT_FEATURES` alone


def write_captions(guard: GazeGuard, samples: Sequence[lab.Sample], do_sample: bool, batch_size: int = 25) -> list[Report]:
    """One guarded caption per sample, greedy or sampled at temperature 1."""
    reports: list[Report] = []
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    for batch in track(batches, "writing captions"):
        encoded = encode(guard.model, guard.processor, [s.image for s in batch], [s.prompt for s in batch])
        guard.generate(**encoded.inputs, max_new_tokens=200, do_sample=do_sample)
        reports += guard.reports
    return reports


@dataclass(frozen=True)
class LabelledClaims:
    """The claims of several captions that the drawings decide.

    x:        (claims, F) `features`
    false:    (claims,) labels
    kind:     (claims,) "object", "attribute" or "location"
    image:    (claims,) index of the image of each
    claims:   the claims themselves
    mentions: the mentions of the objects that they are about
    """

    x: NDArray[np.float64]
    false: NDArray[np.bool_]
    kind: NDArray[np.str_]
    image: NDArray[np.int64]
    claims: tuple[Claim, ...]
    mentions: tuple[Mention, ...]

    def select(self, chosen: NDArray[np.bool_]) -> LabelledClaims:
        """Some of the claims: ``chosen`` (claims,)."""
        rows = np.flatnonzero(chosen)
        claims, mentions = tuple(self.claims[i] for i in rows), tuple(self.mentions[i] for i in rows)
        return LabelledClaims(self.x[rows], self.false[rows], self.kind[rows], self.image[rows], claims, mentions)


def label_claims(samples: Sequence[lab.Sample], reports: Sequence[Report]) -> LabelledClaims:
    """The features and labels of the claims of captions; captions without a trace are left out."""
    rows, image, decided = [], [], []
    for index, (sample, report) in enumerate(zip(samples, reports, strict=True)):
        of_caption = decided_claims(sample.drawing, report.caption)
        if report.trace is None or not of_caption:
            continue
        every = claims(report.caption)
        rows.append(features.features(report.trace, every)[[every.index(claim) for claim, _, _ in of_caption]])
        image += [index] * len(of_caption)
        decided += of_caption
    chosen, mentions, false = zip(*decided, strict=True)
    kinds = np.array([claim.kind for claim in chosen])
    return LabelledClaims(np.concatenate(rows), np.array(false), kinds, np.array(image), chosen, mentions)


def caption_and_label(guard: GazeGuard, split: Split, n: int, seed: int) -> LabelledClaims:
    """The labelled claims of ``n`` greedy and ``n`` sampled captions of different drawings of a split."""
    torch.manual_seed(seed)
    samples = lab.samples(split, 2 * n, seed)
    reports = write_captions(guard, samples[:n], do_sample=False) + write_captions(guard, samples[n:], do_sample=True)
    return label_claims(samples, reports)


def self_verification_answers(
    guard: GazeGuard, samples: Sequence[lab.Sample], labelled: LabelledClaims, batch_size: int = 25
) -> NDArray[np.float64]:
    """(claims,) log-odds of yes to the question whether the object of each claim is there; NaN for locations.

    samples: those that the captions of the labelled claims describe
    """
    answers = np.full(len(labelled.claims), np.nan)
    batches = [range(i, min(i + batch_size, len(samples))) for i in range(0, len(samples), batch_size)]
    for batch in track(batches, "self-verification"):
        in_batch = (labelled.image >= batch.start) & (labelled.image < batch.stop)
        chosen = np.flatnonzero((labelled.kind != "location") & in_batch)
        images, prompts = zip(*((samples[i].image, samples[i].prompt) for i in batch), strict=True)
        rows, phrases = (labelled.image[chosen] - batch.start).tolist(), [labelled.claims[i].phrase for i in chosen]
        answers[chosen] = ask(guard.model, guard.processor, images, prompts, rows, phrases).cpu().numpy()
    return answers


def fit(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the lab's checkpoint.")] = lab.checkpoint_path(),  # noqa: B008
    captions: Annotated[int, typer.Option(help="Greedy and as many sampled captions to fit to.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the drawings; training of the model used others.")] = 1,
) -> None:
    """Find the gaze heads and fit the detector of a lab checkpoint."""
    model, processor = lab.load(checkpoint)
    heads = find_heads(model, processor)
    heads.save_pretrained(checkpoint)
    guard = GazeGuard(model, processor, heads=heads)
    train = caption_and_label(guard, "train", captions, seed)
    held_out = caption_and_label(guard, "validation", captions // 2, seed)
    answers = self_verification_answers(guard, lab.samples("validation", captions // 2 * 2, seed), held_out)
    for names, folder in ((features.names(heads.heads), checkpoint), (features.TEXT_FEATURES, checkpoint / TEXT_ONLY)):
        detector = Detector.fit(train.x, train.false, train.kind, heads, names)
        detector = detector.calibrated(held_out.x, held_out.false, held_out.kind, held_out.image)
        risk = detector.risk(held_out.x, held_out.kind.tolist())
        detector.fit_answers(risk, answers, held_out.false, held_out.kind).save_pretrained(folder)


if __name__ == "__main__":
    typer.run(fit)
