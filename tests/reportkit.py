"""Reports to show, made by hand, and text that tries to be more than text."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from gazeguard.claims.parse import Claim, Phrase, Span
from gazeguard.report import Finding, Report, Verdict
from gazeguard.trace import GazeTrace
from gazeguard.vision.grid import ImageGrid

CAPTION = "A red ball lies on the grass under a blue moon."
NASTY = (
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "<!-- <script> {{data}} {{title}} {{policy}}",
    "\"quotes\" 'single' & &lt; \\u003c \\",
    "line\u2028and\u2029paragraph",
    "emoji 🌙 and e\u0301, then 月",
)


def make_trace(text: str, gaze: np.ndarray | None = None, grid: ImageGrid | None = None) -> GazeTrace:
    """A trace with one token per word; ``gaze`` (tokens, heads, cells) is random unless given."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    grid = grid or ImageGrid.regular(12, 12, (144, 144))
    rng = np.random.default_rng(0)
    if gaze is None:
        gaze = rng.random((len(spans), 2, len(grid)))
    tokens, heads = len(spans), gaze.shape[1]
    return GazeTrace(
        text=text,
        token_ids=np.arange(tokens),
        offsets=np.array(spans, dtype=np.int64).reshape(-1, 2),
        logprobs=np.full(tokens, -0.5, dtype=np.float32),
        entropy=np.ones(tokens, dtype=np.float32),
        gaze=gaze.astype(np.float32),
        segment_mass=np.full((tokens, heads, 4), 0.25, dtype=np.float32),
        attribution=rng.normal(size=(tokens, heads)).astype(np.float32),
        attended_logprob=np.full(tokens, -2, dtype=np.float32),
        internal_confidence=np.full(tokens, -1, dtype=np.float32),
        heads=tuple((0, head) for head in range(heads)),
        grid=grid,
        model="toy",
    )


def find(caption: str, start: int, end: int, risk: float = 0.5, flagged: bool = False, **more: object) -> Finding:
    text = caption[start:end]
    thing = Phrase(start, end, text, "object", Span(start, end, text), (), 0)
    return Finding(Claim("object", start, end, text, thing, thing.head, None), risk, flagged, **more)


def make_report(caption: str = CAPTION, trace: GazeTrace | None = None, *findings: Finding) -> Report:
    verdict = Verdict.FLAG if any(f.flagged for f in findings) else Verdict.PASS
    return Report(caption, verdict, "one phrase" * (verdict == "flag"), findings, "balanced", "toy", "0.1", trace)


def moon_report() -> Report:
    start = CAPTION.index("a blue moon")
    moon = find(CAPTION, start, start + 11, 0.9, True, reasons=("gaze wanders",), box=(12.0, 0.0, 48.0, 36.0))
    return make_report(CAPTION, make_trace(CAPTION), find(CAPTION, 0, 10, 0.1), moon)


def blank(size: tuple[int, int] = (144, 144)) -> Image.Image:
    return Image.new("RGB", size, (90, 140, 200))
