"""Backbone of a vision-language model: its text decoder's attention modules, final norm and unembedding."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gazeguard.attention.families import LogitChange, attention_modules, logit_changes
from gazeguard.attention.visual_keys import VisualKeySource, supported_families, visual_key_source
from gazeguard.errors import UnsupportedError

LOGITS_AT_ONCE = 2**16  # numbers that a CPU's cache holds; so many logits are worked on together, or those of `ROWS_AT_ONCE`
ROWS_AT_ONCE = 64  # with fewer, reading the unembedding from memory takes most of the time
STATES_AT_ONCE, TOKENS_AT_ONCE = 1024, 4096  # of a whole prompt's states, where the vocabulary need not be whole
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "o")
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "embedding_norm", "norm_f")

Head = tuple[int, int]  # (layer, head)
Norms = Mapping[int, tuple[nn.LayerNorm, ...]]


@dataclass(frozen=True)
class Backbone:
    """The parts of a text decoder that the recorder needs: where heads are, and how their output becomes a logit.

    Attributes:
        decoder: The module that runs the layers and the final norm.
        attention: Layer -> attention module.
        norm: The final norm.
        unembedding: The output embedding.
        causal_lm: The innermost model that holds the unembedding; its output has the logits.
        config: The text configuration.
        logit_changes: What the model does to logits after the unembedding.
        key_source: Where the keys of the image are; None when the image is part of the prompt.
        gated: Layer -> the module that holds its gate.
        norms: Where a decoder norms every sum: layer -> the norms that its attention output goes through in order, but for the
            last one.
        read_from_code: Facts that were read from the code of the model's classes, since no table knows its family.
    """

    decoder: nn.Module
    attention: dict[int, nn.Module]
    norm: nn.Module
    unembedding: Any
    causal_lm: nn.Module
    config: Any
    logit_changes: tuple[LogitChange, ...] = ()
    key_source: VisualKeySource | None = None
    gated: Mapping[int, nn.Module] = field(default_factory=dict)
    norms: Norms = field(default_factory=dict)
    read_from_code: tuple[str, ...] = ()

    def heads(self) -> list[Head]:
        """Every head that can be recorded, in order."""
        return [(layer, head) for layer, module in self.attention.items() for head in range(self.width(module)[0])]

    def projection(self, layer: int) -> nn.Linear:
        """The layer's output projection."""
        return _projection(self.attention[layer])

    def block(self, layer: int) -> nn.Module:
        """The decoder layer that holds the attention module; its first input is the residual stream (batch, q, width)."""
        path = next(path for path, module in self.decoder.named_modules() if module is self.attention[layer])
        return self.decoder.get_submodule(path.rpartition(".")[0])

    def width(self, module: nn.Module) -> tuple[int, int]:
        """(heads, numbers per head) of an attention module's output."""
        columns = _projection(module).in_features
        per_head = _first_attribute(module, ("v_head_dim", "head_dim")) or columns // self.config.num_attention_heads
        return columns // per_head, per_head

    def output_weight(self, layer: int, heads: Sequence[int]) -> Tensor:
        """What a unit of the heads' outputs adds to the state before `norm`, given that the norms in between divide by 1.

        Returns:
            (width, heads * numbers per head) float32, the W_O slice of the heads, gated where the layer has a gate.
        """
        weight = self._residual_weight(layer, heads)
        for norm in self.norms.get(layer, ()):
            weight = (weight - weight.mean(0)) * weight_of(norm).float()[:, None]
        return weight

    def _residual_weight(self, layer: int, heads: Sequence[int]) -> Tensor:
        """What a unit of the heads' outputs adds to the residual stream, shaped as in `output_weight`."""
        projection, per_head = self.projection(layer), self.width(self.attention[layer])[1]
        gate: Tensor | int = 1
        if self.key_source is not None and layer in self.gated:
            gate = weight_of(self.gated[layer], self.key_source.gate).float().tanh().view(-1, 1)
        if type(projection) is nn.Linear:
            # Slices and not an index, which the host would have to send to the device, and wait.
            slices = [weight_of(projection)[:, head * per_head : (head + 1) * per_head] for head in heads]
            return torch.cat(slices, 1).float() * gate
        # An adapter or a quantised layer is measured, unit by unit.
        weight = weight_of(self.unembedding)
        columns = [head * per_head + i for head in heads for i in range(per_head)]
        units = torch.zeros(len(columns) + 1, projection.in_features, device=weight.device, dtype=weight.dtype)
        units[range(len(columns)), columns] = 1
        with torch.no_grad():
            outputs = projection(units).float()
        return (outputs[:-1] - outputs[-1]).T * gate

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

    def unembedding_rows(self) -> Callable[[Tensor], Tensor]:
        """A function from token ids (...) to their rows of the unembedding (..., width)."""
        table, more = weight_of(self.unembedding), getattr(self.unembedding, "additional_fc", None)
        if more is None:
            return table.__getitem__
        added, last = weight_of(more), len(table) - 1  # Idefics keeps the tokens that it added apart
        return lambda token_ids: torch.where(
            (token_ids > last)[..., None], added[(token_ids - last - 1).clamp(min=0)], table[token_ids.clamp(max=last)]
        )

    @property
    def logits_chunk(self) -> int:
        """Rows whose logits are worked on together: see `LOGITS_AT_ONCE`."""
        return max(ROWS_AT_ONCE, LOGITS_AT_ONCE // len(self.unembedding.weight))

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits (..., vocabulary), fp32, of the last layer's ``hidden`` (..., width)."""
        return self.unembed(self.norm(hidden))

    def unembed(self, normed: Tensor) -> Tensor:
        """`logits` of a state that the final norm has made ``normed``, (..., width)."""
        return self._changed(self.unembedding(normed).float(), self.logit_changes)

    def unembed_tokens(self, token_ids: Tensor, normed: Tensor) -> Tensor:
        """`unembed` for a few tokens (batch, W) alone, at each of ``normed`` (batch, N, width): (batch, W, N), fp32."""
        if not self._is_matrix:
            logits = self.unembed(normed)
            return logits.gather(-1, token_ids[:, None].expand(-1, logits.shape[1], -1)).transpose(1, 2)
        rows = self.unembedding_rows()(token_ids)
        logits = (rows @ normed.to(rows.dtype).transpose(1, 2)).float()
        return self._changed(logits, [change for change in self.logit_changes if not change.cuts])

    @property
    def states_chunk(self) -> int:
        """States that `unembed_in_parts` is given at once."""
        return STATES_AT_ONCE if self._has_parts else self.logits_chunk

    def unembed_in_parts(self, normed: Tensor) -> Iterator[tuple[int, Tensor]]:
        """`unembed` of states (n, width), a part of the vocabulary at a time: its first token, and its logits (n, c), fp32.

        The logits of a part stay in a CPU's cache, and the unembedding is read once for all states.
        """
        if not self._has_parts:
            yield 0, self.unembed(normed)
            return
        product, weight = product_with(normed), weight_of(self.unembedding)
        for first in range(0, len(weight), TOKENS_AT_ONCE):
            logits = product(weight[first : first + TOKENS_AT_ONCE]).float()
            yield first, self._changed(logits, self.logit_changes)

    @property
    def _has_parts(self) -> bool:
        """Whether a part of the vocabulary can be unembedded by itself."""
        return self._is_matrix and not any(change.cuts for change in self.logit_changes)

    @property
    def _is_matrix(self) -> bool:
        """Whether the unembedding is only a product with its rows; any other kind has to be called itself."""
        return type(self.unembedding) is nn.Linear and self.unembedding.bias is None

    def _changed(self, logits: Tensor, changes: Sequence[LogitChange]) -> Tensor:
        for change in changes:
            if (value := getattr(self.config, change.key, None)) is not None:
                logits = change.change(logits, value, self.config)
        return logits


def product_with(states: Tensor) -> Callable[[Tensor], Tensor]:
    """The function of rows (c, width) that gives the product (n, c) of states (n, width) with them.

    oneDNN multiplies float32 up to twice as fast as the library behind ``linear``, which favours one maker's processors.
    """
    if states.device.type != "cpu" or states.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return functools.partial(F.linear, states)
    states = states.to_mkldnn()
    return lambda rows: F.linear(states, rows.to_mkldnn()).to_dense()


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A module's weight, fetched if accelerate keeps it elsewhere until it is used.

    Raises:
        UnsupportedError: The module has no such tensor.
    """
    weight = getattr(module, name)
    if not isinstance(weight, Tensor):
        raise UnsupportedError(
            f"{type(module).__module__}.{type(module).__name__} holds no tensor of its {name}, so that nothing can be read "
            "from it. Load the model as it is, or quantised by transformers (quantization_config=...)."
        )
    if not weight.is_meta:
        return weight
    from accelerate.utils import align_module_device  # installed whenever a weight is offloaded

    with align_module_device(module):
        return getattr(module, name).detach().clone()


def _first_attribute(module: nn.Module, names: Sequence[str]) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _projection(module: nn.Module) -> nn.Linear:
    projection = _first_attribute(module, OUTPUT_PROJECTIONS)
    return projection if hasattr(projection, "in_features") else projection.linear  # Inkling 2 gates what it projects


# --------------------------------------------------------------------------------------------------------- find_backbone


def find_backbone(model: PreTrainedModel) -> Backbone:
    """The text decoder's attention modules, final norm and unembedding.

    Raises:
        UnsupportedError: The model's text attention does not go through transformers' attention registry, or GazeGuard does
            not know where its image lies.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # what a PEFT adapter is wrapped around
    text_decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    config = model.config.get_text_config(decoder=True)
    source = visual_key_source(model)
    modules, attention_in_code = _attention_of(model, text_decoder, config.model_type, source)
    changes, changes_in_code = logit_changes(model.config.model_type, (model, text_decoder))
    decoder, norm, norms = _final_norm_of(model, text_decoder, modules, source)
    unembedding = _unembedding_of(model, text_decoder)
    facts = (("attention modules", attention_in_code), ("logit changes", changes_in_code))
    return Backbone(
        decoder=decoder,
        attention=_by_layer(model, modules),
        norm=norm,
        unembedding=unembedding,
        causal_lm=[part for part in model.modules() if isinstance(part, PreTrainedModel) and unembedding in part.modules()][-1],
        config=config,
        logit_changes=changes,
        key_source=source,
        gated=_gates(text_decoder, modules, source),
        norms=norms,
        read_from_code=tuple(fact for fact, in_code in facts if in_code),
    )


def _attention_of(
    model: PreTrainedModel, text_decoder: nn.Module, model_type: str, source: VisualKeySource | None
) -> tuple[dict[str, nn.Module], bool]:
    """The attention modules whose keys hold the image, by path, and whether code told which they are."""
    name = type(model).__name__
    if source is None and model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{name} is an encoder-decoder, and GazeGuard does not know where the image lies among its encoder's states. "
            f"Use {supported_families(True)}, or a model whose images are tokens of the prompt."
        )
    candidates = {
        path: module
        for path, module in text_decoder.named_modules()
        if hasattr(module, "layer_idx") and (source is None or path.endswith(source.modules))
    }
    if source is None and (across := next((path for path in candidates if "cross" in path), None)):
        raise UnsupportedError(
            f"{name} takes its images in through cross-attention ({across}), and GazeGuard does not know how they lie there. "
            f"Use {supported_families(False)}, or a model whose images are tokens of the prompt."
        )
    projecting = {
        path: module for path, module in candidates.items() if _first_attribute(module, OUTPUT_PROJECTIONS) is not None
    }
    modules, in_code = attention_modules(model_type, projecting)
    if not modules:
        raise UnsupportedError(
            f"{name} has no text attention that GazeGuard can record: none of its modules calls transformers' attention "
            "registry. Models that compute attention by themselves (BLIP, GIT) or run remote code are not supported."
        )
    return modules, in_code


