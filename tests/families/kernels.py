"""Attention kernels of GPUs on a CPU: flash attention by hand, and flex attention without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import flex_attention as flex
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from gazeguard.attention.backbone import find_backbone


def plain_block_mask(*args: Any, _compile: bool = False, **options: Any) -> Any:
    return create_block_mask(*args, **options)


def flash_by_hand(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What flash attention computes: each row without its padding, causal from the right, window, soft cap, sinks."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    made = torch.zeros_like(query)
    for row in range(len(query)):
        real = slice(None) if attention_mask is None else attention_mask[row].nonzero()[:, 0]
        k, v = key[row][:, real], value[row][:, real]
        steps = min(query.shape[2], k.shape[1])
        scores = query[row][:, -steps:] @ k.transpose(1, 2) * (scaling or query.shape[-1] ** -0.5)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(k.shape[1] - steps, k.shape[1])[:, None] - torch.arange(k.shape[1])
        closed = (distance < 0) | (distance >= (sliding_window or 10**9))
        scores = scores.masked_fill(closed, float("-inf"))
        if s_aux is not None:
            scores = torch.cat((scores, s_aux[:, None, None].expand(-1, steps, 1)), dim=-1)
        made[row][:, -steps:] = scores.softmax(-1)[..., : k.shape[1]] @ v
    return made.transpose(1, 2).contiguous(), None


@contextmanager
def flash_on_cpu() -> Iterator[str]:
    """Inside, transformers knows `flash_by_hand`, with its own masks for flash attention, under the name that is given."""
    name = "flash_by_hand"
    AttentionInterface.register(name, flash_by_hand)
    AttentionMaskInterface.register(name, masking_utils.flash_attention_mask)
    try:
        yield name
    finally:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


@contextmanager
def flex_on_cpu() -> Iterator[str]:
    """Inside, flex attention runs uncompiled: torch 2.13 cannot compile it for every size on a CPU."""

    def uncompiled(*args: Any, training: bool, **how: Any) -> Any:
        return flex.flex_attention(*args, **how)

    with (
        mock.patch.object(flex, "compile_friendly_flex_attention", uncompiled),
        mock.patch.object(masking_utils, "create_block_mask", plain_block_mask),
    ):
        yield "flex_attention"


def use_kernel(model: PreTrainedModel, name: str) -> None:
    """Let a model's text decoder run a kernel that `set_attn_implementation` does not know."""
    for module in find_backbone(model).attention.values():
        module.config._attn_implementation_internal = name
    model.config.get_text_config()._attn_implementation_internal = name
