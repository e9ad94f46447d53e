"""How is the next word chosen? By what the gaze heads say for it; and a phrase that they contradict is taken back.

`RerankProcessor` is a LogitsProcessor. `RewindLoop` is a decode loop for ``generate(custom_generate=...)``: greedy and
sampled, any batch. A phrase is taken back without touching the cache: the keys of what was taken back are closed to every
later word of their row by the attention mask, and positions go on from the branch, so that each row of a batch goes back by
itself and a static cache serves as well as a growing one. What is written then is what would have been written had the
phrase never been there (a test compares the two).
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

from gazeguard.claims.parse import Claim
from gazeguard.decoding.rerank import RerankProcessor, _spelt
from gazeguard.errors import UnsupportedError

LIKELY = 0.01  # a way out that the model itself gives less than this is none
REWOUND = 12  # tokens that one rewind may cost, on average over a caption's budget
CHOICES = 64  # words of each pass, the likeliest, among which another one is chosen when a row comes back to it
KEPT = ("DynamicLayer", "StaticLayer")  # cache layers in which a key can be closed and the others stay what they are
_JOINTS = (",", ";", "and", "or", "plus", "with", "&")  # what leads from one thing of a list to the next
_JOINT = re.compile(r"(?:[,;]?\s*(?:\b(?:and|or|plus|with)|&)|[,;])?\s*$")


class CommittedPrefix(NamedTuple):
    """What is known of a row after its newest word.

    tokens: so many of its first tokens hold only phrases that have been judged
    doubt:  the tokens at which a doubtful phrase could have gone another way; empty when there is none
    """

    tokens: int
    doubt: range = range(0)


def rollback_points(claim: Claim, text: str) -> tuple[int, int]:
    """The characters of ``text`` in which another way could have been taken than to name a thing, end exclusive: from the "and"
    or the comma that leads to it, or else from its article, to where its head noun begins.
    """
    return _JOINT.search(text[: claim.phrase.start]).start(), claim.phrase.head.start + 1


def list_delimiters(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that lead from one thing of a list to the next."""
    return _spelt(tokenizer, _JOINTS).tolist()


@dataclass(eq=False)
class _Row:
    """One row of the batch while it is written.

    passes: the pass of the model that wrote each token; banned: token's number -> words that may not stand there
    left:   how often the row may still be taken back; settled: see `CommittedPrefix`
    """

    left: int
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    banned: dict[int, list[int]] = field(default_factory=dict)
    settled: int = 0
    done: bool = False

    def back_to(self, at: int, banned: Sequence[int], word: int) -> list[int]:
        """Write ``word`` in place of token number ``at``, never again what is ``banned`` there, and forget what followed.

        returns the passes that have read what is forgotten
        """
        self.banned = {number: words for number, words in self.banned.items() if number <= at}
        self.banned.setdefault(at, []).extend(banned)
        read = self.passes[at + 1 :]
        self.tokens[at:] = [word]
        del self.passes[at + 1 :]
        self.left -= 1
        return read


class _Way(NamedTuple):
    """Another way: from the token number ``at`` on, with one of ``words`` (so likely, nats), and none of those ``banned``."""

    at: int
    banned: list[int]
    words: list[int]
    likely: list[float]

    def word(self, sample: bool) -> int:
        """The likeliest of the words, or one that is drawn."""
        return self.words[int(torch.multinomial(torch.tensor(self.likely).softmax(-1), 1)) if sample else 0]


