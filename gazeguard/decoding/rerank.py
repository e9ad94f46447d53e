"""Rerank decoding: a logits processor that moves plausible tokens by the evidence of the gaze heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from gazeguard.attention.attribution import NUM_CONTRAST_TOKENS, direct_logit_attribution
from gazeguard.attention.logit_lens import attended_logprobs
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.errors import given
from gazeguard.policy import Rerank

MIN_LOGPROB = -10.0  # nats; a token less probable than this where the heads attend is absent, how much less says nothing
NOVELTY = 0.3  # attention mass on what has not been named yet, from which a caption has reason to go on


class RerankProcessor(LogitsProcessor):
    """Adds to the scores of plausible tokens what the gaze heads say for them; other scores stay as they are.

    Objects: where a plausible candidate is the token that some image token shows (read by the logit lens, with a probability
    over one half), each candidate gains ``attended_logprob`` times the log-probability that it has where the heads attend: see
    `attended_logprobs`, weighted by the square of their mean gaze, so that what they graze counts little.

    Attribution: ``attribution`` times what the gaze heads' output adds to a candidate's logit.

    Both are relative to the mean over the step's plausible candidates, so that a step without a visual choice is left alone.

    Ends: objects are hallucinated where a list goes on although nothing is left to name. A full stop gains up to ``end_bonus``
    logits, the more the less *novelty* the heads attend to: their mean attention on image tokens that show a token that has not
    been generated yet. `NOVELTY` of it is reason enough to go on.

    Candidates are the `NUM_CONTRAST_TOKENS` most probable tokens, plausible those of at least ``plausible`` times the greatest
    probability. A step in which every row has one plausible token costs no more than a comparison of scores. Where the image is
    no part of the decoder's sequence, the attribution alone counts.
    """

    def __init__(self, recorder: AttentionRecorder, policy: Rerank, tokenizer: PreTrainedTokenizerBase) -> None:
        """Of a recorder, which has begun to record when the processor is called first."""
        self.recorder, self.policy, self.tokenizer = recorder, policy, tokenizer
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
        top, tokens = scores.topk(min(NUM_CONTRAST_TOKENS, scores.shape[-1]), dim=-1)
        plausible = top - top[:, :1] >= math.log(self.policy.plausible)
        if not plausible[:, 1:].any():
            return scores
        gain = torch.zeros_like(top)
        if self.policy.attribution:
            gain += self.policy.attribution * _relative(self._attribution(captured, tokens), plausible)
        objects = plausible & (tokens[:, :, None] == self._shown[:, None]).any(-1)
        stops = plausible & (tokens[:, :, None] == self._stops).any(-1)
        # What is computed for a choice that no row has would be paid for by all.
        for_objects = self.policy.attended_logprob and objects.any()
        for_ends = self.policy.end_bonus and stops.any()
        if for_objects or for_ends:
            gaze = self.recorder.gaze_at(position)
        if for_objects:
            gain += self.policy.attended_logprob * self._object_gain(gaze, tokens, plausible, objects)
        if for_ends:
            missing = (1 - self._novelty(gaze, input_ids) / NOVELTY).clamp(min=0)
            gain += stops * (self.policy.end_bonus * missing)[:, None]
        return scores.scatter(-1, tokens, (top + gain * plausible).to(scores.dtype))

    def _attribution(self, captured: tuple[Tensor, Tensor], tokens: Tensor) -> Tensor:
        """What the gaze heads' output adds to the logit of each of ``tokens``, both (batch, candidates)."""
        output, hidden = captured
        count = tokens.shape[1]
        return direct_logit_attribution(
            self.recorder.backbone,
            self.recorder.heads,
            output[:, None].expand(-1, count, -1, -1),
            hidden[:, None].expand(-1, count, -1),
            self.recorder.backbone.unembedding_rows()(tokens),  # (batch, candidates, width)
        ).sum(-1)

    def _object_gain(self, gaze: Tensor, tokens: Tensor, plausible: Tensor, objects: Tensor) -> Tensor:
        """(batch, candidates): relative log-probability where the heads attend, 0 for rows without an object to choose."""
        attended, _ = attended_logprobs(given(self.recorder.logit_lens()), gaze.mean(1)[:, None, None].square(), tokens)
        gain = _relative(attended.clamp(min=MIN_LOGPROB), plausible)
        return gain.where(objects.any(-1, keepdim=True), 0)  # NaN for a row without an image

    def _novelty(self, gaze: Tensor, input_ids: Tensor) -> Tensor:
        """(batch,): the heads' mean attention on image tokens that show a token which is not among those generated."""
        generated = input_ids[:, self._prompt_length :]
        shown = given(self._shown)
        new = (shown >= 0) & (shown[:, :, None] != generated[:, None]).all(-1)  # (batch, N)
        return (gaze.mean(1) * new).sum(-1)

    def _tokens_shown(self, rows: int) -> Tensor:
        """`_shown`, read off the last layer's states of the image tokens in the prompt's pass."""
        lens = self.recorder.logit_lens()
        if lens is None or not (self.policy.end_bonus or self.policy.attended_logprob):
            return torch.full((rows, 1), -1, device=self.recorder.model.device)
        names = {token: self.tokenizer.decode([token]).strip() for token in lens.top_id.unique().tolist()}
        words = [token for token, name in names.items() if name.isalpha() and len(name) > 2]
        known = (lens.top_logprob > math.log(0.5)) & torch.isin(lens.top_id, lens.top_id.new_tensor(words)) & lens.known
        return lens.top_id.masked_fill(~known, -1)


def _relative(values: Tensor, plausible: Tensor) -> Tensor:
    """(batch, candidates) values less their mean over the plausible candidates."""
    return values - (values * plausible).sum(-1, keepdim=True) / plausible.sum(-1, keepdim=True)


def tokens_spelling(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Tensor:
    """The tokens that are one of these words, with a space in front or without, as BPE and SentencePiece write it."""
    known = tokenizer.get_vocab()
    forms = (mark + word for word in words for mark in ("", "\u0120", "\u2581"))
    return torch.tensor(sorted({known[form] for form in forms if form in known}), dtype=torch.int64)
