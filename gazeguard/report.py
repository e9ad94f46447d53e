"""What do we show? A `Report` on one caption, as text, JSON or a page that replays the gaze word by word.

The page is one file: no library, no request, and a content security policy under which only its own script runs. Text
from outside (captions, titles, reasons) travels as JSON and reaches the page through ``textContent`` alone.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gazeguard.errors import InputError
from gazeguard.grid import Box
from gazeguard.phrases import Claim
from gazeguard.trace import GazeTrace

LONGEST_EDGE = 1024  # pixels; larger pictures are shrunk in the page, which stays small enough to mail

_WORD = re.compile(r"\w+(?:['\u2019\-]\w+)*|[^\w\s]+")  # U+2019: the apostrophe of print
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all that can steer a terminal; tab and newline stay


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
    repaired: what the policy lets through: the caption itself; or what is left of it without its flagged phrases; or, where
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
    repaired: str = ""

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
            "repaired": self.repaired,
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
        text, parts, done = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", self.caption), [], 0
        for start, end in _merged([(f.claim.start, f.claim.end) for f in self.findings if f.flagged]):
            parts += [text[done:start], "⟦", text[start:end], "⟧"]
            done = end
        return "".join(parts) + text[done:]

    def printable(self) -> str:
        """``repaired`` for a terminal, with no character that could steer it."""
        return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", self.repaired)

    def to_html(self, image: Image.Image) -> str:
        """The replay `page` of this report alone, with ``image``, the picture that the caption is about."""
        return page([Entry("Caption", image, self)], title="GazeGuard report")


@dataclass(frozen=True, eq=False)
class Entry:
    """One caption of a replay page.

    image: the picture that the report is about (the first one, if there were several), at the size its boxes count in
    truth: lines of ground truth to show, such as "a blue moon: not in the picture"
    """

    title: str
    image: Image.Image
    report: Report
    truth: tuple[str, ...] = ()


def gaze_box(trace: GazeTrace, tokens: Sequence[int]) -> Box | None:
    """Where did the gaze rest while ``tokens`` (row numbers of the trace) were written?

    The smallest box, in pixels of the first picture, around the fewest cells that together carry half of the gaze there
    (mean over heads and tokens). None when there are no tokens, no cells with a place, or no gaze on them.
    """
    placed = _placed(trace)
    if not len(tokens) or not len(placed):
        return None
    mass = _mean_gaze(trace, tokens)[placed]
    total = mass.sum()
    if not total > 0:
        return None
    order = np.argsort(-mass, kind="stable")
    # The tiny allowance lets n equal cells be halved exactly in spite of rounding.
    enough = int(np.searchsorted(np.cumsum(mass[order]), total / 2 * (1 - 1e-9))) + 1
    boxes = trace.grid.boxes[placed[order[:enough]]].astype(np.float64)
    (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
    width, height = trace.grid.sizes[0]
    return (x0 * width, y0 * height, x1 * width, y1 * height)


def page(entries: Sequence[Entry], title: str = "GazeGuard replay") -> str:
    """One self-contained HTML file that replays the gaze of all ``entries``, word by word.

    ``#entry=2&word=5`` after the file's address opens it there, both counted from one.
    """
    if not entries:
        raise InputError("A replay page needs something to replay. Pass at least one Entry.")
    template, policy = _template()
    values = {"title": html.escape(title), "policy": policy, "data": _json([_entry(entry) for entry in entries])}
    # One pass: a caption that contains "{{title}}" stays as it is.
    return re.sub(r"\{\{(title|policy|data)\}\}", lambda match: values[match[1]], template)


# ------------------------------------------------------------------------------------------------------- the template


@cache
def _template() -> tuple[str, str]:
    """The page without its data, and the content security policy that allows its one style and one script."""
    template = resources.files("gazeguard").joinpath("replay.html").read_text(encoding="utf-8")
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL) for tag in ("style", "script"))
    assert style  # both are part of the package
    assert script
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style[1])}; script-src {_hash(script[1])}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    return template, policy


def _hash(text: str) -> str:
    """The CSP source that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that no HTML parser can mistake for markup: ASCII (so no U+2028 either), without < > &."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ----------------------------------------------------------------------------------------------------------- the data


