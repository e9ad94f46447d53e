"""How is the next word chosen? A LogitsProcessor that lets the gaze heads have their say."""

from __future__ import annotations

import math

from torch import Tensor
from transformers import LogitsProcessor

from gazeguard.policy import Rerank
from gazeguard.tap import RIVALS, Tap, readout


class RerankProcessor(LogitsProcessor):
    """Adds ``strength`` times the weighted readout to the scores of plausible words; other scores stay as they are.

    The readout of a candidate is what the gaze heads' output adds to its logit, relative to the mean over the plausible
    candidates of this step, so that a step without a visual choice is left alone. Candidates are the `RIVALS` likeliest
    words, and of these only words of at least ``plausible`` times the likeliest one's probability are moved.
    """

    def __init__(self, tap: Tap, policy: Rerank) -> None:
        self.tap, self.policy = tap, policy

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (batch, vocabulary) logits or log-probabilities of the word after ``input_ids`` (batch, length)."""
        backbone, heads = self.tap.backbone, self.tap.heads
        heard = self.tap.at(input_ids.shape[1] - 1)
        if heard is None:  # prompt look-up tries its guesses on the processors before the model has seen them
            return scores
        output, hidden = heard
        top, words = scores.topk(min(RIVALS, scores.shape[-1]), dim=-1)
        directions = backbone.directions()(words)  # (batch, candidates, width)
        count = words.shape[1]
        looked = readout(
            backbone,
            heads,
            output[:, None].expand(-1, count, -1, -1),
            hidden[:, None].expand(-1, count, -1),
            directions,
        ).sum(-1)
        plausible = top - top[:, :1] >= math.log(self.policy.plausible)
        mean = (looked * plausible).sum(-1, keepdim=True) / plausible.sum(-1, keepdim=True)
        moved = top + self.policy.strength * (looked - mean) * plausible
        return scores.scatter(-1, words, moved.to(scores.dtype))
