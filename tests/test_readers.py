"""Readers of datasets: every row once, in order, and of what is damaged an error that says so."""

from __future__ import annotations

import base64
import gzip
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
from gazeguard.filtering import readers
from gazeguard.filtering.batches import open_image
from gazeguard.filtering.readers import ImageFolder, JsonLines, ParquetTable, check_columns, fingerprint, open_source
from gazeguard.filtering.rows import FileSlice
from gazeguard.filtering.shards import WebDataset

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
        (b"\xff\xfe{}", "the line cannot be read: it is not UTF-8, perhaps cp1252: --encoding cp1252"),
        (b'{"image": "a", "x": NaN}', "the line is not JSON"),
        (b'{"image": "a", "x": 1e999}', "the line is not JSON"),
        (b"9" * 5000, "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
        (b"[]", "the line is not a JSON object"),
        (b"{}", "'image' is not a key of the row; --image-column names the one of the image"),
        (b'{"image": 7}', "'image' is not the path of an image"),
        (b'{"image": "a", "prompt": 7}', "'prompt' is not text"),
        (b'{"caption": "caf\xe9"}', "the line cannot be read: it is not UTF-8, perhaps cp1252: --encoding cp1252"),
        (
            '{"a": 1}'.encode("utf-16-le"),
            "the line cannot be read: it has NUL characters, perhaps utf-16-le without a byte order mark: --encoding utf-16-le",
        ),
        (b'{"image": "' + b"a" * 10**6 + b'"}', "the line is longer than 1000000 bytes"),
    ],
    ids=range(13),
)
def test_a_bad_line_is_a_row_that_says_so(tmp_path, line, wrong, monkeypatch):
    """And the lines before and after it are what they are; the text of what is no JSON is kept."""
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 10**6)
    good = b'{"image": "a.png", "caption": "A star."}\n'
    rows = list(lines(tmp_path / "a.jsonl", good + line + b"\n" + good).rows())
    assert [row.error for row in rows] == ["", wrong, ""]
    assert rows[0] == rows[2]
    json.dumps(rows[1].fields, allow_nan=False)
    if wrong.startswith("the line"):
        assert rows[1].fields["line"] == 2
        assert line.decode("utf-8", "backslashreplace").startswith(rows[1].fields["text"])


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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL.gz", "a.ndjson.gz"])
def test_lines_in_other_encodings_and_gzipped_are_the_same_rows(tmp_path, name, encoding):
    """A byte order mark decides, as PowerShell writes it; without one --encoding; from anywhere."""
    text = "".join(json.dumps({"image": "a.png", "caption": f"Caf\u00e9 {i}."}, ensure_ascii=False) + "\r\n" for i in range(3))
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = open_source(tmp_path / name, encoding=encoding if encoding in ("utf-16-be", "cp1252") else None)
    rows = list(source.rows())
    assert [(row.caption, row.error) for row in rows] == [(f"Caf\u00e9 {i}.", "") for i in range(3)]
    assert source.count() == 3
    assert list(source.rows(2)) == rows[2:]


