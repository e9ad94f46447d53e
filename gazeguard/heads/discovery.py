"""Which heads look? Finds a model's gaze heads with comic strips whose panels are known, and keeps them in a file.

Every head gets two scores from the same strips, each a (said panel x attended panel) matrix of attention mass:

* ``narration``: the rows that predict the words about a panel, in a narration of the whole strip;
* ``query``: the last row of a prompt that asks about one panel (Gandikota & Bau 2026, arXiv 2606.14703, section 3).

*Mass* is the mean of the matrix's diagonal; *selectivity* the same after each row is divided by its sum, so that a head
that merely likes pictures scores 1/panels (Das 2026, arXiv 2609.14174). Heads are ranked by *contrast*, the diagonal minus
the mean of the rest: it keeps the scale of mass and takes away what does not move with the words. *Routing* is how often
the most attended panel is the one that was said. The null shuffles which panel was said. Panels of unlike area are weighed
to the mean area. Sinks, cells that get much attention whatever is said, are found per head and picture and left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from gazeguard.attention.backbone import Head, find_backbone
from gazeguard.attention.buffers import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.visual_keys import visual_keys
from gazeguard.errors import ArtifactError, InputError, MismatchError
from gazeguard.heads.artifact import GazeHeads, Score, Step, Way, fingerprint
from gazeguard.heads.strips import Strip, draw_strips
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.encoding import EncodedBatch, encode
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.inputs import model_inputs

MAX_SHARE = 0.25  # at most this share of all heads are gaze heads
SINK = 10.0  # a cell is a sink when it gets so many times the mean cell's attention, whatever is said
MIN_CELLS = 2  # image cells that a panel needs
MIN_SEEN, LATTICE = 0.9, 16  # share of a panel that the processor must keep, on a lattice of so many points each way


def find_heads(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    strips: Sequence[Strip] | None = None,
    batch_size: int = 8,
    progress: bool = True,
    grid: ImageGrid | None = None,
    keep: str | Path | None = None,
) -> GazeHeads:
    """Score every head of ``model`` on comic strips and choose the gaze heads.

    strips: at most so many are shown, fewer when the choice no longer changes; all must have the same number of panels, at
            least two. Defaults to 48 drawn pages of six panels
    grid:   where the cells of every prompt lie, for a model whose layout no rule of `gazeguard.grid` knows
    keep:   a file for what has been seen so far, so that an interrupted search goes on where it stopped
    ``unusable`` of the result says whether the heads follow the words at all; a guard refuses heads that do not.
    Raises `UnsupportedError` when the model cannot be watched, `InputError` for strips that it cannot be shown.
    """
    strips = draw_strips(48) if strips is None else list(strips)
    panels = {len(strip.panels) for strip in strips}
    if len(strips) < 2 or len(panels) != 1 or min(panels) < 2:
        raise InputError(
            f"Finding heads needs at least two strips with the same number of panels, two or more; "
            f"got {len(strips)} strips with {sorted(panels)} panels."
        )
    heads = find_backbone(model).heads()
    ways: dict[Way, Callable[[_Show], NDArray[np.float32]]] = {"narration": _narrations, "query": _queries}
    if not all(strip.narration for strip in strips):
        del ways["narration"]
    kept = None if keep is None else _Kept(Path(keep), f"{fingerprint(model)}/{_digest(strips)}")
    count = min(panels)
    seen = {} if kept is None else kept.load(set(ways), (len(heads), count, count + 1))
    groups = [strips[i : i + batch_size] for i in range(len(seen.get("query", ())), len(strips), batch_size)]
    with torch.no_grad(), AttentionRecorder(model, heads) as recorder:
        for group in track(groups, "finding gaze heads", console=Console(stderr=True), disable=not progress):
            if seen and settled(next(iter(seen.values()))):
                break
            show = _Show(recorder, model, processor, grid, group)
            made = {way: look(show) for way, look in ways.items()}
            seen = {way: np.concatenate([seen[way], new]) if seen else new for way, new in made.items()}
            if kept is not None:
                kept.save(seen)
    found = _choose(model, heads, {way: seen[way] for way in ways})
    if "narration" not in ways:
        return found
    with torch.no_grad(), AttentionRecorder(model, found.heads) as recorder:
        staircase = _staircase(_Show(recorder, model, processor, grid, strips[:1]))
    return found.model_copy(update={"staircase": staircase})


def settled(seen: NDArray[np.float32], patience: int = 8) -> bool:
    """Whether more strips would choose the same heads: both halves agree on them, and the last ``patience`` strips changed
    nothing. ``seen``: (strips, H, said, attended + 1)
    """
    if len(seen) < 3 * patience:
        return False
    seen = seen[..., :-1]
    top = _top(seen)
    return top == _top(seen[:-patience]) and _agreement(seen, len(top)) == 1


@dataclass(frozen=True)
class _Kept:
    """What has been seen, on disk: one safetensors file, which says of what model and strips it is."""

    path: Path
    source: str

    def save(self, seen: Mapping[str, NDArray[np.float32]]) -> None:
        new = self.path.with_name(self.path.name + ".new")
        # safetensors writes the memory of an array as it lies, whatever its strides say.
        save_file({way: np.ascontiguousarray(made) for way, made in seen.items()}, new, metadata={"source": self.source})
        new.replace(self.path)

    def load(self, ways: set[Way], shape: tuple[int, int, int]) -> dict[str, NDArray[np.float32]]:
        """What has been seen in these ways, (strips, *shape) each; nothing when there is no file."""
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, "np") as file:
                source = (file.metadata() or {}).get("source")
                seen = {way: file.get_tensor(way) for way in sorted(file.keys())}
        except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:  # types that numpy lacks
            raise ArtifactError(f"{self.path} is no interrupted search for heads ({error}). Delete it.") from error
        if source != self.source:
            raise MismatchError(f"{self.path} holds a search with another model or other strips. Delete it, or keep another.")
        shapes = {made.shape for made in seen.values()}
        if set(seen) != ways or len(shapes) != 1 or shapes.pop()[1:] != shape:
            raise ArtifactError(f"{self.path} does not hold what an interrupted search has seen. Delete it.")
        return seen


def _digest(strips: Sequence[Strip]) -> str:
    digest = hashlib.sha256()
    for strip in strips:
        digest.update(repr((strip.panels, strip.narration, strip.questions)).encode() + strip.image.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Show:
    """Some strips in front of a model whose heads are listened to."""

    recorder: AttentionRecorder
    model: PreTrainedModel
    processor: ProcessorMixin
    known: ImageGrid | None
    strips: Sequence[Strip]

    def looks(self, batch: EncodedBatch, shown: Sequence[Strip], reduce: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What ``reduce`` makes of each layer's gaze (batch, K, r, cells) and the panels' shares of the cells (batch, cells,
        panels), in one pass over a batch whose rows show the strips ``shown``.
        """
        keys = visual_keys(self.model, batch.prompt, batch.prompt_ids, batch.prompt_mask)
        prompts = KeyLayout.from_ids(*keys)
        sizes = [[strip.image.size] for strip in shown]
        grids = image_grids(self.model, self.processor, batch.inputs, keys.ids, keys.mask, sizes, self.known)
        regions = torch.zeros(len(shown), prompts.columns.shape[1], len(shown[0].panels))
        for row, (grid, strip) in enumerate(zip(grids, shown, strict=True)):
            shares = panel_shares(grid, strip)
            regions[row, : len(grid)] = torch.from_numpy(shares * (shares.sum(0).mean() / shares.sum(0)))
        regions = regions.to(self.model.device)
        self.recorder.begin(prompts, lambda gaze: reduce(gaze, regions))
        self.model(**model_inputs(self.model, batch.inputs), use_cache=False)
        return self.recorder.reduced_gaze()

    def narrated(self) -> EncodedBatch:
        """The strips, each with its prompt and its narration."""
        told = [[getattr(strip, name) for strip in self.strips] for name in ("image", "prompt", "narration")]
        return encode(self.model, self.processor, *told)

    def spoken(self, batch: EncodedBatch) -> Tensor:
        """(strips, said, T) bool: the tokens that describe each panel."""
        longest = max(map(len, batch.offsets))
        spoken = torch.zeros(len(self.strips), len(self.strips[0].panels), longest, dtype=torch.bool)
        for row, (strip, told) in enumerate(zip(self.strips, batch.offsets, strict=True)):
            for panel, (start, end) in enumerate(strip.spans):
                spoken[row, panel, : len(told)] = torch.from_numpy((told[:, 0] < end) & (told[:, 1] > start))
        return spoken.to(self.model.device)


