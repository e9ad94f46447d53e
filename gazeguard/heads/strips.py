"""What do we show a model to find its gaze? Comic strips whose panels and words are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gazeguard.errors import InputError
from gazeguard.vision.images import load_image

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


PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
Style = Literal["page", "strip", "scene"]
SIZES: dict[Style, tuple[int, int]] = {"page": (576, 576), "strip": (1152, 192), "scene": (576, 576)}


def panel_boxes(panels: int, size: tuple[int, int], columns: int = 3, rows: int = 2) -> tuple[Box, ...]:
    """The first ``panels`` slots of a page of two rows of three (or so many), ``size`` = (width, height) pixels."""
    width, height = size[0] // columns, size[1] // rows
    slots = (divmod(panel, columns) for panel in range(panels))
    return tuple((c * width, r * height, (c + 1) * width, (r + 1) * height) for r, c in slots)


def draw_strips(
    n: int, seed: int = 0, panels: int = MAX_PANELS, size: tuple[int, int] | None = None, style: Style = "page"
) -> list[Strip]:
    """``n`` strips of ``panels`` panels with coloured pictographs, no two alike in a strip.

    size:  (width, height) in pixels; by default 576 x 576, which processors that crop to a square keep whole, and 1152 x
           192 for one row
    style: ``page``, two rows of three panels with one to three pictographs each; ``strip``, the same in one row; ``scene``,
           one pictograph in each of ``panels`` places of a single picture, whose boxes are the panels
    The same arguments give the same strips on every machine. Raises `InputError` for numbers that cannot be drawn.
    """
    if style not in SIZES:
        raise InputError(f"There is no style {style!r} of strips. Choose one of {', '.join(SIZES)}.")
    if not 2 <= panels <= MAX_PANELS:
        raise InputError(f"A strip has 2 to {MAX_PANELS} panels, not {panels}.")
    size = size or SIZES[style]
    if min(size) < 48:
        raise InputError(f"A strip of {size[0]} x {size[1]} pixels is too small to draw on; both need at least 48.")
    if style == "scene":
        return [_draw_scene(random.Random(f"gazeguard-comics/scene/{seed}/{index}"), panels, size) for index in range(n)]
    layout = (3, 2) if style == "page" else (panels, 1)
    return [_draw_strip(random.Random(f"gazeguard-comics/{seed}/{index}"), panels, size, layout) for index in range(n)]


def _draw_strip(rng: random.Random, panels: int, size: tuple[int, int], layout: tuple[int, int]) -> Strip:
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    paper = tuple(rng.randint(232, 255) for _ in range(3))
    boxes = panel_boxes(panels, size, *layout)
    nouns = iter(rng.sample(list(GLYPHS), len(GLYPHS)))
    line = max(1, min(size) // 144)
    told = []
    for x0, y0, x1, y1 in boxes:
        frame = (x0 + line, y0 + line, x1 - line - 1, y1 - line - 1)
        pen.rectangle(frame, fill=paper, outline=(90, 90, 90), width=line)
        side_x, side_y = (x1 - x0) // 2, (y1 - y0) // 3  # a panel holds two pictographs abreast, three on top of each other
        said = []
        for row in sorted(rng.sample(range(3), rng.choice((1, 2, 2, 3)))):
            noun, colour = next(nouns), rng.choice(list(COLOURS))
            where = (x0 + rng.randint(0, 2) * side_x // 2, y0 + row * side_y)
            image.paste(COLOURS[colour], where, glyph(noun, (side_x, side_y)))
            said.append(a_phrase(colour, noun))
        told.append(join(said))
    leads = [f"In panel {ordinal} there is " for ordinal in ORDINALS]
    questions = tuple(f"Describe panel {ordinal}." for ordinal in ORDINALS[:panels])
    return Strip(image, boxes, *_narrated(leads, told, "."), "Describe all panels.", questions)


def _draw_scene(rng: random.Random, panels: int, size: tuple[int, int]) -> Strip:
    image = Image.new("RGB", size, tuple(rng.randint(232, 255) for _ in range(3)))
    slots = sorted(rng.sample(range(9), panels))
    third, told, boxes = (size[0] // 3, size[1] // 3), [], []
    for slot, noun in zip(slots, rng.sample(list(GLYPHS), panels), strict=True):
        row, column = divmod(slot, 3)
        side = tuple(edge * 2 // 3 for edge in third)
        x, y = (at * edge + rng.randint(0, edge - own) for at, edge, own in zip((column, row), third, side, strict=True))
        colour = rng.choice(list(COLOURS))
        image.paste(COLOURS[colour], (x, y), glyph(noun, side))
        boxes.append((x, y, x + side[0], y + side[1]))
        told.append(f"{a_phrase(colour, noun)} {PLACES[row][column]}")
    leads = ["There is ", *[", "] * (panels - 2), " and "]
    questions = tuple(f"What is {PLACES[slot // 3][slot % 3]}?" for slot in slots)
    return Strip(image, tuple(boxes), *_narrated(leads, told, "", "."), "Describe the picture.", questions)


def _narrated(leads: Sequence[str], told: Sequence[str], after: str, end: str = "") -> tuple[str, tuple[tuple[int, int], ...]]:
    """What is told of each panel, one after the other, and the characters of each."""
    text, spans = "", []
    for lead, words in zip(leads, told, strict=False):
        text += f"{' ' if text and after else ''}{lead}"
        spans.append((len(text), len(text) + len(words)))
        text += f"{words}{after}"
    return text + end, tuple(spans)


HEIGHT = 256  # pixels, of panels that are put side by side (Gandikota & Bau 2026, section 3)
MAX_PANEL_FILES, MAX_TEXT_BYTES, MAX_JSON_BYTES = 64, 2**13, 2**20
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class _Panel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    box: tuple[int, int, int, int]
    text: str = Field(default="", max_length=2000)


class _Page(BaseModel):
    """One picture and the boxes in it, as a JSON file beside the picture says it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field(max_length=255)
    panels: tuple[_Panel, ...] = Field(min_length=2, max_length=MAX_PANEL_FILES)