def test_a_gzip_that_breaks_off_says_so(tmp_path):
    """What comes before is read; wherever it is cut."""
    data = gzip.compress(b"".join(b'{"image": "%d.png"}\n' % i for i in range(200)))
    for length in (1, 5, 15, 20, len(data) // 2, len(data) - 4):
        rows = list(lines(tmp_path / "a.jsonl.gz", data[:length]).rows())
        assert rows[-1].error == "the file is damaged or breaks off: rows may be missing from here on"
        assert not any(row.error for row in rows[:-1])
    assert lines(tmp_path / "a.jsonl.gz", data).columns({"caption"}) == ["image"]
    with pytest.raises(InputError, match="Unknown encoding 'utf-9'; expected one such as utf-8, cp1252"):
        open_source(tmp_path / "a.jsonl.gz", encoding="utf-9")


def test_images_in_lines_are_read_and_urls_are_not_fetched(tmp_path):
    """A line may be longer than a mebibyte; the limit is on the image."""
    noise = io.BytesIO()
    Image.frombytes("RGB", (800, 800), os.urandom(800 * 800 * 3)).save(noise, "PNG")
    images = [PNG, noise.getvalue()]
    assert len(images[1]) > 2**20
    uris = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    bad = ["https://example.org/a.png", "s3://bucket/a.png", "data:image/png,abc", "data:image/png;base64,%%%"]
    text = "".join(json.dumps({"image": uri, "caption": "A star."}) + "\n" for uri in [*uris, *bad])
    rows = list(lines(tmp_path / "a.jsonl", text.encode()).rows())
    assert [row.error for row in rows] == [""] * 6
    opened = [open_image(row.image) for row in rows]
    assert [image.size for image in opened[:2]] == [(9, 9), (800, 800)]
    assert [reason.partition(":")[0].partition(";")[0] for reason in opened[2:]] == [
        "the image is a URL, which is not fetched",
        "the image is a URL, which is not fetched",
        "the image is a data URI without base64. Write data",
        "the image is a data URI with damaged base64",
    ]
    large = f"data:image/png;base64,{'A' * (readers.MAX_IMAGE_BYTES * 4 // 3 + 8)}"
    assert open_image(large).startswith("the image is larger than ")
    base64_text = base64.b64encode(images[1]).decode()
    for loose in (
        base64_text.rstrip("="),
        base64_text.replace("+", "-").replace("/", "_"),
        f"{base64_text[:76]}\r\n{base64_text[76:]}",
        base64_text.replace("+", "%2B"),
    ):
        assert open_image(f"data:image/png;base64,{loose}").tobytes() == opened[1].tobytes()


def test_a_reason_does_not_depend_on_the_path_whatever_holds_it():
    assert open_image("no/a.png") == open_image({"bytes": None, "path": "no/a.png"}) == open_image(Path("no/a.png"))
    assert open_image("no/a.png").startswith("the image cannot be opened: ")


def test_a_wrong_column_stops_before_the_work(tmp_path):
    """With the columns that there are; no caption is needed where they are written."""
    source = lines(tmp_path / "a.jsonl", b'nonsense\n{"image_path": "a.png", "text": "A star."}\n' * 3)
    with pytest.raises(InputError, match=r"no row has 'image'; the columns are image_path, text. Name the .* --image-column"):
        check_columns(source)
    source = open_source(tmp_path / "a.jsonl", image="image_path")
    with pytest.raises(InputError, match=r"no row has 'caption'; the columns are .* --caption-column, .* --write-captions"):
        check_columns(source)
    check_columns(source, write_captions=True)
    check_columns(open_source(tmp_path / "a.jsonl", image="image_path", caption="text"))
    check_columns(lines(tmp_path / "b.jsonl", b'{"image": "a.png"}\n{"caption": "A star."}'))
    check_columns(lines(tmp_path / "c.jsonl", b"nonsense"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tar.gz", "is a packed tar file, .* Unpack it to a .tar first"),
        ("a.TGZ", "is a packed tar file"),
        ("a.csv", "is none of .jsonl, .parquet and .tar"),
        ("", "is no dataset itself, but holds flagged.jsonl, kept.jsonl. Give one of these files"),
    ],
)
def test_what_is_no_dataset_is_said_with_the_way_out(tmp_path, name, message):
    """The output folder of a filter run, too."""
    for file in ("kept.jsonl", "flagged.jsonl", "summary.json", "a.tar.gz", "a.TGZ", "a.csv"):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / name)


@pytest.mark.parametrize("suffix", ["TAR", "Tar"])
def test_suffixes_are_read_in_whatever_case(tmp_path, suffix):
    shard(tmp_path / f"a.{suffix}")
    for path in (tmp_path, tmp_path / f"a.{suffix}"):
        assert isinstance(open_source(path), WebDataset)
        assert open_source(path).count() == 3


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
        "", "", "the sidecar cannot be read: it is not UTF-8, perhaps cp1252: --encoding cp1252", "",
        "there is no image beside the caption",
    ]  # fmt: skip
    assert source.count() == 5
    assert list(source.rows(3)) == rows[3:]
    (tmp_path / "c.txt").write_text("x" * 2**21, encoding="utf-8")
    assert "longer than" in list(open_source(tmp_path).rows())[3].error


