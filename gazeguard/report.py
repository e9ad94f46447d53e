"""Report on one caption: the verdict, a finding for each claim, and the gaze behind them.

A `Report` prints as text of a few lines, converts to JSON, draws the attended region of a phrase, and is saved and loaded.
`gazeguard.replay` shows it as a page. Text from outside (captions, reasons) never steers what shows it: see `safe_text`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gazeguard.artifacts import read_json
from gazeguard.claims.parse import Claim
from gazeguard.errors import ArtifactError, InputError
from gazeguard.trace import GazeTrace
from gazeguard.vision.geometry import Box
from gazeguard.vision.images import load_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

FORMAT = 1  # of a saved report
MAX_LINES = 25  # of a printed report
MAX_PRINTED_FLAGS = 8
MAX_REPR_FLAGS = 3
UNSUPPORTED = "not supported by the image: "  # in a reason, before the flagged claims
CUT_OFF = "the caption was cut off by the length limit"
ENDS_OPEN = "the caption ends in the middle of a clause"  # and then its last words
MAX_REPR_TEXT = 60  # characters of a claim or a reason in a repr
FRAME = "#ffffff"

# All that can steer a terminal or turn the direction of writing, and halves of characters; tab and newline stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Verdict(StrEnum):
    """Judgement on a whole caption. Unchecked is not a weak pass: nothing is known about the caption."""

    PASS = "pass"
    FLAG = "flag"
    UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Finding:
    """What is known about one claim of a caption.

    Attributes:
        claim: The claim.
        risk: Probability in [0, 1] that the claim is false.
        flagged: Whether the claim is flagged: its risk reaches the threshold, and it is not about an object that is flagged.
        reasons: Short English: the evidence that raised the risk; or why a claim with such a risk is not flagged itself.
        box: The attended region, x0 y0 x1 y1 in pixels of the first image; None without attention on a location.
        answer: Probability that the model, asked whether the object is there, says yes and not no; None when it was not asked.
        threshold: The risk from which the policy flags a claim of this kind; None in reports of earlier versions.

    Raises:
        InputError: The risk is not a probability.
    """

    claim: Claim
    risk: float
    flagged: bool
    reasons: tuple[str, ...] = ()
    box: Box | None = None
    answer: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.risk <= 1:  # also false for NaN, which no threshold would ever flag
            raise InputError(f"The risk of {self.claim.text!r} is {self.risk}, not a probability. Pass one in [0, 1].")

    @property
    def rounded_box(self) -> list[float] | None:
        """`box` to a tenth of a pixel, as plain floats."""
        return None if self.box is None else [round(float(edge), 1) for edge in self.box]

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values; ``start`` and ``end`` count characters of the caption."""
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
            "box": self.rounded_box,
            "answer": None if self.answer is None else float(self.answer),
            "threshold": None if self.threshold is None else float(self.threshold),
        }


