"""Readers of datasets: JSON lines, image folders, webdataset shards and parquet files, in a fixed order, a few rows at a time.

A reader gives each row once, from any row on. What is wrong with a row is an `error` of that row. Nothing that is in a file is
unpacked to disk, followed as a link, or executed.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from gazeguard.errors import InputError, extra
from gazeguard.filtering.messages import find_messages, read_conversation
from gazeguard.filtering.rows import COLUMNS, IMAGE_SUFFIXES, ROW_COLUMN, Row, image_source
from gazeguard.filtering.shards import WebDataset
from gazeguard.filtering.texts import check_encoding, decode, describe_error, marked_encoding, read_text
from gazeguard.vision.images import MAX_IMAGE_BYTES

# An image in a data: URI is a third longer than its bytes; the limit keeps a file without line ends from filling the memory.
MAX_LINE_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 2**20
MAX_KEPT_TEXT = 2**20  # characters of a line that is too long
MAX_COLUMNS = 20  # that a message names
TABLE_ROWS = 64  # of a parquet file that are decoded at once
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
TABLES = ("metadata.jsonl", "metadata.csv")  # of captions, in folders of images as Hugging Face datasets have them
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class JsonLines:
    """A JSONL file with ``image``, ``caption``, perhaps ``prompt``, and other keys; gzipped and UTF-16 files, too.

    An image is a path from the file's folder, a data: URI, or the slice of a shard that a filter run has written. Rows without
    ``image`` may be conversations, as OpenAI's batch files have them: see `gazeguard.filtering.messages`.

    Attributes:
        path: The file.
        image: Name of the images.
        caption: Name of the captions.
        encoding: Of a file without a byte order mark; None for UTF-8.
    """

    path: Path
    image: str = "image"
    caption: str = "caption"
    encoding: str | None = None

    def files(self) -> list[Path]:
        """Return the files that make up the dataset."""
        return [self.path]

    def count(self) -> int:
        """Return the number of rows."""
        return sum(1 for _ in self._lines())

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Iterate over the rows from number ``start`` on."""
        for number, line in islice(self._lines(), start, None):
            fields = self._fields(number, line)
            yield fields if isinstance(fields, Row) else self._row(fields)

    def columns(self, wanted: Collection[str]) -> list[str]:
        """Return the keys of the rows, in the order in which they come, until all that are ``wanted`` have come."""
        names: dict[str, None] = {}
        for number, line in self._lines():
            fields = self._fields(number, line)
            if isinstance(fields, dict):
                has_both = self.image not in fields and find_messages(fields) is not None
                names |= dict.fromkeys((self.image, self.caption) if has_both else ())
                names |= dict.fromkeys(name for name in fields if len(names) < MAX_COLUMNS or name in wanted)
                if names.keys() >= {*wanted}:
                    break
        return list(names)

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Lines that are not blank, each with its number from 1; the beginning of a line that is too long; None for a break."""
        number = 0
        try:
            with self._open() as file:
                while line := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    end = "\n" if isinstance(line, str) else b"\n"
                    rest = line
                    while not rest.endswith(end) and (rest := file.readline(MAX_LINE_BYTES)):
                        pass
                    if line.strip():
                        yield number, line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield number + 1, None

    def _open(self) -> IO[Any]:
        """The file: binary where it is UTF-8, else text, in which bytes that cannot be decoded are escaped, so no JSON."""
        opened: Callable[..., Any] = gzip.open if self.path.suffix.lower() == ".gz" else open
        with opened(self.path, "rb") as beginning:
            encoding = marked_encoding(beginning.read(4)) or self.encoding or "utf-8"
        file: IO[bytes] = opened(self.path, "rb")
        if encoding in ("utf-8", "utf-8-sig"):
            return file
        return io.TextIOWrapper(file, encoding, errors="backslashreplace", newline="\n")

    def _fields(self, number: int, line: bytes | None) -> dict[str, Any] | Row:
        """What a line holds; or a row that says why it cannot be read, with the text."""
        if line is None:
            return Row({"line": number}, error="the file is damaged or breaks off: rows may be missing from here on")
        kept: dict[str, Any] = {"line": number, "text": line.decode("utf-8", "backslashreplace").strip()}
        if len(line) > MAX_LINE_BYTES:
            return Row(kept | {"text": kept["text"][:MAX_KEPT_TEXT]}, error=f"the line is longer than {MAX_LINE_BYTES} bytes")
        try:
            text = decode(line.removeprefix(codecs.BOM_UTF8), marked=False)
        except ValueError as problem:
            return Row(kept, error=f"the line cannot be read: {problem}")
        try:
            fields = json.loads(text)
            json.dumps(fields, allow_nan=False)  # NaN and 1e999 are read, but are no JSON
        except (ValueError, RecursionError):
            return Row(kept, error="the line is not JSON")
        return fields if isinstance(fields, dict) else Row(kept, error="the line is not a JSON object")

    def _row(self, fields: dict[str, Any]) -> Row:
        value, caption, prompt = (fields.get(name) for name in (self.image, self.caption, "prompt"))
        if self.image not in fields and (messages := find_messages(fields)) is not None:
            talk = read_conversation(messages)
            value, caption, prompt = talk.image, talk.caption if caption is None else caption, prompt or talk.prompt
            if talk.error:
                return Row(fields, None, caption, error=talk.error)
        image = image_source(value, self.path.parent)
        if image is None:
            named = self.image in fields
            why = (
                "is not the path of an image" if named else "is not a key of the row; --image-column names the one of the image"
            )
            return Row(fields, None, caption, error=f"{self.image!r} {why}")
        if prompt is not None and not isinstance(prompt, str):
            return Row(fields, image, caption, error="'prompt' is not text")
        return Row(fields, image, caption, prompt)


@dataclass(frozen=True)
class ImageFolder:
    """Images in a folder and below; the caption of ``a/b.jpg`` is in ``a/b.txt`` or ``a/b.jpg.txt``, in whatever case.

    Attributes:
        path: The folder.
        caption_suffix: Of the files with captions; those of ``.json`` have it as ``caption``.
        encoding: Of captions without a byte order mark; None for UTF-8.
    """

    path: Path
    caption_suffix: str = ".txt"
    encoding: str | None = None

    @cached_property
    def _files(self) -> list[Path]:
        """The files in the folder, relative to it, in the order of their names."""
        return sorted(path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())

    @cached_property
    def _rows(self) -> list[tuple[Path | None, list[Path]]]:
        """The image of each row, and the files beside it that may hold its caption; captions without an image, too."""
        images = [name for name in self._files if name.suffix.lower() in IMAGE_SUFFIXES]
        names_of_images = {name for image in images for name in _names_of(image)}
        sidecars: dict[str, list[Path]] = {}  # by exact name, and by name in whatever case where no image has that name
        for sidecar in self._files:
            if sidecar.suffix.lower() == self.caption_suffix:
                name = sidecar.with_suffix("").as_posix()
                sidecars.setdefault(name if name in names_of_images else name.casefold(), []).append(sidecar)
        rows: list[tuple[Path | None, list[Path]]] = []
        for image in images:
            beside = (sidecars.get(name) or sidecars.get(name.casefold(), []) for name in _names_of(image))
            rows.append((image, list(chain.from_iterable(beside))))
        used = {sidecar for _, beside in rows for sidecar in beside}
        orphans = [(None, [sidecar]) for names in sidecars.values() for sidecar in names if sidecar not in used]
        return sorted([*rows, *orphans], key=_row_order)

    def files(self) -> list[Path]:
        """Return the files that make up the dataset."""
        paths = (self.path / name for image, beside in self._rows for name in (image, *beside) if name)
        return list(dict.fromkeys(paths))

    def count(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def unread(self) -> Counter[str]:
        """Count the files of an image's name that are not read, by suffix, and tables of captions, by name."""
        names = {name.casefold() for image, _ in self._rows if image for name in _names_of(image)}
        others = (path for path in self._files if path.suffix.lower() not in (*IMAGE_SUFFIXES, self.caption_suffix))
        beside = Counter(path.suffix for path in others if path.with_suffix("").as_posix().casefold() in names)
        return beside + Counter(path.name for path in self._files if path.name in TABLES)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Iterate over the rows from number ``start`` on."""
        for image, beside in islice(self._rows, start, None):
            if image is None:
                fields: dict[str, Any] = {"image": None, "sidecar": beside[0].as_posix()}
                yield Row(fields, error="there is no image beside the caption")
                continue
            fields, error = {"image": image.as_posix()}, ""
            try:
                if beside and (caption := self._caption(self.path / beside[0])) is not None:
                    fields["caption"] = caption
            except (OSError, ValueError, RecursionError) as problem:
                error = f"the sidecar cannot be read: {describe_error(problem)}"
            if len(beside) > 1:
                error = f"there are several captions beside the image: {', '.join(name.name for name in beside)}"
            yield Row(fields, self.path / image, fields.get("caption"), error=error)

    def _caption(self, path: Path) -> str | None:
        text = read_text(path.stat().st_size, path.read_bytes, self.encoding)
        if self.caption_suffix != ".json":
            return text
        content = json.loads(text)
        caption = content.get("caption") if isinstance(content, dict) else None
        return caption if isinstance(caption, str) else None


def _names_of(image: Path) -> tuple[str, str]:
    """The names that a sidecar of an image may have before its own suffix."""
    return image.with_suffix("").as_posix(), image.as_posix()


def _row_order(row: tuple[Path | None, list[Path]]) -> tuple[str, str]:
    image, beside = row
    name = image or beside[0]
    return name.with_suffix("").as_posix(), name.suffix if image else ""


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

    def columns(self, _: Collection[str] = ()) -> list[str]:
        """Return the names of the columns."""
        return list(self._open(self.paths[0]).schema_arrow.names)

    def files(self) -> list[Path]:
        """Return the files that make up the dataset."""
        return list(self.paths)

    def count(self) -> int:
        """Return the number of rows."""
        return sum(self._open(path).metadata.num_rows for path in self.paths)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Iterate over the rows from number ``start`` on."""
        columns = {self.image, self.caption, "prompt", *COLUMNS, ROW_COLUMN}
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
                    fields = {name: row[name] for name in COLUMNS} if row.keys() >= {*COLUMNS} else {}
                    yield Row(
                        fields,
                        _from_folder(image, path.parent),
                        row.get(self.caption),
                        prompt if isinstance(prompt, str) else None,
                        number=row.get(ROW_COLUMN),
                    )
                start = 0

    def batches(self, size: int) -> Iterator[Any]:
        """Iterate over the whole table, all of its columns, as record batches of at most ``size`` rows; paths are absolute."""
        for path in self.paths:
            for batch in self._open(path).iter_batches(batch_size=size):
                yield self._with_absolute_paths(batch, path.parent)

    def _with_absolute_paths(self, batch: Any, folder: Path) -> Any:
        types, index = import_pyarrow().types, batch.schema.get_field_index(self.image)
        column = batch.column(index)
        whole = types.is_struct(column.type) and {"bytes", "path"} <= {column.type.field(i).name for i in range(2)}
        if whole and not column.field("bytes").null_count:
            return batch
        if not whole and not (types.is_string(column.type) or types.is_large_string(column.type)):
            return batch
        images = [_from_folder(image, folder) for image in column.to_pylist()]
        images = [str(image) if isinstance(image, Path) else image for image in images]
        return batch.set_column(index, batch.schema.field(index), import_pyarrow().array(images, column.type))

    def _open(self, path: Path) -> Any:
        pa = import_pyarrow()
        try:
            return pa.parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read as parquet: {describe_error(error)}") from error


