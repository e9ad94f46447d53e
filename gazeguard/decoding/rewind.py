"""Rewind decoding: a decode loop that rolls back doubtful phrases and continues each caption another way.

`RewindLoop` is a decode loop for ``generate(custom_generate=...)``: greedy and sampled, any batch. A phrase is rolled back
without touching the cache: the keys of the discarded tokens are masked for every later token of their row, and positions go on
from the rollback point, so that each row of a batch is rolled back by itself and a static cache serves as well as a growing
one. What is generated then is what would have been generated had the phrase never been there (a test compares the two).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from gazeguard import _compat
from gazeguard.attention.attribution import top_tokens
from gazeguard.attention.buffers import sent
from gazeguard.claims.parse import Claim
from gazeguard.decoding.rerank import RerankProcessor, tokens_spelling
from gazeguard.errors import UnsupportedError, given

MIN_PROBABILITY = 0.01  # a continuation that the model itself gives less than this is no alternative
MIN_END_PROBABILITY = 0.001  # of the end of a sentence in place of a list's next object; nothing may be left to say
PASSES_PER_ROLLBACK = 12  # forward passes that one rollback may cost, on average over a caption's budget
MAX_CANDIDATES = 64  # top-k tokens of each pass, among which an alternative is chosen when a row comes back to it
_DELIMITERS = (",", ";", "and", "or", "plus", "with", "&")  # what leads from one object of a list to the next
_ENDS = (".", ".\u010a", ".\u010a\u010a")  # of a sentence; BPE has tokens of a full stop and the line ends behind it
_DELIMITER = re.compile(r"(?:[,;]?\s*(?:\b(?:and|or|plus|with)|&)|[,;])?\s*$")


class Draft(NamedTuple):
    """A caption that is being written.

    Attributes:
        tokens: Its token ids, the newest last.
        passes: For each token, the number of the forward pass that generated it.
        ended: Whether the newest token ends the caption.
    """

    tokens: list[int]
    passes: list[int]
    ended: bool


class CommittedPrefix(NamedTuple):
    """What a reviewer knows of a draft after its newest token.

    Attributes:
        tokens: Number of leading tokens that hold only phrases that have been judged.
        rollback_points: Numbers of the tokens at which a doubtful phrase could have gone another way; empty without one.
    """

    tokens: int
    rollback_points: range = range(0)


Reviewer = Callable[[Sequence[Draft | None]], Sequence[CommittedPrefix]]


def rollback_span(claim: Claim, text: str) -> tuple[int, int]:
    """The characters of ``text`` in which it could have gone another way than to name an object, end exclusive.

    They reach from the list delimiter that leads to the object, or else from its article, to the first character of its head
    noun.
    """
    return given(_DELIMITER.search(text[: claim.phrase.start])).start(), claim.phrase.head.start + 1


def list_delimiters(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that lead from one object of a list to the next."""
    return tokens_spelling(tokenizer, _DELIMITERS).tolist()


