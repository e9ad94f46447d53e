"""Self-test of the recorder: its figures are compared with the model's own, on a batch of the user's.

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

from gazeguard import _compat
from gazeguard.attention.backbone import Head, find_backbone
from gazeguard.attention.buffers import CapturedActivations
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.attention.visual_keys import VisualKeys, visual_keys
from gazeguard.errors import GazeGuardError
from gazeguard.vision.batch_grids import image_grids
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.image_tokens import NO_TOKEN_ID, image_token_id
from gazeguard.vision.inputs import PER_TOKEN, append_tokens, model_inputs

NEW_TOKENS = 4  # that are generated and compared
EXACT, ROUNDED = 1e-4, 3e-2  # how far attention may differ in float32 and in half precision
PADDING = 3  # tokens of padding that are added to a row


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: What is checked.
        ok: Whether it holds.
        detail: What was measured, or why it could not be.
    """

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


@dataclass(frozen=True)
class _Batch:
    """A model and a batch of prompts for it."""

    model: PreTrainedModel
    inputs: Mapping[str, Any]

    @property
    def keys(self) -> VisualKeys:
        return visual_keys(self.model, self.inputs, self.inputs["input_ids"], self.inputs["attention_mask"])

    @property
    def tolerance(self) -> float:
        """How far attention may differ in the model's precision."""
        return EXACT if next(self.model.parameters()).dtype == torch.float32 else ROUNDED

    def generate(self) -> Any:
        """A few greedy tokens, with their logits."""
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        return self.model.generate(**self.inputs, **options, output_logits=True, return_dict_in_generate=True)

    @torch.no_grad()
    def recorded(
        self, heads: Sequence[Head], run: Callable[[], Any], attention: str | None = None
    ) -> tuple[Any, CapturedActivations]:
        """What a run returned and what was captured of it, with another attention implementation if wanted."""
        before = _compat.attention_kernels(self.model)
        if attention is not None:
            self.model.set_attn_implementation(attention)
        try:
            with AttentionRecorder(self.model, heads) as recorder:
                recorder.begin(KeyLayout.from_ids(*self.keys))
                return run(), recorder.collect()
        finally:
            if attention is not None:
                self.model.set_attn_implementation(before)


def run_self_test(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: Mapping[str, Any],
    sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    heads: Sequence[Head] | None = None,
    known: ImageGrid | None = None,
) -> list[Check]:
    """Every check, in order; one that cannot be made fails with the reason, and does not prevent the others.

    Args:
        model: A vision-language model.
        processor: Its processor.
        inputs: A batch of prompts with images, as the processor makes it.
        sizes: As in `image_grids`.
        heads: Those to record; by default all.
        known: As in `image_grids`.
    """
    if inputs.get("attention_mask") is None:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    batch = _Batch(model, inputs)
    checks = [_checked("the text decoder's heads are found", lambda: _check_heads(model))]
    if not checks[0].ok:
        return checks
    heads = heads or find_backbone(model).heads()
    checks.append(_checked("every image token has its region", lambda: _check_grid(batch, processor, sizes=sizes, known=known)))
    runs: list[tuple[Any, CapturedActivations]] = []  # the recorded one, once it has run
    checks.append(_checked("recording changes no logit", lambda: _check_logits(batch, heads, runs)))
    if runs:
        output, captured = runs[0]
        checks.append(
            _checked("the recorder reads what eager attention does", lambda: _check_eager(batch, heads, output, captured))
        )
        checks.append(_checked("padding changes nothing", lambda: _check_padding(batch, heads, captured)))
    return checks


def _checked(name: str, measure: Callable[[], tuple[bool, str]]) -> Check:
    """A check by its measurement; whatever a stranger's model raises is its result."""
    try:
        return Check(name, *measure())
    except GazeGuardError as error:
        return Check(name, False, str(error))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _check_heads(model: PreTrainedModel) -> tuple[bool, str]:
    backbone, token = find_backbone(model), image_token_id(model)
    heads = backbone.heads()
    marker = f"image token {token}" if token != NO_TOKEN_ID else "no image token in the vocabulary"
    detail = f"{len(heads)} heads in {len({layer for layer, _ in heads})} layers, {marker}"
    if backbone.read_from_code:
        detail += f"; {' and '.join(backbone.read_from_code)} read from the code of its classes, since no table knows them"
    return True, detail


