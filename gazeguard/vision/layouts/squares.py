"""Layouts of one square of image tokens per image: LLaVA and most single-resolution models; Florence-2, Idefics."""

from __future__ import annotations

from typing import Any

import numpy as np

from gazeguard.vision.geometry import WHOLE, Box, Layout, lattice, nowhere, one_after_another
from gazeguard.vision.layouts.prompt import Prompt

# Families that may turn an image into a square number of tokens that are no square: tiles in one run, images in their own
# shape, several views. Another rule may know them (some by their processor); where none does, they are refused.
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
# Families whose tiles are runs of their own, so that several runs need not be several images.
TILES_ARE_RUNS = ("aya_vision", "cohere2_vision", "ovis2")
# Families whose configuration says the side of a square; all images of a prompt are one run, without padding.
SIDE_BY_CONFIGURATION = ("idefics",)


def one_square_per_image(prompt: Prompt) -> Layout | None:
    """Each image is one run of n x n tokens; a centre crop is undone."""
    if prompt.model_type in TILES_ARE_RUNS and len(prompt.runs) > 1:
        return None
    sides = [round(length**0.5) for length in prompt.run_lengths]
    if len(sides) != len(prompt.sizes) or [side**2 for side in sides] != prompt.run_lengths:
        return None
    crops = [_centre_crop(prompt.image_processor, size) for size in prompt.sizes]
    return one_after_another([lattice(side, side, crop) for side, crop in zip(sides, crops, strict=True)])


def _centre_crop(images: Any, size: tuple[int, int]) -> Box:
    """The part of an image, in shares, that is left when its short edge is resized and its middle cut out."""
    resize, crop = getattr(images, "size", None) or {}, getattr(images, "crop_size", None) or {}
    short = resize.get("shortest_edge")
    if not getattr(images, "do_center_crop", False) or not short or "height" not in crop:
        return WHOLE
    scale = short / min(size)
    left, top = (max(0.0, 0.5 - crop[edge] / (2 * scale * n)) for edge, n in zip(("width", "height"), size, strict=True))
    return (left, top, 1 - left, 1 - top)


def one_token_and_square(prompt: Prompt) -> Layout | None:
    """A token without a location, then a square: the mean of all tokens in Florence-2, the class token in Idefics."""
    images = max(1, len(prompt.sizes))
    if prompt.model_type in SIDE_BY_CONFIGURATION:
        vision = prompt.model.config.vision_config
        images = prompt.token_count // ((vision.image_size // vision.patch_size) ** 2 + 1)
    side = round((prompt.token_count // images - 1) ** 0.5)
    return one_after_another([np.concatenate((nowhere(1), lattice(side, side)))] * images)