def list_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a list with its sentence."""
    return tokens_spelling(tokenizer, _ENDS).tolist()


@dataclass(eq=False)
class _Row:
    """One row of the batch while it is written.

    Attributes:
        budget: How often the row may still be rolled back.
        tokens: Its token ids.
        passes: For each token, the pass that generated it.
        banned: Number of a token -> tokens that may not stand there.
        committed: See `CommittedPrefix`.
        done: Whether it is complete.
    """

    budget: int
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    banned: dict[int, list[int]] = field(default_factory=dict)
    committed: int = 0
    done: bool = False

    def roll_back(self, index: int, banned: Sequence[int], token: int) -> list[int]:
        """Put ``token`` in place of token number ``index``, never again a ``banned`` one, and forget what followed.

        Returns:
            The passes that have read what is forgotten.
        """
        self.banned = {number: tokens for number, tokens in self.banned.items() if number <= index}
        self.banned.setdefault(index, []).extend(banned)
        read = self.passes[index + 1 :]
        self.tokens[index:] = [token]
        del self.passes[index + 1 :]
        self.budget -= 1
        return read


class _Alternative(NamedTuple):
    """Another continuation: from token number ``start`` on, one of ``tokens`` (log-probabilities, nats), none ``banned``."""

    start: int
    banned: list[int]
    tokens: list[int]
    logprobs: list[float]

    def choose(self, sample: bool) -> int:
        """The most probable token, or one that is drawn."""
        return self.tokens[int(torch.multinomial(torch.tensor(self.logprobs).softmax(-1), 1)) if sample else 0]


@dataclass(eq=False)
class RewindLoop:
    """The decode loop that rolls back doubtful phrases; one object serves one ``generate``.

    At a doubtful phrase the row goes back to the list delimiter that led to it, and the list ends there, with its sentence: any
    other word would leave a broken one. Where that has not `MIN_END_PROBABILITY`, and where no delimiter leads to it, a phrase
    is rolled back to the one of its rollback points whose second-best token was most probable; the token that stood there is
    banned, unless no other has `MIN_PROBABILITY`. The other token is chosen, or drawn, from the `MAX_CANDIDATES` of the pass
    that generated the discarded one, so a rollback costs no pass by itself. Once the budget is spent, what is generated stays.
    With a budget of 0 everything is as in ``generate``. A cache that was rolled back holds masked keys, so it is not returned.

    Attributes:
        review: Called after each pass with the draft of every row (None for a row that is done); returns a
            `CommittedPrefix` for each. Called again for the rows that were rolled back.
        budget: How often each row is rolled back at most.
        list_delimiters: The tokens that lead from one object of a list to the next.
        list_ends: The tokens that may end a list; empty for all but the delimiters.
        rerank: Changes the scores of every pass.
        streamer: Gets the prompt, and then whatever can no longer be rolled back.
        prompt_streamed: Whether the streamer has got the prompt already.
        passes: After the run, (batch, T) int64: the pass that generated each token, 0 behind a row's end.
        cache: After the run, the cache, in which the prompt's keys are what they were.

    Raises `UnsupportedError` for a cache whose keys cannot be masked, and for a streamer of several captions.
    """

    review: Reviewer
    budget: int
    list_delimiters: Sequence[int] = ()
    rerank: RerankProcessor | None = None
    streamer: BaseStreamer | None = None
    prompt_streamed: bool = False
    list_ends: Sequence[int] = ()
    passes: Tensor | None = None
    cache: Cache | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Generate, as transformers calls a ``custom_generate``."""
        run = _Run(self, model, input_ids, generation_config, model_kwargs)
        stream = _Stream(self.streamer, input_ids, self.prompt_streamed)
        stops = StoppingCriteriaList(each for each in stopping_criteria if not isinstance(each, MaxLengthCriteria))
        while not all(row.done for row in run.rows):
            run.settle(stops, run.append(run.choose(run.scores(logits_processor)), stops))
            stream.put(run.rows[0])
        stream.end()
        self.passes = run.table([row.passes for row in run.rows], 0)
        self.cache = next(value for value in run.model_kwargs.values() if isinstance(value, Cache))
        return run.output(self.passes)


