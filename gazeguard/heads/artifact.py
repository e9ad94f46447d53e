"""Gaze heads artifact: which attention heads of a model carry its gaze, and the scores that chose them."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from gazeguard.artifacts import HEADS_FILE, find_file, push_folder, read_json
from gazeguard.attention.backbone import Head, find_backbone, weight_of
from gazeguard.errors import InputError, MismatchError, UnsupportedError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGGER = logging.getLogger("gazeguard")
MAX_INDEX = 4096  # of a layer, and of a head in it, that a file may name
FINGERPRINT_SAMPLES = 64  # weights of each matrix
HALF_FINGERPRINT = 16  # hex digits
REPR_HEADS = 6

Probe = Literal["narration", "query"]
Figure = Literal["contrast", "mass", "selectivity"]


def fingerprint(model: PreTrainedModel) -> str:
    """Thirty-two hex digits that tell models apart, by a sample of their weights.

    The first half is of the class and each layer's output projection, the second of all that decides where the model attends:
    queries, keys, values and outputs of every layer, the unembedding, and what lies outside of the decoder (vision encoder and
    connector). Samples are rounded to bfloat16, so that weights stored in half precision have one fingerprint however they are
    loaded.
    """
    backbone = find_backbone(model)
    text_decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder = {id(module) for module in text_decoder.modules()}
    parts = [*backbone.attention.values(), *filter(None, [model.get_output_embeddings()])]
    inner = {id(module) for part in parts for module in part.modules()}
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.ndim < 2 or (id(module) in decoder and id(module) not in inner):
            continue
        # an adapter changes something once it was trained: until then its second factor is zero
        if ".lora_" not in name or (".lora_B" in name and weight_of(module).any()):
            digest.update(_sample(weight_of(module)))
    return _output_fingerprint(model) + digest.hexdigest()[:HALF_FINGERPRINT]


def _output_fingerprint(model: PreTrainedModel) -> str:
    """The first half of a `fingerprint`."""
    weights = _outputs(model)
    digest = hashlib.sha256(f"{type(model).__name__}/{len(weights)}".encode())
    for weight in weights:
        digest.update(_sample(weight))
    return digest.hexdigest()[:HALF_FINGERPRINT]


def _difference(model: PreTrainedModel, heads: GazeHeads, actual: str) -> str:
    """In a sentence: what is likely to differ between a model of this fingerprint and that of the heads; "" for two classes."""
    if type(model).__name__ != heads.model_class:
        return ""
    if getattr(model, "is_quantized", False) or not all(_is_plain(weight) for weight in _outputs(model)):
        return " Its weights are quantised, which moves where it attends: heads are found for each such copy."
    if heads.model[:HALF_FINGERPRINT] == actual[:HALF_FINGERPRINT]:
        return (
            " The output projections of attention are the same, but not all other weights: this is a fine-tune of it (merged "
            "LoRA adapters mostly change queries and values), or it has another vision encoder or connector."
        )
    return (
        f" Other weights, or the same ones rounded to another dtype: these are {str(model.dtype).removeprefix('torch.')}, and "
        "only rounding to bfloat16 or from what the checkpoint stores keeps a fingerprint."
    )


def _outputs(model: PreTrainedModel) -> list[Tensor]:
    """The weights of the output projection of each layer."""
    backbone = find_backbone(model)
    return [weight_of(backbone.projection(layer)) for layer in backbone.attention]


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is one number for each of its elements, and not packed in fewer bits."""
    return weight.is_floating_point() and weight.element_size() > 1


