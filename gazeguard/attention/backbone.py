"""TODO attention.backbone."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gazeguard.attention.visual_keys import VisualKeySource, _families, visual_key_source
from gazeguard.errors import UnsupportedError

LOGITS_AT_ONCE = 2**16  # numbers that a CPU's cache holds; so many logits are worked on together, or those of `ROWS_AT_ONCE`
ROWS_AT_ONCE = 64  # with fewer, reading the unembedding from memory takes most of the time
CUT = "unpadded_vocab_size"  # the one of `LOGIT_CHANGES` that leaves words out, and does nothing to those that it leaves
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "o")
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "embedding_norm", "norm_f")

Head = tuple[int, int]  # (layer, head)


@dataclass(frozen=True)
class Backbone:
    """The parts of a VLM's text decoder that the recorder needs: where heads are, and how their output becomes a logit."""

    decoder: nn.Module  # the module that runs the layers and the final norm
    attention: dict[int, nn.Module]  # layer -> attention module
    norm: nn.Module  # the final norm
    unembedding: nn.Module
    causal_lm: nn.Module  # the innermost model that holds the unembedding; its output has the logits
    config: Any  # the text configuration
    logit_changes: tuple[LogitChange, ...] = ()  # those of `LOGIT_CHANGES` that this model's forward makes
    key_source: VisualKeySource | None = None  # None when the picture is part of the prompt
    gated: Mapping[int, nn.Module] = field(default_factory=dict)  # layer -> the module that holds its gate
    # Where a decoder norms every sum: layer -> the norms that its module's output goes through in order, but for the last one.
    norms: Mapping[int, tuple[nn.LayerNorm, ...]] = field(default_factory=dict)

    def unembedding_rows(self) -> Callable[[Tensor], Tensor]:
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

    def output_weight(self, layer: int, heads: Sequence[int]) -> Tensor:
        """(width, heads * numbers per head) float32: what a unit of the heads' outputs adds to the state before `norm`, given
        that the norms in between have divided by 1.
        """
        made = self._adds(layer, heads)
        for norm in self.norms.get(layer, ()):
            made = (made - made.mean(0)) * weight_of(norm).float()[:, None]
        return made

    def _adds(self, layer: int, heads: Sequence[int]) -> Tensor:
        """What a unit of the heads' outputs adds to the residual stream, shaped as in `output_weight`."""
        projection, per_head = self.projection(layer), self.width(self.attention[layer])[1]
        at = [head * per_head + i for head in heads for i in range(per_head)]
        gate = weight_of(self.gated[layer], self.key_source.gate).float().tanh().view(-1, 1) if layer in self.gated else 1
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
    def final_norm_weight(self) -> tuple[Tensor, bool]:
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
    def logits_chunk(self) -> int:
        """Rows whose logits are worked on together: see `LOGITS_AT_ONCE`."""
        return max(ROWS_AT_ONCE, LOGITS_AT_ONCE // len(self.unembedding.weight))

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model says after the last layer's ``hidden`` (..., width): logits (..., vocabulary), fp32."""
        return self.unembed(self.norm(hidden))

    def unembed(self, normed: Tensor) -> Tensor:
        """`logits` of a state that the final norm has made ``normed``, (..., width)."""
        return self._changed(self.unembedding(normed).float(), self.logit_changes)

    def unembed_tokens(self, words: Tensor, normed: Tensor) -> Tensor:
        """`unembed` for a few ``words`` (batch, W) alone, at each of ``normed`` (batch, N, width): (batch, W, N), fp32."""
        if type(self.unembedding) is not nn.Linear or self.unembedding.bias is not None:  # only itself knows what it does
            found = self.unembed(normed)
            return found.gather(-1, words[:, None].expand(-1, found.shape[1], -1)).transpose(1, 2)
        rows = self.unembedding_rows()(words)
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
    look = visual_key_source(model)
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
