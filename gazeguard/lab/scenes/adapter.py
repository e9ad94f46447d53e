"""LoRA adapter of the scenes VLM: low-rank additions to the language model's linear layers, trained, stored and merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

RANKS = {"q_proj": 16, "k_proj": 16, "v_proj": 16, "o_proj": 16, "gate_proj": 8, "up_proj": 8, "down_proj": 8}
SCALE = 2.0  # of the product of the two factors


class LowRank(nn.Module):
    """A frozen linear layer plus ``SCALE * up(down(x))``; it begins as the layer itself."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, layer.in_features))  # (rank, inputs)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))  # (outputs, rank)
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        low = nn.functional.linear(nn.functional.linear(inputs, self.down), self.up)
        return self.layer(inputs) + SCALE * low


def targets(language_model: Any) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, parent, attribute) of every linear layer that takes an adapter, in order."""
    for index, block in enumerate(language_model.layers):
        for parent in (block.self_attn, block.mlp):
            for attribute in RANKS:
                if hasattr(parent, attribute):
                    yield f"layers.{index}.{attribute}", parent, attribute


def attach(language_model: nn.Module) -> None:
    """Freeze the language model and put an adapter beside each of its linear layers."""
    language_model.requires_grad_(False)
    for _, parent, attribute in list(targets(language_model)):
        setattr(parent, attribute, LowRank(getattr(parent, attribute), RANKS[attribute]))


def factors(language_model: nn.Module) -> dict[str, Tensor]:
    """The adapter's factors, ``layers.0.q_proj.down`` and ``.up`` and so on."""
    found = {}
    for name, parent, attribute in targets(language_model):
        module = getattr(parent, attribute)
        if isinstance(module, LowRank):
            found[f"{name}.down"], found[f"{name}.up"] = module.down.detach(), module.up.detach()
    return found


@torch.no_grad()
def set_factors(language_model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put stored factors into an attached adapter."""
    for name, parent, attribute in targets(language_model):
        module = getattr(parent, attribute)
        module.down.copy_(values[f"{name}.down"])
        module.up.copy_(values[f"{name}.up"])


@torch.no_grad()
def merge(language_model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Add the product of stored factors to the weights of a language model without adapters."""
    for name, parent, attribute in targets(language_model):
        weight = getattr(parent, attribute).weight
        product = values[f"{name}.up"].float() @ values[f"{name}.down"].float()
        weight.add_(SCALE * product.to(weight))
