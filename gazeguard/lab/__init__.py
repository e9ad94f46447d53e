"""Laboratory that runs offline on a laptop: a drawn world with exact truth, and a tiny VLM trained on it that ships.

`load` gives the model and its processor; `samples` gives drawings with their truth and a prompt. The model is an ordinary
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
    """The lab's VLM, in evaluation mode on the CPU, and its processor.

    Args:
        path: A checkpoint folder; by default the tiny lab's. "scenes" is the scenes lab's VLM, built once into the user's
            cache folder from the language model SmolLM2-135M-Instruct and the trained parts of the package.

    Raises:
        InputError: The scenes lab's language model is not at hand; the message says how to get it.
    """
    if path == "scenes":
        from gazeguard.lab.scenes.model import cached_checkpoint

        path = cached_checkpoint()
    path = checkpoint_path() if path is None else path
    return AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
