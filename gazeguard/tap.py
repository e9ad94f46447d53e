"""How is a glance read? A `Tap` listens to chosen attention heads of a stock transformers model while it runs.

transformers looks every attention kernel up by name in one registry. GazeGuard registers, once per process and for each
name, a wrapper around the kernel that is already there. The wrapper does nothing unless the calling module carries a
`Tap`; so names, configurations, masks and kernels stay what they were, and the output of the model is the kernel's own.

While a model decodes, the tap only keeps the chosen heads' queries. Attention is computed from them and the key cache in
one product per layer when it is asked for (``collect``), exact to float rounding, and nothing waits for the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from gazeguard.errors import NothingSeenError, UnsupportedError

KERNELS = ("sdpa",)  # the kernels whose computation the tap reproduces
RIVALS = 20  # candidates that a readout is measured against
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
SCORE_CHANGERS = ("softcap", "s_aux", "sinks", "position_bias")  # arguments that alter scores as the tap does not

Head = tuple[int, int]  # (layer, head)


# ------------------------------------------------------------------------------------------------ the parts of a model


@dataclass(frozen=True)
class Backbone:
    """The parts of a VLM's text decoder that the tap needs: where heads are, and how their output becomes a logit."""

    attention: dict[int, nn.Module]  # layer -> attention module
    norm: nn.Module  # the final norm
    unembedding: nn.Module
    config: Any  # the text configuration
    logit_changes: tuple[str, ...] = ()  # those of `LOGIT_CHANGES` that this model's forward makes

    def heads(self) -> list[Head]:
        """Every head that can be watched, in order."""
        return [(layer, head) for layer, module in self.attention.items() for head in range(self.width(module)[0])]

    def projection(self, layer: int) -> nn.Linear:
        """The layer's output projection."""
        return _first(self.attention[layer], OUTPUT_PROJECTIONS)

    def width(self, module: nn.Module) -> tuple[int, int]:
        """(heads, numbers per head) of an attention module's output."""
        columns = _first(module, OUTPUT_PROJECTIONS).in_features
        per_head = getattr(module, "head_dim", None) or columns // self.config.num_attention_heads
        return columns // per_head, per_head

    @functools.cached_property
    def gain(self) -> tuple[Tensor, bool]:
        """The final norm's weight (width,) fp32, however it is parametrised, and whether it subtracts the mean (LayerNorm).

        A vector of alternating signs has mean 0 and square mean 1, so every RMS or layer norm maps it to +-weight (+ bias).
        """
        weight = self.unembedding.weight
        signs = torch.ones(1, weight.shape[1], device=weight.device, dtype=weight.dtype)
        signs[:, 1::2] = -1
        with torch.no_grad():
            up, down, shifted = self.norm(signs), self.norm(-signs), self.norm(signs + 1)
        return (signs * (up - down) / 2)[0].float(), torch.allclose(shifted, up, atol=1e-2, rtol=1e-2)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model says after the last layer's ``hidden`` (..., width): logits (..., vocabulary), fp32."""
        logits = self.unembedding(self.norm(hidden)).float()
        for name in self.logit_changes:
            if (value := getattr(self.config, name, None)) is not None:
                logits = LOGIT_CHANGES[name](logits, value)
        return logits


# What some families do to logits after the unembedding, by the name of the configuration key. A class may have the key
# and not follow it (Aya Vision around Cohere2), so only what its forward names is done.
LOGIT_CHANGES = {
    "final_logit_softcapping": lambda logits, value: value * torch.tanh(logits / value),
    "logit_scale": lambda logits, value: logits * value,
    "logits_scaling": lambda logits, value: logits / value,
}


