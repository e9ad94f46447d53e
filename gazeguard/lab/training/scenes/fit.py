"""Gaze heads and detector of the scenes VLM, found and fitted on its own world and saved beside its trained parts.

``python -m gazeguard.lab.training.scenes.fit``, after the parts are exported. The heads are found with scenes of the training
split whose objects take the place of panels; the detector is fitted to captions of training images, sampled and greedy, its
probabilities and thresholds to validation images. The test splits are not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gazeguard import lab
from gazeguard.artifacts import HEADS_FILE
from gazeguard.detection import features
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.heads.discovery import find_heads
from gazeguard.lab.scenes.model import PARTS
from gazeguard.lab.scenes.strips import strips
from gazeguard.lab.training.detectors import fit_detectors, measured_before
from gazeguard.lab.worlds import world


def fit(
    folder: Annotated[Path, typer.Option("--out", help="Folder of heads.json and detector.json.")] = PARTS.parent,
    captions: Annotated[int, typer.Option(help="Greedy and as many sampled captions to fit to.")] = 350,
    seed: Annotated[int, typer.Option(help="Seed of the images; training of the model used others.")] = 1,
    keep_heads: Annotated[bool, typer.Option(help="Take the gaze heads that the folder has.")] = False,
) -> None:
    """Find the gaze heads of the scenes VLM and fit its detector."""
    model, processor = lab.load("scenes")
    heads = GazeHeads.from_pretrained(folder / HEADS_FILE) if keep_heads else find_heads(model, processor, strips(24, seed))
    heads.save_pretrained(folder)
    guard = GazeGuard(model, processor, heads=heads)
    (detector,) = fit_detectors(guard, world("scenes"), captions, seed, [features.names(heads.heads)])
    detector.model_copy(update={"rerank": measured_before(folder, heads)}).save_pretrained(folder)


if __name__ == "__main__":
    typer.run(fit)