def _by_layer(model: PreTrainedModel, modules: Mapping[str, Any]) -> dict[int, nn.Module]:
    """Layer -> attention module. Raises `UnsupportedError` when a layer has several."""
    attention = {module.layer_idx: module for module in modules.values()}
    if len(attention) < len(modules):
        raise UnsupportedError(
            f"{type(model).__name__} has several attention modules under one layer number ({', '.join(list(modules)[:3])}, "
            "...), and GazeGuard cannot tell which of them attends to the image."
        )
    return attention


def _final_norm_of(
    model: PreTrainedModel, text_decoder: nn.Module, modules: Mapping[str, nn.Module], source: VisualKeySource | None
) -> tuple[nn.Module, nn.Module, Norms]:
    """The module that runs the layers, its final norm, and the norms before that one that attention outputs go through."""
    above = re.match(r"(?:(.*)\.)?(?:\w*layers|block)\.\d", next(iter(modules)))
    decoder = text_decoder.get_submodule((above and above[1]) or "")
    norm: nn.Module | None = _first_attribute(decoder, FINAL_NORMS)
    norms: Norms = {}
    if norm is None and source is not None:
        norm, norms = _norms_after(decoder.get_submodule("layers"), source.modules)
    if norm is None:
        raise UnsupportedError(
            f"{type(model).__name__}'s text decoder {type(decoder).__name__} has no final norm that GazeGuard can find."
        )
    return decoder, norm, norms


