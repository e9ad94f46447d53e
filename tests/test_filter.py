"""The filter as a callable: a verdict per row, and no row that costs another or passes unseen."""

from __future__ import annotations

import io
import json
import math
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gazeguard import __version__, lab
from gazeguard.errors import InputError
from gazeguard.filtering.caption_filter import AHEAD, COLUMNS, CaptionFilter, explain, picture_of
from gazeguard.filtering.ray import ArrowFilter
from gazeguard.filtering.readers import Slice
from gazeguard.guard import GazeGuard
from gazeguard.vision.encoding import encode

SAMPLES = lab.samples("test", 6, seed=7)
IMAGES, PROMPTS = [s.image for s in SAMPLES], [s.prompt for s in SAMPLES]
UPSIDE = 274  # the EXIF tag that says how the camera was held


def packed(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def keep(lab_vlm):
    """A filter over the lab's model, three rows at a time."""
    return CaptionFilter(GazeGuard(*lab_vlm), batch_size=3)


@pytest.fixture(scope="module")
def told(keep):
    """Captions of the lab's own."""
    return keep({"image": IMAGES, "prompt": PROMPTS})["caption"]


# ------------------------------------------------------------------------------------------------------------- laws


def test_a_batch_says_what_the_guard_says_of_each_row(keep, told):
    """Verdict, risk and phrases are those of `check`, whatever the batch; columns that were there stay."""
    batch = {"id": list(range(6)), "image": IMAGES, "caption": told, "prompt": PROMPTS}
    made = keep(batch)
    assert list(made) == [*batch, *COLUMNS]
    assert all(made[name] is batch[name] for name in batch)
    assert {"pass", "flag"} == set(made["gaze_verdict"])
    for i, sample in enumerate(SAMPLES):
        report = keep.guard.check(sample.image, told[i], sample.prompt)
        assert made["gaze_verdict"][i] == report.verdict
        assert made["gaze_reason"][i] == report.reason
        assert made["gaze_risk"][i] == pytest.approx(max(f.risk for f in report.findings), abs=1e-3)
        for phrase, finding in zip(made["gaze_phrases"][i], report.findings, strict=True):
            assert phrase["text"] == finding.claim.text == told[i][slice(*phrase["span"])]
            assert (phrase["kind"], phrase["flagged"]) == (finding.claim.kind, finding.flagged)
            assert phrase["risk"] == pytest.approx(finding.risk, abs=1e-3)
    assert set(made["gaze_policy"]) == {"mark"}
    assert set(made["gaze_version"]) == {__version__}


def test_the_same_batch_gives_the_same_columns(keep, told):
    """Byte for byte, with one thread that unpacks pictures or four."""
    batch = {"image": [packed(image) for image in IMAGES], "caption": told, "prompt": PROMPTS}
    other = CaptionFilter(keep.guard, batch_size=3, workers=4)
    assert json.dumps([keep(batch)[name] for name in COLUMNS]) == json.dumps([other(batch)[name] for name in COLUMNS])


def test_captions_that_are_missing_are_written_under_guard(keep, told):
    """What is written is what generate writes, greedily; the verdict is that of the live trace."""
    assert all(text.startswith(("There", "In panel")) for text in told)
    live = keep({"image": IMAGES, "prompt": PROMPTS})
    replayed = keep({"image": IMAGES, "prompt": PROMPTS, "caption": told})
    assert live["gaze_verdict"] == replayed["gaze_verdict"]
    short = CaptionFilter(keep.guard, max_new_tokens=3)({"image": IMAGES[:1], "prompt": PROMPTS[:1]})
    assert short["gaze_verdict"][0] == "unchecked"


def test_the_policy_says_what_is_let_through(keep, told):
    """drop leaves what is not flagged, abstain nothing but what passes; verdicts and phrases are those of mark."""
    batch = {"image": [*IMAGES, b""], "caption": [*told, told[0]], "prompt": [*PROMPTS, None]}
    marked = keep(batch)
    assert marked["gaze_caption"] == batch["caption"]
    for name in ("drop", "abstain"):
        made = CaptionFilter(GazeGuard(keep.guard.model, keep.guard.processor, policy=name), batch_size=3)(batch)
        assert made["caption"] == batch["caption"]
        assert set(made["gaze_policy"]) == {name}
        assert made["gaze_verdict"] == marked["gaze_verdict"]
        for verdict, text, left in zip(made["gaze_verdict"], batch["caption"], made["gaze_caption"], strict=True):
            if verdict == "pass":
                assert left == text
            elif name == "abstain":
                assert left == ""
            else:
                assert (left != text) == (verdict == "flag")


def test_neighbours_in_length_share_a_batch(keep, told):
    """So that little is padded, wherever the rows stand; results come in the order of the rows."""
    short, long = "A red star.", told[0]
    batch = {"image": [IMAGES[0]] * 6, "caption": [short, long] * 3, "prompt": [PROMPTS[0]] * 6}
    seen = []
    handle = keep.guard.model.register_forward_pre_hook(
        lambda _model, _args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        made = keep(batch)
    finally:
        handle.remove()
    (rows, narrow), (more, wide) = seen
    assert rows == more == 3
    assert narrow < wide
    assert [phrases[0]["text"] for phrases in made["gaze_phrases"][::2]] == ["A red star"] * 3
    assert made["gaze_phrases"][1] == made["gaze_phrases"][3]


def test_datasets_map_takes_it_as_it_is(keep, told):
    """Pictures as datasets keep them, the verdicts of a plain call."""
    datasets = pytest.importorskip("datasets")
    columns = {"image": IMAGES, "caption": told, "prompt": PROMPTS}
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "prompt": datasets.Value("string")}
    )
    dataset = datasets.Dataset.from_dict(columns, features=features)
    made = dataset.map(keep, batched=True, batch_size=4)
    expected = keep(columns)
    assert made.column_names == [*columns, *COLUMNS]
    assert list(made["gaze_verdict"]) == expected["gaze_verdict"]
    assert list(made["gaze_caption"]) == told
    assert len(made.filter(lambda row: row["gaze_verdict"] == "pass")) == expected["gaze_verdict"].count("pass")


