"""Direct logit attribution of the gaze heads, and statistics of generated tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gazeguard.attention.backbone import Backbone, Head
from gazeguard.attention.buffers import CapturedActivations, concatenate_padded

BLOCK = 64  # tokens; the most probable of a vocabulary are looked for in the blocks with the greatest maxima
NUM_CONTRAST_TOKENS = 20  # the most probable other tokens, over whose mean a token's attribution is measured


def direct_logit_attribution(
    backbone: Backbone, heads: Sequence[Head], output: Tensor, hidden: Tensor, directions: Tensor
) -> Tensor:
    """What each head adds to a logit: direct logit attribution with the final norm's scale held fixed.

    ``W_U g/|x| W_O o`` (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"): the sum over all heads, all
    MLPs and the embedding is the logit. Where a decoder norms every sum, its norms' scales are all held fixed.

    Args:
        backbone: The model's parts.
        heads: The H heads.
        output: (..., H, width per head), their outputs before the output projection.
        hidden: (..., width), the state before the final norm.
        directions: (..., width), an unembedding row, or a difference of such rows.

    Returns:
        (..., H) float32, logits.
    """
    weight, centered = backbone.final_norm_weight
    state = hidden.float()
    if centered:
        state = state - state.mean(-1, keepdim=True)
    directions = directions.float() * weight / state.pow(2).mean(-1, keepdim=True).sqrt()
    if centered:
        directions = directions - directions.mean(-1, keepdim=True)
    parts = []
    for layer in sorted({layer for layer, _ in heads}):
        chosen = [head for number, head in heads if number == layer]
        slopes = directions @ backbone.output_weight(layer, chosen)
        parts.append(slopes.unflatten(-1, (len(chosen), -1)))  # (..., chosen heads, width per head)
    return (concatenate_padded(parts, dim=-2) * output).sum(-1)


def top_tokens(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk` of scores (..., vocabulary) for a small ``count``: values and ids; on a CPU in half of its time or less."""
    if scores.shape[-1] % BLOCK or scores.shape[-1] < BLOCK * count:
        return scores.topk(min(count, scores.shape[-1]), dim=-1)
    blocks = scores.unflatten(-1, (-1, BLOCK))
    best = blocks.amax(-1).topk(count, dim=-1).indices
    candidates = blocks.gather(-2, best[..., None].expand(*best.shape, BLOCK)).flatten(-2)
    top, places = candidates.topk(count, dim=-1)
    return top, best.gather(-1, places // BLOCK) * BLOCK + places % BLOCK


def top_k_statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable tokens of next-token distributions, and the entropy.

    Args:
        logits: (..., vocabulary) float32.

    Returns:
        Ids (..., k) int64 and log-probabilities (..., k), nats, of the `NUM_CONTRAST_TOKENS` + 1 most probable tokens, and the
        entropy (...), nats.
    """
    top, ids = top_tokens(logits, NUM_CONTRAST_TOKENS + 1)
    most, probabilities = top[..., :1], logits.softmax(-1)
    logprob = probabilities.gather(-1, ids[..., :1]).log()  # the greatest; the others lie below it as their logits do
    below = (logits - most).clamp_(min=-1e9)  # in place from here on: the largest tensors of a recording
    return ids, top - most + logprob, -(below.mul_(probabilities).sum(-1) + logprob[..., 0])


@dataclass(frozen=True)
class TokenStatistics:
    """What the model gave for generated tokens.

    Attributes:
        logprobs: (batch, T), nats.
        entropy: (batch, T), nats.
        attribution: (batch, T, H), logits.
    """

    logprobs: Tensor
    entropy: Tensor
    attribution: Tensor


def token_statistics(
    backbone: Backbone, heads: Sequence[Head], captured: CapturedActivations, token_ids: Tensor
) -> TokenStatistics:
    """Log-probability, entropy and attribution of generated tokens, from the steps that predicted them.

    The attribution's direction is the token's unembedding row minus the mean over its contrast tokens, the
    `NUM_CONTRAST_TOKENS` most probable others.

    Args:
        backbone: The model's parts.
        heads: The H recorded heads.
        captured: The activations of the steps.
        token_ids: (batch, T) int64.
    """
    is_token = captured.top_ids == token_ids[..., None]
    logprobs, top_ids, entropy = captured.top_logprobs.where(is_token, 0).sum(-1), captured.top_ids, captured.entropy
    missing = ~is_token.any(-1)  # the model gave no logits, or the token is not among the top k
    if missing.any():
        parts = _in_chunks(_computed, backbone, captured.hidden[missing], token_ids[missing])
        computed = [torch.cat(values) for values in zip(*parts, strict=True)]
        logprobs, top_ids, entropy = (
            known.index_put((missing,), values) for known, values in zip((logprobs, top_ids, entropy), computed, strict=True)
        )
    parts = _in_chunks(_contrast_directions, backbone, token_ids.flatten(), top_ids.flatten(0, 1))
    directions = torch.cat(parts).unflatten(0, token_ids.shape)
    attribution = direct_logit_attribution(backbone, heads, captured.output, captured.hidden, directions)
    return TokenStatistics(logprobs, entropy, attribution)


def _in_chunks(function: Callable[..., Any], backbone: Backbone, *tensors: Tensor) -> list[Any]:
    """The results of ``function(backbone, ...)`` for a few rows of the tensors at a time.

    A large vocabulary's logits for a long caption would take more memory than the recording itself.
    """
    chunks = zip(*(tensor.split(backbone.logits_chunk) for tensor in tensors), strict=True)
    return [function(backbone, *chunk) for chunk in chunks]


def _computed(backbone: Backbone, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (r,) of tokens (r,) after states (r, width), the top k tokens (r, k), and the entropy (r,)."""
    logits = backbone.logits(hidden)
    top_ids, top_logprobs, entropy = top_k_statistics(logits)
    below = logits.gather(-1, token_ids[:, None]) - logits.gather(-1, top_ids[:, :1])
    return (below + top_logprobs[:, :1])[:, 0], top_ids, entropy


def _contrast_directions(backbone: Backbone, token_ids: Tensor, top_ids: Tensor) -> Tensor:
    """Unembedding rows (r, width) of tokens (r,) less the mean of those of their contrast tokens among ``top_ids`` (r, k)."""
    rows = backbone.unembedding_rows()
    contrast = (top_ids != token_ids[:, None]).float()
    means = (rows(top_ids).float() * contrast[..., None]).sum(1) / contrast.sum(1, keepdim=True)
    return rows(token_ids).float() - means
