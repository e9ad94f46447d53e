"""Samples of the scenes lab: images with their truth and conversations, by split, seed and index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from gazeguard.lab.scenes.captions import Turn, yes_no_turn
from gazeguard.lab.scenes.world import DrawnImage, Kind, Split, generator, make_image

PROMPTS: dict[Kind, str] = {"scene": "Describe the picture.", "page": "Describe all panels."}


@dataclass(frozen=True, slots=True)
class Sample:
    """An image, its truth, the prompt to describe it, and questions with their true answers.

    id: unique over splits, seeds and kinds
    """

    id: str
    truth: DrawnImage
    prompt: str
    questions: tuple[Turn, ...]

    @property
    def image(self) -> Image.Image:
        """The image, RGB, SIZE x SIZE."""
        return self.truth.draw()


def samples(
    split: Split, n: int, seed: int = 0, kind: Literal["scene", "page", "both"] = "scene", questions: int = 4
) -> list[Sample]:
    """``n`` images of a split with a prompt to describe them; ``both`` alternates scenes and comic pages.

    Args:
        split: train, validation, test, shifted (themes mixed) or line (black outlines).
        n: The number of images.
        seed: Another seed gives other images.
        kind: Scenes, comic pages, or both in turn.
        questions: Yes/no questions per image, about half of them true.

    Raises:
        InputError: The split is unknown.
    """
    drawn = []
    for index in range(n):
        this: Kind = ("scene", "page")[index % 2] if kind == "both" else kind
        rng = generator(split, seed, f"{this}/{index}")
        truth = make_image(rng, this, split)
        turns = tuple(yes_no_turn(rng, truth) for _ in range(questions))
        drawn.append(Sample(f"{split}/{seed}/{this}/{index}", truth, PROMPTS[this], turns))
    return drawn