def test_a_table_has_the_same_types_whatever_it_holds(keep, told):
    """As Ray wants of its blocks: rows without phrases, or without boxes, change no type."""
    pa = pytest.importorskip("pyarrow")
    arrow = ArrowFilter(keep.guard, batch_size=3)
    whole = pa.table({"image": [packed(image) for image in IMAGES], "caption": told, "prompt": PROMPTS})
    made, none = arrow(whole), arrow(whole.slice(0, 0))
    bad = arrow(pa.table({"image": [b"", b""], "caption": ["A star.", None], "prompt": [None, None]}))
    assert made.schema == none.schema
    assert [field.type for field in bad.schema if field.name in COLUMNS] == [made.schema.field(name).type for name in COLUMNS]
    assert made.select(list(COLUMNS)).to_pydict() == {name: keep(whole.to_pydict())[name] for name in COLUMNS}


def test_an_empty_batch_has_every_column(keep):
    """As Ray and datasets ask for, to learn the schema."""
    assert keep({"image": [], "caption": []}) == {"image": [], "caption": [], **{name: [] for name in COLUMNS}}


def test_columns_that_do_not_fit_are_refused(keep):
    with pytest.raises(InputError, match=r"no column 'image', only 'picture'. Pass image=NAME"):
        keep({"picture": []})
    with pytest.raises(InputError, match="not of one length"):
        keep({"image": IMAGES, "caption": ["A star."]})
    with pytest.raises(InputError, match=r"batch_size, workers and max_new_tokens are 0, 2 and 256. Give each at least 1"):
        CaptionFilter(keep.guard, batch_size=0)


CAPTIONS = st.one_of(
    st.none(),
    st.just(float("nan")),
    st.integers(),
    st.text(max_size=30),
    st.sampled_from(["A red star.", "A \ud800.", " ", "\0"]),
)
PICTURES = st.sampled_from(
    [IMAGES[0], packed(IMAGES[1]), packed(IMAGES[1])[:99], b"", None, 7, "nowhere.png", "a\0b", {"bytes": None}]
)


