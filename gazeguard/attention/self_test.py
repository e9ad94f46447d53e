"""Does watching work for this model? The recorder is held against the model itself, on a batch of the user's own.

Random weights and tiny models pass these checks in GazeGuard's tests; a real checkpoint, its processor, its kernel and its
precision are only known where they run. Nothing is changed: the attention implementation is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from gazeguard.attention.backbone import Head, find_backbone
from gazeguard.attention.buffers import CapturedActivations, KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.visual_keys import VisualKeys, visual_keys
from gazeguard.errors import GazeGuardError
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.image_tokens import NO_TOKEN_ID, image_token_id
from gazeguard.vision.inputs import PER_TOKEN, append_tokens, model_inputs

WRITTEN = 4  # words that are written to look at
EXACT, ROUNDED = 1e-4, 3e-2  # how far attention may differ in float32 and in half precision
PADDING = 3  # tokens of padding that are put before a row


@dataclass(frozen=True)
class Check:
    """One thing that was examined: its name, whether it is so, and what was measured or why it could not be."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


def run_self_test(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: Mapping[str, Any],
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    heads: Sequence[Head] | None = None,
    known: ImageGrid | None = None,
) -> list[Check]:
    """Every check, in order; one that cannot be made fails with the reason, and does not cost the others.

    inputs: a batch of prompts with pictures, as the processor makes it; sizes and known as in `image_grids`
    heads:  those to listen to; by default all
    """
    if inputs.get("attention_mask") is None:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    limit = EXACT if next(model.parameters()).dtype == torch.float32 else ROUNDED
    checks: list[Check] = []

    def tried(name: str, measure: Callable[[], tuple[bool, str]]) -> None:
        try:
            checks.append(Check(name, *measure()))
        except GazeGuardError as error:
            checks.append(Check(name, False, str(error)))
        except Exception as error:  # whatever a stranger's model raises is this check's result
            checks.append(Check(name, False, f"{type(error).__name__}: {error}"))

    def found() -> tuple[bool, str]:
        every, token = find_backbone(model).heads(), image_token_id(model)
        marks = f"image token {token}" if token != NO_TOKEN_ID else "no image token among the words"
        return True, f"{len(every)} heads in {len({layer for layer, _ in every})} layers, {marks}"

    def cells() -> tuple[bool, str]:
        keys = _keys(model, inputs)
        grids = image_grids(model, processor, inputs, keys.ids, keys.mask, sizes, known)
        placed = [int((~np.isnan(grid.boxes[:, 0])).sum()) for grid in grids]
        seen = [grid.boxes[~np.isnan(grid.boxes[:, 0])] for grid in grids]
        corners = [(*boxes[:, :2].min(0), *boxes[:, 2:].max(0)) if len(boxes) else (0, 0, 0, 0) for boxes in seen]
        told = "; ".join(
            f"{len(grid)} tokens, {count} with a place, over {(x1 - x0):.0%} of the width and {(y1 - y0):.0%} of the height"
            for grid, count, (x0, y0, x1, y1) in zip(grids, placed, corners, strict=True)
        )
        return all(placed), told

    tried("the text decoder's heads are found", found)
    if not checks[0].ok:
        return checks
    heads = heads or find_backbone(model).heads()
    tried("the picture's cells are found", cells)
    ran: dict[str, Any] = {}

    def logits() -> tuple[bool, str]:
        plain = _write(model, inputs)
        ran["made"], ran["rows"] = _heard(model, heads, inputs, lambda: _write(model, inputs))
        apart = max(_apart(a, b) for a, b in zip(plain.logits, ran["made"].logits, strict=True))
        same = torch.equal(plain.sequences, ran["made"].sequences)
        return same and apart == 0, f"{'the same' if same else 'OTHER'} words, logits apart by {apart:.2g}"

    def eager() -> tuple[bool, str]:
        written = ran["made"].sequences[:, _keys(model, inputs).last + 1 :].cpu().numpy()
        whole = append_tokens(model, inputs, list(written))
        _, truth = _heard(model, heads, inputs, lambda: model(**model_inputs(model, whole), use_cache=False), attention="eager")
        steps = written.shape[1]
        apart = max(_apart(getattr(ran["rows"], n)[:, :steps], getattr(truth, n)[:, :steps]) for n in ("gaze", "segment_mass"))
        return apart <= limit, f"attention apart by {apart:.2g}"

    def padded() -> tuple[bool, str]:
        wider = _padded(model, inputs)
        _, rows = _heard(model, heads, wider, lambda: _write(model, wider))
        apart = _apart(rows.gaze, ran["rows"].gaze)
        where = "behind" if model.config.is_encoder_decoder else "in front"
        return apart <= limit, f"with {PADDING} tokens of padding {where}, attention apart by {apart:.2g}"

    tried("watching changes no logit", logits)
    if "rows" in ran:
        tried("the recorder reads what eager attention does", eager)
        tried("padding moves nothing", padded)
    return checks


def _write(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    how = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}
    return model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)


@torch.no_grad()
def _heard(
    model: PreTrainedModel,
    heads: Sequence[Head],
    inputs: Mapping[str, Any],
    run: Callable[[], Any],
    attention: str | None = None,
) -> tuple[Any, CapturedActivations]:
    """What a run returned and what a recorder heard of it, with another attention implementation if wanted."""
    before = {name: getattr(model.config, name)._attn_implementation for name in model.config.sub_configs}
    before[""] = model.config._attn_implementation
    if attention is not None:
        model.set_attn_implementation(attention)
    try:
        with AttentionRecorder(model, heads) as recorder:
            recorder.begin(KeyLayout.from_ids(*_keys(model, inputs)))
            return run(), recorder.collect()
    finally:
        if attention is not None:
            model.set_attn_implementation(before)


def _keys(model: PreTrainedModel, inputs: Mapping[str, Any]) -> VisualKeys:
    return visual_keys(model, inputs, inputs["input_ids"], inputs["attention_mask"])


def _apart(left: Tensor, right: Tensor) -> float:
    """The largest difference; infinite places are compared for being infinite alike."""
    if left.shape != right.shape:
        return float("inf")
    same = left == right
    return float(torch.where(same, 0, (left.float() - right.float()).abs()).max())


def _padded(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same batch with `PADDING` more tokens of padding before every row; behind it for an encoder, as `encode` pads."""
    made = dict(inputs)
    shape = inputs["input_ids"].shape
    for name, value in inputs.items():
        if name in PER_TOKEN or (isinstance(value, Tensor) and value.shape == shape):
            fill = (model.generation_config.pad_token_id or 0) if name == "input_ids" else 0
            parts = [value.new_full((shape[0], PADDING, *value.shape[2:]), fill), value]
            made[name] = torch.cat(parts[::-1] if model.config.is_encoder_decoder else parts, dim=1)
    return made
