"""Pictographs of the drawn worlds: glyphs of a font that every machine has, and their colours."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 36, 36),
    "blue": (36, 84, 214),
    "green": (30, 150, 60),
    "yellow": (240, 200, 10),
    "purple": (140, 50, 170),
    "orange": (244, 128, 20),
}

# Pictographs that the DejaVu font draws; matplotlib ships it, so every machine has the same one.
GLYPHS = {
    "star": "\u2605", "moon": "\u263e", "sun": "\u2600", "cloud": "\u2601", "umbrella": "\u2602", "bolt": "\u26a1",
    "snowman": "\u2603", "snowflake": "\u2744", "heart": "\u2665", "flower": "\u273f", "cup": "\u2615",
    "envelope": "\u2709", "phone": "\u260e", "pencil": "\u270e", "plane": "\u2708", "flag": "\u2691",
    "anchor": "\u2693", "skull": "\u2620", "clover": "\u2663", "gear": "\u2699", "castle": "\u265c",
    "horse": "\u265e", "note": "\u266b", "crown": "\u265b",
}  # fmt: skip


@lru_cache(maxsize=len(GLYPHS))
def _outline(noun: str) -> Image.Image:
    import matplotlib  # takes a quarter of a second, and only drawing needs it

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 96)
    canvas = Image.new("L", (160, 160))
    ImageDraw.Draw(canvas).text((30, 20), GLYPHS[noun], font=font, fill=255)
    ink = canvas.crop(canvas.getbbox())
    square = Image.new("L", (max(ink.size),) * 2)
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    return square


@lru_cache(maxsize=4096)
def glyph(noun: str, size: tuple[int, int]) -> Image.Image:
    """The pictograph of ``noun`` as a mask: mode L, ``size`` = (width, height) pixels."""
    return _outline(noun).resize(size, Image.Resampling.LANCZOS)
