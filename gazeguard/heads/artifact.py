"""TODO heads.artifact."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedModel

from gazeguard.artifacts import read_json
from gazeguard.attention.backbone import Head, find_backbone, weight_of
from gazeguard.errors import InputError, MismatchError

MOST_LAYERS = 4096  # and heads of a layer, that a file may name


def fingerprint(model: PreTrainedModel) -> str:
    """Sixteen hex digits that tell models apart: the class, and a sample of each layer's output projection.

    The sample is rounded to bfloat16, so that the same weights loaded as fp32, fp16 or bf16 have one fingerprint.
    """
    backbone = find_backbone(model)
    digest = hashlib.sha256(f"{type(model).__name__}/{len(backbone.attention)}".encode())
    for layer in backbone.attention:
        weight = weight_of(backbone.projection(layer))
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)].to(torch.bfloat16).float()
        digest.update(f"{tuple(weight.shape)}".encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Score(BaseModel):
    """One way of scoring, for every head in the order of ``GazeHeads.all_heads``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mass: tuple[float, ...]
    selectivity: tuple[float, ...]
    contrast: tuple[float, ...]
    routing: tuple[float, ...] = Field(description="how often the most attended panel is the said one")
    null_mass: tuple[float, ...] = Field(description="mass with the said panels shuffled")
    sinks: tuple[float, ...] = Field(description="attention on sinks, which is left out of everything else")
    matrix: tuple[tuple[float, ...], ...] = Field(description="said x attended panel, mean over the gaze heads")

    @model_validator(mode="after")
    def _fits_together(self) -> Score:
        of_heads = [self.mass, self.selectivity, self.contrast, self.routing, self.null_mass, self.sinks]
        if len({len(figures) for figures in of_heads}) != 1:
            raise ValueError("mass, selectivity, contrast, routing, null_mass and sinks are not of one length")
        if any(len(row) != len(self.matrix) for row in self.matrix):
            raise ValueError("matrix is not square")
        if not np.isfinite([number for figures in (*of_heads, *self.matrix) for number in figures]).all():
            raise ValueError("every number must be finite")
        return self


class Step(BaseModel):
    """One token of a narration: its text, the panel it describes if any, and the gaze heads' mean mass on every panel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    said: int | None
    looked: tuple[float, ...]


Way = Literal["narration", "query"]
Rank = Literal["contrast", "mass", "selectivity"]


class GazeHeads(BaseModel):
    """A model's gaze heads and the figures behind them; immutable, saved as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    model: str = Field(description="fingerprint of the model")
    model_class: str
    heads: tuple[tuple[int, int], ...] = Field(description="the gaze heads as (layer, head), by layer")
    all_heads: tuple[tuple[int, int], ...]
    narration: Score | None = Field(description="None when the strips came without words")
    query: Score
    strips: int
    panels: int
    split_half: float = Field(description="share of the gaze heads that both halves of the strips agree on")
    unusable: str = Field(default="", description="why these heads do not tell where the model looks; empty if they do")
    staircase: tuple[Step, ...] = Field(default=(), description="one narration, token by token")

    @model_validator(mode="after")
    def _fits_together(self) -> GazeHeads:
        if strange := sorted(set(self.heads) - set(self.all_heads)):
            raise ValueError(f"heads: {strange[0]} is not in all_heads")
        for layer, head in self.all_heads:
            if not (0 <= layer < MOST_LAYERS and 0 <= head < MOST_LAYERS):
                raise ValueError(f"all_heads: {(layer, head)} is no head of any model")
        for name in ("heads", "all_heads"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name}: a head is there twice")
        for name in ("narration", "query"):
            score = getattr(self, name)
            if score is not None and len(score.mass) != len(self.all_heads):
                raise ValueError(f"{name}: it has figures of {len(score.mass)} heads, not of all {len(self.all_heads)}")
        panels = len(self.staircase[0].looked) if self.staircase else 0
        if any(len(step.looked) != panels or (step.said or 0) not in range(panels) for step in self.staircase):
            raise ValueError("staircase: its steps are not about the same panels")
        if not np.isfinite([number for step in self.staircase for number in step.looked]).all():
            raise ValueError("staircase: every number must be finite")
        return self

    @property
    def ranked_by(self) -> Way:
        """Which score chose the heads."""
        return "query" if self.narration is None else "narration"

    def score(self, way: Way | None = None) -> Score:
        """One of the scores, by default the one that chose the heads. Raises `InputError` for one that was not taken."""
        made = getattr(self, way or self.ranked_by)
        if made is None:
            raise InputError("These heads were found with strips without words, so they have no narration score.")
        return made

    def ranking(self, way: Way | None = None, by: Rank = "contrast") -> tuple[Head, ...]:
        """All heads, the best first."""
        order = np.argsort(-np.array(getattr(self.score(way), by)), kind="stable")
        return tuple(self.all_heads[i] for i in order)

    def mass(self, heads: Sequence[Head], way: Way | None = None) -> NDArray[np.float64]:
        """The mass of some heads, (len(heads),)."""
        where = {head: i for i, head in enumerate(self.all_heads)}
        return np.array([self.score(way).mass[where[head]] for head in heads])

    def others(self) -> tuple[Head, ...]:
        """All heads that are not gaze heads."""
        return tuple(head for head in self.all_heads if head not in set(self.heads))

    def with_heads(self, heads: Sequence[Head]) -> GazeHeads:
        """The same file with other heads in the place of the gaze heads: for controls."""
        return GazeHeads.model_validate(self.model_dump() | {"heads": tuple(sorted(heads)), "unusable": ""})

    def matched(self, rng: np.random.Generator) -> tuple[Head, ...]:
        """A random set of other heads with as many of every layer as the gaze heads have: a control.

        A layer that has too few gives what it has, and the layers after it make up for that.
        """
        drawn: list[Head] = []
        missing = 0
        for layer in sorted({layer for layer, _ in self.all_heads}):
            own = [head for head in self.others() if head[0] == layer]
            wanted = sum(head[0] == layer for head in self.heads) + missing
            missing = max(0, wanted - len(own))
            drawn += [own[i] for i in rng.permutation(len(own))[:wanted]]
        return tuple(sorted(drawn))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> GazeHeads:
        """Read a heads file. Raises `ArtifactError` for anything else."""
        return read_json(cls, path, "gaze heads", "gazeguard heads MODEL --out heads.json")

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise `MismatchError` unless these are the heads of this very model."""
        mine = fingerprint(model)
        if self.model != mine:
            raise MismatchError(
                f"These gaze heads belong to another model ({self.model_class}, fingerprint {self.model}); this one is "
                f"{type(model).__name__}, fingerprint {mine}. Find its own with find_heads(model, processor)."
            )
