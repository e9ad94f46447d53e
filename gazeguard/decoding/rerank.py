"""Rerank decoding: a logits processor that moves plausible tokens by the evidence of the gaze heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from gazeguard.attention.attribution import NUM_CONTRAST_TOKENS, direct_logit_attribution, top_tokens
from gazeguard.attention.logit_lens import LogitLens, attended_logprobs
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.errors import given
from gazeguard.policy import STRENGTHS, Rerank

MIN_LOGPROB = -10.0  # nats; a token less probable than this where the heads attend is absent, how much less says nothing
SHOWN = 0.5  # probability from which the top token of an image token counts as what it shows
NOVELTY = 0.3  # attention mass on what has not been named yet, from which a caption has reason to go on


class RerankProcessor(LogitsProcessor):
    """Adds to the scores of plausible tokens what the gaze heads say for them; other scores stay as they are.

    Objects: where a plausible candidate is the token that some image token shows (read by the logit lens, with a probability
    over one half), each candidate gains ``attended_logprob`` times the log-probability that it has where the heads attend: see
    `attended_logprobs`, weighted by the square of their mean gaze, so that what they graze counts little.

    Attribution: ``attribution`` times what the gaze heads' output adds to a candidate's logit.

    Both are relative to the mean over the step's plausible candidates, so that a step without a visual choice is left alone.

    Ends: models hallucinate objects when a list continues although nothing is left to name. A full stop gains up to
    ``end_bonus`` logits; it gains more if the heads attend to less *novelty*, which is their mean attention on image tokens
    that show a token that has not been generated yet. From a novelty of `NOVELTY` on, it gains nothing.

    Candidates are the `NUM_CONTRAST_TOKENS` most probable tokens; plausible are those with at least ``plausible`` times the
    greatest probability. A step in which every row has one plausible token costs only a comparison of scores. If the image is
    not part of the decoder's sequence, only the attribution counts.
    """

    def __init__(self, recorder: AttentionRecorder, policy: Rerank, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make a processor for a recorder, which must record before the processor is called first."""
        self.recorder, self.policy, self.tokenizer = recorder, policy, tokenizer
        self._attribution_strength, self._object_strength, self._end_strength = (
            policy.strengths.get(name, 0.0) for name in STRENGTHS
        )
        self._stops = tokens_spelling(tokenizer, (".",)).to(recorder.model.device)
        self._shown: Tensor | None = None  # (batch, N) int64: the token that each image token shows, -1 for none
        self._prompt_length = 0  # tokens before the first new one

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, moved.

        Args:
            input_ids: (batch, length) int64.
            scores: (batch, vocabulary) logits or log-probabilities of the token after them.
        """
        position = input_ids.shape[1] - 1
        captured = self.recorder.step_at(position)
        if captured is None:  # prompt look-up tries its guesses on the processors before the model has seen them
            return scores
        if self._shown is None:
            self._prompt_length, self._shown = input_ids.shape[1], self._tokens_shown(len(input_ids))
        top, tokens = top_tokens(scores, NUM_CONTRAST_TOKENS)
        plausible = top - top[:, :1] >= math.log(self.policy.plausible)
        objects = plausible & (tokens[:, :, None] == self._shown[:, None]).any(-1)
        stops = plausible & (tokens[:, :, None] == self._stops).any(-1)
        # What is computed for a choice that no row has would be paid for by all; the host waits for the device once.
        chosen, for_objects, for_ends = torch.stack((plausible[:, 1:].any(), objects.any(), stops.any())).tolist()
        if not chosen:
            return scores
        gain = torch.zeros_like(top)
        if self._attribution_strength:
            gain += self._attribution_strength * _relative(candidate_attribution(self.recorder, *captured, tokens), plausible)
        for_objects, for_ends = self._object_strength and for_objects, self._end_strength and for_ends
        if for_objects or for_ends:
            gaze = self.recorder.gaze_at(position)
        if for_objects:
            gain += self._object_strength * self._object_gain(gaze, tokens, plausible, objects)
        if for_ends:
            missing = (1 - self._novelty(gaze, input_ids) / NOVELTY).clamp(min=0)
            gain += stops * (self._end_strength * missing)[:, None]
        return scores.scatter(-1, tokens, (top + gain * plausible).to(scores.dtype))

    def _object_gain(self, gaze: Tensor, tokens: Tensor, plausible: Tensor, objects: Tensor) -> Tensor:
        """(batch, candidates): relative log-probability where the heads attend, 0 for rows without an object to choose."""
        attended = candidate_logprobs(given(self.recorder.layer_lens()), gaze, tokens)
        gain = _relative(attended, plausible)
        return gain.where(objects.any(-1, keepdim=True), 0)  # NaN for a row without an image

    def _novelty(self, gaze: Tensor, input_ids: Tensor) -> Tensor:
        """(batch,): the heads' mean attention on image tokens that show a token which is not among those generated."""
        generated = input_ids[:, self._prompt_length :]
        shown = given(self._shown)
        new = (shown >= 0) & (shown[:, :, None] != generated[:, None]).all(-1)  # (batch, N)
        return (gaze.mean(1) * new).sum(-1)

    def _tokens_shown(self, rows: int) -> Tensor:
        """`_shown`, read off the states of the image tokens in the prompt's pass."""
        lens = self.recorder.layer_lens(top=True) if self._end_strength or self._object_strength else None
        if lens is None:
            return torch.full((rows, 1), -1, device=self.recorder.model.device)
        shown = given(lens.top_id).masked_fill(~(lens.known & (given(lens.top_logprob) > math.log(SHOWN))), -1)
        names = {token: self.tokenizer.decode([token]).strip() for token in shown.unique().tolist() if token >= 0}
        words = [token for token, name in names.items() if name.isalpha() and len(name) > 2]
        return shown.masked_fill(~torch.isin(shown, shown.new_tensor(words)), -1)


