"""Readers of datasets: JSON lines, image folders, webdataset shards and parquet files, in a fixed order, a few rows at a time.

A reader gives each row once, from any row on. What is wrong with a row is an `error` of that row. Nothing that is in a file is
unpacked to disk, followed as a link, or executed.
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

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
MAX_LINE_BYTES = 2**20
MAX_TEXT_BYTES = 2**20  # of a caption's file
TAR_BLOCK = 512  # bytes of a tar header
TABLE_ROWS = 64  # of a parquet file that are decoded at once


@dataclass(frozen=True)
class FileSlice:
    """Some bytes of a file, read when they are needed."""

    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        """Read the bytes; fewer where the file has become shorter.

        Raises:
            InputError: There are more than an image may have.
        """
        if self.size > MAX_IMAGE_BYTES:
            raise InputError(f"the given image is larger than {MAX_IMAGE_BYTES} bytes. Make it smaller first.")
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True)
class Row:
    """One row of a dataset.

    Attributes:
        fields: What the results repeat of the row, as JSON holds it.
        image: What `gazeguard.filtering.batches.open_image` takes.
        caption: The caption; None where there is none.
        prompt: The prompt that the caption answers; None for the default.
        error: Why the row cannot be used; empty for a good one.
    """

    fields: dict[str, Any]
    image: Any = None
    caption: Any = None
    prompt: str | None = None
    error: str = ""


@dataclass(frozen=True)
class JsonLines:
    """A JSONL file with ``image`` (a path from the file's folder), ``caption``, perhaps ``prompt``, and any other keys."""

    path: Path
    image: str = "image"
    caption: str = "caption"

    def files(self) -> list[Path]:
        """Return the files that make up the dataset."""
        return [self.path]

    def count(self) -> int:
        """Return the number of rows."""
        return sum(1 for _ in self._lines())

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Iterate over the rows from number ``start`` on."""
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
            return Row({"line": number}, error=f"the line is longer than {MAX_LINE_BYTES} bytes")
        try:
            fields = json.loads(line)
            json.dumps(fields, allow_nan=False)  # NaN and 1e999 are read, but are no JSON
        except (ValueError, RecursionError):
            return Row({"line": number}, error="the line is not JSON")
        if not isinstance(fields, dict):
            return Row({"line": number}, error="the line is not a JSON object")
        image, prompt = fields.get(self.image), fields.get("prompt")
        if not isinstance(image, str) or not image:
            return Row(fields, error=f"{self.image!r} is not the path of an image")
        if prompt is not None and not isinstance(prompt, str):
            return Row(fields, error="'prompt' is not text")
        return Row(fields, self.path.parent / image, fields.get(self.caption), prompt)


@dataclass(frozen=True)
class ImageFolder:
    """Images in a folder and below; the caption of ``a/b.jpg`` is in ``a/b.txt``."""

    path: Path

    @cached_property
    def _names(self) -> list[tuple[str, str | None]]:
        """For each row its name without suffix, and the suffix of its image; None for a caption without an image."""
        candidates = (path for path in self.path.rglob("*") if path.suffix.lower() in (*IMAGE_SUFFIXES, ".txt"))
        names = [name for name in sorted(path.relative_to(self.path) for path in candidates) if (self.path / name).is_file()]
        images = [(name.with_suffix("").as_posix(), name.suffix) for name in names if name.suffix.lower() in IMAGE_SUFFIXES]
        stems = {stem for stem, _ in images}
        captions = [name.with_suffix("").as_posix() for name in names if name.suffix == ".txt"]
        orphans = [(stem, None) for stem in captions if stem not in stems]
        return sorted([*images, *orphans], key=lambda row: (row[0], row[1] or ""))

    def files(self) -> list[Path]:
        """Return the files that make up the dataset."""
        paths = (self.path / f"{stem}{end}" for stem, suffix in self._names for end in (suffix, ".txt") if end)
        return [path for path in dict.fromkeys(paths) if path.is_file()]

    def count(self) -> int:
        """Return the number of rows."""
        return len(self._names)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Iterate over the rows from number ``start`` on."""
        for stem, suffix in islice(self._names, start, None):
            if suffix is None:
                yield Row({"image": None, "sidecar": f"{stem}.txt"}, error="there is no image beside the caption")
                continue
            fields: dict[str, Any] = {"image": stem + suffix}
            error, sidecar = "", self.path / f"{stem}.txt"
            try:
                if sidecar.is_file():
                    fields["caption"] = _read_text(sidecar.stat().st_size, sidecar.read_bytes)
            except (OSError, ValueError) as problem:
                error = f"the sidecar cannot be read: {describe_error(problem)}"
            yield Row(fields, self.path / fields["image"], fields.get("caption"), error=error)


@dataclass(frozen=True)
class WebDataset:
    """Webdataset shards (tar files): files of one name before the first dot are a row, as ``img2dataset`` writes them.

    The caption is in ``.txt``, or in ``.json`` as ``caption``. Links and devices are not followed, and a shard that breaks off
    gives a row whose error says so.
    """

    paths: tuple[Path, ...]

    def files(self) -> list[Path]:
        """Return the files that make up the dataset."""
        return list(self.paths)

    def count(self) -> int:
        """Return the number of rows."""
        return sum(1 for path in self.paths for _ in _samples(path))

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Iterate over the rows from number ``start`` on."""
        samples = ((path, sample) for path in self.paths for sample in _samples(path))
        for path, sample in islice(samples, start, None):
            yield self._row(path, *sample)

    def _row(self, path: Path, key: str, parts: Mapping[str, FileSlice], error: str) -> Row:
        fields: dict[str, Any] = {"shard": path.name, "key": key or None}
        if error:
            return Row(fields, error=error)
        image = next((part for suffix, part in parts.items() if suffix in IMAGE_SUFFIXES), None)
        try:
            if ".txt" in parts:
                fields["caption"] = _read_text(parts[".txt"].size, parts[".txt"].read)
            elif ".json" in parts:
                meta = json.loads(_read_text(parts[".json"].size, parts[".json"].read))
                if isinstance(meta, dict) and isinstance(meta.get("caption"), str):
                    fields["caption"] = meta["caption"]
        except (OSError, ValueError, RecursionError) as problem:
            return Row(fields, error=f"the caption cannot be read: {describe_error(problem)}")
        return Row(fields, image, fields.get("caption"), error="" if image else "there is no image in the row")


def _samples(path: Path) -> Iterator[tuple[str, dict[str, FileSlice], str]]:
    """The samples of a shard: key, its files by suffix, and what is wrong with the shard there."""
    key, parts, error = None, {}, ""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for name, part in _members(path, tar):
                    folder, _, base = name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if not stem:
                        continue
                    if (sample := f"{folder}/{stem}".lstrip("/")) != key:
                        if parts:
                            yield key, parts, ""
                        key, parts = sample, {}
                    parts[f".{suffix.lower()}"] = part
                file.seek(tar.offset)
                # tarfile takes a damaged header for the end
                if file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
                    error = "the shard is damaged or breaks off: rows may be missing from here on"
        except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as problem:
            error = f"the shard is damaged or breaks off: {describe_error(problem)}"
    if parts:
        yield key, parts, error and "the shard is damaged or breaks off in this row"
    if error:
        yield "", {}, error


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, FileSlice]]:
    """Names and bytes of the regular files in a tar file."""
    before = -1
    while (member := tar.next()) is not None:
        tar.members.clear()  # or it would remember every member
        if tar.offset <= before:  # a size below zero would lead in a circle
            raise tarfile.ReadError("a size in it is below zero")
        before = tar.offset
        if member.isreg() and not member.issparse():
            yield member.name, FileSlice(path, member.offset_data, member.size)


@dataclass(frozen=True)
class ParquetTable:
    """Parquet files of one schema: a column of images (paths, bytes, or ``{bytes, path}``) and one of captions."""

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

    def files(self) -> list[Path]:
        """Return the files that make up the dataset."""
        return list(self.paths)

    def count(self) -> int:
        """Return the number of rows."""
        return sum(self._open(path).metadata.num_rows for path in self.paths)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Iterate over the rows from number ``start`` on."""
        columns = {self.image, self.caption, "prompt"}
        for path in self.paths:
            file = self._open(path)
            if start >= file.metadata.num_rows:
                start -= file.metadata.num_rows
                continue
            names = [name for name in file.schema_arrow.names if name in columns]
            for batch in file.iter_batches(batch_size=TABLE_ROWS, columns=names):
                if start >= batch.num_rows:
                    start -= batch.num_rows
                    continue
                for row in batch.slice(start).to_pylist():
                    image, prompt = row[self.image], row.get("prompt")
                    image = path.parent / image if isinstance(image, str) else image
                    yield Row({}, image, row.get(self.caption), prompt if isinstance(prompt, str) else None)
                start = 0

    def batches(self, size: int) -> Iterator[Any]:
        """Iterate over the whole table, all of its columns, as record batches of at most ``size`` rows."""
        return chain.from_iterable(self._open(path).iter_batches(batch_size=size) for path in self.paths)

    def _open(self, path: Path) -> Any:
        pa = import_pyarrow()
        try:
            return pa.parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read as parquet: {describe_error(error)}") from error


Source = JsonLines | ImageFolder | WebDataset | ParquetTable


def open_source(path: str | Path, image: str = "image", caption: str = "caption") -> Source:
    """Open a dataset with the reader that fits it.

    Args:
        path: A ``.jsonl``, ``.parquet`` or ``.tar`` file, or a folder of parquet files, of tar files or of images.
        image: Name of the images in JSONL and parquet.
        caption: Name of the captions there.

    Returns:
        The reader.

    Raises:
        InputError: There is nothing that can be read.
    """
    source = _choose_reader(Path(path), image, caption)
    if not isinstance(source, ImageFolder):
        for file in source.files():
            try:
                file.open("rb").close()
            except OSError as error:
                reason = describe_error(error)
                raise InputError(f"{file} cannot be opened: {reason}. Make it readable, or leave it out.") from error
    return source


def _choose_reader(path: Path, image: str, caption: str) -> Source:
    if path.is_file():
        if path.suffix in (".jsonl", ".ndjson"):
            return JsonLines(path, image, caption)
        if path.suffix == ".parquet":
            return ParquetTable((path,), image, caption)
        if path.suffix == ".tar":
            return WebDataset((path,))
        raise InputError(f"{path} is none of .jsonl, .parquet and .tar. Give one of these, or a folder.")
    if not path.is_dir():
        raise InputError(f"{path} does not exist. Give a .jsonl, .parquet or .tar file, or a folder.")
    if tables := sorted(path.glob("*.parquet")):
        return ParquetTable(tuple(tables), image, caption)
    if shards := sorted(path.glob("*.tar")):
        return WebDataset(tuple(shards))
    folder = ImageFolder(path)
    if not folder.count():
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{path} holds no images, no .parquet and no .tar files. Images end in {suffixes}.")
    return folder


def fingerprint(source: Source, root: Path) -> str:
    """Fingerprint a dataset: what a resumed run must find unchanged.

    Args:
        source: The dataset.
        root: Where the names of its files begin, so that a folder may be moved.

    Returns:
        Sixteen hex digits of the names, sizes and times of the dataset's own files. Images that a JSONL or parquet file only
        names are not among them.
    """
    digest = sha256()
    for path in source.files():
        stat = path.stat()
        digest.update(f"{os.path.relpath(path, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def import_pyarrow() -> ModuleType:
    """Import pyarrow with its parquet. Raises `InputError` when it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet needs pyarrow, which is not installed: pip install 'gazeguard-vlm[data]'.") from error
    return pyarrow


def _read_text(size: int, read: Callable[[], bytes]) -> str:
    """The text of a caption's file; raises ValueError."""
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"it is longer than {MAX_TEXT_BYTES} bytes")
    return read().decode("utf-8-sig").strip()


def describe_error(error: Exception) -> str:
    """Return an error in one line, without the path, which the caller names."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
