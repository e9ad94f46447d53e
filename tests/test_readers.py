"""Readers of datasets: every row once, in order, and of what is damaged an error that says so."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from gazeguard.errors import InputError
from gazeguard.filtering.readers import (
    MAX_LINE_BYTES,
    FileSlice,
    ImageFolder,
    JsonLines,
    ParquetTable,
    WebDataset,
    fingerprint,
    open_source,
)

PNG = io.BytesIO()
Image.new("RGB", (9, 9), (255, 0, 0)).save(PNG, "PNG")
PNG = PNG.getvalue()


def lines(path: Path, data: bytes) -> JsonLines:
    path.write_bytes(data)
    return open_source(path)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def shard(path: Path, count: int = 3) -> Path:
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            add(tar, f"{i:03}.jpg", PNG)
            add(tar, f"{i:03}.txt", f"A red star {i}.\n".encode())
    return path


# ----------------------------------------------------------------------------------------------------------- JSONL


def test_lines_are_rows(tmp_path):
    """Paths start at the file's folder; other keys are kept; blank lines are none."""
    source = lines(tmp_path / "a.jsonl", b'{"image": "x/y.png", "caption": "A star.", "id": 7}\n\n{"image": "z.png"}')
    one, two = source.rows()
    assert (one.image, one.caption, one.prompt, one.error) == (tmp_path / "x/y.png", "A star.", None, "")
    assert one.fields == {"image": "x/y.png", "caption": "A star.", "id": 7}
    assert (two.caption, two.error) == (None, "")
    assert source.count() == 2


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b"{", "the line is not JSON"),
        (b"\xff\xfe{}", "the line is not JSON"),
        (b'{"image": "a", "x": NaN}', "the line is not JSON"),
        (b'{"image": "a", "x": 1e999}', "the line is not JSON"),
        (b"9" * 5000, "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
        (b"[]", "the line is not a JSON object"),
        (b"{}", "'image' is not the path of an image"),
        (b'{"image": 7}', "'image' is not the path of an image"),
        (b'{"image": "a", "prompt": 7}', "'prompt' is not text"),
        (b'{"image": "' + b"a" * MAX_LINE_BYTES + b'"}', f"the line is longer than {MAX_LINE_BYTES} bytes"),
    ],
    ids=range(11),
)
def test_a_bad_line_is_a_row_that_says_so(tmp_path, line, wrong):
    """And the lines before and after it are what they are."""
    good = b'{"image": "a.png", "caption": "A star."}\n'
    rows = list(lines(tmp_path / "a.jsonl", good + line + b"\n" + good).rows())
    assert [row.error for row in rows] == ["", wrong, ""]
    assert rows[0] == rows[2]
    json.dumps(rows[1].fields, allow_nan=False)