class StopBonus(LogitsProcessor):
    """Adds to the score of every plausible full stop, blind to the image: shorter captions have fewer false objects.

    The null method of every decoding method that makes captions truer: what does no better has seen nothing.
    """

    def __init__(self, stops: Sequence[int], bonus: float, plausible: float = 0.0) -> None:
        """Take the tokens that end a sentence and their ``bonus`` in logits; ``plausible`` as for `RerankProcessor`."""
        self.stops, self.bonus, self.plausible = list(stops), bonus, plausible

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (batch, vocabulary), moved."""
        least = scores.max(-1, keepdim=True).values + (math.log(self.plausible) if self.plausible else -math.inf)
        scores, stops = scores.clone(), scores[:, self.stops]
        scores[:, self.stops] = stops + self.bonus * (stops >= least)
        return scores


def candidate_attribution(recorder: AttentionRecorder, output: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    """What the gaze heads' output adds to the logits of candidates for the next token.

    Args:
        recorder: Of the heads.
        output: (batch, H, width per head) of one step each, as `AttentionRecorder.step_at` gives it.
        hidden: (batch, width), the same.
        tokens: (batch, candidates) int64.

    Returns:
        (batch, candidates) float32, logits.
    """
    count = tokens.shape[1]
    return direct_logit_attribution(
        recorder.backbone,
        recorder.heads,
        output[:, None].expand(-1, count, -1, -1),
        hidden[:, None].expand(-1, count, -1),
        recorder.backbone.unembedding_rows()(tokens),  # (batch, candidates, width)
    ).sum(-1)


def candidate_logprobs(lens: LogitLens, gaze: Tensor, tokens: Tensor) -> Tensor:
    """How probable candidates (batch, candidates) are at the image tokens that the heads attend to.

    Args:
        lens: On the image tokens of the batch.
        gaze: (batch, H, N) of one step each; its mean over heads counts squared, so that what they graze counts little.
        tokens: (batch, candidates) int64.

    Returns:
        (batch, candidates) float32, nats, at least `MIN_LOGPROB`; NaN for a row without an image.
    """
    attended, _ = attended_logprobs(lens, gaze.mean(1)[:, None, None].square(), tokens)
    return attended.clamp(min=MIN_LOGPROB)


def _relative(values: Tensor, plausible: Tensor) -> Tensor:
    """(batch, candidates) values less their mean over the plausible candidates."""
    return values - (values * plausible).sum(-1, keepdim=True) / plausible.sum(-1, keepdim=True)


def tokens_spelling(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Tensor:
    """The tokens that are one of these words, with a space in front or without, as BPE and SentencePiece write it."""
    known = tokenizer.get_vocab()
    forms = (mark + word for word in words for mark in ("", "\u0120", "\u2581"))
    return torch.tensor(sorted({known[form] for form in forms if form in known}), dtype=torch.int64)
