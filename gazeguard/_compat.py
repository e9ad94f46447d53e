"""Private members of transformers that GazeGuard relies on, each behind one function.

GazeGuard is written for ``transformers>=5.20,<6``. Whatever it uses beyond the documented interface stands here, so that a
new release is checked, and adapted to, in one file.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

EAGER_KERNEL = "eager_attention_forward"  # the name by which a modeling file keeps its eager kernel, outside the registry
REGISTRY_NAME = "ALL_ATTENTION_FUNCTIONS"  # the name by which a modeling file reaches the registry

# Cache layers, by the name of their class.
GROWING_LAYERS = frozenset({"DynamicLayer", "LinearAttentionAndFullAttentionLayer"})  # keys stay what and where they are
MASKABLE_LAYERS = frozenset({"DynamicLayer", "StaticLayer"})  # single keys can be masked, the others stay what they are
PLAIN_LAYERS = frozenset({"DynamicLayer"})  # can be copied and continued by hand


def generation_config(model: PreTrainedModel, given: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
    """The configuration that ``model.generate`` would use with these arguments."""
    return model._prepare_generation_config(given, **options)[0]


def decoding_loop(model: PreTrainedModel, config: GenerationConfig) -> Callable[..., Any]:
    """The loop that ``model.generate`` would run: beam search, or sampling and greedy search."""
    return model._beam_search if (config.num_beams or 1) > 1 else model._sample


def padding_token(config: GenerationConfig, default: int = 0) -> int:
    """The padding token of a configuration that ``generate`` has prepared."""
    tensor = config._pad_token_tensor
    return default if tensor is None else int(tensor)


def mask_length(config: GenerationConfig) -> int:
    """The length of the attention mask that ``generate`` got; 0 when it got none, or when this transformers does not say."""
    return getattr(config, "_mask_length", None) or 0


def next_inputs(model: PreTrainedModel, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the next forward pass, after one that gave ``outputs``."""
    return model._update_model_kwargs_for_generation(outputs, model_kwargs)


@functools.cache
def cache_argument_name() -> str:
    """What a forward calls its cache: "cache" from transformers 5.24 on, "past_key_values" before."""
    from transformers import LlamaModel

    return "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def cache_argument(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward, under its new or old name; None without one."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def with_all_positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a text decoder's forward with which its last layers leave out no position.

    Gemma 4 drops all but so many last positions before the layers that share keys; then there are no final states of the image
    tokens, and in a replay none of the caption's first tokens. It drops none where the positions are named by a tensor.
    """
    number = kwargs.get("logits_to_keep")
    return kwargs if not isinstance(number, int) else {**kwargs, "logits_to_keep": torch.arange(-number, 0)}


def cache_layers(cache: Any) -> list[Any]:
    """The layers of a cache, empty for None and for a cache without layers."""
    return list(getattr(cache, "layers", ()))


def cache_layer_kinds(cache: Any) -> set[str]:
    """The class names of a cache's layers."""
    return {type(layer).__name__ for layer in cache_layers(cache)}


def own_cache_kinds(model: PreTrainedModel) -> set[str]:
    """The class names of the layers of the cache that a model makes for itself."""
    from transformers import DynamicCache

    return cache_layer_kinds(DynamicCache(config=model.config.get_text_config(decoder=True)))


def layer_grows(cache: Any, layer: int) -> bool:
    """Whether the keys of one cache layer stay what and where they are until the end of a generation."""
    layers = getattr(cache, "layers", ())
    return layer < len(layers) and type(layers[layer]).__name__ in GROWING_LAYERS and not getattr(cache, "offloading", False)


def layer_keeps_prompt(cache: Any, layer: int) -> bool:
    """Whether a cache layer of limited length drops generated keys and keeps those of the prompt."""
    layers = getattr(cache, "layers", ())
    return layer < len(layers) and hasattr(layers[layer], "prefill_length")


def attention_kernel(module: Any) -> str:
    """The name of the attention kernel that an attention module runs now, such as "sdpa"."""
    return module.config._attn_implementation


def attention_kernels(model: PreTrainedModel) -> dict[str, str]:
    """The kernels of a model and of its parts, as ``model.set_attn_implementation`` takes them."""
    kernels = {name: getattr(model.config, name)._attn_implementation for name in model.config.sub_configs}
    return kernels | {"": model.config._attn_implementation}


def registered_kernel(name: str) -> Callable[..., Any] | None:
    """The kernel that transformers' attention registry has under a name, None when it has none."""
    return ALL_ATTENTION_FUNCTIONS.get(name)


def register_kernel(name: str, kernel: Callable[..., Any]) -> None:
    """Put a kernel into transformers' attention registry, for every model of the process."""
    AttentionInterface.register(name, kernel)


def forward_globals(module: nn.Module) -> dict[str, Any]:
    """The global names that a module's forward sees: those of its modeling file."""
    return inspect.unwrap(type(module).forward).__globals__


def names_in_forward(module: nn.Module) -> frozenset[Any]:
    """The names and constants in the code of a module's forward; a fallback where no table describes a class."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return frozenset() if code is None else frozenset((*code.co_names, *code.co_consts))


def arguments_of_generate(custom_generate: Any) -> dict[str, Any]:
    """The arguments of the running ``generate`` that calls a decode loop of one's own; none where it is not running.

    transformers drops ``streamer`` and ``assistant_model`` for a callable ``custom_generate``, without a word, and what the
    processor made of the images where it encodes them before the loop. They are read off the frame of ``generate``.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("custom_generate") is custom_generate:
            own = inspect.signature(GenerationMixin.generate).parameters
            return {name: frame.f_locals.get(name) for name in own if name not in ("self", "kwargs")} | frame.f_locals["kwargs"]
        frame = frame.f_back
    return {}
