"""Where do rows come from? Readers of four kinds of input, in a fixed order, that hold a few rows at a time.

What is wrong with one row is said in that row; nothing that is in a file is unpacked to disk, followed as a link, or executed.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from gazeguard.errors import InputError
from gazeguard.vision.images import MAX_IMAGE_BYTES

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
MAX_LINE_BYTES = 2**20
MAX_TEXT_BYTES = 2**20  # of a sidecar
BLOCK = 512  # bytes of a tar header


@dataclass(frozen=True)
class Slice:
    """Some bytes of a file, read when they are wanted."""

    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        """Raises `InputError` for more than a picture may have, or when the file has become shorter."""
        if self.size > MAX_IMAGE_BYTES:
            raise InputError(f"the given picture is larger than {MAX_IMAGE_BYTES} bytes. Make the picture smaller first.")
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True)
class Row:
    """One row of an input.

    own:   what the results repeat of it, as JSON holds it
    wrong: why it cannot be used, or ""
    """

    own: dict[str, Any]
    image: Any = None
    caption: Any = None
    prompt: str | None = None
    wrong: str = ""


@dataclass(frozen=True)
class Lines:
    """A JSONL file: ``image`` (a path from the file's folder), ``caption``, perhaps ``prompt``, and whatever else."""

    path: Path
    image: str = "image"
    caption: str = "caption"

    @cached_property
    def captioned(self) -> bool:
        """Whether there are captions: the first row that is one decides."""
        return next((self.caption in row.own for row in self.rows() if not row.wrong), True)

    def files(self) -> list[Path]:
        return [self.path]

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def rows(self, start: int = 0) -> Iterator[Row]:
        for number, line in islice(self._lines(), start, None):
            yield self._row(number, line)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that are not blank, each with its number from 1; of one that is too long only the beginning."""
        with self.path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                rest = line
                while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                    pass
                if line.strip():
                    yield number, line

    def _row(self, number: int, line: bytes) -> Row:
        if len(line) > MAX_LINE_BYTES:
            return Row({"line": number}, wrong=f"the line is longer than {MAX_LINE_BYTES} bytes")
        try:
            own = json.loads(line)
            json.dumps(own, allow_nan=False)  # NaN and 1e999 are read, but are no JSON
        except (ValueError, RecursionError):
            return Row({"line": number}, wrong="the line is not JSON")
        if not isinstance(own, dict):
            return Row({"line": number}, wrong="the line is not a JSON object")
        image, prompt = own.get(self.image), own.get("prompt")
        if not isinstance(image, str) or not image:
            return Row(own, wrong=f"{self.image!r} is no path of a picture")
        if prompt is not None and not isinstance(prompt, str):
            return Row(own, wrong="'prompt' is no text")
        return Row(own, self.path.parent / image, own.get(self.caption), prompt)


@dataclass(frozen=True)
class Folder:
    """Pictures in a folder and below; the caption of ``a/b.jpg`` is in ``a/b.txt``."""

    path: Path

    @cached_property
    def _names(self) -> list[tuple[str, str | None]]:
        """For each row its name without suffix and the suffix of its picture; None for a sidecar on its own."""
        every = (path for path in self.path.rglob("*") if path.suffix.lower() in (*PICTURES, ".txt"))
        found = sorted(path.relative_to(self.path) for path in every)
        found = [name for name in found if (self.path / name).is_file()]
        pictures = [(name.with_suffix("").as_posix(), name.suffix) for name in found if name.suffix.lower() in PICTURES]
        stems = {stem for stem, _ in pictures}
        texts = [name.with_suffix("").as_posix() for name in found if name.suffix == ".txt"]
        alone = [(stem, None) for stem in texts if stem not in stems]
        return sorted([*pictures, *alone], key=lambda row: (row[0], row[1] or ""))

    @cached_property
    def captioned(self) -> bool:
        """Whether any picture has a sidecar."""
        return any(suffix is None or (self.path / f"{stem}.txt").is_file() for stem, suffix in self._names)

    def files(self) -> list[Path]:
        found = (self.path / f"{stem}{suffix}" for stem, own in self._names for suffix in (own, ".txt") if suffix)
        return [path for path in dict.fromkeys(found) if path.is_file()]

    def count(self) -> int:
        return len(self._names)

    def rows(self, start: int = 0) -> Iterator[Row]:
        for stem, suffix in islice(self._names, start, None):
            if suffix is None:
                yield Row({"image": None, "sidecar": f"{stem}.txt"}, wrong="there is no picture beside the caption")
                continue
            own: dict[str, Any] = {"image": stem + suffix}
            wrong, sidecar = "", self.path / f"{stem}.txt"
            try:
                if sidecar.is_file():
                    own["caption"] = _text(sidecar.stat().st_size, sidecar.read_bytes)
            except (OSError, ValueError) as error:
                wrong = f"the sidecar cannot be read: {reason(error)}"
            yield Row(own, self.path / own["image"], own.get("caption"), wrong=wrong)


@dataclass(frozen=True)
class Shards:
    """Webdataset tars: files of one name before the first dot are a row, as ``img2dataset`` writes them.

    The caption is in ``.txt``, or in ``.json`` as ``caption``. Nothing is unpacked to disk, links and devices are not followed,
    and a shard that breaks off gives an *unchecked* row that says so.
    """

    paths: tuple[Path, ...]

    @cached_property
    def captioned(self) -> bool:
        """Whether the first sample that is whole has a caption."""
        return next(("caption" in row.own for row in self.rows() if not row.wrong), True)

    def files(self) -> list[Path]:
        return list(self.paths)

    def count(self) -> int:
        return sum(1 for path in self.paths for _ in self._samples(path))

    def rows(self, start: int = 0) -> Iterator[Row]:
        for path, sample in islice(((shard, found) for shard in self.paths for found in self._samples(shard)), start, None):
            yield self._row(path, *sample)

    def _samples(self, path: Path) -> Iterator[tuple[str, dict[str, Slice], str]]:
        """Key, the files by suffix, and what is wrong with the shard at this place."""
        key, parts, wrong = None, {}, ""
        with path.open("rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    before = -1
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # or it would remember every member
                        if tar.offset <= before:  # a size below zero would lead in a circle
                            raise tarfile.ReadError("a size in it is below zero")
                        before = tar.offset
                        if not member.isreg() or member.issparse():
                            continue
                        folder, _, base = member.name.rpartition("/")
                        stem, _, suffix = base.partition(".")
                        if not stem:
                            continue
                        if (own := f"{folder}/{stem}".lstrip("/")) != key:
                            if parts:
                                yield key, parts, ""
                            key, parts = own, {}
                        parts[f".{suffix.lower()}"] = Slice(path, member.offset_data, member.size)
                    file.seek(tar.offset)
                    # tarfile takes a damaged header for the end
                    if file.read(BLOCK) != bytes(BLOCK):
                        wrong = "the shard is damaged or breaks off: rows may be missing from here on"
            except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
                wrong = f"the shard is damaged or breaks off: {reason(error)}"
        if parts:
            yield key, parts, wrong and "the shard is damaged or breaks off in this row"
        if wrong:
            yield "", {}, wrong

    def _row(self, path: Path, key: str, parts: Mapping[str, Slice], wrong: str) -> Row:
        own: dict[str, Any] = {"shard": path.name, "key": key or None}
        if wrong:
            return Row(own, wrong=wrong)
        picture = next((part for suffix, part in parts.items() if suffix in PICTURES), None)
        try:
            if ".txt" in parts:
                own["caption"] = _text(parts[".txt"].size, parts[".txt"].read)
            elif ".json" in parts:
                told = json.loads(_text(parts[".json"].size, parts[".json"].read))
                if isinstance(told, dict) and isinstance(told.get("caption"), str):
                    own["caption"] = told["caption"]
        except (OSError, ValueError, RecursionError) as error:
            return Row(own, wrong=f"the caption cannot be read: {reason(error)}")
        return Row(own, picture, own.get("caption"), wrong="" if picture else "there is no picture in the row")


@dataclass(frozen=True)
class Table:
    """Parquet files of one schema: a column of pictures (paths, bytes, or ``{bytes, path}``) and one of captions."""

    paths: tuple[Path, ...]
    image: str = "image"
    caption: str = "caption"

    def __post_init__(self) -> None:
        schema = self._open(self.paths[0]).schema_arrow
        if self.image not in schema.names:
            raise InputError(
                f"{self.paths[0]} has no column {self.image!r}, only {', '.join(schema.names)}. Name it with --image-column."
            )
        for path in self.paths[1:]:
            if not self._open(path).schema_arrow.equals(schema):
                raise InputError(f"{path} has other columns than {self.paths[0]}. Filter the two one after the other.")

    @property
    def captioned(self) -> bool:
        """Whether there is a column of captions."""
        return self.caption in self._open(self.paths[0]).schema_arrow.names

    def files(self) -> list[Path]:
        return list(self.paths)

    def count(self) -> int:
        return sum(self._open(path).metadata.num_rows for path in self.paths)

    def rows(self, start: int = 0) -> Iterator[Row]:
        wanted = {self.image, self.caption, "prompt"}
        for path in self.paths:
            file = self._open(path)
            if start >= file.metadata.num_rows:
                start -= file.metadata.num_rows
                continue
            names = [name for name in file.schema_arrow.names if name in wanted]
            for batch in file.iter_batches(batch_size=64, columns=names):
                if start >= batch.num_rows:
                    start -= batch.num_rows
                    continue
                for row in batch.slice(start).to_pylist():
                    image, prompt = row[self.image], row.get("prompt")
                    image = path.parent / image if isinstance(image, str) else image
                    yield Row({}, image, row.get(self.caption), prompt if isinstance(prompt, str) else None)
                start = 0

    def batches(self, rows: int) -> Iterator[Any]:
        """The whole table again, as record batches of at most so many rows."""
        return chain.from_iterable(self._open(path).iter_batches(batch_size=rows) for path in self.paths)

    def _open(self, path: Path) -> Any:
        pa = arrow()
        try:
            return pa.parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read as parquet: {reason(error)}") from error


Source = Lines | Folder | Shards | Table


def open_input(path: str | Path, image: str = "image", caption: str = "caption") -> Source:
    """The reader that fits a path: ``.jsonl``, ``.parquet``, ``.tar``, or a folder of parquet files, of tars or of pictures.

    Raises `InputError` when there is nothing that could be read.
    """
    source = _reader(Path(path), image, caption)
    if not isinstance(source, Folder):
        for file in source.files():
            try:
                file.open("rb").close()
            except OSError as error:
                raise InputError(f"{file} cannot be opened: {reason(error)}. Make it readable, or leave it out.") from error
    return source


def _reader(path: Path, image: str, caption: str) -> Source:
    if path.is_file():
        if path.suffix in (".jsonl", ".ndjson"):
            return Lines(path, image, caption)
        if path.suffix == ".parquet":
            return Table((path,), image, caption)
        if path.suffix == ".tar":
            return Shards((path,))
        raise InputError(f"{path} is none of .jsonl, .parquet and .tar. Give one of these, or a folder.")
    if not path.is_dir():
        raise InputError(f"{path} does not exist. Give a .jsonl, .parquet or .tar file, or a folder.")
    if found := sorted(path.glob("*.parquet")):
        return Table(tuple(found), image, caption)
    if found := sorted(path.glob("*.tar")):
        return Shards(tuple(found))
    folder = Folder(path)
    if not folder.count():
        endings = ", ".join(sorted(PICTURES))
        raise InputError(f"{path} holds no pictures, no .parquet and no .tar files. Pictures end in {endings}.")
    return folder


def identity(source: Source, root: Path) -> str:
    """Sixteen hex digits of the names, sizes and times of an input's own files: what a resumed run must find unchanged.

    Pictures that a JSONL or parquet file only names are not looked at.
    """
    digest = sha256()
    for path in source.files():
        told = path.stat()
        digest.update(f"{os.path.relpath(path, root)}\0{told.st_size}\0{told.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def arrow() -> ModuleType:
    """pyarrow with its parquet. Raises `InputError` when it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet needs pyarrow, which is not installed: pip install 'gazeguard[data]'.") from error
    return pyarrow


def _text(size: int, read: Callable[[], bytes]) -> str:
    """The text of a sidecar; raises ValueError."""
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"it is longer than {MAX_TEXT_BYTES} bytes")
    return read().decode("utf-8-sig").strip()


def reason(error: Exception) -> str:
    """An error in one line, without the path, which the caller names."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    said = str(getattr(error, "strerror", None) or error).strip()
    return said.splitlines()[0] if said else type(error).__name__
