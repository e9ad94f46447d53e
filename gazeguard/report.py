"""What do we show? A `Report` on one caption, as text, JSON or a page that replays the gaze word by word.

The page is one file: no library, no request, and a content security policy under which only its own script runs. Text
from outside (captions, titles, reasons) travels as JSON and reaches the page through ``textContent`` alone.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gazeguard.claims.parse import Claim
from gazeguard.errors import InputError
from gazeguard.trace import GazeTrace
from gazeguard.vision.grid import Box

# All that can steer a terminal or turn the direction of writing, and halves of characters; tab and newline stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Verdict(StrEnum):
    """What the guard says of a whole caption. Unchecked is not a weak pass: nothing was found out."""

    PASS = "pass"
    FLAG = "flag"
    UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Finding:
    """What is known about one claim of a caption.

    risk:     probability in [0, 1] that the claim is false
    reasons:  short English, which features spoke
    box:      the gazed region, x0 y0 x1 y1 in pixels of the first picture; None when there was no gaze to place
    answer:   probability that the model, asked whether it is there, says yes and not no; None when it was not asked
    """

    claim: Claim
    risk: float
    flagged: bool
    reasons: tuple[str, ...] = ()
    box: Box | None = None
    answer: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.risk <= 1:  # also false for NaN, which no threshold would ever flag
            raise InputError(f"The risk of {self.claim.text!r} is {self.risk}, not a probability. Pass one in [0, 1].")

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain values; ``start`` and ``end`` count characters of the caption."""
        return {
            "text": self.claim.text,
            "start": self.claim.start,
            "end": self.claim.end,
            "kind": self.claim.kind,
            "claim": str(self.claim),
            "head": self.claim.phrase.head.text,
            "risk": float(self.risk),
            "flagged": bool(self.flagged),
            "reasons": list(self.reasons),
            "box": None if self.box is None else [float(edge) for edge in self.box],
            "answer": None if self.answer is None else float(self.answer),
        }


@dataclass(frozen=True, eq=False)
class Report:
    """The guard's answer for one caption.

    reason:  why, for flag and unchecked; empty for pass
    policy:  name of the policy that turned risks into the verdict
    model:   the watched model
    version: of GazeGuard
    trace:   the gaze behind the caption; None when none was recorded
    filtered_caption: what the policy lets through: the caption itself; or what is left of it without its flagged phrases; or, where
              the policy abstains, "" for whatever did not pass
    """

    caption: str
    verdict: Verdict
    reason: str
    findings: tuple[Finding, ...]
    policy: str
    model: str
    version: str
    trace: GazeTrace | None = None
    filtered_caption: str = ""

    def __post_init__(self) -> None:
        if self.trace is not None and self.trace.text != self.caption:
            raise InputError(
                f"The trace is of another text ({self.trace.text[:40]!r}) than the caption ({self.caption[:40]!r}), "
                "so its gaze would be shown at the wrong words. Pass the caption's own trace, or None."
            )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON; without the trace, which has its own file format."""
        return {
            "caption": self.caption,
            "filtered_caption": self.filtered_caption,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "phrases": [finding.to_dict() for finding in self.findings],
            "policy": self.policy,
            "model": self.model,
            "version": self.version,
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as strict JSON, in ASCII."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def marked(self) -> str:
        """The caption for a terminal: flagged phrases in ⟦ ⟧, and no character that could steer the terminal."""
        text, parts, done = _plain(self.caption), [], 0
        for start, end in _merged([(f.claim.start, f.claim.end) for f in self.findings if f.flagged]):
            parts += [text[done:start], "⟦", text[start:end], "⟧"]
            done = end
        return "".join(parts) + text[done:]

    def printable(self) -> str:
        """``filtered_caption`` for a terminal, with no character that could steer it."""
        return _plain(self.filtered_caption)

    def _repr_html_(self) -> str:
        """What a notebook shows: verdict, reason, the caption with its marks, and each flagged phrase. Static and small."""

        def text(value: str) -> str:
            return html.escape(_plain(value))

        caption, parts, done = _plain(self.caption), [], 0
        for start, end in _merged([(f.claim.start, f.claim.end) for f in self.findings if f.flagged]):
            marked = f'<u style="text-decoration:underline wavy">{html.escape(caption[start:end])}</u><sup>?</sup>'
            parts += [html.escape(caption[done:start]), marked]
            done = end
        rows = "".join(
            f"<li>{text(str(f.claim))}: risk {f.risk:.2f}; {text('; '.join(f.reasons))}</li>"
            for f in self.findings
            if f.flagged
        )
        return (
            f'<div style="max-width:45rem"><b>{self.verdict}</b>{text(self.reason and f" · {self.reason}")}'
            f'<p dir="auto" style="white-space:pre-wrap;font-size:1.15em">{"".join(parts)}{html.escape(caption[done:])}</p>'
            f"<ul>{rows}</ul></div>"
        )


def gaze_box(trace: GazeTrace, tokens: Sequence[int]) -> Box | None:
    """Where did the gaze rest while ``tokens`` (row numbers of the trace) were written?

    The smallest box, in pixels of the first picture, around the fewest cells that together carry half of the gaze there
    (mean over heads and tokens). None when there are no tokens, no cells with a place, or no gaze on them.
    """
    return gaze_boxes(trace, [tokens])[0]


def gaze_boxes(trace: GazeTrace, words: Sequence[Sequence[int]]) -> list[Box | None]:
    """`gaze_box` for the tokens of each of several ``words``, in their order."""
    placed = _placed(trace)
    if not len(words) or not len(placed):
        return [None] * len(words)
    gaze = trace.gaze.mean(axis=1, dtype=np.float64)[:, placed]
    mass = np.zeros((len(words), len(placed)))
    alone = [i for i, tokens in enumerate(words) if len(tokens) == 1]  # most words: the gaze of their token is theirs
    mass[alone] = gaze[[words[i][0] for i in alone]]
    for own, tokens in zip(mass, words, strict=True):
        if len(tokens) > 1:
            own[:] = gaze[list(tokens)].mean(axis=0)
    mass[~np.isfinite(mass)] = 0
    total = mass.sum(axis=1, keepdims=True)
    order = np.argsort(-mass, axis=1, kind="stable")
    # A cell is taken while those before it carry less than half. The tiny allowance lets n equal cells be halved exactly in
    # spite of rounding.
    summed = np.take_along_axis(mass, order, axis=1).cumsum(axis=1)
    taken = np.sum(summed < total / 2 * (1 - 1e-9), axis=1) + 1
    boxes = trace.grid.boxes[placed].astype(np.float64) * np.tile(np.array(trace.grid.sizes[0], float), 2)
    around = boxes[order[np.arange(order.shape[1]) < taken[:, None]]]  # one word's cells after the other's
    first = np.cumsum(taken) - taken
    found = np.concatenate(
        (np.minimum.reduceat(around[:, :2], first, axis=0), np.maximum.reduceat(around[:, 2:], first, axis=0)), axis=1
    )
    return [tuple(box) if has else None for box, has in zip(found.tolist(), total[:, 0] > 0, strict=True)]


def _placed(trace: GazeTrace) -> NDArray[np.int64]:
    """The cells of the first picture that have a place in it (separators and line ends have none)."""
    return np.flatnonzero((trace.grid.image == 0) & np.isfinite(trace.grid.boxes).all(axis=1))


def _plain(text: str) -> str:
    """The text with a sign of one character in place of each that could steer what shows it."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans in order, those that overlap made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
