"""Comic strips with known panels and narrations, drawn or a user's own: the material of head discovery."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gazeguard.claims.english import article, listed
from gazeguard.errors import InputError
from gazeguard.heads.pictographs import COLOURS, GLYPHS, glyph
from gazeguard.vision.images import load_image

ORDINALS = ("one", "two", "three", "four", "five", "six")
MAX_PANELS = len(ORDINALS)

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, right and bottom exclusive


@dataclass(frozen=True)
class Strip:
    """An image whose panels and narration are known.

    Attributes:
        image: The image.
        panels: The pixel box of each panel, in reading order.
        narration: A caption that walks through the panels; empty where there is none.
        spans: For each panel, the characters of ``narration`` that describe it.
        prompt: Asks for the narration.
        questions: For each panel, a question about it alone.
    """

    image: Image.Image
    panels: tuple[Box, ...]
    narration: str
    spans: tuple[tuple[int, int], ...]
    prompt: str
    questions: tuple[str, ...]

    def shortened(self, panels: int) -> Strip:
        """The same strip with its first panels alone; the others are white, as the empty slots of a page are."""
        image = self.image.copy()
        for x0, y0, x1, y1 in self.panels[panels:]:
            image.paste("white", (x0, y0, x1, y1))
        narration = self.narration[: self.spans[panels - 1][1]] + "." if self.narration else ""
        spans, questions = self.spans[:panels], self.questions[:panels]
        return Strip(image, self.panels[:panels], narration, spans, self.prompt, questions)


# --------------------------------------------------------------------------------------------------- drawn strips

# The nine locations of a scene in words, row by row.
LOCATION_PHRASES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
Style = Literal["page", "strip", "scene"]
SIZES: dict[Style, tuple[int, int]] = {"page": (576, 576), "strip": (1152, 192), "scene": (576, 576)}
MIN_SIDE = 48  # pixels
SCENE_PROMPT = "Describe the picture."  # the lab's model was trained on these very words
COLUMNS, ROWS = 3, 2  # of panels on a page


def panel_boxes(panels: int, size: tuple[int, int], columns: int = COLUMNS, rows: int = ROWS) -> tuple[Box, ...]:
    """The first ``panels`` slots of a page of ``rows`` x ``columns``, ``size`` = (width, height) pixels."""
    width, height = size[0] // columns, size[1] // rows
    slots = (divmod(panel, columns) for panel in range(panels))
    return tuple((c * width, r * height, (c + 1) * width, (r + 1) * height) for r, c in slots)


def draw_strips(
    n: int, seed: int = 0, panels: int = MAX_PANELS, size: tuple[int, int] | None = None, style: Style = "page"
) -> list[Strip]:
    """Draw strips with coloured pictographs, no two alike in a strip.

    The same arguments give the same strips on every machine.

    Args:
        n: Number of strips.
        seed: Another one gives other strips.
        panels: Of each strip, 2 to 6.
        size: (width, height) in pixels; by default 576 x 576, which processors that crop to a square keep whole, and 1152 x
            192 for one row.
        style: ``page``, two rows of three panels with one to three pictographs each; ``strip``, the same in one row;
            ``scene``, one pictograph in each of ``panels`` locations of a single image, whose boxes are the panels.

    Raises:
        InputError: Such strips cannot be drawn.
    """
    if style not in SIZES:
        raise InputError(f"Unknown style of strips {style!r}; expected one of: {', '.join(SIZES)}.")
    if not 2 <= panels <= MAX_PANELS:
        raise InputError(f"A strip has 2 to {MAX_PANELS} panels, not {panels}. Give a number between them.")
    size = size or SIZES[style]
    if min(size) < MIN_SIDE:
        raise InputError(
            f"A strip of {size[0]} x {size[1]} pixels is too small to draw on. "
            f"Give a width and a height of at least {MIN_SIDE}."
        )
    if style == "scene":
        return [_draw_scene(random.Random(f"gazeguard-comics/scene/{seed}/{index}"), panels, size) for index in range(n)]
    layout = (COLUMNS, ROWS) if style == "page" else (panels, 1)
    return [_draw_strip(random.Random(f"gazeguard-comics/{seed}/{index}"), panels, size, layout) for index in range(n)]


def _draw_strip(rng: random.Random, panels: int, size: tuple[int, int], layout: tuple[int, int]) -> Strip:
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    paper = tuple(rng.randint(232, 255) for _ in range(3))
    boxes = panel_boxes(panels, size, *layout)
    nouns = iter(rng.sample(list(GLYPHS), len(GLYPHS)))
    line = max(1, min(size) // 144)
    descriptions = []
    for x0, y0, x1, y1 in boxes:
        frame = (x0 + line, y0 + line, x1 - line - 1, y1 - line - 1)
        pen.rectangle(frame, fill=paper, outline=(90, 90, 90), width=line)
        side_x, side_y = (x1 - x0) // 2, (y1 - y0) // 3  # a panel holds two pictographs abreast, three on top of each other
        phrases = []
        for row in sorted(rng.sample(range(3), rng.choice((1, 2, 2, 3)))):
            noun, colour = next(nouns), rng.choice(list(COLOURS))
            corner = (x0 + rng.randint(0, 2) * side_x // 2, y0 + row * side_y)
            image.paste(COLOURS[colour], corner, glyph(noun, (side_x, side_y)))
            phrases.append(a_phrase(colour, noun))
        descriptions.append(listed(phrases))
    leads = [f"In panel {ordinal} there is " for ordinal in ORDINALS]
    questions = tuple(f"Describe panel {ordinal}." for ordinal in ORDINALS[:panels])
    return Strip(image, boxes, *_narrated(leads, descriptions, "."), "Describe all panels.", questions)


def _draw_scene(rng: random.Random, panels: int, size: tuple[int, int]) -> Strip:
    image = Image.new("RGB", size, tuple(rng.randint(232, 255) for _ in range(3)))
    slots = sorted(rng.sample(range(9), panels))
    third, descriptions, boxes = (size[0] // 3, size[1] // 3), [], []
    for slot, noun in zip(slots, rng.sample(list(GLYPHS), panels), strict=True):
        row, column = divmod(slot, 3)
        side = tuple(edge * 2 // 3 for edge in third)
        x, y = (i * edge + rng.randint(0, edge - length) for i, edge, length in zip((column, row), third, side, strict=True))
        colour = rng.choice(list(COLOURS))
        image.paste(COLOURS[colour], (x, y), glyph(noun, side))
        boxes.append((x, y, x + side[0], y + side[1]))
        descriptions.append(f"{a_phrase(colour, noun)} {LOCATION_PHRASES[row][column]}")
    leads = ["There is ", *[", "] * (panels - 2), " and "]
    questions = tuple(f"What is {LOCATION_PHRASES[slot // 3][slot % 3]}?" for slot in slots)
    return Strip(image, tuple(boxes), *_narrated(leads, descriptions, "", "."), SCENE_PROMPT, questions)


def _narrated(
    leads: Sequence[str], descriptions: Sequence[str], after: str, end: str = ""
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A narration of what is in each panel, one after the other, and the characters of each description."""
    text, spans = "", []
    for lead, description in zip(leads, descriptions, strict=False):
        text += f"{' ' if text and after else ''}{lead}"
        spans.append((len(text), len(text) + len(description)))
        text += f"{description}{after}"
    return text + end, tuple(spans)


