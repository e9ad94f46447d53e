"""Discovery of a model's gaze heads with comic strips whose panels and narrations are known.

Two probes measure every head on the same strips, each as a (described panel x attended panel) matrix of attention mass:

* ``narration``: the queries that predict the nouns of a panel's description (the first token of each), in a narration of the
  whole strip. The rows of articles, colours and "and" attend elsewhere, and their mean would depend on how long they are;
* ``query``: the last query of a prompt that asks about one panel (Gandikota & Bau 2026, arXiv 2606.14703, section 3).

Panels of unlike area are weighed to the mean area. Sinks, image tokens that get much attention whatever is described, are
detected per head and image and left out. How heads are scored and chosen says `gazeguard.heads.scoring`. How far the choice
depends on the length of the strips is measured with the same strips, cut short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from gazeguard.attention.backbone import Head, find_backbone
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.visual_keys import visual_keys
from gazeguard.claims.parse import things
from gazeguard.errors import InputError
from gazeguard.heads.artifact import GazeHeads, Probe, Step, fingerprint
from gazeguard.heads.scoring import overlap, rounded, score, settled, split_half, top_heads, unusable_reason
from gazeguard.heads.search_state import SearchState, digest_of
from gazeguard.heads.strips import Strip, draw_strips
from gazeguard.progress import track
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.encoding import EncodedBatch, encode
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.inputs import model_inputs

SINK = 10.0  # an image token is a sink when it gets so many times the mean token's attention, whatever is described
MIN_TOKENS = 2  # image tokens that a panel needs
MIN_VISIBLE, LATTICE = 0.9, 16  # share of a panel that the processor must keep, on a lattice of so many points each way
SHORT_STRIPS = 16  # strips that are also shown with fewer panels

Offsets = NDArray[np.int64]
Matrices = NDArray[np.float32]  # (strips, H, described, attended + 1) attention mass, that on sinks last


def find_heads(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    strips: Sequence[Strip] | None = None,
    batch_size: int = 8,
    progress: bool = True,
    grid: ImageGrid | None = None,
    keep: str | Path | None = None,
) -> GazeHeads:
    """Score every head of a model on comic strips and choose the gaze heads.

    Args:
        model: A vision-language model.
        processor: Its processor.
        strips: The comic strips, all with the same number of panels, at least two. The search stops early when more strips no
            longer change the choice. By default 48 drawn pages of six panels.
        batch_size: Strips per forward pass.
        progress: Whether to show a progress bar on a terminal: see `gazeguard.progress`.
        grid: The image grid of every prompt, for a model whose layout no rule of `gazeguard.vision.layouts` knows.
        keep: A file for intermediate results, from which an interrupted search continues.

    Returns:
        The gaze heads. ``unusable`` says why they do not follow the narration; with such heads a guard leaves every caption
        *unchecked*.

    Raises:
        UnsupportedError: The model's attention cannot be recorded.
        InputError: The model cannot be shown these strips.
    """
    strips = draw_strips(48) if strips is None else list(strips)
    panels = _panel_count(strips)
    heads = find_backbone(model).heads()
    probes = {probe: measure for probe, measure in PROBES.items() if probe == "query" or all(s.narration for s in strips)}
    state = None if keep is None else SearchState(Path(keep), f"{fingerprint(model)}/{digest_of(strips)}")
    matrices = {} if state is None else state.load(set(probes), (len(heads), panels, panels + 1))
    groups = [strips[i : i + batch_size] for i in range(len(matrices.get("query", ())), len(strips), batch_size)]
    with torch.no_grad(), AttentionRecorder(model, heads) as recorder:
        for group in track(groups, "finding gaze heads") if progress else groups:
            if matrices and settled(matrices[next(iter(probes))]):
                break
            shown = _ShownStrips(recorder, model, processor, grid, group)
            measured = {probe: measure(shown) for probe, measure in probes.items()}
            matrices = {probe: np.concatenate([matrices[probe], new]) if matrices else new for probe, new in measured.items()}
            if state is not None:
                state.save(matrices)
    chosen = choose_heads(model, heads, {probe: matrices[probe] for probe in probes})
    if "narration" not in probes:
        return chosen
    with torch.no_grad(), AttentionRecorder(model, heads) as recorder:
        short = [
            _ShownStrips(recorder, model, processor, grid, [strip.shortened(length) for strip in strips[:SHORT_STRIPS]])
            for length in _shorter(panels)
        ]
        agreement = [overlap(chosen.heads, _heads_of(each, batch_size)) for each in short]
    with torch.no_grad(), AttentionRecorder(model, chosen.heads) as recorder:
        staircase = _staircase(_ShownStrips(recorder, model, processor, grid, strips[:1]))
    return chosen.model_copy(
        update={"staircase": staircase, "length_agreement": round(min(agreement), 6) if agreement else None}
    )


def _shorter(panels: int) -> list[int]:
    """The numbers of panels, below this one, with which the choice of heads is made again: two, and half of them."""
    return sorted({length for length in (2, (panels + 1) // 2) if 2 <= length < panels})


def _heads_of(shown: _ShownStrips, batch_size: int) -> list[Head]:
    """The heads that the narrations of these strips alone would choose."""
    parts = [replace(shown, strips=shown.strips[i : i + batch_size]) for i in range(0, len(shown.strips), batch_size)]
    chosen = top_heads(np.concatenate([_narrations(part) for part in parts])[..., :-1])
    return [shown.recorder.heads[i] for i in chosen]


def _panel_count(strips: Sequence[Strip]) -> int:
    """The number of panels of every strip. Raises `InputError` for too few strips, or strips that differ in it."""
    panels = {len(strip.panels) for strip in strips}
    if len(strips) < 2 or len(panels) != 1 or min(panels) < 2:
        raise InputError(
            f"Finding heads needs at least two strips with the same number of panels, two or more; "
            f"got {len(strips)} strips with {sorted(panels)} panels. Draw them with draw_strips(n), or load more of your own."
        )
    return min(panels)


@dataclass(frozen=True)
class _ShownStrips:
    """Some strips in front of a model whose heads are recorded."""

    recorder: AttentionRecorder
    model: PreTrainedModel
    processor: ProcessorMixin
    known: ImageGrid | None
    strips: Sequence[Strip]

    def measure(self, batch: EncodedBatch, shown: Sequence[Strip], reduce: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """One forward pass over a batch whose rows show the strips ``shown``.

        Args:
            batch: Prompts, and narrations if any.
            shown: The strip of each row.
            reduce: Called for each layer with the attention weights (batch, K, queries, N) and the shares of the image
                tokens in the panels, weighed by area (batch, N, panels).

        Returns:
            What ``reduce`` makes of them, for all layers' heads: (batch, ..., H, ...) as the recorder stacks it.
        """
        keys = visual_keys(self.model, batch.prompt, batch.prompt_ids, batch.prompt_mask)
        layout = KeyLayout.from_ids(*keys)
        sizes = [[strip.image.size] for strip in shown]
        grids = image_grids(self.model, self.processor, batch.inputs, keys.ids, keys.mask, sizes, self.known)
        regions = torch.zeros(len(shown), layout.columns.shape[1], len(shown[0].panels))
        for row, (grid, strip) in enumerate(zip(grids, shown, strict=True)):
            shares = panel_shares(grid, strip)
            regions[row, : len(grid)] = torch.from_numpy(shares * (shares.sum(0).mean() / shares.sum(0)))
        regions = regions.to(self.model.device)
        self.recorder.begin(layout, lambda gaze: reduce(gaze, regions))
        self.model(**model_inputs(self.model, batch.inputs), use_cache=False)
        return self.recorder.reduced_gaze()

    def narrated(self) -> EncodedBatch:
        """The strips, each with its prompt and its narration."""
        columns = [[getattr(strip, name) for strip in self.strips] for name in ("image", "prompt", "narration")]
        return encode(self.model, self.processor, *columns)

    def rows(self, batch: EncodedBatch, rows_of: Callable[[Strip, Offsets], NDArray[np.bool_]]) -> Tensor:
        """(strips, panels, T) bool: what ``rows_of`` says of each strip and its tokens, padded to the longest narration."""
        rows = torch.zeros(len(self.strips), len(self.strips[0].panels), max(map(len, batch.offsets)), dtype=torch.bool)
        for row, (strip, offsets) in enumerate(zip(self.strips, batch.offsets, strict=True)):
            rows[row, :, : len(offsets)] = torch.from_numpy(rows_of(strip, offsets))
        return rows.to(self.model.device)


def described_rows(strip: Strip, offsets: Offsets) -> NDArray[np.bool_]:
    """The tokens that describe each panel.

    Args:
        strip: A strip with its narration.
        offsets: (T, 2) first and last character (exclusive) of the narration's tokens.

    Returns:
        (panels, T) bool.
    """
    return np.array([(offsets[:, 0] < end) & (offsets[:, 1] > start) for start, end in strip.spans])


def noun_rows(strip: Strip, offsets: Offsets) -> NDArray[np.bool_]:
    """The tokens with which the nouns of each panel begin; all that describe it where it has no noun that is known.

    Args, Returns:
        As `described_rows`.
    """
    described = described_rows(strip, offsets)
    first = np.zeros(len(offsets), bool)
    for phrase in things(strip.narration):
        first[((offsets[:, 0] < phrase.head.end) & (offsets[:, 1] > phrase.head.start)).argmax()] = True
    nouns = described & first
    return np.where(nouns.any(-1, keepdims=True), nouns, described)


def _narrations(shown: _ShownStrips) -> Matrices:
    """The probe ``narration``: mean over the queries that predict the nouns of a panel."""
    batch = shown.narrated()
    rows = shown.rows(batch, noun_rows).float()
    weights = rows / rows.sum(-1, keepdim=True).clamp(min=1)

    def reduce(gaze: Tensor, regions: Tensor) -> Tensor:
        return panel_mass(weights[:, None] @ gaze[:, :, : weights.shape[-1]], regions)

    return shown.measure(batch, shown.strips, reduce).transpose(1, 2).cpu().numpy()


def _queries(shown: _ShownStrips) -> Matrices:
    """The probe ``query``: the query that predicts the first token of an answer about one panel."""
    panels = len(shown.strips[0].panels)

    def reduce(gaze: Tensor, regions: Tensor) -> Tensor:
        asked = torch.unflatten(gaze[:, :, 0], 0, (-1, panels)).transpose(1, 2)  # (strips, K, asked, N)
        return panel_mass(asked, regions[::panels])

    few = max(1, len(shown.strips) // panels)  # strips at once, so that the batch is no larger than that of the narrations
    measured = []
    for i in range(0, len(shown.strips), few):
        part = shown.strips[i : i + few]
        rows = [strip for strip in part for _ in strip.questions]
        questions = [question for strip in part for question in strip.questions]
        batch = encode(shown.model, shown.processor, [strip.image for strip in rows], questions)
        measured.append(shown.measure(batch, rows, reduce).transpose(1, 2).cpu().numpy())
    return np.concatenate(measured)


PROBES: dict[Probe, Callable[[_ShownStrips], Matrices]] = {"narration": _narrations, "query": _queries}


def _staircase(shown: _ShownStrips) -> tuple[Step, ...]:
    """The narration of one strip, token by token, and the mean attention mass of the recorded heads on every panel."""
    batch = shown.narrated()
    describing = shown.rows(batch, described_rows)[0]
    mass = shown.measure(batch, shown.strips, lambda gaze, regions: gaze @ regions[:, None])[0].mean(1).cpu().numpy()
    return tuple(
        Step(
            text=shown.strips[0].narration[start:end],
            described_panel=int(describing[:, token].int().argmax()) if describing[:, token].any() else None,
            panel_mass=rounded(mass[token]),
        )
        for token, (start, end) in enumerate(batch.offsets[0].tolist())
    )


def panel_mass(gaze: Tensor, regions: Tensor) -> Tensor:
    """Attention mass on the panels, without sinks, and last that on sinks.

    A sink is an image token that gets `SINK` times the mean token's attention whatever is described. It is detected for
    every head and image from these very queries; no list of dimensions or tokens is needed.

    Args:
        gaze: (batch, K, described, N) attention on image tokens, for every described panel.
        regions: (batch, N, panels), the shares of the image tokens in the panels.

    Returns:
        (batch, K, described, panels + 1).
    """
    tokens = (regions.sum(-1) > 0).sum(-1)[:, None, None]
    mean = gaze.sum(-1).mean(-1, keepdim=True) / tokens
    sinks = (gaze.amin(2) > SINK * mean)[:, :, None]
    return torch.cat((gaze.masked_fill(sinks, 0) @ regions[:, None], (gaze * sinks).sum(-1, keepdim=True)), dim=-1)


def panel_shares(grid: ImageGrid, strip: Strip) -> NDArray[np.float32]:
    """(N, panels) float32: the share of each image token that lies in each panel.

    Raises:
        InputError: The processor cuts panels away, or leaves them fewer than `MIN_TOKENS` image tokens.
    """
    width, height = grid.sizes[0]
    shares = np.stack([grid.overlap((float(a), float(b), float(c), float(d))) for a, b, c, d in strip.panels], axis=1)
    x0, y0, x1, y1 = np.nan_to_num(grid.boxes * np.array([width, height] * 2, np.float32)).T
    for number, box in enumerate(strip.panels):
        x, y = (np.linspace(box[i], box[i + 2], 2 * LATTICE + 1)[1::2, None] for i in (0, 1))
        across, down = (x0 <= x) & (x <= x1), (y0 <= y) & (y <= y1)  # (lattice, N)
        visible = (down.astype(np.float32) @ across.T.astype(np.float32) > 0).mean()
        if visible < MIN_VISIBLE:
            raise InputError(
                f"The model sees {visible:.0%} of panel {number + 1}: its processor crops the {width} x {height} image. Show "
                "it strips of a shape that it keeps: draw_strips(n, size=(side, side)) for one that crops to a square."
            )
        if shares[:, number].sum() < MIN_TOKENS:
            raise InputError(
                f"Panel {number + 1} of {len(strip.panels)} has {shares[:, number].sum():.1f} image tokens; discovery needs "
                f"{MIN_TOKENS} for each. Show the model larger images, or strips with fewer panels."
            )
    return shares


def choose_heads(model: PreTrainedModel, heads: Sequence[Head], matrices: Mapping[Probe, Matrices]) -> GazeHeads:
    """The heads that stand out, with the figures behind them."""
    ranked = matrices.get("narration", matrices["query"])[..., :-1]
    chosen = sorted(top_heads(ranked))
    scores = {probe: score(matrices[probe], np.random.default_rng(0), chosen) for probe in matrices}
    return GazeHeads(
        model=fingerprint(model),
        model_class=type(model).__name__,
        heads=tuple(heads[i] for i in chosen),
        all_heads=tuple(heads),
        narration=scores.get("narration"),
        query=scores["query"],
        strips=len(ranked),
        panels=ranked.shape[-1],
        split_half=round(split_half(ranked, len(chosen)), 6),
        unusable=unusable_reason(ranked[:, chosen].mean(1), len(chosen), len(heads)),
    )
