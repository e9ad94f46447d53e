"""TODO attention.attribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gazeguard.attention.backbone import Backbone, Head
from gazeguard.attention.buffers import CapturedActivations, _side_by_side

NUM_CONTRAST_TOKENS = 20  # candidates that a attribution is measured against


def direct_logit_attribution(
    backbone: Backbone, heads: Sequence[Head], output: Tensor, hidden: Tensor, directions: Tensor
) -> Tensor:
    """What each head's look adds to a logit: direct logit attribution with the final norm's scale held fixed.

    output:     (..., H, width per head), heads' outputs before the output projection
    hidden:     (..., width), state before the final norm
    directions: (..., width), an unembedding row, or a difference of such rows
    returns     (..., H) float32 logits: ``W_U g/|x| W_O o``, whose sum over all heads, all MLPs and the embedding is the logit
                (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; DESIGN: attribution)
                where a decoder norms every sum, its norms' scales are all held fixed
    """
    gain, centres = backbone.final_norm_weight
    state = hidden.float()
    if centres:
        state = state - state.mean(-1, keepdim=True)
    directions = directions.float() * gain / state.pow(2).mean(-1, keepdim=True).sqrt()
    if centres:
        directions = directions - directions.mean(-1, keepdim=True)
    parts = []
    for layer in sorted({layer for layer, _ in heads}):
        chosen = [head for la, head in heads if la == layer]
        delivered = directions @ backbone.output_weight(layer, chosen)
        parts.append(delivered.unflatten(-1, (len(chosen), -1)))  # (..., chosen heads, width per head)
    return (_side_by_side(parts, dim=-2) * output).sum(-1)


@dataclass(frozen=True)
class TokenStatistics:
    """What the model thought of each written token: all (batch, T) except attribution (batch, T, H); nats and logits."""

    logprobs: Tensor
    entropy: Tensor
    attribution: Tensor


def top_k_statistics(logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of log-probabilities (..., vocabulary), which are written over: the `NUM_CONTRAST_TOKENS` + 1 likeliest words (..., NUM_CONTRAST_TOKENS + 1) int64,
    their log-probabilities, and the entropy (...), nats.
    """
    most, words = logs.topk(min(NUM_CONTRAST_TOKENS + 1, logs.shape[-1]), dim=-1)
    return words, most, -logs.clamp_(min=-1e9).exp().mul_(logs).sum(-1)  # in place: the largest tensors of the watch


def token_statistics(backbone: Backbone, heads: Sequence[Head], rows: CapturedActivations, written: Tensor) -> TokenStatistics:
    """Log-probability, entropy and attribution of the written tokens (batch, T), from the rows that predicted them.

    The attribution's direction is the token's unembedding row minus the mean over its rivals, the `NUM_CONTRAST_TOKENS` likeliest others.
    """
    table = backbone.unembedding_rows()

    def computed(hidden: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logs = backbone.logits(hidden).log_softmax(-1)
        logprob = logs.gather(-1, token[:, None])[:, 0]
        likely, _, entropy = top_k_statistics(logs)
        return logprob, likely, entropy

    def direction(token: Tensor, likely: Tensor) -> Tensor:
        rival = (likely != token[:, None]).float()
        rivals = (table(likely).float() * rival[..., None]).sum(1) / rival.sum(1, keepdim=True)
        return table(token).float() - rivals

    def few(function: Callable[..., Any], *given: Tensor) -> list[Any]:
        # A few words at a time: a large vocabulary's logits for a long caption would take more memory than the watch itself.
        return [function(*part) for part in zip(*(tensor.split(backbone.logits_chunk) for tensor in given), strict=True)]

    same = rows.top_ids == written[..., None]
    found = (rows.top_logprobs.where(same, 0).sum(-1), rows.top_ids, rows.entropy)
    unheard = ~same.any(-1)
    if unheard.any():
        made = zip(*few(computed, rows.hidden[unheard], written[unheard]), strict=True)
        found = tuple(heard.index_put((unheard,), torch.cat(new)) for heard, new in zip(found, made, strict=True))
    logprobs, likely, entropy = found
    directions = torch.cat(few(direction, written.flatten(), likely.flatten(0, 1))).unflatten(0, written.shape)
    return TokenStatistics(logprobs, entropy, direct_logit_attribution(backbone, heads, rows.output, rows.hidden, directions))
