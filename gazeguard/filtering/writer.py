"""Result folder of a filter run, which no kill can spoil: each row once, in the order of the input.

Rows go in numbered chunks. A chunk's results are a file of their own in ``OUT/parts``, written under another name, synced
and then renamed, so that it is there as a whole or not at all. A run that was killed finds the finished chunks and goes on
behind them. At the end the parts are put together in order, and only then removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from gazeguard.errors import InputError, OutputError
from gazeguard.filtering.columns import append_columns
from gazeguard.filtering.readers import ImageFolder, ParquetTable, Source, WebDataset, import_pyarrow
from gazeguard.filtering.rows import ROW_COLUMN
from gazeguard.filtering.texts import describe_error

try:
    import fcntl
except ImportError:  # Windows: there two runs into one folder are not kept apart
    CAN_LOCK = False
else:
    CAN_LOCK = True

FILE_NAMES = {"pass": "kept", "flag": "flagged", "unchecked": "excluded"}  # of each verdict
LABELLED = "labelled"  # the name of the only file with label_only
TABLE_ROWS = 1024  # of a parquet file that are in memory at once


class _Result(NamedTuple):
    """One row of the results: its values, and the line of JSON that they stand in."""

    values: dict[str, Any]
    line: bytes

    @property
    def verdict(self) -> str:
        return self.values["gaze_verdict"]


@dataclass(frozen=True)
class _Counts:
    """What the summary counts."""

    verdicts: Counter[str] = field(default_factory=Counter)
    phrases: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: {verdict: Counter() for verdict in FILE_NAMES})

    def add(self, row: Mapping[str, Any]) -> None:
        self.verdicts[row["gaze_verdict"]] += 1
        if row["gaze_reason"]:
            self.reasons[row["gaze_verdict"]][reason_category(row["gaze_reason"])] += 1
        self.phrases.update(phrase["kind"] for phrase in row["gaze_phrases"] if phrase["flagged"])

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self.verdicts.total(),
            **{name: self.verdicts[verdict] for verdict, name in FILE_NAMES.items()},
            "reasons": {verdict: dict(sorted(reasons.items())) for verdict, reasons in self.reasons.items() if reasons},
            "flagged_phrases": dict(sorted(self.phrases.items())),
        }


@dataclass(frozen=True)
class Results:
    """The folder of one run, and its finished chunks.

    Attributes:
        folder: Where the results go.
        run: What makes the results, name -> short text; a folder with the results of anything else is refused.
        label_only: Every row into one file, in order, instead of one file per verdict.
    """

    folder: Path
    run: dict[str, str]
    label_only: bool = False

    @property
    def parts(self) -> Path:
        """The folder of finished chunks."""
        return self.folder / "parts"

    @property
    def summary(self) -> Path:
        """The summary, which a finished run has."""
        return self.folder / "summary.json"

    @contextmanager
    def open(self) -> Iterator[Results]:
        """Make the folder, or find in it what an earlier run of the same kind left.

        Raises:
            InputError: The folder has anything else in it, or another run is writing there.
            OutputError: Nothing can be written there.
        """
        with ExitStack() as stack:
            with writing(self.folder):
                self._prepare(stack)
            yield self

    def _prepare(self, stack: ExitStack) -> None:
        earlier = next((path for path in (self.summary, self.parts / "run.json") if path.is_file()), None)
        if earlier is not None:
            self._compare(earlier)
        elif self.folder.is_dir() and any(path.name != "parts" for path in self.folder.iterdir()):
            raise InputError(f"{self.folder} is not empty, and holds no run that can be continued. Choose another folder.")
        if self.finished():
            return
        self.parts.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((self.parts / "lock").open("w"))
        if CAN_LOCK:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"Another run is writing into {self.folder}. Wait for it, or stop it.") from error
        if earlier is None:
            replace_file(self.parts / "run.json", json.dumps(self.run, indent=1).encode())

    def _compare(self, earlier: Path) -> None:
        try:
            run = json.loads(earlier.read_bytes())
            run = run["run"] if earlier == self.summary else run
            different = sorted(name for name in {*run, *self.run} if run.get(name) != self.run.get(name))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{earlier} is not what a run writes. Choose another folder, or remove {self.folder}.") from error
        if different:
            raise InputError(
                f"{self.folder} holds a run with another {', another '.join(different)}, so this run cannot continue it. "
                "Give the same input and settings, choose another folder, or remove it."
            )

    def finished(self) -> bool:
        """Return whether the results are complete."""
        return self.summary.is_file()

    def finished_chunks(self) -> int:
        """Return how many chunks are finished, counted from the first."""
        number = 0
        while self.part(number).is_file():
            number += 1
        return number

    def part(self, number: int) -> Path:
        """Return the file of a chunk."""
        return self.parts / f"{number:08}.jsonl"

    def save(self, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a chunk as a whole. Raises `OutputError`, and leaves nothing half written under its name."""
        with writing(self.folder):
            replace_file(self.part(number), b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))

    def finish(self, source: Source) -> dict[str, Any]:
        """Put the chunks together, write the summary, and remove the parts. Safe to be killed in, too.

        Args:
            source: The dataset; the results of a table are tables, with all of its columns.

        Returns:
            What ``summary.json`` says.
        """
        if self.finished():
            shutil.rmtree(self.parts, ignore_errors=True)
            return json.loads(self.summary.read_bytes())
        suffix = ".parquet" if isinstance(source, ParquetTable) else ".jsonl"
        paths = {name: self.folder / f"{name}{suffix}" for name in ([LABELLED] if self.label_only else FILE_NAMES.values())}
        counts = _Counts()
        with writing(self.folder), ExitStack() as stack:
            files = {name: stack.enter_context(replacing(path)) for name, path in paths.items()}
            results = self._results(counts)
            if isinstance(source, ParquetTable):
                _write_tables(source, files, results)
            else:
                for result in results:
                    files[LABELLED if self.label_only else FILE_NAMES[result.verdict]].write(result.line)
            stack.close()
            unread = source.unread() if isinstance(source, ImageFolder | WebDataset) else {}
            summary = {**counts.summary(), **({"unread": dict(sorted(unread.items()))} if unread else {})}
            summary |= {"files": [path.name for path in paths.values()], "run": self.run}
            replace_file(self.summary, json.dumps(summary, indent=1).encode() + b"\n")
        shutil.rmtree(self.parts, ignore_errors=True)
        return summary

    def _results(self, counts: _Counts) -> Iterator[_Result]:
        """Every row of every chunk, counted."""
        for number in range(self.finished_chunks()):
            with self.part(number).open("rb") as part:
                for line in part:
                    result = _Result(json.loads(line), line)
                    counts.add(result.values)
                    yield result


