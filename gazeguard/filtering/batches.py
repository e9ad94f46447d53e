"""Prefetcher of the batch filter: images are opened and batches encoded by threads while the model works on an earlier one."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gazeguard.errors import InputError
from gazeguard.filtering.rows import FileSlice
from gazeguard.filtering.texts import describe_error
from gazeguard.tracing import Prepared
from gazeguard.vision.images import BACKGROUND, URI, image_key, load_image

PREFETCHED = 2  # batches that are made ready while the model works on another one


@dataclass(frozen=True, eq=False)
class PendingRow:
    """A row on its way to the model.

    Attributes:
        number: Of the row in the input, from 0.
        image: What the input has, and once it is opened the PIL image.
        caption: The caption; None where one is to be written.
        prompt: The prompt.
    """

    number: int
    image: Any
    caption: str | None
    prompt: str


class Batch(NamedTuple):
    """Rows that go to the model together.

    Attributes:
        rows: Those with an image, opened.
        refused: The others, each with the reason why it has no image.
        prepared: The rows as the model reads them; None where that failed, or where captions are to be written.
    """

    rows: Sequence[PendingRow]
    refused: Sequence[tuple[PendingRow, str]]
    prepared: Prepared | None


def batches_of(rows: Sequence[PendingRow], size: int) -> list[list[PendingRow]]:
    """Batches of at most ``size`` rows with captions: rows of one image and prompt together, then neighbours in length."""
    of_prompt: dict[Hashable, list[PendingRow]] = {}
    for row in rows:
        of_prompt.setdefault((image_key(row.image), row.prompt), []).append(row)
    together = [sorted(group, key=_length) for group in of_prompt.values()]
    parts = [group[start : start + size] for group in together for start in range(0, len(group), size)]
    parts.sort(key=lambda part: _length(part[-1]))  # stable: the order depends on nothing but the rows
    batches: list[list[PendingRow]] = []
    for part in parts:
        if not batches or len(batches[-1]) + len(part) > size:
            batches.append([])
        batches[-1].extend(part)
    return batches


def _length(row: PendingRow) -> int:
    return len(row.caption or "")


def prefetch(
    groups: Sequence[Sequence[PendingRow]],
    prepare: Callable[[Sequence[PendingRow]], Prepared],
    workers: int,
    background: str = BACKGROUND,
) -> Iterator[Batch]:
    """Make batches ready ahead of the model.

    Args:
        groups: The rows of each batch.
        prepare: Encodes rows whose images are open.
        workers: Threads that open images; one more encodes.
        background: The colour on which transparent images are composed.

    Yields:
        The batches in their order, while at most `PREFETCHED` others wait.
    """
    openers, encoder = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)

    def make_ready(group: Sequence[PendingRow], images: Sequence[Future[Image.Image | str]]) -> Batch:
        opened = [(row, image.result()) for row, image in zip(group, images, strict=True)]
        rows = [replace(row, image=image) for row, image in opened if isinstance(image, Image.Image)]
        prepared = None
        if rows and rows[0].caption is not None:
            with suppress(Exception):  # whoever judges the batch meets the error again
                prepared = prepare(rows)
        return Batch(rows, [(row, reason) for row, reason in opened if isinstance(reason, str)], prepared)

    try:
        waiting: deque[Future[Batch]] = deque()
        for group in groups:
            opened: dict[Hashable, Future[Image.Image | str]] = {}
            for row in group:
                if (key := image_key(row.image)) not in opened:
                    opened[key] = openers.submit(open_image, row.image, background)
            waiting.append(encoder.submit(make_ready, group, [opened[image_key(row.image)] for row in group]))
            if len(waiting) > PREFETCHED:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for threads in (openers, encoder):  # one that waits for an image gets none
            threads.shutdown(cancel_futures=True)


def open_image(source: Any, background: str = BACKGROUND) -> Image.Image | str:
    """Open the image of a row.

    Args:
        source: A path, a data: URI, the bytes of a file, a `FileSlice`, a PIL image, an array (height, width, 3) uint8, or the
            mapping ``{"bytes", "path"}`` that Hugging Face datasets keep.
        background: The colour on which transparent images are composed.

    Returns:
        The image, upright RGB; or the reason why there is none, in one line that does not depend on the path.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    named = isinstance(source, Path) or (isinstance(source, str) and source and not URI.match(source))
    name = str(source) if named else "the given image"
    try:
        if isinstance(source, FileSlice):
            source = source.read()
        if isinstance(source, np.ndarray):
            source = Image.fromarray(source)
        if source is None or (isinstance(source, float) and math.isnan(source)):  # None in pandas
            return "there is no image"
        return load_image(source, background)
    except InputError as error:
        return re.sub(r"the given \w+", "the image", str(error).replace(name, "the image"))
    except Exception as error:  # of arrays that are no images, and of storage
        return f"the image cannot be read: {describe_error(error)}"
