"""Layouts whose processors report ``image_sizes``, the (height, width) in pixels of each image as it is cut into patches."""

from __future__ import annotations

import numpy as np

from gazeguard.vision.geometry import Layout, lattice, one_after_another, with_newlines
from gazeguard.vision.layouts.prompt import Prompt


def pixel_sizes(prompt: Prompt) -> Layout | None:
    """Pixtral towers (Mistral 3, LightOnOCR): patches, merged; what ends a row is no image token."""
    config, sizes = prompt.model.config, prompt.inputs.get("image_sizes")
    if sizes is None or not hasattr(config, "vision_config"):
        return None
    edge = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    return one_after_another(
        [lattice(height // edge, width // edge) for height, width in np.asarray(sizes).reshape(-1, 2).tolist()]
    )


def image_codes(prompt: Prompt) -> Layout | None:
    """Emu3: the codes of a vector-quantised image, and one more image token that ends each row."""
    sizes = prompt.inputs.get("image_sizes")
    if sizes is None:
        return None
    edge = 2 ** (len(prompt.model.config.vq_config.channel_multiplier) - 1)
    images = []
    for height, width in np.asarray(sizes).reshape(-1, 2).tolist():
        rows, columns = height // edge, width // edge
        images.append(with_newlines(lattice(rows, columns), rows))
    return one_after_another(images)
