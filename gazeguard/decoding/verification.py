"""Self-verification: yes/no questions to the model about images that it has read already, all in one pass.

A question takes the place of whatever followed the image in a prompt. The keys of the prompt up to the end of the image are
in the cache of the pass that generated or replayed the caption: all keys behind them are masked for the question, its positions
go on from the image, and only the question's own tokens are read. Where a cache does not allow that (`can_reuse_cache`), the
prompts are made anew with the questions in them. A test compares the two.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.cache_utils import Cache

from gazeguard import _compat
from gazeguard.attention.visual_keys import visual_key_source
from gazeguard.claims.english import article, is_plural
from gazeguard.claims.phrases import Phrase
from gazeguard.errors import UnsupportedError
from gazeguard.vision.encoding import encode
from gazeguard.vision.image_tokens import NO_TOKEN_ID, image_token_id
from gazeguard.vision.inputs import PER_TOKEN, model_inputs

YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")
MIN_MASS = 0.5  # P(yes) + P(no); below, the model does not answer the question (it thinks, or writes something else)
BLANK = 64  # pixels; the edge of the image that stands in for one where only the tokens of a prompt are wanted
# Families whose image keys do not serve: PaliGemma's prompt attends both ways, so that they depend on what it asks; generate of
# HyperCLOVA X counts the padding of a batch among its positions, a pass of ours does not.
NOT_REUSED = ("paligemma", "hyperclovax_vision_v2")
_DEFINITE = frozenset(["a", "an", "the", "this", "that", "my", "his", "her", "its", "their", "our", "your"])
_SEVERAL = frozenset(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "several", "many", "some", "few"])


class AnswerTokens(NamedTuple):
    """The tokens that begin an answer: every spelling of yes, and of no, that is one token.

    Attributes:
        yes: Of yes.
        no: Of no.
        min_mass: Least probability of yes and no together with which an answer counts.
    """

    yes: tuple[int, ...]
    no: tuple[int, ...]
    min_mass: float = MIN_MASS

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> AnswerTokens:
        """Find them.

        Raises:
            UnsupportedError: No spelling of yes, or of no, is a single token.
        """

        def single(forms: Sequence[str]) -> tuple[int, ...]:
            spellings = (tokenizer(space + form, add_special_tokens=False).input_ids for form in forms for space in ("", " "))
            return tuple(sorted({ids[0] for ids in spellings if len(ids) == 1 and ids[0] != tokenizer.unk_token_id}))

        tokens = cls(single(YES), single(NO))
        if missing := next((name for name in ("yes", "no") if not getattr(tokens, name)), None):
            raise UnsupportedError(
                f"The model cannot be asked: no spelling of {missing!r} is a single token of its tokenizer, so that no one "
                "probability is that of the answer. Choose a policy without verify."
            )
        return tokens

    def log_odds(self, logits: Tensor) -> Tensor:
        """The log-odds of yes against no in float32, from the logits (..., vocabulary) of an answer's first token.

        NaN, that is not asked, where yes and no together have a probability below `min_mass`: what the model writes then is no
        answer, and the odds of the two words are none.
        """
        logits = logits.float()
        yes, no = (logits[..., list(ids)].logsumexp(-1) for ids in (self.yes, self.no))
        mass = (torch.logaddexp(yes, no) - logits.logsumexp(-1)).exp()
        return torch.where(mass >= self.min_mass, yes - no, torch.nan)


@dataclass(frozen=True, eq=False)
class SelfVerification:
    """Asks a model whether the objects of its captions are there."""

    model: PreTrainedModel
    processor: ProcessorMixin
    answer_tokens: AnswerTokens

    @classmethod
    def for_model(cls, model: PreTrainedModel, processor: ProcessorMixin) -> SelfVerification:
        """Of a model and its processor.

        Raises:
            UnsupportedError: The tokenizer has no one token for yes or no, or a prompt does not tell where its image ends.
        """
        question_suffixes(model, processor, ["Is it there?"])  # a model that cannot be asked says so now
        return cls(model, processor, AnswerTokens.from_tokenizer(processor.tokenizer))

    def log_odds(
        self, inputs: Mapping[str, Any], rows: Sequence[int], phrases: Sequence[Phrase], cache: Cache | None = None
    ) -> list[float]:
        """The model's answers: for each phrase, log P(yes) - log P(no) to whether it is there; NaN where it does not answer.

        Args:
            inputs: The prompts of the captions, as in `answer_log_odds`.
            rows: For each phrase, the prompt whose image it is about.
            phrases: What is asked about.
            cache: Of a pass over the prompts, as in `answer_log_odds`.
        """
        questions = [existence_question(phrase) for phrase in phrases]
        unique = sorted(set(questions))
        suffixes = dict(zip(unique, question_suffixes(self.model, self.processor, unique), strict=True))
        asked = [suffixes[text] for text in questions]
        return answer_log_odds(self.model, inputs, rows, asked, self.answer_tokens, cache).tolist()


def existence_question(phrase: Phrase) -> str:
    """The question whether the object of a caption is there, in its words: "Is there a red star in the picture?"."""
    first, *rest = phrase.text.lower().split()
    several = is_plural(phrase.head.text) or first in _SEVERAL
    if first in _DEFINITE and rest:
        first = "" if several else article(rest[0])
    name = " ".join(filter(None, (first, *rest)))
    return f"{'Are' if several else 'Is'} there {name} in the picture?"


def question_suffixes(model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[str]) -> list[NDArray[np.int64]]:
    """What follows the image in a prompt with each question, up to where the answer begins: ids (L,) each.

    The tokens come from the processor's own prompt of a blank image.

    Raises:
        UnsupportedError: A prompt does not tell where its image ends.
    """
    blank = Image.new("RGB", (BLANK, BLANK), "white")
    batch = encode(model, processor, [blank] * len(questions), questions)
    ends = _image_ends(model, batch.prompt_ids, batch.prompt_mask)
    rows = zip(batch.prompt_ids, batch.prompt_mask.bool(), ends, strict=True)
    return [row[end:][real[end:]].cpu().numpy() for row, real, end in rows]


def can_reuse_cache(model: PreTrainedModel, cache: Cache | None) -> bool:
    """Whether questions can go on from the keys of an image in this cache.

    The cache must grow and keep every key, and the model must take positions, which go on in one dimension.
    """
    takes = inspect.signature(model.forward).parameters
    return (
        cache is not None
        and _compat.cache_layer_kinds(cache) == _compat.PLAIN_LAYERS
        and not getattr(cache, "offloading", False)
        and visual_key_source(model) is None
        and not model.config.is_encoder_decoder
        and model.config.model_type not in NOT_REUSED
        and "position_ids" in takes
        and not hasattr(getattr(model, "model", model), "get_rope_index")
    )


@torch.no_grad()
def answer_log_odds(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    rows: Sequence[int],
    suffixes: Sequence[NDArray[np.int64]],
    answer_tokens: AnswerTokens,
    cache: Cache | None = None,
) -> Tensor:
    """What the model answers to questions about the images of a batch.

    Args:
        model: The model.
        inputs: The prompts, as the processor makes them, with ids (batch, P) and images; what follows the images is left out.
        rows: For each question, the prompt whose image it is about.
        suffixes: For each question, what `question_suffixes` returned.
        answer_tokens: Of the model's tokenizer.
        cache: Of a pass over these prompts, or of as many copies of each, whatever was generated after them; it stays as it
            is. All questions then cost one pass over their tokens. Without one, or where it does not serve
            (`can_reuse_cache`), they cost one pass over whole prompts for every question that the row with most of them has.

    Returns:
        (questions,) float32, nats: log P(yes) - log P(no); NaN where the model does not answer.
    """
    if not len(rows):
        return torch.empty(0)
    if can_reuse_cache(model, cache):
        return answer_tokens.log_odds(_logits_from_cache(model, inputs, rows, suffixes, cache))
    turns: list[int] = []
    asked_before: Counter[int] = Counter()
    for row in rows:
        turns.append(asked_before[row])
        asked_before[row] += 1
    log_odds = torch.empty(len(rows), device=model.device)
    for turn in range(max(turns) + 1):
        question_of = {row: i for i, (row, turn_of_row) in enumerate(zip(rows, turns, strict=True)) if turn_of_row == turn}
        filler = suffixes[next(iter(question_of.values()))]  # rows without a question left answer any
        asked = [suffixes[question_of[row]] if row in question_of else filler for row in range(len(inputs["input_ids"]))]
        logits = model(**model_inputs(model, with_suffixes(model, inputs, asked)), use_cache=False).logits[:, -1]
        log_odds[list(question_of.values())] = answer_tokens.log_odds(logits[list(question_of)]).to(log_odds.device)
    return log_odds


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    rows: Sequence[int],
    phrases: Sequence[Phrase],
) -> Tensor:
    """Ask the model whether each phrase is in the image of its row.

    The images are read once, as part of the prompts (one per image) whose captions named the phrases, and a question about an
    image is asked once.

    Returns:
        (phrases,) float32, nats: log P(yes) - log P(no); NaN where the model does not answer.
    """
    inputs = encode(model, processor, images, prompts).prompt
    cache = getattr(model(**model_inputs(model, inputs), use_cache=True), _compat.cache_argument_name())
    asked = list(zip(rows, map(existence_question, phrases), strict=True))
    unique = {pair: number for number, pair in enumerate(dict.fromkeys(asked))}
    texts = list(dict.fromkeys(text for _, text in unique))
    suffixes = dict(zip(texts, question_suffixes(model, processor, texts), strict=True))
    tokens = AnswerTokens.from_tokenizer(processor.tokenizer)
    answers = answer_log_odds(model, inputs, [row for row, _ in unique], [suffixes[text] for _, text in unique], tokens, cache)
    return answers[[unique[pair] for pair in asked]]


def _logits_from_cache(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    rows: Sequence[int],
    suffixes: Sequence[NDArray[np.int64]],
    cache: Cache,
) -> Tensor:
    """(questions, vocabulary): the logits of each answer's first token, by one pass that goes on from the images' keys."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    ends = torch.tensor(_image_ends(model, ids, mask), device=ids.device)
    length, which = int(ends.max()), torch.tensor(rows, device=ids.device)
    visible = (mask & (torch.arange(ids.shape[1], device=ids.device) < ends[:, None]))[which, :length]
    longest = max(map(len, suffixes))
    fed = ids.new_zeros((len(rows), longest))
    for row, suffix in zip(fed, suffixes, strict=True):
        row[: len(suffix)] = torch.from_numpy(suffix).to(ids.device)
    lengths = torch.tensor([len(suffix) for suffix in suffixes], device=ids.device)
    steps = torch.arange(longest, device=ids.device)
    attention_mask = torch.cat((visible, steps < lengths[:, None]), dim=1).long()
    positions = visible.sum(1, keepdim=True) + steps
    own_cache = {_compat.cache_argument_name(): _selected(cache, which, len(ids), length)}
    out = model(input_ids=fed, attention_mask=attention_mask, position_ids=positions, use_cache=True, **own_cache)
    return out.logits[torch.arange(len(rows), device=out.logits.device), (lengths - 1).to(out.logits.device)]


