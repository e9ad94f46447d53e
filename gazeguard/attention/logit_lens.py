"""TODO attention.logit_lens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gazeguard.attention.backbone import Backbone

LEAST = -30.0  # nats; what is less likely is as good as impossible


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What lies in the image cells: their last states read as words, as in the logit lens (nostalgebraist 2020).

    normed: (batch, N, width), after the final norm, see `AttentionRecorder.logit_lens`; known: (batch, N) bool, False for cells not heard
    total:  (batch, N) float32, the log of the sum of all words' exponentials, once and for all
    word:   (batch, N) int64, the likeliest word of each cell; likely: (batch, N) float32, its log-probability
    """

    backbone: Backbone
    normed: Tensor
    known: Tensor
    log_normalizer: Tensor
    top_id: Tensor
    top_logprob: Tensor

    @staticmethod
    def read(backbone: Backbone, states: Tensor) -> LogitLens:
        """states: (batch, N, width), before the final norm; NaN for cells that were not heard."""
        known, states = ~states.isnan().any(-1), states.nan_to_num()
        parts = []
        for some in states.flatten(0, 1).split(backbone.logits_chunk):
            most, word = (logits := backbone.unembed(normed := backbone.norm(some))).max(-1)
            rest = logits.sub_(most[:, None]).exp_().sum(-1).log()  # in place, as logsumexp is not
            parts.append((normed, most + rest, word, -rest))
        normed, total, word, likely = (torch.cat(own).unflatten(0, known.shape) for own in zip(*parts, strict=True))
        return LogitLens(backbone, normed, known, total, word, likely)

    def select(self, rows: Tensor | slice) -> LogitLens:
        """Those of some rows of the batch."""
        return LogitLens(self.backbone, *(value[rows] for value in list(vars(self).values())[1:]))

    def log_probs(self, words: Tensor) -> Tensor:
        """Log-probability (batch, W, N) of ``words`` (batch, W) at each cell; minus infinity where it was not heard."""
        logs = self.backbone.unembed_tokens(words, self.normed) - self.log_normalizer[:, None]
        return logs.masked_fill(~self.known[:, None], -torch.inf)


def attended_logprobs(cells: LogitLens, gaze: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Does what lies where the heads look look like the word?

    gaze: (batch, W or 1, H, N), of the rows that predict the words; words: (batch, W) int64
    returns  content: the log-probability of the word at a cell, probabilities averaged with the heads' mean gaze;
             named: the greatest at any cell (Jiang et al. 2025, arXiv 2410.02762, "internal confidence", of the last layer);
             both (batch, W) float32, nats, at least `LEAST`; NaN for a row whose cells were not heard
    """
    look = gaze.mean(2) * cells.known[:, None]
    look = look / look.sum(-1, keepdim=True).clamp(min=1e-9)
    each = cells.log_probs(words)
    heard = cells.known.any(-1, keepdim=True)
    found = ((look * each.exp()).sum(-1).log(), each.amax(-1))
    return tuple(value.clamp(min=LEAST).where(heard, torch.nan) for value in found)
