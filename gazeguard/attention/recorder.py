"""Attention recorder for stock transformers models.

A recorder captures what chosen attention heads do while a model runs, and adds nothing to the model once it is closed. It
works by forward hooks and by a wrapper around the attention kernel (`gazeguard.attention.kernels`).

While a model decodes with a cache that only grows, the recorder keeps the recorded heads' queries alone. Attention is computed
from them and the cached keys in one product per layer when it is asked for (``collect``), exact to float rounding, and
nothing waits for the device. With any other cache attention is computed at each step. Activations are kept by the position of
their query, so that chunks, speculation that is rolled back and continued conversations need no care of their own. Of the
model's logits the top-k tokens and the entropy are kept: to compute them again is most of what judging a caption would cost.

In most models the image is part of the prompt, and its tokens are keys of every layer's self-attention. `VISUAL_KEY_SOURCES`
declares the others: cross-attention, whose keys are the image tokens or an encoder's states.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gazeguard import _compat
from gazeguard.attention.backbone import Head, find_backbone
from gazeguard.attention.buffers import CapturedActivations
from gazeguard.attention.kernels import Call, MaskRule, attach_recorder, detach_recorder, has_kernel, mask_rule
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.logit_lens import LogitLens
from gazeguard.attention.recording import Recording, Reduce, nothing_captured
from gazeguard.errors import NoAttentionError, UnsupportedError


class AttentionRecorder:
    """Records chosen heads of a model: a context manager that adds nothing to the model when it is left.

    with AttentionRecorder(model, heads) as recorder:
        recorder.begin(KeyLayout.from_ids(*visual_keys(model, inputs, input_ids, attention_mask)))
        model.generate(...)          # or one forward pass over prompt and caption
        captured = recorder.collect()

    A recorder captures one ``generate`` or one forward pass at a time: the first after ``begin`` whose batch is that of the
    prompts, or a multiple of it, in the thread that runs it. Passes with another cache (guidance, a probe of your own) and
    passes of other threads are not captured. One recorder can be open on a model at a time.

    Args:
        model: Any model whose text attention goes through transformers' attention registry.
        heads: (layer, head) pairs, in any order.

    Raises:
        UnsupportedError: The model cannot be recorded, or has no such head.
    """

    def __init__(self, model: PreTrainedModel, heads: Sequence[Head]) -> None:
        self.model, self.backbone = model, find_backbone(model)
        known = set(self.backbone.heads())
        if not heads or not set(heads) <= known:
            unknown = next(iter(sorted(set(heads) - known)), "to record (the list is empty)")
            raise UnsupportedError(
                f"{type(model).__name__} has no head {unknown}: its text decoder has layers {min(known)[0]} to "
                f"{max(known)[0]} with {max(head for _, head in known) + 1} heads each. Heads are (layer, head) pairs."
            )
        self.heads: tuple[Head, ...] = tuple(sorted(set(heads)))
        self._read_layer: int | None = None
        self._layers = sorted({layer for layer, _ in self.heads})
        self._kernel, self._mask_rule = self._current_kernel()
        self._installed = ExitStack()  # what undoes the hooks
        self._recording: Recording | None = None

    def _current_kernel(self) -> tuple[str, MaskRule]:
        """The model's kernel now, and the rule that reads its masks. Raises `UnsupportedError` when there is none."""
        module = self.backbone.attention[self._layers[0]]
        kernel = _compat.attention_kernel(module)
        if (rule := mask_rule(kernel)) is None or not has_kernel(kernel, module):
            raise UnsupportedError(
                f"{type(self.model).__name__} runs {kernel!r} attention, whose masks GazeGuard cannot read. "
                'Call model.set_attn_implementation("sdpa") first; the outputs are the same.'
            )
        return kernel, rule

    def read_layer(self, layer: int | None) -> None:
        """Let `layer_lens` read the states that enter this layer of the decoder; None for those that leave the last one.

        Raises:
            UnsupportedError: The decoder has no such layer with attention.
        """
        if layer is not None and layer not in self.backbone.attention:
            known = sorted(self.backbone.attention)
            raise UnsupportedError(
                f"{type(self.model).__name__} has no layer {layer} whose image tokens could be read; its layers with attention "
                f"are {known[0]} to {known[-1]}."
            )
        self._read_layer = layer

    def __enter__(self) -> AttentionRecorder:
        self._kernel, self._mask_rule = self._current_kernel()
        _ = self.backbone.final_norm_weight  # runs the norm, so before it is hooked
        recorded = [self.backbone.attention[number] for number in self._layers]
        with ExitStack() as stack:
            attach_recorder(self, self.backbone.attention.values(), recorded, self._kernel)
            stack.callback(detach_recorder, recorded, self._kernel)
            for handle in self._add_hooks():
                stack.callback(handle.remove)
            self._installed = stack.pop_all()
        return self

    def _add_hooks(self) -> list[Any]:
        backbone, handles = self.backbone, []
        for number in self._layers:
            handles.append(backbone.projection(number).register_forward_pre_hook(partial(self._on_head_output, number)))
        for norm in {norm for number in self._layers for norm in backbone.norms.get(number, ())}:
            handles.append(norm.register_forward_pre_hook(self._on_norm))
        handles.append(backbone.decoder.register_forward_pre_hook(self._on_pass_start, with_kwargs=True))
        if self._read_layer is not None:
            handles.append(backbone.block(self._read_layer).register_forward_pre_hook(self._on_read_layer, with_kwargs=True))
        handles.append(backbone.norm.register_forward_pre_hook(self._on_final_hidden))
        handles.append(backbone.causal_lm.register_forward_hook(self._on_logits, with_kwargs=True))
        return handles

    def __exit__(self, *_: object) -> None:
        self._recording = None
        self._installed.close()

    # -------------------------------------------------------------------------------------------------------- begin

    def begin(self, layout: KeyLayout, reduce: Reduce | None = None, reordered: bool = False) -> None:
        """Forget what was captured, and capture the run that follows these prompts.

        Args:
            layout: The keys of the prompts.
            reduce: What is kept of a layer's gaze (batch, K, r, N) float32 on the image tokens, of r queries at a time: any
                tensor (a, K, b, c). Only this is kept then, for `reduced_gaze`; it makes all heads of a large model affordable.
            reordered: Rows of the batch are reordered between steps, as in beam search.
        """
        self._recording = Recording(self.backbone, self.heads, self._kernel, self._mask_rule, layout, reduce, reordered)

    def steer(self, bias: Tensor | None, prompt: bool = False, start: int | None = None) -> None:
        """Add ``bias`` to the recorded heads' scores of the image tokens from a step on; None ends it.

        Call it after ``begin``, between any two passes. What holds from a later step on stays until another step later still.
        The other heads, and every layer that holds none of these, run as they did: the kernel does its work first, and
        only the outputs of the recorded heads replace its own.

        Args:
            bias: (batch, H, N) float32, logits: positive draws attention to an image token, negative keeps it away.
            prompt: Steer the queries of the prompt, too, not only those that predict new tokens.
            start: The first new token whose query is steered, counted from 0; by default the first of the next pass.
        """
        self._begun().steer(bias, prompt, start)

    # -------------------------------------------------------------------------------------------------------- hooks

    def _active(self) -> Recording | None:
        """The recording, for the thread that it captures."""
        recording = self._recording
        if recording is None or recording.passes.thread not in (None, threading.get_ident()):
            return None
        return recording

    @torch.compiler.disable
    def on_attention(self, call: Call, value: Tensor, result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Called by the kernel's wrapper: see `Recording.on_attention`."""
        recording = self._active()
        return result if recording is None else recording.on_attention(call, value, result)

    @torch.compiler.disable
    def _on_pass_start(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (recording := self._active()) is None:
            return None
        recording.on_pass_start(args, kwargs)
        return args, _compat.with_all_positions(kwargs)

    @torch.compiler.disable
    def _on_head_output(self, number: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if (recording := self._active()) is not None:
            recording.on_head_output(number, args[0])

    @torch.compiler.disable
    def _on_norm(self, norm: nn.LayerNorm, args: tuple[Tensor, ...]) -> None:
        if (recording := self._active()) is not None:
            recording.on_norm(norm, args[0])

    @torch.compiler.disable
    def _on_read_layer(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (recording := self._active()) is not None:
            recording.middle = args[0] if args else kwargs["hidden_states"]

    @torch.compiler.disable
    def _on_final_hidden(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if (recording := self._active()) is not None:
            recording.on_final_hidden(args[0])

    @torch.compiler.disable
    def _on_logits(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if (recording := self._active()) is not None:
            recording.on_logits(getattr(output, "logits", None), isinstance(kwargs.get("logits_to_keep"), Tensor))

    # ------------------------------------------------------------------------------------------------------ results

    def _begun(self) -> Recording:
        if self._recording is None:
            raise NoAttentionError(nothing_captured(self._layers[0]))
        return self._recording

    def step_at(self, position: int) -> tuple[Tensor, Tensor] | None:
        """One decoding step, that of the query at ``position``; None while it has not run.

        Head outputs (batch, H, width per head) and final state (batch, width).
        """
        return self._begun().step_at(position)

    def gaze_at(self, position: int) -> Tensor:
        """The heads' attention on the image tokens, (batch, H, N) float32, at a step that `step_at` knows."""
        return self._begun().gaze_at(position)

    def reduced_gaze(self) -> Tensor:
        """What ``reduce`` kept of the heads' gaze: (a, b, H, c). Raises `NoAttentionError` when nothing was captured."""
        device = self.model.device
        return torch.cat([layer.gaze.joined().to(device) for layer in self._begun().computed_layers()], dim=2)

    def collect(self, beams: Tensor | None = None, start: int = 0) -> CapturedActivations:
        """Everything captured since ``begin``.

        Args:
            beams: (captions, T) int64, the row of the batch in which each token was generated, if rows were reordered: the
                ``beam_indices`` of ``generate``.
            start: The first step that is wanted.

        Raises:
            NoAttentionError: Nothing was captured.
        """
        return self._begun().collect(beams, start)

    def logit_lens(self, beams: Tensor | None = None) -> LogitLens | None:
        """The logit lens on the image tokens, from the last layer's states before the final norm.

        Image tokens that were not captured, such as those of an earlier turn, and those that a row lacks are not known in it.

        Args:
            beams: As for `collect`.

        Returns:
            None where the image is no part of the text decoder's sequence, and when nothing was captured.
        """
        return None if self._recording is None else self._recording.image_states.lens(self.backbone, beams)

    def layer_lens(self, top: bool = False) -> LogitLens | None:
        """`logit_lens` on the states that enter the layer of `read_layer`, decoded as if they were the last.

        Args:
            top: Whether the most probable tokens are wanted.
        """
        if (recording := self._recording) is None:
            return None
        states = recording.image_states if self._read_layer is None else recording.middle_states
        return states.lens(self.backbone, top=top)
