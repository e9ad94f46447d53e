"""Rows of data sets, mutated at random: images, captions, lines, tables and shards as they never should be.

Every mutant says what may become of it, so that a run of the filter over it can be held against that.
"""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gazeguard import lab
from gazeguard.lab.world import describe

ORIENTATION = 274  # the EXIF tag that says how the camera was held
DAMAGED = "damaged or breaks off"  # in the reason of a shard's or file's end
CAPTIONS: dict[str, Any] = {
    "none": None, "number": 7, "list": ["a red star"], "mapping": {"text": "a red star"}, "empty": "", "blank": " \n\t",
    "NUL": "A\0 \0r\0e\0d\0 \0s\0t\0a\0r\0", "refusal": "I'm sorry, I can't help with that.", "placeholder": "N/A",
    "null": "null", "error text": "error: 429 Too Many Requests", "special token": "<|endoftext|>", "file name": "IMG_2041.JPG",
    "URL": "https://example.com/a.jpg", "half a character": "a red star \ud83c", "digits": "0.123 0.456 0.789",
}  # fmt: skip
ALTERED: dict[str, Callable[[str], str]] = {  # captions that may be judged, but need not be what they were
    "upper case": str.upper,
    "loop": lambda caption: f"{caption} " * 30,
    "emoji": lambda caption: f"🌟 {caption} 🌟",
    "right to left": lambda caption: f"\u202e{caption}",
    "control characters": lambda caption: caption.replace(" ", "\x07 ", 2),
    "markdown": lambda caption: f"## {caption}\n\n* {caption}",
    "image token": lambda caption: f"<image> {caption}",
    "long": lambda caption: caption * 60,
    "reversed": lambda caption: caption[::-1],
}
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
MODES = ("RGBA", "P", "L", "CMYK", "1", "LA")


@dataclass(frozen=True)
class Mutant:
    """A row as it is written into a data set.

    Attributes:
        number: Its number in the whole run.
        mutation: What was done to it; "" for a clean row.
        image: The bytes of its image; None for none.
        caption: Its caption, of whatever type.
        may_pass: Whether the caption can be judged at all.
    """

    number: int
    mutation: str
    image: bytes | None
    caption: Any
    may_pass: bool = True


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flipped(data: bytes, rng: random.Random, most: int = 6) -> bytes:
    """Bytes with a few of them changed, removed, doubled or inserted."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(changed) + 1) if changed else 0
        action = rng.choice(("set", "delete", "insert", "repeat"))
        if action == "insert" or at >= len(changed):
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        elif action == "set":
            changed[at] = rng.randrange(256)
        elif action == "delete":
            del changed[at : at + rng.randint(1, 16)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 64)]
    return bytes(changed)


def clean_rows(count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """Drawings with true and false captions."""
    rows = lab.samples("test", count, seed)
    return [(sample.image, describe(sample.drawing, random.Random(f"{seed} {i}"))) for i, sample in enumerate(rows)]


def mutate(number: int, clean: tuple[Image.Image, str], rng: random.Random) -> Mutant:
    """One row, clean in three of ten cases."""
    image, caption = clean
    chance = rng.random()
    if chance < 0.3:
        return Mutant(number, "", encoded(image), caption)
    if chance < 0.65:
        mutation, data, whole = _mutated_image(image, rng)
        return Mutant(number, mutation, data, caption, whole)
    if chance < 0.85:
        name = rng.choice(list(CAPTIONS))
        return Mutant(number, f"caption: {name}", encoded(image), CAPTIONS[name], may_pass=False)
    name = rng.choice(list(ALTERED))
    return Mutant(number, f"caption: {name}", encoded(image), ALTERED[name](caption))


def _mutated_image(image: Image.Image, rng: random.Random) -> tuple[str, bytes | None, bool]:
    """What was done, the bytes, and whether they may still be an image."""
    kind = rng.choice(KINDS)
    options = {"exif": _turned(rng)} if kind == "JPEG" and rng.random() < 0.3 else {}
    data = encoded(image, kind, **options)
    action = rng.choice(("flip", "flip", "cut", "tail", "mode", "size", "empty", "text", "none", "other", "exif"))
    if action == "flip":
        return f"{kind}: bytes", flipped(data, rng), True
    if action == "cut":
        return f"{kind}: cut", data[: rng.randrange(len(data))], True  # a tail that no pixel needs may be gone
    if action == "tail":
        return f"{kind}: tail", data + rng.randbytes(99), True
    if action == "mode":
        mode = rng.choice(MODES)
        return f"mode {mode}", encoded(image.convert(mode), "TIFF" if mode in ("CMYK", "LA") else "PNG"), True
    if action == "size":
        size = rng.choice(((1, 1), (1, 900), (900, 2), (3, 3)))
        return f"size {size}", encoded(image.resize(size)), False
    if action == "exif":
        return "EXIF", encoded(image, "JPEG", exif=_turned(rng)), True
    others = {"empty": b"", "text": b"no image", "none": None, "other": b"%PDF-1.7\n" + data}
    return f"image: {action}", others[action], False


def _turned(rng: random.Random) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = rng.randint(0, 9)
    return exif


# ---------------------------------------------------------------------------------------------------------- data sets


def write_lines(folder: Path, mutants: Sequence[Mutant], rng: random.Random) -> Path:
    """A JSONL file, a tenth of whose lines are changed byte by byte."""
    lines = []
    for mutant in mutants:
        name = f"{mutant.number}.img"
        if mutant.image is not None:
            (folder / name).write_bytes(mutant.image)
        fields = {"id": mutant.number, "image": name, "caption": mutant.caption}
        line = json.dumps(fields, ensure_ascii=rng.random() < 0.5 or "half" in mutant.mutation).encode()
        lines.append(flipped(line, rng, 2) if mutant.mutation and rng.random() < 0.15 else line)
    path = folder / "rows.jsonl"
    path.write_bytes(rng.choice((b"\n", b"\r\n")).join(lines) + rng.choice((b"", b"\n")))
    return path


def write_table(folder: Path, mutants: Sequence[Mutant], rng: random.Random) -> Path:
    """A parquet file with the images' bytes; one in eight is damaged as a whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [mutant.caption if isinstance(mutant.caption, str | None) else json.dumps(mutant.caption) for mutant in mutants]
    texts = [text if text is None else text.encode("utf-8", "replace").decode() for text in texts]
    columns = {"id": [mutant.number for mutant in mutants], "image": [mutant.image for mutant in mutants], "caption": texts}
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=rng.choice((7, 100)))
    if rng.random() < 0.125:
        path.write_bytes(flipped(path.read_bytes(), rng))
    return path