def _first(module: nn.Module, names: Sequence[str]) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _names(module: nn.Module) -> set[Any]:
    """The names and constants in the code of a module's forward."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else {*code.co_names, *code.co_consts}


def _uses_registry(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _names(module)


def find_backbone(model: PreTrainedModel) -> Backbone:
    """The text decoder's attention modules, final norm and unembedding.

    Raises `UnsupportedError` for a model whose text attention does not go through transformers' attention registry, and
    for one whose kernel is not in `KERNELS`.
    """
    name = type(model).__name__
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = {
        path: module
        for path, module in decoder.named_modules()
        if hasattr(module, "layer_idx") and _uses_registry(module) and _first(module, OUTPUT_PROJECTIONS) is not None
    }
    if not found:
        raise UnsupportedError(
            f"{name} has no text attention that GazeGuard can watch: none of its modules calls transformers' attention "
            "registry. Models that compute attention by themselves (BLIP, GIT) or run remote code are not supported."
        )
    owner = decoder.get_submodule(next(iter(found)).rpartition("layers.")[0].rstrip("."))
    norm, unembedding = _first(owner, FINAL_NORMS), model.get_output_embeddings()
    if norm is None or unembedding is None:
        missing = "a final norm" if norm is None else "an output embedding"
        raise UnsupportedError(f"{name}'s text decoder {type(owner).__name__} has no {missing} that GazeGuard can find.")
    attention = {module.layer_idx: module for module in found.values()}
    changes = tuple(name for name in LOGIT_CHANGES if name in _names(model))
    return Backbone(attention, norm, unembedding, model.config.get_text_config(decoder=True), changes)


# ---------------------------------------------------------------------------------------------------- the wrapper


def _install() -> None:
    """Put the wrapper around each kernel; a second call finds it there. For modules without a tap it costs one look-up."""
    for name in KERNELS:
        kernel = ALL_ATTENTION_FUNCTIONS[name]
        if hasattr(kernel, "gazeguard"):
            continue

        @functools.wraps(kernel)
        def watched(module, query, key, value, attention_mask, *args, _kernel=kernel, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
            result = _kernel(module, query, key, value, attention_mask, *args, **kwargs)
            tap = module.__dict__.get("_gazeguard_tap")
            if tap is not None:
                tap.hear(module, query, key, value, attention_mask, kwargs)
            return result

        watched.gazeguard = True
        AttentionInterface.register(name, watched)


@dataclass(frozen=True)
class Prompts:
    """Where things are in a left-padded batch of prompts of P tokens.

    columns: (batch, N) int64, the position of each image token; rows with fewer repeat position 0
    cells:   (batch, N) bool, which of the columns are real
    kinds:   (batch, P, 4) float32, one-hot over `gazeguard.trace.SHARES`; all zero for padding
    real:    (batch, P) bool, False for padding
    """

    columns: Tensor
    cells: Tensor
    kinds: Tensor
    real: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int) -> Prompts:
        """Read off a batch of prompt ids (batch, P)."""
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        image = (input_ids == image_token_id) & real
        cells = int(image.sum(1).max())
        # A stable sort brings each row's image positions to the front, in order.
        order = torch.argsort(~image, dim=1, stable=True)[:, :cells]
        valid = image.gather(1, order)
        first = torch.zeros_like(real).scatter_(1, real.int().argmax(1, keepdim=True), True) & real & ~image
        prompt = real & ~image & ~first
        kinds = torch.stack((image, prompt, torch.zeros_like(real), first), dim=-1).float()
        return cls(order.masked_fill(~valid, 0), valid, kinds, real)


@dataclass(frozen=True)
class Rows:
    """What was heard: for each row b and each t, the query that predicted token P + t. Tensors on the model's device.

    gaze:   (batch, T, H, N or R) float32, attention on each image cell, or on each region when regions were asked for
    shares: (batch, T, H, 4) float32, attention on `gazeguard.trace.SHARES`
    output: (batch, T, H, width per head) float32, each head's output before the output projection
    hidden: (batch, T, model width), the last layer's state before the final norm, in the model's dtype
    """

    gaze: Tensor
    shares: Tensor
    output: Tensor
    hidden: Tensor


def _sees_ahead(mask: Tensor) -> bool:
    """Whether the last rows' mask (batch, 1 or heads, r, S), bool or additive, opens a key after the row's own."""
    rows, length = mask.shape[-2:]
    is_open = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(is_open.triu(length - rows + 1).any())


class Tap:
    """Listens to ``heads`` of ``model``: a context manager that adds nothing to the model when it is left.

    with Tap(model, heads) as tap:
        tap.begin(Prompts.of(input_ids, attention_mask, image_token_id))
        model.generate(...)          # or one forward pass over prompt and caption
        rows = tap.collect()

    One tap hears one ``generate`` or one forward pass at a time. Keys are taken as they are when ``collect`` is called,
    which is right for caches that only grow.
    """

    def __init__(self, model: PreTrainedModel, heads: Sequence[Head]) -> None:
        self.backbone = find_backbone(model)
        kernel = model.config.get_text_config(decoder=True)._attn_implementation
        if kernel not in KERNELS:
            raise UnsupportedError(
                f"{type(model).__name__} runs {kernel!r} attention; GazeGuard reads heads beside {', '.join(KERNELS)}. "
                'Call model.set_attn_implementation("sdpa") first; the outputs are the same.'
            )
        known = set(self.backbone.heads())
        if not heads or not set(heads) <= known:
            strange = next(iter(sorted(set(heads) - known)), "to listen to (the list is empty)")
            raise UnsupportedError(
                f"{type(model).__name__} has no head {strange}: its text decoder has layers {min(known)[0]} to "
                f"{max(known)[0]} with {max(h for _, h in known) + 1} heads each. Heads are (layer, head) pairs."
            )
        self.heads: tuple[Head, ...] = tuple(sorted(set(heads)))
        device = model.device
        self._of_layer = {
            layer: torch.tensor([h for la, h in self.heads if la == layer], device=device)
            for layer in sorted({layer for layer, _ in self.heads})
        }
        self._handle: Any = None
        self._prompts: Prompts | None = None

    def __enter__(self) -> Tap:
        _install()
        _ = self.backbone.gain  # runs the norm, so before anyone listens to it
        modules = [self.backbone.attention[layer] for layer in self._of_layer]
        if any("_gazeguard_tap" in module.__dict__ for module in self.backbone.attention.values()):
            raise UnsupportedError("This model is being watched already. Leave the other watch first, or copy the model.")
        for module in modules:
            module.__dict__["_gazeguard_tap"] = self
        self._handle = self.backbone.norm.register_forward_pre_hook(self._hear_hidden)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._of_layer:
            self.backbone.attention[layer].__dict__.pop("_gazeguard_tap", None)
        self._handle.remove()
        self._prompts = None

    # ------------------------------------------------------------------------------------------------- listening

    def begin(self, prompts: Prompts, regions: Tensor | None = None) -> None:
        """Forget what was heard and listen to what follows these prompts.

        regions: (batch, N, R) float32; when given, gaze is summed over cells into R regions as it is read.
        """
        self._prompts, self._regions = prompts, regions
        self._first = prompts.real.shape[1] - 1  # the query at this position predicts the first new token
        self._queries: dict[int, list[Tensor]] = {layer: [] for layer in self._of_layer}
        self._read: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in self._of_layer}
        self._memory: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._hidden: list[Tensor] = []
        self._length = dict.fromkeys(self._of_layer, 0)  # keys heard so far
        self._wanted = 0

    def hear(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        """Called by the wrapper after RoPE and cache: query (batch, heads, q, d), key and value (batch, kv heads, S, d).

        Raises `UnsupportedError` for what would be read wrong: altered scores, a cache that does not simply grow from
        empty, and a mask that shows written tokens what comes after them.
        """
        layer = module.layer_idx
        if self._prompts is None or self._prompts.real.shape[0] != query.shape[0]:
            self._wanted = 0  # not the batch that was announced: its final states are not wanted either
            return
        window = getattr(module, "sliding_window", None) or options.get("sliding_window")  # Mistral: an argument alone
        if (window and key.shape[2] >= window) or any(options.get(name) is not None for name in SCORE_CHANGERS):
            raise UnsupportedError(
                f"Layer {layer} of this model changes its attention scores (sliding window, soft cap, sink or "
                "position bias), which the tap does not reproduce. Choose heads in other layers."
            )
        past = key.shape[2] - query.shape[2]
        if past != self._length[layer]:
            raise UnsupportedError(
                f"Layer {layer} has {past} earlier keys where the tap has heard {self._length[layer]}: the cache is "
                "static or continued, or the model ran twice. Use the default, growing cache, and begin() before each run."
            )
        self._length[layer] = key.shape[2]
        self._wanted = key.shape[2] - max(past, self._first)
        if self._wanted <= 0:
            return
        if self._wanted > 1 and mask is not None and _sees_ahead(mask[:, :, -self._wanted :, : key.shape[2]]):
            raise UnsupportedError(
                f"Layer {layer} lets written tokens attend to later ones, as if they were a prompt; while the model "
                "writes it cannot. Mark them as written: in PaliGemma with token_type_ids of 1."
            )
        chosen = query[:, :, -self._wanted :].index_select(1, self._of_layer[layer])
        scaling = options.get("scaling")
        self._queries[layer].append(chosen)
        self._memory[layer] = (key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        if self._wanted > 1:  # a teacher-forced pass: read at once, so that long queries are not kept
            self._look(layer)

    def _hear_hidden(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._prompts is not None and self._wanted > 0:
            self._hidden.append(args[0][:, -self._wanted :])

    def _look(self, layer: int) -> None:
        """Turn the layer's kept queries into attention, from the keys as they are now."""
        if not self._queries[layer]:
            return
        prompts = self._prompts
        query = torch.cat(self._queries[layer], dim=2).float()  # (batch, K, r, d)
        self._queries[layer] = []
        key, value, scaling = self._memory[layer]
        group = self.backbone.width(self.backbone.attention[layer])[0] // key.shape[1]
        of_head = self._of_layer[layer] // group
        key, value = key.index_select(1, of_head).float(), value.index_select(1, of_head).float()
        start = self._first + sum(part[0].shape[2] for part in self._read[layer])
        batch, length, rows = key.shape[0], key.shape[2], query.shape[2]
        at = torch.arange(start, start + rows, device=key.device)
        may = torch.arange(length, device=key.device) <= at[:, None]  # (r, S): causal
        real = torch.ones(batch, length, dtype=torch.bool, device=key.device)
        real[:, : prompts.real.shape[1]] = prompts.real
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~(may & real[:, None, None]), float("-inf"))
        weights = scores.softmax(-1)
        columns = prompts.columns[:, None, None].expand(-1, *weights.shape[1:3], -1)
        gaze = weights.gather(3, columns) * prompts.cells[:, None, None]
        if self._regions is not None:
            gaze = gaze @ self._regions[:, None]
        shares = weights[..., : prompts.kinds.shape[1]] @ prompts.kinds[:, None]
        shares[..., 2] = weights[..., prompts.kinds.shape[1] :].sum(-1)
        self._read[layer].append((gaze, shares, weights @ value))

    def latest(self) -> tuple[Tensor, Tensor]:
        """The newest row alone: each head's output (batch, H, width per head) and the final state (batch, width)."""
        for layer in self._of_layer:
            self._look(layer)
        outputs = [self._read[layer][-1][2][:, :, -1] for layer in self._of_layer]
        return torch.cat(outputs, dim=1), self._hidden[-1][:, -1]

    def collect(self) -> Rows:
        """Everything heard since ``begin``. Raises `NothingSeenError` when that is nothing."""
        heard: dict[int, tuple[Tensor, ...]] = {}
        for layer in self._of_layer:
            if self._prompts is not None:
                self._look(layer)
            if self._prompts is None or not self._read[layer]:
                raise NothingSeenError(
                    f"The tap on layer {layer} heard no attention: the model did not run, or ran by another way than its "
                    "own generate or forward. Run the model inside the watch, with the batch that the watch was opened for."
                )
            heard[layer] = tuple(torch.cat(parts, dim=2) for parts in zip(*self._read[layer], strict=True))
        gaze, shares, output = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*heard.values(), strict=True))
        return Rows(gaze, shares, output, torch.cat(self._hidden, dim=1))


