"""Layout of resamplers: each image token has seen the whole image, and none has a location."""

from __future__ import annotations

import numpy as np

from gazeguard.vision.geometry import Layout, nowhere
from gazeguard.vision.layouts.prompt import Prompt


def resampler_outputs(prompt: Prompt) -> Layout | None:
    """Q-Formers and perceivers: attention mass and attribution can be read, regions cannot."""
    if not getattr(prompt.model.config, "use_resampler", True):
        return None
    count, images = prompt.token_count, max(1, len(prompt.sizes))
    if len(prompt.runs) == images:  # they need not be of one length
        return nowhere(count), np.repeat(np.arange(images), prompt.run_lengths)
    return nowhere(count), np.arange(count) * images // max(1, count)
