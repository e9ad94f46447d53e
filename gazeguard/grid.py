"""Where is the picture in the sequence? Which prompt tokens are image cells, and which pixels each of them stands for.

An `ImageGrid` is a plain value: one box per image token, in shares of its picture. Tiles, thumbnails and separators need
no modes: a tile's cells have the tile's boxes, a thumbnail's cells cover the picture once more, a separator has none.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.image_processing_utils import select_best_resolution

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
        if self.image.ndim != 1 or self.boxes.shape != (len(self.image), 4):
            raise InputError(
                f"An ImageGrid needs one box per cell: boxes have shape {self.boxes.shape} for {self.image.size} cells. "
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


def _nowhere(count: int) -> NDArray[np.float32]:
    """(count, 4) float32 boxes of tokens that have no place."""
    return np.full((count, 4), np.nan, np.float32)


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
    own_sizes: bool = True  # the sizes are the pictures' own, not those of what the processor made of them


def patches_of(model: Any, inputs: Mapping[str, Any]) -> list[NDArray[np.float32]] | None:
    """The boxes of every picture of a batch whose sizes the processor told in patches, or None when it did not.

    Qwen-VL and its many relatives tell (frames, height, width), Nemotron-H (height, width), Gemma 4 the (x, y) of every
    patch, -1 for padding; patches are merged to a side that each family keeps under a name of its own.
    """
    grids = inputs.get("image_grid_thw", inputs.get("image_grid_hw"))
    if grids is None and (places := inputs.get("image_position_ids")) is not None:
        grids = np.asarray(places).max(axis=1)[:, ::-1] + 1
    if grids is None:
        return None
    vision = getattr(model.config, "vision_config", None)
    names = ("spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size")
    merge = next((getattr(vision, name) for name in names if getattr(vision, name, None) is not None), 1)
    merge = merge[0] if isinstance(merge, (list, tuple)) else merge
    if (ratio := getattr(model.config, "downsample_ratio", None)) is not None:
        merge = round(1 / ratio)
    merged = np.full(len(grids), 1 if model.config.model_type in GRID_OF_CELLS else merge)
    merged = np.asarray(inputs.get("image_merge_sizes", merged))
    made = []
    for (*frames, height, width), side in zip(np.asarray(grids).tolist(), merged.tolist(), strict=True):
        boxes = np.tile(_lattice(height // side, width // side), (*frames, 1) if frames else (1, 1))
        if model.config.model_type == "hunyuan_vl":  # a newline after each row, and a token before and after the picture
            rows = boxes.reshape(height // side, -1, 4)
            boxes = np.concatenate((rows, _nowhere(len(rows))[:, None]), axis=1).reshape(-1, 4)
            boxes = np.concatenate((_nowhere(1), boxes, _nowhere(1)))
        made.append(boxes)
    return made


GRID_OF_CELLS = ("gemma4_unified", "inkling2", "inkling2_mm_model")  # what they tell counts merged cells


def _thw(prompt: Prompt) -> Layout | None:
    """Pictures whose sizes the processor told in patches: see `patches_of`."""
    boxes = patches_of(prompt.model, prompt.inputs)
    if boxes is None:
        return None
    return np.concatenate(boxes), np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])


def _tagged_tiles(prompt: Prompt) -> Layout | None:
    """Idefics3, SmolVLM: ``<row_i_col_j>`` before each tile's run, the whole picture last as ``<global-img>``."""
    tokenizer = getattr(prompt.processor, "tokenizer", None)
    if tokenizer is None:
        return None
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


