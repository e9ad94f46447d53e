"""Layouts whose processors report the size of every image in patches: Qwen-VL and its many relatives, Gemma 4, Molmo 2.

Qwen-VL reports (frames, height, width), Nemotron-H (height, width), Gemma 4 the (x, y) of every patch, -1 for padding;
patches are merged to a side that each family stores under a name of its own. Molmo 2 reports the (height, width) of two
views in image tokens, and the patches of each token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gazeguard.errors import given
from gazeguard.vision.geometry import Layout, between, inside, lattice, nowhere, one_after_another, with_newlines
from gazeguard.vision.image_tokens import video_token_id
from gazeguard.vision.layouts.prompt import Prompt

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")
# Entries of a vision configuration that say how many patches make one side of an image token.
MERGE_NAMES = ("spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size")


@dataclass(frozen=True)
class GridFacts:
    """What a family's reported grids count.

    Attributes:
        counts_tokens: They count image tokens, not the patches that are merged into them.
        counts_padding: The image lies in the upper left corner, and they count the padding beside and below it.
        enlarges: A counted image of fewer than the image processor's ``min_image_tokens`` is enlarged; others are at most
            shrunk.
        framed: There is one more token before the image, after each of its rows, and after it.
    """

    counts_tokens: bool = False
    counts_padding: bool = False
    enlarges: bool = False
    framed: bool = False


FACTS = {
    "gemma4_unified": GridFacts(counts_tokens=True),
    "glm5_next": GridFacts(counts_padding=True, enlarges=True),
    "hunyuan_vl": GridFacts(framed=True),
    "inkling2": GridFacts(counts_tokens=True, counts_padding=True),
    "inkling2_mm_model": GridFacts(counts_tokens=True, counts_padding=True),
    "kimi_k25": GridFacts(counts_padding=True),
}


class ReportedImage(NamedTuple):
    """An image or video whose size the processor reported.

    Attributes:
        kind: Image or video.
        number: Its number among those of its kind in the batch.
        boxes: (N, 4) float32, the boxes of its tokens; those of a video frame after frame.
    """

    kind: Kind
    number: int
    boxes: NDArray[np.float32]


def _facts(model: Any) -> GridFacts:
    return FACTS.get(model.config.model_type, GridFacts())


def _reported_grids(inputs: Mapping[str, Any], kind: Kind) -> NDArray[np.int64] | None:
    """([frames,] height, width) of every image or video of a batch, in patches or image tokens; None where not reported."""
    grids = inputs.get(f"{kind}_grid_thw", inputs.get(f"{kind}_grid_hw"))
    if grids is None and (positions := inputs.get(f"{kind}_position_ids")) is not None:
        grids = np.asarray(positions).max(axis=1)[:, ::-1] + 1
    return None if grids is None else np.asarray(grids)


def _merge_side(model: Any) -> int:
    """How many patches make one side of an image token."""
    if (ratio := getattr(model.config, "downsample_ratio", None)) is not None:
        return round(1 / ratio)
    vision = getattr(model.config, "vision_config", None)
    side = next((getattr(vision, name) for name in MERGE_NAMES if getattr(vision, name, None) is not None), 1)
    return side[0] if isinstance(side, (list, tuple)) else side


def _boxes_of(model: Any, inputs: Mapping[str, Any], kind: Kind) -> list[NDArray[np.float32]] | None:
    """The boxes of the tokens of every image or video of a batch; None where their sizes are not reported."""
    if kind == "image" and inputs.get("image_grids") is not None:
        return _pooled_patches(inputs)
    if (grids := _reported_grids(inputs, kind)) is None:
        return None
    facts, images = _facts(model), []
    sides = inputs.get(f"{kind}_merge_sizes", np.full(len(grids), 1 if facts.counts_tokens else _merge_side(model)))
    for (*frames, height, width), side in zip(grids.tolist(), np.asarray(sides).tolist(), strict=True):
        boxes = np.tile(lattice(height // side, width // side), (*frames, 1) if frames else (1, 1))
        if facts.framed:
            boxes = np.concatenate((nowhere(1), with_newlines(boxes, height // side), nowhere(1)))
        images.append(boxes)
    return images


def _pooled_patches(inputs: Mapping[str, Any]) -> list[NDArray[np.float32]] | None:
    """Molmo 2: the whole image, then a finer view of it. A token at the edge may pool fewer patches: -1 stands for none."""
    grids, windows = np.asarray(inputs["image_grids"]), inputs.get("image_token_pooling")
    if windows is None or len(windows) != (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).sum():
        return None
    windows, images, start = np.asarray(windows), [], 0
    side = math.isqrt(windows.shape[1])
    for grid in grids.tolist():
        views = []
        for rows, columns in (grid[:2], grid[2:]):
            pooled = windows[start : start + rows * columns].reshape(rows, columns, side, side) >= 0
            lines = [np.cumsum([0, *pooled.any(axis=axes).sum(axis=1)]) for axes in ((1, 3), (0, 2))]
            views.append(between(*(line / line[-1] for line in lines)))
            start += rows * columns
        images.append(np.concatenate(views))
    return images


def reported_images(model: Any, inputs: Mapping[str, Any]) -> dict[Kind, Iterator[ReportedImage]] | None:
    """Queues of the images and the videos of a batch, in the order of their tokens, for `next_images`.

    Returns:
        None where the processor reported the sizes of neither.
    """
    boxes = {kind: _boxes_of(model, inputs, kind) for kind in KINDS}
    if boxes["image"] is None and boxes["video"] is None:
        return None
    queues = {kind: iter([ReportedImage(kind, *row) for row in enumerate(boxes[kind] or ())]) for kind in KINDS}
    # GLM-4V gives the frames of videos the id of images.
    return queues if boxes["image"] is not None else dict.fromkeys(queues, queues["video"])


def next_images(
    model: Any, queues: Mapping[Kind, Iterator[ReportedImage]], token_ids: NDArray[np.int64]
) -> list[ReportedImage]:
    """Take from the queues of a batch the images and videos of its next prompt.

    Args:
        model: The model, which says what the id of a video is.
        queues: As `reported_images` returns them; what belongs to this prompt is consumed.
        token_ids: (N,) int64, the ids of the prompt's image tokens.
    """
    in_video, images, start = token_ids == video_token_id(model), [], 0
    while start < len(token_ids) and (image := next(queues["video" if in_video[start] else "image"], None)) is not None:
        images.append(image)
        start += len(image.boxes)
    return images


def processed_size(model: Any, inputs: Mapping[str, Any], image: ReportedImage) -> tuple[int, int]:
    """(width, height) in pixels of what the processor made of an image or video, padding included."""
    if image.kind == "image" and inputs.get("image_grids") is not None:
        height, width = np.asarray(inputs["image_grids"])[image.number, 2:].tolist()
        return width, height
    height, width = given(_reported_grids(inputs, image.kind))[image.number, -2:].tolist()
    edge = model.config.vision_config.patch_size * (_merge_side(model) if _facts(model).counts_tokens else 1)
    return width * edge, height * edge


def patch_grids(prompt: Prompt) -> Layout | None:
    """Images and videos whose sizes the processor reported in patches."""
    queues = reported_images(prompt.model, prompt.inputs)
    if queues is None:
        return None
    images = next_images(prompt.model, queues, prompt.image_token_ids)
    boxes = [image.boxes for image in images]
    if prompt.original_sizes and _facts(prompt.model).counts_padding:
        for i, (image, size) in enumerate(zip(images, prompt.sizes, strict=False)):
            boxes[i] = _without_padding(prompt, image, size)
    return one_after_another(boxes)


def _without_padding(prompt: Prompt, image: ReportedImage, size: tuple[int, int]) -> NDArray[np.float32]:
    """The boxes of an image of ``size`` = (width, height) pixels that lies in the upper left corner of what was reported."""
    canvas = processed_size(prompt.model, prompt.inputs, image)
    scale = min(limit / edge for limit, edge in zip(canvas, size, strict=True))
    least = getattr(prompt.image_processor, "min_image_tokens", 0) if _facts(prompt.model).enlarges else 0
    if math.prod(size) >= least * (prompt.model.config.vision_config.patch_size * _merge_side(prompt.model)) ** 2:
        scale = min(1.0, scale)
    share = [limit / max(1, math.floor(edge * scale)) for limit, edge in zip(canvas, size, strict=True)]
    return inside(image.boxes * np.tile(share, 2).astype(np.float32))
