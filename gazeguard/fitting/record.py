"""Recording of claims for a fit: the model's own captions, the same captions with one claim swapped, and with other images."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from gazeguard.claims.parse import JUDGED, Caption, Claim, parse
from gazeguard.claims.repetition import find_repetition
from gazeguard.decoding.verification import ask
from gazeguard.detection import features
from gazeguard.detection.table import stack_states
from gazeguard.errors import GazeGuardError
from gazeguard.fitting.drawn import Shown
from gazeguard.fitting.rows import Recorded, Rows
from gazeguard.fitting.swaps import Site, Swap, companions, cooccurrence, noun_of, nouns_of, sites, swap
from gazeguard.guard import GazeGuard
from gazeguard.trace import F32, GazeTrace
from gazeguard.vision.encoding import encode
from gazeguard.vision.text import tokenize

F64 = NDArray[np.float64]
LOGGER = logging.getLogger(__name__)

CANDIDATES = 12  # nouns that the model is asked to choose from
MAX_TOKENS = 200  # of a caption
TEXT = slice(0, len(features.TEXT_FEATURES))  # the columns of `features` that do without the image


@dataclass(frozen=True)
class Written:
    """A caption that a model wrote of an image.

    Attributes:
        shown: The image.
        caption: The caption, parsed.
        x: (judged claims, F) `features` of the claims of `judged`.
        decided: Index of each claim of `judged` whose truth is known -> whether it is false.
        state: The state of the image's tokens; None where there is none.
        wording_nll: `features.wording_nll`.
    """

    shown: Shown
    caption: Caption
    x: F64
    decided: Mapping[int, bool]
    state: F32 | None
    wording_nll: float

    @property
    def judged(self) -> list[int]:
        """Indices, among all claims, of those of the kinds that detectors are fitted on."""
        return judged(self.caption)


def judged(caption: Caption) -> list[int]:
    """Indices of the claims of the kinds that detectors are fitted on."""
    return [i for i, claim in enumerate(caption.claims) if claim.kind in JUDGED]


@torch.no_grad()
def record(
    guard: GazeGuard, shown: Sequence[Shown], do_sample: bool, known: Sequence[str], swaps: int, rng: random.Random
) -> Recorded:
    """Let a model describe images, alter what it wrote, and record the claims of all of it.

    Args:
        guard: A guard over the model without a detector.
        shown: The images.
        do_sample: Whether captions are sampled at temperature 1; otherwise they are greedy.
        known: Captions of earlier images, for which nouns go together.
        swaps: Swaps per caption.
        rng: Draws swaps.
    """
    written = write(guard, shown, do_sample)
    captions = [each.caption.text for each in written]
    company = cooccurrence(parse(text) for text in (*known, *captions))
    parts = [
        _own(guard, written),
        _replayed(guard, swapped(guard, written, company, swaps, rng), "swapped"),
        _replayed(guard, _with_wrong_images(written), "wrong"),
        _replayed(guard, _with_blank_images(written), "blank"),
    ]
    rows = [part for part in parts if part is not None]
    states = stack_states([each.state for each in written])
    return Recorded(
        Rows.joined(rows) if rows else Rows.empty(len(features.names(guard.heads.heads))),
        tuple(captions),
        np.array([each.shown.number for each in written], np.int64),
        np.zeros((len(written), 0), np.float32) if states is None else states,
        np.array([each.wording_nll for each in written]),
    )


def write(guard: GazeGuard, shown: Sequence[Shown], do_sample: bool) -> list[Written]:
    """One caption per image; captions without a trace, and repetition loops, are left out."""
    inputs = encode(guard.model, guard.processor, [each.image for each in shown], [each.prompt for each in shown]).inputs
    _, reports = guard.generate_with_reports(**inputs, max_new_tokens=MAX_TOKENS, do_sample=do_sample)
    written = []
    for each, report in zip(shown, reports, strict=True):
        if report.trace is None or find_repetition(report.caption) or not report.caption.strip():
            continue
        caption = parse(report.caption)
        claims = [caption.claims[i] for i in judged(caption)]
        if claims:
            x, decided = features.features(report.trace, claims), _decided(each, caption, claims)
            wording_nll = features.wording_nll(report.trace, caption.phrases)
            written.append(Written(each, caption, x, decided, report.trace.image_state, wording_nll))
    return written


def _decided(shown: Shown, caption: Caption, claims: Sequence[Claim]) -> dict[int, bool]:
    """The claims whose truth is known; of a user's image all, which count as true."""
    if shown.decide is None:
        return dict.fromkeys(range(len(claims)), False)
    return {claims.index(claim): false for claim, false in shown.decide(caption.text) if claim in claims}