def _check_grid(
    batch: _Batch,
    processor: ProcessorMixin,
    sizes: Sequence[Sequence[tuple[int, int]]] | None,
    known: ImageGrid | None,
) -> tuple[bool, str]:
    keys = batch.keys
    grids = image_grids(batch.model, processor, batch.inputs, keys.ids, keys.mask, sizes, known)
    details, located = [], True
    for grid in grids:
        boxes = grid.boxes[~np.isnan(grid.boxes[:, 0])]
        located = located and len(boxes) > 0
        (x0, y0), (x1, y1) = (boxes[:, :2].min(0), boxes[:, 2:].max(0)) if len(boxes) else ((0, 0), (0, 0))
        details.append(
            f"{len(grid)} image tokens, {len(boxes)} with a region, over {x1 - x0:.0%} of the width and {y1 - y0:.0%} of the "
            "height"
        )
    return located, "; ".join(details)


def _check_logits(batch: _Batch, heads: Sequence[Head], runs: list[tuple[Any, CapturedActivations]]) -> tuple[bool, str]:
    """Compares a plain run with a recorded one, which is added to ``runs``."""
    plain = batch.generate()
    output, captured = batch.recorded(heads, batch.generate)
    runs.append((output, captured))
    difference = max(_difference(*pair) for pair in zip(plain.logits, output.logits, strict=True))
    same = torch.equal(plain.sequences, output.sequences)
    return same and difference == 0, f"{'the same' if same else 'OTHER'} tokens, logits differ by {difference:.2g}"


def _check_eager(batch: _Batch, heads: Sequence[Head], output: Any, captured: CapturedActivations) -> tuple[bool, str]:
    tokens = output.sequences[:, batch.keys.last + 1 :].cpu().numpy()
    whole = model_inputs(batch.model, append_tokens(batch.model, batch.inputs, list(tokens)))
    _, eager = batch.recorded(heads, lambda: batch.model(**whole, use_cache=False), attention="eager")
    steps = tokens.shape[1]
    difference = max(
        _difference(getattr(captured, name)[:, :steps], getattr(eager, name)[:, :steps]) for name in ("gaze", "segment_mass")
    )
    return difference <= batch.tolerance, f"attention differs by {difference:.2g}"


def _check_padding(batch: _Batch, heads: Sequence[Head], captured: CapturedActivations) -> tuple[bool, str]:
    wider = _Batch(batch.model, _padded(batch))
    difference = _difference(wider.recorded(heads, wider.generate)[1].gaze, captured.gaze)
    where = "behind" if batch.model.config.is_encoder_decoder else "in front"
    return difference <= batch.tolerance, f"with {PADDING} tokens of padding {where}, attention differs by {difference:.2g}"


def _difference(left: Tensor, right: Tensor) -> float:
    """The largest difference; infinite entries are compared for being infinite alike."""
    if left.shape != right.shape:
        return float("inf")
    same = left == right
    return float(torch.where(same, 0, (left.float() - right.float()).abs()).max())


def _padded(batch: _Batch) -> dict[str, Any]:
    """The inputs with `PADDING` more tokens of padding before every row; behind it for an encoder, as `encode` pads."""
    model, inputs = batch.model, batch.inputs
    padded, shape = dict(inputs), inputs["input_ids"].shape
    for name, value in inputs.items():
        if name in PER_TOKEN or (isinstance(value, Tensor) and value.shape == shape):
            fill = (model.generation_config.pad_token_id or 0) if name == "input_ids" else 0
            parts = [value.new_full((shape[0], PADDING, *value.shape[2:]), fill), value]
            padded[name] = torch.cat(parts[::-1] if model.config.is_encoder_decoder else parts, dim=1)
    return padded