TEXT = "A caf\u00e9 table."
SIDECARS = {  # name and bytes beside a.png -> caption, or a part of the error
    "UTF-8 with mark": ("a.txt", TEXT.encode("utf-8-sig"), TEXT),
    "UTF-16": ("a.txt", TEXT.encode("utf-16"), TEXT),
    "UTF-16 big": ("a.txt", b"\xfe\xff" + TEXT.encode("utf-16-be"), TEXT),
    "upper case": ("A.TXT", TEXT.encode(), TEXT),
    "whole name": ("a.png.txt", TEXT.encode(), TEXT),
    "cp1252": ("a.txt", TEXT.encode("cp1252"), "!it is not UTF-8, perhaps cp1252: --encoding cp1252"),
    "UTF-16 unmarked": ("a.txt", TEXT.encode("utf-16-le"), "!utf-16-le without a byte order mark: --encoding utf-16-le"),
    "UTF-16 ASCII": ("a.txt", "A star.".encode("utf-16-be"), "!utf-16-be without a byte order mark: --encoding utf-16-be"),
}


@pytest.mark.parametrize("name", SIDECARS)
def test_sidecars_are_decoded_where_it_is_certain(tmp_path, name):
    """Else the reason names the likely encoding; with --encoding it is read."""
    sidecar, data, expected = SIDECARS[name]
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / sidecar).write_bytes(data)
    (row,) = open_source(tmp_path).rows()
    if not expected.startswith("!"):
        assert (row.caption, row.error) == (expected, "")
        return
    assert row.caption is None
    assert row.error.startswith("the sidecar cannot be read: ")
    assert row.error.endswith(expected[1:])
    (row,) = open_source(tmp_path, encoding=row.error.rpartition(" ")[2]).rows()
    assert row.caption in (TEXT, "A star.")


