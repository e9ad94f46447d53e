"""Features of claims: named numbers from a trace, one row per claim.

Pure functions that read no later token: the features of a claim depend only on the caption up to the end of its object and
its location, so that they are available while the caption is being generated. Each gaze head keeps its own columns; a mean
over heads would drown the few that carry the evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.claims.english import DIRECTIONS
from gazeguard.claims.parse import Claim, Phrase, Span
from gazeguard.trace import SEGMENTS, GazeTrace

F64 = NDArray[np.float64]

# Available without the image: the prior, and the baseline row that stands beside every result of the gaze heads.
TEXT_FEATURES = ("position", "object_index", "repeated", "token_nll", "entropy")
# One of each per gaze head.
HEAD_FEATURES = ("attribution", "image_mass", "concentration", "image_mass_shift")
GAZE_FEATURES = (
    "attribution",
    "attribution_min",
    "attended_logprob",
    "internal_confidence",
    "head_agreement",
    "earlier_overlap",
    "related_overlap",
    "location_agreement",
)
# The reason in a report when a low, or a high, value of a feature raises the risk. Contributions are summed per text.
MEANING = {
    "attribution": ("low logit attribution from the gaze heads", "unusually high logit attribution from the gaze heads"),
    "attribution_min": ("low logit attribution from the gaze heads", "unusually high logit attribution from the gaze heads"),
    "attended_logprob": ("the attended image tokens do not predict this word", "the attended image tokens predict this word"),
    "internal_confidence": ("no image token predicts this word", "some image token predicts this word"),
    "image_mass": ("little attention on the image", "unusually much attention on the image"),
    "concentration": ("attention is spread over the image", "attention is concentrated on a single spot"),
    "image_mass_shift": ("attention does not move to the image at this word", "attention moves to the image at this word"),
    "head_agreement": ("the gaze heads attend to different locations", "the gaze heads all attend to one location"),
    "earlier_overlap": ("attention is where no object was named before", "attention is where another object was named before"),
    "related_overlap": (
        "attention is elsewhere than at the related words",
        "attention stays where it was at the related words",
    ),
    "location_agreement": ("attention is outside the named location", "attention is inside the named location"),
    "position": ("early in the caption", "late in the caption"),
    "object_index": ("few objects were named before", "many objects were named before"),
    "repeated": ("the object was not named before", "the object was named before"),
    "token_nll": ("the model gave this word high probability", "the model gave this word low probability"),
    "entropy": ("the next-token distribution has low entropy here", "the next-token distribution has high entropy here"),
}
# What the first one says includes the second: beside it the second is no further reason.
INCLUDES = {"no image token predicts this word": "the attended image tokens do not predict this word"}


def names(heads: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """The columns of `features`, in order; per-head columns are called ``feature@layer.head``."""
    per_head = tuple(f"{name}@{layer}.{head}" for name in HEAD_FEATURES for layer, head in heads)
    return (*TEXT_FEATURES, *GAZE_FEATURES, *per_head)


def meaning(name: str, high: bool) -> str:
    """The reason that a report gives when a low or a high value of a feature raises the risk."""
    return MEANING[name.partition("@")[0]][high]


@np.errstate(invalid="ignore", over="ignore")  # where a model overflowed, features are not finite; the judge reports that
def features(trace: GazeTrace, claims: Sequence[Claim], wanted: Sequence[int] | None = None) -> F64:
    """The feature matrix of a caption's claims.

    All features but ``attribution_min`` and ``token_nll`` are those of the first token of the words that decide the claim
    (`Claim.span`).

    position:            log(1 + token index)
    object_index:        log(1 + number of objects named before)
    repeated:            1 when the same noun was named before, else 0
    token_nll:           negative log-probability of the least likely token of the span, nats
    entropy:             entropy of the next-token distribution, nats
    attribution:         direct logit attribution, logits: per head, and summed over heads
    attribution_min:     the sum over heads, minimum over the words (of an object: its attributes and noun)
    attended_logprob:    log-probability of the token by the logit lens on the attended image tokens, nats
    internal_confidence: the same at the image token that predicts it best, nats
    image_mass:          share of the head's attention on the image
    concentration:       1 - normalised entropy of the head's attention over image tokens
    image_mass_shift:    image_mass minus its mean over the earlier tokens that belong to no object
    head_agreement:      mean overlap of the attention of two heads, 0 to 1
    earlier_overlap:     overlap with the attention at the objects named before, 0 to 1
    related_overlap:     overlap with the attention at the related words (`Claim.related`), mean over heads; 1 without any
    location_agreement:  agreement of attention and words like "top left", 0 to 1; 0.5 without such words

    Args:
        trace: The trace of the caption.
        claims: All claims of the caption, in order.
        wanted: Indices of the claims whose rows are returned, ascending; by default all.

    Returns:
        (wanted claims, len(names(trace.heads))) float64.
    """
    chosen = [claims[i] for i in (range(len(claims)) if wanted is None else wanted)]
    if not chosen:
        return np.zeros((0, len(names(trace.heads))))
    first = [_first_token(trace, claim.span) for claim in chosen]
    attention = _image_attention(trace, first)
    context = _context(trace, claims, range(len(claims)) if wanted is None else wanted)
    return np.concatenate(
        (
            _text_features(trace, chosen, first, context),
            _gaze_features(trace, chosen, first, attention, context),
            *_head_features(trace, first, attention, context),
        ),
        axis=1,
        dtype=np.float64,
    )


def wording_nll(trace: GazeTrace, phrases: Sequence[Phrase]) -> float:
    """How improbable the model finds a caption's wording: mean negative log-probability of its tokens, nats; NaN for none.

    Only the tokens outside of its phrases count, and a first token that is no word of a claim, such as "A": a false word that
    the model would never write is to be flagged, and says nothing of the wording.

    Args:
        trace: The trace of the caption.
        phrases: All its objects and locations.
    """
    counts = np.ones(len(trace), bool)
    for phrase in phrases:
        tokens = _tokens(trace, phrase)
        counts[tokens.start : tokens.stop] = False
    words = [span for phrase in phrases for span in (phrase.head, phrase.count, *phrase.attributes) if span is not None]
    counts[:1] = not any(0 in _tokens(trace, span) for span in words)
    return -float(trace.logprobs[counts].mean(dtype=np.float64)) if counts.any() else float("nan")


def pick(x: F64, heads: Sequence[tuple[int, int]], wanted: Sequence[str]) -> F64:
    """Some columns of `features`, by name: (claims, len(wanted))."""
    return x[:, _columns(tuple(heads), tuple(wanted))]


@cache
def _columns(heads: tuple[tuple[int, int], ...], wanted: tuple[str, ...]) -> list[int]:
    known = names(heads)
    return [known.index(name) for name in wanted]


# ------------------------------------------------------------------------------------------- the caption before a claim


@dataclass(frozen=True)
class _Context:
    """The caption before each of C claims.

    objects:      the objects of the caption, in the order in which claims name them
    object_index: (C,) number of objects named before the claim's own
    repeated:     (C,) whether an earlier object has the same noun
    background:   (C, T) bool, the tokens before the claim that belong to no object
    """

    objects: tuple[Phrase, ...]
    object_index: list[int]
    repeated: list[bool]
    background: NDArray[np.bool_]


def _context(trace: GazeTrace, claims: Sequence[Claim], wanted: Sequence[int]) -> _Context:
    objects: dict[Phrase, str] = {}  # with their nouns
    in_object = np.zeros(len(trace), bool)
    object_index: list[int] = []
    repeated: list[bool] = []
    background = np.zeros((len(wanted), len(trace)), bool)
    for i, claim in enumerate(claims[: wanted[-1] + 1]):
        noun = claim.phrase.head.text.lower()
        if claim.phrase not in objects:
            objects[claim.phrase] = noun
            tokens = _tokens(trace, claim.phrase)
            in_object[tokens.start : tokens.stop] = True
        if i in wanted:
            first = _first_token(trace, claim.span)
            background[len(object_index), :first] = ~in_object[:first]
            object_index.append(len(objects) - 1)
            repeated.append(noun in list(objects.values())[:-1])
    return _Context(tuple(objects), object_index, repeated, background)


def _tokens(trace: GazeTrace, span: Span | Phrase) -> range:
    return trace.tokens(span.start, span.end)


def _first_token(trace: GazeTrace, span: Span) -> int:
    return _tokens(trace, span).start


def _image_attention(trace: GazeTrace, tokens: Sequence[int]) -> F64:
    """(tokens, H, N): each head's attention over image tokens at these tokens, normalised to sum to one."""
    gaze = trace.gaze[list(tokens)].astype(np.float64)
    return gaze / np.maximum(gaze.sum(-1, keepdims=True), 1e-9)


