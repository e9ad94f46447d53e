"""Attention kernels of transformers: the wrapper that lets a recorder see their calls, and their masks in one form.

transformers finds every attention kernel by name in one registry, and eager attention in the modeling file of the class.
While a recorder is open, the kernel that its model runs is replaced there by a wrapper around it, once per process. The wrapper
does nothing unless the calling module carries a recorder; so names, configurations, masks and kernels stay what they were,
and the output of the model is the kernel's own. When the last recorder that uses a kernel closes, the kernel itself is put
back: nothing has to be uninstalled.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gazeguard import _compat
from gazeguard.errors import UnsupportedError

RECORDER = "_gazeguard_recorder"  # the attribute of an attention module that holds the recorder of its model
_LOCK = threading.Lock()  # guards the registry and the attribute above, across threads
_USERS: Counter[tuple[str, str]] = Counter()  # open recorders' layers, by kernel and, for eager attention, modeling file


# ------------------------------------------------------------------------------------------------------------ wrapper


@functools.cache
def recorded_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around a kernel; for modules without a recorder it costs one look-up."""

    @functools.wraps(kernel)
    def recorded(module, query, key, value, attention_mask, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        result = kernel(module, query, key, value, attention_mask, *args, **kwargs)
        recorder = getattr(module, RECORDER, None)
        if recorder is None:
            return result
        return recorder.on_attention(Call(module, query, key, attention_mask, kwargs), value, result)

    vars(recorded)["gazeguard_kernel"] = kernel
    return recorded


def attach_recorder(recorder: Any, modules: Iterable[nn.Module], recorded: Iterable[nn.Module], kernel: str) -> None:
    """Let a recorder see the calls of a kernel by some of a model's attention modules.

    Args:
        recorder: An object with ``on_attention(call, value, result)``.
        modules: All attention modules of the model.
        recorded: Those that are recorded.
        kernel: The name of the kernel that they run.

    Raises:
        UnsupportedError: Another recorder is open on the model, in this thread or in another one.
    """
    with _LOCK:
        if any(RECORDER in module.__dict__ for module in modules):
            raise UnsupportedError(
                "This model is being recorded already, by another guard or recorder or in another thread. Leave that one "
                "first, or use a copy of the model."
            )
        for module in recorded:
            if not hasattr(_kernel_of(kernel, module), "gazeguard_kernel"):
                _put_kernel(kernel, module, recorded_kernel(_kernel_of(kernel, module)))
            _USERS[_registration(kernel, module)] += 1
            module.__dict__[RECORDER] = recorder


def detach_recorder(recorded: Iterable[nn.Module], kernel: str) -> None:
    """Undo `attach_recorder`; the last to do so puts the kernel itself back."""
    with _LOCK:
        for module in recorded:
            if module.__dict__.pop(RECORDER, None) is None:
                continue
            where = _registration(kernel, module)
            _USERS[where] -= 1
            if _USERS[where]:
                continue
            del _USERS[where]
            wrapper = _kernel_of(kernel, module)
            original = getattr(wrapper, "gazeguard_kernel", None)
            # Someone else's wrapper around ours stays; ours does nothing inside of it.
            if original is not None and wrapper is recorded_kernel(original):
                _put_kernel(kernel, module, original)


def _registration(kernel: str, module: nn.Module) -> tuple[str, str]:
    return kernel, _compat.forward_globals(module)["__name__"] if kernel == "eager" else ""


def _kernel_of(kernel: str, module: nn.Module) -> Callable[..., Any] | None:
    if kernel == "eager":
        return _compat.forward_globals(module).get(_compat.EAGER_KERNEL)
    return _compat.registered_kernel(kernel)


def _put_kernel(kernel: str, module: nn.Module, function: Callable[..., Any]) -> None:
    if kernel == "eager":
        _compat.forward_globals(module)[_compat.EAGER_KERNEL] = function
    else:
        _compat.register_kernel(kernel, function)


def has_kernel(kernel: str, module: nn.Module) -> bool:
    """Whether the kernel of a module is where it can be wrapped."""
    return _kernel_of(kernel, module) is not None


# -------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        module: The calling attention module.
        query: (batch, heads, q, d), after rotary positions.
        key: (batch, kv heads, S, d), the cached ones included.
        mask: What the kernel got.
        options: The kernel's keyword arguments.
    """

    module: Any
    query: Tensor
    key: Tensor
    mask: Any
    options: dict[str, Any]

    def option(self, name: str, default: Any = None) -> Any:
        """A keyword argument, ``default`` also when it is None."""
        value = self.options.get(name)
        return default if value is None else value

    @property
    def scaling(self) -> float:
        """The factor of the scores."""
        return self.option("scaling", self.query.shape[-1] ** -0.5)

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]


# A rule: what a kernel adds to the scores of its last ``rows`` queries, (batch or 1, heads or 1, rows, keys) float32, 0 where
# a query attends and -inf where it is masked; None when nothing is masked.
MaskRule = Callable[[Call, int], "Tensor | None"]


def additive_mask(attends: Tensor) -> Tensor:
    """0 where a bool tensor is True, -inf elsewhere, float32."""
    return torch.zeros(attends.shape, device=attends.device).masked_fill(~attends, float("-inf"))


def dense_mask(call: Call, rows: int) -> Tensor | None:
    """SDPA: a mask (batch, 1 or heads, q, S or more), bool or additive; without one SDPA is causal from the left."""
    length, keys = call.query.shape[2], call.key.shape[2]
    if call.mask is not None:
        mask = call.mask[:, :, -rows:, :keys]
        return additive_mask(mask) if mask.dtype == torch.bool else mask.float()
    if length == 1 or not call.option("is_causal", getattr(call.module, "is_causal", True)):
        return None
    position = torch.arange(length - rows, length, device=call.key.device)
    return additive_mask(torch.arange(keys, device=call.key.device) <= position[:, None])[None, None]


def eager_mask(call: Call, rows: int) -> Tensor | None:
    """Eager attention: without a mask nothing is masked."""
    return None if call.mask is None else dense_mask(call, rows)


def flash_mask(call: Call, rows: int) -> Tensor | None:
    """Flash attention: a mask of padding alone (batch, S), causal from the right, a window as an option."""
    keys = call.key.shape[2]
    seen = keys if call.mask is None else min(keys, call.mask.shape[1])  # a static cache has room after what was seen
    position = torch.arange(seen - rows, seen, device=call.key.device)[:, None]
    key = torch.arange(keys, device=call.key.device)
    causal = call.option("is_causal", getattr(call.module, "is_causal", True))
    attends = (key <= position) if causal else (key < seen).expand(rows, keys)
    if (window := call.option("sliding_window")) is not None:
        attends = attends & (key > position - window)
    attends = attends[None, None]
    if call.mask is not None:
        attends = attends & F.pad(call.mask[:, -seen:].bool(), (0, keys - seen))[:, None, None]
    return additive_mask(attends)


def flex_mask(call: Call, rows: int) -> Tensor | None:
    """Flex attention: a function of (row of the batch, head, query, key)."""
    if call.mask is None or isinstance(call.mask, Tensor):
        return dense_mask(call, rows)
    device, length, keys = call.key.device, call.query.shape[2], call.key.shape[2]
    row = torch.arange(call.query.shape[0], device=device)[:, None, None, None]
    position = torch.arange(length - rows, length, device=device)[:, None]
    attends = call.mask.mask_mod(row, torch.zeros_like(row), position, torch.arange(keys, device=device))
    return additive_mask(attends.expand(row.shape[0], 1, rows, keys))


MASK_RULES: dict[str, MaskRule] = {"sdpa": dense_mask, "eager": eager_mask, "flex_attention": flex_mask}


def mask_rule(kernel: str) -> MaskRule | None:
    """The rule that reads a kernel's masks; None for an unknown kernel."""
    return MASK_RULES.get(kernel, flash_mask if "flash" in kernel else None)  # flash comes in many builds


def attends_ahead(mask: Tensor) -> bool:
    """Whether the last queries of an additive mask (batch or 1, heads or 1, r, S) attend to a key after their own."""
    rows, length = mask.shape[-2:]
    return bool((mask > torch.finfo(torch.float16).min).triu(length - rows + 1).any())
