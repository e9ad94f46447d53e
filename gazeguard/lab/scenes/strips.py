"""Strips of the scenes world for finding gaze heads: comic pages, and scenes whose objects take the place of panels.

The model of the scenes lab knows these drawings and these words. Every narration is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Literal

from gazeguard.claims.english import listed
from gazeguard.heads.discovery import MIN_TOKENS
from gazeguard.heads.strips import ORDINALS, Strip
from gazeguard.lab.scenes.captions import Group, grouped
from gazeguard.lab.scenes.samples import PROMPTS
from gazeguard.lab.scenes.world import PATCH, Difficulty, DrawnImage, Kind, Split, generator, make_image


def strips(
    n: int, seed: int = 0, panels: int = 4, kind: Kind = "scene", split: Split = "train", hard: bool = False
) -> list[Strip]:
    """Draw strips with their narrations.

    Args:
        n: Number of strips.
        seed: Another one gives other strips.
        panels: Of each comic page, 2 to 6, or objects of each scene, 2 to 8.
        kind: ``page``: panels with one to three objects each. ``scene``: the box of each object is a panel.
        split: Of the world.
        hard: Whether objects may be small, faint, blurred or overlapped.
    """
    draw: Callable[[DrawnImage], Strip] = {"page": _page, "scene": _scene}[kind]
    return [draw(image) for image in islice(_images(seed, panels, kind, split, hard), n)]


def _images(seed: int, panels: int, kind: Kind, split: Split, hard: bool) -> Iterator[DrawnImage]:
    """Images of so many panels, or of so many objects whose nouns all differ; none is smaller than two image tokens."""
    for index in count():
        image = make_image(generator(split, seed, f"strip/{kind}/{index}"), kind, split, Difficulty(hard=hard))
        nouns = [item.noun for item in image.objects]
        large = all((x1 - x0) * (y1 - y0) >= MIN_TOKENS * PATCH**2 for x0, y0, x1, y1 in (item.box for item in image.objects))
        if len(image.panels) == panels or (kind == "scene" and large and len(nouns) == len(set(nouns)) == panels):
            yield image


def _page(image: DrawnImage) -> Strip:
    texts = [[group.phrase() for group in grouped(image.in_panel(panel))] for panel in range(len(image.panels))]
    parts = [(f"In panel {ordinal} there is ", listed(what)) for ordinal, what in zip(ORDINALS, texts, strict=False)]
    questions = tuple(f"Describe panel {ordinal}." for ordinal in ORDINALS[: len(image.panels)])
    return _strip(image, "page", image.panels, parts, ". ", questions)


def _scene(image: DrawnImage) -> Strip:
    leads = ["There is ", *[", "] * (len(image.objects) - 2), " and "]
    parts = [(lead, Group((item,)).phrase()) for lead, item in zip(leads, image.objects, strict=True)]
    questions = tuple(f"What is {item.location}?" for item in image.objects)
    return _strip(image, "scene", tuple(item.box for item in image.objects), parts, "", questions)


def _strip(
    image: DrawnImage,
    kind: Literal["scene", "page"],
    boxes: tuple[tuple[int, int, int, int], ...],
    parts: list[tuple[str, str]],
    between: str,
    questions: tuple[str, ...],
) -> Strip:
    """A strip from its boxes and, for each, the words before its description and the description."""
    text, spans = "", []
    for lead, description in parts:
        text += f"{between if text else ''}{lead}"
        spans.append((len(text), len(text) + len(description)))
        text += description
    return Strip(image.draw(), boxes, f"{text}.", tuple(spans), PROMPTS[kind], questions)