# --------------------------------------------------------------------------------------------------- groups of features


def _text_features(trace: GazeTrace, claims: Sequence[Claim], first: Sequence[int], context: _Context) -> F64:
    """(claims, 5): `TEXT_FEATURES`."""
    spans = (_tokens(trace, claim.span) for claim in claims)
    columns = (
        np.log1p(first),
        np.log1p(context.object_index),
        context.repeated,
        [-trace.logprobs[span.start : span.stop].min() for span in spans],
        trace.entropy[first],
    )
    return np.stack(columns, axis=1)


def _gaze_features(trace: GazeTrace, claims: Sequence[Claim], first: Sequence[int], attention: F64, context: _Context) -> F64:
    """(claims, 8): `GAZE_FEATURES`."""
    attribution = trace.attribution.sum(-1)
    mean_attention = attention.mean(1)
    columns = (
        attribution[first],
        [attribution[_word_tokens(trace, claim)].min() for claim in claims],
        trace.attended_logprob[first],
        trace.internal_confidence[first],
        head_agreement(attention),
        _earlier_overlap(trace, mean_attention, context),
        _related_overlap(trace, claims, attention),
        [_location_agreement(trace, weights, claim) for weights, claim in zip(mean_attention, claims, strict=True)],
    )
    return np.stack(columns, axis=1)