def _from_folder(image: Any, folder: Path) -> Any:
    """An image of a table whose path, if it has nothing else, begins at a folder."""
    if isinstance(image, str):
        return image_source(image, folder)
    if isinstance(image, Mapping) and image.get("bytes") is None and (path := image.get("path")):
        return {**image, "path": str(image_source(path, folder))}
    return image


Source = JsonLines | ImageFolder | WebDataset | ParquetTable


def open_source(
    path: str | Path, image: str = "image", caption: str = "caption", caption_suffix: str = ".txt", encoding: str | None = None
) -> Source:
    """Open a dataset with the reader that fits it.

    Args:
        path: A ``.jsonl`` (also ``.jsonl.gz``), ``.parquet`` or ``.tar`` file, or a folder of parquet files, of tar files or of
            images.
        image: Name of the images in JSONL and parquet.
        caption: Name of the captions there.
        caption_suffix: Of the files with captions in folders and shards.
        encoding: Of text without a byte order mark; None for UTF-8.

    Returns:
        The reader.

    Raises:
        InputError: There is nothing that can be read; or the encoding is unknown.
    """
    check_encoding(encoding)
    names, texts = (image, caption), (f".{caption_suffix.lstrip('.').lower()}", encoding)
    source = _choose_reader(Path(path).absolute(), names, texts)
    if not isinstance(source, ImageFolder):
        for file in source.files():
            try:
                file.open("rb").close()
            except OSError as error:
                reason = describe_error(error)
                raise InputError(f"{file} cannot be opened: {reason}. Make it readable, or leave it out.") from error
    return source