class Line(NamedTuple):
    """One line of a printed report, and what stands in it, for whoever prints in colour."""

    role: Literal["verdict", "caption", "flagged", "reason", "filtered"]
    text: str


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """The guard's answer for one caption.

    Attributes:
        caption: The caption.
        verdict: Pass, flag or unchecked.
        reason: Why, for flag and unchecked; empty for pass.
        findings: One for each judged claim, in the order of the caption.
        policy: Name of the policy that turned risks into the verdict.
        model: The fingerprint of the watched model.
        version: Version of GazeGuard.
        trace: The gaze behind the caption; None when none was recorded.
        filtered_caption: The text that the policy lets through: the caption; or the caption without its flagged phrases; or,
            if the policy abstains and the caption did not pass, "".
        not_judged: Kinds of claims in the caption that were not judged; the verdict says nothing about them.
        model_name: What the watched model is called: its hub id, or its class and folder; "" where that is not known.

    Raises:
        InputError: The trace belongs to another text.
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
    not_judged: tuple[str, ...] = ()
    model_name: str = ""

    def __post_init__(self) -> None:
        if self.trace is not None and self.trace.text != self.caption:
            raise InputError(
                f"The trace is of another text ({self.trace.text[:40]!r}) than the caption ({self.caption[:40]!r}), "
                "so its gaze would be shown at the wrong tokens. Pass the caption's own trace, or None."
            )

    @property
    def flagged(self) -> tuple[Finding, ...]:
        """The flagged findings, in the order of the caption."""
        return tuple(finding for finding in self.findings if finding.flagged)

    def __repr__(self) -> str:
        if self.verdict == Verdict.UNCHECKED:
            return f"Report(unchecked: {_clipped(self.reason)})"
        flags = [f"{_clipped(str(finding.claim))} {finding.risk:.2f}" for finding in self.flagged]
        more = [f"{len(flags) - MAX_REPR_FLAGS} more"] * (len(flags) > MAX_REPR_FLAGS)
        named = ", ".join(flags[:MAX_REPR_FLAGS] + more)
        return f"Report({self.verdict}, {self._count()}{named and f': {named}'})"

    def __str__(self) -> str:
        indent = {"verdict": "", "caption": "  "}
        return "\n".join(indent.get(line.role, "    ") + line.text for line in self.lines())

    def _count(self) -> str:
        total, flagged = len(self.findings), len(self.flagged)
        if not total:
            return "no claims judged"
        return f"{flagged or 'none'} of {total} claim{'s' * (total != 1)} flagged"

    def lines(self, title: str | None = None) -> list[Line]:
        """Lay the report out for a terminal.

        Args:
            title: What the caption is about, such as the path of its image; by default the number of flagged claims.

        Returns:
            At most `MAX_LINES` lines, without any character that could steer a terminal: the verdict, the caption with its
            flagged phrases in ⟦ ⟧, each flagged claim with its reasons, why the caption is unchecked or is not whole, the
            kinds of claims that were not judged, and the filtered caption. Where lines are left out, a line says how many.
        """
        verdict = Line("verdict", f"{self.verdict.upper():9} {safe_line(self._count() if title is None else title)}".rstrip())
        flags = [
            Line("flagged", safe_line(f"⟦{f.claim}⟧ risk {f.risk:.2f}" + (f": {'; '.join(f.reasons)}" if f.reasons else "")))
            for f in self.flagged
        ]
        tail = _shortened(flags, MAX_PRINTED_FLAGS, "flagged claims")
        tail += [Line("reason", safe_line(part)) for part in self._reason_parts()]
        if self.not_judged:
            tail.append(Line("reason", safe_line(f"not judged: {', '.join(f'{kind}s' for kind in self.not_judged)}")))
        room, filtered = MAX_LINES - 1 - len(tail), []
        if self.filtered_caption != self.caption:
            filtered = _text_lines("filtered", safe_text(self.filtered_caption)) or [Line("filtered", "nothing")]
            filtered[0] = Line("filtered", f"filtered caption: {filtered[0].text}")
            filtered = _shortened(filtered, room // 2, "lines")
        return [verdict, *_shortened(_text_lines("caption", self.marked()), room - len(filtered), "lines"), *tail, *filtered]

    def _reason_parts(self) -> list[str]:
        """The parts of the reason that a terminal shows; it leaves out the list of flagged claims, which are shown above it."""
        if self.verdict != Verdict.FLAG:
            return [self.reason] if self.reason else []
        before, listed, _ = self.reason.partition(UNSUPPORTED)
        ending = self.reason.rpartition("; ")[2]
        parts = (before.removesuffix("; ") if listed else "", ending if ending.startswith((CUT_OFF, ENDS_OPEN)) else "")
        return [part for part in parts if part]

    def marked(self) -> str:
        """Return the caption for a terminal: flagged phrases in ⟦ ⟧, and no character that could steer the terminal."""
        return "".join(f"⟦{text}⟧" if flagged else text for text, flagged in self._pieces())

    def _pieces(self) -> list[tuple[str, bool]]:
        """The caption's safe text in pieces, and whether each is flagged."""
        text, pieces, done = safe_text(self.caption), [], 0
        for start, end in _merged([(f.claim.start, f.claim.end) for f in self.flagged]):
            pieces += [(text[done:start], False), (text[start:end], True)]
            done = end
        return [*pieces, (text[done:], False)]

    def _repr_html_(self) -> str:
        return self.notebook_html()

    def notebook_html(self, title: str = "") -> str:
        """Return what a notebook shows: verdict, reason, the caption with its marks, flagged phrases. Static and small.

        Args:
            title: What stands above it, such as the name of the policy.
        """

        def escaped(value: str) -> str:
            return html.escape(safe_text(value))

        caption = "".join(
            f'<u style="text-decoration:underline wavy">{html.escape(text)}</u><sup>?</sup>' if flagged else html.escape(text)
            for text, flagged in self._pieces()
        )
        rows = "".join(
            f"<li>{escaped(str(f.claim))}: risk {f.risk:.2f}; {escaped('; '.join(f.reasons))}</li>" for f in self.flagged
        )
        heading = f"<div><small>{escaped(title)}</small></div>" if title else ""
        filtered = f"<p>filtered caption: {escaped(self.filtered_caption) or 'nothing'}</p>"
        return (
            f'<div style="flex:1 1 15rem;max-width:45rem">{heading}'
            f"<b>{self.verdict}</b>{escaped(self.reason and f' · {self.reason}')}"
            f'<p dir="auto" style="white-space:pre-wrap;font-size:1.15em">{caption}</p><ul>{rows}</ul>'
            f"{filtered if self.filtered_caption != self.caption else ''}</div>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON; without the trace, which has its own file format."""
        return {
            "caption": self.caption,
            "filtered_caption": self.filtered_caption,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "phrases": [finding.to_dict() for finding in self.findings],
            "not_judged": list(self.not_judged),
            "policy": self.policy,
            "model": self.model,
            "model_name": self.model_name,
            "version": self.version,
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return `to_dict` as strict JSON, in ASCII."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write the report as strict JSON, and its trace, if there is one, beside it as ``.safetensors``.

        Args:
            path: The JSON file, such as ``report.json``; the trace then goes to ``report.safetensors``.

        Raises:
            InputError: The path is that of a trace.
        """
        path, beside = _paths(path)
        stored = {name: getattr(self, name) for name in _SavedReport.model_fields if hasattr(self, name)}
        stored |= {"format": FORMAT, "verdict": str(self.verdict), "trace": self.trace is not None}
        stored["findings"] = [asdict(finding) for finding in self.findings]
        text = json.dumps(stored, indent=1, allow_nan=False, default=_plain_number)
        if self.trace is not None:
            self.trace.save(beside)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report that `save` wrote, with its trace. Nothing in the files is executed.

        Args:
            path: The JSON file.

        Raises:
            ArtifactError: The file is no report, it is too large, or its trace is missing or of another caption.
        """
        path, beside = _paths(path)
        saved: _SavedReport = read_json(_SavedReport, path, "a saved report", "Report.save")
        for finding in saved.findings:
            claim, text = finding.claim, saved.caption[finding.claim.start : finding.claim.end]
            if claim.text != text:
                raise ArtifactError(f"{path} is no report: the claim {claim.text!r} stands where the caption says {text!r}.")
        if saved.trace and not beside.is_file():
            raise ArtifactError(f"{path} needs its trace, and there is no {beside}. Put the two files side by side.")
        values = {name: getattr(saved, name) for name in _SavedReport.model_fields if name not in ("format", "trace")}
        try:
            return cls(**values, trace=GazeTrace.load(beside) if saved.trace else None)
        except InputError as error:
            raise ArtifactError(f"{beside} is not the trace of {path}. {error}") from error

    def plot(self, image: str | Path | bytes | Image.Image, phrase: str | Finding) -> Figure:
        """Draw where the gaze heads attended while a phrase was written: the heat map, and the attended region as a frame.

        Args:
            image: The image that the caption is about.
            phrase: A finding or the text of one, for the words with which its claim is decided; or any words of the caption.

        Returns:
            A matplotlib figure; ``figure.savefig`` writes it, and a notebook shows it.

        Raises:
            InputError: The report has no trace, or the caption does not have the phrase.
        """
        if self.trace is None:
            raise InputError("The report has no trace, so there is no gaze to draw. Check the caption again to record one.")
        start, end, label = self._locate(phrase)
        return _draw(load_image(image), self.trace, self.trace.tokens(start, end), label)

    def _locate(self, phrase: str | Finding) -> tuple[int, int, str]:
        """The characters of a phrase, end exclusive, and what to call it."""
        finding = phrase if isinstance(phrase, Finding) else None
        for candidate in self.findings if finding is None else ():
            if phrase in (candidate.claim.text, str(candidate.claim)):
                finding = candidate
                break
        if finding is not None:
            risk = f"risk {finding.risk:.2f}{', flagged' if finding.flagged else ''}"
            return finding.claim.span.start, finding.claim.span.end, f"{finding.claim}: {risk}"
        start = self.caption.find(str(phrase)) if phrase else -1
        if start < 0:
            known = ", ".join(repr(candidate.claim.text) for candidate in self.findings[:5]) or "none"
            raise InputError(f"The caption does not say {phrase!r}. Pass words of the caption; its claims begin with: {known}.")
        return start, start + len(str(phrase)), str(phrase)


class _SavedReport(BaseModel):
    """The JSON file of a report."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal[1]
    caption: str
    verdict: Verdict
    reason: str
    findings: tuple[Finding, ...]
    policy: str
    model: str
    version: str
    filtered_caption: str
    not_judged: tuple[str, ...] = ()  # reports of 0.1 lack it, and the next
    model_name: str = ""
    trace: bool


def _paths(path: str | Path) -> tuple[Path, Path]:
    """The file of a report, and that of its trace."""
    path = Path(path)
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is the name of a trace. Give the path of the report, such as {path.with_suffix('.json')}.")
    return path, path.with_suffix(".safetensors")


def _plain_number(value: Any) -> Any:
    """A number of NumPy as one of Python."""
    return value.item()


def gaze_box(trace: GazeTrace, tokens: Sequence[int]) -> Box | None:
    """Find the attended region of some tokens.

    Args:
        trace: The trace.
        tokens: Their numbers in the trace.

    Returns:
        The smallest box, in pixels of the first image, around the fewest image tokens that together carry half of the
        attention there (mean over heads and tokens). None when there are no tokens, no image tokens with a location, or no
        attention on them.
    """
    return gaze_boxes(trace, [tokens])[0]


def gaze_boxes(trace: GazeTrace, phrases: Sequence[Sequence[int]]) -> list[Box | None]:
    """Find the attended region, as `gaze_box` does, for the tokens of each of several ``phrases``, in their order."""
    located = located_tokens(trace)
    if not len(phrases) or not len(located):
        return [None] * len(phrases)
    gaze = trace.gaze.mean(axis=1, dtype=np.float64)[:, located]
    mass = np.zeros((len(phrases), len(located)))
    single = [i for i, tokens in enumerate(phrases) if len(tokens) == 1]  # most of them, in one step
    mass[single] = gaze[[phrases[i][0] for i in single]]
    for phrase_mass, tokens in zip(mass, phrases, strict=True):
        if len(tokens) > 1:
            phrase_mass[:] = gaze[list(tokens)].mean(axis=0)
    mass[~np.isfinite(mass)] = 0
    total = mass.sum(axis=1, keepdims=True)
    order = np.argsort(-mass, axis=1, kind="stable")
    # An image token is taken while those before it carry less than half. The tiny allowance lets n equal ones be halved exactly
    # in spite of rounding.
    summed = np.take_along_axis(mass, order, axis=1).cumsum(axis=1)
    taken = np.sum(summed < total / 2 * (1 - 1e-9), axis=1) + 1
    boxes = pixel_boxes(trace, located)[order[np.arange(order.shape[1]) < taken[:, None]]]  # one phrase's after the other's
    first = np.cumsum(taken) - taken
    edges = np.concatenate(
        (np.minimum.reduceat(boxes[:, :2], first, axis=0), np.maximum.reduceat(boxes[:, 2:], first, axis=0)), axis=1
    )
    return [tuple(box) if attended else None for box, attended in zip(edges.tolist(), total[:, 0] > 0, strict=True)]


def located_tokens(trace: GazeTrace) -> NDArray[np.int64]:
    """Return the image tokens of the first image that have a location in it (separators and line ends have none)."""
    return np.flatnonzero((trace.grid.image == 0) & np.isfinite(trace.grid.boxes).all(axis=1))


def pixel_boxes(trace: GazeTrace, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the boxes, (len(tokens), 4), of image tokens of the first image, in its pixels."""
    scale = np.tile(np.array(trace.grid.sizes[0], np.float64), 2)
    return np.asarray(trace.grid.boxes[tokens].astype(np.float64) * scale)


def _draw(image: Image.Image, trace: GazeTrace, tokens: Sequence[int], label: str) -> Figure:
    from matplotlib.patches import Rectangle

    figure = trace.heatmap(tokens, image, title=safe_line(label))
    if (box := gaze_box(trace, tokens)) is not None:
        (axes,) = figure.axes
        corner, size = box[:2], (box[2] - box[0], box[3] - box[1])
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=4))
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=FRAME, linewidth=2, linestyle="--"))
    return figure


def safe_text(text: str) -> str:
    """Return the text with a sign of one character in place of each that could steer what shows it; tabs and newlines stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def safe_line(text: str) -> str:
    """Return `safe_text` in one line."""
    return " ".join(safe_text(text).split())


def _clipped(text: str) -> str:
    text = safe_line(text)
    return text if len(text) <= MAX_REPR_TEXT else text[: MAX_REPR_TEXT - 1] + "…"


def _text_lines(role: Literal["caption", "filtered"], text: str) -> list[Line]:
    return [Line(role, line.rstrip()) for line in text.splitlines() if line.strip()]


def _shortened(lines: Sequence[Line], most: int, noun: str) -> list[Line]:
    """The lines, the last of them replaced by how many more there are where they are too many."""
    if len(lines) <= most:
        return list(lines)
    return [*lines[: most - 1], Line(lines[0].role, f"… {len(lines) - most + 1} more {noun}")]


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans in order, those that overlap made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
