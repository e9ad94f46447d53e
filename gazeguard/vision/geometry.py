"""Boxes of image tokens, in shares of their image.

A box is (x0, y0, x1, y1) with all edges in [0, 1]; a token without a location (a separator, a class token, the output of a
resampler) has NaN for all four. Every layout rule is built from the functions here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]  # x0, y0, x1, y1

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def between(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float32]:
    """((len(y) - 1) * (len(x) - 1), 4) float32 boxes, row by row, between the grid lines ``y`` and ``x``."""
    top, left = (index.ravel() for index in np.indices((len(y) - 1, len(x) - 1)))
    return np.stack((x[left], y[top], x[left + 1], y[top + 1]), axis=1).astype(np.float32)


def lattice(rows: int, columns: int, view: Box = WHOLE) -> NDArray[np.float32]:
    """(rows * columns, 4) float32 equal boxes, row by row, over ``view``."""
    return between(np.linspace(view[1], view[3], rows + 1), np.linspace(view[0], view[2], columns + 1))


def nowhere(count: int) -> NDArray[np.float32]:
    """(count, 4) float32 boxes of tokens without a location: NaN."""
    return np.full((count, 4), np.nan, np.float32)


def inside(boxes: NDArray[Any]) -> NDArray[np.float32]:
    """The part of each box (N, 4) that lies in the image; a box that lies beside it, on padding, becomes NaN."""
    clipped = np.clip(boxes, 0, 1)
    clipped[(clipped[:, 0] >= clipped[:, 2]) | (clipped[:, 1] >= clipped[:, 3])] = np.nan
    return clipped


def with_newlines(boxes: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """Boxes (N, 4) in ``rows`` rows, each followed by one more token without a location: (N + rows, 4)."""
    return np.concatenate((boxes.reshape(rows, -1, 4), nowhere(rows)[:, None]), axis=1).reshape(-1, 4)


def tile_views(rows: int, columns: int) -> list[Box]:
    """The parts of an image that ``rows`` x ``columns`` equal tiles cover, row by row."""
    return [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r, c in np.ndindex(rows, columns)]


def corner_tiles(
    rows: int, columns: int, size: tuple[int, int], edge: int, side: int, fill: bool = False
) -> list[NDArray[np.float32]]:
    """The boxes of the tokens of each tile of a canvas on which the image lies in the upper left corner.

    The image keeps its shape. It takes up as much of the canvas as it can (``fill``), or is resized as the processors of
    Mllama and Llama 4 do it: neither side smaller than a tile if the other lets it, and none larger than the canvas.

    Args:
        rows: Rows of tiles on the canvas.
        columns: Columns of tiles on the canvas.
        size: Width and height of the image in pixels.
        edge: Side of a tile in pixels.
        side: Tokens on each side of a tile.
        fill: Whether the image is enlarged until it meets an edge of the canvas.

    Returns:
        For each tile, row by row, (side * side, 4) float32 boxes; NaN where a token lies beside the image.
    """
    canvas = (columns * edge, rows * edge)
    scale = min((limit if fill else min(max(pixels, edge), limit)) / pixels for pixels, limit in zip(size, canvas, strict=True))
    width, height = (limit / min(limit, max(1, math.floor(pixels * scale))) for pixels, limit in zip(size, canvas, strict=True))
    views = [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in tile_views(rows, columns)]
    return [inside(lattice(side, side, view)) for view in views]


Layout = tuple[NDArray[np.float32], NDArray[np.int64]]  # the box of every image token, and the image that it belongs to


def one_after_another(images: Sequence[NDArray[np.float32]]) -> Layout:
    """The layout of several images whose tokens come one image after the other."""
    return np.concatenate(images), np.repeat(np.arange(len(images)), [len(boxes) for boxes in images])
