"""Where is the picture in the sequence? Which prompt tokens are image cells, and which pixels each of them stands for.

An `ImageGrid` is a plain value: one box per image token, in shares of its picture. Tiles, thumbnails and separators need
no modes: a tile's cells have the tile's boxes, a thumbnail's cells cover the picture once more, a separator has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.errors import InputError, UnsupportedError

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """The image cells of one prompt, in the order of their tokens.

    boxes:  (cells, 4) float32, x0 y0 x1 y1 as shares of the picture in [0, 1]; NaN for a token without a place
    image:  (cells,) int64, which of the prompt's pictures the cell belongs to
    sizes:  (width, height) of each picture in pixels
    """

    boxes: NDArray[np.float32]
    image: NDArray[np.int64]
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.boxes.shape != (len(self.image), 4):
            raise InputError(
                f"An ImageGrid needs one box per cell: boxes have shape {self.boxes.shape} for {len(self.image)} cells. "
                "Pass boxes of shape (cells, 4)."
            )
        if len(self.image) and not 0 <= self.image.min() <= self.image.max() < len(self.sizes):
            raise InputError(
                f"An ImageGrid has cells of pictures {self.image.min()} to {self.image.max()}, but the sizes of "
                f"{len(self.sizes)}. Pass the (width, height) of every picture."
            )

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def regular(cls, rows: int, columns: int, size: tuple[int, int], view: Box = (0.0, 0.0, 1.0, 1.0)) -> ImageGrid:
        """``rows`` x ``columns`` equal cells, row by row, over ``view``, a box in shares of a picture of ``size`` pixels."""
        return cls(_lattice(rows, columns, view), np.zeros(rows * columns, dtype=np.int64), (size,))

    def overlap(self, box: Box, image: int = 0) -> NDArray[np.float32]:
        """(cells,) float32: the share of each cell's area that lies in ``box`` (pixels of that picture)."""
        width, height = self.sizes[image]
        x0, y0, x1, y1 = (self.boxes[:, i] * (width, height)[i % 2] for i in range(4))
        across = np.clip(np.minimum(x1, box[2]) - np.maximum(x0, box[0]), 0, None)
        down = np.clip(np.minimum(y1, box[3]) - np.maximum(y0, box[1]), 0, None)
        share = across * down / np.maximum((x1 - x0) * (y1 - y0), 1e-9)
        return np.where(self.image == image, np.nan_to_num(share), 0).astype(np.float32)

    def pixels(self, cell: int) -> Box:
        """The box of a cell in pixels of its picture."""
        width, height = self.sizes[self.image[cell]]
        x0, y0, x1, y1 = self.boxes[cell].tolist()
        return (x0 * width, y0 * height, x1 * width, y1 * height)


def _lattice(rows: int, columns: int, view: Box = (0.0, 0.0, 1.0, 1.0)) -> NDArray[np.float32]:
    """(rows * columns, 4) float32 boxes, row-major, over ``view``."""
    x = np.linspace(view[0], view[2], columns + 1)
    y = np.linspace(view[1], view[3], rows + 1)
    top, left = (index.ravel() for index in np.indices((rows, columns)))
    return np.stack((x[left], y[top], x[left + 1], y[top + 1]), axis=1).astype(np.float32)


# --------------------------------------------------------------------------------------------- one rule per layout
# A rule gets the run lengths of image tokens, the prompt's ids, the processor's output, the processor and the pictures'
# sizes, and says the box of every image token and which picture it belongs to, or None when it does not apply.

Layout = tuple[NDArray[np.float32], NDArray[np.int64]]
Rule = Callable[["Prompt"], Layout | None]


@dataclass(frozen=True)
class Prompt:
    """What a rule may look at: one row of a batch, as numpy, and the objects that made it."""

    ids: NDArray[np.int64]  # (tokens,) without padding
    runs: tuple[tuple[int, int], ...]  # (start, length) of each unbroken run of image tokens
    inputs: Mapping[str, Any]  # this row's share of the processor's output
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each picture, pixels
    model: Any
    processor: Any


def _thw(prompt: Prompt) -> Layout | None:
    """Qwen-VL and its many relatives: ``image_grid_thw`` in patches, merged ``spatial_merge_size`` to a side."""
    grids = prompt.inputs.get("image_grid_thw")
    if grids is None:
        return None
    merge = getattr(prompt.model.config.vision_config, "spatial_merge_size", 1)
    boxes = [_lattice(h // merge, w // merge) for _, h, w in np.asarray(grids).tolist()]
    return np.concatenate(boxes), np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])