def _entry(entry: Entry) -> dict[str, Any]:
    """What the page knows about one caption."""
    report, trace = entry.report, entry.report.trace
    spans = [match.span() for match in _WORD.finditer(report.caption)]
    return {
        "title": entry.title,
        "truth": list(entry.truth),
        "report": report.to_dict(),
        "image": _data_url(entry.image),
        "size": list(entry.image.size),
        "words": [_word(report, spans, index) for index in range(len(spans))],
        "tail": report.caption[spans[-1][1] if spans else 0 :],
        "gaze": None if trace is None else _gaze(trace, spans),
    }


def _word(report: Report, spans: list[tuple[int, int]], index: int) -> dict[str, Any]:
    """One word: its text, the text between it and the word before, its finding (by number), and its trace's numbers.

    A word of several tokens has the sum of their log-probabilities (nats) and the mean of everything else.
    """
    start, end = spans[index]
    word: dict[str, Any] = {
        "gap": report.caption[spans[index - 1][1] if index else 0 : start],
        "text": report.caption[start:end],
        "phrase": _finding_at(report.findings, start, end),
    }
    if report.trace is not None and (tokens := report.trace.tokens(start, end)):
        rows = slice(tokens.start, tokens.stop)
        word["logprob"] = _number(report.trace.logprobs[rows].sum())
        word["readout"] = _number(report.trace.readout[rows].mean())
        word["shares"] = [_number(share) for share in report.trace.shares[rows].mean(axis=(0, 1))]
    return word


def _finding_at(findings: Sequence[Finding], start: int, end: int) -> int | None:
    """The number of the finding that a word is shown with: flagged before not flagged, then the highest risk."""
    hits = [i for i, f in enumerate(findings) if f.claim.start < end and f.claim.end > start]
    return max(hits, key=lambda i: (findings[i].flagged, findings[i].risk), default=None)


def _gaze(trace: GazeTrace, spans: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The heat of each word: ``cells``, boxes in shares of the picture, and ``heat``, base64 of words x cells bytes.

    255 is the caption's strongest look at any cell, so that words can be compared by eye.
    """
    placed = _placed(trace)
    heat = np.zeros((len(spans), len(placed)))
    for row, (start, end) in enumerate(spans):
        if tokens := trace.tokens(start, end):
            heat[row] = _mean_gaze(trace, tokens)[placed]
    levels = np.rint(255 * heat / max(heat.max(initial=0), 1e-12)).astype(np.uint8)
    return {
        "cells": [[round(edge, 5) for edge in box] for box in trace.grid.boxes[placed].tolist()],
        "heat": base64.b64encode(levels.tobytes()).decode(),
    }


def _placed(trace: GazeTrace) -> NDArray[np.int64]:
    """The cells of the first picture that have a place in it (separators and line ends have none)."""
    return np.flatnonzero((trace.grid.image == 0) & np.isfinite(trace.grid.boxes).all(axis=1))


def _mean_gaze(trace: GazeTrace, tokens: Sequence[int]) -> NDArray[np.float64]:
    """(N,) float64: the gaze on each cell, mean over heads and the given tokens; NaN counts as none."""
    gaze = trace.gaze[list(tokens)].astype(np.float64).mean(axis=(0, 1))
    return np.where(np.isfinite(gaze), gaze, 0)


def _number(value: Any) -> float | None:
    """A number that JSON can hold; None for infinities and NaN."""
    return round(float(value), 4) if math.isfinite(value) else None


def _data_url(image: Image.Image) -> str:
    """The picture as a PNG in a data: URL, at most `LONGEST_EDGE` pixels long; its metadata stays behind."""
    small = image.convert("RGB")
    small.thumbnail((LONGEST_EDGE, LONGEST_EDGE))  # never enlarges
    small.info.clear()
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans in order, those that overlap made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
