"""Reader of webdataset shards (tar files): the files of one key are a row, wherever in the shard they stand."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from gazeguard.filtering.rows import IMAGE_SUFFIXES, FileSlice, Row
from gazeguard.filtering.texts import decode, describe_error, read_text

TAR_BLOCK = 512  # bytes of a tar header
BROKEN = "the shard is damaged or breaks off"

Members = list[tuple[str, FileSlice]]  # suffix and bytes


@dataclass
class _Shard:
    """What stands in a shard: the files of each key, in the order in which the keys come first, and what is wrong with it."""

    samples: dict[str, Members] = field(default_factory=dict)
    error: str = ""
    last: str = ""  # the key at which it breaks off


@dataclass(frozen=True)
class WebDataset:
    """Webdataset shards (tar files), as ``img2dataset`` writes them.

    The files of one name before the first dot are a row. Where that puts several captioned images together, as it does for
    ``22.05.png`` and ``22.06.png``, the name before the last dot counts. The files of a row need not stand side by side. The
    caption is in ``.txt``, or in ``.json`` as ``caption``; what ``.json`` holds is passed on. Links and devices are not
    followed, and a shard that breaks off gives a row whose error says so.

    Attributes:
        paths: The shards.
        caption_suffix: Of the files with captions.
        encoding: Of captions without a byte order mark; None for UTF-8.
    """

    paths: tuple[Path, ...]
    caption_suffix: str = ".txt"
    encoding: str | None = None

    def files(self) -> list[Path]:
        """Return the files that make up the dataset."""
        return list(self.paths)

    def count(self) -> int:
        """Return the number of rows."""
        return sum(1 for path in self.paths for _ in _samples(path, self.caption_suffix))

    def unread(self) -> Counter[str]:
        """Count the files that are not read, by suffix."""
        known = {*IMAGE_SUFFIXES, self.caption_suffix, ".json"}
        samples = (members for path in self.paths for _, members, _ in _samples(path, self.caption_suffix))
        return Counter(suffix for members in samples for suffix, _ in members if suffix not in known)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Iterate over the rows from number ``start`` on."""
        samples = ((path, sample) for path in self.paths for sample in _samples(path, self.caption_suffix))
        for path, sample in islice(samples, start, None):
            yield self._row(path, *sample)

    def samples(self, path: Path) -> Iterator[tuple[str, Members]]:
        """Iterate over the rows of a shard as they are: key, and the files of it."""
        return ((key, members) for key, members, _ in _samples(path, self.caption_suffix) if key)

    def _row(self, path: Path, key: str, members: Members, error: str) -> Row:
        fields: dict[str, Any] = {"shard": path.name, "key": key or None}
        images = [part for suffix, part in members if suffix in IMAGE_SUFFIXES]
        if len(images) == 1:
            fields["image"] = images[0].to_dict()
        try:
            fields |= self._texts(dict(members))
        except (OSError, ValueError, RecursionError) as problem:
            error = error or f"the caption cannot be read: {describe_error(problem)}"
        error = error or _member_error(members, len(images))
        return Row(fields, images[0] if images else None, fields.get("caption"), error=error)

    def _texts(self, parts: Mapping[str, FileSlice]) -> dict[str, Any]:
        """The caption, and what the .json holds: as JSON, or as text where it is none."""
        texts: dict[str, Any] = {}
        if text := parts.get(self.caption_suffix):
            texts["caption"] = read_text(text.size, text.read, self.encoding)
        if (meta := parts.get(".json")) and self.caption_suffix != ".json":
            content = read_text(meta.size, meta.read)
            try:
                texts["json"] = json.loads(content)
                json.dumps(texts["json"], allow_nan=False)
            except (ValueError, RecursionError):
                if text is None:
                    raise
                texts["json"] = content
            if text is None and isinstance(texts["json"], dict) and isinstance(texts["json"].get("caption"), str):
                texts["caption"] = texts["json"]["caption"]
        elif meta:
            texts["json"] = json.loads(decode(meta.read()))
            texts["caption"] = texts["json"].get("caption") if isinstance(texts["json"], dict) else None
        return texts


def _member_error(members: Members, images: int) -> str:
    """Why the files of a key are no row; empty for a good one."""
    if not images:
        return "there is no image in the row"
    if images > 1:
        return f"the row has {images} images: which one the caption describes is not known"
    if twice := [suffix for suffix, number in Counter(suffix for suffix, _ in members).items() if number > 1]:
        return f"the shard has several files of one name: {', '.join(twice)}"
    return ""


def _samples(path: Path, caption_suffix: str) -> Iterator[tuple[str, Members, str]]:
    """The samples of a shard: key, its files, and what is wrong with the shard there."""
    shard = _read_shard(path)
    captions = (caption_suffix, ".json")
    for stem, members in shard.samples.items():
        for key, files in _split_key(stem, members, captions):
            error = ""
            if shard.error and stem == shard.last:
                error = f"{BROKEN} in this row"
            elif shard.error and not any(suffix in captions for suffix, _ in files):
                error = f"{BROKEN}: the caption may be behind the break"
            yield key, files, error
    if shard.error:
        yield "", [], shard.error


def _split_key(stem: str, members: Members, captions: tuple[str, ...]) -> Iterator[tuple[str, Members]]:
    """The rows among files of one name before the first dot: one, unless names that go on are rows of their own."""
    groups: dict[str, Members] = {}
    for suffix, part in members:
        inner, _, last = suffix[1:].rpartition(".")
        if f".{inner.lower()}" in IMAGE_SUFFIXES and f".{last.lower()}" in captions:
            inner = ""  # x.png.txt is the caption of x.png
        groups.setdefault(f"{stem}.{inner}" if inner else stem, []).append((f".{last.lower()}", part))
    plain = groups.pop(stem, None)
    extra: Members = []
    rows: list[tuple[str, Members]] = []
    for key, files in groups.items():
        suffixes = {suffix for suffix, _ in files}
        complete = suffixes & IMAGE_SUFFIXES and suffixes & {*captions}
        if plain is None or complete:
            rows.append((key, files))
        else:  # such as 001.mask.png beside 001.png: part of the row, not its image
            extra += [(f"{key[len(stem) :]}{suffix}", part) for suffix, part in files]
    if plain is not None:
        yield stem, plain + extra
    yield from rows


def _read_shard(path: Path) -> _Shard:
    shard = _Shard()
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for name, part in _members(path, tar):
                    folder, _, base = name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if stem:
                        shard.last = f"{folder}/{stem}".lstrip("/")
                        shard.samples.setdefault(shard.last, []).append((f".{suffix}", part))
                file.seek(tar.offset)
                # tarfile takes a damaged header for the end
                if file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
                    shard.error = f"{BROKEN}: rows may be missing from here on"
        except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as problem:
            shard.error = f"{BROKEN}: {describe_error(problem)}"
    return shard


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, FileSlice]]:
    """Names and bytes of the regular files in a tar file."""
    before = -1
    while (member := tar.next()) is not None:
        vars(tar)["members"].clear()  # or it would remember every member
        if tar.offset <= before:  # a size below zero would lead in a circle
            raise tarfile.ReadError("a size in it is below zero")
        before = tar.offset
        if member.isreg() and not member.issparse():
            yield member.name, FileSlice(path, member.offset_data, member.size)
