"""TODO attention.kernels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

EAGER = "eager_attention_forward"


def _watched(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel with the wrapper around it; for modules without a recorder it costs one look-up."""
    if hasattr(kernel, "gazeguard"):
        return kernel

    @functools.wraps(kernel)
    def watched(module, query, key, value, attention_mask, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        result = kernel(module, query, key, value, attention_mask, *args, **kwargs)
        recorder = getattr(module, "_gazeguard_tap", None)
        return result if recorder is None else recorder.hear(module, query, key, value, attention_mask, kwargs, result)

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


def _sees_ahead(opening: Tensor) -> bool:
    """Whether the last rows (batch or 1, heads or 1, r, S) may look at a key after their own."""
    rows, length = opening.shape[-2:]
    return bool((opening > torch.finfo(torch.float16).min).triu(length - rows + 1).any())
