"""Writer of filtered shards: webdataset shards again, with the files that each row had and its results in ``.json``."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gazeguard.filtering.rows import COLUMNS, FileSlice
from gazeguard.filtering.shards import WebDataset
from gazeguard.filtering.writer import FILE_NAMES, LABELLED, replacing, writing

SHARDS = "shards"  # the folder in a run's results


def write_shards(results: Path, source: WebDataset) -> list[Path]:
    """Write the rows of a finished run as shards, ``results/shards/kept/NAME.tar`` and so on for each shard NAME.

    Every file of a row is carried as it is, but for ``.json``: that has what it had, and the result columns. Rows of which the
    shard has no whole file are only in the lines of the results.

    Args:
        results: The folder of a finished run.
        source: What it has filtered.

    Returns:
        The shards, in the order of their names.

    Raises:
        OutputError: They cannot be written.
    """
    names = [LABELLED] if (results / f"{LABELLED}.jsonl").is_file() else list(FILE_NAMES.values())
    written = []
    with writing(results), ExitStack() as stack:
        heads = {name: _Rows(_lines(stack.enter_context((results / f"{name}.jsonl").open("rb")))) for name in names}
        for path in source.paths:
            written += _write_shard(results, source, path, heads)
    return sorted(written)


class _Rows:
    """Result rows in their order, of which the next one can be seen."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self.rows = rows
        self.next: dict[str, Any] | None = next(rows, None)

    def take(self, shard: str, key: str) -> dict[str, Any] | None:
        """The next row if it is this one."""
        row = self.next
        if row is None or (row.get("shard"), row.get("key")) != (shard, key):
            return None
        self.next = next(self.rows, None)
        return row


def _lines(file: Any) -> Iterator[dict[str, Any]]:
    """The rows of a result file that have a key."""
    return (row for row in map(json.loads, file) if row.get("key"))


def _write_shard(results: Path, source: WebDataset, path: Path, heads: Mapping[str, _Rows]) -> list[Path]:
    """Write what has become of one shard."""
    tars: dict[Path, tarfile.TarFile] = {}
    with ExitStack() as stack:
        for key, members in source.samples(path):
            name, row = next(((name, row) for name, rows in heads.items() if (row := rows.take(path.name, key))), ("", None))
            if row is None:
                continue
            target = results / SHARDS / name / path.name
            if target not in tars:
                target.parent.mkdir(parents=True, exist_ok=True)
                tars[target] = stack.enter_context(tarfile.open(fileobj=stack.enter_context(replacing(target)), mode="w"))
            for suffix, part in members:
                if suffix != ".json":
                    _copy(tars[target], f"{key}{suffix}", part)
            content = json.dumps(_described(row)).encode()
            tars[target].addfile(_info(f"{key}.json", len(content)), io.BytesIO(content))
    return list(tars)


def _described(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the row's ``.json`` had, and its results."""
    carried = row.get("json", {})
    return {**(carried if isinstance(carried, dict) else {"json": carried}), **{name: row[name] for name in COLUMNS}}


def _copy(tar: tarfile.TarFile, name: str, part: FileSlice) -> None:
    """Copy a file that is there as a whole."""
    if part.path.stat().st_size < part.start + part.size:
        return
    with part.path.open("rb") as file:
        file.seek(part.start)
        tar.addfile(_info(name, part.size), file)


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info
