"""How do glance and word differ? Pure functions from a trace and its phrases to named numbers.

Nothing here looks ahead: the features of a phrase depend only on the caption up to its end, so that they can be had while
the caption is being written. Each gaze head keeps its own columns; an average over heads would drown the few that speak.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gazeguard.phrases import Phrase
from gazeguard.trace import SHARES, GazeTrace

# What can be known without the picture: the prior, and the row that every gaze result stands beside.
TEXT_FEATURES = ("position", "mention", "repeated", "surprise", "entropy")
# One of each per gaze head.
HEAD_FEATURES = ("readout", "picture", "focus", "shift")
GAZE_FEATURES = ("readout", "readout_words", "agreement")
# What to say when a low, or a high, value of a feature raises the risk.
MEANING = {
    "readout": ("what the gaze heads see does not speak for this word", "the gaze heads push this word unusually hard"),
    "readout_words": ("what the gaze heads see does not speak for these words", "the gaze heads push these words hard"),
    "picture": ("little attention on the picture", "unusually much attention on the picture"),
    "focus": ("the gaze does not settle on one place", "the gaze sticks to a single spot"),
    "shift": ("the gaze does not turn to the picture for this word", "the gaze jumps to the picture for this word"),
    "agreement": ("the gaze heads look at different places", "the gaze heads all look at one place"),
    "position": ("early in the caption", "late in the caption"),
    "mention": ("few things were named before", "many things were named before"),
    "repeated": ("it was not named before", "it was named before"),
    "surprise": ("the model was very ready to say this word", "the model gave this word little probability"),
    "entropy": ("the model was sure what kind of word comes here", "the model was unsure what to say here"),
}


def names(heads: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """The columns of `features`, in order; per-head columns are called ``feature@layer.head``."""
    per_head = tuple(f"{name}@{layer}.{head}" for name in HEAD_FEATURES for layer, head in heads)
    return (*TEXT_FEATURES, *GAZE_FEATURES, *per_head)


def meaning(name: str, high: bool) -> str:
    """In words: what a low or a high value of the feature says when it raises the risk."""
    return MEANING[name.partition("@")[0]][high]


def features(trace: GazeTrace, phrases: Sequence[Phrase]) -> NDArray[np.float64]:
    """(len(phrases), len(names(trace.heads))) float64: one row per phrase of the trace's caption, in order.

    position:      log(1 + index of the head noun's first token); mention: log(1 + things named before)
    repeated:      1 when the same noun was named before
    surprise:      negative log-probability of the noun's first token, nats; entropy: of the distribution it came from
    readout:       logits, `GazeTrace.readout` at the noun's first token, per head and summed over heads
    readout_words: the sum over heads, least over the phrase's attributes and noun
    picture:       share of the head's attention on the picture; focus: 1 - normalised entropy of where on it
    shift:         picture share minus its mean over the words before that belong to no phrase
    agreement:     mean overlap of two heads' gaze, 0 to 1
    """
    rows = np.zeros((len(phrases), len(names(trace.heads))))
    tokens = [trace.tokens(phrase.start, phrase.end) for phrase in phrases]
    inside = np.zeros(len(trace), bool)
    for span in tokens:
        inside[span.start : span.stop] = True
    seen: set[str] = set()
    for i, phrase in enumerate(phrases):
        noun = phrase.head.text.lower()
        at = trace.tokens(phrase.head.start, phrase.head.end).start
        words = [trace.tokens(part.start, part.end).start for part in (*phrase.attributes, phrase.head)]
        gaze = trace.gaze[at].astype(np.float64)  # (H, N)
        where = gaze / np.maximum(gaze.sum(-1, keepdims=True), 1e-9)
        spread = -(where * np.log(np.maximum(where, 1e-12))).sum(-1) / np.log(max(2, where.shape[-1]))
        between = np.flatnonzero(~inside[:at])
        picture = trace.shares[:, :, SHARES.index("picture")]
        usual = picture[between].mean(0) if len(between) else picture[at]
        rows[i] = np.concatenate(
            (
                [np.log1p(at), np.log1p(i), noun in seen, -trace.logprobs[at], trace.entropy[at]],
                [trace.readout[at].sum(), trace.readout[words].sum(-1).min(), _agreement(where)],
                trace.readout[at],
                picture[at],
                1 - spread,
                picture[at] - usual,
            )
        )
        seen.add(noun)
    return rows


def pick(x: NDArray[np.float64], heads: Sequence[tuple[int, int]], wanted: Sequence[str]) -> NDArray[np.float64]:
    """Some of the columns of `features`, by name: (phrases, len(wanted))."""
    columns = names(heads)
    return x[:, [columns.index(name) for name in wanted]]


def _agreement(where: NDArray[np.float64]) -> float:
    """Mean over pairs of heads of the overlap of their distributions (H, N); 1 for a single head."""
    h = len(where)
    if h == 1:
        return 1.0
    overlaps = np.minimum(where[:, None], where[None]).sum(-1)  # (H, H)
    return float((overlaps.sum() - np.trace(overlaps)) / (h * (h - 1)))
