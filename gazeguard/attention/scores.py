"""Attention computed anew from a kernel's queries and keys, with all that alters its scores, and steered outputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gazeguard.attention.kernels import Call

ALTERING = ("softcap", "s_aux", "sinks", "position_bias")  # options of a kernel that do more than scale and mask


class SteeredRows(NamedTuple):
    """Consecutive queries whose scores get a bias.

    Attributes:
        rows: Which of a call's queries.
        columns: (batch, N) int64, the keys of the image tokens.
        bias: (batch, K, N), logits, of the recorded heads; 0 for image tokens that a row of the batch lacks.
    """

    rows: slice
    columns: Tensor
    bias: Tensor


def alters_scores(call: Call) -> bool:
    """Whether a call has soft caps, sinks or position biases."""
    return any(call.option(name) is not None for name in ALTERING)


def attention_weights(
    call: Call, query: Tensor, heads: Tensor, mask: Tensor | None, steered: Sequence[SteeredRows] = ()
) -> Tensor:
    """Attention (batch, K, r, S) float32 of some heads' last queries.

    Args:
        call: The kernel's call, whose keys and options are used.
        query: (batch, K, r, d), the queries of the heads.
        heads: (K,) int64.
        mask: Additive, (batch or 1, K or 1, r, S); None when nothing is masked.
        steered: Queries whose scores get a bias.
    """
    rows = query.shape[2]
    key = call.key.index_select(1, heads // call.group).float()
    scores = query.float() @ key.transpose(2, 3) * call.scaling
    if (cap := call.option("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if (bias := call.option("position_bias")) is not None:
        bias = bias[:, :, -rows:, : scores.shape[3]].float()
        scores = scores + (bias if bias.shape[1] == 1 else bias[:, heads])
    if mask is not None:
        scores = scores + mask
    for part in steered:
        bias = part.bias.to(scores)[:, :, None].expand(-1, -1, part.rows.stop - part.rows.start, -1)
        columns = part.columns[:, None, None].expand(bias.shape)
        scores[:, :, part.rows] = scores[:, :, part.rows].scatter_add(3, columns, bias)
    sink = call.option("s_aux", call.option("sinks", getattr(call.module, "sinks", None)))
    if sink is not None:  # one per head, or one per query and head
        sink = sink.view(1, -1, 1, 1) if sink.ndim == 1 else sink[:, :, -rows:]
        scores = torch.cat((scores, sink.float()[:, heads].expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(-1).nan_to_num()  # a query of padding may attend to nothing at all
    return weights if sink is None else weights[..., :-1]


def steered_result(
    call: Call,
    value: Tensor,
    result: tuple[Tensor, Tensor | None],
    heads: Tensor,
    weights: Tensor,
    steered: Sequence[SteeredRows],
) -> tuple[Tensor, Tensor | None]:
    """A kernel's result with the outputs of steered queries replaced.

    Args:
        call: The kernel's call.
        value: (batch, kv heads, S, d).
        result: What the kernel returned, whose first part is (batch, q, heads, d).
        heads: (K,) int64, the steered heads.
        weights: (batch, K, r, S), their attention at the last queries.
        steered: Which of these queries.
    """
    values = value.index_select(1, heads // call.group).float()
    output = result[0].clone()
    last = output[:, call.query.shape[2] - weights.shape[2] :]
    for part in steered:
        steered_output = weights[:, :, part.rows] @ values  # (batch, K, r, d)
        last[:, part.rows, heads] = steered_output.transpose(1, 2).to(output.dtype)
    return (output, *result[1:])


class SteeringSchedule:
    """The biases of a run, each with the decoding step from which it holds."""

    def __init__(self) -> None:
        self._biases: dict[int, Tensor | None] = {}  # first step -> (batch, H, N) logits, or None

    def set(self, step: int, bias: Tensor | None) -> None:
        """Let a bias hold from a step on, until that of a later step."""
        self._biases[step] = bias

    @property
    def first_step(self) -> int:
        """The first step with a bias; negative when queries of the prompt are steered, too."""
        return min(self._biases, default=0)

    def repeat(self, times: int) -> None:
        """Give each prompt's bias to ``times`` rows of the batch."""
        self._biases = {
            step: None if bias is None else bias.repeat_interleave(times, dim=0) for step, bias in self._biases.items()
        }

    def parts(self, begin: int, end: int) -> list[tuple[slice, Tensor]]:
        """Which of the steps from ``begin`` to ``end`` are steered, counted from ``begin``, and by which bias."""
        if not self._biases:
            return []
        starts = [*sorted(self._biases), end]
        parts = []
        for start, until in itertools.pairwise(starts):
            first, last, bias = max(start, begin), min(until, end), self._biases[start]
            if bias is not None and first < last:
                parts.append((slice(first - begin, last - begin), bias))
        return parts
