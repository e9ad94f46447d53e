"""How is a glance read, and turned? A `AttentionRecorder` uses_answers to chosen attention heads of a stock transformers model as it runs.

transformers looks every attention kernel up by name in one registry (eager attention beside the module's class).
GazeGuard puts there, once per process and kernel, a wrapper around the kernel that it finds. The wrapper does nothing
unless the calling module carries a `AttentionRecorder`; so names, configurations, masks and kernels stay what they were, and the output
of the model is the kernel's own.

While a model decodes with a cache that only grows, the recorder keeps the chosen heads' queries alone. Attention is computed
from them and the cached keys in one product per layer when it is asked for (``collect``), exact to float rounding, and
nothing waits for the device. With any other cache each row is computed as it is heard. CapturedActivations are filed by the position of
their query, so that chunks, speculation that is taken back and continued conversations need no care of their own. Of the
model's logits the likeliest words and the entropy are kept: to compute them again is most of what judging words would cost.

In most models the picture is part of the prompt, and its cells are keys of every layer's self-attention. `VISUAL_KEY_SOURCES` tells the
other ways: modules of their own, whose keys are the picture or what an encoder made of picture and prompt.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gazeguard.attention.attribution import NUM_CONTRAST_TOKENS, top_k_statistics
from gazeguard.attention.backbone import Head, find_backbone
from gazeguard.attention.buffers import WIDTH, CapturedActivations, KeyLayout, LayerBuffers, RowBuffer, _side_by_side
from gazeguard.attention.kernels import EAGER, Call, _closed, _install, _rule_of, _scope, _sees_ahead
from gazeguard.attention.logit_lens import LogitLens
from gazeguard.errors import NoAttentionError, UnsupportedError

GROWING = ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")  # cache layers whose keys stay what and where they are


class AttentionRecorder:
    """Listens to ``heads`` of ``model``: a context manager that adds nothing to the model when it is left.

    with AttentionRecorder(model, heads) as recorder:
        recorder.begin(KeyLayout.from_ids(*visual_keys(model, inputs, input_ids, attention_mask)))
        model.generate(...)          # or one forward pass over prompt and caption
        rows = recorder.collect()

    One recorder hears one ``generate`` or one forward pass at a time: the first one after ``begin`` whose batch is that of the
    prompts, or a multiple of it. Passes with another cache (guidance, a probe of your own) are not heard.
    """

    def __init__(self, model: PreTrainedModel, heads: Sequence[Head]) -> None:
        self.model, self.backbone = model, find_backbone(model)
        known = set(self.backbone.heads())
        if not heads or not set(heads) <= known:
            strange = next(iter(sorted(set(heads) - known)), "to listen to (the list is empty)")
            raise UnsupportedError(
                f"{type(model).__name__} has no head {strange}: its text decoder has layers {min(known)[0]} to "
                f"{max(known)[0]} with {max(h for _, h in known) + 1} heads each. Heads are (layer, head) pairs."
            )
        self.heads: tuple[Head, ...] = tuple(sorted(set(heads)))
        self._numbers = sorted({layer for layer, _ in self.heads})
        self._handles: list[Any] = []
        self._prompts: KeyLayout | None = None
        self._opening_rule()

    def _opening_rule(self) -> tuple[str, Callable[[Call, int], Tensor | None]]:
        """The model's kernel now, and the rule that reads its mask. Raises `UnsupportedError` when there is none."""
        module = self.backbone.attention[self._numbers[0]]
        kernel = module.config._attn_implementation
        if (rule := _rule_of(kernel)) is None or (kernel == "eager" and EAGER not in _scope(module)):
            raise UnsupportedError(
                f"{type(self.model).__name__} runs {kernel!r} attention, whose masks GazeGuard cannot read. "
                'Call model.set_attn_implementation("sdpa") first; the outputs are the same.'
            )
        return kernel, rule

    def __enter__(self) -> AttentionRecorder:
        self._kernel, self._rule = self._opening_rule()
        _ = self.backbone.final_norm_weight  # runs the norm, so before anyone uses_answers to it
        if any("_gazeguard_tap" in module.__dict__ for module in self.backbone.attention.values()):
            raise UnsupportedError("This model is being watched already. Leave the other watch first, or copy the model.")
        for number in self._numbers:
            module = self.backbone.attention[number]
            module.__dict__["_gazeguard_tap"] = self
            _install(self._kernel, module)
            projected = functools.partial(self._hear_output, number)
            self._handles.append(self.backbone.projection(number).register_forward_pre_hook(projected))
        for norm in {norm for number in self._numbers for norm in self.backbone.norms.get(number, ())}:
            self._handles.append(norm.register_forward_pre_hook(self._hear_norm))
        self._handles.append(self.backbone.decoder.register_forward_pre_hook(self._hear_start, with_kwargs=True))
        self._handles.append(self.backbone.norm.register_forward_pre_hook(self._hear_hidden))
        self._handles.append(self.backbone.causal_lm.register_forward_hook(self._hear_logits, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._numbers:
            self.backbone.attention[number].__dict__.pop("_gazeguard_tap", None)
        while self._handles:
            self._handles.pop().remove()
        self._prompts = None

    # ------------------------------------------------------------------------------------------------- listening

    def begin(self, prompts: KeyLayout, reduce: Callable[[Tensor], Tensor] | None = None, reordered: bool = False) -> None:
        """Forget what was heard and listen to what follows these prompts.

        reduce:    what is kept of a layer's gaze (batch, K, r, N) float32 on the image cells, read r rows at a time: any
                   tensor (a, K, b, c). Only this is kept then, for `reduced_gaze` to give; it makes all heads of a large model
                   affordable
        reordered: the rows of the batch change places between words, as in beam search
        """
        self._prompts, self._reduce, self._reordered = prompts, reduce, reordered
        self._first = prompts.last  # the query at this position predicts the first new token
        device = prompts.columns.device
        self._layers = {}
        for number in self._numbers:
            heads = torch.tensor([h for la, h in self.heads if la == number], device=device)
            self._layers[number] = LayerBuffers(heads, self.backbone.width(self.backbone.attention[number])[1])
        self._hidden = RowBuffer()
        self._said = RowBuffer(), RowBuffer(), RowBuffer()  # as `top_k_statistics` gives them
        self._unsaid = 0  # rows of this pass whose logits are still to come
        self._states: Tensor | None = None  # of the image cells, (batch, N, width); NaN where they were not heard
        self._cells: LogitLens | None = None  # the same, read
        self._scales: dict[nn.Module, Tensor] = {}
        self._total = -1  # positions that the model has seen; -1 before the first pass
        self._live, self._wanted = False, 0
        self._turns: dict[int, Tensor | None] = {}

    def steer(self, bias: Tensor | None, prompt: bool = False, start: int | None = None) -> None:
        """Add ``bias`` to the chosen heads' scores of the image cells from a row on; None lets them go.

        bias:   (batch, H, N) float32, logits: positive draws the head's look to a cell, negative keeps it away
        prompt: turn the rows of the prompt, too, not only those that predict new words
        start:  the first new token whose row is turned, counted from 0; by default the first of the next pass
        The other heads, and every layer that holds none of these, run as they did: the kernel does its work first, and
        only the rows of the chosen heads are put in its place. Call it after ``begin``, between any two passes; what is
        called for a later token stays until a call for one later still.
        """
        row = max(0, self._total - self._first) if start is None else start
        self._turns[-self._first if prompt else row] = bias

    @property
    def _cache(self) -> Any:
        """The cache of the first pass, None without one. Held weakly: it is large, and whoever generates may drop it."""
        return self._held and self._held()

    def _turned(self, rows: int) -> list[tuple[slice, Tensor]]:
        """Which of the pass's last ``rows`` rows are turned, and by which bias."""
        if not self._turns:
            return []
        end = self._total - self._first
        begin, starts = end - rows, sorted(self._turns)
        parts = [(max(at, begin), min(until, end), self._turns[at]) for at, until in itertools.pairwise([*starts, end])]
        return [(slice(at - begin, until - begin), bias) for at, until, bias in parts if bias is not None and at < until]

    @torch.compiler.disable
    def _hear_start(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first layer: is this pass one to hear, and which positions does it bring?"""
        self._live, self._wanted, self._unsaid = False, 0, 0
        if self._prompts is None:
            return
        named = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "hidden_states")]
        given = next(value for value in (*named, *args) if value is not None)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # as transformers calls it from 5.24 on, and before
        if self._total < 0:
            times, rest = divmod(given.shape[0], self._prompts.real.shape[0])
            if rest or not times:
                return
            if times > 1:
                self._prompts = self._prompts.repeated(times)
                self._turns = {
                    at: None if bias is None else bias.repeat_interleave(times, dim=0) for at, bias in self._turns.items()
                }
            self._held = None if cache is None else weakref.ref(cache)
            past = 0 if cache is None else int(cache.get_seq_length())
        elif (
            cache is not self._cache or (cache is None) != (self._held is None) or given.shape[0] != self._prompts.real.shape[0]
        ):
            return
        else:
            past = 0 if cache is None else cache.get_seq_length()
            past = past if isinstance(past, int) else self._total  # a static cache keeps its length on the device
        total = past + given.shape[1]
        if cache is None and total <= self._total:
            raise UnsupportedError("The model ran twice in one watch. Call begin() before each run.")
        self._past, self._total, self._live = past, total, True
        self._wanted = max(0, total - max(past, self._first))

    @torch.compiler.disable
    def hear(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: dict[str, Any],
        result: tuple[Tensor, Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """Called by the wrapper after RoPE, cache and kernel: query (batch, heads, q, d), key and value (batch, kv heads, S,
        d).

        Returns the kernel's own ``result``, with the chosen heads' rows put in their place when they are steered.
        Raises `UnsupportedError` for a mask that shows written tokens what comes after them.
        """
        length = query.shape[2]
        wanted = min(self._wanted, length)
        rows = length if min(self._turns, default=0) < 0 else wanted
        if not self._live or not rows or options.get("cache") is not None:  # a paged cache is not this watch's
            return result
        self._check_keys(module.layer_idx, key.shape[2])
        layer = self._layers[module.layer_idx]
        layer.group = query.shape[1] // key.shape[1]
        call = Call(module, query, key, mask, options)
        opening = self._rule(call, rows)
        replayed = wanted > 1 and self._past <= self._first  # words that came in one pass with their prompt
        words = key.shape[2] if self.backbone.key_source is None else key.shape[2] - self._prompts.real.shape[1]
        if replayed and opening is not None and _sees_ahead(opening[:, :, -wanted:, :words]):
            raise UnsupportedError(
                f"Layer {module.layer_idx} lets written tokens attend to later ones, as if they were a prompt; while the model "
                "writes it cannot. Mark them as written: in PaliGemma with token_type_ids of 1."
            )
        if opening is not None and opening.shape[1] > 1:
            opening = opening[:, layer.heads]
        chosen = query[:, :, -rows:].index_select(1, layer.heads)
        layer.scaling = call.option("scaling", query.shape[-1] ** -0.5)
        start = self._total - wanted - self._first
        plain = not any(call.option(name) is not None for name in ("softcap", "s_aux", "sinks", "position_bias"))
        turned = self._turned(rows)
        if rows == 1 and plain and not turned and self._grows(module.layer_idx):
            self._keep_pending(layer, start, chosen, key, opening)
            return result
        self._read_pending(layer)
        if self._kernel == "eager" and not turned:  # it says itself what it did
            weights = result[1][:, layer.heads, -rows:].float()
        else:
            weights = self._weigh(layer, call, chosen, opening, turned)
        if turned:
            values = value.index_select(1, layer.heads // layer.group).float()
            output = result[0].clone()
            for at, _ in turned:
                made = weights[:, :, at] @ values  # (batch, K, r, d)
                output[:, length - rows :][:, at, layer.heads] = made.transpose(1, 2).to(output.dtype)
            result = (output, *result[1:])
        if wanted:
            self._file(layer, start, weights[:, :, -wanted:], self._gone(module.layer_idx, key.shape[2]))
        return result

    def _check_keys(self, number: int, keys: int) -> None:
        """Raises `UnsupportedError` when a looking module's keys are not those that the prompts were said to have."""
        look, told = self.backbone.key_source, self._prompts.real.shape[1]
        if look is not None and (keys < told if look.after_words else keys != told):
            raise UnsupportedError(
                f"Layer {number} looks among {keys} keys, but the batch that the watch was opened for tells {told}: the inputs "
                "are another batch's, or the cache makes room for more. Pass the same inputs to both, and a dynamic cache."
            )

    def _gone(self, number: int, keys: int) -> int:
        """How many of the prompt's keys have left a layer's cache of so many keys, from the first on; negative when so many
        others are in front of them.
        """
        if self.backbone.key_source is not None:
            return self._prompts.real.shape[1] - keys
        layers = getattr(self._cache, "layers", ())
        keeps_prompt = number < len(layers) and hasattr(layers[number], "prefill_length")  # what goes was written
        return 0 if keeps_prompt else max(0, self._total - keys)

    def _grows(self, number: int) -> bool:
        """Whether the keys of a layer stay what and where they are until the end, so that they can be read then."""
        layers = getattr(self._cache, "layers", ())
        return (
            not self._reordered
            and number < len(layers)
            and type(layers[number]).__name__ in GROWING
            and not getattr(self._cache, "offloading", False)
        )

    def _weigh(
        self, layer: LayerBuffers, call: Call, query: Tensor, opening: Tensor | None, turned: Sequence[tuple[slice, Tensor]]
    ) -> Tensor:
        """Attention (batch, K, r, S) of the chosen heads' queries (batch, K, r, d), with all that alters scores.

        turned: which of the rows are steered, by a bias (batch, H, N)
        """
        rows = query.shape[2]
        key = call.key.index_select(1, layer.heads // layer.group).float()
        scores = query.float() @ key.transpose(2, 3) * layer.scaling
        if (cap := call.option("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        if (bias := call.option("position_bias")) is not None:
            bias = bias[:, :, -rows:, : scores.shape[3]].float()
            scores = scores + (bias if bias.shape[1] == 1 else bias[:, layer.heads])
        if opening is not None:
            scores = scores + opening
        for at, bias in turned:
            number = call.module.layer_idx
            of_layer = [i for i, (la, _) in enumerate(self.heads) if la == number]
            columns, cells = self._columns(self._gone(number, call.key.shape[2]))
            turn = (bias[:, of_layer] * cells[:, None]).to(scores)[:, :, None].expand(-1, -1, at.stop - at.start, -1)
            scores[:, :, at] = scores[:, :, at].scatter_add(3, columns[:, None, None].expand(turn.shape), turn)
        sink = call.option("s_aux", call.option("sinks", getattr(call.module, "sinks", None)))
        if sink is not None:  # one per head, or one per row and head
            sink = sink.view(1, -1, 1, 1) if sink.ndim == 1 else sink[:, :, -rows:]
            scores = torch.cat((scores, sink.float()[:, layer.heads].expand(*scores.shape[:3], 1)), dim=-1)
        weights = scores.softmax(-1).nan_to_num()  # a row of padding may see nothing at all
        return weights if sink is None else weights[..., :-1]

    def _columns(self, offset: int) -> tuple[Tensor, Tensor]:
        """The image cells' places among the keys, when the first ``offset`` positions have left the cache."""
        if not offset:
            return self._prompts.columns, self._prompts.valid
        columns = self._prompts.columns - offset
        return columns.clamp(min=0), self._prompts.valid & (columns >= 0)

    def _on_cells(self, weights: Tensor, offset: int) -> Tensor:
        """What of attention (batch, K, r, S) lies on the image cells: (batch, K, r, N); ``offset`` as for `_file`."""
        columns, cells = self._columns(offset)
        return weights.gather(3, columns[:, None, None].expand(-1, *weights.shape[1:3], -1)) * cells[:, None, None]

    def _file(self, layer: LayerBuffers, start: int, weights: Tensor, offset: int) -> None:
        """Attention (batch, K, r, S) of the rows from ``start`` on, whose first key is the prompt's at ``offset``, or so many
        before it: see `_gone`.
        """
        gaze = self._on_cells(weights, offset)
        if self._reduce is not None:
            layer.gaze.put(start, self._reduce(gaze).transpose(1, 2))
            return
        kinds, before = self._prompts.segments[:, max(0, offset) :], max(0, -offset)
        after = before + kinds.shape[1]
        segment_mass = weights[..., before:after] @ kinds[:, None]
        segment_mass[..., 2] += weights[..., :before].sum(-1) + weights[..., after:].sum(-1)
        layer.gaze.put(start, gaze.transpose(1, 2))
        layer.segment_mass.put(start, segment_mass.transpose(1, 2))

    def _keep_pending(self, layer: LayerBuffers, start: int, query: Tensor, key: Tensor, opening: Tensor | None) -> None:
        """Keep the query (batch, K, 1, d) of a row, to be read among these keys, or those that they become."""
        keys = key.shape[2]
        while layer.pending and layer.pending[-1][0] >= start:
            layer.pending.pop()
        layer.openings.cut(start)
        shape = [] if opening is None else [opening.shape[:2]]
        # Openings of another kind could not be joined with these.
        if layer.pending and [kept.shape[:3:2] for _, kept in layer.openings.parts[-1:]] != shape:
            self._read_pending(layer)
        if opening is not None:  # of a width that many rows share, so that they share a block
            layer.openings.put(start, F.pad(opening, (0, -keys % WIDTH)).transpose(1, 2))
        layer.queries.put(start, query.transpose(1, 2))
        layer.pending.append((start, keys))
        layer.key = key

    def _read_pending(self, layer: LayerBuffers) -> None:
        """Turn the pending queries into attention, from the keys as they are now."""
        if not layer.pending:
            return
        start = layer.pending[0][0]
        self._file(layer, start, self._attention(layer, start), 0)
        layer.pending, layer.key = [], None
        layer.queries.cut(start)
        layer.openings.cut(start)

    def _attention(self, layer: LayerBuffers, start: int) -> Tensor:
        """Attention (batch, K, r, S) of the pending rows from ``start`` on."""
        query = layer.queries.joined(start).transpose(1, 2).float()  # (batch, K, r, d)
        key = layer.key.index_select(1, layer.heads // layer.group).float()
        scores = query @ key.transpose(2, 3) * layer.scaling
        keys = scores.shape[3]
        lengths = [length for at, length in layer.pending if at >= start]
        if min(lengths) < keys:
            device = key.device
            scores += _closed(torch.arange(keys, device=device) < torch.tensor(lengths, device=device)[:, None])
        if layer.openings.parts:
            scores += layer.openings.joined(start).transpose(1, 2)[..., :keys]
        return scores.softmax(-1)

    @torch.compiler.disable
    def _hear_output(self, number: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """What the output projection of a layer gets: all heads' outputs, side by side."""
        if self._prompts is None or not self._wanted or self._reduce is not None:
            return
        layer = self._layers[number]
        rows = args[0][:, -self._wanted :]
        heads = rows.unflatten(-1, (-1, layer.width))
        layer.output.put(self._total - rows.shape[1] - self._first, heads.index_select(2, layer.heads))

    @torch.compiler.disable
    def _hear_norm(self, norm: nn.LayerNorm, args: tuple[Tensor, ...]) -> None:
        """What a norm on the way multiplies each row with, (batch, r, 1, 1)."""
        if self._prompts is not None and self._wanted:
            rows = args[0][:, -self._wanted :].float()
            self._scales[norm] = (rows.var(-1, unbiased=False) + norm.eps).rsqrt()[..., None, None]

    @torch.compiler.disable
    def _hear_hidden(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._prompts is not None and self._wanted:
            for number, layer in self._layers.items():
                for norm in self.backbone.norms.get(number, ()):
                    start, heads = layer.output.parts[-1]
                    layer.output.parts[-1] = start, heads * self._scales[norm]
            rows = args[0][:, -self._wanted :]
            start = self._total - rows.shape[1] - self._first
            self._hidden.put(start, rows)
            for track in self._said:
                track.cut(start)
            self._unsaid = rows.shape[1] if self._reduce is None else 0
        if self._live and self._past <= self._first and self.backbone.key_source is None and self._reduce is None:
            columns = self._prompts.columns - self._past
            here = self._prompts.valid & (columns >= 0) & (columns < args[0].shape[1])
            where = columns.clamp(0, args[0].shape[1] - 1)[..., None].expand(-1, -1, args[0].shape[2])
            before = torch.full_like(where, torch.nan, dtype=args[0].dtype) if self._states is None else self._states
            self._states = torch.where(here[..., None], args[0].gather(1, where), before)
            self._cells = None
        self._live, self._wanted = False, 0  # the pass is over; whoever uses the norm now is someone else

    @torch.compiler.disable
    def _hear_logits(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """What the model says after the rows that it has just run, if it says it of all of them and of no others."""
        rows, self._unsaid = self._unsaid, 0
        logits, picked = getattr(output, "logits", None), isinstance(kwargs.get("logits_to_keep"), Tensor)
        if not rows or logits is None or logits.shape[1] != rows or picked:
            return
        start, few = self._total - rows - self._first, max(1, self.backbone.logits_chunk // len(logits))
        for at in range(0, rows, few):
            said = top_k_statistics(logits[:, at : at + few].detach().float().log_softmax(-1))
            for track, value in zip(self._said, said, strict=True):
                track.put(start + at, value)

    # --------------------------------------------------------------------------------------------------- telling

    def step_at(self, position: int) -> tuple[Tensor, Tensor] | None:
        """One row alone, that of the query at ``position``: head outputs (batch, H, width per head) and final state
        (batch, width); None while it has not been heard.
        """
        row = position - self._first
        if not 0 <= row < len(self._hidden):
            return None
        outputs = [layer.output.row(row).float() for layer in self._layers.values()]
        return _side_by_side(outputs, dim=1), self._hidden.row(row)

    def gaze_at(self, position: int) -> Tensor:
        """The heads' attention on the image cells, (batch, H, N) float32, of a row that `step_at` has heard."""
        row = position - self._first
        found = []
        for layer in self._layers.values():
            if layer.pending and layer.pending[-1][0] == row:  # the others can wait for the one product that reads them all
                found.append(self._on_cells(self._attention(layer, row), 0)[:, :, 0])
            else:
                self._read_pending(layer)
                found.append(layer.gaze.row(row))
        return torch.cat(found, dim=1)

    def _heard(self) -> list[LayerBuffers]:
        """The layers, with everything read. Raises `NoAttentionError` when one heard nothing."""
        for number in self._numbers:
            if self._prompts is not None:
                self._read_pending(self._layers[number])
            if self._prompts is None or not len(self._layers[number].gaze):
                raise NoAttentionError(
                    f"The recorder on layer {number} heard no attention: the model did not run, or ran by another way than its "
                    "own generate or forward. Run the model inside the watch, with the batch that the watch was opened for."
                )
        return list(self._layers.values())

    def reduced_gaze(self) -> Tensor:
        """What ``reduce`` kept of the heads' gaze: (a, b, H, c). Raises `NoAttentionError` when nothing was heard."""
        device = self.model.device
        return torch.cat([layer.gaze.joined().to(device) for layer in self._heard()], dim=2)

    def collect(self, beams: Tensor | None = None, start: int = 0) -> CapturedActivations:
        """Everything heard since ``begin``. Raises `NoAttentionError` when that is nothing.

        beams: (captions, T) int64, the row of the batch that each word was written in, if rows changed places; the
               ``beam_indices`` of ``generate``
        start: the first row that is wanted
        """
        heard = [tuple(track.joined(start) for track in (la.gaze, la.segment_mass, la.output)) for la in self._heard()]
        device = self._prompts.columns.device
        tensors = [_side_by_side([part.to(device) for part in parts], dim=2) for parts in zip(*heard, strict=True)]
        hidden = self._hidden.joined(start)
        empty = hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
        words = empty[..., None].repeat(1, 1, min(NUM_CONTRAST_TOKENS + 1, len(self.backbone.unembedding.weight)))
        blanks = (torch.full_like(words, -1, dtype=torch.int64), words, empty)
        tensors += [hidden, *(track.over(blank, start) for track, blank in zip(self._said, blanks, strict=True))]
        if beams is not None:
            own = beams.to(device).clamp(min=0)
            steps = torch.arange(own.shape[1], device=device)
            tensors = [tensor[own.to(tensor.device), steps.to(tensor.device)] for tensor in tensors]
        gaze, segment_mass, output, *others = tensors
        return CapturedActivations(gaze, segment_mass, output.float(), *others)

    def logit_lens(self, beams: Tensor | None = None) -> LogitLens | None:
        """What the last layer made of each image cell, before the final norm; not known for cells that this watch did not
        hear, such as those of an earlier turn, and that a row does not have. None where the picture is no part of the text
        decoder's sequence. ``beams`` as for `collect`.
        """
        if self._states is None:
            return None
        if self._cells is None:
            self._cells = LogitLens.read(self.backbone, self._states)
        return self._cells if beams is None else self._cells.select(beams[:, 0].to(self._states.device))
