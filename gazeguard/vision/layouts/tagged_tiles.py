"""Layouts of tiles with a tag before each: Idefics3, SmolVLM, Lfm2-VL."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gazeguard.vision.geometry import WHOLE, Layout, lattice, one_after_another, tile_views
from gazeguard.vision.layouts.prompt import Prompt, run_shapes

TILE = re.compile(r"<\|?(?:img_)?row_(\d+)_col_(\d+)\|?>")  # before the run of a tile
OVERVIEWS = ("<global-img>", "<|img_thumbnail|>")  # before the run of the whole image, which ends its tiles
# Families that may leave out the whole image beside tiles: the tag before the run of an image without tiles.
UNTILED_TAG = {"lfm2_vl": "<|image_start|>"}

Position = tuple[int, int] | None  # row and column of a tile, from 1; None for the whole image


def tagged_tiles(prompt: Prompt) -> Layout | None:
    """``<row_i_col_j>`` before each tile's run, and the whole image last, behind a tag of its own."""
    tokenizer = prompt.tokenizer
    if tokenizer is None or (shapes := run_shapes(prompt)) is None:
        return None
    tags = [tokenizer.convert_ids_to_tokens(int(prompt.ids[start - 1])) if start else "" for start, _ in prompt.runs]
    matches = [TILE.fullmatch(tag) for tag in tags]
    positions: list[Position] = [(int(match[1]), int(match[2])) if match else None for match in matches]
    untiled = [tag == UNTILED_TAG.get(prompt.model_type) for tag in tags]
    whole = [alone or tag in OVERVIEWS for alone, tag in zip(untiled, tags, strict=True)]
    if not any(whole) and not (prompt.model_type in UNTILED_TAG and any(positions)):
        return None
    if any(position is None and not is_whole for position, is_whole in zip(positions, whole, strict=True)):
        return None
    starts = [i for i in range(len(tags)) if positions[i] == (1, 1) or untiled[i] or (whole[i] and (i == 0 or whole[i - 1]))]
    if starts[:1] != [0]:
        return None
    spans = zip(starts, [*starts[1:], len(tags)], strict=True)
    return one_after_another([_image(positions[start:end], shapes[start:end]) for start, end in spans])


def _image(positions: Sequence[Position], shapes: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """The boxes of one image, from the position and the (rows, columns) of image tokens of each of its runs."""
    rows, columns = (max((position[i] for position in positions if position), default=1) for i in (0, 1))
    views = dict(zip(np.ndindex(rows, columns), tile_views(rows, columns), strict=True))
    return np.concatenate(
        [
            lattice(*shape, views[position[0] - 1, position[1] - 1] if position else WHOLE)
            for position, shape in zip(positions, shapes, strict=True)
        ]
    )