@settings(max_examples=60)
@given(st.lists(st.tuples(PICTURES, CAPTIONS), max_size=5))
def test_every_row_has_its_verdict_and_the_schema_holds(keep, rows):
    """Whatever the columns hold: one verdict per row, values that JSON holds, and no pass without a picture and a caption."""
    made = keep({"image": [image for image, _ in rows], "caption": [caption for _, caption in rows]})
    assert json.loads(json.dumps([made[name] for name in COLUMNS], allow_nan=False)) == [made[name] for name in COLUMNS]
    for i, (image, caption) in enumerate(rows):
        assert made["gaze_verdict"][i] in ("pass", "flag", "unchecked")
        assert (made["gaze_verdict"][i] == "pass") == (made["gaze_reason"][i] == "")
        assert made["gaze_caption"][i] == (caption if isinstance(caption, str) else "")
        assert made["gaze_risk"][i] is None or 0 <= made["gaze_risk"][i] <= 1
        assert (made["gaze_risk"][i] is None) == (made["gaze_phrases"][i] == [])
        for phrase in made["gaze_phrases"][i]:
            assert list(phrase) == ["text", "span", "kind", "risk", "flagged", "box"]
            assert phrase["text"] == caption[slice(*phrase["span"])]
            assert phrase["box"] is None or len(phrase["box"]) == 4
        usable = isinstance(caption, str) and caption.strip() and (image is IMAGES[0] or image == packed(IMAGES[1]))
        assert usable or made["gaze_verdict"][i] == "unchecked"


# ------------------------------------------------------------------------------------------------- hostile pictures


def bomb() -> bytes:
    """A PNG of 400 million white pixels, in a few kilobytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return packed(Image.new("1", (20_000, 20_000), 1))


def frames() -> list[Image.Image]:
    return [Image.new("RGB", (40, 40), colour) for colour in ((255, 0, 0), (0, 0, 255))]


UNREADABLE = {
    "truncated": (packed(IMAGES[0])[:600], "the picture is damaged: "),
    "no picture": (b"%PDF-1.7 not a picture", "the picture is not a picture that Pillow can read"),
    "empty": (b"", "the picture is not a picture that Pillow can read"),
    "bomb": (bomb(), "the picture has more pixels than is safe to unpack"),
    "zero-size": (Image.new("RGB", (0, 0)), "the picture is 0 x 0 pixels: there is nothing in it"),
    "no rows": (np.zeros((0, 5, 3), np.uint8), "the picture "),
    "floats": (np.zeros((4, 4, 3)), "the picture cannot be read: "),
    "missing": (None, "there is no picture"),
    "missing in pandas": (math.nan, "there is no picture"),
    "missing file": ("nowhere.png", "the picture cannot be opened: No such file or directory"),
    "folder": ("/", "the picture cannot be opened: Is a directory"),
    "device": ("/dev/zero", "the picture is a device or a pipe"),
    "number": (7, "Expected one picture"),
}
READABLE = {
    "animated GIF": (packed(frames()[0], "GIF", save_all=True, append_images=frames()[1:]), (40, 40), (255, 0, 0)),
    "animated WebP": (
        packed(frames()[0], "WEBP", save_all=True, append_images=frames()[1:], lossless=True), (40, 40), (255, 0, 0)
    ),
    "CMYK": (packed(Image.new("CMYK", (30, 20), (0, 255, 255, 0)), "TIFF"), (30, 20), (255, 0, 0)),
    "16-bit": (packed(Image.fromarray(np.full((20, 30), 0x8000, np.uint16))), (30, 20), (128, 128, 128)),
    "one pixel": (packed(Image.new("RGB", (1, 1), (9, 9, 9))), (1, 1), (9, 9, 9)),
    "transparent": (packed(Image.new("RGBA", (30, 20), (255, 0, 0, 255))), (30, 20), (255, 0, 0)),
    "array": (np.full((20, 30, 3), 9, np.uint8), (30, 20), (9, 9, 9)),
    "datasets": ({"bytes": packed(Image.new("RGB", (30, 20))), "path": "gone.png"}, (30, 20), (0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_picture_that_cannot_be_read_is_a_reason(name):
    """In one line that begins with the picture, and without its path."""
    source, reason = UNREADABLE[name]
    said = picture_of(source)
    assert isinstance(said, str)
    assert said.startswith(reason)
    assert "nowhere" not in said


@pytest.mark.parametrize("name", READABLE)
def test_an_unusual_picture_is_read_as_documented(name):
    """Its first frame, in eight bits of red, green and blue."""
    source, size, colour = READABLE[name]
    picture = picture_of(source)
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", size, colour)


def test_a_picture_is_turned_upright_and_boxes_count_in_its_pixels(keep, told):
    """A camera's EXIF tag turns the picture before anything else; a sideways twin gives the same row."""
    exif = Image.Exif()
    exif[UPSIDE] = 6  # held so that a quarter turn clockwise makes it upright
    sideways = packed(IMAGES[1].transpose(Image.Transpose.ROTATE_90), exif=exif)
    made = keep({"image": [IMAGES[1], sideways], "caption": [told[1]] * 2, "prompt": PROMPTS[1:2] * 2})
    assert made["gaze_phrases"][0] == made["gaze_phrases"][1]


