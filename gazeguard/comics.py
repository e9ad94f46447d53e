"""What do we show a model to find its gaze? Comic strips whose panels and words are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
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


ORDINALS = ("one", "two", "three", "four", "five", "six")
MAX_PANELS = len(ORDINALS)

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, right and bottom exclusive


@dataclass(frozen=True)
class Strip:
    """A picture whose panels and words are known.

    panels:    the pixel box of each panel, in reading order
    narration: a caption that walks through the panels
    spans:     for each panel, the characters of ``narration`` that say what is in it
    prompt:    asks for the narration
    questions: for each panel, a question about it alone
    """

    image: Image.Image
    panels: tuple[Box, ...]
    narration: str
    spans: tuple[tuple[int, int], ...]
    prompt: str
    questions: tuple[str, ...]


def panel_boxes(panels: int, size: tuple[int, int]) -> tuple[Box, ...]:
    """The first ``panels`` slots of a page of two rows of three, ``size`` = (width, height) pixels."""
    width, height = size[0] // 3, size[1] // 2
    slots = (divmod(panel, 3) for panel in range(panels))
    return tuple((c * width, r * height, (c + 1) * width, (r + 1) * height) for r, c in slots)


def draw_strips(n: int, seed: int = 0, panels: int = MAX_PANELS, size: tuple[int, int] = (576, 576)) -> list[Strip]:
    """``n`` pages of ``panels`` panels with one to three coloured pictographs each, no two alike on a page.

    The same arguments give the same pages on every machine.
    """
    if not 2 <= panels <= MAX_PANELS:
        raise ValueError(f"A strip has 2 to {MAX_PANELS} panels, not {panels}.")
    return [_draw_strip(random.Random(f"gazeguard-comics/{seed}/{index}"), panels, size) for index in range(n)]


def _draw_strip(rng: random.Random, panels: int, size: tuple[int, int]) -> Strip:
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    paper = tuple(rng.randint(232, 255) for _ in range(3))
    boxes = panel_boxes(panels, size)
    nouns = iter(rng.sample(list(GLYPHS), len(GLYPHS)))
    narration, spans = "", []
    side_x, side_y = size[0] // 6, size[1] // 6  # a panel holds two pictographs abreast and three on top of each other
    line = max(1, min(size) // 144)
    for ordinal, (x0, y0, x1, y1) in zip(ORDINALS, boxes, strict=False):
        frame = (x0 + line, y0 + line, x1 - line - 1, y1 - line - 1)
        pen.rectangle(frame, fill=paper, outline=(90, 90, 90), width=line)
        said = []
        for row in sorted(rng.sample(range(3), rng.choice((1, 2, 2, 3)))):
            noun, colour = next(nouns), rng.choice(list(COLOURS))
            where = (x0 + rng.randint(0, 2) * side_x // 2, y0 + row * side_y)
            image.paste(COLOURS[colour], where, glyph(noun, (side_x, side_y)))
            said.append(a_phrase(colour, noun))
        narration += f"{' ' if narration else ''}In panel {ordinal} there is "
        spans.append((len(narration), len(narration) + len(join(said))))
        narration += f"{join(said)}."
    questions = tuple(f"Describe panel {ordinal}." for ordinal in ORDINALS[:panels])
    return Strip(image, boxes, narration, tuple(spans), "Describe all panels.", questions)


def a_phrase(*words: str) -> str:
    """``a small red star``, with the right article."""
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def join(items: Sequence[str]) -> str:
    """``x``, ``x and y``, ``x, y and z``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