def test_a_single_nul_is_no_sign_of_an_encoding(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_bytes(b"A red\0star.")
    (row,) = open_source(tmp_path).rows()
    assert (row.caption, row.error) == (None, "the sidecar cannot be read: it has NUL characters")


def test_sidecars_that_are_not_read_are_counted_and_can_be_named(tmp_path):
    """Files of an image's name alone; --caption-ext reads them, .json as an object with the caption."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    for name in ("a.caption", "b.png.caption", "other.caption"):
        (tmp_path / name).write_text("A star.")
    (tmp_path / "a.json").write_text('{"caption": "A moon."}')
    source = open_source(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "A red star."}')
    assert open_source(tmp_path).unread() == {".caption": 2, ".json": 1, "metadata.jsonl": 1}
    assert [row.caption for row in source.rows()] == [None, None]
    rows = list(open_source(tmp_path, caption_suffix="caption").rows())
    assert [(row.caption, row.error) for row in rows] == [
        ("A star.", ""), ("A star.", ""), (None, "there is no image beside the caption")
    ]  # fmt: skip
    assert [row.caption for row in open_source(tmp_path, caption_suffix=".json").rows()] == ["A moon.", None]
    assert fingerprint(open_source(tmp_path), tmp_path) != fingerprint(open_source(tmp_path, encoding="cp1252"), tmp_path)


def test_two_sidecars_of_one_image_are_a_reason(tmp_path):
    for name in ("a.png", "a.txt", "a.png.txt"):
        (tmp_path / name).write_bytes(PNG if name == "a.png" else b"A star.")
    (row,) = open_source(tmp_path).rows()
    assert row.error == "there are several captions beside the image: a.txt, a.png.txt"


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
    assert rows["x/5"].error == rows["x/1.2"].error == "there is no image in the row"
    assert rows["x/3"].fields["json"] == {"caption": "A star.", "url": "..."}
    assert (rows["x/6"].caption, rows["x/6"].error) == (None, "")


def test_keys_with_a_dot_are_rows_of_their_own(tmp_path):
    """As version numbers and dates have them; a mask beside its image is no row, and what is ambiguous says so."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key in ("22.05", "22.06"):
            add(tar, f"{key}.png", PNG)
            add(tar, f"{key}.txt", f"A star of {key}.".encode())
        add(tar, "23.png", PNG)
        add(tar, "23.mask.png", PNG)
        add(tar, "23.txt", b"A star.")
        add(tar, "24.png", PNG)
        add(tar, "24.jpg", PNG)
        add(tar, "25.png", PNG)
        add(tar, "25.txt", b"A star.")
        add(tar, "25.txt", b"A moon.")
        add(tar, "26.png", PNG)
        add(tar, "26.png.txt", b"A star.")
    source = open_source(tmp_path / "a.tar")
    rows = {row.fields["key"]: row for row in source.rows()}
    assert list(rows) == ["22.05", "22.06", "23", "24", "25", "26"]
    assert (rows["26"].caption, rows["26"].error) == ("A star.", "")
    assert [rows[key].caption for key in ("22.05", "22.06", "23")] == ["A star of 22.05.", "A star of 22.06.", "A star."]
    assert [rows[key].error for key in ("22.05", "22.06", "23")] == [""] * 3
    assert rows["24"].error == "the row has 2 images: which one the caption describes is not known"
    assert rows["25"].error == "the shard has several files of one name: .txt"
    assert source.unread() == {".mask.png": 1}


@pytest.mark.parametrize("order", ["images first", "texts first", "shuffled"])
def test_files_of_a_key_are_one_row_wherever_they_stand(tmp_path, order):
    """Also when reading starts in the middle."""
    names = [f"{i}.{suffix}" for suffix in ("png", "txt", "json") for i in range(5)]
    names = {"images first": names, "texts first": names[::-1], "shuffled": names[::3] + names[1::3] + names[2::3]}[order]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            content = {"png": PNG, "txt": f"A star {name[0]}.".encode(), "json": b'{"url": "u%s"}' % name[:1].encode()}
            add(tar, name, content[name[2:]])
    source = open_source(tmp_path / "a.tar")
    rows = sorted(source.rows(), key=lambda row: row.fields["key"])
    assert [(row.caption, row.fields["json"], row.error) for row in rows] == [
        (f"A star {i}.", {"url": f"u{i}"}, "") for i in range(5)
    ]
    assert all(row.image.read() == PNG for row in rows)
    assert source.count() == 5
    assert list(source.rows(2)) == list(source.rows())[2:]


def test_a_caption_that_a_break_took_is_not_taken_for_none(tmp_path):
    """Images first, and the texts cut off: none of the rows is one without a caption."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.png", "1.png", "0.txt", "1.txt"):
            add(tar, name, PNG if name.endswith("png") else b"A star.")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: 2 * 1024 + 100])
    assert all(row.error.startswith("the shard is damaged or breaks off") for row in open_source(tmp_path / "a.tar").rows())


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
    with pytest.raises(InputError, match=r"pip install '.\[data\]'"):
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


# ----------------------------------------------------------------------------------------------------- conversations


def talk(*messages: tuple[str, object]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in messages]


ASKED = [{"type": "text", "text": "What is there?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]


@pytest.mark.parametrize(
    ("fields", "caption", "prompt", "error"),
    [
        ({"messages": talk(("user", ASKED), ("assistant", "A star."))}, "A star.", "What is there?", ""),
        ({"body": {"messages": talk(("system", "Be brief."), ("user", ASKED))}, "custom_id": "7"}, None, "What is there?", ""),
        ({"body": {"messages": talk(("user", ASKED))}, "caption": "A star."}, "A star.", "What is there?", ""),
        ({"messages": talk(("user", ASKED), ("assistant", "A star."), ("user", "And?"))}, None, "And?", ""),
        (
            {"messages": talk(("user", [{"type": "image", "image": "a.png"}]), ("assistant", ASKED[:1]))},
            "What is there?",
            None,
            "",
        ),
        ({"messages": talk(("user", ASKED + ASKED), ("assistant", "A star."))}, "A star.", None, "the row has 2 images"),
        ({"messages": talk(("user", "What?"), ("assistant", "A star."))}, "A star.", None, "there is no image in the messages"),
        ({"messages": [7, {"role": 3}, {"content": [None, {}]}]}, None, None, "there is no image in the messages"),
    ],
)
def test_conversations_are_rows(tmp_path, fields, caption, prompt, error):
    """OpenAI's batch requests and chat files: one image, the last question and the last answer."""
    source = lines(tmp_path / "a.jsonl", json.dumps(fields).encode())
    (row,) = source.rows()
    assert (row.caption, row.prompt, row.fields) == (caption, prompt, fields)
    assert row.error.startswith(error)
    assert bool(row.error) == bool(error)
    if not error:
        assert row.image == tmp_path / "a.png"
    check_columns(source)