def load_strips(folder: str | Path) -> list[Strip]:
    """A user's own strips: every folder in ``folder`` that holds one picture per panel, and every ``.json`` file in it.

    A folder's pictures are put side by side in the order of their names, with a thin gap; ``NAME.txt`` beside ``NAME.png``
    says what is in the panel. A JSON file is ``{"image": "page.png", "panels": [{"box": [x0, y0, x1, y1], "text": "..."}]}``;
    the picture lies in the same folder. A strip whose panels all have texts can be narrated; others are only asked about.
    Raises `InputError` with the file and what is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder. Give one that holds a folder per comic, or JSON files beside pictures.")
    strips = [_from_folder(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    strips += [_from_json(path) for path in sorted(folder.glob("*.json"))]
    if not strips:
        raise InputError(f"{folder} holds no strips: neither folders with one picture per panel nor JSON files.")
    return strips


def _from_folder(folder: Path) -> Strip:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not 2 <= len(files) <= MAX_PANEL_FILES:
        raise InputError(f"{folder} holds {len(files)} pictures; a strip has 2 to {MAX_PANEL_FILES} panels, one picture each.")
    images = [load_image(path) for path in files]
    images = [image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT)) for image in images]
    page = Image.new("RGB", (sum(image.width for image in images), HEIGHT), "white")
    boxes, at = [], 0
    for image in images:
        page.paste(image, (at, 0))
        boxes.append((at, 0, at + image.width, HEIGHT))
        at += image.width
    pen = ImageDraw.Draw(page)
    for x0, *_ in boxes[1:]:
        pen.rectangle((x0 - 3, 0, x0 + 2, HEIGHT), fill="white")
    return _own_strip(page, boxes, [_words(path.with_suffix(".txt")) for path in files], "from left to right")


def _words(path: Path) -> str:
    if not path.is_file():
        return ""
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise InputError(f"{path} is larger than {MAX_TEXT_BYTES} bytes, more than one says of a panel.")
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _from_json(path: Path) -> Strip:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES} bytes, more than any page of panels.")
    try:
        page = _Page.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise InputError(f"{path} does not describe a page: {where}: {first['msg']}.") from error
    if Path(page.image).name != page.image:
        raise InputError(f"{path} names the picture {page.image!r}; give the name of a file beside it.")
    image = load_image(path.parent / page.image)
    for number, panel in enumerate(page.panels):
        x0, y0, x1, y1 = panel.box
        if not (0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height):
            raise InputError(
                f"{path}: panel {number} is {panel.box}, which is no box of a {image.width} x {image.height} picture."
            )
    return _own_strip(image, [panel.box for panel in page.panels], [panel.text.strip() for panel in page.panels], "in order")


def _own_strip(image: Image.Image, boxes: Sequence[Box], told: Sequence[str], order: str) -> Strip:
    count = len(boxes)
    questions = tuple(
        f"The picture has {count} panels. What is in panel {number} of {count}, counted {order}? Answer briefly."
        for number in range(1, count + 1)
    )
    leads = [f"Panel {number}: " for number in range(1, count + 1)]
    narration, spans = _narrated(leads, [words.rstrip(".") for words in told], ".") if all(told) else ("", ())
    return Strip(image, tuple(boxes), narration, spans, f"Describe every panel of the picture {order}.", questions)


def a_phrase(*words: str) -> str:
    """``a small red star``, with the right article."""
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def join(items: Sequence[str]) -> str:
    """``x``, ``x and y``, ``x, y and z``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