def _write_tables(source: ParquetTable, files: Mapping[str, IO[bytes]], results: Iterator[_Result]) -> None:
    """Write the rows of a table, each followed by its results, to the file of its verdict, or all to the only file."""
    pa = import_pyarrow()
    writers: dict[str, Any] = {}
    number = 1
    with ExitStack() as stack:
        for batch in source.batches(TABLE_ROWS):
            rows = list(islice(results, batch.num_rows))
            added = {name: [row.values[name] for row in rows] for name in rows[0].values}
            added[ROW_COLUMN] = list(range(number, number + len(rows)))
            number += len(rows)
            table = append_columns(pa.Table.from_batches([batch]), added)
            table = table.replace_schema_metadata(None)  # datasets' own describes the columns before
            for name, file in files.items():
                if name not in writers:
                    writers[name] = stack.enter_context(pa.parquet.ParquetWriter(file, table.schema))
                mask = pa.array([name in (LABELLED, FILE_NAMES[row.verdict]) for row in rows])
                if (chosen := table.filter(mask)).num_rows:
                    writers[name].write_table(chosen)


def reason_category(reason: str) -> str:
    """Return a reason without what is particular to its row, so that reasons can be counted."""
    return re.sub(r"\d+", "N", re.split(r": | \(", reason, maxsplit=1)[0])


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all, also when the power fails."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write that takes the place of ``path`` at the end, unless something is raised."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the name itself is not on the disk before its folder is
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of the system into an `OutputError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {describe_error(error)}. Finished chunks are kept: solve this, and run the same "
            "command again."
        ) from error