def test_bad_pictures_cost_no_other_row(keep, told):
    """Good rows among all of the bad ones say what they say alone; every bad one is unchecked with its reason."""
    bad = [source for source, _ in UNREADABLE.values()]
    alone = keep({"image": IMAGES, "caption": told, "prompt": PROMPTS})
    mixed = keep(
        {
            "image": [*bad, *IMAGES],
            "caption": [told[0]] * len(bad) + told,
            "prompt": [None] * len(bad) + PROMPTS,
        }
    )
    assert mixed["gaze_verdict"] == ["unchecked"] * len(bad) + alone["gaze_verdict"]
    assert mixed["gaze_reason"][len(bad) :] == alone["gaze_reason"]
    assert all(mixed["gaze_reason"][: len(bad)])


def test_bytes_of_a_shard_are_read_when_they_are_wanted(tmp_path):
    """A slice of a file is a picture like any other; too large a one is not read."""
    data = packed(IMAGES[0])
    (tmp_path / "shard").write_bytes(b"before" + data + b"after")
    assert picture_of(Slice(tmp_path / "shard", 6, len(data))).size == IMAGES[0].size
    assert picture_of(Slice(tmp_path / "shard", 6, 2**40)).startswith("the picture is larger than")
    assert picture_of(Slice(tmp_path / "gone", 6, 9)) == "the picture cannot be read: No such file or directory"


# ---------------------------------------------------------------------------------------------- a model in trouble


class Trouble:
    """Makes the model's forward raise whenever it gets more than ``rows`` rows, or a row whose caption holds ``word``."""

    def __init__(self, guard, error, rows=99, word=None):
        self.model, self.error, self.rows, self.seen = guard.model, error, rows, []
        self.ids = guard.processor.tokenizer(word, add_special_tokens=False).input_ids[0] if word else None

    def hook(self, _model, _args, kwargs):
        ids = kwargs["input_ids"]
        self.seen.append(len(ids))
        if len(ids) > self.rows or (self.ids is not None and (ids == self.ids).any()):
            raise self.error

    def __enter__(self):
        self.handle = self.model.register_forward_pre_hook(self.hook, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()


def test_a_batch_that_runs_out_of_memory_is_halved(keep, told):
    """Down to what fits, with every verdict as before; where not even one row fits, each is unchecked and says so."""
    batch = {"image": IMAGES, "caption": told, "prompt": PROMPTS}
    before = keep(batch)
    with Trouble(keep.guard, torch.OutOfMemoryError("CUDA out of memory."), rows=1) as trouble:
        assert keep(batch)["gaze_verdict"] == before["gaze_verdict"]
    assert trouble.seen == [3, 1, 2, 1, 1] * 2
    with Trouble(keep.guard, torch.OutOfMemoryError("CUDA out of memory."), rows=0):
        made = keep(batch)
    assert made["gaze_verdict"] == ["unchecked"] * 6
    assert set(made["gaze_reason"]) == {"out of memory, even for this row alone"}
    assert keep(batch) == before


def test_a_row_at_which_the_model_raises_is_unchecked_alone(keep, told):
    """The other rows of its batch keep their verdicts, and the model is left as it was."""
    captions = [*told[:5], "There is an anvil."]
    batch = {"image": IMAGES, "caption": captions, "prompt": PROMPTS}
    before = keep(batch)
    with Trouble(keep.guard, ValueError("index 9 is out of bounds\nat 0x7f"), word=" anvil"):
        made = keep(batch)
    broken = [i for i, reason in enumerate(made["gaze_reason"]) if reason.startswith("the model raised")]
    assert 5 in broken
    assert made["gaze_reason"][5] == "the model raised ValueError: index 9 is out of bounds"
    assert all(made["gaze_verdict"][i] == before["gaze_verdict"][i] for i in range(6) if i not in broken)
    assert keep(batch) == before


def test_numbers_that_are_not_finite_are_unchecked(lab_vlm, told):
    """NaN in the model's last norm reaches the logits, not the gaze: the row is unchecked all the same."""
    keep = CaptionFilter(GazeGuard(*lab_vlm), batch_size=3)
    weight = keep.guard.recorder.backbone.norm.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] = torch.nan
        made = keep({"image": IMAGES, "caption": told, "prompt": PROMPTS})
        written = keep({"image": IMAGES[:2], "prompt": PROMPTS[:2]})
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert made["gaze_verdict"] == ["unchecked"] * 6
    assert all(reason.startswith("the model gave no finite number for ") for reason in made["gaze_reason"])
    assert "pass" not in written["gaze_verdict"]


