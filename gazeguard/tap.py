"""How is a glance read, and turned? A `Tap` listens to chosen attention heads of a stock transformers model as it runs.

transformers looks every attention kernel up by name in one registry (eager attention beside the module's class).
GazeGuard puts there, once per process and kernel, a wrapper around the kernel that it finds. The wrapper does nothing
unless the calling module carries a `Tap`; so names, configurations, masks and kernels stay what they were, and the output
of the model is the kernel's own.

While a model decodes with a cache that only grows, the tap keeps the chosen heads' queries alone. Attention is computed
from them and the cached keys in one product per layer when it is asked for (``collect``), exact to float rounding, and
nothing waits for the device. With any other cache each row is computed as it is heard. Rows are filed by the position of
their query, so that chunks, speculation that is taken back and continued conversations need no care of their own. Of the
model's logits the likeliest words and the entropy are kept: to compute them again is most of what judging words would cost.

In most models the picture is part of the prompt, and its cells are keys of every layer's self-attention. `LOOKS` tells the
other ways: modules of their own, whose keys are the picture or what an encoder made of picture and prompt.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from gazeguard.errors import InputError, NothingSeenError, UnsupportedError
from gazeguard.inputs import cell_token_ids, decoder_prompt, image_token_id

EAGER = "eager_attention_forward"
GROWING = ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")  # cache layers whose keys stay what and where they are
LEAST = -30.0  # nats; what is less likely is as good as impossible
LOGITS_AT_ONCE = 2**16  # numbers that a CPU's cache holds; so many logits are worked on together, or those of `ROWS_AT_ONCE`
ROWS_AT_ONCE = 64  # with fewer, reading the unembedding from memory takes most of the time
CUT = "unpadded_vocab_size"  # the one of `LOGIT_CHANGES` that leaves words out, and does nothing to those that it leaves
BLOCK, WIDTH = 64, 256  # rows that are kept in one piece of memory; what the width of kept masks is a multiple of
RIVALS = 20  # candidates that a readout is measured against
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "o")
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "embedding_norm", "norm_f")

Head = tuple[int, int]  # (layer, head)


# -------------------------------------------------------------------------------------- where words look at the picture


class Keys(NamedTuple):
    """What the words written after a batch of prompts look among, as `Prompts.of` takes it.

    ids:   (batch, S) int64, one per key; the image token where a key is an image cell
    mask:  (batch, S), 0 for keys that no word may look at; None when there are none
    image: the ids that stand for image cells
    last:  the position, among all that the decoder reads, of the query that predicts the first written token
    """

    ids: Tensor
    mask: Tensor | None
    image: tuple[int, ...]
    last: int


@dataclass(frozen=True)
class Look:
    """A way in which words see pictures that are not part of what their decoder reads.

    families:    the model types that look in this way
    modules:     how the paths of those attention modules of the decoder end that look
    keys:        (model, processor's output, prompt ids (batch, P), mask or None) -> ids and mask of the keys (batch, S)
    gate:        the layer's parameter whose tanh scales the module's output
    after_words: the decoder's own tokens, its start among them, are keys, too, in front of the others: generated text

    Where the pictures alone are the keys, all of every row's attention is on the picture.
    """

    families: tuple[str, ...]
    modules: str
    keys: Callable[[PreTrainedModel, Mapping[str, Any], Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    gate: str = ""
    after_words: bool = False


def _encoded_prompt(_: Any, __: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The encoder's states are the keys: one per token of the prompt, which holds the picture."""
    return ids, mask


def _pictures(name: str, cells: Callable[[Any], int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The pictures alone are the keys, in as many cells as the configuration says for each column of the mask ``name``."""

    def keys(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
        may = inputs.get(name)  # (batch, P or more, pictures) or (batch, P or more, pictures, tiles)
        if may is None:
            raise InputError(
                f"{type(model).__name__} got no {name}, which says where each row's pictures are. Put an image into every "
                "message, and pass the processor's output whole."
            )
        # Tiles and pictures that only pad the batch are closed to every word.
        seen = may[:, : ids.shape[1]].flatten(2).bool().any(1).repeat_interleave(cells(model.config), dim=1)
        return torch.full_like(seen, image_token_id(model), dtype=ids.dtype), seen

    return keys


def _patches_and_class(vision: Any) -> int:
    return (vision.image_size // vision.patch_size) ** 2 + 1


def _idefics(config: Any) -> int:
    return config.perceiver_config.resampler_n_latents if config.use_resampler else _patches_and_class(config.vision_config)


LOOKS = (
    Look(("florence2",), "encoder_attn", _encoded_prompt),
    Look(("blip-2", "instructblip", "instructblipvideo"), "EncDecAttention", _encoded_prompt),  # around T5
    Look(("t5gemma2",), "self_attn", _encoded_prompt, after_words=True),
    Look(
        ("mllama",),
        "cross_attn",
        _pictures("cross_attention_mask", lambda config: _patches_and_class(config.vision_config)),
        gate="cross_attn_attn_gate",
    ),
    Look(("idefics",), "cross_attn", _pictures("image_attention_mask", _idefics), gate="alpha_cross_attn"),
)


def look_of(model: PreTrainedModel) -> Look | None:
    """How the model's words see the picture; None when it is part of the prompt that they continue."""
    kind, encodes = model.config.model_type, model.config.is_encoder_decoder
    return next((look for look in LOOKS if kind in look.families and (encodes or look.keys is not _encoded_prompt)), None)


def keys_of(model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor | None) -> Keys:
    """What words look among that are written after prompts of these ``ids`` (batch, P); ``inputs`` is the whole batch.

    Raises `UnsupportedError` for a model without an image token, `InputError` for a batch that does not tell the picture.
    """
    look = look_of(model)
    keys, seen = (ids, mask) if look is None else look.keys(model, inputs, ids, mask)
    read = decoder_prompt(model, inputs) if model.config.is_encoder_decoder else ids
    return Keys(keys, seen, cell_token_ids(model), read.shape[1] - 1)


# ------------------------------------------------------------------------------------------------ the parts of a model


@dataclass(frozen=True)
class Backbone:
    """The parts of a VLM's text decoder that the tap needs: where heads are, and how their output becomes a logit."""

    owner: nn.Module  # the module that runs the layers and the final norm
    attention: dict[int, nn.Module]  # layer -> attention module
    norm: nn.Module  # the final norm
    unembedding: nn.Module
    speaker: nn.Module  # the innermost model that holds the unembedding; its output has the logits
    config: Any  # the text configuration
    logit_changes: tuple[LogitChange, ...] = ()  # those of `LOGIT_CHANGES` that this model's forward makes
    look: Look | None = None  # None when the picture is part of the prompt
    gated: Mapping[int, nn.Module] = field(default_factory=dict)  # layer -> the module that holds its gate
    # Where a decoder norms every sum: layer -> the norms that its module's output goes through in order, but for the last one.
    norms: Mapping[int, tuple[nn.LayerNorm, ...]] = field(default_factory=dict)

    def directions(self) -> Callable[[Tensor], Tensor]:
        """A function from words (...) to the unembedding's rows of them (..., width)."""
        table, more = weight_of(self.unembedding), getattr(self.unembedding, "additional_fc", None)
        if more is None:
            return table.__getitem__
        added, last = weight_of(more), len(table) - 1  # Idefics keeps the words that it added apart
        return lambda words: torch.where(
            (words > last)[..., None], added[(words - last - 1).clamp(min=0)], table[words.clamp(max=last)]
        )

    def heads(self) -> list[Head]:
        """Every head that can be watched, in order."""
        return [(layer, head) for layer, module in self.attention.items() for head in range(self.width(module)[0])]

    def projection(self, layer: int) -> nn.Linear:
        """The layer's output projection."""
        return _projection(self.attention[layer])

    def width(self, module: nn.Module) -> tuple[int, int]:
        """(heads, numbers per head) of an attention module's output."""
        columns = _projection(module).in_features
        per_head = _first(module, ("v_head_dim", "head_dim")) or columns // self.config.num_attention_heads
        return columns // per_head, per_head

    def delivers(self, layer: int, heads: Sequence[int]) -> Tensor:
        """(width, heads * numbers per head) float32: what a unit of the heads' outputs adds to the state before `norm`, given
        that the norms in between have divided by 1.
        """
        made = self._adds(layer, heads)
        for norm in self.norms.get(layer, ()):
            made = (made - made.mean(0)) * weight_of(norm).float()[:, None]
        return made

    def _adds(self, layer: int, heads: Sequence[int]) -> Tensor:
        """What a unit of the heads' outputs adds to the residual stream, shaped as in `delivers`."""
        projection, per_head = self.projection(layer), self.width(self.attention[layer])[1]
        at = [head * per_head + i for head in heads for i in range(per_head)]
        gate = weight_of(self.gated[layer], self.look.gate).float().tanh().view(-1, 1) if layer in self.gated else 1
        if type(projection) is nn.Linear:
            return weight_of(projection)[:, at].float() * gate
        # An adapter or a quantised layer is asked, unit by unit.
        weight = weight_of(self.unembedding)
        units = torch.zeros(len(at) + 1, projection.in_features, device=weight.device, dtype=weight.dtype)
        units[range(len(at)), at] = 1
        with torch.no_grad():
            made = projection(units).float()
        return (made[:-1] - made[-1]).T * gate

    @functools.cached_property
    def gain(self) -> tuple[Tensor, bool]:
        """The final norm's weight (width,) fp32, however it is parametrised, and whether it subtracts the mean (LayerNorm).

        A vector of alternating signs has mean 0 and square mean 1, so every RMS or layer norm maps it to +-weight (+ bias).
        """
        weight = weight_of(self.unembedding)
        signs = torch.ones(1, weight.shape[1], device=weight.device, dtype=weight.dtype)
        signs[:, 1::2] = -1
        with torch.no_grad():
            up, down, shifted = self.norm(signs), self.norm(-signs), self.norm(signs + 1)
        return (signs * (up - down) / 2)[0].float(), torch.allclose(shifted, up, atol=1e-2, rtol=1e-2)

    @property
    def few(self) -> int:
        """Rows whose logits are worked on together: see `LOGITS_AT_ONCE`."""
        return max(ROWS_AT_ONCE, LOGITS_AT_ONCE // len(self.unembedding.weight))

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model says after the last layer's ``hidden`` (..., width): logits (..., vocabulary), fp32."""
        return self.unembed(self.norm(hidden))

    def unembed(self, normed: Tensor) -> Tensor:
        """`logits` of a state that the final norm has made ``normed``, (..., width)."""
        return self._changed(self.unembedding(normed).float(), self.logit_changes)

    def unembed_as(self, words: Tensor, normed: Tensor) -> Tensor:
        """`unembed` for a few ``words`` (batch, W) alone, at each of ``normed`` (batch, N, width): (batch, W, N), fp32."""
        if type(self.unembedding) is not nn.Linear or self.unembedding.bias is not None:  # only itself knows what it does
            found = self.unembed(normed)
            return found.gather(-1, words[:, None].expand(-1, found.shape[1], -1)).transpose(1, 2)
        rows = self.directions()(words)
        logits = (rows @ normed.to(rows.dtype).transpose(1, 2)).float()
        return self._changed(logits, [made for made in self.logit_changes if made.name != CUT])

    def _changed(self, logits: Tensor, changes: Sequence[LogitChange]) -> Tensor:
        for made in changes:
            if (value := getattr(self.config, made.key, None)) is not None:
                logits = made.change(logits, value, self.config)
        return logits


@dataclass(frozen=True)
class LogitChange:
    """What some families do to logits after the unembedding: the name that their forward uses, the key of the text
    configuration that holds the value, and what is done with it.
    """

    name: str
    key: str
    change: Callable[[Tensor, Any, Any], Tensor]  # logits, value, text configuration


# In the order in which they are done. A class may have the key and not follow it (Aya Vision around Cohere2), so only
# what its forward names is done.
LOGIT_CHANGES = (
    LogitChange("logit_scale", "logit_scale", lambda logits, value, _: logits * value),
    LogitChange("output_multiplier", "output_multiplier", lambda logits, value, _: logits * value),
    LogitChange(  # Granite divides, HyperCLOVAX multiplies
        "logits_scaling",
        "logits_scaling",
        lambda logits, value, config: logits * value ** (1 if config.model_type == "hyperclovax" else -1),
    ),
    LogitChange(  # T5 whose embeddings are tied
        "scale_decoder_outputs",
        "scale_decoder_outputs",
        lambda logits, value, config: logits * config.d_model**-0.5 if value else logits,
    ),
    LogitChange("logits_mup_width_multiplier", "logits_mup_width_multiplier", lambda logits, value, _: logits / value),
    *(
        LogitChange(name, "final_logit_softcapping", lambda logits, value, _: value * torch.tanh(logits / value))
        for name in ("final_logit_softcapping", "logit_softcap")
    ),
    LogitChange(CUT, CUT, lambda logits, value, _: logits[..., :value]),
)


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A module's weight, fetched if accelerate keeps it elsewhere until it is used."""
    if not getattr(module, name).is_meta:
        return getattr(module, name)
    from accelerate.utils import align_module_device  # there whenever a weight is offloaded

    with align_module_device(module):
        return getattr(module, name).detach().clone()


def _first(module: nn.Module, names: Sequence[str]) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _projection(module: nn.Module) -> nn.Linear:
    found = _first(module, OUTPUT_PROJECTIONS)
    return found if hasattr(found, "in_features") else found.linear  # Inkling 2 gates what it projects


def _names(module: nn.Module) -> set[Any]:
    """The names and constants in the code of a module's forward."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set() if code is None else {*code.co_names, *code.co_consts}


def _uses_registry(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _names(module)


def find_backbone(model: PreTrainedModel) -> Backbone:
    """The text decoder's attention modules, final norm and unembedding.

    Raises `UnsupportedError` for a model whose text attention does not go through transformers' attention registry.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # what a PEFT adapter is wrapped around
    name = type(model).__name__
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    look = look_of(model)
    if look is None and model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{name} is an encoder-decoder, and GazeGuard does not know where the picture lies among its encoder's states. "
            f"Use {_families(True)}, or a model whose pictures are tokens of the prompt."
        )
    candidates = {
        path: module
        for path, module in decoder.named_modules()
        if hasattr(module, "layer_idx") and (look is None or path.endswith(look.modules))
    }
    if look is None and (across := next((path for path in candidates if "cross" in path), None)):
        raise UnsupportedError(
            f"{name} takes its pictures in through cross-attention ({across}), and GazeGuard does not know how they lie there. "
            f"Use {_families(False)}, or a model whose pictures are tokens of the prompt."
        )
    found = {
        path: module
        for path, module in candidates.items()
        if _uses_registry(module) and _first(module, OUTPUT_PROJECTIONS) is not None
    }
    if not found:
        raise UnsupportedError(
            f"{name} has no text attention that GazeGuard can watch: none of its modules calls transformers' attention "
            "registry. Models that compute attention by themselves (BLIP, GIT) or run remote code are not supported."
        )
    above = re.match(r"(?:(.*)\.)?(?:\w*layers|block)\.\d", next(iter(found)))
    owner = decoder.get_submodule((above and above[1]) or "")
    norm, unembedding = _first(owner, FINAL_NORMS), model.get_output_embeddings() or decoder.get_output_embeddings()
    norms: dict[int, tuple[nn.LayerNorm, ...]] = {}
    if norm is None and look is not None:
        norm, norms = _norms_after(owner.layers, look.modules)
    if norm is None or unembedding is None:
        missing = "a final norm" if norm is None else "an output embedding"
        raise UnsupportedError(f"{name}'s text decoder {type(owner).__name__} has no {missing} that GazeGuard can find.")
    attention = {module.layer_idx: module for module in found.values()}
    if len(attention) < len(found):
        raise UnsupportedError(
            f"{name} has several attention modules under one layer number ({', '.join(list(found)[:3])}, ...), and GazeGuard "
            "cannot tell which of them looks at the picture."
        )
    changes = tuple(made for made in LOGIT_CHANGES if made.name in _names(model) | _names(decoder))
    gated = {}
    if look is not None and look.gate:
        gated = {module.layer_idx: decoder.get_submodule(path.rpartition(".")[0]) for path, module in found.items()}
    around = [part for part in model.modules() if isinstance(part, PreTrainedModel) and unembedding in part.modules()]
    config = model.config.get_text_config(decoder=True)
    return Backbone(owner, attention, norm, unembedding, around[-1], config, changes, look, gated, norms)


def _norms_after(layers: nn.ModuleList, looking: str) -> tuple[nn.Module | None, dict[int, tuple[nn.LayerNorm, ...]]]:
    """BART norms the sum after each part, and names the parts of a layer in the order in which they run: the last norm of all,
    and for each layer those between its ``looking`` module and that one.
    """
    norms: dict[int, tuple[nn.LayerNorm, ...]] = {}
    for number, layer in enumerate(layers):
        for name, part in layer.named_children():
            if name == looking:
                norms[number] = ()
            elif isinstance(part, nn.LayerNorm):
                norms = {before: (*found, part) for before, found in norms.items()}
    last = next((found[-1] for found in norms.values() if found), None)
    return last, {number: found[:-1] for number, found in norms.items()}


def _families(encoder_decoder: bool) -> str:
    """The model types of `LOOKS` that can be used instead."""
    kinds = [kind for look in LOOKS if (look.keys is _encoded_prompt) == encoder_decoder for kind in look.families]
    return " or ".join(kinds)


# ---------------------------------------------------------------------------------------------------- the wrapper


def _watched(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel with the wrapper around it; for modules without a tap it costs one look-up."""
    if hasattr(kernel, "gazeguard"):
        return kernel

    @functools.wraps(kernel)
    def watched(module, query, key, value, attention_mask, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        result = kernel(module, query, key, value, attention_mask, *args, **kwargs)
        tap = getattr(module, "_gazeguard_tap", None)
        return result if tap is None else tap.hear(module, query, key, value, attention_mask, kwargs, result)

    watched.gazeguard = True
    return watched


def _install(kernel: str, module: nn.Module) -> None:
    """Put the wrapper where ``module`` looks its kernel up; a second call finds it there."""
    if kernel == "eager":  # not in the registry: by custom a function of this name beside the module's class
        _scope(module)[EAGER] = _watched(_scope(module)[EAGER])
    else:
        AttentionInterface.register(kernel, _watched(ALL_ATTENTION_FUNCTIONS[kernel]))


def _scope(module: nn.Module) -> dict[str, Any]:
    """The globals that a module's forward sees."""
    return inspect.unwrap(type(module).forward).__globals__


# How a kernel is told what a query may look at. A rule gets what the kernel got and answers with what is added to the last
# ``rows`` scores, (batch or 1, heads or 1, rows, keys) float32, 0 where open and -inf where closed; None opens everything.


@dataclass(frozen=True)
class Call:
    """One call of a kernel: ``query`` (batch, heads, q, d), ``key`` (batch, kv heads, S, d), and its mask and options."""

    module: nn.Module
    query: Tensor
    key: Tensor
    mask: Any
    options: dict[str, Any]

    def option(self, name: str, default: Any = None) -> Any:
        value = self.options.get(name)
        return default if value is None else value


def _closed(may: Tensor) -> Tensor:
    return torch.zeros(may.shape, device=may.device).masked_fill(~may, float("-inf"))


def _dense(call: Call, rows: int) -> Tensor | None:
    """SDPA: a mask (batch, 1 or heads, q, S or more), bool or additive; without one SDPA is causal from the left."""
    length, keys = call.query.shape[2], call.key.shape[2]
    if call.mask is not None:
        mask = call.mask[:, :, -rows:, :keys]
        return _closed(mask) if mask.dtype == torch.bool else mask.float()
    if length == 1 or not call.option("is_causal", getattr(call.module, "is_causal", True)):
        return None
    at = torch.arange(length - rows, length, device=call.key.device)
    return _closed(torch.arange(keys, device=call.key.device) <= at[:, None])[None, None]


def _eager(call: Call, rows: int) -> Tensor | None:
    """Eager attention: without a mask everything is open."""
    return None if call.mask is None else _dense(call, rows)


def _flash(call: Call, rows: int) -> Tensor | None:
    """Flash attention: a mask of padding alone (batch, S), causal from the right, a window as an option."""
    keys = call.key.shape[2]
    seen = keys if call.mask is None else min(keys, call.mask.shape[1])  # a static cache has room after what was seen
    at = torch.arange(seen - rows, seen, device=call.key.device)[:, None]
    key = torch.arange(keys, device=call.key.device)
    causal = call.option("is_causal", getattr(call.module, "is_causal", True))
    may = (key <= at) if causal else (key < seen).expand(rows, keys)
    if (window := call.option("sliding_window")) is not None:
        may = may & (key > at - window)
    may = may[None, None]
    if call.mask is not None:
        may = may & F.pad(call.mask[:, -seen:].bool(), (0, keys - seen))[:, None, None]
    return _closed(may)


def _flex(call: Call, rows: int) -> Tensor | None:
    """Flex attention: a function of (row of the batch, head, query, key)."""
    if call.mask is None or isinstance(call.mask, Tensor):
        return _dense(call, rows)
    device, length, keys = call.key.device, call.query.shape[2], call.key.shape[2]
    row = torch.arange(call.query.shape[0], device=device)[:, None, None, None]
    at = torch.arange(length - rows, length, device=device)[:, None]
    may = call.mask.mask_mod(row, torch.zeros_like(row), at, torch.arange(keys, device=device))
    return _closed(may.expand(row.shape[0], 1, rows, keys))


def _rule_of(kernel: str) -> Callable[[Call, int], Tensor | None] | None:
    rules = {"sdpa": _dense, "eager": _eager, "flex_attention": _flex}
    return rules.get(kernel, _flash if "flash" in kernel else None)  # flash comes in many builds


@dataclass(frozen=True)
class Prompts:
    """Where things are among the P keys of a batch of prompts: its tokens, or what stands in their place in `Keys`.

    columns: (batch, N) int64, the place of each image cell; rows with fewer repeat place 0
    cells:   (batch, N) bool, which of the columns are real
    kinds:   (batch, P, 4) float32, one-hot over `gazeguard.trace.SHARES`; all zero for padding
    real:    (batch, P) bool, False for padding
    last:    the position of the query that predicts the first written token
    """

    columns: Tensor
    cells: Tensor
    kinds: Tensor
    real: Tensor
    last: int

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor | None, tokens: int | tuple[int, ...], last: int | None = None
    ) -> Prompts:
        """Read off a batch of prompt ids (batch, P), or off what `keys_of` says: ``Prompts.of(*keys_of(...))``."""
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        image = torch.isin(input_ids, torch.as_tensor(tokens, device=input_ids.device)) & real
        cells = int(image.sum(1).max())
        # A stable sort brings each row's image positions to the front, in order.
        order = torch.argsort(~image, dim=1, stable=True)[:, :cells]
        valid = image.gather(1, order)
        first = torch.zeros_like(real).scatter_(1, real.int().argmax(1, keepdim=True), True) & real & ~image
        prompt = real & ~image & ~first
        kinds = torch.stack((image, prompt, torch.zeros_like(real), first), dim=-1).float()
        last = input_ids.shape[1] - 1 if last is None else last
        return cls(order.masked_fill(~valid, 0), valid, kinds, real, last)

    def repeated(self, times: int) -> Prompts:
        """Each prompt ``times`` over, as ``generate`` does for beams and for several captions per prompt."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.repeat_interleave(times, dim=0) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Rows:
    """What was heard: for each row b and each t, the query that predicted token P + t. Tensors on the model's device.

    gaze:   (batch, T, H, N) float32, attention on each image cell
    shares: (batch, T, H, 4) float32, attention on `gazeguard.trace.SHARES`
    output: (batch, T, H, width per head) float32, each head's output before the output projection; zeros after a narrow
            head's own width where layers differ; divided by what `Backbone.norms` divide by
    hidden: (batch, T, model width), the last layer's state before the final norm, in the model's dtype
    likely: (batch, T, `RIVALS` + 1) int64, the likeliest next words by the logits that the model gave while it ran; -1 where
            it gave none, as for most words of a replay
    logs:   (batch, T, `RIVALS` + 1) float32, nats, their log-probabilities; 0 where there were no logits
    entropy: (batch, T) float32, nats, of all words; 0 where there were no logits
    """

    gaze: Tensor
    shares: Tensor
    output: Tensor
    hidden: Tensor
    likely: Tensor
    logs: Tensor
    entropy: Tensor


def _sees_ahead(opening: Tensor) -> bool:
    """Whether the last rows (batch or 1, heads or 1, r, S) may look at a key after their own."""
    rows, length = opening.shape[-2:]
    return bool((opening > torch.finfo(torch.float16).min).triu(length - rows + 1).any())


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts along ``dim``, each filled up with zeros to the widest: in Gemma4 some layers have wider heads."""
    widths = [part.shape[-1] for part in parts]
    widest = max(widths)
    if min(widths) < widest:
        parts = [F.pad(part, (0, widest - width)) for part, width in zip(parts, widths, strict=True)]
    return torch.cat(parts, dim=dim)


class Track:
    """Rows in the order of their positions; dimension 1 of every tensor. What is heard again replaces what was heard.

    They are copied into blocks of `BLOCK` rows. A small tensor kept of every pass would lie on the heap between the large ones
    that a growing cache leaves behind, which then cannot be joined and used again.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[int, Tensor]] = []
        self.block: Tensor | None = None  # the last one, whose first rows are used
        self.used = 0

    def __len__(self) -> int:
        return self.parts[-1][0] + self.parts[-1][1].shape[1] if self.parts else 0

    def cut(self, start: int) -> None:
        """Forget the rows from ``start`` on."""
        while self.parts and self.parts[-1][0] >= start:
            self.parts.pop()
        if len(self) > start:
            at, rows = self.parts[-1]
            self.parts[-1] = at, rows[:, : start - at]

    def put(self, start: int, rows: Tensor) -> None:
        self.cut(start)
        count, shape = rows.shape[1], self.block.shape if self.block is not None else ()
        if shape[:1] + shape[2:] != rows.shape[:1] + rows.shape[2:] or shape[1] < self.used + count:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
                self.block = rows.new_empty((rows.shape[0], max(BLOCK, count), *rows.shape[2:]))
            self.used = 0
        kept = self.block[:, self.used : self.used + count]
        self.parts.append((start, kept.copy_(rows.detach())))
        self.used += count

    def row(self, at: int) -> Tensor:
        start, rows = next(part for part in reversed(self.parts) if part[0] <= at)
        return rows[:, at - start]

    def joined(self, start: int = 0) -> Tensor:
        """The rows from ``start`` on."""
        return _side_by_side([rows[:, max(0, start - at) :] for at, rows in self.parts if at + rows.shape[1] > start], dim=1)

    def over(self, blank: Tensor, start: int = 0) -> Tensor:
        """``blank`` (batch, T, ...), with the rows from ``start`` on where there are any."""
        for at, rows in self.parts:
            if at + rows.shape[1] > start:
                blank[:, max(0, at - start) : at + rows.shape[1] - start] = rows[:, max(0, start - at) :]
        return blank


class Layer:
    """What a tap heard of one layer: the rows read, the rows pending, and the keys to read them with."""

    def __init__(self, heads: Tensor, width: int) -> None:
        self.heads, self.width = heads, width  # those that are watched, and numbers per head of the layer's output
        self.gaze, self.shares, self.output = Track(), Track(), Track()
        self.pending: list[tuple[int, int]] = []  # position and number of keys of rows whose attention is not computed yet
        self.queries = Track()  # of the chosen heads in the pending rows, (batch, r, K, d)
        self.openings = Track()  # of the pending rows, (batch or 1, r, heads or 1, S or more) float32; empty if all are open
        self.key: Tensor | None = None
        self.scaling, self.group = 0.0, 1


class Tap:
    """Listens to ``heads`` of ``model``: a context manager that adds nothing to the model when it is left.

    with Tap(model, heads) as tap:
        tap.begin(Prompts.of(*keys_of(model, inputs, input_ids, attention_mask)))
        model.generate(...)          # or one forward pass over prompt and caption
        rows = tap.collect()

    One tap hears one ``generate`` or one forward pass at a time: the first one after ``begin`` whose batch is that of the
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
        self._prompts: Prompts | None = None
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

    def __enter__(self) -> Tap:
        self._kernel, self._rule = self._opening_rule()
        _ = self.backbone.gain  # runs the norm, so before anyone listens to it
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
        self._handles.append(self.backbone.owner.register_forward_pre_hook(self._hear_start, with_kwargs=True))
        self._handles.append(self.backbone.norm.register_forward_pre_hook(self._hear_hidden))
        self._handles.append(self.backbone.speaker.register_forward_hook(self._hear_logits, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._numbers:
            self.backbone.attention[number].__dict__.pop("_gazeguard_tap", None)
        while self._handles:
            self._handles.pop().remove()
        self._prompts = None

    # ------------------------------------------------------------------------------------------------- listening

    def begin(self, prompts: Prompts, reduce: Callable[[Tensor], Tensor] | None = None, reordered: bool = False) -> None:
        """Forget what was heard and listen to what follows these prompts.

        reduce:    what is kept of a layer's gaze (batch, K, r, N) float32 on the image cells, read r rows at a time: any
                   tensor (a, K, b, c). Only this is kept then, for `looks` to give; it makes all heads of a large model
                   affordable
        reordered: the rows of the batch change places between words, as in beam search
        """
        self._prompts, self._reduce, self._reordered = prompts, reduce, reordered
        self._first = prompts.last  # the query at this position predicts the first new token
        device = prompts.columns.device
        self._layers = {}
        for number in self._numbers:
            heads = torch.tensor([h for la, h in self.heads if la == number], device=device)
            self._layers[number] = Layer(heads, self.backbone.width(self.backbone.attention[number])[1])
        self._hidden = Track()
        self._said = Track(), Track(), Track()  # as `likeliest` gives them
        self._unsaid = 0  # rows of this pass whose logits are still to come
        self._states: Tensor | None = None  # of the image cells, (batch, N, width); NaN where they were not heard
        self._cells: Cells | None = None  # the same, read
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
        words = key.shape[2] if self.backbone.look is None else key.shape[2] - self._prompts.real.shape[1]
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
        look, told = self.backbone.look, self._prompts.real.shape[1]
        if look is not None and (keys < told if look.after_words else keys != told):
            raise UnsupportedError(
                f"Layer {number} looks among {keys} keys, but the batch that the watch was opened for tells {told}: the inputs "
                "are another batch's, or the cache makes room for more. Pass the same inputs to both, and a dynamic cache."
            )

    def _gone(self, number: int, keys: int) -> int:
        """How many of the prompt's keys have left a layer's cache of so many keys, from the first on; negative when so many
        others are in front of them.
        """
        if self.backbone.look is not None:
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
        self, layer: Layer, call: Call, query: Tensor, opening: Tensor | None, turned: Sequence[tuple[slice, Tensor]]
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
            return self._prompts.columns, self._prompts.cells
        columns = self._prompts.columns - offset
        return columns.clamp(min=0), self._prompts.cells & (columns >= 0)

    def _on_cells(self, weights: Tensor, offset: int) -> Tensor:
        """What of attention (batch, K, r, S) lies on the image cells: (batch, K, r, N); ``offset`` as for `_file`."""
        columns, cells = self._columns(offset)
        return weights.gather(3, columns[:, None, None].expand(-1, *weights.shape[1:3], -1)) * cells[:, None, None]

    def _file(self, layer: Layer, start: int, weights: Tensor, offset: int) -> None:
        """Attention (batch, K, r, S) of the rows from ``start`` on, whose first key is the prompt's at ``offset``, or so many
        before it: see `_gone`.
        """
        gaze = self._on_cells(weights, offset)
        if self._reduce is not None:
            layer.gaze.put(start, self._reduce(gaze).transpose(1, 2))
            return
        kinds, before = self._prompts.kinds[:, max(0, offset) :], max(0, -offset)
        after = before + kinds.shape[1]
        shares = weights[..., before:after] @ kinds[:, None]
        shares[..., 2] += weights[..., :before].sum(-1) + weights[..., after:].sum(-1)
        layer.gaze.put(start, gaze.transpose(1, 2))
        layer.shares.put(start, shares.transpose(1, 2))

    def _keep_pending(self, layer: Layer, start: int, query: Tensor, key: Tensor, opening: Tensor | None) -> None:
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

    def _read_pending(self, layer: Layer) -> None:
        """Turn the pending queries into attention, from the keys as they are now."""
        if not layer.pending:
            return
        start = layer.pending[0][0]
        self._file(layer, start, self._attention(layer, start), 0)
        layer.pending, layer.key = [], None
        layer.queries.cut(start)
        layer.openings.cut(start)

    def _attention(self, layer: Layer, start: int) -> Tensor:
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
        if self._live and self._past <= self._first and self.backbone.look is None and self._reduce is None:
            columns = self._prompts.columns - self._past
            here = self._prompts.cells & (columns >= 0) & (columns < args[0].shape[1])
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
        start, few = self._total - rows - self._first, max(1, self.backbone.few // len(logits))
        for at in range(0, rows, few):
            said = likeliest(logits[:, at : at + few].detach().float().log_softmax(-1))
            for track, value in zip(self._said, said, strict=True):
                track.put(start + at, value)

    # --------------------------------------------------------------------------------------------------- telling

    def at(self, position: int) -> tuple[Tensor, Tensor] | None:
        """One row alone, that of the query at ``position``: head outputs (batch, H, width per head) and final state
        (batch, width); None while it has not been heard.
        """
        row = position - self._first
        if not 0 <= row < len(self._hidden):
            return None
        outputs = [layer.output.row(row).float() for layer in self._layers.values()]
        return _side_by_side(outputs, dim=1), self._hidden.row(row)

    def gaze_at(self, position: int) -> Tensor:
        """The heads' attention on the image cells, (batch, H, N) float32, of a row that `at` has heard."""
        row = position - self._first
        found = []
        for layer in self._layers.values():
            if layer.pending and layer.pending[-1][0] == row:  # the others can wait for the one product that reads them all
                found.append(self._on_cells(self._attention(layer, row), 0)[:, :, 0])
            else:
                self._read_pending(layer)
                found.append(layer.gaze.row(row))
        return torch.cat(found, dim=1)

    def _heard(self) -> list[Layer]:
        """The layers, with everything read. Raises `NothingSeenError` when one heard nothing."""
        for number in self._numbers:
            if self._prompts is not None:
                self._read_pending(self._layers[number])
            if self._prompts is None or not len(self._layers[number].gaze):
                raise NothingSeenError(
                    f"The tap on layer {number} heard no attention: the model did not run, or ran by another way than its "
                    "own generate or forward. Run the model inside the watch, with the batch that the watch was opened for."
                )
        return list(self._layers.values())

    def looks(self) -> Tensor:
        """What ``reduce`` kept of the heads' gaze: (a, b, H, c). Raises `NothingSeenError` when nothing was heard."""
        device = self.model.device
        return torch.cat([layer.gaze.joined().to(device) for layer in self._heard()], dim=2)

    def collect(self, beams: Tensor | None = None, start: int = 0) -> Rows:
        """Everything heard since ``begin``. Raises `NothingSeenError` when that is nothing.

        beams: (captions, T) int64, the row of the batch that each word was written in, if rows changed places; the
               ``beam_indices`` of ``generate``
        start: the first row that is wanted
        """
        heard = [tuple(track.joined(start) for track in (la.gaze, la.shares, la.output)) for la in self._heard()]
        device = self._prompts.columns.device
        tensors = [_side_by_side([part.to(device) for part in parts], dim=2) for parts in zip(*heard, strict=True)]
        hidden = self._hidden.joined(start)
        empty = hidden.new_zeros(hidden.shape[:2], dtype=torch.float32)
        words = empty[..., None].repeat(1, 1, min(RIVALS + 1, len(self.backbone.unembedding.weight)))
        blanks = (torch.full_like(words, -1, dtype=torch.int64), words, empty)
        tensors += [hidden, *(track.over(blank, start) for track, blank in zip(self._said, blanks, strict=True))]
        if beams is not None:
            own = beams.to(device).clamp(min=0)
            steps = torch.arange(own.shape[1], device=device)
            tensors = [tensor[own.to(tensor.device), steps.to(tensor.device)] for tensor in tensors]
        gaze, shares, output, *others = tensors
        return Rows(gaze, shares, output.float(), *others)

    def cells(self, beams: Tensor | None = None) -> Cells | None:
        """What the last layer made of each image cell, before the final norm; not known for cells that this watch did not
        hear, such as those of an earlier turn, and that a row does not have. None where the picture is no part of the text
        decoder's sequence. ``beams`` as for `collect`.
        """
        if self._states is None:
            return None
        if self._cells is None:
            self._cells = Cells.of(self.backbone, self._states)
        return self._cells if beams is None else self._cells.rows(beams[:, 0].to(self._states.device))


# ------------------------------------------------------------------------------------------- from a look to a logit


def readout(backbone: Backbone, heads: Sequence[Head], output: Tensor, hidden: Tensor, directions: Tensor) -> Tensor:
    """What each head's look adds to a logit: direct logit attribution with the final norm's scale held fixed.

    output:     (..., H, width per head), heads' outputs before the output projection
    hidden:     (..., width), state before the final norm
    directions: (..., width), an unembedding row, or a difference of such rows
    returns     (..., H) float32 logits: ``W_U g/|x| W_O o``, whose sum over all heads, all MLPs and the embedding is the logit
                (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; DESIGN: readout)
                where a decoder norms every sum, its norms' scales are all held fixed
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
        delivered = directions @ backbone.delivers(layer, chosen)
        parts.append(delivered.unflatten(-1, (len(chosen), -1)))  # (..., chosen heads, width per head)
    return (_side_by_side(parts, dim=-2) * output).sum(-1)


@dataclass(frozen=True)
class Words:
    """What the model thought of each written token: all (batch, T) except readout (batch, T, H); nats and logits."""

    logprobs: Tensor
    entropy: Tensor
    readout: Tensor


def likeliest(logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of log-probabilities (..., vocabulary), which are written over: the `RIVALS` + 1 likeliest words (..., RIVALS + 1) int64,
    their log-probabilities, and the entropy (...), nats.
    """
    most, words = logs.topk(min(RIVALS + 1, logs.shape[-1]), dim=-1)
    return words, most, -logs.clamp_(min=-1e9).exp().mul_(logs).sum(-1)  # in place: the largest tensors of the watch


def judge_words(backbone: Backbone, heads: Sequence[Head], rows: Rows, written: Tensor) -> Words:
    """Log-probability, entropy and readout of the written tokens (batch, T), from the rows that predicted them.

    The readout's direction is the token's unembedding row minus the mean over its rivals, the `RIVALS` likeliest others.
    """
    table = backbone.directions()

    def computed(hidden: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logs = backbone.logits(hidden).log_softmax(-1)
        logprob = logs.gather(-1, token[:, None])[:, 0]
        likely, _, entropy = likeliest(logs)
        return logprob, likely, entropy

    def direction(token: Tensor, likely: Tensor) -> Tensor:
        rival = (likely != token[:, None]).float()
        rivals = (table(likely).float() * rival[..., None]).sum(1) / rival.sum(1, keepdim=True)
        return table(token).float() - rivals

    def few(function: Callable[..., Any], *given: Tensor) -> list[Any]:
        # A few words at a time: a large vocabulary's logits for a long caption would take more memory than the watch itself.
        return [function(*part) for part in zip(*(tensor.split(backbone.few) for tensor in given), strict=True)]

    same = rows.likely == written[..., None]
    found = (rows.logs.where(same, 0).sum(-1), rows.likely, rows.entropy)
    unheard = ~same.any(-1)
    if unheard.any():
        made = zip(*few(computed, rows.hidden[unheard], written[unheard]), strict=True)
        found = tuple(heard.index_put((unheard,), torch.cat(new)) for heard, new in zip(found, made, strict=True))
    logprobs, likely, entropy = found
    directions = torch.cat(few(direction, written.flatten(), likely.flatten(0, 1))).unflatten(0, written.shape)
    return Words(logprobs, entropy, readout(backbone, heads, rows.output, rows.hidden, directions))


@dataclass(frozen=True, eq=False)
class Cells:
    """What lies in the image cells: their last states read as words, as in the logit lens (nostalgebraist 2020).

    normed: (batch, N, width), after the final norm, see `Tap.cells`; known: (batch, N) bool, False for cells not heard
    total:  (batch, N) float32, the log of the sum of all words' exponentials, once and for all
    word:   (batch, N) int64, the likeliest word of each cell; likely: (batch, N) float32, its log-probability
    """

    backbone: Backbone
    normed: Tensor
    known: Tensor
    total: Tensor
    word: Tensor
    likely: Tensor

    @staticmethod
    def of(backbone: Backbone, states: Tensor) -> Cells:
        """states: (batch, N, width), before the final norm; NaN for cells that were not heard."""
        known, states = ~states.isnan().any(-1), states.nan_to_num()
        parts = []
        for some in states.flatten(0, 1).split(backbone.few):
            most, word = (logits := backbone.unembed(normed := backbone.norm(some))).max(-1)
            rest = logits.sub_(most[:, None]).exp_().sum(-1).log()  # in place, as logsumexp is not
            parts.append((normed, most + rest, word, -rest))
        normed, total, word, likely = (torch.cat(own).unflatten(0, known.shape) for own in zip(*parts, strict=True))
        return Cells(backbone, normed, known, total, word, likely)

    def rows(self, rows: Tensor | slice) -> Cells:
        """Those of some rows of the batch."""
        return Cells(self.backbone, *(value[rows] for value in list(vars(self).values())[1:]))

    def say(self, words: Tensor) -> Tensor:
        """Log-probability (batch, W, N) of ``words`` (batch, W) at each cell; minus infinity where it was not heard."""
        logs = self.backbone.unembed_as(words, self.normed) - self.total[:, None]
        return logs.masked_fill(~self.known[:, None], -torch.inf)


def content(cells: Cells, gaze: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Does what lies where the heads look look like the word?

    gaze: (batch, W or 1, H, N), of the rows that predict the words; words: (batch, W) int64
    returns  content: the log-probability of the word at a cell, probabilities averaged with the heads' mean gaze;
             named: the greatest at any cell (Jiang et al. 2025, arXiv 2410.02762, "internal confidence", of the last layer);
             both (batch, W) float32, nats, at least `LEAST`; NaN for a row whose cells were not heard
    """
    look = gaze.mean(2) * cells.known[:, None]
    look = look / look.sum(-1, keepdim=True).clamp(min=1e-9)
    each = cells.say(words)
    heard = cells.known.any(-1, keepdim=True)
    found = ((look * each.exp()).sum(-1).log(), each.amax(-1))
    return tuple(value.clamp(min=LEAST).where(heard, torch.nan) for value in found)