def _sample(weight: Tensor) -> bytes:
    step = max(1, weight.numel() // FINGERPRINT_SAMPLES)
    sample = weight.detach().flatten()[::step].to(torch.bfloat16).float()
    return f"{tuple(weight.shape)}".encode() + sample.cpu().numpy().tobytes()


class Score(BaseModel):
    """What one probe says of every head, in the order of ``GazeHeads.all_heads``; see `gazeguard.heads.scoring`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mass: tuple[float, ...] = Field(description="attention mass on the described panel")
    selectivity: tuple[float, ...] = Field(description="its share of the attention mass on all panels")
    contrast: tuple[float, ...] = Field(description="attention mass on the described panel less the mean of the others")
    hit_rate: tuple[float, ...] = Field(description="how often the most attended panel is the described one")
    shuffled_mass: tuple[float, ...] = Field(description="mass with the described panels shuffled")
    sink_mass: tuple[float, ...] = Field(description="attention mass on sinks, which is left out of everything else")
    matrix: tuple[tuple[float, ...], ...] = Field(description="described x attended panel, mean over the gaze heads")

    @model_validator(mode="after")
    def _fits_together(self) -> Score:
        figures = {name: value for name, value in self if name != "matrix"}
        if len({len(values) for values in figures.values()}) != 1:
            raise ValueError(f"{', '.join(figures)} are not of one length")
        if any(len(row) != len(self.matrix) for row in self.matrix):
            raise ValueError("matrix is not square")
        if not np.isfinite([number for values in (*figures.values(), *self.matrix) for number in values]).all():
            raise ValueError("every number must be finite")
        return self


class Step(BaseModel):
    """One decoding step of a narration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(description="of the token")
    described_panel: int | None = Field(description="the panel that the token describes, if any")
    panel_mass: tuple[float, ...] = Field(description="mean attention mass of the gaze heads on every panel")


class GazeHeads(BaseModel):
    """A model's gaze heads and the figures behind them; immutable, saved as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[3] = 3
    model: str = Field(description="fingerprint of the model")
    model_class: str
    heads: tuple[tuple[int, int], ...] = Field(description="the gaze heads as (layer, head), by layer")
    all_heads: tuple[tuple[int, int], ...]
    narration: Score | None = Field(description="None when the strips came without narrations")
    query: Score
    strips: int = Field(description="number of strips that the heads were found with")
    panels: int = Field(description="number of panels of a strip")
    split_half: float = Field(description="share of the gaze heads that both halves of the strips agree on")
    length_agreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="of the gaze heads and those that the strips cut short would choose, the share that is in both sets: the "
        "least over the lengths; None where it was not measured",
    )
    unusable: str = Field(default="", description="why these heads do not follow the narration; empty if they do")
    staircase: tuple[Step, ...] = Field(default=(), description="one narration, token by token")

    def __repr__(self) -> str:
        listed = ", ".join(map(str, self.heads[:REPR_HEADS])) + (", ..." if len(self.heads) > REPR_HEADS else "")
        state = ", unusable" if self.unusable else ""
        return f"GazeHeads({len(self.heads)} of {len(self.all_heads)} heads of {self.model_class}{state}: {listed})"

    def __str__(self) -> str:
        return repr(self)

    @model_validator(mode="after")
    def _fits_together(self) -> GazeHeads:
        if strange := sorted(set(self.heads) - set(self.all_heads)):
            raise ValueError(f"heads: {strange[0]} is not in all_heads")
        for layer, head in self.all_heads:
            if not (0 <= layer < MAX_INDEX and 0 <= head < MAX_INDEX):
                raise ValueError(f"all_heads: {(layer, head)} is no head of any model")
        for name in ("heads", "all_heads"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name}: a head is there twice")
        for name in ("narration", "query"):
            score = getattr(self, name)
            if score is not None and len(score.mass) != len(self.all_heads):
                raise ValueError(f"{name}: it has figures of {len(score.mass)} heads, not of all {len(self.all_heads)}")
        panels = len(self.staircase[0].panel_mass) if self.staircase else 0
        if any(len(step.panel_mass) != panels or (step.described_panel or 0) not in range(panels) for step in self.staircase):
            raise ValueError("staircase: its steps are not about the same panels")
        if not np.isfinite([number for step in self.staircase for number in step.panel_mass]).all():
            raise ValueError("staircase: every number must be finite")
        return self

    @property
    def ranked_by(self) -> Probe:
        """Which probe chose the heads."""
        return "query" if self.narration is None else "narration"

    def score(self, probe: Probe | None = None) -> Score:
        """The score of a probe, by default of the one that chose the heads.

        Raises:
            InputError: The heads were found without this probe.
        """
        score: Score | None = getattr(self, probe or self.ranked_by)
        if score is None:
            raise InputError(
                "These heads were found with strips without narrations, so they have no narration score. Ask for the score "
                'of "query", or find heads with strips that have narrations.'
            )
        return score

    def ranking(self, probe: Probe | None = None, by: Figure = "contrast") -> tuple[Head, ...]:
        """All heads, the best first."""
        order = np.argsort(-np.array(getattr(self.score(probe), by)), kind="stable")
        return tuple(self.all_heads[i] for i in order)

    def mass(self, heads: Sequence[Head], probe: Probe | None = None) -> NDArray[np.float64]:
        """(len(heads),) float64: the attention mass of some heads on the described panel."""
        index = {head: i for i, head in enumerate(self.all_heads)}
        return np.array([self.score(probe).mass[index[head]] for head in heads])

    def check_usable(self) -> None:
        """Raise `UnsupportedError`, with the reason, where the heads do not follow the narration."""
        if self.unusable:
            raise UnsupportedError(f"The gaze heads of {self.model_class} are unusable. {self.unusable}")

    def others(self) -> tuple[Head, ...]:
        """All heads that are not gaze heads."""
        return tuple(head for head in self.all_heads if head not in set(self.heads))

    def with_heads(self, heads: Sequence[Head]) -> GazeHeads:
        """The same artifact with other heads in the place of the gaze heads: for controls."""
        return GazeHeads.model_validate(self.model_dump() | {"heads": tuple(sorted(heads)), "unusable": ""})

    def matched(self, rng: np.random.Generator) -> tuple[Head, ...]:
        """A random set of other heads with as many of every layer as the gaze heads have: a control.

        A layer that has too few gives what it has, and the layers after it make up for that. Where most heads of a layer are
        gaze heads there are few such sets, and draws repeat: `distinct_matched_sets` counts them, and where there is one alone
        a warning is logged.
        """
        if self.distinct_matched_sets() == 1:
            LOGGER.warning("There is only 1 distinct layer-matched set of other heads: every draw of this control is the same.")
        drawn: list[Head] = []
        for pool, wanted in self._pools():
            drawn += [pool[i] for i in rng.permutation(len(pool))[:wanted]]
        return tuple(sorted(drawn))

    def distinct_matched_sets(self) -> int:
        """How many different sets `matched` can draw. A control with ten sets needs at least ten."""
        return math.prod(math.comb(len(pool), min(len(pool), wanted)) for pool, wanted in self._pools())

    def _pools(self) -> list[tuple[list[Head], int]]:
        """For each layer the heads that are no gaze heads, and how many of them a matched set takes."""
        pools, missing = [], 0
        for layer in sorted({layer for layer, _ in self.all_heads}):
            pool = [head for head in self.others() if head[0] == layer]
            wanted = sum(head[0] == layer for head in self.heads) + missing
            missing = max(0, wanted - len(pool))
            pools.append((pool, wanted))
        return pools

    def to_json(self) -> str:
        """The content of a heads file."""
        return self.model_dump_json(indent=1) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``heads.json`` into a folder, which is created if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEADS_FILE).write_text(self.to_json(), encoding="utf-8")

    def push_to_hub(self, repo_id: str, api: HfApi | None = None, **upload: Any) -> str:
        """Upload what `save_pretrained` writes to the hub; returns the address of the commit.

        Args:
            repo_id: The repository (``owner/name``); created if need be.
            api: A client with your own token or endpoint.
            **upload: Options of `HfApi.upload_folder` (``commit_message``, ``create_pr``, ...).
        """
        return push_folder(self.save_pretrained, repo_id, api, **upload)

    @classmethod
    def from_pretrained(cls, path: str | Path, **download: Any) -> GazeHeads:
        """Read gaze heads from a folder, a file, or a repository of the hub (``owner/name``).

        Args:
            path: Folder, file or repository.
            **download: Options of `huggingface_hub.hf_hub_download` (``revision``, ``token``, ``cache_dir``, ...).

        Raises:
            ArtifactError: There is no such file, or it is not one of gaze heads.
        """
        return read_json(cls, find_file(path, HEADS_FILE, **download), "gaze heads", "gazeguard heads MODEL")

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise `MismatchError` unless these are the heads of this very model."""
        actual = fingerprint(model)
        if self.model != actual:
            raise MismatchError(
                f"These gaze heads belong to another model ({self.model_class}, fingerprint {self.model}); this one is "
                f"{type(model).__name__}, fingerprint {actual}.{_difference(model, self, actual)} Find its own: "
                "gazeguard fit, or find_heads(model, processor) in Python."
            )