# ------------------------------------------------------------------------------------------------------------- rows


def _own(guard: GazeGuard, written: Sequence[Written]) -> Rows | None:
    """The model's own claims, with its answers to questions about them."""
    rows = [
        (each, each.x[i], false, each.caption.claims[each.judged[i]]) for each in written for i, false in each.decided.items()
    ]
    table = _table([(each, x, false, claim.kind) for each, x, false, claim in rows], "own")
    return None if table is None else replace(table, answer=_answers(guard, written, [(row[0], row[3]) for row in rows]))


def _answers(guard: GazeGuard, written: Sequence[Written], claims: Sequence[tuple[Written, Claim]]) -> F64:
    """(claims,): log-odds of yes to the question whether each claim's object is there; NaN for locations."""
    answers = np.full(len(claims), np.nan)
    asked = [i for i, (each, claim) in enumerate(claims) if claim.kind != "location" and each.shown.decide is not None]
    if not asked:
        return answers
    images, prompts = [each.shown.image for each in written], [each.shown.prompt for each in written]
    numbers = [each.shown.number for each in written]
    rows = [numbers.index(claims[i][0].shown.number) for i in asked]
    try:
        log_odds = ask(guard.model, guard.processor, images, prompts, rows, [claims[i][1].phrase for i in asked])
    except GazeGuardError as error:  # such a model cannot be asked; policies that verify will say so
        LOGGER.info("the model is not asked about its claims: %s", error)
        return answers
    answers[asked] = log_odds.cpu().double().numpy()
    return answers


def _table(rows: Sequence[tuple[Written, F64, bool, str]], origin: str) -> Rows | None:
    if not rows:
        return None
    written = [row[0] for row in rows]
    name = {"own": "picture"}.get(origin, f"picture-{origin}")
    numbers = np.array([each.shown.number for each in written])
    return Rows(
        x=np.stack([row[1] for row in rows]),
        false=np.array([row[2] for row in rows]),
        kinds=np.array([row[3] for row in rows]),
        image=numbers,
        caption=numbers,
        origin=np.array([origin if each.shown.decide else name for each in written]),
        style=np.array([each.shown.style for each in written]),
        answer=np.full(len(rows), np.nan),
    )


class Altered(NamedTuple):
    """A caption to replay: what was written, the caption and image now, and the claims (of all) that are false of it."""

    written: Written
    caption: Caption
    image: Image.Image
    false: tuple[int, ...]


def _replayed(guard: GazeGuard, altered: Sequence[Altered], origin: str) -> Rows | None:
    """The false claims of altered captions, with the text features of the claims that they replace.

    A swapped claim is less probable than what the model itself would write, and so is every claim beside another image. A
    detector that learnt this would pass what the model invents. So the features that do without the image are those of the
    claim that the model wrote, and only the gaze heads tell the two apart.
    """
    if not altered:
        return None
    images, prompts = [row.image for row in altered], [row.written.shown.prompt for row in altered]
    rows = []
    for part in guard.tracer.prepare(images, [row.caption.text for row in altered], prompts).parts:
        traces, _ = guard.tracer.replay(part)
        for number, trace in zip(part.rows, traces, strict=True):
            rows += _false_claims(altered[number], trace)
    return _table(rows, origin)


def _false_claims(row: Altered, trace: GazeTrace) -> list[tuple[Written, F64, bool, str]]:
    known = judged(row.caption)
    x = features.features(trace, [row.caption.claims[i] for i in known])
    x[:, TEXT] = row.written.x[:, TEXT]
    return [(row.written, x[known.index(i)], True, row.caption.claims[i].kind) for i in row.false if i in known]


# ------------------------------------------------------------------------------------------------------------ swaps


def swapped(
    guard: GazeGuard, written: Sequence[Written], company: Mapping[str, Counter[str]], most: int, rng: random.Random
) -> list[Altered]:
    """Captions with one swap each, ``most`` per caption, of kinds in turn, that are false of the drawing."""
    chosen = [(each, site) for each in written for site in _some_sites(each, most, rng)]
    options = [_options(each, site, company, rng) for each, site in chosen]
    scores = likelihoods(guard, chosen, options)
    altered = []
    for (each, site), words, score in zip(chosen, options, scores, strict=True):
        result = _first_false(each, site, _in_order(words, score, rng))
        if result is not None:
            altered.append(Altered(each, result.caption, each.shown.image, result.claims))
    return altered