class _Run:
    """One run of a `RewindLoop` over a batch.

    A row's ids are as many pads as it lost passes to rollbacks, its prompt, and its tokens: one column more each pass.
    """

    def __init__(
        self,
        loop: RewindLoop,
        model: PreTrainedModel,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.loop, self.model, self.prompt, self.config, self.model_kwargs = loop, model, input_ids, config, model_kwargs
        batch, width = input_ids.shape
        self.max_tokens = config.max_length - width
        self.max_passes = self.max_tokens + loop.budget * PASSES_PER_ROLLBACK
        _prepare_cache(model_kwargs, width + self.max_passes)
        mask = model_kwargs.get("attention_mask")
        keys = max(width, _compat.mask_length(config)) if mask is None else mask.shape[1]
        self.first_key = keys - 1  # of the query that predicts the first new token
        self.pad = _compat.padding_token(config)
        self.rows = [_Row(loop.budget) for _ in range(batch)]
        self.ids = input_ids
        self.done = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)  # as the rows say
        self.candidates: list[tuple[Tensor, Tensor]] = []  # of every pass the top-k log-probabilities and tokens, (batch, C)
        self.known: dict[int, list[tuple[list[float], list[int]]]] = {}  # those of them that the host has read
        self.kept: dict[str, list[Tensor]] = {name: [] for name in ("scores", "logits") if getattr(config, f"output_{name}")}

    def scores(self, processors: LogitsProcessorList) -> Tensor:
        """(batch, vocabulary) float32: the processed scores of the next token, by one pass of the model."""
        later = {"next_sequence_length": 1} if self.candidates else {"is_first_iteration": True}
        inputs = self.model.prepare_inputs_for_generation(self.ids, **later, **self.model_kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self.model_kwargs = _compat.next_inputs(self.model, outputs, self.model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = logits if self.loop.rerank is None else self.loop.rerank(self.ids, logits)
        lost = [0 if row.done else len(self.candidates) - len(row.tokens) for row in self.rows]
        scores = _processed(processors, self.ids, scores, lost)
        for name, values in self.kept.items():
            values.append(scores if name == "scores" else logits)
        return scores

    def choose(self, scores: Tensor) -> Tensor:
        """(batch,) the next token of every row; the other candidates are kept."""
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.config.do_sample else scores.argmax(-1)
        self.candidates.append(top_tokens(scores.log_softmax(-1), MAX_CANDIDATES))
        return tokens

    def append(self, tokens: Tensor, stops: StoppingCriteriaList) -> list[bool]:
        """Write a token (batch,) into every row that is not done; which rows it ends, of those that are not.

        The host waits for the device here, once per token, as ``generate`` does.
        """
        self.ids = torch.cat((self.ids, tokens.masked_fill(self.done, self.pad)[:, None]), dim=1)
        chosen, ended = torch.stack((tokens, self._ended(stops))).tolist()
        for row, token in zip(self.rows, chosen, strict=True):
            if not row.done:
                row.tokens.append(token)
                row.passes.append(len(self.candidates) - 1)
        return list(map(bool, ended))

    def _ended(self, stops: StoppingCriteriaList) -> Tensor:
        """(batch,) int64: 1 where the newest token ends the row."""
        return stops(self.ids, None).long() if len(stops) else torch.zeros_like(self.ids[:, 0])

    def settle(self, stops: StoppingCriteriaList, ended: Sequence[bool]) -> None:
        """Have the new tokens reviewed, and roll rows back until none is doubtful or can be.

        Args:
            stops: Say whether a row ends.
            ended: What they say of the new tokens.
        """
        new, done = [not row.done for row in self.rows], sum(row.done for row in self.rows)
        while any(new):
            drafts = [
                Draft(row.tokens, row.passes, end) if is_new else None
                for row, is_new, end in zip(self.rows, new, ended, strict=True)
            ]
            for b, (row, prefix) in enumerate(zip(self.rows, self.loop.review(drafts), strict=True)):
                if not new[b]:
                    continue
                row.committed = prefix.tokens
                if (alternative := self._alternative(b, prefix.rollback_points)) is None:
                    row.done, new[b] = ended[b] or len(row.tokens) >= self.max_tokens, False
                else:
                    self._roll_back(b, alternative)
            if any(new):
                ended = list(map(bool, self._ended(stops).tolist()))
        if sum(row.done for row in self.rows) > done:
            self.done = sent([row.done for row in self.rows], self.done.device)

    def _alternative(self, b: int, points: range) -> _Alternative | None:
        """A continuation that replaces the tokens ``points`` of a row; None if none is probable, or none may be tried."""
        row = self.rows[b]
        # The passes that are left must do for all that the row may still write.
        if not row.budget or len(self.candidates) + self.max_tokens - points.start > self.max_passes:
            return None
        alternatives = []
        for index in points:
            delimits = row.tokens[index] in self.loop.list_delimiters
            banned = list(self.loop.list_delimiters) if delimits else [row.tokens[index]]
            excluded = {*banned, *row.banned.get(index, ())}
            logprobs, tokens = self._candidates_of(row.passes[index])[b]
            free = [i for i, token in enumerate(tokens) if token not in excluded and logprobs[i] > -math.inf]
            ends_list = delimits and index == points.start
            if ends_list and self.loop.list_ends:
                free = [i for i in free if tokens[i] in self.loop.list_ends and logprobs[i] > math.log(MIN_END_PROBABILITY)]
            if not free:
                continue
            alternative = _Alternative(index, banned, [tokens[i] for i in free], [logprobs[i] for i in free])
            if ends_list:
                return alternative
            alternatives.append(alternative)
        best = max(alternatives, key=lambda alternative: alternative.logprobs[0], default=None)
        return best if best is not None and best.logprobs[0] > math.log(MIN_PROBABILITY) else None

    def _candidates_of(self, number: int) -> list[tuple[list[float], list[int]]]:
        """Log-probabilities and tokens of a pass, for every row; the host waits once per pass."""
        if number not in self.known:
            logprobs, tokens = self.candidates[number]
            read = torch.stack((logprobs.double(), tokens.double()), 1).tolist()  # in which a token's id is exact, too
            self.known[number] = [(values, list(map(int, ids))) for values, ids in read]
        return self.known[number]

    def _roll_back(self, b: int, alternative: _Alternative) -> None:
        """Continue row ``b`` with the alternative; the keys of what it discards are masked."""
        row, index = self.rows[b], alternative.start
        if "scores" in self.kept:
            scores = self.kept["scores"][row.passes[index]].clone()
            scores[b, row.banned.get(index, []) + alternative.banned] = -math.inf
            self.kept["scores"][row.passes[index]] = scores
        if read := row.roll_back(index, alternative.banned, alternative.choose(self.config.do_sample)):
            if self.model_kwargs.get("attention_mask") is None:  # where nothing is padding, generate leaves it out
                keys = self.first_key + 1 + len(self.candidates)
                self.model_kwargs["attention_mask"] = self.ids.new_ones((len(self.rows), keys))
            _mask_keys(self.model_kwargs, b, [self.first_key + number for number in read])
        lost = self.ids.new_full((len(self.candidates) - len(row.tokens),), self.pad)
        self.ids[b] = torch.cat((lost, self.prompt[b], sent(row.tokens, self.ids.device)))

    def table(self, values: Sequence[list[int]], filler: int) -> Tensor:
        """(batch, T) int64: lists of different lengths, filled up behind."""
        longest = max(map(len, values))
        return self.prompt.new_tensor([[*row, *[filler] * (longest - len(row))] for row in values])

    def output(self, passes: Tensor) -> GenerateDecoderOnlyOutput | Tensor:
        """What ``generate`` returns."""
        ids = torch.cat((self.prompt, self.table([row.tokens for row in self.rows], self.pad)), dim=1)
        if not self.config.return_dict_in_generate:
            return ids
        every_row = torch.arange(len(self.rows), device=ids.device)
        fields: dict[str, Any] = {
            name: tuple(torch.stack(values)[step, every_row] for step in passes.T) for name, values in self.kept.items()
        }
        if all(row.budget == self.loop.budget for row in self.rows):
            fields |= {name: value for name, value in self.model_kwargs.items() if isinstance(value, Cache)}
        return GenerateDecoderOnlyOutput(sequences=ids, **fields)


class _Stream:
    """What a streamer has been given of the only caption; nothing without a streamer."""

    def __init__(self, streamer: BaseStreamer | None, prompt: Tensor, prompt_streamed: bool) -> None:
        if streamer is not None and len(prompt) > 1:
            raise UnsupportedError("A streamer shows one caption at a time. Give one prompt, or leave the streamer out.")
        self.streamer, self.count = streamer, 0
        if streamer is not None and not prompt_streamed:
            streamer.put(prompt.cpu())

    def put(self, row: _Row) -> None:
        """Give the streamer what can no longer be rolled back."""
        if self.streamer is None:
            return
        new = row.tokens[self.count : len(row.tokens) if row.done else row.committed]
        for token in new:
            self.streamer.put(torch.tensor([token]))
        self.count += len(new)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _prepare_cache(model_kwargs: dict[str, Any], length: int) -> None:
    """Make sure that keys can be masked in the cache, and give a static one room for ``length`` of them.

    Raises `UnsupportedError` for other caches, and for none.
    """
    cache = next((value for value in model_kwargs.values() if isinstance(value, Cache)), None)
    kinds = _compat.cache_layer_kinds(cache)
    if cache is None or not kinds <= _compat.MASKABLE_LAYERS or getattr(cache, "offloading", False):
        named = "no cache" if cache is None else f"a {type(cache).__name__} of {', '.join(sorted(kinds))}"
        raise UnsupportedError(
            f"A phrase cannot be rolled back with {named}: the keys of discarded tokens could not be masked. Use a dynamic or "
            "a static cache (use_cache=True), or a policy without rewind."
        )
    for layer in _compat.cache_layers(cache):
        if hasattr(layer, "max_cache_len") and not layer.is_initialized:
            layer.max_cache_len = max(layer.max_cache_len, length)


def _mask_keys(model_kwargs: dict[str, Any], row: int, keys: Sequence[int]) -> None:
    """Mask these keys of a row for all later tokens, and let its next position be that of the first of them."""
    mask = model_kwargs["attention_mask"]
    mask[row].index_fill_(0, sent(keys, mask.device), 0)
    if (positions := model_kwargs.get("position_ids")) is not None:  # (..., batch or 1, length)
        batch = len(model_kwargs["attention_mask"])
        positions = positions.expand(*positions.shape[:-2], batch, -1).clone()
        positions[..., row, -1] = positions[..., row, keys[0]]
        model_kwargs["position_ids"] = positions


def _processed(processors: LogitsProcessorList, ids: Tensor, scores: Tensor, lost: Sequence[int]) -> Tensor:
    """Scores after the processors, which see each row without the ``lost`` pads in front: they may count tokens."""
    if not processors or not any(lost):
        return processors(ids, scores)
    processed = torch.empty_like(scores)
    for count in set(lost):
        rows = sent([b for b, lost_by_row in enumerate(lost) if lost_by_row == count], ids.device)
        processed.index_copy_(0, rows, processors(ids[rows, count:], scores[rows]))
    return processed
