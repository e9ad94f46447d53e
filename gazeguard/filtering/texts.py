"""Text of captions and lines: decoded where the encoding is certain, else a reason that names the likely one."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from gazeguard.errors import InputError

MAX_TEXT_BYTES = 2**20  # of a caption's file
MIN_ZEROS = 1 / 8  # of all bytes: half of those of Latin text in UTF-16 are zero

# UTF-32 before UTF-16, whose little-endian mark is the beginning of the other's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def marked_encoding(data: bytes) -> str | None:
    """Return the encoding that a byte order mark at the beginning tells; None without one."""
    return next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)


def check_encoding(encoding: str | None) -> None:
    """Raise `InputError` for an encoding that Python does not know."""
    try:
        "".encode(encoding or "utf-8")
    except LookupError as error:
        raise InputError(f"Unknown encoding {encoding!r}; expected one such as utf-8, cp1252 or utf-16-le.") from error


def decode(data: bytes, encoding: str | None = None, marked: bool = True) -> str:
    """Decode text.

    Args:
        data: The bytes. A byte order mark decides over everything else.
        encoding: Of bytes without a mark; by default UTF-8.
        marked: Whether the data is a whole file, which may begin with a mark.

    Raises:
        ValueError: They are no text of that encoding; the message names a likely one.
    """
    mark = marked_encoding(data) if marked else None
    encoding = mark or encoding or "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        guess = "" if mark else _guess(data) or ", perhaps cp1252: --encoding cp1252"
        raise ValueError(f"it is not {encoding.removesuffix('-sig').upper()}{guess}") from error
    if "\0" in text:
        raise ValueError(f"it has NUL characters{_guess(data)}")
    return text


def _guess(data: bytes) -> str:
    """The option that is likely to be missing, where the bytes are those of UTF-16; else ""."""
    even, odd = data[::2].count(0), data[1::2].count(0)
    if max(even, odd) > len(data) * MIN_ZEROS:
        likely = "utf-16-le" if odd >= even else "utf-16-be"
        return f", perhaps {likely} without a byte order mark: --encoding {likely}"
    return ""


def read_text(size: int, read: Callable[[], bytes], encoding: str | None = None) -> str:
    """Read the text of a caption's file. Raises `ValueError` where it is too long or cannot be decoded."""
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"it is longer than {MAX_TEXT_BYTES} bytes")
    return decode(read(), encoding).strip()


def describe_error(error: Exception) -> str:
    """Return an error in one line, without the path, which the caller names."""
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
