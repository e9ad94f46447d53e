"""Does the torture of the filter see what it is there for? And a few mutated rows of each kind, none of which is lost."""

from __future__ import annotations

import random

import pytest

from evals.mutations import WRITERS, Mutant, encoded
from evals.torture import RowTorture


@pytest.fixture(scope="module")
def torture():
    return RowTorture(seed=5, drawings=4)


@pytest.mark.parametrize("kind", WRITERS)
def test_mutated_rows_are_neither_lost_nor_passed_unseen(torture, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    torture.run(kind, 0, 10)
    tally = torture.tally
    assert (tally.lost, tally.crashes, tally.passes, tally.neighbours) == ([], [], [], [])
    assert tally.rows >= 10


@pytest.mark.parametrize(
    ("change", "trouble"),
    [
        (lambda rows: rows[1:], "lost"),
        (lambda rows: [{**rows[0], "gaze_verdict": "pass"}, *rows[1:]], "passes"),
        (lambda rows: [rows[0], {**rows[1], "gaze_risk": 0.5, "gaze_verdict": "flag"}], "neighbours"),
        (lambda rows: [{**rows[0], "gaze_reason": ""}, rows[1]], "passes"),
    ],
    ids=["a row is gone", "what cannot be judged passes", "a clean row is judged otherwise", "no reason"],
)
def test_a_fault_is_seen(tmp_path, change, trouble):
    """A refusal and a clean row, and results that are wrong by hand."""
    torture = RowTorture(seed=5, drawings=2)
    (image, caption), (expected, risk) = torture.clean[1], torture.expected[1]
    mutants = [Mutant(0, "caption: refusal", encoded(image), "N/A", may_pass=False), Mutant(1, "", encoded(image), caption)]
    path = WRITERS["jsonl"](tmp_path, mutants, random.Random(0))
    rows = [
        {"id": 0, "caption": "N/A", "gaze_verdict": "unchecked", "gaze_reason": "placeholder", "gaze_risk": None},
        {"id": 1, "caption": caption, "gaze_verdict": expected, "gaze_reason": "because", "gaze_risk": risk},
    ]
    torture.compare("jsonl", path, mutants, rows)
    assert (torture.tally.lost, torture.tally.passes, torture.tally.neighbours) == ([], [], [])
    torture.compare("jsonl", path, mutants, change(rows))
    assert getattr(torture.tally, trouble)
