"""Row of a dataset, and the image that it names: a path, a slice of a file, or a data: URI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gazeguard.errors import InputError
from gazeguard.vision.images import MAX_IMAGE_BYTES, URI

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
COLUMNS = (  # that a filter run adds to every row
    "gaze_verdict", "gaze_reason", "gaze_risk", "gaze_phrases", "gaze_caption", "gaze_policy", "gaze_version"
)  # fmt: skip
ROW_COLUMN = "gaze_row"  # that it also adds to tables, which are sorted by verdict: the number of the row in the input, from 1


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

    def to_dict(self) -> dict[str, Any]:
        """Return the slice as JSON holds it; `image_source` reads it again."""
        return {"path": str(self.path.absolute()), "offset": self.start, "size": self.size}


@dataclass(frozen=True)
class Row:
    """One row of a dataset.

    Attributes:
        fields: What the results repeat of the row, as JSON holds it.
        image: What `gazeguard.filtering.batches.open_image` takes.
        caption: The caption; None where there is none.
        prompt: The prompt that the caption answers; None for the default.
        error: Why the row cannot be used; empty for a good one.
        number: Of a table's row in the input of the filter run that wrote the table, from 1; None where nothing says it.
    """

    fields: dict[str, Any]
    image: Any = None
    caption: Any = None
    prompt: str | None = None
    error: str = ""
    number: int | None = None


def image_source(value: Any, folder: Path) -> Any:
    """Return what a row names as its image, as `gazeguard.filtering.batches.open_image` takes it.

    Args:
        value: A path, a URI, or the mapping ``{"path", "offset", "size"}`` that a filtered shard has.
        folder: Where relative paths begin.

    Returns:
        A path, the URI, or a `FileSlice`; None for anything else.
    """
    if isinstance(value, str) and value:
        return value if URI.match(value) else folder / value
    if isinstance(value, Mapping):
        path, start, size = (value.get(name) for name in ("path", "offset", "size"))
        if isinstance(path, str) and isinstance(start, int) and isinstance(size, int) and min(start, size) >= 0:
            return FileSlice(folder / path, start, size)
    return None