@dataclass(eq=False)
class RewindLoop:
    """The decode loop that takes back doubtful phrases; one object serves one ``generate``.

    judge:    is told after each pass, for every row, its tokens, the passes that wrote them, and whether it has ended (or None
              for a row that is done), and answers with what is `CommittedPrefix`; then again for the rows that went back
    budget:   how often each row is taken back at most
    list_delimiters:   the tokens that lead from one thing of a list to the next
    rerank:   moves the scores of every pass, as the recorder heard it
    streamer: gets the prompt, and then whatever can no more be taken back

    At a doubtful phrase the row goes back to the joint that led to it, and the list ends there: all list_delimiters are banned. A thing
    that no joint leads to is taken back to that token of its `rollback_points` whose second-best word was likeliest; the word that
    stood there is banned, unless no other is `LIKELY`. The other word is chosen, or drawn, from the `CHOICES` of the pass that
    wrote the one that goes, so going back costs no pass by itself. Once the budget is spent, what is written stays.
    ``passes`` (batch, T) int64 says after the run which pass wrote each token, 0 behind a row's end; in ``cache`` the prompt's
    keys are then what they were.

    With a budget of 0 all is as in `generate`. A rewound cache holds closed keys, so it is not returned. Raises
    `UnsupportedError` for a cache whose keys cannot be closed, and for a streamer of several captions.
    """

    judge: Callable[[Sequence[tuple[list[int], list[int], bool] | None]], Sequence[CommittedPrefix]]
    budget: int
    list_delimiters: Sequence[int] = ()
    rerank: RerankProcessor | None = None
    streamer: BaseStreamer | None = None
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
        batch, prompt = input_ids.shape
        most = generation_config.max_length - prompt
        passes = most + self.budget * REWOUND
        _prepare_cache(model_kwargs, prompt + passes)
        ends = StoppingCriteriaList(own for own in stopping_criteria if not isinstance(own, MaxLengthCriteria))
        pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
        mask = model_kwargs.get("attention_mask")
        told = max(prompt, getattr(generation_config, "_mask_length", 0)) if mask is None else mask.shape[1]
        first = told - 1  # the key of the query that predicts the first new token
        rows = [_Row(self.budget) for _ in range(batch)]
        shown = _Shown(self.streamer, input_ids)
        # A row's ids are as many pads as passes were lost on it, its prompt, and what it has written: one more each pass.
        ids, choices = input_ids, []
        kept: dict[str, list[Tensor]] = {
            name: [] for name in ("scores", "logits") if getattr(generation_config, f"output_{name}")
        }
        while not all(row.done for row in rows):
            later = {"next_sequence_length": 1} if choices else {"is_first_iteration": True}
            outputs = model(**model.prepare_inputs_for_generation(ids, **later, **model_kwargs), return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
            scores = logits if self.rerank is None else self.rerank(ids, logits)
            scores = _processed(logits_processor, ids, scores, [0 if r.done else len(choices) - len(r.tokens) for r in rows])
            for name, values in kept.items():
                values.append(scores if name == "scores" else logits)
            if generation_config.do_sample:
                chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()
            else:
                chosen = scores.argmax(-1).tolist()
            choices.append(scores.log_softmax(-1).topk(min(CHOICES, scores.shape[-1]), dim=-1))
            for row, word in zip(rows, chosen, strict=True):
                if not row.done:
                    row.tokens.append(word)
                    row.passes.append(len(choices) - 1)
            words = [pad if row.done else word for row, word in zip(rows, chosen, strict=True)]
            ids = torch.cat((ids, ids.new_tensor(words)[:, None]), dim=1)
            new = [not row.done for row in rows]
            while any(new):
                ended = ends(ids, None).tolist() if len(ends) else [False] * batch
                told = [(r.tokens, r.passes, end) if own else None for r, own, end in zip(rows, new, ended, strict=True)]
                for b, (row, found) in enumerate(zip(rows, self.judge(told), strict=True)):
                    if not new[b]:
                        continue
                    row.settled = found.tokens
                    # The passes that are left must do for all that the row may still write.
                    may = row.left and len(choices) + most - found.doubt.start <= passes
                    way = self._way_out(found.doubt, row, b, choices) if may else None
                    if way is None:
                        row.done, new[b] = ended[b] or len(row.tokens) >= most, False
                        continue
                    if "scores" in kept:
                        changed = kept["scores"][row.passes[way.at]].clone()
                        changed[b, row.banned.get(way.at, []) + way.banned] = -math.inf
                        kept["scores"][row.passes[way.at]] = changed
                    if read := row.back_to(way.at, way.banned, way.word(generation_config.do_sample)):
                        if model_kwargs.get("attention_mask") is None:  # where nothing is padding, generate leaves it out
                            model_kwargs["attention_mask"] = ids.new_ones((batch, first + 1 + len(choices)))
                        _close(model_kwargs, b, [first + number for number in read])
                    lost = ids.new_full((len(choices) - len(row.tokens),), pad)
                    ids[b] = torch.cat((lost, input_ids[b], ids.new_tensor(row.tokens)))
            shown.upto(rows[0])
        shown.end()
        return self._made(input_ids, rows, pad, kept, generation_config, model_kwargs)

    def _way_out(self, doubt: range, row: _Row, b: int, choices: Sequence[tuple[Tensor, Tensor]]) -> _Way | None:
        """Another way than the doubtful tokens of row ``b``; None where none is likely.

        choices: of every pass the likeliest words' log-probabilities and the words, (batch, C)
        """
        ways = []
        for at in doubt:
            joint = row.tokens[at] in self.list_delimiters
            banned = list(self.list_delimiters) if joint else [row.tokens[at]]
            known = {*banned, *row.banned.get(at, ())}
            likely, words = (tensor[b].tolist() for tensor in choices[row.passes[at]])
            free = [i for i, word in enumerate(words) if word not in known and likely[i] > -math.inf]
            if not free:
                continue
            way = _Way(at, banned, [words[i] for i in free], [likely[i] for i in free])
            if joint and at == doubt.start:
                return way
            ways.append(way)
        best = max(ways, key=lambda way: way.likely[0], default=None)
        return best if best is not None and best.likely[0] > math.log(LIKELY) else None

    def _made(
        self,
        input_ids: Tensor,
        rows: Sequence[_Row],
        pad: int,
        kept: dict[str, list[Tensor]],
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """What ``generate`` returns."""

        def table(values: list[list[int]], filler: int) -> Tensor:
            longest = max(map(len, values))
            return input_ids.new_tensor([[*own, *[filler] * (longest - len(own))] for own in values])

        self.passes = table([row.passes for row in rows], 0)
        self.cache = next(value for value in model_kwargs.values() if isinstance(value, Cache))
        ids = torch.cat((input_ids, table([row.tokens for row in rows], pad)), dim=1)
        if not config.return_dict_in_generate:
            return ids
        all_rows = torch.arange(len(rows), device=ids.device)
        told: dict[str, Any] = {
            name: tuple(torch.stack(values)[step, all_rows] for step in self.passes.T) for name, values in kept.items()
        }
        if all(row.left == self.budget for row in rows):
            told |= {name: value for name, value in model_kwargs.items() if isinstance(value, Cache)}
        return GenerateDecoderOnlyOutput(sequences=ids, **told)


class _Shown:
    """What a streamer has been given of the only caption; nothing without a streamer."""

    def __init__(self, streamer: BaseStreamer | None, prompt: Tensor) -> None:
        if streamer is not None and len(prompt) > 1:
            raise UnsupportedError("A streamer shows one caption at a time. Give one prompt, or leave the streamer out.")
        self.streamer, self.count = streamer, 0
        if streamer is not None:
            streamer.put(prompt.cpu())

    def upto(self, row: _Row) -> None:
        if self.streamer is None:
            return
        new = row.tokens[self.count : len(row.tokens) if row.done else row.settled]
        for token in new:
            self.streamer.put(torch.tensor([token]))
        self.count += len(new)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _prepare_cache(model_kwargs: dict[str, Any], length: int) -> None:
    """Make sure that keys can be closed in the cache, and give a static one room for ``length`` of them.

    Raises `UnsupportedError` for other caches, and for none.
    """
    cache = next((value for value in model_kwargs.values() if isinstance(value, Cache)), None)
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if cache is None or not kinds <= set(KEPT) or getattr(cache, "offloading", False):
        named = "no cache" if cache is None else f"a {type(cache).__name__} of {', '.join(sorted(kinds))}"
        raise UnsupportedError(
            f"A phrase cannot be taken back with {named}: what was written could not be closed to the words that follow. Use a "
            "dynamic or a static cache (use_cache=True), or a policy without rewind."
        )
    for layer in cache.layers:
        if hasattr(layer, "max_cache_len") and not layer.is_initialized:
            layer.max_cache_len = max(layer.max_cache_len, length)


def _close(model_kwargs: dict[str, Any], row: int, keys: Sequence[int]) -> None:
    """Close these keys of a row to all later words, and let its next position be that of the first of them."""
    model_kwargs["attention_mask"][row, list(keys)] = 0
    if (positions := model_kwargs.get("position_ids")) is not None:  # (..., batch or 1, length)
        batch = len(model_kwargs["attention_mask"])
        positions = positions.expand(*positions.shape[:-2], batch, -1).clone()
        positions[..., row, -1] = positions[..., row, keys[0]]
        model_kwargs["position_ids"] = positions


def _processed(processors: LogitsProcessorList, ids: Tensor, scores: Tensor, lost: Sequence[int]) -> Tensor:
    """Scores after the processors, which see each row without the ``lost`` pads in front: they may count words."""
    if not processors or not any(lost):
        return processors(ids, scores)
    made = torch.empty_like(scores)
    for count in set(lost):
        of = [b for b, own in enumerate(lost) if own == count]
        made[of] = processors(ids[of, count:], scores[of])
    return made
