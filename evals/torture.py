"""Torture: mutated rows through the filter, and ways of generating drawn at random through a guard.

* ``rows_lost``: rows of a whole data set that are not in the results exactly once; of a damaged one, that are missing although
  no row of the results says that it is damaged
* ``crashes``: errors that are none of GazeGuard's own, in either part
* ``silent_passes``: captions that pass although they, or their images, cannot be judged, or whose verdict is another one when
  image and caption are checked alone
* ``neighbours_changed``: clean rows whose verdict or risk depends on the mutants beside them
* ``live_replay_mismatches``: captions whose live trace is not that of one pass over each alone, of ``captions`` of
  ``combinations``; ``refused`` combinations are named in the file, ``changed`` ones wrote something else than without a guard

Data sets are files of a few dozen rows, each of one kind; some are damaged as a whole.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from evals.combinations import Combination
from evals.combinations import run as run_combination
from evals.common import Figure, Out, Quick, figure, write
from evals.mutations import DAMAGED, WRITERS, Mutant, clean_rows, mutate, numbers_of
from gazeguard import lab
from gazeguard.errors import GazeGuardError, InputError
from gazeguard.filtering.caption_filter import CaptionFilter
from gazeguard.filtering.readers import check_columns, open_source
from gazeguard.filtering.run import filter_files
from gazeguard.filtering.writer import FILE_NAMES, Results
from gazeguard.guard import GazeGuard

SEED = 2200
ROWS_OF_A_FILE = 40
SHARES = {"jsonl": 0.4, "parquet": 0.2, "tar": 0.2, "folder": 0.2}
UNDAMAGED = ("jsonl", "folder")  # kinds of which no file is damaged as a whole
MAX_RISK_DIFFERENCE = 1e-3


@dataclass
class Tally:
    """What went wrong with rows, in words; counts are what the figures say."""

    rows: int = 0
    lost: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)
    neighbours: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)


class RowTorture:
    """Mutated data sets through one filter."""

    def __init__(self, seed: int, drawings: int) -> None:
        self.filter = CaptionFilter(GazeGuard(*lab.load()))
        self.clean = clean_rows(drawings, seed)
        reports = self.filter.guard.check_all(*zip(*self.clean, strict=True))
        self.expected = [(str(report.verdict), max((f.risk for f in report.findings), default=None)) for report in reports]
        self.rng = random.Random(seed)
        self.tally = Tally()

    def run(self, kind: str, first: int, count: int) -> None:
        """One data set of a kind with so many rows."""
        mutants = [mutate(number, self.clean[number % len(self.clean)], self.rng) for number in range(first, first + count)]
        self.tally.rows += count
        with tempfile.TemporaryDirectory() as folder:
            path = WRITERS[kind](Path(folder), mutants, self.rng)
            try:
                rows = self._results(path, Path(folder) / "out")
            except GazeGuardError as error:  # the whole input is refused, by name
                self.tally.refused[re.sub(r"\S*/\S*|\d+", "*", str(error))[:100]] += 1
                return
            except Exception as error:
                self.tally.crashes.append(f"{kind}: {type(error).__name__}: {error}"[:300])
                return
            self.compare(kind, path, mutants, rows)

    def _results(self, path: Path, out: Path) -> list[dict[str, Any]]:
        """The rows of all result files; of a table without the bytes of its images."""
        source = open_source(path)
        check_columns(source)
        run = self.filter.run_settings(source, path.parent, 16, False)
        summary = filter_files(self.filter, source, Results(out, run), 16)
        rows: list[dict[str, Any]] = []
        for name in FILE_NAMES.values():
            if (lines := out / f"{name}.jsonl").is_file():
                rows += map(json.loads, lines.read_bytes().splitlines())
            else:
                import pyarrow.parquet as pq

                rows += pq.read_table(out / f"{name}.parquet").to_pylist()
        if summary["rows"] != len(rows):
            raise InputError(f"The summary counts {summary['rows']} rows, and the files have {len(rows)}.")
        return rows

    def compare(self, kind: str, path: Path, mutants: Sequence[Mutant], rows: Sequence[Mapping[str, Any]]) -> None:
        """Hold the results of a data set against what was written into it."""
        tally = self.tally
        tally.verdicts.update(row["gaze_verdict"] for row in rows)
        found = Counter(numbers_of(kind, rows))
        damaged = any(DAMAGED in row["gaze_reason"] for row in rows)
        if kind == "jsonl":
            lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
            if lines != len(rows):
                tally.lost.append(f"{kind}: {lines} lines gave {len(rows)} rows")
            expected = set(_readable_numbers(path))
        else:
            expected = {mutant.number for mutant in mutants}
        known = {mutant.number: mutant for mutant in mutants}
        tally.lost += [f"{kind}: row {number}, {known[number].mutation!r}" for number in expected - set(found) if not damaged]
        if kind == "parquet":
            tally.lost += [f"{kind}: row {number} is there {times} times" for number, times in found.items() if times > 1]
        for row in rows:
            self._judge(kind, row, known)

    def _judge(self, kind: str, row: Mapping[str, Any], known: Mapping[int, Mutant]) -> None:
        verdict = row["gaze_verdict"]
        if verdict != "pass" and not row["gaze_reason"]:
            self.tally.passes.append(f"{kind}: {verdict} without a reason")
        mutant = known.get(next(iter(numbers_of(kind, [row])), -1))
        if mutant is None:
            if verdict == "pass":
                self.tally.passes.append(f"{kind}: a row that nobody wrote passes: {str(row)[:200]}")
            return
        intact = row.get("caption") == mutant.caption
        if not mutant.mutation and intact and (verdict != "unchecked" or kind in UNDAMAGED):
            expected, risk = self.expected[mutant.number % len(self.clean)]
            if expected != verdict or abs((risk or 0) - (row["gaze_risk"] or 0)) > MAX_RISK_DIFFERENCE:
                self.tally.neighbours.append(
                    f"{kind}: row {mutant.number}: {verdict} {row['gaze_risk']}, not {expected} {risk}"
                )
        if verdict == "pass" and (reason := self._may_not_pass(mutant, row.get("caption"), intact)):
            self.tally.passes.append(f"{kind}: row {mutant.number}, {mutant.mutation!r}: {reason}")

    def _may_not_pass(self, mutant: Mutant, caption: Any, intact: bool) -> str:
        """Why a row that passes should not; empty where it may."""
        if intact and not mutant.may_pass:
            return "it cannot be judged"
        try:
            with Image.open(io.BytesIO(mutant.image or b"")) as image:
                image.load()
                report = self.filter.guard.check(image.copy(), caption)
        except Exception as error:
            return f"its image cannot be opened: {error}"
        return "" if report.verdict == "pass" else f"alone it is {report.verdict}: {report.reason}"


def _readable_numbers(path: Path) -> list[int]:
    """The numbers of the lines of a JSONL file that are JSON with a number."""
    numbers = []
    for line in path.read_bytes().split(b"\n"):
        try:
            fields = json.loads(line)
            json.dumps(fields, allow_nan=False)
        except (ValueError, RecursionError):
            continue
        if isinstance(fields, dict) and isinstance(fields.get("id"), int):
            numbers.append(fields["id"])
    return numbers


def row_figures(count: int, drawings: int, seed: int) -> tuple[dict[str, Figure], dict[str, Any]]:
    """The figures of so many mutated rows, and what went wrong."""
    torture, jobs = RowTorture(seed, drawings), []
    for kind, share in SHARES.items():
        total = round(count * share)
        jobs += [(kind, min(ROWS_OF_A_FILE, total - start)) for start in range(0, total, ROWS_OF_A_FILE)]
    first = 0
    for kind, rows in track(jobs, "filtering", console=Console(stderr=True), transient=True):
        torture.run(kind, first, rows)
        first += rows
    tally = torture.tally
    figures = {
        "rows": figure(tally.rows),
        "rows_lost": figure(len(tally.lost)),
        "rows_crashes": figure(len(tally.crashes)),
        "rows_silent_passes": figure(len(tally.passes)),
        "neighbours_changed": figure(len(tally.neighbours)),
    }
    trouble = {"rows": tally.lost + tally.crashes + tally.passes + tally.neighbours}
    return figures, trouble | {"inputs_refused": dict(tally.refused), "verdicts": dict(tally.verdicts)}


def combination_figures(count: int, seed: int) -> tuple[dict[str, Figure], dict[str, Any]]:
    """The figures of so many combinations that can be run, and what went wrong."""
    rng, refused, trouble = random.Random(seed), Counter[str](), []
    totals: Counter[str] = Counter()
    for _ in track(range(count), "generating", console=Console(stderr=True), transient=True):
        outcome = None
        while outcome is None:
            totals["drawn"] += 1
            combination = Combination.draw(rng)
            outcome = run_combination(combination)
        totals["captions"] += outcome.captions
        totals["unchecked"] += len(outcome.unchecked)
        refused.update(message[:100] for message in outcome.refused)
        for name in ("crashes", "mismatches", "changed", "passes"):
            totals[name] += len(getattr(outcome, name))
            trouble += [f"{combination}: {name}: {message}" for message in getattr(outcome, name)]
    figures = {
        "combinations": figure(count),
        "combinations_drawn": figure(totals["drawn"]),
        "captions": figure(totals["captions"]),
        "captions_unchecked": figure(totals["unchecked"]),
        "refused": figure(refused.total()),
        "combinations_crashes": figure(totals["crashes"]),
        "combinations_silent_passes": figure(totals["passes"]),
        "changed": figure(totals["changed"]),
        "live_replay_mismatches": figure(totals["mismatches"]),
    }
    return figures, {"combinations": trouble, "combinations_refused": dict(refused)}


Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
Rows = Annotated[int | None, typer.Option("--rows", help="Mutated rows.", show_default="2000, or 160 with --quick")]
Ways = Annotated[int | None, typer.Option("--combinations", help="Ways of generating.", show_default="200, or 20 with --quick")]


Only = Annotated[
    str | None, typer.Option("--only", help="rows or combinations: this part anew, the other one as the file has it.")
]


def main(
    out: Out, quick: Quick = False, seed: Seed = SEED, rows: Rows = None, combinations: Ways = None, only: Only = None
) -> None:
    """Mutate rows, draw ways of generating, and count what goes wrong."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    before = json.loads(out.read_text(encoding="utf-8")) if only and out.is_file() else {"figures": {}, "meta": {}}
    figures, trouble = dict(before["figures"]), dict(before["meta"].get("trouble", {}))
    if only in (None, "rows"):
        found = row_figures(rows or (160 if quick else 2000), 8 if quick else 40, seed)
        figures, trouble = figures | found[0], trouble | found[1]
    if only in (None, "combinations"):
        found = combination_figures(combinations or (20 if quick else 200), seed)
        figures, trouble = figures | found[0], trouble | found[1]
    for name in ("crashes", "silent_passes"):
        parts = (figures.get(f"{part}_{name}") for part in ("rows", "combinations"))
        figures[name] = figure(sum(part["value"] for part in parts if part))
    write(out, figures, quick, seed=seed, trouble=trouble)


if __name__ == "__main__":
    typer.run(main)
