"""Filter run: a loop over the chunks of a dataset that saves each, shows its progress, and goes on after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gazeguard.errors import InputError
from gazeguard.filtering.batches import PREFETCHED, open_image
from gazeguard.filtering.caption_filter import CaptionFilter, OnRows, ignore_rows
from gazeguard.filtering.ray import RayActorPool
from gazeguard.filtering.readers import Source
from gazeguard.filtering.rows import Row
from gazeguard.filtering.writer import Results
from gazeguard.progress import bar
from gazeguard.replay.page import Entry
from gazeguard.report import Report
from gazeguard.vision.images import BACKGROUND, URI


def filter_files(
    caption_filter: CaptionFilter | RayActorPool,
    source: Source,
    results: Results,
    chunk: int,
    on_rows: OnRows = ignore_rows,
    progress: bool = False,
) -> dict[str, Any]:
    """Judge every row of a dataset that has no result yet, and put the results together.

    Args:
        caption_filter: Judges the rows.
        source: The dataset.
        results: The folder of the results.
        chunk: Rows between two savings: whatever kills the run costs at most so many.
        on_rows: Is told how many more rows are done.
        progress: Show a bar with rate and remaining time on stderr.

    Returns:
        What ``summary.json`` says.

    Raises:
        InputError: The input, or a folder of other results, cannot be used.
        OutputError: Nothing can be written.
    """
    total = source.count() if progress else 0
    with results.open():
        if not results.finished():
            first = results.finished_chunks()
            with row_progress("filtering", total, min(total, first * chunk), disable=not progress) as advance:

                def count(rows: int) -> None:
                    advance(rows)
                    on_rows(rows)

                chunks = _chunks(source.rows(first * chunk), chunk)
                for number, rows in enumerate(caption_filter.filter_chunks(chunks, count), first):
                    results.save(number, rows)
        return results.finish(source)


def judged_rows(caption_filter: CaptionFilter, source: Source) -> Iterator[tuple[Row, Report]]:
    """Iterate over the rows of a dataset in their order, each with the report of a filter."""
    every = source.rows()
    while rows := list(islice(every, caption_filter.batch_size * PREFETCHED)):
        good = [row for row in rows if not row.error]
        columns = [[getattr(row, name) for row in good] for name in ("image", "caption", "prompt")]
        reports = iter(caption_filter.reports(*columns))
        for row in rows:
            caption = row.caption if isinstance(row.caption, str) else ""
            yield row, caption_filter.guard.unchecked(caption, row.error) if row.error else next(reports)


def replay_entries(
    judged: Iterable[tuple[Row, Report]], image: str, include_passed: bool = True, background: str = BACKGROUND
) -> Iterator[Entry]:
    """Iterate over rows with their reports as entries of a replay page.

    Args:
        judged: The rows, such as those of `judged_rows`.
        image: Name of the images.
        include_passed: Whether captions that passed are among them.
        background: The colour on which transparent images are composed.
    """
    for number, (row, report) in enumerate(judged, 1):
        if include_passed or report.verdict != "pass":
            name = _image_name(row.fields.get(image, row.image)) or row.fields.get("key") or f"row {row.number or number}"
            opened = open_image(row.image, background)
            yield Entry(str(name), opened if isinstance(opened, Image.Image) else None, report)


def _image_name(image: Any) -> str:
    """The path of an image as its row has it, of absolute ones the name alone; "" where the row has none."""
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str | Path) or URI.match(str(path)):
        return ""
    return Path(path).name if Path(path).is_absolute() else str(path)


class _Rate(ProgressColumn):
    """Rows per second, of this run alone."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} rows/s", style="progress.data.speed")


@contextmanager
def row_progress(description: str, total: int, completed: int = 0, *, disable: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with rate and remaining time on stderr.

    Args:
        description: What is done.
        total: How many rows there are.
        completed: How many of them an earlier run has done.
        disable: Show nothing.

    Yields:
        A function that is told how many more rows are done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    if disable:
        yield lambda rows: None
        return
    with bar(*columns) as progress:
        task = progress.add_task(description, total=total, completed=completed)
        yield lambda rows: progress.advance(task, rows)


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """The rows, so many at a time."""
    while True:
        try:
            chunk = list(islice(rows, size))
        except (OSError, ValueError) as error:  # Arrow's own are of both kinds
            raise InputError(
                f"The input cannot be read further: {error}. Earlier rows are kept; repair the input and start again."
            ) from error
        if not chunk:
            return
        yield chunk
