"""Layouts of tiles with tokens between them: Ovis2, MiniCPM-V, Step 3.7, Llama 4.

The tiles of an image are runs of image tokens, row by row; a token ends each row of tiles, and another one marks the run of
the whole image, which comes before or after the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gazeguard.vision.geometry import Layout, corner_tiles, inside, lattice, one_after_another, tile_views
from gazeguard.vision.layouts.prompt import Prompt, run_shapes

Shape = tuple[int, int]  # (rows, columns)


@dataclass(frozen=True)
class TiledImage:
    """The runs of one image.

    Attributes:
        size: (width, height) of the image in pixels.
        whole: (rows, columns) of image tokens in the run of the whole image.
        tiles: The same for the run of each tile, row by row.
        grid: (rows, columns) of tiles; (1, 1) where the image has none.
    """

    size: tuple[int, int]
    whole: Shape
    tiles: tuple[Shape, ...]
    grid: Shape


Boxes = tuple[NDArray[np.float32], list[NDArray[np.float32]]]  # of the whole image, and of each tile


def _stretched(_: Prompt, image: TiledImage) -> Boxes:
    """The tiles are cut from an image that was stretched to fill them all."""
    views = tile_views(*image.grid)
    return lattice(*image.whole), [lattice(*shape, view) for shape, view in zip(image.tiles, views, strict=False)]


def _squared(prompt: Prompt, image: TiledImage) -> Boxes:
    """As `_stretched`, but a thin image (below 32 pixels, more than 4:1) is first padded to a square, right or below."""
    whole, tiles = _stretched(prompt, image)
    if min(image.size) >= 32 or max(image.size) <= 4 * min(image.size):
        return whole, tiles
    scale = np.tile(max(image.size) / np.array(image.size, np.float32), 2)
    return inside(whole * scale), [inside(tile * scale) for tile in tiles]


def _from_the_corner(prompt: Prompt, image: TiledImage) -> Boxes:
    """The image lies in the upper left corner of its canvas of tiles; so does an image of one tile, which has no other run."""
    edge = prompt.model.config.vision_config.image_size
    tiles = corner_tiles(*image.grid, image.size, edge, image.whole[0], prompt.image_processor.resize_to_max_canvas)
    return (lattice(*image.whole), tiles) if image.tiles else (tiles[0], [])


@dataclass(frozen=True)
class Separators:
    """How a family marks the runs of an image.

    Attributes:
        whole: The token beside the run of the whole image: itself, or the tokenizer's attribute that names it.
        row_end: The token that ends a row of tiles.
        mark_follows: The token ``whole`` stands after that run, not before it.
        whole_first: That run comes before the tiles, not after them.
        needs_original_sizes: The boxes depend on the sizes of the original images.
        boxes: The boxes of one image.
    """

    whole: str
    row_end: str
    mark_follows: bool = False
    whole_first: bool = False
    needs_original_sizes: bool = False
    boxes: Callable[[Prompt, TiledImage], Boxes] = _stretched


MINICPM = Separators("image_start_token", "\n", whole_first=True)
FAMILIES = {
    "llama4": Separators("<|image|>", "<|tile_y_separator|>", needs_original_sizes=True, boxes=_from_the_corner),
    "minicpm_ocr": MINICPM,
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": MINICPM,
    "ovis2": Separators("<IMG_GRID>", "<IMG_ROW>", mark_follows=True, whole_first=True),
    "step3p7": Separators("<im_start>", "<patch_newline>", needs_original_sizes=True, boxes=_squared),
}


def separated_tiles(prompt: Prompt) -> Layout | None:
    """Images of one of `FAMILIES`, read off the tokens between the runs; None where these do not fit together."""
    family, tokenizer = FAMILIES[prompt.model_type], prompt.tokenizer
    if tokenizer is None or (family.needs_original_sizes and not prompt.original_sizes):
        return None
    mark = tokenizer.convert_tokens_to_ids(getattr(tokenizer, family.whole, family.whole))
    row_end = tokenizer.encode(family.row_end, add_special_tokens=False)
    shapes = run_shapes(prompt)
    if mark in (None, tokenizer.unk_token_id) or len(row_end) != 1 or shapes is None:
        return None
    images = []
    parts = _runs_by_image(prompt, family, mark)
    if parts is None:
        return None
    for size, (whole, tiles) in zip(prompt.sizes, parts, strict=True):
        grid = _tile_grid(prompt, tiles, row_end[0])
        if grid is None:
            return None
        image = TiledImage(size, shapes[whole], tuple(shapes[i] for i in tiles), grid)
        page, cut = family.boxes(prompt, image)
        images.append(np.concatenate([page, *cut] if family.whole_first else [*cut, page]))
    return one_after_another(images)


def _runs_by_image(prompt: Prompt, family: Separators, mark: int) -> list[tuple[int, range]] | None:
    """For each image the number of the run that is the whole image, and those of its tiles; None where marks are missing."""
    ids = np.concatenate(([-1], prompt.ids, [-1]))
    is_whole = [ids[start + length + 1 if family.mark_follows else start] == mark for start, length in prompt.runs]
    begins = is_whole if family.whole_first else [True, *is_whole][:-1]
    starts = [i for i, first in enumerate(begins) if first]
    if len(starts) != len(prompt.sizes) or sum(is_whole) != len(starts):
        return None
    spans = zip(starts, [*starts[1:], len(is_whole)], strict=True)
    if family.whole_first:
        return [(start, range(start + 1, end)) for start, end in spans]
    return [(end - 1, range(start, end - 1)) for start, end in spans]


def _tile_grid(prompt: Prompt, tiles: Sequence[int], row_end: int) -> Shape | None:
    """(rows, columns) of tiles, from the tokens between their runs; None where the rows are not of one length."""
    gaps = [prompt.ids[sum(prompt.runs[i]) : prompt.runs[i + 1][0]] for i in tiles[:-1]]
    rows = 1 + sum(row_end in gap for gap in gaps)
    columns = max(1, len(tiles) // rows)
    return None if tiles and rows * columns != len(tiles) else (rows, columns)