@given(
    st.lists(st.binary(max_size=60) | st.sampled_from([b'{"image":"a"}', b'{"image":"a","caption":null}', b"[1]"]), max_size=8)
)
@example([b"\r", b"\x0b", b"\xc2\x85", b""])
def test_every_line_is_one_row_from_wherever_it_is_read(tmp_path_factory, parts):
    """Whatever bytes they are, also when reading starts in the middle."""
    data = b"\n".join(parts)
    source = lines(tmp_path_factory.mktemp("lines") / "a.jsonl", data)
    rows = list(source.rows())
    assert len(rows) == source.count() == sum(1 for line in data.split(b"\n") if line.strip())
    for start in range(len(rows) + 1):
        assert list(source.rows(start)) == rows[start:]


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_pictures_with_captions_beside_them(tmp_path):
    """In the order of their names, below too; a sidecar without an image is not lost, other files are none."""
    (tmp_path / "b").mkdir()
    for name in ("c.png", "b/d.JPG", "a.webp", "a.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "c.txt").write_text("\ufeffA red star.\n", encoding="utf-8")
    (tmp_path / "e.txt").write_text("A blue moon.", encoding="utf-8")
    (tmp_path / "notes.pdf").write_bytes(b"")
    (tmp_path / "b/d.txt").write_bytes(b"\xff")
    source = open_source(tmp_path)
    assert isinstance(source, ImageFolder)
    rows = list(source.rows())
    assert [row.fields["image"] for row in rows] == ["a.png", "a.webp", "b/d.JPG", "c.png", None]
    assert [row.caption for row in rows] == [None, None, None, "A red star.", None]
    assert [row.error for row in rows] == [
        "", "", "the sidecar cannot be read: it is not UTF-8", "", "there is no image beside the caption"
    ]  # fmt: skip
    assert source.count() == 5
    assert list(source.rows(3)) == rows[3:]
    (tmp_path / "c.txt").write_text("x" * 2**21, encoding="utf-8")
    assert "longer than" in list(open_source(tmp_path).rows())[3].error


# ----------------------------------------------------------------------------------------------------------- shards


def test_shards_are_read_where_they_lie(tmp_path):
    """Samples by key, over shards in the order of their names; pictures are slices of the file; the shards stay as they are."""
    for name in ("00001.tar", "00000.tar"):
        shard(tmp_path / name)
    before = (tmp_path / "00000.tar").read_bytes()
    source = open_source(tmp_path)
    rows = list(source.rows())
    assert [(row.fields["shard"], row.fields["key"]) for row in rows] == [
        (f"0000{s}.tar", f"{i:03}") for s in (0, 1) for i in range(3)
    ]
    assert [row.caption for row in rows[:3]] == [f"A red star {i}." for i in range(3)]
    assert all(isinstance(row.image, FileSlice) and row.image.read() == PNG for row in rows)
    assert source.count() == 6
    assert list(source.rows(4)) == rows[4:]
    assert (tmp_path / "00000.tar").read_bytes() == before


def test_captions_of_img2dataset_are_found(tmp_path):
    """In .txt, or else in .json; keys with folders; what has no image says so."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/1.2.json", b'{"caption": "of one point two"}')
        add(tar, "x/3.png", PNG)
        add(tar, "x/3.json", b'{"caption": "A star.", "url": "..."}')
        add(tar, "x/4.png", PNG)
        add(tar, "x/4.json", b"{")
        add(tar, "x/5.txt", b"A moon.")
        add(tar, "x/6.png", PNG)
    rows = {row.fields["key"]: row for row in open_source(tmp_path / "a.tar").rows()}
    assert rows["x/3"].caption == "A star."
    assert rows["x/4"].error.startswith("the caption cannot be read: ")
    assert rows["x/5"].error == rows["x/1"].error == "there is no image in the row"
    assert (rows["x/6"].caption, rows["x/6"].error) == (None, "")


def test_links_and_devices_in_a_shard_are_not_followed(tmp_path):
    """A link to a file of the machine is no image: the row is there, without one."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "1.txt", b"A star.")
        add(tar, "2.png", type=tarfile.LNKTYPE, linkname="../../secret")
        add(tar, "2.txt", b"A star.")
        add(tar, "3.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(tar, "3.txt", b"A star.")
        add(tar, "../../4.png", PNG)
        add(tar, "../../4.txt", b"A star.")
    rows = list(open_source(tmp_path / "a.tar").rows())
    assert [row.error for row in rows] == ["there is no image in the row"] * 3 + [""]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def whole(rows):
    return [(row.fields, row.caption, row.image) for row in rows if not row.error]


@given(st.integers(0, 11 * 1024))
@example(0)
@example(3 * 2048)
def test_a_shard_that_breaks_off_says_so(tmp_path_factory, length):
    """Wherever it is cut: what comes before is as it was, the cut is a row by itself, and later shards are read."""
    folder = tmp_path_factory.mktemp("shards")
    expected = whole(WebDataset((shard(folder / "a.tar"),)).rows())
    data = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(data[:length])
    rows = list(WebDataset((folder / "a.tar", shard(folder / "b.tar"))).rows())
    mine = [row for row in rows if row.fields["shard"] == "a.tar"]
    assert whole(mine) == expected[: len(whole(mine))]
    assert len(whole(mine)) == 3 or mine[-1].error.startswith("the shard is damaged or breaks off")
    assert len(rows) - len(mine) == 3


@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_shard_is_read_to_its_end_or_says_why_not(tmp_path_factory, changes):
    """Whatever bytes are changed, nothing is raised, and fewer samples than there were come with a reason."""
    path = shard(tmp_path_factory.mktemp("shards") / "a.tar")
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at] = value
    path.write_bytes(data)
    rows = list(WebDataset((path,)).rows())
    assert len(whole(rows)) == 3 or any(row.error for row in rows)
    assert list(WebDataset((path,)).rows(1)) == rows[1:]


# ---------------------------------------------------------------------------------------------------------- parquet


def test_parquet_gives_pictures_as_they_are_kept(tmp_path):
    """Paths from the file's folder, bytes, and what datasets write; from anywhere in several files."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = {"path": ["x.png"], "bytes": [PNG], "struct": [{"bytes": PNG, "path": None}]}
    images = {"path": tmp_path / "x.png", "bytes": PNG, "struct": {"bytes": PNG, "path": None}}
    for name, values in columns.items():
        pq.write_table(pa.table({"image": values, "caption": ["A star."]}), tmp_path / f"{name}.parquet")
        (row,) = open_source(tmp_path / f"{name}.parquet").rows()
        assert (row.image, row.caption) == (images[name], "A star.")
    (tmp_path / "many").mkdir()
    for i in range(3):
        table = pa.table({"image": [f"{n}.png" for n in range(100)], "caption": [f"{i} {n}" for n in range(100)]})
        pq.write_table(table, tmp_path / f"many/{i}.parquet", row_group_size=30)
    source = open_source(tmp_path / "many")
    rows = list(source.rows())
    assert [row.caption for row in rows] == [f"{i} {n}" for i in range(3) for n in range(100)]
    assert source.count() == 300
    for start in (0, 1, 29, 64, 100, 130, 299, 300):
        assert list(source.rows(start)) == rows[start:]


def test_parquet_that_cannot_be_used_is_refused(tmp_path):
    """Another column, another schema, no parquet at all."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"photo": ["a.png"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet has no column 'image', only photo. Name it with --image-column"):
        open_source(tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet", image="photo")
    assert isinstance(source, ParquetTable)
    pq.write_table(pa.table({"photo": [1]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet has other columns than .*a.parquet"):
        open_source(tmp_path, image="photo")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(InputError, match=r"c.parquet cannot be read as parquet: "):
        open_source(tmp_path / "c.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'gazeguard-vlm\[data\]'"):
        open_source(tmp_path / "a.parquet")


# ---------------------------------------------------------------------------------------------------- what is given


def test_an_input_that_is_none_is_refused(tmp_path):
    """The message says what could be read."""
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(InputError, match=r"a.csv is none of .jsonl, .parquet and .tar"):
        open_source(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"b.jsonl does not exist. Give a .jsonl"):
        open_source(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match=r"holds no images, no .parquet and no .tar files"):
        open_source(tmp_path)


def test_the_identity_changes_with_the_files_alone(tmp_path):
    """Not with the place of the folder; with a name, a size or a time."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "a.tar")
        (tmp_path / name / "a.tar").touch()
    os.utime(tmp_path / "two/a.tar", ns=(0, (tmp_path / "one/a.tar").stat().st_mtime_ns))
    one, two = (fingerprint(open_source(tmp_path / name), tmp_path / name) for name in ("one", "two"))
    assert one == two
    shard(tmp_path / "two/a.tar", 4)
    assert fingerprint(open_source(tmp_path / "two"), tmp_path / "two") != one