def _narrations(show: _Show) -> NDArray[np.float32]:
    """(strips, H, said panel, attended panel + 1): mean mass of the rows that predict a panel's words; last, on sinks."""
    batch = show.narrated()
    spoken = show.spoken(batch).float()
    weights = spoken / spoken.sum(-1, keepdim=True).clamp(min=1)

    def reduce(gaze: Tensor, regions: Tensor) -> Tensor:
        return _without_sinks(weights[:, None] @ gaze[:, :, : weights.shape[-1]], regions)

    return show.looks(batch, show.strips, reduce).transpose(1, 2).cpu().numpy()


def _queries(show: _Show) -> NDArray[np.float32]:
    """(strips, H, asked panel, attended panel + 1): mass of the row that predicts the answer's first word; last, on sinks."""
    panels = len(show.strips[0].panels)

    def reduce(gaze: Tensor, regions: Tensor) -> Tensor:
        asked = gaze[:, :, 0].unflatten(0, (-1, panels)).transpose(1, 2)  # (strips, K, asked, cells)
        return _without_sinks(asked, regions[::panels])

    few = max(1, len(show.strips) // panels)  # strips at once, so that the batch is no larger than that of the narrations
    made = []
    for i in range(0, len(show.strips), few):
        shown = [strip for strip in show.strips[i : i + few] for _ in strip.questions]
        questions = [question for strip in show.strips[i : i + few] for question in strip.questions]
        batch = encode(show.model, show.processor, [strip.image for strip in shown], questions)
        made.append(show.looks(batch, shown, reduce).transpose(1, 2).cpu().numpy())
    return np.concatenate(made)


def _staircase(show: _Show) -> tuple[Step, ...]:
    """The narration of one strip, token by token, and where the heads of the recorder look on average."""
    batch = show.narrated()
    spoken = show.spoken(batch)[0]
    looked = show.looks(batch, show.strips, lambda gaze, regions: gaze @ regions[:, None])[0].mean(1).cpu().numpy()
    return tuple(
        Step(
            text=show.strips[0].narration[start:end],
            said=int(spoken[:, token].int().argmax()) if spoken[:, token].any() else None,
            looked=_rounded(looked[token]),
        )
        for token, (start, end) in enumerate(batch.offsets[0].tolist())
    )


def _without_sinks(looked: Tensor, regions: Tensor) -> Tensor:
    """(batch, K, said, panels + 1) mass on the panels, and last on sinks, from ``looked`` (batch, K, said, cells).

    A sink is a cell that gets `SINK` times the mean cell's attention whatever is said. It is found for every head and
    picture from these very rows; no list of dimensions or tokens is needed.
    """
    cells = (regions.sum(-1) > 0).sum(-1)[:, None, None]
    mean = looked.sum(-1).mean(-1, keepdim=True) / cells
    sinks = (looked.amin(2) > SINK * mean)[:, :, None]
    return torch.cat((looked.masked_fill(sinks, 0) @ regions[:, None], (looked * sinks).sum(-1, keepdim=True)), dim=-1)


def panel_shares(grid: ImageGrid, strip: Strip) -> NDArray[np.float32]:
    """(cells, panels) float32: the share of each cell that lies in each panel.

    Raises `InputError` when the processor cuts panels away, or leaves them fewer than `MIN_CELLS` cells.
    """
    width, height = grid.sizes[0]
    shares = np.stack([grid.overlap(tuple(map(float, box))) for box in strip.panels], axis=1)
    x0, y0, x1, y1 = np.nan_to_num(grid.boxes * np.array([width, height] * 2, np.float32)).T
    for number, box in enumerate(strip.panels):
        x, y = (np.linspace(box[i], box[i + 2], 2 * LATTICE + 1)[1::2, None] for i in (0, 1))
        across, down = (x0 <= x) & (x <= x1), (y0 <= y) & (y <= y1)  # (lattice, cells)
        seen = (down.astype(np.float32) @ across.T.astype(np.float32) > 0).mean()
        if seen < MIN_SEEN:
            raise InputError(
                f"The model sees {seen:.0%} of panel {number + 1}: its processor cuts the {width} x {height} picture. Show it "
                "strips of a shape that it keeps: draw_strips(n, size=(side, side)) for one that crops to a square."
            )
        if shares[:, number].sum() < MIN_CELLS:
            raise InputError(
                f"Panel {number + 1} of {len(strip.panels)} has {shares[:, number].sum():.1f} image cells; telling panels "
                f"apart needs {MIN_CELLS} each. Show the model larger pictures, or strips with fewer panels."
            )
    return shares


def contrast(matrices: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Diagonal minus the mean of the rest: (..., panels, panels) -> (...)."""
    panels = matrices.shape[-1]
    diagonal = np.trace(matrices, axis1=-2, axis2=-1) / panels
    rest = (matrices.sum((-2, -1)) - diagonal * panels) / (panels * (panels - 1))
    return diagonal - rest


def routing(matrices: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Whether the most attended panel is the said one: (..., said, attended) -> (..., said)."""
    return matrices.argmax(-1) == np.arange(matrices.shape[-1])


def _score(matrices: NDArray[np.float32], rng: np.random.Generator, chosen: Sequence[int] = ()) -> Score:
    """``matrices``: (strips, H, said, attended + 1), sinks last; ``chosen``: which heads are the gaze heads."""
    matrices, sinks = matrices[..., :-1], matrices[..., -1]
    mean = matrices.mean(0, dtype=np.float64)
    diagonal = np.arange(mean.shape[-1])
    shares = mean / np.maximum(mean.sum(-1, keepdims=True), 1e-12)
    shuffled = np.stack([matrix[:, rng.permutation(len(diagonal))] for matrix in matrices]).mean(0)
    return Score(
        mass=_rounded(mean[:, diagonal, diagonal].mean(-1)),
        selectivity=_rounded(shares[:, diagonal, diagonal].mean(-1)),
        contrast=_rounded(contrast(mean)),
        routing=_rounded(routing(matrices).mean((0, 2))),
        null_mass=_rounded(shuffled[:, diagonal, diagonal].mean(-1)),
        sinks=_rounded(sinks.mean((0, 2))),
        matrix=tuple(_rounded(row) for row in mean[list(chosen)].mean(0)) if len(chosen) else (),
    )


def _rounded(values: NDArray[np.floating[Any]]) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)


def gap(scores: NDArray[np.floating[Any]]) -> int:
    """How many heads stand out: the place of the largest drop in the ranked scores, at most `MAX_SHARE` of them."""
    ranked = np.sort(scores)[::-1]
    most = max(1, int(len(ranked) * MAX_SHARE))
    return int(np.argmax(ranked[:most] - np.append(ranked, 0.0)[1 : most + 1])) + 1


def _top(matrices: NDArray[np.float32], k: int | None = None) -> frozenset[int]:
    """The ``k`` heads of highest contrast, by default those above the gap; ``matrices``: (strips, H, said, attended)."""
    ranking = contrast(matrices.mean(0))
    return frozenset(np.argsort(-ranking)[: gap(ranking) if k is None else k].tolist())


def _agreement(matrices: NDArray[np.float32], k: int) -> float:
    """Share of the top ``k`` heads that both halves of the strips agree on."""
    halves = [_top(matrices[half::2], k) for half in (0, 1)]
    return len(halves[0] & halves[1]) / k


def _choose(model: PreTrainedModel, heads: Sequence[Head], seen: Mapping[Way, NDArray[np.float32]]) -> GazeHeads:
    """The heads above the gap, with the figures behind them; ``seen`` as `_score` takes it."""
    ranked = seen.get("narration", seen["query"])[..., :-1]
    chosen = sorted(_top(ranked))
    scores = {way: _score(seen[way], np.random.default_rng(0), chosen) for way in seen}
    return GazeHeads(
        model=fingerprint(model),
        model_class=type(model).__name__,
        heads=tuple(heads[i] for i in chosen),
        all_heads=tuple(heads),
        narration=scores.get("narration"),
        query=scores["query"],
        strips=len(ranked),
        panels=ranked.shape[-1],
        split_half=round(_agreement(ranked, len(chosen)), 6),
        unusable=_verdict(ranked[:, chosen].mean(1), len(chosen), len(heads)),
    )


def _verdict(together: NDArray[np.float32], k: int, all_heads: int) -> str:
    """Why the ``k`` chosen heads are no gaze heads, or "" when they are; ``together``: their mean, (strips, said, attended).

    They must look at the said panel most in at least half of what chance leaves (heads whose attention is fixed in space are
    at chance), and hold on it at least half of what they hold on all panels, or twice what a shuffle leaves.
    """
    panels = together.shape[-1]
    hits, chance = float(routing(together).mean()), 1 / panels
    mass = float(np.trace(together.mean(0)) / panels)
    share = mass / max(1e-12, float(together.sum(-1).mean()))
    if hits >= (1 + chance) / 2 and share >= min(0.5, 2 * chance):
        return ""
    return (
        f"No usable gaze heads: the best {k} of {all_heads} heads look most at the panel that is being described in "
        f"{hits:.0%} of the cases (chance {chance:.0%}, needed {(1 + chance) / 2:.0%}) and hold {share:.0%} of their panel "
        f"attention on it (chance {chance:.0%}, needed {min(0.5, 2 * chance):.0%}). Where this model looks cannot be read "
        "from these strips."
    )
