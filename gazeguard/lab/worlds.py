"""Worlds of the laboratories, seen alike: test images, what is true of captions of them, and questions with true answers.

Each laboratory has its own drawings and its own truth; what evaluations and fits need of both is one `World`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

from PIL import Image

from gazeguard.claims.parse import Claim
from gazeguard.errors import InputError

WORLDS = ("tiny", "scenes")
QUESTIONS = 3  # per image


class Sample(Protocol):
    """An image of a laboratory; ``id`` is unique over splits and seeds."""

    @property
    def id(self) -> str:
        """Unique over splits and seeds."""

    @property
    def image(self) -> Image.Image:
        """The image, RGB."""

    @property
    def prompt(self) -> str:
        """The prompt to describe it."""


class Question(NamedTuple):
    """A yes/no question in POPE's form."""

    prompt: str
    yes: bool


class NamedObject(NamedTuple):
    """One object that a caption names, compared with the drawing.

    start, end: the characters of its noun
    noun:       in the singular
    present:    the drawing has such an object anywhere; CHAIR counts the others
    located:    it has one where the caption says, anywhere if it says nothing
    colour:     whether the colour is right; None when none is named, or nothing decides it
    panel:      the drawn object that is meant is in a panel
    """

    start: int
    end: int
    noun: str
    present: bool
    located: bool
    colour: bool | None
    panel: bool


@dataclass(frozen=True)
class World:
    """What a laboratory says of its images.

    name:       "tiny" or "scenes"
    splits:     the test splits, the usual one first
    samples:    split, number, seed -> images with their truth and a prompt
    nouns:      sample -> the nouns of what is drawn
    named:      sample, caption -> the objects that the caption names, in order
    decided:    sample, caption -> the claims that the drawing decides, each with whether it is false
    questions:  sample -> `QUESTIONS` yes/no questions
    true_caption: sample -> a caption that is true
    """

    name: str
    splits: tuple[str, ...]
    samples: Callable[[str, int, int], Sequence[Any]]
    nouns: Callable[[Any], frozenset[str]]
    named: Callable[[Any, str], list[NamedObject]]
    decided: Callable[[Any, str], list[tuple[Claim, bool]]]
    questions: Callable[[Any], list[Question]]
    true_caption: Callable[[Any], str]


@cache
def world(name: str = "tiny") -> World:
    """The world of a laboratory.

    Args:
        name: One of `WORLDS`. "scenes" draws with OpenMoji: the extra ``scenes``.

    Raises:
        InputError: The name is unknown.
    """
    if name not in WORLDS:
        raise InputError(f"Unknown lab {name!r}; expected one of: {', '.join(WORLDS)}.")
    return _tiny() if name == "tiny" else _scenes()


def _tiny() -> World:
    from gazeguard.lab.truth import decided_claims, mentions
    from gazeguard.lab.world import describe, samples, yes_no_question

    def named(sample: Any, caption: str) -> list[NamedObject]:
        return [
            NamedObject(
                mention.phrase.head.start,
                mention.phrase.head.end,
                mention.phrase.head.text.lower(),
                mention.present,
                mention.located,
                mention.colour if mention.located else None,
                mention.object is not None and mention.object.panel is not None,
            )
            for mention in mentions(sample.drawing, caption)
        ]

    def questions(sample: Any) -> list[Question]:
        rng = random.Random(sample.id)
        turns = [yes_no_question(sample.drawing, rng) for _ in range(QUESTIONS)]
        return [Question(turn.prompt, turn.answer.startswith("Yes")) for turn in turns]

    return World(
        "tiny",
        ("test", "shifted"),
        lambda split, n, seed: samples(split, n, seed),  # type: ignore[arg-type]
        lambda sample: frozenset(item.noun for item in sample.drawing.objects),
        named,
        lambda sample, caption: [(claim, false) for claim, _, false in decided_claims(sample.drawing, caption)],
        questions,
        lambda sample: describe(sample.drawing, random.Random(sample.id), honest=True),
    )


def _scenes() -> World:
    from gazeguard.lab.scenes.captions import describe_turn
    from gazeguard.lab.scenes.samples import samples
    from gazeguard.lab.scenes.truth import decided_claims, mentions

    def named(sample: Any, caption: str) -> list[NamedObject]:
        return [
            NamedObject(m.start, m.end, m.noun, m.present, m.placed, m.colour_right if m.placed else None, m.panel is not None)
            for m in mentions(sample.truth, caption)
        ]

    return World(
        "scenes",
        ("test", "shifted", "line"),
        lambda split, n, seed: samples(split, n, seed, "scene", QUESTIONS),  # type: ignore[arg-type]
        lambda sample: frozenset(item.noun for item in sample.truth.objects),
        named,
        lambda sample, caption: [(claim, false) for claim, _, false in decided_claims(sample.truth, caption)],
        lambda sample: [Question(turn.prompt, turn.answer.startswith("Yes")) for turn in sample.questions],
        lambda sample: describe_turn(random.Random(sample.id), sample.truth).answer,
    )