def _choose_reader(path: Path, names: tuple[str, str], texts: tuple[str, str | None]) -> Source:
    if path.is_file():
        if path.name.lower().endswith(LINE_SUFFIXES):
            return JsonLines(path, *names, texts[1])
        if path.suffix.lower() == ".parquet":
            return ParquetTable((path,), *names)
        if path.suffix.lower() == ".tar":
            return WebDataset((path,), *texts)
        if path.name.lower().endswith(PACKED_SUFFIXES):
            raise InputError(
                f"{path} is a packed tar file, whose images cannot be reached one by one. Unpack it to a .tar first."
            )
        raise InputError(f"{path} is none of .jsonl, .parquet and .tar (.csv is not read). Give one of these, or a folder.")
    if not path.is_dir():
        raise InputError(f"{path} does not exist. Give a .jsonl, .parquet or .tar file, or a folder.")
    inside = sorted(path.iterdir())
    if tables := [file for file in inside if file.suffix.lower() == ".parquet"]:
        return ParquetTable(tuple(tables), *names)
    if shards := [file for file in inside if file.suffix.lower() == ".tar"]:
        return WebDataset(tuple(shards), *texts)
    folder = ImageFolder(path, *texts)
    if not folder.count():
        if lines := [file.name for file in inside if file.name.lower().endswith(LINE_SUFFIXES)]:
            raise InputError(
                f"{path} is no dataset itself, but holds {', '.join(lines[:MAX_COLUMNS])}. Give one of these files."
            )
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{path} holds no images, no .parquet and no .tar files. Images end in {suffixes}.")
    return folder


