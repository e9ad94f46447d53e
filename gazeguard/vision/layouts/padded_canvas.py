"""Mllama's layout: a canvas of tiles that the image fills from the upper left corner, a class token before each tile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gazeguard.vision.geometry import Layout, corner_tiles, nowhere, one_after_another
from gazeguard.vision.layouts.prompt import Prompt


def canvases(model: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(rows, columns) of the tiles of each of a prompt's images; an ``aspect_ratio_ids`` of 0 stands for no image."""
    ratios = model.config.vision_config.supported_aspect_ratios
    return [tuple(ratios[number - 1]) for number in np.asarray(inputs["aspect_ratio_ids"]).tolist() if number]


def padded_canvas(prompt: Prompt) -> Layout | None:
    """Images whose canvas the processor reported in ``aspect_ratio_ids``."""
    if "aspect_ratio_ids" not in prompt.inputs:
        return None
    shapes, vision = canvases(prompt.model, prompt.inputs), prompt.model.config.vision_config
    if len(shapes) != len(prompt.sizes):
        return None
    side, images = vision.image_size // vision.patch_size, []
    for (rows, columns), size in zip(shapes, prompt.sizes, strict=True):
        tiles = corner_tiles(rows, columns, size, vision.image_size, side)
        images.append(np.concatenate([np.concatenate((nowhere(1), tile)) for tile in tiles]))
    return one_after_another(images)
