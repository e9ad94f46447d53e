"""TODO decoding.rerank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from gazeguard.attention.attribution import NUM_CONTRAST_TOKENS, direct_logit_attribution
from gazeguard.attention.logit_lens import attended_logprobs
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.policy import Rerank

ABSENT = -10.0  # nats; what is less likely where the gaze lies is not there, how much less says nothing
NEWS = 0.3  # attention on what has not been named yet, from which a caption has reason to go on


class RerankProcessor(LogitsProcessor):
    """Adds to the scores of plausible words what the gaze heads say for them; other scores stay as they are.

    Things: where a plausible candidate is the word that some image cell shows (read as in the logit lens, with a probability
    over one half), each gains ``attended_logprobs`` times the log-probability that it has where the heads look: see `recorder.attended_logprob`, by
    the square of their mean gaze, so that what they graze counts little.

    Attribution: ``attribution`` times what the gaze heads' output adds to a candidate's logit.

    Both are relative to the mean over the step's plausible candidates, so that a step without a visual choice is left alone.

    Ends: things are made up where a list goes on although nothing is left to name. A full stop gains up to ``end_bonus`` logits, the
    more the less *news* lies under the gaze: the heads' mean attention on cells that show a word that has not been written yet.
    `NEWS` of it is reason enough to go on.

    Candidates are the `NUM_CONTRAST_TOKENS` likeliest words, plausible those of at least ``plausible`` times the likeliest one's
    probability. A step in which every row has one plausible word costs no more than a look at the scores. Where the picture is
    no part of the decoder's sequence, the attribution alone counts.
    """

    def __init__(self, recorder: AttentionRecorder, policy: Rerank, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recorder, self.policy, self.tokenizer = recorder, policy, tokenizer
        self._stops = _spelt(tokenizer, (".",)).to(recorder.model.device)
        self._shown: Tensor | None = None  # (batch, N) int64: the word that each image cell shows, -1 for none
        self._prompt = 0  # tokens before the first new one

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (batch, vocabulary) logits or log-probabilities of the word after ``input_ids`` (batch, length)."""
        position = input_ids.shape[1] - 1
        heard = self.recorder.step_at(position)
        if heard is None:  # prompt look-up tries its guesses on the processors before the model has seen them
            return scores
        if self._shown is None:
            self._prompt, self._shown = input_ids.shape[1], self._words_shown(len(input_ids))
        top, words = scores.topk(min(NUM_CONTRAST_TOKENS, scores.shape[-1]), dim=-1)
        plausible = top - top[:, :1] >= math.log(self.policy.plausible)
        if not plausible[:, 1:].any():
            return scores
        gain = torch.zeros_like(top)
        if self.policy.attribution:
            gain += self.policy.attribution * _beside(self._looked(heard, words), plausible)
        things = plausible & (words[:, :, None] == self._shown[:, None]).any(-1)
        stops = plausible & (words[:, :, None] == self._stops).any(-1)
        # What is asked for a choice that no row has would be paid for by all.
        of_things, of_ends = self.policy.attended_logprob and things.any(), self.policy.end_bonus and stops.any()
        if of_things or of_ends:
            gaze = self.recorder.gaze_at(position)
        if of_things:
            lies, _ = attended_logprobs(self.recorder.logit_lens(), gaze.mean(1)[:, None, None].square(), words)
            looks_like = _beside(lies.clamp(min=ABSENT), plausible)
            gain += self.policy.attended_logprob * looks_like.where(
                things.any(-1, keepdim=True), 0
            )  # NaN for a row without a picture
        if of_ends:
            gain += stops * (self.policy.end_bonus * (1 - self._news(gaze, input_ids) / NEWS).clamp(min=0))[:, None]
        return scores.scatter(-1, words, (top + gain * plausible).to(scores.dtype))

    def _looked(self, heard: tuple[Tensor, Tensor], words: Tensor) -> Tensor:
        """What the gaze heads' output adds to the logit of each of ``words``, both (batch, candidates)."""
        output, hidden = heard
        count = words.shape[1]
        return direct_logit_attribution(
            self.recorder.backbone,
            self.recorder.heads,
            output[:, None].expand(-1, count, -1, -1),
            hidden[:, None].expand(-1, count, -1),
            self.recorder.backbone.unembedding_rows()(words),  # (batch, candidates, width)
        ).sum(-1)

    def _news(self, gaze: Tensor, input_ids: Tensor) -> Tensor:
        """(batch,): the heads' mean attention on cells that show a word which is not among those written."""
        written = input_ids[:, self._prompt :]
        new = (self._shown >= 0) & (self._shown[:, :, None] != written[:, None]).all(-1)  # (batch, N)
        return (gaze.mean(1) * new).sum(-1)

    def _words_shown(self, rows: int) -> Tensor:
        """`_shown`, from what the last layer made of the cells when it read the prompt."""
        cells = self.recorder.logit_lens()
        if cells is None or not (self.policy.end_bonus or self.policy.attended_logprob):
            return torch.full((rows, 1), -1, device=self.recorder.model.device)
        names = {word: self.tokenizer.decode([word]).strip() for word in cells.top_id.unique().tolist()}
        named = [word for word, name in names.items() if name.isalpha() and len(name) > 2]
        known = (cells.top_logprob > math.log(0.5)) & torch.isin(cells.top_id, cells.top_id.new_tensor(named)) & cells.known
        return cells.top_id.masked_fill(~known, -1)


def _beside(values: Tensor, plausible: Tensor) -> Tensor:
    """(batch, candidates) values less their mean over the plausible candidates."""
    return values - (values * plausible).sum(-1, keepdim=True) / plausible.sum(-1, keepdim=True)


def _spelt(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Tensor:
    """The tokens that are one of these words, with a space in front or without, as BPE and SentencePiece write it."""
    known = tokenizer.get_vocab()
    forms = (mark + word for word in words for mark in ("", "\u0120", "\u2581"))
    return torch.tensor(sorted({known[form] for form in forms if form in known}), dtype=torch.int64)