def _tagged_tiles(prompt: Prompt) -> Layout | None:
    """Idefics3, SmolVLM: ``<row_i_col_j>`` before each tile's run, the whole picture last as ``<global-img>``."""
    tokenizer = prompt.processor.tokenizer
    whole = tokenizer.convert_tokens_to_ids("<global-img>")
    tags = [tokenizer.convert_ids_to_tokens(int(prompt.ids[start - 1])) if start else "" for start, _ in prompt.runs]
    if whole in (None, tokenizer.unk_token_id) or "<global-img>" not in tags:
        return None
    boxes, images, tiles = [], [], []
    for tag, (_, length) in zip(tags, prompt.runs, strict=True):
        side = round(length**0.5)
        if tag == "<global-img>":
            rows, columns = (max((t[i] for t in tiles), default=1) for i in (0, 1))
            for row, column in tiles:
                view = ((column - 1) / columns, (row - 1) / rows, column / columns, row / rows)
                boxes.append(_lattice(side, side, view))
            boxes.append(_lattice(side, side))
            images.append(np.full((len(tiles) + 1) * side * side, len(images)))
            tiles = []
        else:
            tiles.append(tuple(int(part) for part in tag.strip("<>").split("_")[1::2]))
    return np.concatenate(boxes), np.concatenate(images)


def _one_square_per_picture(prompt: Prompt) -> Layout | None:
    """LLaVA and every other model that turns each picture into one run of n x n tokens; a centre crop is undone."""
    if len(prompt.runs) != len(prompt.sizes) or any(round(n**0.5) ** 2 != n for _, n in prompt.runs):
        return None
    boxes = []
    for (_, length), size in zip(prompt.runs, prompt.sizes, strict=True):
        side = round(length**0.5)
        boxes.append(_lattice(side, side, _centre_crop(prompt.processor, size)))
    return np.concatenate(boxes), np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])


def _centre_crop(processor: Any, size: tuple[int, int]) -> Box:
    """The part of a picture (in shares) that is left when its short edge is resized and its middle cut out."""
    images = getattr(processor, "image_processor", None)
    resize, crop = getattr(images, "size", None) or {}, getattr(images, "crop_size", None) or {}
    short = resize.get("shortest_edge")
    if not getattr(images, "do_center_crop", False) or not short or "height" not in crop:
        return (0.0, 0.0, 1.0, 1.0)
    scale = short / min(size)
    lost_x, lost_y = (max(0.0, 0.5 - crop[edge] / (2 * scale * n)) for edge, n in zip(("width", "height"), size, strict=True))
    return (lost_x, lost_y, 1 - lost_x, 1 - lost_y)


RULES: tuple[Rule, ...] = (_thw, _tagged_tiles, _one_square_per_picture)


def image_cells(ids: NDArray[np.int64], image_token_id: int) -> tuple[tuple[int, int], ...]:
    """(start, length) of each unbroken run of image tokens in ``ids``, shape (tokens,)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], (ids == image_token_id).astype(np.int8), [0]))))
    return tuple((int(start), int(end - start)) for start, end in edges.reshape(-1, 2))


def find_grid(prompt: Prompt) -> ImageGrid:
    """The grid of one prompt by the first rule that applies.

    Raises `UnsupportedError` when no rule does, or when a rule and the sequence disagree on the number of cells.
    """
    count = sum(length for _, length in prompt.runs)
    for rule in RULES:
        layout = rule(prompt)
        if layout is None:
            continue
        boxes, image = layout
        if len(boxes) != count:
            raise UnsupportedError(
                f"The prompt has {count} image tokens, but {rule.__name__.lstrip('_')} expects {len(boxes)}: "
                f"{type(prompt.model).__name__} lays its cells out in a way that is not known. Pass grid=ImageGrid(...)."
            )
        return ImageGrid(boxes, image.astype(np.int64), prompt.sizes)
    lengths = ", ".join(str(length) for _, length in prompt.runs)
    raise UnsupportedError(
        f"No rule says where the {count} image tokens of {type(prompt.model).__name__} lie in the picture "
        f"(runs of {lengths} tokens for {len(prompt.sizes)} pictures). Pass grid=ImageGrid(...) with one box per token."
    )
