"""What does the model say when it is asked? Yes/no questions about pictures that it has seen already, all in one pass.

A question takes the place of whatever followed the picture in a prompt. The keys of the prompt up to the end of the picture
are in the cache of the pass that wrote or replayed the caption: all keys behind them are closed to the question by the
attention mask, its positions go on from the picture, and only its own words are read. Where a cache does not allow that (see
`keeps`) the prompts are made anew with the questions in them. A test compares the two.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import LlamaModel, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.cache_utils import Cache

from gazeguard.attention.visual_keys import visual_key_source
from gazeguard.claims.parse import Phrase
from gazeguard.errors import UnsupportedError
from gazeguard.vision.encoding import encode
from gazeguard.vision.image_tokens import NO_TOKEN_ID, image_token_id
from gazeguard.vision.inputs import PER_TOKEN, model_inputs

# What forward calls its cache: "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")
BLANK = 64  # pixels; the edge of the picture that stands in for one where only the words of a prompt are wanted
# Families whose picture keys do not serve: PaliGemma's prompt looks ahead, so that they depend on what it asks; generate of
# HyperCLOVA X counts the padding of a batch among its positions, a pass of ours does not.
NOT_KEPT = ("paligemma", "hyperclovax_vision_v2")
_DEFINITE = frozenset(["a", "an", "the", "this", "that", "my", "his", "her", "its", "their", "our", "your"])
_SEVERAL = frozenset(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "several", "many", "some", "few"])


class AnswerTokens(NamedTuple):
    """The tokens that begin an answer: every spelling of yes, and of no, that is one token."""

    yes: tuple[int, ...]
    no: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> AnswerTokens:
        """Raises `UnsupportedError` where no spelling of one of them is a single token."""

        def single(forms: Sequence[str]) -> tuple[int, ...]:
            made = (tokenizer(space + form, add_special_tokens=False).input_ids for form in forms for space in ("", " "))
            return tuple(sorted({ids[0] for ids in made if len(ids) == 1 and ids[0] != tokenizer.unk_token_id}))

        found = cls(single(YES), single(NO))
        if missing := next((name for name, ids in found._asdict().items() if not ids), None):
            raise UnsupportedError(
                f"The model cannot be asked: no spelling of {missing!r} is a single token of its tokenizer, so that no one "
                "probability is that of the answer. Choose a policy without verify."
            )
        return found

    def log_odds(self, logits: Tensor) -> Tensor:
        """log P(yes) - log P(no) in float32, from the logits (..., vocabulary) of an answer's first token."""
        logits = logits.float()
        return logits[..., list(self.yes)].logsumexp(-1) - logits[..., list(self.no)].logsumexp(-1)


def question(thing: Phrase) -> str:
    """ "Is there a red star in the picture?" for the thing of a caption, in the caption's words."""
    first, *rest = thing.text.lower().split()
    noun = thing.head.text.lower()
    plural = noun.endswith("s") and not noun.endswith("ss")
    if first in _DEFINITE and rest:
        first = "" if plural else "an" if rest[0].startswith(tuple("aeiou")) else "a"
    named = " ".join(filter(None, (first, *rest)))
    return f"{'Are' if plural or first in _SEVERAL else 'Is'} there {named} in the picture?"


def tails(model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[str]) -> list[NDArray[np.int64]]:
    """What follows the picture in a prompt with each question, up to where the answer begins: ids (L,) each.

    The words come from the processor's own prompt of a blank picture. Raises `UnsupportedError` where a prompt does not tell
    where its picture ends.
    """
    blank = Image.new("RGB", (BLANK, BLANK), "white")
    made = encode(model, processor, [blank] * len(questions), questions)
    ends = _picture_ends(model, made.prompt_ids, made.prompt_mask)
    rows = zip(made.prompt_ids, made.prompt_mask.bool(), ends, strict=True)
    return [row[end:][real[end:]].cpu().numpy() for row, real, end in rows]