def _some_sites(written: Written, most: int, rng: random.Random) -> list[Site]:
    """Sites of judged kinds, drawn at random: an object first, then the other kinds in turn."""
    by_kind: dict[str, list[Site]] = {}
    for site in sites(written.caption):
        if site.kind in JUDGED:
            by_kind.setdefault(site.kind, []).append(site)
    for of_kind in by_kind.values():
        rng.shuffle(of_kind)
    kinds = rng.sample(sorted(by_kind), len(by_kind))
    kinds.sort(key=lambda kind: kind != "object")
    turns = (by_kind[kind].pop() for _ in range(most) for kind in kinds if by_kind[kind])
    return [site for _, site in zip(range(most), turns, strict=False)]


def _options(written: Written, site: Site, company: Mapping[str, Counter[str]], rng: random.Random) -> list[str]:
    if site.options is not None:
        return list(site.options)
    return companions(nouns_of(written.caption), company, rng, CANDIDATES)


def _in_order(words: Sequence[str], score: F64, rng: random.Random) -> list[str]:
    """Words in the order in which they are tried: every other time what the model finds most probable first, else at random.

    Nouns come in the order of their company, so that at random means among the most usual half.
    """
    if rng.random() < 0.5:
        return [words[i] for i in np.argsort(-score)]
    half = list(words[: max(1, len(words) // 2)])
    rng.shuffle(half)
    return half + list(words[len(half) :])


def _first_false(written: Written, site: Site, words: Sequence[str]) -> Swap | None:
    """The first swap that reads as the same claims and, as far as the drawing decides, is false."""
    for word in words:
        result = swap(written.caption, site, word)
        if result is None:
            continue
        if written.shown.decide is None:
            return result
        decided = written.shown.decide(result.caption.text)
        claims = tuple(i for i in result.claims if (result.caption.claims[i], True) in decided)
        if claims:
            return Swap(result.caption, claims, word)
    return None


@torch.no_grad()
def likelihoods(
    guard: GazeGuard, chosen: Sequence[tuple[Written, Site]], options: Sequence[Sequence[str]], batch_size: int = 16
) -> list[F64]:
    """For each site the log-probability that the model gives the first token of each option there, nats."""
    tokenizer, backbone = guard.processor.tokenizer, guard.tracer.recorder.backbone
    first = {word: int(tokenize(tokenizer, f" {word}")[0][0]) for words in options for word in words}
    scores = [np.zeros(len(words)) for words in options]
    of_caption: dict[int, list[int]] = {}  # by the number of its image; one pass serves all sites of a caption
    for number, (each, _) in enumerate(chosen):
        of_caption.setdefault(each.shown.number, []).append(number)
    groups = list(of_caption.values())
    for start in range(0, len(groups), batch_size):
        some = groups[start : start + batch_size]
        written = [chosen[group[0]][0] for group in some]
        images, prompts = [each.shown.image for each in written], [each.shown.prompt for each in written]
        for part in guard.tracer.prepare(images, [each.caption.text for each in written], prompts).parts:
            with guard.tracer.record(part.prompts) as recorder:
                guard.tracer.run(part)
                hidden = recorder.collect().hidden
            for row, group in enumerate(part.rows):
                offsets = part.batch.offsets[row]
                for number in some[group]:
                    step = int((offsets[:, 1] <= chosen[number][1].start).sum())
                    logits = backbone.logits(hidden[row, min(step, len(offsets) - 1)])
                    scores[number] = logits.log_softmax(-1).cpu().double().numpy()[[first[word] for word in options[number]]]
    return scores


# ----------------------------------------------------------------------------------------------------- other images


def _with_wrong_images(written: Sequence[Written]) -> list[Altered]:
    """Each caption with the image of the next one; its claims that are false there."""
    altered = []
    for each, other in zip(written, (*written[1:], *written[:1]), strict=True):
        if other.shown.number == each.shown.number:
            continue
        claims = each.caption.claims
        if other.shown.decide is not None:
            decided = other.shown.decide(each.caption.text)
            false = tuple(i for i in each.judged if (claims[i], True) in decided)
        else:
            named = nouns_of(other.caption)
            false = tuple(i for i in each.judged if claims[i].kind == "object" and noun_of(claims[i]) not in named)
        altered.append(Altered(each, each.caption, other.shown.image, false))
    return [row for row in altered if row.false]


def _with_blank_images(written: Sequence[Written]) -> list[Altered]:
    """Each caption with a blank image, of which nothing is true."""
    return [
        Altered(each, each.caption, Image.new("RGB", each.shown.image.size, (128, 128, 128)), tuple(each.judged))
        for each in written
    ]