def _any_resolution(prompt: Prompt) -> Layout | None:
    """LLaVA-NeXT and -OneVision: the whole picture first, then a finer map without its padding, a newline after each row."""
    config, given = prompt.model.config, prompt.inputs.get("image_sizes")
    if given is None or getattr(config, "image_grid_pinpoints", None) is None:
        return None
    patch, side = config.vision_config.patch_size, config.vision_config.image_size // config.vision_config.patch_size
    count = sum(length for _, length in prompt.runs)
    pictures = np.asarray(given).reshape(-1, 2).tolist()
    boxes = []
    for height, width in pictures:
        if count == len(pictures) * (side**2 + 1):  # OneVision with several pictures: none has a map
            boxes.append(np.concatenate((_lattice(side, side), _nowhere(1))))
            continue
        canvas = select_best_resolution((height, width), config.image_grid_pinpoints)
        lines, columns = (edge // config.vision_config.image_size * side for edge in canvas)
        # As the processor pads and unpad_image cuts: the shorter way is centred, and half of what is too much goes each side.
        if width / height > columns / lines:
            real = min(math.ceil(height * canvas[1] / width), canvas[0]) / patch  # cells that the picture fills
            cut = (lines - int(round(height * columns / width, 7))) // 2
            view = (0.0, (cut - (lines - real) / 2) / real, 1.0, (lines - cut - (lines - real) / 2) / real)
            lines -= 2 * cut
        else:
            real = min(math.ceil(width * canvas[0] / height), canvas[1]) / patch
            cut = (columns - int(round(width * lines / height, 7))) // 2
            view = ((cut - (columns - real) / 2) / real, 0.0, (columns - cut - (columns - real) / 2) / real, 1.0)
            columns -= 2 * cut
        if most := str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_"):
            ratio = math.sqrt(lines * columns / (int(most) * side**2))
            if ratio > 1.1:
                lines, columns = int(lines // ratio), int(columns // ratio)
        fine = np.clip(_lattice(lines, columns, view), 0, 1).reshape(lines, columns, 4)
        newlines = _nowhere(lines).reshape(lines, 1, 4)
        boxes += [np.concatenate((_lattice(side, side), np.concatenate((fine, newlines), axis=1).reshape(-1, 4)))]
    return np.concatenate(boxes), np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])


def _pixel_sizes(prompt: Prompt) -> Layout | None:
    """Pixtral towers (Mistral3, LightOnOCR): ``image_sizes`` in pixels, cut into patches and merged; other ids end rows."""
    config, given = prompt.model.config, prompt.inputs.get("image_sizes")
    if given is None or not hasattr(config, "vision_config"):
        return None
    edge = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    boxes = [_lattice(height // edge, width // edge) for height, width in np.asarray(given).reshape(-1, 2).tolist()]
    return np.concatenate(boxes), np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])


def _tiled_canvas(prompt: Prompt) -> Layout | None:
    """InternVL, Aya and Cohere2 Vision, GOT-OCR2: square tiles of a canvas that suits the picture's shape, the whole one last.

    Which canvas, the image processor's own function says; it needs the picture's original size.
    """
    images = getattr(prompt.processor, "image_processor", None)
    canvas = getattr(sys.modules.get(type(images).__module__), "get_optimal_tiled_canvas", None)
    if canvas is None or not hasattr(images, "crop_to_patches") or (images.crop_to_patches and not prompt.own_sizes):
        return None
    if prompt.model.config.model_type in SEPARATED:  # Ovis2 has such a function, but asks another one, and has another order
        return None
    tile = images.size["height"], images.size["width"]
    shapes = [  # (columns, rows) of each picture
        canvas((height, width), tile, images.min_patches, images.max_patches) if images.crop_to_patches else (1, 1)
        for width, height in prompt.sizes
    ]
    tiles = sum(columns * rows + (columns * rows > 1) for columns, rows in shapes)
    side = round((sum(length for _, length in prompt.runs) / tiles) ** 0.5)
    boxes = []
    for columns, rows in shapes:
        views = [
            (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
            for row in range(rows)
            for column in range(columns)
        ]
        if len(views) > 1:
            views.append((0.0, 0.0, 1.0, 1.0))
        boxes.append(np.concatenate([_lattice(side, side, view) for view in views]))
    return np.concatenate(boxes), np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])


def _codes(prompt: Prompt) -> Layout | None:
    """Emu3: ``image_sizes`` in pixels of what is turned into codes, and one more token that ends each row."""
    config, given = prompt.model.config, prompt.inputs.get("image_sizes")
    if given is None or config.model_type != "emu3":
        return None
    edge, boxes = 2 ** (len(config.vq_config.channel_multiplier) - 1), []
    for height, width in np.asarray(given).reshape(-1, 2).tolist():
        rows = _lattice(height // edge, width // edge).reshape(height // edge, -1, 4)
        boxes.append(np.concatenate((rows, _nowhere(len(rows))[:, None]), axis=1).reshape(-1, 4))
    return np.concatenate(boxes), np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])


