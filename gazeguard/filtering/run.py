"""TODO filtering.run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from PIL import Image

from gazeguard.errors import InputError
from gazeguard.filtering.caption_filter import AHEAD, CaptionFilter, picture_of
from gazeguard.filtering.ray import RayPool
from gazeguard.filtering.readers import Row, Source
from gazeguard.filtering.writer import Results
from gazeguard.replay.page import Entry


def replay(keep: CaptionFilter, source: Source, passed: bool = True) -> Iterator[Entry]:
    """The rows of an input in their order, judged, as entries of a replay page; without ``passed`` only what did not pass."""
    numbered = enumerate(source.rows(), 1)
    while rows := list(islice(numbered, keep.batch_size * AHEAD)):
        good = [row for _, row in rows if not row.wrong]
        captions = [row.caption for row in good] if source.captioned else None
        reports = iter(keep.reports([row.image for row in good], captions, [row.prompt for row in good]))
        for number, row in rows:
            told = row.caption if isinstance(row.caption, str) else ""
            report = keep.guard.unchecked(told, row.wrong) if row.wrong else next(reports)
            if passed or report.verdict != "pass":
                picture = picture_of(row.image)
                name = row.own.get(keep.image) or row.own.get("key") or f"row {number}"
                yield Entry(str(name), picture if isinstance(picture, Image.Image) else None, report)


def filter_files(
    keep: CaptionFilter | RayPool,
    source: Source,
    results: Results,
    chunk: int,
    tick: Callable[[int], object] = lambda rows: None,
) -> dict[str, Any]:
    """Judge every row of ``source`` that has no result yet, and put the results together; what ``summary.json`` says.

    chunk: rows between two savings; whatever kills the run costs at most so many. ``tick`` hears of rows done here.
    Raises `InputError` when the input or a folder of other results cannot be used, `OutputError` when writing fails.
    """
    with results.opened():
        if not results.finished():
            first = results.done()
            rows = source.rows(first * chunk)
            batches = iter(lambda: _next(rows, chunk), [])
            for number, made in enumerate(keep.chunks(batches, source.captioned, tick), first):
                results.save(number, made)
        return results.finish(source)


def _next(rows: Iterator[Row], count: int) -> list[Row]:
    try:
        return list(islice(rows, count))
    except (OSError, ValueError) as error:  # Arrow's own are of both kinds
        raise InputError(f"The input cannot be read on: {error}. Rows before are kept; repair it and start anew.") from error
