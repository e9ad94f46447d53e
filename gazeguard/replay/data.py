"""Data of a replay page: captions word by word, as JSON that no HTML parser can mistake for markup."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gazeguard.claims.phrases import Span
from gazeguard.report import Finding, Report, Verdict, located_tokens
from gazeguard.trace import GazeTrace
from gazeguard.vision.geometry import Box
from gazeguard.vision.images import load_image

MAX_COLOURS = 4096  # of a drawing; an image of more is taken for a photograph, for which JPEG is smaller
JPEG_QUALITY = 85
REGIONS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")

MAX_HEAD_BYTES = 8 * 2**20  # of the attention of single heads, in all: captions beyond it have the mean alone

# A word with the punctuation that touches it, or punctuation alone. U+2019: the apostrophe of print; U+0300 to U+036F: accents.
_WORD = re.compile(r"(?P<before>[^\w\s]*)(?P<word>\w[\w\u0300-\u036f]*(?:['\u2019\-]\w+)*)(?P<after>[^\w\s]*)|[^\w\s]+")
# What to do where nothing on a page was checked: words of the reason -> next step. The first that fits counts.
REMEDIES = {
    "No usable gaze heads": "Find others with comics that the model understands: gazeguard heads MODEL --material FOLDER.",
    "no detector": "Fit a detector for this model: gazeguard fit MODEL --out DIR. Then give --artifacts DIR.",
    "far from all that": "Fit a detector on images like these: gazeguard fit MODEL --out DIR takes your own (--help).",
    "detector is not usable": "Fit it on more captions, or on labelled ones: gazeguard train ROWS.jsonl --model MODEL.",
    "cut off": "Allow longer captions (--max-new-tokens).",
    "": "Each caption's own reason says what is missing.",
}


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
        self._head_bytes = 0

    def add(
        self,
        title: str,
        image: Image.Image | None,
        report: Report,
        truth: Sequence[str] = (),
        regions: Sequence[tuple[str, Box]] = (),
    ) -> None:
        """Add a caption; the arguments are those of `gazeguard.replay.page.Entry`."""
        words = list(_WORD.finditer(report.caption))
        spans = [match.span("word" if match["word"] else 0) for match in words]
        number = None if image is None else self._images.setdefault(_data_url(image, self.edge), len(self._images))
        self.captions.append(
            {
                "title": title,
                "truth": list(truth),
                "report": report.to_dict(),
                "image": number,
                "size": [1, 1] if image is None else list(image.size),
                "words": [_word(report, words, index) for index in range(len(spans))],
                "tail": report.caption[words[-1].end() if words else 0 :],
                "decided": [_first_word(spans, finding.claim.span) for finding in report.findings],
                "gaze": None if report.trace is None else self._gaze(report.trace, spans, regions),
            }
        )

    def to_json(self) -> str:
        """Return the data as JSON in ASCII (so without U+2028, too), without < > &."""
        grids = [json.loads(grid) for grid in self._grids]
        data = {"images": list(self._images), "grids": grids, "captions": self.captions, "remedy": self._remedy()}
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

    def _remedy(self) -> list[str]:
        """Where nothing was checked: what helps most captions, behind a reason that calls for it; else nothing."""
        reports = [caption["report"] for caption in self.captions]
        if any(report["verdict"] != Verdict.UNCHECKED for report in reports):
            return []
        reasons = [report["reason"] for report in reports]
        remedies = [next(remedy for words, remedy in REMEDIES.items() if words in reason) for reason in reasons]
        (remedy, _) = Counter(remedies).most_common(1)[0]
        return [reasons[remedies.index(remedy)], remedy]

    def _gaze(self, trace: GazeTrace, spans: Sequence[tuple[int, int]], regions: Sequence[tuple[str, Box]]) -> dict[str, Any]:
        """The attention on the image at each word, as base64 of bytes.

        Returns:
            ``grid``: the number of the grid, image tokens as boxes in shares of the image. ``heat``: words x image tokens
            levels, of which 255 is the caption's strongest attention on any of them, so that words can be compared by eye.
            ``heads``: layer and head of each gaze head; ``head_heat``: heads x words x image tokens, of which 255 is the
            strongest of all heads; None where the page has no room left for it. ``regions``: names of regions of the image.
            ``region_share``: words x regions levels, of which 255 is all of the word's attention on the image, as far as its
            tokens have a location.
        """
        located = located_tokens(trace)
        by_head = np.zeros((len(trace.heads), len(spans), len(trace.grid)))
        for word, span in enumerate(spans):
            if tokens := trace.tokens(*span):
                by_head[:, word] = trace.gaze[tokens.start : tokens.stop].mean(axis=0, dtype=np.float64)
        by_head[~np.isfinite(by_head)] = 0
        gaze = by_head.mean(axis=0) if len(by_head) else np.zeros(by_head.shape[1:])
        regions = regions or _thirds(*trace.grid.sizes[0])
        heat, total = gaze[:, located], gaze[:, located].sum(axis=1, keepdims=True)
        share = gaze @ np.stack([trace.grid.overlap(box) for _, box in regions], axis=1) / np.maximum(total, 1e-12)
        boxes = json.dumps([[round(edge, 5) for edge in box] for box in trace.grid.boxes[located].tolist()])
        return {
            "grid": self._grids.setdefault(boxes, len(self._grids)),
            "heat": _relative_levels(heat),
            "heads": [list(head) for head in trace.heads],
            "head_heat": self._head_heat(by_head[:, :, located]),
            "regions": [name for name, _ in regions],
            "region_share": _levels(share),
        }

    def _head_heat(self, heat: NDArray[np.float64]) -> str | None:
        if len(heat) < 2 or self._head_bytes + heat.size > MAX_HEAD_BYTES:
            return None
        self._head_bytes += heat.size
        return _relative_levels(heat)


def _thirds(width: int, height: int) -> list[tuple[str, Box]]:
    """Nine equal regions of an image."""
    corners = [(x * width / 3, y * height / 3) for y in range(3) for x in range(3)]
    return [(name, (x, y, x + width / 3, y + height / 3)) for name, (x, y) in zip(REGIONS, corners, strict=True)]


def _word(report: Report, matches: Sequence[re.Match[str]], index: int) -> dict[str, Any]:
    """One word: its text, the punctuation that touches it, the text before it, its finding (by number), its trace's numbers.

    A word of several tokens has the sum of their log-probabilities (nats) and the mean of everything else.
    """
    match = matches[index]
    start, end = match.span("word" if match["word"] else 0)
    word: dict[str, Any] = {
        "gap": report.caption[matches[index - 1].end() if index else 0 : match.start()],
        "before": match["before"] or "",
        "text": report.caption[start:end],
        "after": match["after"] or "",
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


def _first_word(spans: Sequence[tuple[int, int]], words: Span) -> int | None:
    """The number of the first word that a span has a part of: of the words that decide a claim, the one that is judged."""
    return next((i for i, (start, end) in enumerate(spans) if words.start < end and words.end > start), None)


def _relative_levels(heat: NDArray[np.float64]) -> str:
    """Attention as levels, of which 255 is the strongest."""
    return _levels(heat / max(heat.max(initial=0), 1e-12))


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
