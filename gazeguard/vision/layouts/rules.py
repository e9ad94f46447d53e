"""Where is the picture in the sequence? Which prompt tokens are image cells, and which pixels each of them stands for.

An `ImageGrid` is a plain value: one box per image token, in shares of its picture. Tiles, thumbnails and separators need
no modes: a tile's cells have the tile's boxes, a thumbnail's cells cover the picture once more, a separator has none.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.image_processing_utils import select_best_resolution

from gazeguard.errors import UnsupportedError
from gazeguard.vision.grid import WHOLE, Box, ImageGrid, _between, _lattice

Layout = tuple[NDArray[np.float32], NDArray[np.int64]]  # the box of every image token, and the picture that it belongs to


def _nowhere(count: int) -> NDArray[np.float32]:
    """(count, 4) float32 boxes of tokens that have no place."""
    return np.full((count, 4), np.nan, np.float32)


def _inside(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """The part of each box (cells, 4) that lies in the picture; what lies beside it, on padding, has no place."""
    cells = np.clip(boxes, 0, 1)
    cells[(cells[:, 0] >= cells[:, 2]) | (cells[:, 1] >= cells[:, 3])] = np.nan
    return cells


def _with_newlines(boxes: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """Boxes (cells, 4) in ``rows`` rows, and one more token without a place at the end of each."""
    return np.concatenate((boxes.reshape(rows, -1, 4), _nowhere(rows)[:, None]), axis=1).reshape(-1, 4)


def _tiles(rows: int, columns: int) -> list[Box]:
    """The views of ``rows`` x ``columns`` equal tiles, row by row."""
    return [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r, c in np.ndindex(rows, columns)]


def _side_by_side(pictures: Sequence[NDArray[np.float32]]) -> Layout:
    """The tokens of several pictures, one picture after the other."""
    return np.concatenate(pictures), np.repeat(np.arange(len(pictures)), [len(boxes) for boxes in pictures])


# A rule gets the run lengths of image tokens, the prompt's ids, the processor's output, the processor and the pictures'
# sizes, and says the box of every image token and which picture it belongs to, or None when it does not apply.

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


def patches_of(model: Any, inputs: Mapping[str, Any], what: str = "image") -> list[NDArray[np.float32]] | None:
    """The boxes of every picture of a batch whose sizes the processor told in patches, or None when it did not.

    Qwen-VL and its many relatives tell (frames, height, width), Nemotron-H (height, width), Gemma 4 the (x, y) of every
    patch, -1 for padding; patches are merged to a side that each family keeps under a name of its own. Molmo 2 tells the
    (height, width) of two views in cells, and the patches of each cell. ``what`` may be "video": frame after frame.
    """
    if what == "image" and inputs.get("image_grids") is not None:
        return _pooled_patches(inputs)
    if (grids := _told_grids(inputs, what)) is None:
        return None
    merged = np.full(len(grids), 1 if model.config.model_type in GRID_OF_CELLS else _merge_of(model))
    merged = np.asarray(inputs.get(f"{what}_merge_sizes", merged))
    made = []
    for (*frames, height, width), side in zip(grids.tolist(), merged.tolist(), strict=True):
        boxes = np.tile(_lattice(height // side, width // side), (*frames, 1) if frames else (1, 1))
        if model.config.model_type == "hunyuan_vl":  # a newline after each row, and a token before and after the picture
            boxes = np.concatenate((_nowhere(1), _with_newlines(boxes, height // side), _nowhere(1)))
        made.append(boxes)
    return made


GRID_OF_CELLS = ("gemma4_unified", "inkling2", "inkling2_mm_model")  # what they tell counts merged cells
# Those that pad a picture on the right and below: what they tell counts the padding, too.
PADDED = ("glm5_next", "inkling2", "inkling2_mm_model", "kimi_k25")


def _told_grids(inputs: Mapping[str, Any], what: str) -> NDArray[np.int64] | None:
    """([frames,] height, width) of every picture or video, in patches or cells."""
    grids = inputs.get(f"{what}_grid_thw", inputs.get(f"{what}_grid_hw"))
    if grids is None and (places := inputs.get(f"{what}_position_ids")) is not None:
        grids = np.asarray(places).max(axis=1)[:, ::-1] + 1
    return None if grids is None else np.asarray(grids)


def _merge_of(model: Any) -> int:
    """How many patches a side make one cell."""
    if (ratio := getattr(model.config, "downsample_ratio", None)) is not None:
        return round(1 / ratio)
    vision = getattr(model.config, "vision_config", None)
    names = ("spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size")
    merge = next((getattr(vision, name) for name in names if getattr(vision, name, None) is not None), 1)
    return merge[0] if isinstance(merge, (list, tuple)) else merge


def _pooled_patches(inputs: Mapping[str, Any]) -> list[NDArray[np.float32]] | None:
    """Molmo 2: the whole picture, then a finer view; a cell at the edge may hold fewer patches: -1 stands for none."""
    grids, windows = np.asarray(inputs["image_grids"]), inputs.get("image_token_pooling")
    if windows is None or len(windows) != (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).sum():
        return None
    windows, made, at = np.asarray(windows), [], 0
    side = math.isqrt(windows.shape[1])
    for grid in grids.tolist():
        views = []
        for rows, columns in (grid[:2], grid[2:]):
            real = windows[at : at + rows * columns].reshape(rows, columns, side, side) >= 0
            lines = [np.cumsum([0, *real.any(axis=axes).sum(axis=1)]) for axes in ((1, 3), (0, 2))]
            views.append(_between(*(line / line[-1] for line in lines)))
            at += rows * columns
        made.append(np.concatenate(views))
    return made


Told = tuple[str, int, NDArray[np.float32]]  # "image" or "video", its number among those of its kind, and its boxes


def video_token_id(model: Any) -> int | None:
    """The id of a video's cells, where it is another one than that of a picture's."""
    names = (("image_token_id", "image_token_index"), ("video_token_id", "video_token_index"))
    image, video = (next((v for name in own if (v := getattr(model.config, name, None)) is not None), None) for own in names)
    return None if image is None or video == image else video


def pictures_told(model: Any, inputs: Mapping[str, Any]) -> dict[str, Iterator[Told]] | None:
    """The pictures and the videos of a batch whose patches the processor told, or None: see `patches_of`."""
    told = {what: patches_of(model, inputs, what) for what in ("image", "video")}
    if told["image"] is None and told["video"] is None:
        return None
    queues = {what: iter([(what, *own) for own in enumerate(boxes or ())]) for what, boxes in told.items()}
    # GLM-4V gives the frames of videos the id of pictures.
    return queues if told["image"] is not None else dict.fromkeys(queues, queues["video"])


def next_told(model: Any, queues: Mapping[str, Iterator[Told]], cells: NDArray[np.int64]) -> list[Told]:
    """The next pictures and videos of a batch, for a prompt whose image tokens are ``cells``, in the order of their tokens."""
    films, made, at = cells == video_token_id(model), [], 0
    while at < len(cells) and (picture := next(queues["video" if films[at] else "image"], None)) is not None:
        made.append(picture)
        at += len(picture[2])
    return made


def canvas_of(model: Any, inputs: Mapping[str, Any], what: str, number: int) -> tuple[int, int]:
    """(width, height) in pixels of what the processor made of a picture or video."""
    if what == "image" and inputs.get("image_grids") is not None:
        height, width = np.asarray(inputs["image_grids"])[number, 2:].tolist()
        return width, height
    height, width = _told_grids(inputs, what)[number, -2:].tolist()
    edge = model.config.vision_config.patch_size * (_merge_of(model) if model.config.model_type in GRID_OF_CELLS else 1)
    return width * edge, height * edge


def _thw(prompt: Prompt) -> Layout | None:
    """Pictures and videos whose sizes the processor told in patches: see `patches_of`."""
    queues = pictures_told(prompt.model, prompt.inputs)
    if queues is None:
        return None
    cells = np.concatenate([prompt.ids[start : start + length] for start, length in prompt.runs])
    made = []
    for i, (what, number, boxes) in enumerate(next_told(prompt.model, queues, cells)):
        if prompt.own_sizes and prompt.model.config.model_type in PADDED and i < len(prompt.sizes):
            own, canvas = prompt.sizes[i], canvas_of(prompt.model, prompt.inputs, what, number)
            scale = min(most / edge for most, edge in zip(canvas, own, strict=True))
            # Small pictures are made larger by GLM-5 alone.
            images = getattr(prompt.processor, "image_processor", None)
            least = getattr(images, "min_image_tokens", 0) if prompt.model.config.model_type == "glm5_next" else 0
            if math.prod(own) >= least * (prompt.model.config.vision_config.patch_size * _merge_of(prompt.model)) ** 2:
                scale = min(1.0, scale)
            share = [most / max(1, math.floor(edge * scale)) for most, edge in zip(canvas, own, strict=True)]
            boxes = _inside(boxes * np.tile(share, 2).astype(np.float32))
        made.append(boxes)
    return _side_by_side(made)


def _shapes(prompt: Prompt) -> list[tuple[int, int]] | None:
    """(rows, columns) of each run of image tokens: as the processor told them in patches, or squares; None if they do not fit.

    Lfm2-VL and MiniCPM-V tell (height, width) in patches, of which two by two or four by four are a token.
    """
    told = prompt.inputs.get("spatial_shapes", prompt.inputs.get("target_sizes"))
    lengths = [length for _, length in prompt.runs]
    if told is None:
        return [(round(length**0.5),) * 2 for length in lengths]
    if len(told) != len(lengths):
        return None
    shapes = []
    for (height, width), length in zip(np.asarray(told).tolist(), lengths, strict=True):
        side = math.isqrt(height * width // length)
        if height % side or width % side or height * width != side**2 * length:
            return None
        shapes.append((height // side, width // side))
    return shapes


TILE = re.compile(r"<\|?(?:img_)?row_(\d+)_col_(\d+)\|?>")  # before the run of a tile
OVERVIEW = ("<global-img>", "<|img_thumbnail|>")  # before the run of the whole picture, which ends its tiles


def _tagged_tiles(prompt: Prompt) -> Layout | None:
    """Idefics3, SmolVLM, Lfm2-VL: ``<row_i_col_j>`` before each tile's run, the whole picture last, behind a tag of its own.

    Lfm2-VL may leave out the whole picture, and has another tag before one without tiles.
    """
    tokenizer, kind = getattr(prompt.processor, "tokenizer", None), prompt.model.config.model_type
    if tokenizer is None or (shapes := _shapes(prompt)) is None:
        return None
    tags = [tokenizer.convert_ids_to_tokens(int(prompt.ids[start - 1])) if start else "" for start, _ in prompt.runs]
    tiles = [TILE.fullmatch(tag) for tag in tags]
    alone = [kind == "lfm2_vl" and tag == "<|image_start|>" for tag in tags]
    whole = [lone or tag in OVERVIEW for lone, tag in zip(alone, tags, strict=True)]
    if not any(whole) and not (kind == "lfm2_vl" and any(tiles)):
        return None
    places = [tuple(map(int, tile.groups())) if tile else None for tile in tiles]
    starts = [i for i in range(len(tags)) if places[i] == (1, 1) or alone[i] or (whole[i] and (i == 0 or whole[i - 1]))]
    if starts[:1] != [0] or any(place is None and not own for place, own in zip(places, whole, strict=True)):
        return None
    pictures = []
    for start, end in zip(starts, [*starts[1:], len(tags)], strict=True):
        rows, columns = (max((place[i] for place in places[start:end] if place), default=1) for i in (0, 1))
        views = dict(zip(np.ndindex(rows, columns), _tiles(rows, columns), strict=True))
        boxes = []
        for place, shape in zip(places[start:end], shapes[start:end], strict=True):
            boxes.append(_lattice(*shape, views[place[0] - 1, place[1] - 1] if place else WHOLE))
        pictures.append(np.concatenate(boxes))
    return _side_by_side(pictures)


def _any_resolution(prompt: Prompt) -> Layout | None:
    """LLaVA-NeXT and -OneVision: the whole picture first, then a finer map without its padding, a newline after each row.

    Granite4Vision shrinks each side of a tile first.
    """
    config, given = prompt.model.config, prompt.inputs.get("image_sizes")
    if given is None or getattr(config, "image_grid_pinpoints", None) is None:
        return None
    side = config.vision_config.image_size // config.vision_config.patch_size
    side = int(side * Fraction(getattr(config, "downsample_rate", None) or 1))
    patch = config.vision_config.image_size // config.vision_config.patch_size * config.vision_config.patch_size / side
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
        fine = np.clip(_lattice(lines, columns, view), 0, 1)
        boxes.append(np.concatenate((_lattice(side, side), _with_newlines(fine, lines))))
    return _side_by_side(boxes)


def _pixel_sizes(prompt: Prompt) -> Layout | None:
    """Pixtral towers (Mistral3, LightOnOCR): ``image_sizes`` in pixels, cut into patches and merged; other ids end rows."""
    config, given = prompt.model.config, prompt.inputs.get("image_sizes")
    if given is None or not hasattr(config, "vision_config"):
        return None
    edge = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    boxes = [_lattice(height // edge, width // edge) for height, width in np.asarray(given).reshape(-1, 2).tolist()]
    return _side_by_side(boxes)


def _tiled_canvas(prompt: Prompt) -> Layout | None:
    """InternVL, Aya and Cohere2 Vision, GOT-OCR2: square tiles of a canvas that suits the picture's shape, the whole one last.

    Which canvas, the image processor's own function says; it needs the picture's original size.
    """
    images = getattr(prompt.processor, "image_processor", None)
    canvas = getattr(sys.modules.get(type(images).__module__), "get_optimal_tiled_canvas", None)
    if canvas is None or not hasattr(images, "crop_to_patches") or (images.crop_to_patches and not prompt.own_sizes):
        return None
    if prompt.model.config.model_type in (*SEPARATED, "unlimited_ocr"):  # they have such a function, and another order
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
        views = [*_tiles(rows, columns), *([WHOLE] if columns * rows > 1 else [])]
        boxes.append(np.concatenate([_lattice(side, side, view) for view in views]))
    return _side_by_side(boxes)


def _codes(prompt: Prompt) -> Layout | None:
    """Emu3: ``image_sizes`` in pixels of what is turned into codes, and one more token that ends each row."""
    config, given = prompt.model.config, prompt.inputs.get("image_sizes")
    if given is None or config.model_type != "emu3":
        return None
    edge, boxes = 2 ** (len(config.vq_config.channel_multiplier) - 1), []
    for height, width in np.asarray(given).reshape(-1, 2).tolist():
        boxes.append(_with_newlines(_lattice(height // edge, width // edge), height // edge))
    return _side_by_side(boxes)


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
    canvas = (columns * edge, rows * edge)
    scale = min((most if fill else min(max(own, edge), most)) / own for own, most in zip(size, canvas, strict=True))
    x1, y1 = (most / min(most, max(1, math.floor(own * scale))) for own, most in zip(size, canvas, strict=True))
    views = [(left * x1, top * y1, right * x1, bottom * y1) for left, top, right, bottom in _tiles(rows, columns)]
    return [_inside(_lattice(side, side, view)) for view in views]


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


# For models that put tokens between tiles: the token before (0) or after (1) the run of the whole picture, whether that run
# comes first, and the token that ends a row of tiles. A name in words is what the tokenizer calls the token.
MINICPM = ("image_start_token", 0, True, "\n")
SEPARATED = {
    "llama4": ("<|image|>", 0, False, "<|tile_y_separator|>"),
    "minicpm_ocr": MINICPM,
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": MINICPM,
    "ovis2": ("<IMG_GRID>", 1, True, "<IMG_ROW>"),
    "step3p7": ("<im_start>", 0, False, "<patch_newline>"),
}
ASK_SIZES = ("llama4", "step3p7")  # they pad pictures of some shapes


def _separated_tiles(prompt: Prompt) -> Layout | None:
    """Ovis2, MiniCPM-V, Step 3.7, Llama 4: tiles row by row with tokens between them, the whole picture before or after."""
    kind, tokenizer = prompt.model.config.model_type, getattr(prompt.processor, "tokenizer", None)
    if kind not in SEPARATED or tokenizer is None or (kind in ASK_SIZES and not prompt.own_sizes):
        return None
    mark, after, first, ends_row = SEPARATED[kind]
    whole = tokenizer.convert_tokens_to_ids(getattr(tokenizer, mark, mark))
    line = tokenizer.encode(ends_row, add_special_tokens=False)
    if whole in (None, tokenizer.unk_token_id) or len(line) != 1 or (shapes := _shapes(prompt)) is None:
        return None
    ids = np.concatenate(([-1], prompt.ids, [-1]))
    is_whole = [ids[start + length + 1 if after else start] == whole for start, length in prompt.runs]
    starts = [i for i in range(len(is_whole)) if (is_whole[i] if first else i == 0 or is_whole[i - 1])]
    if len(starts) != len(prompt.sizes) or sum(is_whole) != len(starts):
        return None
    pictures = []
    for own, start, end in zip(prompt.sizes, starts, [*starts[1:], len(is_whole)], strict=True):
        page, tiles = (start, range(start + 1, end)) if first else (end - 1, range(start, end - 1))
        gaps = [prompt.ids[sum(prompt.runs[i]) : prompt.runs[i + 1][0]] for i in tiles[:-1]]
        rows = 1 + sum(line[0] in gap for gap in gaps)
        columns = max(1, len(tiles) // rows)
        if tiles and rows * columns != len(tiles):
            return None
        square = _lattice(*shapes[page])
        if kind == "llama4":  # padded on the right and below, and so is a picture of one tile
            edge, fill = prompt.model.config.vision_config.image_size, prompt.processor.image_processor.resize_to_max_canvas
            corner = _tiles_from_the_corner(rows, columns, own, edge, shapes[page][0], fill)
            boxes = [*corner, square] if tiles else corner
        else:  # stretched
            boxes = [_lattice(*shapes[i], view) for i, view in zip(tiles, _tiles(rows, columns), strict=False)]
            boxes.insert(0 if first else len(boxes), square)
        if kind == "step3p7" and min(own) < 32 and max(own) > 4 * min(own):  # made square first, on the right or below
            boxes = [_inside(part * np.tile(max(own) / np.array(own, np.float32), 2)) for part in boxes]
        pictures.append(np.concatenate(boxes))
    return _side_by_side(pictures)


def _map_and_page(prompt: Prompt) -> Layout | None:
    """Unlimited-OCR: a map of all tiles, then the whole picture with its margins, a token after each row and one at the end."""
    used, images = prompt.processor, getattr(prompt.processor, "image_processor", None)
    canvas = getattr(sys.modules.get(type(images).__module__), "get_optimal_tiled_canvas", None)
    if prompt.model.config.model_type != "unlimited_ocr" or canvas is None or not prompt.own_sizes:
        return None
    target, edge = max(images.size["height"], images.size["width"]), images.tile_size
    page, tile = (math.ceil(side // used.patch_size / used.downsample_ratio) for side in (target, edge))
    pictures = []
    for width, height in prompt.sizes:
        boxes = []
        if images.crop_to_patches and max(width, height) > edge:
            columns, rows = canvas((height, width), (edge, edge), images.min_patches, images.max_patches)
            boxes.append(_with_newlines(_lattice(rows * tile, columns * tile), rows * tile))
        view = WHOLE
        if images.crop_to_patches or target > images.maximum_pad_value:  # it keeps its shape, in the middle of a square
            kept = [round(side * target / max(width, height)) for side in (width, height)]
            (x0, x1), (y0, y1) = ((-lost / own, (max(kept) - lost) / own) for own in kept for lost in [(max(kept) - own) // 2])
            view = (x0, y0, x1, y1)
        boxes += [_with_newlines(_inside(_lattice(page, page, view)), page), _nowhere(1)]
        pictures.append(np.concatenate(boxes))
    return _side_by_side(pictures)


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
    return _side_by_side(boxes)


def _rows_and_one_column(prompt: Prompt) -> Layout | None:
    """Inkling: a picture, resized if its processor says so, cut from the corner; a column more than its width may need."""
    images = getattr(prompt.processor, "image_processor", None)
    if prompt.model.config.model_type != "inkling_mm_model" or images is None or not prompt.own_sizes:
        return None
    edge, pictures = images.size["height"], []
    for own in prompt.sizes:
        target = max(own) * (images.rescale_image_frac or 1)
        if images.rescale_image_max_upscaled_long_edge is not None:
            target = min(target, max(images.rescale_image_max_upscaled_long_edge, max(own)))
        width, height = own if target == max(own) else (math.floor(side * target / max(own) + 0.5) for side in own)
        rows, columns = math.ceil(height / edge), width // edge + 1
        pictures.append(_inside(_lattice(rows, columns, (0.0, 0.0, columns * edge / width, rows * edge / height))))
    return _side_by_side(pictures)


def _one_and_square(prompt: Prompt) -> Layout | None:
    """A cell without a place, then a square: the mean of all cells in Florence-2, the class cell in Idefics."""
    pictures, count = max(1, len(prompt.sizes)), sum(length for _, length in prompt.runs)
    if prompt.model.config.model_type not in ("florence2", "idefics"):
        return None
    if prompt.model.config.model_type == "idefics":  # whose pictures are one run, padding aside
        vision = prompt.model.config.vision_config
        pictures = count // ((vision.image_size // vision.patch_size) ** 2 + 1)
    side = round((count // pictures - 1) ** 0.5)
    boxes = np.concatenate((_nowhere(1), _lattice(side, side)))
    return np.tile(boxes, (pictures, 1)), np.repeat(np.arange(pictures), len(boxes))


# Models whose image tokens are the answers of a resampler: each has seen all of the picture, and none has a place.
LATENTS = (
    "aria",
    "blip-2",
    "deepseek_ocr2",  # queries that have seen a tile, or all of the picture
    "idefics",
    "idefics2",
    "instructblip",
    "instructblipvideo",
    "kosmos-2",
    "kosmos-2.5",
)


def _latents(prompt: Prompt) -> Layout | None:
    """Resamplers: mass and attribution can be read, regions cannot."""
    config = prompt.model.config
    if config.model_type not in LATENTS or not getattr(config, "use_resampler", True):
        return None
    count = sum(length for _, length in prompt.runs)
    pictures = max(1, len(prompt.sizes))
    if len(prompt.runs) == pictures:  # they need not be of one length
        return _nowhere(count), np.repeat(np.arange(pictures), [length for _, length in prompt.runs])
    return _nowhere(count), np.arange(count) * pictures // max(1, count)


# Models that may turn a picture into a square number of tokens that are no square: tiles in one run, pictures in their own
# shape, several views. A rule above may know them (some by their processor); where none does, they are refused.
NO_SQUARE = (
    "fuyu",
    "gemma4",
    "gemma4_unified",
    "got_ocr2",
    "inkling_mm_model",
    "internvl",
    "lfm2_vl",
    "llama4",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "molmo2",
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
    return _side_by_side(boxes)


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
    _map_and_page,
    _tiled_canvas,
    _tagged_tiles,
    _rows_of_patches,
    _rows_and_one_column,
    _one_and_square,
    _one_square_per_picture,
)


def image_cells(ids: NDArray[np.int64], tokens: int | tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, length) of each unbroken run of image tokens, one id or several, in ``ids``, shape (tokens,)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.isin(ids, tokens).astype(np.int8), [0]))))
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
