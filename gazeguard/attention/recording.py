"""Recording of one run: what an attention recorder captures of one ``generate`` or one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gazeguard.attention.attribution import NUM_CONTRAST_TOKENS, top_k_statistics
from gazeguard.attention.backbone import Backbone, Head
from gazeguard.attention.buffers import CapturedActivations, LayerBuffers, RowBuffer, TopTokenBuffers, concatenate_padded
from gazeguard.attention.kernels import Call, MaskRule, attends_ahead
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.logit_lens import ImageStates
from gazeguard.attention.passes import PassTracker
from gazeguard.attention.scores import SteeredRows, SteeringSchedule, alters_scores, attention_weights, steered_result
from gazeguard.errors import NoAttentionError, UnsupportedError, given

Reduce = Callable[[Tensor], Tensor]


class Recording:
    """The state of one run, from ``begin`` on; its ``on_...`` methods are what the recorder's hooks call.

    Args:
        backbone: The model's parts.
        heads: Those that are recorded, sorted.
        kernel: The name of the attention kernel.
        mask_rule: How its masks are read.
        layout: The keys of the prompts.
        reduce: What is kept of a layer's gaze instead of all activations, see `AttentionRecorder.begin`.
        reordered: Rows of the batch are reordered between steps, as in beam search.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Sequence[Head],
        kernel: str,
        mask_rule: MaskRule,
        layout: KeyLayout,
        reduce: Reduce | None = None,
        reordered: bool = False,
    ) -> None:
        self.backbone, self.kernel, self.mask_rule, self.reduce = backbone, kernel, mask_rule, reduce
        self.passes = PassTracker(layout, backbone.key_source is not None, reordered)
        self.layers: dict[int, LayerBuffers] = {}
        for number in sorted({layer for layer, _ in heads}):
            columns = [i for i, (layer, _) in enumerate(heads) if layer == number]
            chosen = torch.tensor([heads[i][1] for i in columns], device=layout.columns.device)
            self.layers[number] = LayerBuffers(chosen, columns, backbone.width(backbone.attention[number])[1])
        self.hidden = RowBuffer()
        self.top_tokens = TopTokenBuffers()
        self.steering = SteeringSchedule()
        self.image_states = ImageStates()
        self.middle_states = ImageStates()  # those that enter the layer which is read, if one is
        self.middle: Tensor | None = None  # (batch, q, width), what entered that layer in the current pass
        self.norm_scales: dict[nn.Module, Tensor] = {}  # (batch, r, 1, 1) of the current pass
        self.awaiting_logits = 0  # steps of this pass whose logits are still to come

    def steer(self, bias: Tensor | None, prompt: bool, start: int | None) -> None:
        """Let a bias hold from a step on, see `AttentionRecorder.steer`."""
        step = max(0, self.passes.steps) if start is None else start
        self.steering.set(-self.passes.first if prompt else step, bias)

    # ------------------------------------------------------------------------------------------------------- capture

    def on_pass_start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the first layer, with what the decoder's forward got."""
        self.awaiting_logits = 0
        if (times := self.passes.start_pass(args, kwargs)) > 1:
            self.steering.repeat(times)

    def on_attention(self, call: Call, value: Tensor, result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """After rotary positions, cache and kernel: capture the recorded heads' attention.

        Args:
            call: The kernel's call.
            value: (batch, kv heads, S, d).
            result: What the kernel returned.

        Returns:
            The kernel's own ``result``, with the recorded heads' outputs replaced where they are steered.

        Raises:
            UnsupportedError: The mask lets generated tokens attend to what comes after them.
        """
        current, length = self.passes.current, call.query.shape[2]
        steps = 0 if current is None else min(current.steps, length)
        rows = length if self.steering.first_step < 0 else steps
        if current is None or not rows or call.options.get("cache") is not None:  # a paged cache is another run's
            return result
        number, keys = call.module.layer_idx, call.key.shape[2]
        self._check_keys(number, keys)
        layer = self.layers[number]
        layer.group, layer.scaling = call.group, call.scaling
        mask = self._mask(call, layer, rows, steps)
        query = call.query[:, :, -rows:].index_select(1, layer.heads)
        step, steered = self.passes.steps - steps, self._steered(layer, number, rows, keys)
        if rows == 1 and not steered and not alters_scores(call) and self.passes.keys_stay(number):
            self._defer(layer, step, query, call.key, mask)
            return result
        self._compute_deferred(layer)
        if self.kernel == "eager" and not steered:  # it returns its weights
            weights = given(result[1])[:, layer.heads, -rows:].float()
        else:
            weights = attention_weights(call, query, layer.heads, mask, steered)
        if steered:
            result = steered_result(call, value, result, layer.heads, weights, steered)
        if steps:
            self._store(layer, step, weights[:, :, -steps:], self.passes.key_offset(number, keys))
        return result

    def _check_keys(self, number: int, keys: int) -> None:
        """Raises `UnsupportedError` when a cross-attention module has other keys than the layout says."""
        source, expected = self.backbone.key_source, self.passes.layout.keys
        if source is not None and (keys < expected if source.after_generated else keys != expected):
            raise UnsupportedError(
                f"Layer {number} attends to {keys} keys, but the batch that the recording was begun with has {expected}: the "
                "inputs are another batch's, or the cache makes room for more. Pass the same inputs to both, and a dynamic "
                "cache."
            )

    def _mask(self, call: Call, layer: LayerBuffers, rows: int, steps: int) -> Tensor | None:
        """The additive mask (batch or 1, K or 1, rows, S) of a call's last queries for the recorded heads."""
        mask = self.mask_rule(call, rows)
        if mask is None:
            return None
        with_prompt = given(self.passes.current).past <= self.passes.first  # a replay: generated tokens come with their prompt
        if steps > 1 and with_prompt:
            keys = call.key.shape[2] - (0 if self.backbone.key_source is None else self.passes.layout.keys)
            if attends_ahead(mask[:, :, -steps:, :keys]):
                raise UnsupportedError(
                    f"Layer {call.module.layer_idx} lets generated tokens attend to later ones, as if they were a prompt, "
                    "which it cannot while the model generates. Mark them as generated: in PaliGemma with token_type_ids of 1."
                )
        return mask[:, layer.heads] if mask.shape[1] > 1 else mask

    def _steered(self, layer: LayerBuffers, number: int, rows: int, keys: int) -> list[SteeredRows]:
        """Which of a pass's last queries are steered in a layer with so many keys."""
        parts = self.steering.parts(self.passes.steps - rows, self.passes.steps)
        if not parts:
            return []
        columns, valid = self.passes.layout.image_columns(self.passes.key_offset(number, keys))
        return [SteeredRows(part, columns, bias[:, layer.columns] * valid[:, None]) for part, bias in parts]

    def _defer(self, layer: LayerBuffers, step: int, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        """Keep a query (batch, K, 1, d) of one step, to be computed with others in one product."""
        layer.drop_deferred(step)
        if not layer.accepts(mask):
            self._compute_deferred(layer)
        layer.defer(step, query, key, mask)

    def _compute_deferred(self, layer: LayerBuffers) -> None:
        """Turn a layer's deferred queries into attention, from the keys as they are now."""
        if (step := layer.first_deferred) is not None:
            self._store(layer, step, layer.deferred_attention(step), offset=0)
            layer.clear_deferred()

    def _store(self, layer: LayerBuffers, step: int, weights: Tensor, offset: int) -> None:
        """Keep attention (batch, K, r, S) from a step on, of a layer with this key offset."""
        layout = self.passes.layout
        gaze = layout.image_attention(weights, offset)
        if self.reduce is not None:
            layer.gaze.put(step, self.reduce(gaze).transpose(1, 2))
            return
        layer.gaze.put(step, gaze.transpose(1, 2))
        layer.segment_mass.put(step, layout.segment_attention(weights, offset).transpose(1, 2))

    def on_head_output(self, number: int, states: Tensor) -> None:
        """Before a layer's output projection: ``states`` (batch, q, heads * width per head), all heads' outputs."""
        current = self.passes.current
        if current is None or not current.steps or self.reduce is not None:
            return
        layer = self.layers[number]
        rows = states[:, -current.steps :]
        heads = rows.unflatten(-1, (-1, layer.width))
        layer.output.put(self.passes.steps - rows.shape[1], heads.index_select(2, layer.heads))

    def on_norm(self, norm: nn.LayerNorm, states: Tensor) -> None:
        """Before a norm between a recorded layer and the final norm: keep the scale that it gives to each row."""
        current = self.passes.current
        if current is not None and current.steps:
            rows = states[:, -current.steps :].float()
            self.norm_scales[norm] = (rows.var(-1, unbiased=False) + norm.eps).rsqrt()[..., None, None]

    def on_final_hidden(self, states: Tensor) -> None:
        """Before the final norm: ``states`` (batch, q, width), the last of a pass; a later use of the norm is no part of it."""
        current = self.passes.end_pass()
        if current is None:
            return
        if current.steps:
            for number, layer in self.layers.items():
                for norm in self.backbone.norms.get(number, ()):
                    layer.output.scale_last(self.norm_scales[norm])
            rows = states[:, -current.steps :]
            step = self.passes.steps - rows.shape[1]
            self.hidden.put(step, rows)
            self.top_tokens.cut(step)
            self.awaiting_logits = rows.shape[1] if self.reduce is None else 0
        if current.past <= self.passes.first and self.backbone.key_source is None and self.reduce is None:
            self.image_states.put(self.passes.layout, states, current.past)
            if self.middle is not None:
                self.middle_states.put(self.passes.layout, self.middle, current.past)
        self.middle = None

    def on_logits(self, logits: Tensor | None, picked: bool) -> None:
        """After the language-model head: ``logits`` (batch, q, vocabulary), kept if they are those of the pass's steps.

        Args:
            logits: The model's output; None when it has none.
            picked: The caller asked for certain positions by their numbers.
        """
        steps, self.awaiting_logits = self.awaiting_logits, 0
        if not steps or logits is None or logits.shape[1] != steps or picked:
            return
        step, chunk = self.passes.steps - steps, max(1, self.backbone.logits_chunk // len(logits))
        for start in range(0, steps, chunk):
            part = logits[:, start : start + chunk].detach().float()
            self.top_tokens.put(step + start, top_k_statistics(part))

    # ------------------------------------------------------------------------------------------------------- results

    def step_at(self, position: int) -> tuple[Tensor, Tensor] | None:
        """Head outputs and final state of one step, see `AttentionRecorder.step_at`."""
        step = position - self.passes.first
        if not 0 <= step < len(self.hidden):
            return None
        outputs = [layer.output.row(step).float() for layer in self.layers.values()]
        return concatenate_padded(outputs, dim=1), self.hidden.row(step)

    def gaze_at(self, position: int) -> Tensor:
        """Attention on the image tokens of one step, see `AttentionRecorder.gaze_at`."""
        step = position - self.passes.first
        parts = []
        for layer in self.layers.values():
            if layer.is_last_deferred(step):  # the others can wait for the one product that computes them all
                parts.append(self.passes.layout.image_attention(layer.deferred_attention(step))[:, :, 0])
            else:
                self._compute_deferred(layer)
                parts.append(layer.gaze.row(step))
        return torch.cat(parts, dim=1)

    def computed_layers(self) -> list[LayerBuffers]:
        """The layers, without deferred queries. Raises `NoAttentionError` when one has captured nothing."""
        for number, layer in self.layers.items():
            self._compute_deferred(layer)
            if not len(layer.gaze):
                raise NoAttentionError(nothing_captured(number))
        return list(self.layers.values())

    def collect(self, beams: Tensor | None, start: int) -> CapturedActivations:
        """All captured activations, see `AttentionRecorder.collect`."""
        layers, device = self.computed_layers(), self.passes.layout.columns.device
        gaze, segment_mass, output = (
            concatenate_padded([getattr(layer, name).joined(start).to(device) for layer in layers], dim=2)
            for name in ("gaze", "segment_mass", "output")
        )
        hidden = self.hidden.joined(start)
        count = min(NUM_CONTRAST_TOKENS + 1, len(self.backbone.unembedding.weight))
        tensors = [gaze, segment_mass, output, hidden, *self.top_tokens.joined(hidden, count, start)]
        if beams is not None:
            rows = beams.to(device).clamp(min=0)
            steps = torch.arange(rows.shape[1], device=device)
            tensors = [tensor[rows.to(tensor.device), steps.to(tensor.device)] for tensor in tensors]
        gaze, segment_mass, output, *others = tensors
        return CapturedActivations(gaze, segment_mass, output.float(), *others)


def nothing_captured(layer: int) -> str:
    """The message of a recorder that captured nothing."""
    return (
        f"The recorder captured no attention in layer {layer}: the model did not run, or not by its own generate or forward. "
        "Run the model while the recorder is open, with the batch that the recording was begun with."
    )
