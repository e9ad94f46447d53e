"""Readability of a model on drawn scenes: do its image tokens name what is drawn, and do its gaze heads prefer it to swaps?"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gazeguard.attention.backbone import Backbone
from gazeguard.attention.layout import KeyLayout
from gazeguard.claims.english import plural
from gazeguard.decoding.rerank import candidate_attribution, candidate_logprobs
from gazeguard.guard import GazeGuard
from gazeguard.progress import track
from gazeguard.tracing import ReplayPart
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

MIN_LETTERS = 3  # of a token that stands for a noun: shorter ones begin many words
F64 = NDArray[np.float64]


class DrawnScene(NamedTuple):
    """An image whose objects are known: its nouns, in the singular, and the prompt to describe it."""

    image: Image.Image
    prompt: str
    nouns: frozenset[str]


class Vocabulary:
    """The nouns that drawn scenes decide: where a caption names them, and with which token each begins."""

    def __init__(self, nouns: Collection[str], tokenizer: PreTrainedTokenizerBase) -> None:
        forms = {form.lower(): noun for noun in nouns for form in (noun, plural(noun))}
        longest_first = sorted(map(re.escape, forms), key=len, reverse=True)
        self._forms, self._pattern = forms, re.compile(rf"\b({'|'.join(longest_first)})\b", re.IGNORECASE)
        self.first_token = dict(self._first_tokens(nouns, tokenizer))

    @staticmethod
    def _first_tokens(nouns: Collection[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int]]:
        before = tokenizer("a", add_special_tokens=False)["input_ids"]
        for noun in nouns:
            ids = tokenizer(f"a {noun}", add_special_tokens=False)["input_ids"]
            if len(tokenizer.decode([ids[len(before)]]).strip()) >= MIN_LETTERS:
                yield noun, ids[len(before)]

    def named(self, caption: str) -> list[tuple[int, str]]:
        """The nouns that a caption names, each with its first character."""
        return [(match.start(), self._forms[match.group().lower()]) for match in self._pattern.finditer(caption)]


class Readability(NamedTuple):
    """Shares of a scene's image tokens whose most probable word begins a noun.

    Attributes:
        layers: The layers before which they were read, rising; None stands last, for behind the last one.
        drawn: (layers, scenes), of a noun that is drawn.
        other: (layers, scenes), of a noun of another scene that is not drawn in this one, which is what chance gives.
    """

    layers: tuple[int | None, ...]
    drawn: F64
    other: F64


@torch.no_grad()
def read_image_tokens(guard: GazeGuard, scenes: Sequence[DrawnScene], words: Vocabulary) -> Readability | None:
    """Decode the image tokens of scenes at every layer; None where the image is no part of the decoder's sequence."""
    backbone = guard.tracer.recorder.backbone
    if backbone.key_source is not None:
        return None
    layers: tuple[int | None, ...] = (*sorted(backbone.attention)[1:], None)
    drawn, other = np.zeros((2, len(layers), len(scenes)))
    for column, scene in enumerate(track(scenes, "reading image tokens")):
        elsewhere = scenes[(column + 1) % len(scenes)].nouns - scene.nouns
        true, false = ({words.first_token.get(noun) for noun in nouns} for nouns in (scene.nouns, elsewhere))
        states = _image_states(guard, scene, backbone, layers)
        for row, layer in enumerate(layers):
            top = torch.cat([backbone.logits(part).argmax(-1) for part in states[layer].split(backbone.logits_chunk)]).tolist()
            drawn[row, column] = np.mean([token in true for token in top])
            other[row, column] = np.mean([token in false - true for token in top])
    return Readability(layers, drawn, other)


def _image_states(
    guard: GazeGuard, scene: DrawnScene, backbone: Backbone, layers: Sequence[int | None]
) -> Mapping[int | None, Tensor]:
    """The states (N, width) of a scene's image tokens before each layer, and before the final norm."""
    inputs = encode(guard.model, guard.processor, [scene.image], [scene.prompt]).inputs
    prompts = guard.tracer.prompts(inputs, inputs["input_ids"], inputs.get("attention_mask"))
    layout = KeyLayout.from_ids(*prompts.keys)
    states: dict[int | None, Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:
            module = backbone.norm if layer is None else backbone.block(layer)

            def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int | None = layer) -> None:
                entering = args[0] if args else kwargs["hidden_states"]
                states[layer] = entering[0, layout.columns[0, layout.valid[0]]]

            hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        guard.model(**model_inputs(guard.model, inputs))
    return states


class Ranking(NamedTuple):
    """How often evidence prefers a drawn object to what could be swapped in, one number per scene; NaN without such a choice.

    Attributes:
        attribution: By direct logit attribution of the gaze heads.
        attended: By the log-probability at the attended image tokens.
    """

    attribution: F64
    attended: F64


@torch.no_grad()
def rank_swaps(
    guard: GazeGuard, scenes: Sequence[DrawnScene], captions: Sequence[str], words: Vocabulary, batch_size: int = 8
) -> Ranking:
    """Rank the drawn objects that captions name against every noun that is not drawn, where the caption names them."""
    attribution, attended = np.full((2, len(scenes)), np.nan)
    starts = range(0, len(scenes), batch_size)
    for start in track(starts, "ranking swapped objects"):
        some = scenes[start : start + batch_size]
        texts = captions[start : start + batch_size]
        prepared = guard.prepare([scene.image for scene in some], texts, [scene.prompt for scene in some])
        for part in prepared.parts:
            for row, values in _rank_part(guard, part, [some[i] for i in part.rows], words):
                attribution[start + part.rows[row]], attended[start + part.rows[row]] = values
    return Ranking(attribution, attended)


def _rank_part(
    guard: GazeGuard, part: ReplayPart, scenes: Sequence[DrawnScene], words: Vocabulary
) -> Iterator[tuple[int, tuple[float, float]]]:
    """For the rows that name a drawn object, both shares of `Ranking`."""
    tracer = guard.tracer
    with tracer.record(part.prompts) as recorder:
        tracer.run(part)
        captured, lens = tracer.capture().activations, recorder.layer_lens()
    device = captured.hidden.device
    for row, scene in enumerate(scenes):
        shares = []
        for start, noun in words.named(part.captions[row]):
            step = int(np.searchsorted(part.batch.offsets[row][:, 1], start, side="right"))
            true = words.first_token.get(noun)
            if noun not in scene.nouns or step >= len(part.batch.caption_ids[row]) or part.batch.caption_ids[row][step] != true:
                continue
            drawn = {words.first_token.get(each) for each in scene.nouns}
            swaps = sorted({token for other, token in words.first_token.items() if other not in scene.nouns} - drawn)
            tokens = torch.tensor([[true, *swaps]], device=device)
            one = slice(row, row + 1)
            values = candidate_attribution(recorder, captured.output[one, step], captured.hidden[one, step], tokens)
            shares.append([_share_below(values[0]), np.nan])
            if lens is not None:
                logprobs = candidate_logprobs(lens.select(one), captured.gaze[one, step], tokens)
                shares[-1][1] = _share_below(logprobs[0])
        if shares:
            attribution, attended = np.mean(shares, axis=0)
            yield row, (float(attribution), float(attended))


def _share_below(values: Tensor) -> float:
    """The share of the other values that are below the first one; equal ones count half."""
    return float(((values[1:] < values[0]).float() + (values[1:] == values[0]).float() / 2).mean())
