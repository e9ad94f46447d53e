"""Logit lens on image tokens: their last states decoded to next-token probabilities (nostalgebraist 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gazeguard.attention.backbone import Backbone
from gazeguard.attention.layout import KeyLayout

MIN_LOGPROB = -30.0  # nats; what is less probable is as good as impossible


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The image tokens of a batch, decoded by the model's own final norm and unembedding.

    Attributes:
        backbone: The model's parts.
        normed: (batch, N, width), the states after the final norm.
        known: (batch, N) bool, False for image tokens that were not captured.
        log_normalizer: (batch, N) float32, nats, the log of the sum over the vocabulary.
        top_id: (batch, N) int64, the most probable token of each; None where it was not asked for.
        top_logprob: (batch, N) float32, nats, its log-probability; None, too.
    """

    backbone: Backbone
    normed: Tensor
    known: Tensor
    log_normalizer: Tensor
    top_id: Tensor | None = None
    top_logprob: Tensor | None = None

    @staticmethod
    def from_states(backbone: Backbone, states: Tensor, top: bool = False) -> LogitLens:
        """Decode states (batch, N, width) before the final norm; NaN for image tokens that were not captured.

        Args:
            backbone: The model's parts.
            states: The states.
            top: Whether the most probable tokens are wanted: to find them takes a CPU longer than their probability.
        """
        known, states = ~states.isnan().any(-1), states.nan_to_num()
        parts = []
        for part in states.flatten(0, 1).split(backbone.states_chunk):
            normed = backbone.norm(part)
            parts.append((normed, *_statistics(backbone.unembed_in_parts(normed), top)))
        values = (torch.cat(values).unflatten(0, known.shape) for values in zip(*parts, strict=True))
        return LogitLens(backbone, next(values), known, *values)

    def select(self, rows: Tensor | slice) -> LogitLens:
        """The lens of some rows of the batch."""
        tensors: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def mean_states(self) -> Tensor:
        """(batch, width): the mean normed state of each row's image tokens, float32; NaN where none was captured."""
        known = self.known[..., None]
        return (self.normed.float() * known).sum(1) / known.sum(1)

    def log_probs(self, token_ids: Tensor) -> Tensor:
        """Log-probabilities (batch, W, N), nats, of tokens (batch, W) at each image token; -inf where it was not captured."""
        logs = self.backbone.unembed_tokens(token_ids, self.normed) - self.log_normalizer[:, None]
        return logs.masked_fill(~self.known[:, None], -torch.inf)


def _statistics(parts: Iterable[tuple[int, Tensor]], top: bool) -> tuple[Tensor, ...]:
    """The log of the sum over the vocabulary, and if wanted the most probable token and its log-probability, each (n,).

    Args:
        parts: Of the vocabulary, each with its first token: the logits (n, c).
        top: Whether the most probable token is wanted.
    """
    totals, tops, ids = [], [], []
    for first, logits in parts:
        totals.append(logits[:, 0] - logits.log_softmax(-1)[:, 0])  # a CPU takes twice as long for logsumexp
        if top:
            most, token = logits.max(-1)
            tops.append(most)
            ids.append(token + first)
    total = torch.stack(totals).logsumexp(0)
    if not top:
        return (total,)
    most, part = torch.stack(tops).max(0)
    return total, torch.stack(ids).gather(0, part[None])[0], most - total


def attended_logprobs(lens: LogitLens, gaze: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """How probable tokens are at the image tokens that the gaze heads attend to, and at the best of all.

    Args:
        lens: The logit lens of the batch.
        gaze: (batch, W or 1, H, N), attention of the steps that predict the tokens.
        token_ids: (batch, W) int64.

    Returns:
        The attended log-probability, probabilities averaged with the heads' mean attention; and the internal confidence, the
        maximum over image tokens (Jiang et al. 2025, arXiv 2410.02762, of the last layer). Both are (batch, W) float32, nats,
        at least `MIN_LOGPROB`; NaN for a row whose image tokens were not captured.
    """
    attention = gaze.mean(2) * lens.known[:, None]
    attention = attention / attention.sum(-1, keepdim=True).clamp(min=1e-9)
    logprobs = lens.log_probs(token_ids)
    captured = lens.known.any(-1, keepdim=True)
    attended, best = (
        value.clamp(min=MIN_LOGPROB).where(captured, torch.nan)
        for value in ((attention * logprobs.exp()).sum(-1).log(), logprobs.amax(-1))
    )
    return attended, best


class ImageStates:
    """The last layer's states of the image tokens of a batch, as a recorder captures them pass by pass."""

    def __init__(self) -> None:
        self.states: Tensor | None = None  # (batch, N, width) before the final norm; NaN where not captured
        self._lens: LogitLens | None = None  # of these states

    def put(self, layout: KeyLayout, states: Tensor, past: int) -> None:
        """Keep the image tokens among a pass's ``states`` (batch, q, width), the first of which is at position ``past``."""
        columns, length = layout.columns - past, states.shape[1]
        here = layout.valid & (columns >= 0) & (columns < length)
        index = columns.clamp(0, length - 1)[..., None].expand(-1, -1, states.shape[2])
        before = torch.full_like(index, torch.nan, dtype=states.dtype) if self.states is None else self.states
        self.states, self._lens = torch.where(here[..., None], states.gather(1, index), before), None

    def lens(self, backbone: Backbone, beams: Tensor | None = None, top: bool = False) -> LogitLens | None:
        """The logit lens on them; None when nothing was captured.

        Args:
            backbone: The model's parts.
            beams: (captions, T) int64, the row of the batch of each caption's tokens; by default the rows themselves.
            top: Whether the most probable tokens are wanted.
        """
        if self.states is None:
            return None
        if self._lens is None or (top and self._lens.top_id is None):
            self._lens = LogitLens.from_states(backbone, self.states, top)
        return self._lens if beams is None else self._lens.select(beams[:, 0].to(self.states.device))