# ------------------------------------------------------------------------------------------- from a look to a logit


def readout(backbone: Backbone, heads: Sequence[Head], output: Tensor, hidden: Tensor, directions: Tensor) -> Tensor:
    """What each head's look adds to a logit: direct logit attribution with the final norm's scale held fixed.

    output:     (..., H, width per head), heads' outputs before the output projection
    hidden:     (..., width), state before the final norm
    directions: (..., width), an unembedding row, or a difference of such rows
    returns     (..., H) float32 logits: ``W_U g/|x| W_O o``, whose sum over all heads, all MLPs and the embedding is the logit
                (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; DESIGN: readout)
    """
    gain, centres = backbone.gain
    state = hidden.float()
    if centres:
        state = state - state.mean(-1, keepdim=True)
    directions = directions.float() * gain / state.pow(2).mean(-1, keepdim=True).sqrt()
    if centres:
        directions = directions - directions.mean(-1, keepdim=True)
    parts = []
    for layer in sorted({layer for layer, _ in heads}):
        chosen = [head for la, head in heads if la == layer]
        per_head = output.shape[-1]
        weight = backbone.projection(layer).weight.unflatten(1, (-1, per_head))[:, chosen].float().flatten(1)
        parts.append((directions @ weight).unflatten(-1, (-1, per_head)))  # (..., chosen heads, width per head)
    return (torch.cat(parts, dim=-2) * output).sum(-1)