def _norms_after(layers: Any, attention: str) -> tuple[nn.Module | None, Norms]:
    """The last norm of all, and for each layer those between its ``attention`` module and that one.

    BART norms the sum after each part, and names the parts of a layer in the order in which they run.
    """
    norms: dict[int, tuple[nn.LayerNorm, ...]] = {}
    for number, layer in enumerate(layers):
        for name, part in layer.named_children():
            if name == attention:
                norms[number] = ()
            elif isinstance(part, nn.LayerNorm):
                norms = {before: (*after, part) for before, after in norms.items()}
    last = next((after[-1] for after in norms.values() if after), None)
    return last, {number: after[:-1] for number, after in norms.items()}


def _unembedding_of(model: PreTrainedModel, text_decoder: Any) -> nn.Module:
    unembedding = model.get_output_embeddings() or text_decoder.get_output_embeddings()
    if unembedding is None:
        raise UnsupportedError(
            f"{type(model).__name__}'s text decoder {type(text_decoder).__name__} has no output embedding that GazeGuard can "
            "find."
        )
    return unembedding


def _gates(text_decoder: nn.Module, modules: Mapping[str, Any], source: VisualKeySource | None) -> dict[int, nn.Module]:
    """Layer -> the module that holds the gate of its attention, where a key source has one."""
    if source is None or not source.gate:
        return {}
    return {module.layer_idx: text_decoder.get_submodule(path.rpartition(".")[0]) for path, module in modules.items()}
