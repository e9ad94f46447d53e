"""Verdicts that a dataset already has: reports from the result columns of an earlier filter run, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gazeguard import __version__
from gazeguard.claims.parse import Claim, ClaimKind, claims
from gazeguard.claims.phrases import Phrase, Span
from gazeguard.errors import InputError
from gazeguard.filtering.readers import Source
from gazeguard.filtering.rows import COLUMNS, Row
from gazeguard.report import Finding, Report, Verdict

SAVED_MODEL = "as saved"  # in place of a model's name, which result columns do not have


def has_verdicts(source: Source) -> bool:
    """Return whether a dataset is the output of a filter run: whether its first row has every result column."""
    return all(name in row.fields for row in [next(source.rows(), Row({}))] for name in COLUMNS)


def saved_report(row: Row) -> Report:
    """Return the report that the result columns of a row hold; *unchecked* with the reason where they hold none."""
    caption = row.caption if isinstance(row.caption, str) else ""
    try:
        return _report(caption, row.fields)
    except (LookupError, TypeError, ValueError, AttributeError, InputError):
        reason = row.error or "the row has no verdict that can be read"
        return Report(caption, Verdict.UNCHECKED, reason, (), "none", SAVED_MODEL, __version__)


def _report(caption: str, columns: Mapping[str, Any]) -> Report:
    known = {(str(claim.kind), claim.start, claim.end): claim for claim in claims(caption)}
    findings = []
    for phrase in columns["gaze_phrases"] or ():
        (start, end), kind, text = phrase["span"], phrase["kind"], phrase["text"]
        if caption[start:end] != text:
            raise ValueError("a phrase is not in the caption")
        claim = known.get((kind, start, end)) or _bare_claim(kind, start, end, text)
        box = None
        if phrase["box"] is not None:
            x0, y0, x1, y1 = map(float, phrase["box"])
            box = (x0, y0, x1, y1)
        findings.append(Finding(claim, float(phrase["risk"]), bool(phrase["flagged"]), box=box))
    texts = (str(columns[name]) for name in ("gaze_policy", "gaze_version"))
    policy, version = texts
    verdict = Verdict(columns["gaze_verdict"])
    return Report(
        caption,
        verdict,
        str(columns["gaze_reason"]),
        tuple(findings),
        policy,
        SAVED_MODEL,
        version,
        filtered_caption=str(columns["gaze_caption"]),
    )


def _bare_claim(kind: ClaimKind, start: int, end: int, text: str) -> Claim:
    """A claim whose caption another version has parsed: the words alone."""
    span = Span(start, end, text)
    return Claim(kind, start, end, text, Phrase(start, end, text, "object", span, (), 0), span, None)