def _head_features(
    trace: GazeTrace, first: Sequence[int], attention: F64, context: _Context
) -> tuple[NDArray[np.floating[Any]], ...]:
    """`HEAD_FEATURES`, each (claims, H)."""
    image_mass = trace.segment_mass[:, :, SEGMENTS.index("image")].astype(np.float64)
    count = context.background.sum(1)[:, None]
    usual = np.where(count, context.background @ image_mass / np.maximum(count, 1), image_mass[first])
    entropy = -(attention * np.log(np.maximum(attention, 1e-12))).sum(-1) / np.log(max(2, attention.shape[-1]))
    return trace.attribution[first], image_mass[first], 1 - entropy, image_mass[first] - usual


# ------------------------------------------------------------------------------------------------------ single features


def _word_tokens(trace: GazeTrace, claim: Claim) -> list[int]:
    """The tokens over which the minimum attribution is taken: the first of each word of an object, else the whole span."""
    if claim.kind == "object":
        return [_first_token(trace, word) for word in (*claim.phrase.attributes, claim.phrase.head)]
    return list(_tokens(trace, claim.span))


def head_agreement(attention: F64) -> F64:
    """Mean overlap of the attention of two heads, over all pairs.

    Args:
        attention: (..., H, N), each head's distribution over image tokens.

    Returns:
        (...), 0 to 1; 1 for a single head.
    """
    one, other = np.triu_indices(attention.shape[-2], 1)
    if not len(one):
        return np.ones(attention.shape[:-2])
    return np.minimum(attention[..., one, :], attention[..., other, :]).sum(-1).mean(-1)


def _earlier_overlap(trace: GazeTrace, mean_attention: F64, context: _Context) -> F64:
    """(claims,): overlap of the mean attention (claims, N) with its maximum over the objects named before."""
    at_objects = _image_attention(trace, [_first_token(trace, phrase.head) for phrase in context.objects]).mean(1)
    running = np.maximum.accumulate(at_objects, axis=0)
    before = np.concatenate((np.zeros((1, running.shape[1])), running))[context.object_index]
    return np.minimum(mean_attention, before).sum(-1)


def _related_overlap(trace: GazeTrace, claims: Sequence[Claim], attention: F64) -> F64:
    """(claims,): overlap with the attention at the related words, mean over heads; 1 for a claim without any."""
    overlap = np.ones(len(claims))
    related = {i: _first_token(trace, claim.related) for i, claim in enumerate(claims) if claim.related is not None}
    if related:
        at_related = _image_attention(trace, list(related.values()))
        overlap[list(related)] = np.minimum(attention[list(related)], at_related).sum(-1).mean(-1)
    return overlap


def _location_agreement(trace: GazeTrace, weights: F64, claim: Claim) -> float:
    """1 - the mean distance of the attention (N,) from the location that the claim's words denote; 0.5 if they denote none.

    The mean is over words and axes; distances are shares of the image's width and height. Only the first image counts.
    """
    if claim.kind != "location" or claim.related is None:
        return 0.5
    words = f"{claim.span.text} {claim.related.text}".lower().replace("-", " ").split()
    targets = [DIRECTIONS[word] for word in words if word in DIRECTIONS]
    located = (trace.grid.image == 0) & np.isfinite(trace.grid.boxes).all(axis=1)
    if not targets or not weights[located].sum() > 0:
        return 0.5
    share, boxes = weights[located] / weights[located].sum(), trace.grid.boxes[located]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = [
        share @ np.abs(centres[:, axis] - goal) for target in targets for axis, goal in enumerate(target) if goal is not None
    ]
    return float(1 - np.mean(distances))
