"""How do glance and word differ? Pure functions from a trace and its claims to named numbers.

Nothing here looks ahead: the features of a claim depend only on the caption up to the end of its thing and place, so that
they can be had while the caption is being written. Each gaze head keeps its own columns; an average over heads would drown
the few that speak.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gazeguard.claims.parse import Claim, Phrase, Span
from gazeguard.trace import SEGMENTS, GazeTrace

# What can be known without the picture: the prior, and the row that every gaze result stands beside.
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
# Where in the picture words of place point: x and y from 0 (left, top) to 1; None leaves the axis open.
DIRECTIONS: dict[str, tuple[float | None, float | None]] = {
    "left": (0, None), "right": (1, None), "top": (None, 0), "upper": (None, 0), "bottom": (None, 1), "lower": (None, 1),
    "middle": (0.5, 0.5), "center": (0.5, 0.5), "centre": (0.5, 0.5),
}  # fmt: skip
# What to say when a low, or a high, value of a feature raises the risk.
MEANING = {
    "attribution": ("what the gaze heads see does not speak for this word", "the gaze heads push this word unusually hard"),
    "attribution_min": ("what the gaze heads see does not speak for this word", "the gaze heads push this word unusually hard"),
    "attended_logprob": (
        "what lies under the gaze does not look like this word",
        "what lies under the gaze looks like this word",
    ),
    "internal_confidence": ("nothing in the picture looks like this word", "something in the picture looks like this word"),
    "image_mass": ("little attention on the picture", "unusually much attention on the picture"),
    "concentration": ("the gaze does not settle on one place", "the gaze sticks to a single spot"),
    "image_mass_shift": ("the gaze does not turn to the picture for this word", "the gaze jumps to the picture for this word"),
    "head_agreement": ("the gaze heads look at different places", "the gaze heads all look at one place"),
    "earlier_overlap": ("the gaze is where nothing was named before", "the gaze is where something else was named before"),
    "related_overlap": ("the gaze is not where the words that belong to it were", "the gaze stays where it was"),
    "location_agreement": ("the gaze is not in the part of the picture that is named", "the gaze is in the part that is named"),
    "position": ("early in the caption", "late in the caption"),
    "object_index": ("few things were named before", "many things were named before"),
    "repeated": ("it was not named before", "it was named before"),
    "token_nll": ("the model was very ready to say this word", "the model gave this word little probability"),
    "entropy": ("the model was sure what kind of word comes here", "the model was unsure what to say here"),
}


def names(heads: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """The columns of `features`, in order; per-head columns are called ``feature@layer.head``."""
    per_head = tuple(f"{name}@{layer}.{head}" for name in HEAD_FEATURES for layer, head in heads)
    return (*TEXT_FEATURES, *GAZE_FEATURES, *per_head)


def meaning(name: str, high: bool) -> str:
    """In words: what a low or a high value of the feature says when it raises the risk."""
    return MEANING[name.partition("@")[0]][high]


@np.errstate(invalid="ignore", over="ignore")  # what a model's overflow makes of them is not finite, and the guard says so
def features(trace: GazeTrace, claims: Sequence[Claim], wanted: Sequence[int] | None = None) -> NDArray[np.float64]:
    """(wanted claims, len(names(trace.heads))) float64: one row per claim of the trace's caption, in order; of all of them, or
    of those with the numbers ``wanted``, in rising order.

    All but ``attribution_min`` and ``surprise`` are of the first token of the words that decide the claim (`Claim.span`).

    position:      log(1 + index of the token); mention: log(1 + things named before)
    repeated:      1 when the same noun was named before
    surprise:      negative log-probability of the least likely token of the words, nats
    entropy:       of the distribution that the token came from, nats
    attribution:       logits, `GazeTrace.attribution` per head and summed over heads
    attribution_min: the sum over heads, least over the words (for an object, over its attributes and noun)
    content:       log-probability of the token where the heads look; named: at the cell that fits it best; nats
    picture:       share of the head's attention on the picture; focus: 1 - normalised entropy of where on it
    shift:         picture share minus its mean over the words before that belong to no thing
    agreement:     mean overlap of two heads' gaze, 0 to 1
    visited:       overlap with where the gaze was for the things named before, 0 to 1
    together:      overlap with the gaze of the words that belong to it (`Claim.related`), mean over heads; 1 if none do
    there:         how far the gaze agrees with words like "top left", 0 to 1; 0.5 when no such word is said
    """
    wanted = range(len(claims)) if wanted is None else wanted
    if not wanted:
        return np.zeros((0, len(names(trace.heads))))

    @cache  # a thing is asked for with each of its claims
    def tokens(span: Span) -> range:
        return trace.tokens(span.start, span.end)

    def first(span: Span) -> int:
        return tokens(span).start

    def where(rows: Sequence[int]) -> NDArray[np.float64]:
        """(rows, H, N): how each head's gaze on the picture is spread while these tokens are written."""
        gaze = trace.gaze[list(rows)].astype(np.float64)
        return gaze / np.maximum(gaze.sum(-1, keepdims=True), 1e-9)

    at = [first(claims[i].span) for i in wanted]
    here = where(at)
    picture = trace.segment_mass[:, :, SEGMENTS.index("image")].astype(np.float64)  # of which sums are taken
    attribution = trace.attribution.sum(-1)
    things: dict[Phrase, None] = {}
    before: list[int] = []  # for each wanted claim, how many things were named before its own
    repeated, unlikely, attribution_min = [], [], []
    between = np.zeros((len(wanted), len(trace)), bool)  # for each wanted claim, the words before it that belong to no thing
    inside, nouns = np.zeros(len(trace), bool), []
    for i, claim in enumerate(claims[: wanted[-1] + 1]):
        if claim.phrase not in things:
            things[claim.phrase] = None
            nouns.append(_noun(claim.phrase))
            own = tokens(claim.phrase)
            inside[own.start : own.stop] = True
        if i not in wanted:
            continue
        between[len(before), : first(claim.span)] = ~inside[: first(claim.span)]
        before.append(len(things) - 1)
        repeated.append(_noun(claim.phrase) in nouns[:-1])
        said = tokens(claim.span)
        words = [first(part) for part in (*claim.phrase.attributes, claim.phrase.head)] if claim.kind == "object" else said
        unlikely.append(-trace.logprobs[said.start : said.stop].min())
        attribution_min.append(attribution[list(words)].min())
    count = between.sum(1)[:, None]
    usual = np.where(count, between @ picture / np.maximum(count, 1), picture[at])
    # Of the gaze for the things named so far, the most on every cell; nothing before the first.
    visits = np.maximum.accumulate(where([first(thing.head) for thing in things]).mean(1), axis=0)
    seen = np.concatenate((np.zeros((1, visits.shape[1])), visits))[before]
    mean = here.mean(1)
    together = np.ones(len(wanted))
    if paired := [n for n, i in enumerate(wanted) if claims[i].related is not None]:
        others = where([first(claims[wanted[n]].related) for n in paired])
        together[paired] = np.minimum(here[paired], others).sum(-1).mean(-1)
    spread = -(here * np.log(np.maximum(here, 1e-12))).sum(-1) / np.log(max(2, here.shape[-1]))
    alone = (
        np.log1p(at),
        np.log1p(before),
        repeated,
        unlikely,
        trace.entropy[at],
        attribution[at],
        attribution_min,
        trace.attended_logprob[at],
        trace.internal_confidence[at],
        _agreement(here),
        np.minimum(mean, seen).sum(-1),
        together,
        [_there(trace, own, claims[i]) for own, i in zip(mean, wanted, strict=True)],
    )
    per_head = (trace.attribution[at], picture[at], 1 - spread, picture[at] - usual)
    return np.concatenate((np.stack(alone, axis=1), *per_head), axis=1, dtype=np.float64)


