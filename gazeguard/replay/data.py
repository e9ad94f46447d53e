"""Data of a replay page: captions word by word, as JSON that no HTML parser can mistake for markup."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gazeguard.claims.parse import Claim
from gazeguard.report import Finding, Report, located_tokens
from gazeguard.trace import GazeTrace
from gazeguard.vision.geometry import Box
from gazeguard.vision.images import load_image

MAX_COLOURS = 4096  # of a drawing; an image of more is taken for a photograph, for which JPEG is smaller
JPEG_QUALITY = 85
REGIONS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")

_WORD = re.compile(r"\w+(?:['\u2019\-]\w+)*|[^\w\s]+")  # U+2019: the apostrophe of print


class PageData:
    """The data of a page. Captions share an image and a grid by its number, so that each is in the page once.

    Args:
        edge: Pixels to which larger images are shrunk.
    """

    def __init__(self, edge: int) -> None:
        self.edge = edge
        self.captions: list[dict[str, Any]] = []
        self._images: dict[str, int] = {}
        self._grids: dict[str, int] = {}

    def add(
        self,
        title: str,
        image: Image.Image | None,
        report: Report,
        truth: Sequence[str] = (),
        regions: Sequence[tuple[str, Box]] = (),
    ) -> None:
        """Add a caption; the arguments are those of `gazeguard.replay.page.Entry`."""
        spans = [match.span() for match in _WORD.finditer(report.caption)]
        number = None if image is None else self._images.setdefault(_data_url(image, self.edge), len(self._images))
        self.captions.append(
            {
                "title": title,
                "truth": list(truth),
                "report": report.to_dict(),
                "image": number,
                "size": [1, 1] if image is None else list(image.size),
                "words": [_word(report, spans, index) for index in range(len(spans))],
                "tail": report.caption[spans[-1][1] if spans else 0 :],
                "starts": [_first_word(spans, finding.claim) for finding in report.findings],
                "gaze": None if report.trace is None else self._gaze(report.trace, spans, regions),
            }
        )

    def to_json(self) -> str:
        """Return the data as JSON in ASCII (so without U+2028, too), without < > &."""
        grids = [json.loads(grid) for grid in self._grids]
        data = {"images": list(self._images), "grids": grids, "captions": self.captions}
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

    def _gaze(self, trace: GazeTrace, spans: Sequence[tuple[int, int]], regions: Sequence[tuple[str, Box]]) -> dict[str, Any]:
        """The attention on the image at each word, as base64 of bytes.

        Returns:
            ``grid``: the number of the grid, image tokens as boxes in shares of the image. ``heat``: words x image tokens
            levels, of which 255 is the caption's strongest attention on any of them, so that words can be compared by eye.
            ``regions``: names of regions of the image. ``region_share``: words x regions levels, of which 255 is all of the
            word's attention on the image, as far as its tokens have a location.
        """
        gaze = np.stack([np.zeros(len(trace.grid)), *(trace.mean_gaze(trace.tokens(*span)) for span in spans)])[1:]
        regions = regions or _thirds(*trace.grid.sizes[0])
        located = located_tokens(trace)
        heat, total = gaze[:, located], gaze[:, located].sum(axis=1, keepdims=True)
        share = gaze @ np.stack([trace.grid.overlap(box) for _, box in regions], axis=1) / np.maximum(total, 1e-12)
        boxes = json.dumps([[round(edge, 5) for edge in box] for box in trace.grid.boxes[located].tolist()])
        return {
            "grid": self._grids.setdefault(boxes, len(self._grids)),
            "heat": _levels(heat / max(heat.max(initial=0), 1e-12)),
            "regions": [name for name, _ in regions],
            "region_share": _levels(share),
        }


def _thirds(width: int, height: int) -> list[tuple[str, Box]]:
    """Nine equal regions of an image."""
    corners = [(x * width / 3, y * height / 3) for y in range(3) for x in range(3)]
    return [(name, (x, y, x + width / 3, y + height / 3)) for name, (x, y) in zip(REGIONS, corners, strict=True)]


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
        steps = slice(tokens.start, tokens.stop)
        word["logprob"] = _number(report.trace.logprobs[steps].sum())
        word["attribution"] = _number(report.trace.attribution[steps].mean())
        word["segment_mass"] = [_number(mass) for mass in report.trace.segment_mass[steps].mean(axis=(0, 1))]
    return word


def _finding_at(findings: Sequence[Finding], start: int, end: int) -> int | None:
    """The number of the finding that a word is shown with: flagged before not flagged, then the highest risk."""
    hits = [i for i, f in enumerate(findings) if f.claim.start < end and f.claim.end > start]
    return max(hits, key=lambda i: (findings[i].flagged, findings[i].risk), default=None)


def _first_word(spans: Sequence[tuple[int, int]], claim: Claim) -> int | None:
    """The number of the first word that a claim has a part of."""
    return next((i for i, (start, end) in enumerate(spans) if claim.start < end and claim.end > start), None)


def _levels(shares: NDArray[np.float64]) -> str:
    """Shares in [0, 1] as base64 of one byte each; what rounding has put outside is put back."""
    return base64.b64encode(np.rint(255 * np.clip(shares, 0, 1)).astype(np.uint8).tobytes()).decode()


def _number(value: Any) -> float | None:
    """A number that JSON can hold; None for infinities and NaN."""
    return round(float(value), 4) if math.isfinite(value) else None


def _data_url(image: Image.Image, edge: int) -> str:
    """The image in a data: URL, at most ``edge`` pixels long; its metadata stays behind."""
    small = load_image(image)
    small.thumbnail((edge, edge))  # never enlarges
    small.info.clear()
    kind = "PNG" if small.getcolors(MAX_COLOURS) else "JPEG"
    buffer = io.BytesIO()
    small.save(buffer, kind, optimize=True, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
