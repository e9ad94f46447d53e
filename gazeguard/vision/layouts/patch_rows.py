"""Layouts of patches cut from the upper left corner, row by row: Fuyu, Inkling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gazeguard.vision.geometry import Layout, inside, lattice, one_after_another
from gazeguard.vision.layouts.prompt import Prompt


def runs_of_rows(prompt: Prompt) -> Layout | None:
    """Fuyu: a run of patches per row of the image, which is shrunk if too large and padded on the right and below."""
    images = prompt.image_processor
    if images is None or not prompt.original_sizes:
        return None
    limits = images.size["width"], images.size["height"]
    patch = images.patch_size["width"], images.patch_size["height"]
    boxes, lengths = [], []
    for size in prompt.sizes:
        scale = min(1.0, *(limit / edge for edge, limit in zip(size, limits, strict=True)))
        scaled = [int(edge * scale) for edge in size]
        columns, rows = (math.ceil(edge / side) for edge, side in zip(scaled, patch, strict=True))
        view = (0.0, 0.0, columns * patch[0] / scaled[0], rows * patch[1] / scaled[1])
        boxes.append(np.clip(lattice(rows, columns, view), 0, 1))
        lengths += [columns] * rows
    return one_after_another(boxes) if lengths == prompt.run_lengths else None


def rows_and_one_column(prompt: Prompt) -> Layout | None:
    """Inkling: patches of the image, resized if its processor says so; a column more than its width may need."""
    images = prompt.image_processor
    if images is None or not prompt.original_sizes:
        return None
    edge, boxes = images.size["height"], []
    for size in prompt.sizes:
        width, height = _rescaled(images, size)
        rows, columns = math.ceil(height / edge), width // edge + 1
        boxes.append(inside(lattice(rows, columns, (0.0, 0.0, columns * edge / width, rows * edge / height))))
    return one_after_another(boxes)


def _rescaled(images: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) after the resizing of Inkling's image processor."""
    longest = max(size)
    target = longest * (images.rescale_image_frac or 1)
    if images.rescale_image_max_upscaled_long_edge is not None:
        target = min(target, max(images.rescale_image_max_upscaled_long_edge, longest))
    if target == longest:
        return size
    width, height = (math.floor(side * target / longest + 0.5) for side in size)
    return width, height
