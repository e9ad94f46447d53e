"""Any-resolution layout: the whole image, then a finer map of it without its padding, a newline after each row of the map.

LLaVA-NeXT and LLaVA-OneVision cut a padded canvas of tiles and take the padding away again; Granite4Vision shrinks each side
of a tile first. The arithmetic is that of transformers' ``unpad_image`` and ``pack_image_features``.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.image_processing_utils import select_best_resolution

from gazeguard.vision.geometry import Box, Layout, lattice, nowhere, one_after_another, with_newlines
from gazeguard.vision.layouts.prompt import Prompt


def any_resolution(prompt: Prompt) -> Layout | None:
    """Images of which the processor reported ``image_sizes``, cut by the configuration's ``image_grid_pinpoints``."""
    config, sizes = prompt.model.config, prompt.inputs.get("image_sizes")
    if sizes is None or getattr(config, "image_grid_pinpoints", None) is None:
        return None
    sizes, side = np.asarray(sizes).reshape(-1, 2).tolist(), _tile_side(config)
    if prompt.token_count == len(sizes) * (side**2 + 1):  # OneVision with several images: none has a map
        return one_after_another([np.concatenate((lattice(side, side), nowhere(1)))] * len(sizes))
    return one_after_another(
        [np.concatenate((lattice(side, side), _fine_map(config, height, width, side))) for height, width in sizes]
    )


def _tile_side(config: Any) -> int:
    """How many tokens make one side of a tile."""
    patches = config.vision_config.image_size // config.vision_config.patch_size
    return int(patches * Fraction(getattr(config, "downsample_rate", None) or 1))


def _fine_map(config: Any, height: int, width: int, side: int) -> NDArray[np.float32]:
    """The boxes of the finer map of an image of ``height`` x ``width`` pixels, a newline after each row."""
    vision = config.vision_config
    canvas = select_best_resolution((height, width), config.image_grid_pinpoints)
    pixels = vision.image_size // vision.patch_size * vision.patch_size / side  # on each side of a token
    rows, columns = (edge // vision.image_size * side for edge in canvas)
    if width / height > columns / rows:
        filled = min(math.ceil(height * canvas[1] / width), canvas[0]) / pixels
        rows, (top, bottom) = _unpadded(rows, filled, int(round(height * columns / width, 7)))
        view: Box = (0.0, top, 1.0, bottom)
    else:
        filled = min(math.ceil(width * canvas[0] / height), canvas[1]) / pixels
        columns, (left, right) = _unpadded(columns, filled, int(round(width * rows / height, 7)))
        view = (left, 0.0, right, 1.0)
    rows, columns = _at_most(config, rows, columns, side)
    return with_newlines(np.clip(lattice(rows, columns, view), 0, 1), rows)


def _unpadded(lines: int, filled: float, kept: int) -> tuple[int, tuple[float, float]]:
    """Cut the padding off the padded way of a canvas, as ``unpad_image`` does it.

    Args:
        lines: Rows or columns of the canvas.
        filled: How many of them the centred image really fills.
        kept: How many of them should be left; half of what is too much is cut on each side.

    Returns:
        The rows or columns that are left, and where the first begins and the last ends, in shares of the image.
    """
    cut = (lines - kept) // 2
    margin = (lines - filled) / 2
    return lines - 2 * cut, ((cut - margin) / filled, (lines - cut - margin) / filled)


def _at_most(config: Any, rows: int, columns: int, side: int) -> tuple[int, int]:
    """The shape of a map after OneVision's ``anyres_max_N`` shrank it to the tokens of N tiles."""
    limit = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    if not limit:
        return rows, columns
    ratio = math.sqrt(rows * columns / (int(limit) * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
