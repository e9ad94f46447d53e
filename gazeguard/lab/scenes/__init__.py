"""The scenes lab: a VLM on a pretrained language model, and a drawn world of everyday objects with exact truth.

The model is a stock `LlavaForConditionalGeneration` on SmolLM2-135M-Instruct; `build` writes it as an ordinary checkpoint
folder. The world draws scenes and comic pages in OpenMoji; `samples` gives images with their truth and a prompt.
"""

from __future__ import annotations

from gazeguard.lab.scenes.model import build
from gazeguard.lab.scenes.samples import Sample, samples
from gazeguard.lab.scenes.truth import Mention, Scores, mentions
from gazeguard.lab.scenes.world import DrawnImage, DrawnObject

__all__ = ["DrawnImage", "DrawnObject", "Mention", "Sample", "Scores", "build", "mentions", "samples"]
