"""Files of public benchmarks: strict rows of bounded size; an error names the file, the line and the remedy."""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gazeguard.errors import GazeGuardError, InputError

MAX_FILE_BYTES = 64 * 2**20  # after unpacking; the largest file of the benchmarks has 8 MB
DATA_VARIABLE = "GAZEGUARD_EVALDATA"
DATA = Path(os.environ.get(DATA_VARIABLE, "evaldata"))
Data = Annotated[Path, typer.Option("--data", help=f"Folder of public data: chair/, amber/; or set {DATA_VARIABLE}.")]
Text = Annotated[str, Field(max_length=100_000)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


def also(*names: str) -> Any:
    """A key that files of other tools call otherwise; the first of the names that a row has counts."""
    return Field(validation_alias=AliasChoices(*names))


class Row(BaseModel):
    """A row of a file. Types are strict; unknown keys (the prompt, the model's name) are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


R = TypeVar("R", bound=Row)


def read_lines(path: Path, kind: type[R]) -> list[R]:
    """The rows of a JSON Lines file, blank lines left out. Raises `InputError` with the number of the first bad line."""
    rows = []
    for number, line in enumerate(_content(path).split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(kind.model_validate_json(line))
            except ValidationError as error:
                raise InputError(
                    f"{path}, line {number}: {_first(error)}. Each line is one JSON object: {_keys(kind)}."
                ) from error
    if not rows:
        raise InputError(f"{path} holds no rows. Each line is one JSON object: {_keys(kind)}.")
    return rows


def read_json(path: Path, kind: Any, what: str, max_bytes: int | None = None) -> Any:
    """A JSON file, plain or ``.gz``, as ``kind``; ``what`` is its content in words, ``max_bytes`` by default MAX_FILE_BYTES.

    Raises `InputError` with the position of the first error.
    """
    try:
        return TypeAdapter(kind).validate_json(_content(path, max_bytes))
    except ValidationError as error:
        location = error.errors(include_url=False)[0]["loc"]
        item = f"item {location[0] + 1}" if location and isinstance(location[0], int) else "the file"
        raise InputError(f"{path}, {item}: {_first(error)}. The file should hold {what}.") from error


def read_words(path: Path) -> list[str]:
    """The lines of a text file. Raises `InputError`."""
    try:
        return _content(path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}. It should hold one word a line.") from error


def only_once(path: Path, name: str, ids: Iterable[int]) -> None:
    """Raise `InputError` when an id is repeated: which of the two rows to count would be a guess."""
    seen: set[int] = set()
    for each in ids:
        if each in seen:
            raise InputError(f"{path} has {name} {each} more than once. Give one row for each.")
        seen.add(each)


def digests(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> the first 16 hex digits of its SHA-256, for the result file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


@contextmanager
def errors_told() -> Iterator[None]:
    """An error that GazeGuard raises becomes one line on stderr and exit code 2."""
    try:
        yield
    except GazeGuardError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _content(path: Path, max_bytes: int | None = None) -> bytes:
    max_bytes = max_bytes or MAX_FILE_BYTES
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read: {error}. Check the path; --data or {DATA_VARIABLE} gives the benchmarks' own files."
        ) from error
    if len(content) > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes} bytes, more than any file of these benchmarks. Split it.")
    return content


def _first(error: ValidationError) -> str:
    """The first error, and its key."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = next((part for part in reversed(first["loc"]) if isinstance(part, str)), None)
    return f"{key}: {first['msg']}" if key else first["msg"]


def _keys(row: type[Row]) -> str:
    """The keys of a row, in words."""
    nouns = {int: "a whole number", str: "text"}
    return ", ".join(f"{name} ({nouns.get(field.annotation, 'yes or no')})" for name, field in row.model_fields.items())