def check_columns(source: Source, write_captions: bool = False) -> None:
    """Stop before the work where a table lacks a column.

    Args:
        source: The dataset.
        write_captions: Whether captions are written, so that none need be there.

    Raises:
        InputError: No row has an image, or a caption, of that name.
    """
    if not isinstance(source, JsonLines | ParquetTable):
        return
    wanted = {source.image: "Name the images with --image-column."}
    if not write_captions:
        wanted[source.caption] = "Name the captions with --caption-column, or have them written with --write-captions."
    columns = source.columns(wanted)
    for name, advice in wanted.items():
        if columns and name not in columns:
            shown = ", ".join(columns[:MAX_COLUMNS])
            raise InputError(f"{source.files()[0]}: no row has {name!r}; the columns are {shown}. {advice}")


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
    for name, default in (("caption_suffix", ".txt"), ("encoding", None)):
        if (value := getattr(source, name, default)) != default:
            digest.update(f"{name}\0{value}\n".encode())
    for path in source.files():
        stat = path.stat()
        digest.update(f"{os.path.relpath(path, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def import_pyarrow() -> ModuleType:
    """Import pyarrow with its parquet. Raises `InputError` when it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"Parquet needs pyarrow, which is not installed: {extra('data')}.") from error
    return pyarrow