def test_pixels_that_do_not_reach_the_model_never_pass(keep, told, monkeypatch):
    """A processor that leaves the pixels out, as after a wrong argument: every row is unchecked, written or not."""
    processor = keep.guard.processor
    whole = type(processor).apply_chat_template

    def without(self, *args, **kwargs):
        made = whole(self, *args, **kwargs)
        made.pop("pixel_values")
        return made

    monkeypatch.setattr(type(processor), "apply_chat_template", without)
    for batch in ({"image": IMAGES, "caption": told, "prompt": PROMPTS}, {"image": IMAGES, "prompt": PROMPTS}):
        made = keep(batch)
        assert made["gaze_verdict"] == ["unchecked"] * 6
        assert all(reason.startswith("The picture did not reach the model") for reason in made["gaze_reason"])


def test_reasons_are_the_same_each_time():
    """No addresses and no amounts of memory, so that results are equal; one line, not too long."""
    assert explain(MemoryError()) == explain(torch.OutOfMemoryError("12 MiB")) == "out of memory, even for this row alone"
    assert explain(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "out of memory, even for this row alone"
    assert explain(KeyError()) == "the model raised KeyError"
    assert len(explain(ValueError("x" * 10_000))) < 400


def test_no_more_pictures_are_unpacked_than_are_needed_soon(keep, told, monkeypatch):
    """At most `AHEAD` batches wait while one is judged, however many rows there are."""
    opened, most = [0], [0]

    class Counted(CaptionFilter):
        def _judged(self, rows, prepared=None):
            most[0] = max(most[0], opened[0])
            opened[0] -= len(rows)
            return [self.guard.unchecked(row.caption, "not looked at") for row in rows]

    def counting(source):
        opened[0] += 1
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr("gazeguard.filtering.caption_filter.picture_of", counting)
    Counted(keep.guard, batch_size=3)({"image": [b""] * 60, "caption": ["A star."] * 60})
    assert 0 < most[0] <= 3 * (AHEAD + 1)


def test_the_next_batch_is_encoded_while_the_model_is_busy(keep, told, monkeypatch):
    """The model's first pass waits here until the second batch has been encoded; in turns it would wait for ever."""
    encoded, waited = threading.Semaphore(0), []

    def counting(*of):
        encoded.release()
        return encode(*of)

    def wait(*_):
        if not waited:
            waited.extend(encoded.acquire(timeout=60) for _ in range(2))

    monkeypatch.setattr("gazeguard.guard.encode", counting)
    handle = keep.guard.model.register_forward_pre_hook(wait)
    try:
        made = CaptionFilter(keep.guard, batch_size=2)({"image": IMAGES[:4], "caption": told[:4]})
    finally:
        handle.remove()
    assert waited == [True, True]
    assert "unchecked" not in made["gaze_verdict"]
