"""What runs on a bare laptop? A drawn world with exact truth, and a small VLM trained on it that ships in the package.

`load` gives the model and its processor; `samples` gives pictures with their truth and a prompt. The model is an ordinary
transformers checkpoint: ``AutoModelForImageTextToText.from_pretrained(checkpoint_path())`` loads it without this package.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from gazeguard.lab.world import Sample, samples
from gazeguard.loading import LAB_CHECKPOINT

__all__ = ["Sample", "checkpoint_path", "load", "samples"]


def checkpoint_path() -> Path:
    """The folder of the lab's checkpoint: weights, processor, gaze heads, detector and model card."""
    return LAB_CHECKPOINT


def load(path: str | Path | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The lab's VLM, in evaluation mode on the CPU, and its processor."""
    path = checkpoint_path() if path is None else path
    return AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
