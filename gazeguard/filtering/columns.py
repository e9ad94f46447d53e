"""Result columns: a report as the values that every filtered row carries, in JSON and in Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gazeguard.filtering.readers import import_pyarrow
from gazeguard.filtering.rows import COLUMNS, ROW_COLUMN
from gazeguard.report import Report


def report_columns(report: Report) -> dict[str, Any]:
    """Return the result columns of one report, as values that JSON and Arrow can hold.

    Returns:
        ``gaze_verdict``: "pass", "flag" or "unchecked". ``gaze_reason``: why, for the last two; empty for pass.
        ``gaze_risk``: the highest risk of a claim, in [0, 1]; None where no claim was judged. ``gaze_phrases``: for each claim
        ``text``, ``span`` ([start, end) in characters of the caption), ``kind``, ``risk``, ``flagged``, and ``box``, the
        attended region, [x0, y0, x1, y1] in pixels of the upright image, or None. ``gaze_caption``: what the policy lets
        through: the caption, or what is left of it, or "". ``gaze_policy``: name of the policy. ``gaze_version``: of GazeGuard.
    """
    phrases = [
        {
            "text": finding.claim.text,
            "span": [finding.claim.start, finding.claim.end],
            "kind": str(finding.claim.kind),
            "risk": round(float(finding.risk), 6),
            "flagged": bool(finding.flagged),
            "box": finding.rounded_box,
        }
        for finding in report.findings
    ]
    values = (
        str(report.verdict),
        report.reason,
        max((round(float(finding.risk), 6) for finding in report.findings), default=None),
        phrases,
        report.filtered_caption,
        report.policy,
        report.version,
    )
    return dict(zip(COLUMNS, values, strict=True))


def append_columns(table: Any, added: Mapping[str, Sequence[Any]]) -> Any:
    """Append result columns to an Arrow table, in place of columns of the same names.

    Args:
        table: A ``pyarrow.Table``.
        added: Result columns, by name. Their types are fixed, whatever the values happen to be.

    Returns:
        The new table.
    """
    pa = import_pyarrow()
    phrase = pa.struct(
        {
            "text": pa.string(),
            "span": pa.list_(pa.int64()),
            "kind": pa.string(),
            "risk": pa.float64(),
            "flagged": pa.bool_(),
            "box": pa.list_(pa.float64()),
        }
    )
    types = {"gaze_risk": pa.float64(), "gaze_phrases": pa.list_(phrase), ROW_COLUMN: pa.int64()}
    table = table.drop_columns([name for name in added if name in table.column_names])
    for name, values in added.items():
        table = table.append_column(name, pa.array(values, types.get(name, pa.string())))
    return table
