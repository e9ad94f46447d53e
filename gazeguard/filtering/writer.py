"""Where do verdicts go? A folder of results that no kill can spoil: each row once, in the order of the input.

Rows go in numbered chunks. A chunk's results are a file of their own in ``OUT/parts``, written beside its place, synced and
then renamed into it, so that it is there as a whole or not at all. A run that was killed finds the finished chunks and goes on
behind them. At the end the parts are put together in order, and only then removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from gazeguard.errors import InputError, OutputError
from gazeguard.filtering.readers import Source, Table, arrow, reason

try:
    import fcntl
except ImportError:  # Windows: there two runs into one folder are not kept apart
    fcntl = None

PLACES = {"pass": "kept", "flag": "flagged", "unchecked": "excluded"}
LABELLED = "labelled"
TABLE_ROWS = 1024  # of a parquet file that are in memory at once


@dataclass(frozen=True)
class Results:
    """The folder of one run, and its finished chunks.

    run:        what made the results, name -> short text; a folder that holds the results of anything else is refused
    label_only: every row into one file, in order, instead of one file per verdict
    """

    folder: Path
    run: dict[str, str]
    label_only: bool = False

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    @contextmanager
    def opened(self) -> Iterator[Results]:
        """Make the folder, or find in it what an earlier run of the same kind left.

        Raises `InputError` for a folder with anything else in it, and while another run writes there; `OutputError` when
        nothing can be written there.
        """
        with ExitStack() as stack:
            with _writing(self.folder):
                self._prepare(stack)
            yield self

    def _prepare(self, stack: ExitStack) -> None:
        found = next((path for path in (self.summary, self.parts / "run.json") if path.is_file()), None)
        if found is not None:
            self._compare(found)
        elif self.folder.is_dir() and any(path.name != "parts" for path in self.folder.iterdir()):
            raise InputError(f"{self.folder} is not empty, and what is in it is no run to go on with. Choose another folder.")
        if self.finished():
            return
        self.parts.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((self.parts / "lock").open("w"))
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"Another run is writing into {self.folder}. Wait for it, or stop it.") from error
        if found is None:
            replace(self.parts / "run.json", json.dumps(self.run, indent=1).encode())

    def _compare(self, found: Path) -> None:
        try:
            told = json.loads(found.read_bytes())
            told = told["run"] if found == self.summary else told
            other = sorted(name for name in {*told, *self.run} if told.get(name) != self.run.get(name))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{found} is not what a run writes. Choose another folder, or remove {self.folder}.") from error
        if other:
            raise InputError(
                f"{self.folder} holds a run with another {', another '.join(other)}, which cannot go on as this one. "
                "Give the same input and settings, choose another folder, or remove it."
            )

    def finished(self) -> bool:
        """Whether the results are complete."""
        return self.summary.is_file()

    def done(self) -> int:
        """How many chunks are finished, counted from the first."""
        number = 0
        while self.part(number).is_file():
            number += 1
        return number

    def part(self, number: int) -> Path:
        return self.parts / f"{number:08}.jsonl"

    def save(self, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a chunk. Raises `OutputError`, and leaves nothing half written under its name."""
        with _writing(self.folder):
            replace(self.part(number), b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows))

    def finish(self, source: Source) -> dict[str, Any]:
        """Put the chunks together, write the summary, remove the parts; what the summary says. Safe to be killed in, too."""
        if self.finished():
            shutil.rmtree(self.parts, ignore_errors=True)
            return json.loads(self.summary.read_bytes())
        places = [LABELLED] if self.label_only else list(PLACES.values())
        suffix = ".parquet" if isinstance(source, Table) else ".jsonl"
        counts, phrases, reasons = Counter(), Counter(), {verdict: Counter() for verdict in PLACES}
        with _writing(self.folder), ExitStack() as stack:
            paths = {place: self.folder / f"{place}{suffix}" for place in places}
            files = {place: stack.enter_context(_beside(path)) for place, path in paths.items()}
            lines = self._lines(counts, phrases, reasons)
            if isinstance(source, Table):
                _fill_tables(source, files, lines)
            else:
                for verdict, line, _ in lines:
                    files[self._place(verdict)].write(line)
            stack.close()
            told = {
                "rows": counts.total(),
                **{place: counts[verdict] for verdict, place in PLACES.items()},
                "reasons": {verdict: dict(sorted(found.items())) for verdict, found in reasons.items() if found},
                "flagged_phrases": dict(sorted(phrases.items())),
                "files": [path.name for path in paths.values()],
                "run": self.run,
            }
            replace(self.summary, json.dumps(told, indent=1).encode() + b"\n")
        shutil.rmtree(self.parts, ignore_errors=True)
        return told

    def _place(self, verdict: str) -> str:
        return LABELLED if self.label_only else PLACES[verdict]

    def _lines(
        self, counts: Counter[str], phrases: Counter[str], reasons: dict[str, Counter[str]]
    ) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """Every line of every part with its verdict and its values, counted."""
        for number in range(self.done()):
            with self.part(number).open("rb") as part:
                for line in part:
                    row = json.loads(line)
                    counts[row["gaze_verdict"]] += 1
                    if row["gaze_reason"]:
                        reasons[row["gaze_verdict"]][kind_of(row["gaze_reason"])] += 1
                    phrases.update(phrase["kind"] for phrase in row["gaze_phrases"] if phrase["flagged"])
                    yield row["gaze_verdict"], line, row


def _fill_tables(source: Table, files: Mapping[str, IO[bytes]], lines: Iterator[tuple[str, bytes, dict[str, Any]]]) -> None:
    """Write the rows of a table, each followed by its verdict, to the file of its verdict, or all to the only file."""
    pa = arrow()
    writers: dict[str, Any] = {}
    with ExitStack() as stack:
        for batch in source.batches(1024):
            told = [(verdict, row) for verdict, _, row in islice(lines, batch.num_rows)]
            added = {name: [row[name] for _, row in told] for name in told[0][1]}
            table = labelled(pa.Table.from_batches([batch]), added)
            table = table.replace_schema_metadata(None)  # datasets' own describes the columns before
            for place, file in files.items():
                if place not in writers:
                    writers[place] = stack.enter_context(pa.parquet.ParquetWriter(file, table.schema))
                mask = pa.array([place == LABELLED or PLACES[verdict] == place for verdict, _ in told])
                if (chosen := table.filter(mask)).num_rows:
                    writers[place].write_table(chosen)


def labelled(table: Any, added: Mapping[str, Sequence[Any]]) -> Any:
    """An Arrow table with columns of verdicts behind its own, in place of those of the same names. Their types are fixed."""
    pa = arrow()
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
    types = {"gaze_risk": pa.float64(), "gaze_phrases": pa.list_(phrase)}
    table = table.drop_columns([name for name in added if name in table.column_names])
    for name, values in added.items():
        table = table.append_column(name, pa.array(values, types.get(name, pa.string())))
    return table


def kind_of(said: str) -> str:
    """A reason without what is particular to its row, so that reasons can be counted."""
    return re.sub(r"\d+", "N", re.split(r": | \(", said, maxsplit=1)[0])


def replace(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all, also when the power fails."""
    with _beside(path) as file:
        file.write(data)


@contextmanager
def _beside(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` at the end, unless something is raised."""
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
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {reason(error)}. Finished chunks are kept: put this right, and give the same "
            "command again."
        ) from error