def a_phrase(*words: str) -> str:
    """``a small red star``, with the right article."""
    text = " ".join(words)
    return f"{article(text)} {text}"


# ---------------------------------------------------------------------------------------------- a user's own strips

HEIGHT = 256  # pixels, of panels that are put side by side (Gandikota & Bau 2026, section 3)
MAX_PANEL_FILES, MAX_TEXT_BYTES, MAX_JSON_BYTES = 64, 2**13, 2**20
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class _Panel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    box: tuple[int, int, int, int]
    text: str = Field(default="", max_length=2000)
    lead: str | None = Field(default=None, max_length=2000)
    question: str | None = Field(default=None, max_length=2000)


class _Page(BaseModel):
    """One image and the boxes in it, as a JSON file beside the image lists them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str = Field(max_length=255)
    prompt: str | None = Field(default=None, max_length=2000)
    panels: tuple[_Panel, ...] = Field(min_length=2, max_length=MAX_PANEL_FILES)


def load_strips(folder: str | Path) -> list[Strip]:
    """Load a user's own strips: every folder in ``folder`` that holds one image per panel, and every ``.json`` file in it.

    A folder's images are put side by side in the order of their names, with a thin gap; ``NAME.txt`` beside ``NAME.png``
    says what is in the panel. A JSON file is ``{"image": "page.png", "panels": [{"box": [x0, y0, x1, y1], "text": "..."}]}``;
    the image lies in the same folder. ``prompt`` beside ``panels``, and ``lead`` and ``question`` in a panel, are words that
    the model is used to, in the place of the default ones: what asks for the narration, what comes before the text of a panel
    ("Panel 1: "), and what asks for the panel alone.

    A strip whose panels all have texts can be narrated; others are only asked about.

    Raises:
        InputError: With the file and what is wrong with it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder. Give one that holds a folder per comic, or JSON files beside images.")
    strips = [_from_folder(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    strips += [_from_json(path) for path in sorted(folder.glob("*.json"))]
    if not strips:
        raise InputError(
            f"{folder} holds no strips: neither folders with one image per panel nor JSON files. Add some, or give another "
            "folder."
        )
    return strips


def _from_folder(folder: Path) -> Strip:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not 2 <= len(files) <= MAX_PANEL_FILES:
        raise InputError(
            f"{folder} holds {len(files)} images; a strip has 2 to {MAX_PANEL_FILES} panels, one image each. Add the missing "
            "ones, or take the folder away."
        )
    images = [load_image(path) for path in files]
    images = [image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT)) for image in images]
    page = Image.new("RGB", (sum(image.width for image in images), HEIGHT), "white")
    boxes, left = [], 0
    for image in images:
        page.paste(image, (left, 0))
        boxes.append((left, 0, left + image.width, HEIGHT))
        left += image.width
    pen = ImageDraw.Draw(page)
    for x0, *_ in boxes[1:]:
        pen.rectangle((x0 - 3, 0, x0 + 2, HEIGHT), fill="white")
    return _strip(page, boxes, [_description(path.with_suffix(".txt")) for path in files], "from left to right")


