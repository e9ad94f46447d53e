"""Gaze heads and detector of the tiny lab model, fitted and saved beside its weights.

``python -m gazeguard.lab.training.tiny_fit`` after ``python -m gazeguard.lab.training.tiny_train``. The detector is fitted to
captions of training drawings, sampled and greedy; its thresholds are set on validation drawings. The test splits are not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gazeguard import lab
from gazeguard.artifacts import DETECTOR_FILE
from gazeguard.detection import features
from gazeguard.detection.detector import Detector
from gazeguard.detection.rerank_evidence import RerankEvidence
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.heads.discovery import find_heads
from gazeguard.lab.training.detectors import fit_detectors
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
        detector.model_copy(update={"rerank": _measured_before(folder, heads)}).save_pretrained(folder)


def _measured_before(folder: Path, heads: GazeHeads) -> RerankEvidence | None:
    """What was measured for rerank with the same heads of the same model; `gazeguard.fitting.rerank` measures it anew."""
    if not (folder / DETECTOR_FILE).is_file():
        return None
    before = Detector.from_pretrained(folder)
    return before.rerank if (before.model, before.heads) == (heads.model, heads.heads) else None


if __name__ == "__main__":
    typer.run(fit)
