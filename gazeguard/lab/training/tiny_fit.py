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
from gazeguard.guard import GazeGuard
from gazeguard.heads.discovery import find_heads
from gazeguard.lab.training.detectors import fit_detectors, measured_before
from gazeguard.lab.worlds import world

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
    names = (features.names(heads.heads), features.TEXT_FEATURES)
    detectors = fit_detectors(guard, world(), captions, seed, names)
    for detector, folder in zip(detectors, (checkpoint, checkpoint / TEXT_ONLY), strict=True):
        detector.model_copy(update={"rerank": measured_before(folder, heads)}).save_pretrained(folder)


if __name__ == "__main__":
    typer.run(fit)
