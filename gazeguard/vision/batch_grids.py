"""Image grids of a batch: the part of the processor's output that belongs to each prompt, and its layout.

Processors report sizes per image, per run of image tokens or per image token of the whole batch; a layout rule
(`gazeguard.vision.layouts.rules`) reads one prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from gazeguard.errors import InputError, UnsupportedError
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.image_tokens import WITHOUT_IMAGE_TOKEN, image_token_ids, image_token_runs, video_token_id
from gazeguard.vision.layouts.padded_canvas import canvases
from gazeguard.vision.layouts.patch_grids import ReportedImage, next_images, processed_size, reported_images
from gazeguard.vision.layouts.prompt import RUN_SHAPES, Prompt
from gazeguard.vision.layouts.rules import find_grid
from gazeguard.vision.text import TOKENIZER_LOCK

# Entries of a processor's output that have one row per image, per video, per run of image tokens, per image token of the
# batch, and per prompt.
PER_IMAGE = ("image_grid_thw", "image_grid_hw", "image_grids", "image_merge_sizes", "image_position_ids", "image_sizes")
PER_VIDEO = ("video_grid_thw", "video_merge_sizes")
PER_RUN = RUN_SHAPES
PER_IMAGE_TOKEN = ("image_token_pooling",)
PER_ROW = ("aspect_ratio_ids",)
OF_THE_BATCH = (*PER_IMAGE, *PER_VIDEO, *PER_RUN, *PER_IMAGE_TOKEN)

Size = tuple[int, int]  # width, height in pixels
BatchSizes = Sequence[Sequence[Size]]  # of the images of every row


def check_image_sizes(sizes: Any, prompts: int) -> list[list[Size]] | None:
    """The image sizes of every prompt, repeated where there are several prompts for each.

    Raises:
        InputError: They are not one list of (width, height) pairs per prompt.
    """
    if sizes is None:
        return None
    try:
        rows = [[(int(width), int(height)) for width, height in row] for row in sizes]
    except (TypeError, ValueError, OverflowError):
        rows = []
    if not rows or prompts % len(rows) or any(min(size) < 1 for row in rows for size in row):
        raise InputError(
            f"picture_sizes is {sizes!r:.80}; expected for each of the {prompts} prompts the list of its images' (width, "
            "height), as in [[(640, 480)]]. Mind the brackets."
        )
    return [row for row in rows for _ in range(prompts // len(rows))]


def image_grids(
    model: PreTrainedModel,
    processor: ProcessorMixin | None,
    inputs: Mapping[str, Any],
    ids: Tensor,
    mask: Tensor | None,
    sizes: BatchSizes | None = None,
    known: ImageGrid | None = None,
) -> list[ImageGrid]:
    """The image grid of every row of a batch of prompts.

    A video is one image, whose tokens come once for each of its frames. (Qwen-VL makes one frame of two.)

    Args:
        model: The model that reads the batch.
        processor: Its processor; some layouts cannot be told without it.
        inputs: The processor's output.
        ids: (batch, P) prompt ids, or the ids of `gazeguard.attention.visual_keys.VisualKeys`, where images are no part of the
            prompt.
        mask: (batch, P), 0 for padding; None where there is none.
        sizes: For each row the (width, height) in pixels of its images; by default those of what the processor made of
            them.
        known: The grid of every row, for a layout that no rule knows.

    Raises:
        InputError: A row has no image, or ``sizes`` or ``known`` do not fit.
        UnsupportedError: No rule knows the layout.
    """
    sizes = check_image_sizes(sizes, len(ids))
    tokens, rows = image_token_ids(model), _Rows.of(model, ids, mask)
    for number, runs in enumerate(rows.runs):
        if not runs:
            raise InputError(
                f"Row {number} of the batch has no image token (id {tokens[0]}): the image did not reach the prompt. Put an "
                'image into the message, {"type": "image", "image": ...}, and pass the processor\'s output whole.'
            )
    if known is not None:
        return [_known_grid(known, n, None if sizes is None else sizes[i]) for i, n in enumerate(rows.token_counts)]
    with TOKENIZER_LOCK:  # some rules ask the tokenizer
        return [find_grid(prompt) for prompt in _prompts(model, processor, inputs, rows, sizes)]


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch: for each its (T,) ids without padding, and its runs of image tokens."""

    ids: tuple[NDArray[np.int64], ...]
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> _Rows:
        padded = ids.cpu().numpy()
        is_real = np.ones_like(padded, bool) if mask is None else mask.cpu().numpy().astype(bool)
        rows = tuple(row[real] for row, real in zip(padded, is_real, strict=True))
        return cls(rows, tuple(image_token_runs(row, image_token_ids(model)) for row in rows))

    @property
    def token_counts(self) -> list[int]:
        """The number of image tokens of each row."""
        return [sum(length for _, length in runs) for runs in self.runs]