def canvases_of(model: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(rows, columns) of the tiles of each of a prompt's pictures in Mllama; an id of 0 is no picture."""
    ratios = model.config.vision_config.supported_aspect_ratios
    return [tuple(ratios[number - 1]) for number in np.asarray(inputs["aspect_ratio_ids"]).tolist() if number]


def _tiles_from_the_corner(
    rows: int, columns: int, size: tuple[int, int], edge: int, side: int, fill: bool = False
) -> list[NDArray[np.float32]]:
    """The boxes of each of ``rows`` x ``columns`` tiles of ``edge`` pixels; what lies beside the picture has no place.

    The picture keeps its shape and fills the canvas from the upper left corner: all of it (``fill``), or as the processors of
    Mllama and Llama 4 do it: neither side smaller than a tile if the other lets it, and none larger than the canvas.
    """
    canvas, made = (columns * edge, rows * edge), []
    scale = min((most if fill else min(max(own, edge), most)) / own for own, most in zip(size, canvas, strict=True))
    x1, y1 = (most / min(most, max(1, math.floor(own * scale))) for own, most in zip(size, canvas, strict=True))
    for row, column in np.ndindex(rows, columns):
        view = (column / columns * x1, row / rows * y1, (column + 1) / columns * x1, (row + 1) / rows * y1)
        cells = np.clip(_lattice(side, side, view), 0, 1)
        cells[(cells[:, 0] >= cells[:, 2]) | (cells[:, 1] >= cells[:, 3])] = np.nan
        made.append(cells)
    return made


def _padded_canvas(prompt: Prompt) -> Layout | None:
    """Mllama: tiles row by row, each a class cell and a square; the picture fills its canvas from the upper left corner."""
    if "aspect_ratio_ids" not in prompt.inputs:
        return None
    canvases, vision = canvases_of(prompt.model, prompt.inputs), prompt.model.config.vision_config
    if len(canvases) != len(prompt.sizes):
        return None
    side, boxes = vision.image_size // vision.patch_size, []
    for (rows, columns), size in zip(canvases, prompt.sizes, strict=True):
        for tile in _tiles_from_the_corner(rows, columns, size, vision.image_size, side):
            boxes.append(np.concatenate((_nowhere(1), tile)))
    each = [rows * columns * (side**2 + 1) for rows, columns in canvases]
    return np.concatenate(boxes), np.repeat(np.arange(len(canvases)), each)


# For models that put tokens between tiles: the one before or after the run of the whole picture, whether that run comes
# first, and the token between two tiles of a row.
SEPARATED = {
    "llama4": ("<|image|>", False, "<|tile_x_separator|>"),
    "ovis2": ("<IMG_GRID>", True, "<IMG_COL>"),
}


def _separated_tiles(prompt: Prompt) -> Layout | None:
    """Ovis2 and Llama 4: tiles row by row with tokens between them, and the whole picture before or after its tiles."""
    kind, tokenizer = prompt.model.config.model_type, getattr(prompt.processor, "tokenizer", None)
    if kind not in SEPARATED or tokenizer is None or (kind == "llama4" and not prompt.own_sizes):
        return None
    mark, first, between = SEPARATED[kind]
    whole, beside = tokenizer.convert_tokens_to_ids([mark, between])
    if tokenizer.unk_token_id in (whole, beside) or None in (whole, beside):
        return None
    ids = np.concatenate(([-1], prompt.ids, [-1]))
    around = [(ids[start], ids[start + length + 1]) for start, length in prompt.runs]
    is_whole = [pair[first] == whole for pair in around]
    joined = [pair[1] == beside for pair in around]
    starts = [i for i in range(len(around)) if (is_whole[i] if first else i == 0 or is_whole[i - 1])]
    if len(starts) != len(prompt.sizes) or sum(is_whole) != len(starts):
        return None
    boxes, images = [], []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(around)], strict=True)):
        tiles, side = end - start - 1, round(prompt.runs[start][1] ** 0.5)
        rows = tiles - sum(joined[start:end])
        canvas = (rows, tiles // rows) if tiles else (1, 1)
        square = _lattice(side, side)
        if kind == "llama4":  # padded on the right and below, and so is a picture of one tile
            edge, fill = prompt.model.config.vision_config.image_size, prompt.processor.image_processor.resize_to_max_canvas
            own = _tiles_from_the_corner(*canvas, prompt.sizes[number], edge, side, fill) + ([square] if tiles else [])
        else:  # stretched
            own = [square, *(_tiles_from_the_corner(*canvas, canvas[::-1], 1, side, fill=True) if tiles else [])]
        boxes += own
        images.append(np.full(sum(map(len, own)), number))
    return np.concatenate(boxes), np.concatenate(images)


def _rows_of_patches(prompt: Prompt) -> Layout | None:
    """Fuyu: a run of patches per row of the picture, which is shrunk if too large and padded on the right and below."""
    images = getattr(prompt.processor, "image_processor", None)
    if prompt.model.config.model_type != "fuyu" or images is None or not prompt.own_sizes:
        return None
    boxes, lengths = [], []
    for own in prompt.sizes:
        scale = min(1.0, *(most / edge for edge, most in zip(own, (images.size["width"], images.size["height"]), strict=True)))
        patch = images.patch_size["width"], images.patch_size["height"]
        kept = [int(edge * scale) for edge in own]
        columns, rows = (math.ceil(edge / side) for edge, side in zip(kept, patch, strict=True))
        view = (0.0, 0.0, columns * patch[0] / kept[0], rows * patch[1] / kept[1])
        boxes.append(np.clip(_lattice(rows, columns, view), 0, 1))
        lengths += [columns] * rows
    if lengths != [length for _, length in prompt.runs]:
        return None
    return np.concatenate(boxes), np.concatenate([np.full(len(b), i) for i, b in enumerate(boxes)])


def _one_and_square(prompt: Prompt) -> Layout | None:
    """A cell without a place, then a square: the mean of all cells in Florence-2, the class cell in Idefics."""
    pictures, count = max(1, len(prompt.sizes)), sum(length for _, length in prompt.runs)
    if prompt.model.config.model_type not in ("florence2", "idefics"):
        return None
    side = round((count // pictures - 1) ** 0.5)
    boxes = np.concatenate((_nowhere(1), _lattice(side, side)))
    return np.tile(boxes, (pictures, 1)), np.repeat(np.arange(pictures), len(boxes))


# Models whose image tokens are the answers of a resampler: each has seen all of the picture, and none has a place.
LATENTS = ("aria", "blip-2", "idefics", "idefics2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5")


def _latents(prompt: Prompt) -> Layout | None:
    """Resamplers: mass and readout can be read, regions cannot."""
    config = prompt.model.config
    if config.model_type not in LATENTS or not getattr(config, "use_resampler", True):
        return None
    count = sum(length for _, length in prompt.runs)
    pictures = max(1, len(prompt.sizes))
    return _nowhere(count), np.arange(count) * pictures // max(1, count)


# Models that may turn a picture into a square number of tokens that are no square: tiles in one run, pictures in their own
# shape, several views. A rule above may know them (some by their processor); where none does, they are refused.
NO_SQUARE = (
    "deepseek_ocr2",
    "fuyu",
    "gemma4",
    "gemma4_unified",
    "got_ocr2",
    "internvl",
    "lfm2_vl",
    "llama4",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "molmo2",
    "pp_chart2table",
    "qianfan_ocr",
    "step3p7",
    "unlimited_ocr",
)


# Models whose tiles are runs of their own, so that several runs need not be several pictures.
TILE_RUNS = ("aya_vision", "cohere2_vision", "ovis2")


def _one_square_per_picture(prompt: Prompt) -> Layout | None:
    """LLaVA and every other model that turns each picture into one run of n x n tokens; a centre crop is undone."""
    kind = prompt.model.config.model_type
    if kind in NO_SQUARE or (kind in TILE_RUNS and len(prompt.runs) > 1):
        return None
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


RULES: tuple[Rule, ...] = (
    _latents,
    _thw,
    _any_resolution,
    _pixel_sizes,
    _codes,
    _padded_canvas,
    _separated_tiles,
    _tiled_canvas,
    _tagged_tiles,
    _rows_of_patches,
    _one_and_square,
    _one_square_per_picture,
)


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
                f"{type(prompt.model).__name__} lays its cells out in a way that is not known, or from the pictures' original "
                "sizes. Pass picture_sizes= to generate, or grid=ImageGrid(...)."
            )
        return ImageGrid(boxes, image.astype(np.int64), prompt.sizes)
    lengths = ", ".join(str(length) for _, length in prompt.runs)
    raise UnsupportedError(
        f"No rule says where the {count} image tokens of {type(prompt.model).__name__} lie in the picture "
        f"(runs of {lengths} tokens for {len(prompt.sizes)} pictures). Pass picture_sizes= to generate if the pictures' own "
        "sizes are missing, or grid=ImageGrid(...) with one box per token."
    )
