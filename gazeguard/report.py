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
from collections.abc import Iterable, Sequence
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
DRAWN = 4096  # colours; a picture of more is taken for a photograph, for which JPEG is smaller

FIELDS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")

_WORD = re.compile(r"\w+(?:['\u2019\-]\w+)*|[^\w\s]+")  # U+2019: the apostrophe of print
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
        text, parts, done = _plain(self.caption), [], 0
        for start, end in _merged([(f.claim.start, f.claim.end) for f in self.findings if f.flagged]):
            parts += [text[done:start], "⟦", text[start:end], "⟧"]
            done = end
        return "".join(parts) + text[done:]

    def printable(self) -> str:
        """``repaired`` for a terminal, with no character that could steer it."""
        return _plain(self.repaired)

    def to_html(self, image: Image.Image) -> str:
        """The replay `page` of this report alone, with ``image``, the picture that the caption is about."""
        return page([Entry("Caption", image, self)], title="GazeGuard report")

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


@dataclass(frozen=True, eq=False)
class Entry:
    """One caption of a replay page.

    image: the picture that the report is about (the first one, if there were several), at the size its boxes count in;
           None where there is none that could be shown
    truth: lines of ground truth to show, such as "a blue moon: not in the picture"
    parts: names and boxes of the parts of the picture between which the gaze is followed over time, such as the panels of
           a strip; by default nine equal fields
    """

    title: str
    image: Image.Image | None
    report: Report
    truth: tuple[str, ...] = ()
    parts: tuple[tuple[str, Box], ...] = ()

    def _repr_html_(self) -> str:
        """What a notebook shows: the replay page of this caption, in a frame that can reach nothing around it."""
        inside = html.escape(page([self], title=self.title))
        return f'<iframe sandbox="allow-scripts" srcdoc="{inside}" style="width:100%;height:44rem;border:0"></iframe>'


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


def page(entries: Iterable[Entry], title: str = "GazeGuard replay", edge: int = LONGEST_EDGE) -> str:
    """One self-contained HTML file that replays the gaze of all ``entries``, word by word.

    ``edge`` is the length in pixels to which larger pictures are shrunk: with 512, a page of 500 photographs stays below
    100 MB. ``#entry=2&word=5`` after the file's address opens it there, both counted from one.

    Raises `InputError` for no entries. They are asked for one by one, so that of many pictures one is held at a time.
    """
    template, policy = _template()
    data = _data(entries, edge)
    if not data["captions"]:
        raise InputError("A replay page needs something to replay. Pass at least one Entry.")
    values = {"title": html.escape(_plain(title)), "policy": policy, "data": _json(data)}
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
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
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


def _data(entries: Iterable[Entry], edge: int) -> dict[str, Any]:
    """All that the page shows. Captions share a picture and a grid by its number, so that each is in the page once."""
    pictures: dict[str, int] = {}
    grids: dict[str, int] = {}
    captions = []
    for entry in entries:
        image, report, trace = entry.image, entry.report, entry.report.trace
        spans = [match.span() for match in _WORD.finditer(report.caption)]
        gaze = None if trace is None else _gaze(trace, spans, entry.parts, grids)
        captions.append(
            {
                "title": entry.title,
                "truth": list(entry.truth),
                "report": report.to_dict(),
                "picture": None if image is None else pictures.setdefault(_data_url(image, edge), len(pictures)),
                "size": [1, 1] if image is None else list(image.size),
                "words": [_word(report, spans, index) for index in range(len(spans))],
                "tail": report.caption[spans[-1][1] if spans else 0 :],
                "starts": [_first_word(spans, finding.claim) for finding in report.findings],
                "gaze": gaze,
            }
        )
    return {"pictures": list(pictures), "grids": [json.loads(grid) for grid in grids], "captions": captions}


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


def _first_word(spans: Sequence[tuple[int, int]], claim: Claim) -> int | None:
    """The number of the first word that a claim has a part of."""
    return next((i for i, (start, end) in enumerate(spans) if claim.start < end and claim.end > start), None)


def _gaze(
    trace: GazeTrace, spans: Sequence[tuple[int, int]], parts: Sequence[tuple[str, Box]], grids: dict[str, int]
) -> dict[str, Any]:
    """Where the gaze was at each word, as base64 of bytes.

    grid, heat:   the number of the grid, cells as boxes in shares of the picture; and words x cells levels, of which 255 is
                  the caption's strongest look at any cell, so that words can be compared by eye
    parts, share: names of parts of the picture; and words x parts levels, of which 255 is all of the word's gaze on the
                  picture, as far as its cells have a place
    """
    gaze = np.zeros((len(spans), len(trace.grid)))
    for row, (start, end) in enumerate(spans):
        if tokens := trace.tokens(start, end):
            gaze[row] = _mean_gaze(trace, tokens)
    if not parts:
        width, height = trace.grid.sizes[0]
        corners = [(x * width / 3, y * height / 3) for y in range(3) for x in range(3)]
        parts = [(name, (x, y, x + width / 3, y + height / 3)) for name, (x, y) in zip(FIELDS, corners, strict=True)]
    placed = _placed(trace)
    heat, total = gaze[:, placed], gaze[:, placed].sum(axis=1, keepdims=True)
    share = gaze @ np.stack([trace.grid.overlap(box) for _, box in parts], axis=1) / np.maximum(total, 1e-12)
    cells = json.dumps([[round(edge, 5) for edge in box] for box in trace.grid.boxes[placed].tolist()])
    return {
        "grid": grids.setdefault(cells, len(grids)),
        "heat": _levels(heat / max(heat.max(initial=0), 1e-12)),
        "parts": [name for name, _ in parts],
        "share": _levels(share),
    }


def _levels(shares: NDArray[np.float64]) -> str:
    """Shares in [0, 1] as base64 of one byte each; what rounding has put outside is put back."""
    return base64.b64encode(np.rint(255 * np.clip(shares, 0, 1)).astype(np.uint8).tobytes()).decode()


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


def _data_url(image: Image.Image, edge: int) -> str:
    """The picture in a data: URL, at most ``edge`` pixels long; its metadata stays behind."""
    small = image.convert("RGB")
    small.thumbnail((edge, edge))  # never enlarges
    small.info.clear()
    kind = "PNG" if small.getcolors(DRAWN) else "JPEG"
    buffer = io.BytesIO()
    small.save(buffer, kind, optimize=True, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


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
