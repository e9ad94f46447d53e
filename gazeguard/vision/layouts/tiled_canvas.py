"""Layouts of square tiles of a canvas that suits the image's shape: InternVL, Aya and Cohere2 Vision, GOT-OCR 2.

The image processor's own function says which canvas; it needs the size of the original image.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.vision.geometry import (
    WHOLE,
    Box,
    Layout,
    inside,
    lattice,
    nowhere,
    one_after_another,
    tile_views,
    with_newlines,
)
from gazeguard.vision.layouts.prompt import Prompt

# (height, width) of image, (height, width) of tile, fewest and most tiles -> (columns, rows) of tiles
CanvasFunction = Callable[[tuple[int, int], tuple[int, int], int, int], tuple[int, int]]


def _canvas_function(images: Any) -> CanvasFunction | None:
    """The function of an image processor's module that chooses the canvas; None where there is none."""
    return getattr(sys.modules.get(type(images).__module__), "get_optimal_tiled_canvas", None)


def tiled_canvas(prompt: Prompt) -> Layout | None:
    """All tiles in one run, row by row, and the whole image last."""
    images = prompt.image_processor
    canvas = _canvas_function(images)
    if canvas is None or not hasattr(images, "crop_to_patches") or (images.crop_to_patches and not prompt.original_sizes):
        return None
    tile = images.size["height"], images.size["width"]
    shapes = [  # (columns, rows) of each image
        canvas((height, width), tile, images.min_patches, images.max_patches) if images.crop_to_patches else (1, 1)
        for width, height in prompt.sizes
    ]
    views = [[*tile_views(rows, columns), *([WHOLE] if columns * rows > 1 else [])] for columns, rows in shapes]
    side = round((prompt.token_count / sum(map(len, views))) ** 0.5)
    return one_after_another([np.concatenate([lattice(side, side, view) for view in image]) for image in views])


def map_and_page(prompt: Prompt) -> Layout | None:
    """Unlimited-OCR: a map of all tiles, then the whole image with its margins; one token ends each row, one the image."""
    images = prompt.image_processor
    canvas = _canvas_function(images)
    if canvas is None or not prompt.original_sizes:
        return None
    target, edge = max(images.size["height"], images.size["width"]), images.tile_size
    used = prompt.processor
    page_side, tile_side = (math.ceil(side // used.patch_size / used.downsample_ratio) for side in (target, edge))
    boxes = []
    for width, height in prompt.sizes:
        parts = []
        if images.crop_to_patches and max(width, height) > edge:
            columns, rows = canvas((height, width), (edge, edge), images.min_patches, images.max_patches)
            parts.append(_lines(rows * tile_side, columns * tile_side))
        keeps_shape = images.crop_to_patches or target > images.maximum_pad_value
        parts += [_lines(page_side, page_side, _margins(width, height, target) if keeps_shape else WHOLE), nowhere(1)]
        boxes.append(np.concatenate(parts))
    return one_after_another(boxes)


def _lines(rows: int, columns: int, view: Box = WHOLE) -> NDArray[np.float32]:
    return with_newlines(inside(lattice(rows, columns, view)), rows)


def _margins(width: int, height: int, target: int) -> Box:
    """What a square of ``target`` pixels covers, in shares of the image that lies in its middle and keeps its shape."""
    scaled = [round(side * target / max(width, height)) for side in (width, height)]
    starts = [(max(scaled) - side) // 2 for side in scaled]
    (x0, x1), (y0, y1) = ((-start / side, (max(scaled) - start) / side) for side, start in zip(scaled, starts, strict=True))
    return (x0, y0, x1, y1)
