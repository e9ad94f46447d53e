"""Gaze heads and detector of the tiny lab model, fitted and saved beside its weights.

``python -m gazeguard.lab.training.tiny_fit`` after ``python -m gazeguard.lab.training.tiny_train``. The detector is fitted to
captions of training drawings, sampled and greedy; its thresholds are set on validation drawings. The test splits are not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gazeguard import lab
from gazeguard.detection import features
from gazeguard.detection.cross_fitting import cross_fit
from gazeguard.guard import GazeGuard
from gazeguard.heads.discovery import find_heads
from gazeguard.lab.labels import caption_and_label, self_verification_answers
from gazeguard.lab.worlds import world

SCOPE = "the drawings of the lab, which are all that its model knows"
TEXT_ONLY = "text-only"  # folder of the detector that uses `TEXT_FEATURES` alone


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
    train = caption_and_label(guard, world(), "train", captions, seed)
    held_out = caption_and_label(guard, world(), "validation", captions // 2, seed)
    answers = self_verification_answers(guard, lab.samples("validation", captions // 2 * 2, seed), held_out)
    for names, folder in ((features.names(heads.heads), checkpoint), (features.TEXT_FEATURES, checkpoint / TEXT_ONLY)):
        detector = cross_fit(train.table, heads, names, SCOPE).detector
        detector = detector.calibrated(held_out.x, held_out.false, held_out.kind, held_out.image)
        risk = detector.risk(held_out.x, held_out.kind.tolist())
        detector.fit_answers(risk, answers, held_out.false, held_out.kind).save_pretrained(folder)


if __name__ == "__main__":
    typer.run(fit)