def keeps(model: PreTrainedModel, cache: Cache | None) -> bool:
    """Whether questions can go on from the keys of a picture in this cache: it grows and keeps every key, and
    the model takes positions, which go on in one dimension.
    """
    takes = inspect.signature(model.forward).parameters
    return (
        cache is not None
        and {type(layer).__name__ for layer in getattr(cache, "layers", ())} == {"DynamicLayer"}
        and not getattr(cache, "offloading", False)
        and visual_key_source(model) is None
        and not model.config.is_encoder_decoder
        and model.config.model_type not in NOT_KEPT
        and "position_ids" in takes
        and not hasattr(getattr(model, "model", model), "get_rope_index")
    )


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    rows: Sequence[int],
    asked: Sequence[NDArray[np.int64]],
    words: AnswerTokens,
    cache: Cache | None = None,
) -> Tensor:
    """(questions,) float32: log P(yes) - log P(no), what the model answers to questions about the pictures of a batch.

    inputs: the prompts, as the processor makes them, with ids (batch, P) and pictures; what follows the pictures is left out
    rows:   for each question, whose picture it is about
    asked:  for each question its `tails`
    cache:  of a pass over these prompts, or of as many copies of each, whatever was written after them; it stays as it is.
            All questions then cost one pass over their words. Without one, or where it does not serve (`keeps`), they cost
            one pass over whole prompts for every question that the row with most of them has.
    """
    if not len(rows):
        return torch.empty(0)
    if keeps(model, cache):
        return words.log_odds(_in_cache(model, inputs, rows, asked, cache))
    numbers, seen = [], Counter()
    for row in rows:
        numbers.append(seen[row])
        seen[row] += 1
    made = torch.empty(len(rows), device=model.device)
    for turn in range(max(numbers) + 1):
        of = {row: i for i, (row, number) in enumerate(zip(rows, numbers, strict=True)) if number == turn}
        filler = asked[next(iter(of.values()))]  # rows that are asked no more answer any question
        own = [asked[of[row]] if row in of else filler for row in range(len(inputs["input_ids"]))]
        given = model_inputs(model, with_tails(model, inputs, own))
        logits = model(**given, use_cache=False).logits[:, -1]
        made[list(of.values())] = words.log_odds(logits[list(of)]).to(made.device)
    return made


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    rows: Sequence[int],
    things: Sequence[Phrase],
) -> Tensor:
    """(things,) float32: the log-odds of yes, when the model is asked whether each thing is in the picture of its row.

    The pictures are read once, as part of the prompts (one per picture) whose captions named the things.
    """
    inputs = encode(model, processor, images, prompts).prompt
    cache = getattr(model(**model_inputs(model, inputs), use_cache=True), CACHE)
    asked = tails(model, processor, [question(thing) for thing in things])
    return answers(model, inputs, rows, asked, AnswerTokens.from_tokenizer(processor.tokenizer), cache)


def _in_cache(
    model: PreTrainedModel, inputs: Mapping[str, Any], rows: Sequence[int], asked: Sequence[NDArray[np.int64]], cache: Cache
) -> Tensor:
    """(questions, vocabulary): the logits of each answer's first token, by one pass that goes on from the pictures' keys."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    ends = torch.tensor(_picture_ends(model, ids, mask), device=ids.device)
    length, which = int(ends.max()), torch.tensor(rows, device=ids.device)
    open_keys = (mask & (torch.arange(ids.shape[1], device=ids.device) < ends[:, None]))[which, :length]
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in own.layers:
        if layer.is_initialized:  # a layer that shares another one's keys has none
            pick = (which * (layer.keys.shape[0] // len(ids))).to(layer.keys.device)
            layer.keys, layer.values = layer.keys[pick, :, :length], layer.values[pick, :, :length]
    longest = max(map(len, asked))
    fed = ids.new_zeros((len(rows), longest))
    for row, tail in zip(fed, asked, strict=True):
        row[: len(tail)] = torch.from_numpy(tail).to(ids.device)
    sizes = torch.tensor([len(tail) for tail in asked], device=ids.device)
    steps = torch.arange(longest, device=ids.device)
    seen = torch.cat((open_keys, steps < sizes[:, None]), dim=1).long()
    positions = open_keys.sum(1, keepdim=True) + steps
    out = model(input_ids=fed, attention_mask=seen, position_ids=positions, use_cache=True, **{CACHE: own})
    return out.logits[torch.arange(len(rows), device=out.logits.device), (sizes - 1).to(out.logits.device)]


def with_tails(model: PreTrainedModel, inputs: Mapping[str, Any], asked: Sequence[NDArray[np.int64]]) -> dict[str, Any]:
    """The same prompts, each with its own tail (L,) in place of what follows its picture; padded as the processor does it."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    ends = _picture_ends(model, ids, mask)
    kept = [torch.nonzero(own[:end])[:, 0] for own, end in zip(mask, ends, strict=True)]
    told = [torch.from_numpy(tail).to(ids.device) for tail in asked]
    longest = max(len(own) + len(tail) for own, tail in zip(kept, told, strict=True))
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None) or 0
    made = dict(inputs)
    for name, value in inputs.items():
        per_token = name in PER_TOKEN
        if not isinstance(value, Tensor) or not (per_token or value.shape == ids.shape):
            continue
        parts = []
        for row, columns, tail in zip(value, kept, told, strict=True):
            own = row[columns]
            if per_token:
                more = own[-1:].expand(len(tail), *own.shape[1:])
            else:
                more = tail if name == "input_ids" else own.new_full((len(tail),), int(name == "attention_mask"))
            void = own.new_full((longest - len(own) - len(more), *own.shape[1:]), pad if name == "input_ids" else 0)
            parts.append(torch.cat((own, more, void) if model.config.is_encoder_decoder else (void, own, more)))
        made[name] = torch.stack(parts)
    return made


def _picture_ends(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> list[int]:
    """For each row of prompts (batch, P) the column behind its last image cell."""
    token = image_token_id(model)
    ends = [int(torch.nonzero(own)[-1]) + 1 if own.any() else 0 for own in (ids == token) & mask.bool()]
    if token == NO_TOKEN_ID or not all(ends):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be asked: its prompt does not tell where the picture ends. Choose a policy without "
            "verify."
        )
    return ends