def write_shard(folder: Path, mutants: Sequence[Mutant], rng: random.Random) -> Path:
    """A webdataset shard with keys of several shapes; one in four is damaged as a whole."""
    shape = rng.choice(("{:05}", "a.b/{:05}", "{:05}.x", "ü {:05}"))
    members = []
    for mutant in mutants:
        key = shape.format(mutant.number)
        if mutant.image is not None:
            members.append((f"{key}{rng.choice(('.png', '.jpg', '.PNG'))}", mutant.image))
        if isinstance(mutant.caption, str):
            members.append((f"{key}.txt", mutant.caption.encode("utf-8", "replace")))
        members.append((f"{key}.json", json.dumps({"id": mutant.number}).encode()))
    if rng.random() < 0.3:
        rng.shuffle(members)
    path = folder / "rows.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if rng.random() < 0.25:
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.5 else flipped(data, rng))
    return path


def write_folder(folder: Path, mutants: Sequence[Mutant], rng: random.Random) -> Path:
    """Images in a folder, with their captions beside them."""
    path = folder / "rows"
    path.mkdir()
    for mutant in mutants:
        (path / f"{mutant.number:05}{rng.choice(('.png', '.JPG', '.webp'))}").write_bytes(mutant.image or b"")
        if isinstance(mutant.caption, str):
            name = f"{mutant.number:05}{rng.choice(('.txt', '.TXT'))}"
            (path / name).write_bytes(mutant.caption.encode(rng.choice(("utf-8", "utf-16", "utf-8-sig")), "replace"))
    return path


WRITERS: Mapping[str, Callable[[Path, Sequence[Mutant], random.Random], Path]] = {
    "jsonl": write_lines,
    "parquet": write_table,
    "tar": write_shard,
    "folder": write_folder,
}


def numbers_of(kind: str, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of the mutants that result rows are about, as far as they tell."""
    found = []
    for row in rows:
        if kind in ("jsonl", "parquet"):
            value = row.get("id")
        elif kind == "tar":
            value = next(iter(re.findall(r"\d{5}", str(row.get("key")))), None)
        else:
            value = Path(str(row.get("image") or row.get("sidecar"))).stem
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            found.append(int(value))
    return found