@dataclass(frozen=True)
class Words:
    """What the model thought of each written token: all (batch, T) except readout (batch, T, H); nats and logits."""

    logprobs: Tensor
    entropy: Tensor
    readout: Tensor


def judge_words(backbone: Backbone, heads: Sequence[Head], rows: Rows, written: Tensor) -> Words:
    """Log-probability, entropy and readout of the written tokens (batch, T), from the rows that predicted them.

    The readout's direction is the token's unembedding row minus the mean over its rivals, the `RIVALS` likeliest others.
    """
    logprobs, entropy, looked = [], [], []
    table = backbone.unembedding.weight
    for hidden, output, token in zip(rows.hidden, rows.output, written, strict=True):  # one caption's logits at a time
        logs = backbone.logits(hidden).log_softmax(-1)
        likely = logs.topk(min(RIVALS + 1, logs.shape[-1]), dim=-1).indices  # (T, RIVALS + 1)
        rival = (likely != token[:, None]).float()
        rivals = (table[likely].float() * rival[..., None]).sum(1) / rival.sum(1, keepdim=True)
        logprobs.append(logs.gather(-1, token[:, None])[:, 0])
        entropy.append(-(logs.exp() * logs.clamp(min=-1e9)).sum(-1))
        looked.append(readout(backbone, heads, output, hidden, table[token].float() - rivals))
    return Words(torch.stack(logprobs), torch.stack(entropy), torch.stack(looked))