def _selected(cache: Cache, which: Tensor, prompts: int, length: int) -> Cache:
    """A cache of the first ``length`` keys of the prompts ``which``, of a cache that holds each of so many equally often."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        if layer.is_initialized:  # a layer that shares another one's keys has none
            pick = (which * (layer.keys.shape[0] // prompts)).to(layer.keys.device)
            layer.keys, layer.values = layer.keys[pick, :, :length], layer.values[pick, :, :length]
    return chosen


def with_suffixes(model: PreTrainedModel, inputs: Mapping[str, Any], suffixes: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    """The same prompts, each with a question suffix (L,) in place of what follows its image; padded as the processor pads."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    ends = _image_ends(model, ids, mask)
    kept = [torch.nonzero(real[:end])[:, 0] for real, end in zip(mask, ends, strict=True)]
    added = [torch.from_numpy(suffix).to(ids.device) for suffix in suffixes]
    longest = max(len(columns) + len(suffix) for columns, suffix in zip(kept, added, strict=True))
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None) or 0
    batch = dict(inputs)
    for name, value in inputs.items():
        per_token = name in PER_TOKEN
        if not isinstance(value, Tensor) or not (per_token or value.shape == ids.shape):
            continue
        parts = []
        for row, columns, suffix in zip(value, kept, added, strict=True):
            prefix = row[columns]
            if per_token:
                more = prefix[-1:].expand(len(suffix), *prefix.shape[1:])
            else:
                more = suffix if name == "input_ids" else prefix.new_full((len(suffix),), int(name == "attention_mask"))
            filler = pad if name == "input_ids" else 0
            padding = prefix.new_full((longest - len(prefix) - len(more), *prefix.shape[1:]), filler)
            parts.append(torch.cat((prefix, more, padding) if model.config.is_encoder_decoder else (padding, prefix, more)))
        batch[name] = torch.stack(parts)
    return batch


def _image_ends(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> list[int]:
    """For each row of prompts (batch, P) the column behind its last image token."""
    token = image_token_id(model)
    ends = [int(torch.nonzero(row)[-1]) + 1 if row.any() else 0 for row in (ids == token) & mask.bool()]
    if token == NO_TOKEN_ID or not all(ends):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be asked: its prompt does not tell where the image ends. Choose a policy without "
            "verify."
        )
    return ends