def _prompts(
    model: PreTrainedModel,
    processor: ProcessorMixin | None,
    inputs: Mapping[str, Any],
    rows: _Rows,
    sizes: BatchSizes | None,
) -> Iterator[Prompt]:
    """One `Prompt` for each row of a batch, with its own part of what the processor reported."""
    reported = {name: np.asarray(inputs[name].cpu()) for name in OF_THE_BATCH if inputs.get(name) is not None}
    queues = reported_images(model, reported)
    run_slices, token_slices = _slices(map(len, rows.runs)), _slices(rows.token_counts)
    for number, (ids, runs) in enumerate(zip(rows.ids, rows.runs, strict=True)):
        token_ids = np.concatenate([ids[start : start + length] for start, length in runs])
        _check_video(model, number, token_ids, reported)
        part = {name: reported[name][run_slices[number]] for name in PER_RUN if name in reported}
        part |= {name: reported[name][token_slices[number]] for name in PER_IMAGE_TOKEN if name in reported}
        part |= {name: np.asarray(inputs[name][number].cpu()) for name in PER_ROW if inputs.get(name) is not None}
        images = [] if queues is None else next_images(model, queues, token_ids)
        part |= _of_images(reported, images)
        if queues is None and "image_sizes" in reported:
            part["image_sizes"] = reported["image_sizes"][_images_of_row(number, len(rows.ids), reported, sizes)]
        if sizes is not None:
            own_sizes = tuple(sizes[number])
        elif images:
            own_sizes = tuple(processed_size(model, reported, image) for image in images)
        else:
            own_sizes = tuple(_processed_sizes(model, inputs, part, len(runs)))
        yield Prompt(ids, runs, part, own_sizes, model, processor, original_sizes=sizes is not None)


def _slices(lengths: Iterable[int]) -> list[slice]:
    """Consecutive slices of these lengths."""
    ends = np.cumsum([0, *lengths]).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def _check_video(model: PreTrainedModel, number: int, token_ids: NDArray[np.int64], reported: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for a video whose frames nothing in the processor's output describes."""
    if (token_ids == video_token_id(model)).any() and "video_grid_thw" not in reported:
        raise UnsupportedError(
            f"Row {number} of the batch holds a video, and no rule says where in its frames the {len(token_ids)} image tokens "
            f"of {type(model).__name__} lie: only video_grid_thw does. Pass grid=ImageGrid(...) with one box per image token, "
            "or leave the video out."
        )


def _of_images(reported: Mapping[str, NDArray[Any]], images: Sequence[ReportedImage]) -> dict[str, NDArray[Any]]:
    """What was reported of these images and videos."""
    part: dict[str, NDArray[Any]] = {}
    for kind, names in (("image", PER_IMAGE), ("video", PER_VIDEO)):
        if indices := [image.number for image in images if image.kind == kind]:
            part |= {name: reported[name][indices] for name in names if name in reported}
    return part


def _images_of_row(number: int, rows: int, reported: Mapping[str, NDArray[Any]], sizes: BatchSizes | None) -> slice:
    """Which images of a batch belong to a row: as many as it has sizes, or an equal share where no sizes are given."""
    if sizes is not None:
        return _slices(map(len, sizes))[number]
    each = len(reported["image_sizes"]) // rows
    return slice(number * each, (number + 1) * each)


def _known_grid(known: ImageGrid, count: int, sizes: Sequence[Size] | None) -> ImageGrid:
    """The caller's grid, for a prompt with ``count`` image tokens and, if given, images of these sizes."""
    if len(known) != count:
        raise InputError(
            f"grid has {len(known)} boxes, but the prompt has {count} image tokens. "
            "Pass one box per image token, or no grid for a layout that GazeGuard knows."
        )
    return known if sizes is None else replace(known, sizes=tuple(sizes))


def _processed_sizes(model: PreTrainedModel, inputs: Mapping[str, Any], part: Mapping[str, Any], runs: int) -> list[Size]:
    """(width, height) of each image as the vision encoder sees it, for callers who kept no original."""
    if "image_sizes" in part:
        return [(int(width), int(height)) for height, width in part["image_sizes"]]
    if "aspect_ratio_ids" in part:
        edge = model.config.vision_config.image_size
        return [(columns * edge, rows * edge) for rows, columns in canvases(model, part)]
    pixels = inputs.get("pixel_values")
    if pixels is not None and model.config.model_type in WITHOUT_IMAGE_TOKEN:
        runs = pixels.shape[1]
    if pixels is not None and pixels.ndim >= 4:
        return [(int(pixels.shape[-1]), int(pixels.shape[-2]))] * runs
    # generate has turned the pixels into features already; most encoders take one square size
    side = getattr(getattr(model.config, "vision_config", None), "image_size", 1)
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return [(int(width), int(height))] * runs