def _noun(thing: Phrase) -> str:
    return thing.head.text.lower()


def _there(trace: GazeTrace, where: NDArray[np.float64], claim: Claim) -> float:
    """1 - the mean distance of the gaze (N,) from where the claim's words of place point; per word and axis, 0.5 if none."""
    if claim.kind != "location" or claim.related is None:
        return 0.5
    words = f"{claim.span.text} {claim.related.text}".lower().replace("-", " ").split()
    said = [DIRECTIONS[word] for word in words if word in DIRECTIONS]
    placed = (trace.grid.image == 0) & np.isfinite(trace.grid.boxes).all(axis=1)
    if not said or not where[placed].sum() > 0:
        return 0.5
    weights, boxes = where[placed] / where[placed].sum(), trace.grid.boxes[placed]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    far = [weights @ np.abs(centres[:, axis] - goal) for word in said for axis, goal in enumerate(word) if goal is not None]
    return float(1 - np.mean(far))


def pick(x: NDArray[np.float64], heads: Sequence[tuple[int, int]], wanted: Sequence[str]) -> NDArray[np.float64]:
    """Some of the columns of `features`, by name: (phrases, len(wanted))."""
    return x[:, _columns(tuple(heads), tuple(wanted))]


@cache
def _columns(heads: tuple[tuple[int, int], ...], wanted: tuple[str, ...]) -> list[int]:
    known = names(heads)
    return [known.index(name) for name in wanted]


def _agreement(where: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over pairs of heads of the overlap of their distributions (..., H, N); 1 for a single head."""
    one, other = np.triu_indices(where.shape[-2], 1)
    if not len(one):
        return np.ones(where.shape[:-2])
    return np.minimum(where[..., one, :], where[..., other, :]).sum(-1).mean(-1)
