"""Which heads look? Finds a model's gaze heads with comic strips whose panels are known, and keeps them in a file.

Every head gets two scores from the same strips, each a (said panel x attended panel) matrix of attention mass:

* ``narration``: the rows that predict the words about a panel, in a narration of the whole strip;
* ``query``: the last row of a prompt that asks about one panel (Gandikota & Bau 2026, arXiv 2606.14703, section 3).

*Mass* is the mean of the matrix's diagonal; *selectivity* the same after each row is divided by its sum, so that a head
that merely likes pictures scores 1/panels. Heads are ranked by *contrast*, the diagonal minus the mean of the rest: it
keeps the scale of mass and takes away what does not move with the words. The null shuffles which panel was said.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, ProcessorMixin

from gazeguard.comics import Strip, draw_strips
from gazeguard.errors import ArtifactError, MismatchError, UnsupportedError
from gazeguard.grid import ImageGrid
from gazeguard.inputs import encode, grids_of, model_inputs
from gazeguard.tap import Head, Prompts, Tap, find_backbone, keys_of, weight_of

MAX_FILE_BYTES = 16 * 2**20
MAX_SHARE = 0.25  # at most this share of all heads are gaze heads


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
    null_mass: tuple[float, ...] = Field(description="mass with the said panels shuffled")


class GazeHeads(BaseModel):
    """A model's gaze heads and the figures behind them; immutable, saved as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: str = Field(description="fingerprint of the model")
    model_class: str
    heads: tuple[tuple[int, int], ...] = Field(description="the gaze heads as (layer, head), by layer")
    all_heads: tuple[tuple[int, int], ...]
    narration: Score
    query: Score
    strips: int
    panels: int
    split_half: float = Field(description="share of the gaze heads that both halves of the strips agree on")

    def mass(self, heads: Sequence[Head], score: Literal["narration", "query"] = "narration") -> NDArray[np.float64]:
        """The mass of some heads, (len(heads),)."""
        where = {head: i for i, head in enumerate(self.all_heads)}
        return np.array([getattr(self, score).mass[where[head]] for head in heads])

    def others(self) -> tuple[Head, ...]:
        """All heads that are not gaze heads."""
        return tuple(head for head in self.all_heads if head not in set(self.heads))

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


def read_json(kind: type[Any], path: str | Path, what: str, maker: str) -> Any:
    """A pydantic model from a JSON file of bounded size. Raises `ArtifactError` with what is wrong and what writes one."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_FILE_BYTES} bytes, more than any file of {what}.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, numbers without end
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} cannot be read as a file of {what} ({error}). {maker} writes one.") from error
    try:
        return kind.model_validate(data, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise ArtifactError(f"{path} is not a file of {what}: {where}: {first['msg']}. {maker} writes one.") from error


# ------------------------------------------------------------------------------------------------------ discovery


def find_heads(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    strips: Sequence[Strip] | None = None,
    batch_size: int = 8,
    progress: bool = True,
    grid: ImageGrid | None = None,
) -> GazeHeads:
    """Score every head of ``model`` on comic strips and choose the gaze heads.

    strips: defaults to 48 drawn pages of six panels; all must have the same number of panels, at least two
    grid:   where the cells of every prompt lie, for a model whose layout no rule of `gazeguard.grid` knows
    Raises `UnsupportedError` when the model cannot be watched, or when no head follows the words: the best head must hold
    twice the chance share of its panel attention on the panel being described.
    """
    strips = draw_strips(48) if strips is None else list(strips)
    panels = {len(strip.panels) for strip in strips}
    if len(strips) < 2 or len(panels) != 1 or min(panels) < 2:
        raise ArtifactError(
            f"Finding heads needs at least two strips with the same number of panels, two or more; "
            f"got {len(strips)} strips with {sorted(panels)} panels."
        )
    heads = find_backbone(model).heads()
    matrices: dict[str, list[NDArray[np.float32]]] = {"narration": [], "query": []}
    groups = [strips[i : i + batch_size] for i in range(0, len(strips), batch_size)]
    with torch.no_grad(), Tap(model, heads) as tap:
        for group in track(groups, "finding gaze heads", console=Console(stderr=True), disable=not progress):
            matrices["narration"] += _narrations(tap, model, processor, group, grid)
            matrices["query"] += _queries(tap, model, processor, group, grid)
    return _choose(model, heads, {name: np.stack(values) for name, values in matrices.items()})


def _narrations(
    tap: Tap, model: PreTrainedModel, processor: ProcessorMixin, strips: Sequence[Strip], known: ImageGrid | None
) -> list[Any]:
    """For each strip (H, said panel, attended panel): mean mass of the rows that predict a panel's words."""
    batch = encode(model, processor, [s.image for s in strips], [s.prompt for s in strips], [s.narration for s in strips])
    gaze = _gaze_on_panels(tap, model, processor, batch, strips, known)  # (batch, T, H, panels)
    return [
        np.stack([row[: len(told)][_tokens(told, span)].mean(0) for span in strip.spans], axis=1)
        for row, told, strip in zip(gaze, batch.offsets, strips, strict=True)
    ]