def _description(path: Path) -> str:
    """The text of a panel; empty where there is no such file."""
    if not path.is_file():
        return ""
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise InputError(f"{path} is larger than {MAX_TEXT_BYTES} bytes, more than a description of a panel. Shorten it.")
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _from_json(path: Path) -> Strip:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES} bytes, more than any page of panels. Shorten it.")
    try:
        page = _Page.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise InputError(
            f'{path} does not describe a page: {where}: {first["msg"]}. Expected {{"image": NAME, "panels": [{{"box": '
            '[x0, y0, x1, y1], "text": ...}, ...]}.'
        ) from error
    if Path(page.image).name != page.image:
        raise InputError(f"{path} names the image {page.image!r}. Give the name of a file beside it.")
    image = load_image(path.parent / page.image)
    for number, panel in enumerate(page.panels):
        x0, y0, x1, y1 = panel.box
        if not (0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height):
            raise InputError(
                f"{path}: panel {number} is {panel.box}, which is no box of a {image.width} x {image.height} image. Give x0, "
                "y0, x1, y1 in pixels."
            )
    return _strip(image, [panel.box for panel in page.panels], [panel.text.strip() for panel in page.panels], "in order", page)


def _strip(
    image: Image.Image, boxes: Sequence[Box], descriptions: Sequence[str], order: str, words: _Page | None = None
) -> Strip:
    """A strip of one's own; ``order`` says in words how its panels are counted, ``words`` may set its words."""
    count = len(boxes)
    own = [(None, None)] * count if words is None else [(panel.lead, panel.question) for panel in words.panels]
    questions = tuple(
        own[number - 1][1]
        or f"The picture has {count} panels. What is in panel {number} of {count}, counted {order}? Answer briefly."
        for number in range(1, count + 1)
    )
    narration, spans = "", tuple[tuple[int, int], ...]()
    if all(descriptions):
        leads = [f"Panel {i + 1}: " if lead is None else lead for i, (lead, _) in enumerate(own)]
        narration, spans = _narrated(leads, [text.rstrip(".") for text in descriptions], ".")
    prompt = (words and words.prompt) or f"Describe every panel of the picture {order}."
    return Strip(image, tuple(boxes), narration, spans, prompt, questions)
