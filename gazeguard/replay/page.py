"""TODO replay.page."""

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
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gazeguard.claims.parse import Claim
from gazeguard.errors import InputError
from gazeguard.report import Finding, Report, located_tokens, mean_gaze, safe_text
from gazeguard.trace import GazeTrace
from gazeguard.vision.geometry import Box

LONGEST_EDGE = 1024  # pixels; larger pictures are shrunk in the page, which stays small enough to mail
DRAWN = 4096  # colours; a picture of more is taken for a photograph, for which JPEG is smaller

FIELDS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")

_WORD = re.compile(r"\w+(?:['\u2019\-]\w+)*|[^\w\s]+")  # U+2019: the apostrophe of print


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
    values = {"title": html.escape(safe_text(title)), "policy": policy, "data": _json(data)}
    # One pass: a caption that contains "{{title}}" stays as it is.
    return re.sub(r"\{\{(title|policy|data)\}\}", lambda match: values[match[1]], template)


def report_page(report: Report, image: Image.Image) -> str:
    """The replay `page` of one report alone, with ``image``, the image that the caption is about."""
    return page([Entry("Caption", image, report)], title="GazeGuard report")


@cache
def _template() -> tuple[str, str]:
    """The page without its data, and the content security policy that allows its one style and one script."""
    template = resources.files("gazeguard.replay").joinpath("template.html").read_text(encoding="utf-8")
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
        word["attribution"] = _number(report.trace.attribution[rows].mean())
        word["segment_mass"] = [_number(share) for share in report.trace.segment_mass[rows].mean(axis=(0, 1))]
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

    grid, heat:   the number of the grid, image tokens as boxes in shares of the image; and words x image tokens levels, of
                  which 255 is the caption's strongest attention on any of them, so that words can be compared by eye
    parts, share: names of parts of the picture; and words x parts levels, of which 255 is all of the word's gaze on the
                  picture, as far as its cells have a place
    """
    gaze = np.zeros((len(spans), len(trace.grid)))
    for row, (start, end) in enumerate(spans):
        if tokens := trace.tokens(start, end):
            gaze[row] = mean_gaze(trace, tokens)
    if not parts:
        width, height = trace.grid.sizes[0]
        corners = [(x * width / 3, y * height / 3) for y in range(3) for x in range(3)]
        parts = [(name, (x, y, x + width / 3, y + height / 3)) for name, (x, y) in zip(FIELDS, corners, strict=True)]
    placed = located_tokens(trace)
    heat, total = gaze[:, placed], gaze[:, placed].sum(axis=1, keepdims=True)
    share = gaze @ np.stack([trace.grid.overlap(box) for _, box in parts], axis=1) / np.maximum(total, 1e-12)
    cells = json.dumps([[round(edge, 5) for edge in box] for box in trace.grid.boxes[placed].tolist()])
    return {
        "grid": grids.setdefault(cells, len(grids)),
        "heat": _levels(heat / max(heat.max(initial=0), 1e-12)),
        "parts": [name for name, _ in parts],
        "share": _levels(share),
    }


def _levels(segment_mass: NDArray[np.float64]) -> str:
    """Shares in [0, 1] as base64 of one byte each; what rounding has put outside is put back."""
    return base64.b64encode(np.rint(255 * np.clip(segment_mass, 0, 1)).astype(np.uint8).tobytes()).decode()


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