def _queries(
    tap: Tap, model: PreTrainedModel, processor: ProcessorMixin, strips: Sequence[Strip], known: ImageGrid | None
) -> list[Any]:
    """For each strip (H, asked panel, attended panel): mass of the prompt's last row."""
    matrices = []
    for strip in strips:
        count = len(strip.questions)
        batch = encode(model, processor, [strip.image] * count, list(strip.questions))
        matrices.append(_gaze_on_panels(tap, model, processor, batch, [strip] * count, known)[:, 0].transpose(1, 0, 2))
    return matrices


def _gaze_on_panels(
    tap: Tap,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: Any,
    strips: Sequence[Strip],
    known: ImageGrid | None,
) -> NDArray[np.float32]:
    """(batch, T, H, panels): attention mass on each panel, summed on the model's device."""
    keys = keys_of(model, batch.prompt, batch.prompt_ids, batch.prompt_mask)
    prompts = Prompts.of(*keys)
    grids = grids_of(model, processor, batch.inputs, keys.ids, keys.mask, [[strip.image.size] for strip in strips], known)
    regions = torch.zeros(len(strips), prompts.columns.shape[1], len(strips[0].panels))
    for row, (grid, strip) in enumerate(zip(grids, strips, strict=True)):
        regions[row, : len(grid)] = torch.from_numpy(panel_shares(grid, strip))
    tap.begin(prompts, regions.to(model.device))
    model(**model_inputs(model, batch.inputs), use_cache=False)
    return tap.collect().gaze.cpu().numpy()


def panel_shares(grid: ImageGrid, strip: Strip) -> NDArray[np.float32]:
    """(cells, panels) float32: the share of each cell that lies in each panel."""
    return np.stack([grid.overlap(tuple(map(float, box))) for box in strip.panels], axis=1)


def _tokens(offsets: NDArray[np.int64], span: tuple[int, int]) -> NDArray[np.bool_]:
    return (offsets[:, 0] < span[1]) & (offsets[:, 1] > span[0])


def contrast(matrices: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Diagonal minus the mean of the rest: (..., panels, panels) -> (...)."""
    panels = matrices.shape[-1]
    diagonal = np.trace(matrices, axis1=-2, axis2=-1) / panels
    rest = (matrices.sum((-2, -1)) - diagonal * panels) / (panels * (panels - 1))
    return diagonal - rest


def _score(matrices: NDArray[np.float32], rng: np.random.Generator) -> Score:
    """``matrices``: (strips, H, said, attended)."""
    mean = matrices.mean(0, dtype=np.float64)
    diagonal = np.arange(mean.shape[-1])
    shares = mean / np.maximum(mean.sum(-1, keepdims=True), 1e-12)
    shuffled = np.stack([matrix[:, rng.permutation(len(diagonal))] for matrix in matrices]).mean(0)
    return Score(
        mass=_rounded(mean[:, diagonal, diagonal].mean(-1)),
        selectivity=_rounded(shares[:, diagonal, diagonal].mean(-1)),
        contrast=_rounded(contrast(mean)),
        null_mass=_rounded(shuffled[:, diagonal, diagonal].mean(-1)),
    )


def _rounded(values: NDArray[np.floating[Any]]) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)


def gap(scores: NDArray[np.floating[Any]]) -> int:
    """How many heads stand out: the place of the largest drop in the ranked scores, at most `MAX_SHARE` of them."""
    ranked = np.sort(scores)[::-1]
    most = max(1, int(len(ranked) * MAX_SHARE))
    return int(np.argmax(ranked[:most] - np.append(ranked, 0.0)[1 : most + 1])) + 1


def _choose(model: PreTrainedModel, heads: Sequence[Head], matrices: dict[str, NDArray[np.float32]]) -> GazeHeads:
    said = matrices["narration"]
    panels = said.shape[-1]
    ranking = contrast(said.mean(0))
    k = gap(ranking)
    narration, query = (_score(matrices[name], np.random.default_rng(0)) for name in ("narration", "query"))
    best = int(np.argmax(ranking))
    if narration.selectivity[best] < 2 / panels:
        raise UnsupportedError(
            f"No usable gaze heads: the best head of {type(model).__name__}, {heads[best]}, holds "
            f"{narration.selectivity[best]:.2f} of its panel attention on the panel being described, where chance is "
            f"{1 / panels:.2f}. Gaze cannot be read from this model with these strips."
        )
    chosen = set(np.argsort(-ranking)[:k].tolist())
    halves = [set(np.argsort(-contrast(said[half::2].mean(0)))[:k].tolist()) for half in (0, 1)]
    return GazeHeads(
        model=fingerprint(model),
        model_class=type(model).__name__,
        heads=tuple(itertools.compress(heads, (i in chosen for i in range(len(heads))))),
        all_heads=tuple(heads),
        narration=narration,
        query=query,
        strips=len(said),
        panels=panels,
        split_half=round(len(halves[0] & halves[1]) / k, 6),
    )
