"""The filter as a callable: a verdict per row, and no row that costs another or passes unseen."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gazeguard import __version__, lab
from gazeguard.errors import InputError, UnsupportedError
from gazeguard.filtering.batches import PREFETCHED, open_image
from gazeguard.filtering.caption_filter import NO_CAPTION, CaptionFilter, explain_failure
from gazeguard.filtering.ray import ArrowCaptionFilter
from gazeguard.filtering.rows import COLUMNS, FileSlice
from gazeguard.guard import GazeGuard

SAMPLES = lab.samples("test", 6, seed=7)
IMAGES, PROMPTS = [s.image for s in SAMPLES], [s.prompt for s in SAMPLES]
UPSIDE = 274  # the EXIF tag that says how the camera was held


def packed(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def caption_filter(lab_vlm):
    """A filter over the lab's model, three rows at a time."""
    return CaptionFilter(GazeGuard(*lab_vlm), batch_size=3)


def writing(caption_filter: CaptionFilter, **options) -> CaptionFilter:
    """The same filter, asked to write captions."""
    return CaptionFilter(caption_filter.guard, batch_size=3, write_captions=True, **options)


@pytest.fixture(scope="module")
def captions(caption_filter):
    """Captions of the lab's own."""
    return writing(caption_filter)({"image": IMAGES, "prompt": PROMPTS})["caption"]


# ------------------------------------------------------------------------------------------------------------- rules


def test_a_batch_says_what_the_guard_says_of_each_row(caption_filter, captions):
    """Verdict, risk and phrases are those of `check`, whatever the batch; columns that were there stay."""
    batch = {"id": list(range(6)), "image": IMAGES, "caption": captions, "prompt": PROMPTS}
    results = caption_filter(batch)
    assert list(results) == [*batch, *COLUMNS]
    assert all(results[name] is batch[name] for name in batch)
    assert {"pass", "flag"} == set(results["gaze_verdict"])
    for i, sample in enumerate(SAMPLES):
        report = caption_filter.guard.check(sample.image, captions[i], sample.prompt)
        assert results["gaze_verdict"][i] == report.verdict
        assert results["gaze_reason"][i] == report.reason
        assert results["gaze_risk"][i] == pytest.approx(max(f.risk for f in report.findings), abs=1e-3)
        for phrase, finding in zip(results["gaze_phrases"][i], report.findings, strict=True):
            assert phrase["text"] == finding.claim.text == captions[i][slice(*phrase["span"])]
            assert (phrase["kind"], phrase["flagged"]) == (finding.claim.kind, finding.flagged)
            assert phrase["risk"] == pytest.approx(finding.risk, abs=1e-3)
    assert set(results["gaze_policy"]) == {"mark"}
    assert set(results["gaze_version"]) == {__version__}


def test_the_same_batch_gives_the_same_columns(caption_filter, captions):
    """Byte for byte, with one thread that unpacks images or four."""
    batch = {"image": [packed(image) for image in IMAGES], "caption": captions, "prompt": PROMPTS}
    other = CaptionFilter(caption_filter.guard, batch_size=3, workers=4)
    assert json.dumps([caption_filter(batch)[name] for name in COLUMNS]) == json.dumps([other(batch)[name] for name in COLUMNS])


def test_captions_that_are_missing_are_written_under_guard(caption_filter, captions):
    """What is written is what generate writes, greedily; the verdict is that of the live trace."""
    assert all(text.startswith(("There", "In panel")) for text in captions)
    live = writing(caption_filter)({"image": IMAGES, "prompt": PROMPTS})
    replayed = caption_filter({"image": IMAGES, "prompt": PROMPTS, "caption": captions})
    assert live["gaze_verdict"] == replayed["gaze_verdict"]
    short = writing(caption_filter, max_new_tokens=3)({"image": IMAGES[:1], "prompt": PROMPTS[:1]})
    assert short["gaze_verdict"][0] == "unchecked"


def test_captions_are_written_only_when_asked_and_never_over_a_rows_own(caption_filter, captions):
    """Whatever row comes first: without the option a missing caption is a reason, with it the other captions stay."""
    own = [None, captions[1], "", math.nan, 7, captions[5]]
    batch = {"image": IMAGES, "caption": own, "prompt": PROMPTS}
    checked, alone = caption_filter(batch), caption_filter({**batch, "caption": captions})
    assert checked["caption"] is own
    assert [checked["gaze_reason"][i] for i in (0, 2, 3, 4)] == [
        NO_CAPTION, "the caption is empty", NO_CAPTION, "the caption is not text: int"
    ]  # fmt: skip
    written = writing(caption_filter)(batch)
    assert written["caption"] == [captions[0], captions[1], captions[2], captions[3], 7, captions[5]]
    for results, numbers in ((checked, (1, 5)), (written, (0, 1, 2, 3, 5))):
        assert [results["gaze_verdict"][i] for i in numbers] == [alone["gaze_verdict"][i] for i in numbers]
    assert written["gaze_verdict"][4] == "unchecked"
    with pytest.raises(InputError, match=r"no column 'caption', only 'image'. Pass caption=NAME, or write_captions=True"):
        caption_filter({"image": IMAGES})


def test_nul_characters_are_never_judged(caption_filter):
    results = caption_filter({"image": IMAGES[:1], "caption": ["A\0 \0r\0e\0d\0"]})
    assert results["gaze_verdict"] == ["unchecked"]
    assert results["gaze_reason"][0].startswith("the caption has NUL characters")


def test_the_policy_says_what_is_let_through(caption_filter, captions):
    """drop leaves what is not flagged, abstain nothing but what passes; verdicts and phrases are those of mark."""
    batch = {"image": [*IMAGES, b""], "caption": [*captions, captions[0]], "prompt": [*PROMPTS, None]}
    marked = caption_filter(batch)
    assert marked["gaze_caption"] == batch["caption"]
    for name in ("drop", "abstain"):
        guard = GazeGuard(caption_filter.guard.model, caption_filter.guard.processor, policy=name)
        results = CaptionFilter(guard, batch_size=3)(batch)
        assert results["caption"] == batch["caption"]
        assert set(results["gaze_policy"]) == {name}
        assert results["gaze_verdict"] == marked["gaze_verdict"]
        for verdict, text, left in zip(results["gaze_verdict"], batch["caption"], results["gaze_caption"], strict=True):
            if verdict == "pass":
                assert left == text
            elif name == "abstain":
                assert left == ""
            else:
                assert (left != text) == (verdict == "flag")


def test_neighbours_in_length_share_a_batch(caption_filter, captions):
    """So that little is padded, wherever the rows stand; results come in the order of the rows."""
    short, long = "A red star.", captions[0]
    images = [IMAGES[0].copy() for _ in range(6)]  # captions of one and the same would share a row
    batch = {"image": images, "caption": [short, long] * 3, "prompt": [PROMPTS[0]] * 6}
    seen = []
    handle = caption_filter.guard.model.register_forward_pre_hook(
        lambda _model, _args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        results = caption_filter(batch)
    finally:
        handle.remove()
    (rows, narrow), (more, wide) = seen
    assert rows == more == 3
    assert narrow < wide
    assert [phrases[0]["text"] for phrases in results["gaze_phrases"][::2]] == ["A red star"] * 3
    assert results["gaze_phrases"][1] == results["gaze_phrases"][3]


def test_datasets_map_takes_it_as_it_is(caption_filter, captions):
    """Images as datasets keep them, the verdicts of a plain call."""
    datasets = pytest.importorskip("datasets")
    columns = {"image": IMAGES, "caption": captions, "prompt": PROMPTS}
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "prompt": datasets.Value("string")}
    )
    dataset = datasets.Dataset.from_dict(columns, features=features)
    results = dataset.map(caption_filter, batched=True, batch_size=4)
    expected = caption_filter(columns)
    assert results.column_names == [*columns, *COLUMNS]
    assert list(results["gaze_verdict"]) == expected["gaze_verdict"]
    assert list(results["gaze_caption"]) == captions
    assert len(results.filter(lambda row: row["gaze_verdict"] == "pass")) == expected["gaze_verdict"].count("pass")


def test_a_pickled_filter_is_its_arguments_and_not_its_weights(caption_filter):
    """So that datasets finds its cached results again, and hashes no model."""
    fingerprint = pytest.importorskip("datasets.fingerprint")
    named = CaptionFilter(model="lab", batch_size=3)
    again = pickle.loads(pickle.dumps(named))
    false = {"image": IMAGES[:2], "caption": ["There is a red skull."] * 2}
    assert again(false) == named(false)
    assert len(pickle.dumps(named)) < 5000
    hashed = fingerprint.Hasher.hash(named)
    assert fingerprint.Hasher.hash(again) == hashed
    again.batch_size = 4
    assert fingerprint.Hasher.hash(again) != hashed
    with pytest.raises(UnsupportedError, match=r"Make it of the model's name: CaptionFilter\(model="):
        pickle.dumps(caption_filter)


def test_a_table_has_the_same_types_whatever_it_holds(caption_filter, captions):
    """As Ray wants of its blocks: rows without phrases, or without boxes, change no type."""
    pa = pytest.importorskip("pyarrow")
    arrow = ArrowCaptionFilter(caption_filter.guard, batch_size=3)
    whole = pa.table({"image": [packed(image) for image in IMAGES], "caption": captions, "prompt": PROMPTS})
    results, none = arrow(whole), arrow(whole.slice(0, 0))
    lacking = pa.table({**whole.to_pydict(), "caption": [None, *captions[1:]]})
    assert ArrowCaptionFilter(caption_filter.guard, write_captions=True)(lacking)["caption"].to_pylist() == captions
    bad = arrow(pa.table({"image": [b"", b""], "caption": ["A star.", None], "prompt": [None, None]}))
    assert results.schema == none.schema
    assert [field.type for field in bad.schema if field.name in COLUMNS] == [
        results.schema.field(name).type for name in COLUMNS
    ]
    assert results.select(list(COLUMNS)).to_pydict() == {name: caption_filter(whole.to_pydict())[name] for name in COLUMNS}


def test_an_empty_batch_has_every_column(caption_filter):
    """As Ray and datasets ask for, to learn the schema."""
    assert caption_filter({"image": [], "caption": []}) == {"image": [], "caption": [], **{name: [] for name in COLUMNS}}


def test_columns_that_do_not_fit_are_refused(caption_filter):
    with pytest.raises(InputError, match=r"no column 'image', only 'photo'. Pass image=NAME"):
        caption_filter({"photo": []})
    with pytest.raises(InputError, match="not of one length"):
        caption_filter({"image": IMAGES, "caption": ["A star."]})
    with pytest.raises(InputError, match=r"batch_size, workers and max_new_tokens are 0, 2 and 256. Give each at least 1"):
        CaptionFilter(caption_filter.guard, batch_size=0)


CAPTIONS = st.one_of(
    st.none(),
    st.just(float("nan")),
    st.integers(),
    st.text(max_size=30),
    st.sampled_from(["A red star.", "A \ud800.", " ", "\0"]),
)
SOURCES = st.sampled_from(
    [IMAGES[0], packed(IMAGES[1]), packed(IMAGES[1])[:99], b"", None, 7, "nowhere.png", "a\0b", {"bytes": None}]
)


@settings(max_examples=60)
@given(st.lists(st.tuples(SOURCES, CAPTIONS), max_size=5))
def test_every_row_has_its_verdict_and_the_schema_holds(caption_filter, rows):
    """Whatever the columns hold: one verdict per row, values that JSON holds, and no pass without an image and a caption."""
    results = caption_filter({"image": [image for image, _ in rows], "caption": [caption for _, caption in rows]})
    assert json.loads(json.dumps([results[name] for name in COLUMNS], allow_nan=False)) == [results[name] for name in COLUMNS]
    for i, (image, caption) in enumerate(rows):
        assert results["gaze_verdict"][i] in ("pass", "flag", "unchecked")
        assert (results["gaze_verdict"][i] == "pass") == (results["gaze_reason"][i] == "")
        assert results["gaze_caption"][i] == (caption if isinstance(caption, str) else "")
        assert results["gaze_risk"][i] is None or 0 <= results["gaze_risk"][i] <= 1
        assert (results["gaze_risk"][i] is None) == (results["gaze_phrases"][i] == [])
        for phrase in results["gaze_phrases"][i]:
            assert list(phrase) == ["text", "span", "kind", "risk", "flagged", "box"]
            assert phrase["text"] == caption[slice(*phrase["span"])]
            assert phrase["box"] is None or len(phrase["box"]) == 4
        usable = isinstance(caption, str) and caption.strip() and (image is IMAGES[0] or image == packed(IMAGES[1]))
        assert usable or results["gaze_verdict"][i] == "unchecked"


# ------------------------------------------------------------------------------------------------- hostile images


def bomb() -> bytes:
    """A PNG of 400 million white pixels, in a few kilobytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return packed(Image.new("1", (20_000, 20_000), 1))


def frames() -> list[Image.Image]:
    return [Image.new("RGB", (40, 40), colour) for colour in ((255, 0, 0), (0, 0, 255))]


UNREADABLE = {
    "truncated": (packed(IMAGES[0])[:600], "the image is damaged: "),
    "no image": (b"%PDF-1.7 not an image", "the image is not an image that Pillow can read"),
    "empty": (b"", "the image is not an image that Pillow can read"),
    "bomb": (bomb(), "the image has more pixels than is safe to unpack"),
    "zero-size": (Image.new("RGB", (0, 0)), "the image is 0 x 0 pixels: there is nothing in it"),
    "no rows": (np.zeros((0, 5, 3), np.uint8), "the image "),
    "floats": (np.zeros((4, 4, 3)), "the image cannot be read: "),
    "missing": (None, "there is no image"),
    "missing in pandas": (math.nan, "there is no image"),
    "missing file": ("nowhere.png", "the image cannot be opened: No such file or directory"),
    "folder": ("/", "the image cannot be opened: Is a directory"),
    "device": ("/dev/zero", "the image is a device or a pipe"),
    "number": (7, "Expected one image "),
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
def test_an_image_that_cannot_be_read_is_a_reason(name):
    """In one line that begins with the image, and without its path."""
    source, reason = UNREADABLE[name]
    said = open_image(source)
    assert isinstance(said, str)
    assert said.startswith(reason)
    assert "nowhere" not in said


@pytest.mark.parametrize("name", READABLE)
def test_an_unusual_image_is_read_as_documented(name):
    """Its first frame, in eight bits of red, green and blue."""
    source, size, colour = READABLE[name]
    image = open_image(source)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", size, colour)


def test_an_image_is_turned_upright_and_boxes_count_in_its_pixels(caption_filter, captions):
    """A camera's EXIF tag turns the image before anything else; a sideways twin gives the same row."""
    exif = Image.Exif()
    exif[UPSIDE] = 6  # held so that a quarter turn clockwise makes it upright
    sideways = packed(IMAGES[1].transpose(Image.Transpose.ROTATE_90), exif=exif)
    results = caption_filter({"image": [IMAGES[1], sideways], "caption": [captions[1]] * 2, "prompt": PROMPTS[1:2] * 2})
    assert results["gaze_phrases"][0] == results["gaze_phrases"][1]


def test_bad_images_cost_no_other_row(caption_filter, captions):
    """Good rows among all of the bad ones say what they say alone; every bad one is unchecked with its reason."""
    bad = [source for source, _ in UNREADABLE.values()]
    alone = caption_filter({"image": IMAGES, "caption": captions, "prompt": PROMPTS})
    mixed = caption_filter(
        {
            "image": [*bad, *IMAGES],
            "caption": [captions[0]] * len(bad) + captions,
            "prompt": [None] * len(bad) + PROMPTS,
        }
    )
    assert mixed["gaze_verdict"] == ["unchecked"] * len(bad) + alone["gaze_verdict"]
    assert mixed["gaze_reason"][len(bad) :] == alone["gaze_reason"]
    assert all(mixed["gaze_reason"][: len(bad)])


def test_bytes_of_a_shard_are_read_when_they_are_wanted(tmp_path):
    """A slice of a file is an image like any other; too large a one is not read."""
    data = packed(IMAGES[0])
    (tmp_path / "shard").write_bytes(b"before" + data + b"after")
    assert open_image(FileSlice(tmp_path / "shard", 6, len(data))).size == IMAGES[0].size
    assert open_image(FileSlice(tmp_path / "shard", 6, 2**40)).startswith("the image is larger than")
    assert open_image(FileSlice(tmp_path / "gone", 6, 9)) == "the image cannot be read: No such file or directory"


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


def test_a_batch_that_runs_out_of_memory_is_halved(caption_filter, captions):
    """Down to what fits, with every verdict as before; where not even one row fits, each is unchecked and says so."""
    batch = {"image": IMAGES, "caption": captions, "prompt": PROMPTS}
    before = caption_filter(batch)
    with Trouble(caption_filter.guard, torch.OutOfMemoryError("CUDA out of memory."), rows=1) as trouble:
        assert caption_filter(batch)["gaze_verdict"] == before["gaze_verdict"]
    assert trouble.seen == [3, 1, 2, 1, 1] * 2
    with Trouble(caption_filter.guard, torch.OutOfMemoryError("CUDA out of memory."), rows=0):
        results = caption_filter(batch)
    assert results["gaze_verdict"] == ["unchecked"] * 6
    assert set(results["gaze_reason"]) == {"out of memory, even for this row alone"}
    assert caption_filter(batch) == before


def test_a_row_at_which_the_model_raises_is_unchecked_alone(caption_filter, captions):
    """The other rows of its batch keep their verdicts, and the model is left as it was."""
    captions = [*captions[:5], "There is an anvil."]
    batch = {"image": IMAGES, "caption": captions, "prompt": PROMPTS}
    before = caption_filter(batch)
    with Trouble(caption_filter.guard, ValueError("index 9 is out of bounds\nat 0x7f"), word=" anvil"):
        results = caption_filter(batch)
    broken = [i for i, reason in enumerate(results["gaze_reason"]) if reason.startswith("the model raised")]
    assert 5 in broken
    assert results["gaze_reason"][5] == "the model raised ValueError: index 9 is out of bounds"
    assert all(results["gaze_verdict"][i] == before["gaze_verdict"][i] for i in range(6) if i not in broken)
    assert caption_filter(batch) == before


def test_numbers_that_are_not_finite_are_unchecked(lab_vlm, captions):
    """NaN in the model's last norm reaches the logits, not the gaze: the row is unchecked all the same."""
    caption_filter = CaptionFilter(GazeGuard(*lab_vlm), batch_size=3)
    weight = caption_filter.guard.tracer.recorder.backbone.norm.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] = torch.nan
        results = caption_filter({"image": IMAGES, "caption": captions, "prompt": PROMPTS})
        written = writing(caption_filter)({"image": IMAGES[:2], "prompt": PROMPTS[:2]})
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert results["gaze_verdict"] == ["unchecked"] * 6
    assert all(reason.startswith("the model gave no finite number for ") for reason in results["gaze_reason"])
    assert "pass" not in written["gaze_verdict"]


def test_pixels_that_do_not_reach_the_model_never_pass(caption_filter, captions, monkeypatch):
    """A processor that leaves the pixels out, as after a wrong argument: every row is unchecked, written or not."""
    processor = caption_filter.guard.processor
    whole = type(processor).apply_chat_template

    def without(self, *args, **kwargs):
        results = whole(self, *args, **kwargs)
        results.pop("pixel_values")
        return results

    monkeypatch.setattr(type(processor), "apply_chat_template", without)
    batch = {"image": IMAGES, "caption": captions, "prompt": PROMPTS}
    for results in (caption_filter(batch), writing(caption_filter)({"image": IMAGES, "prompt": PROMPTS})):
        assert results["gaze_verdict"] == ["unchecked"] * 6
        assert all("did not reach the model" in reason for reason in results["gaze_reason"])


def test_reasons_are_the_same_each_time():
    """No addresses and no amounts of memory, so that results are equal; one line, not too long."""
    memory = "out of memory, even for this row alone"
    assert explain_failure(MemoryError()) == explain_failure(torch.OutOfMemoryError("12 MiB")) == memory
    assert explain_failure(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == memory
    assert explain_failure(KeyError()) == "the model raised KeyError"
    assert len(explain_failure(ValueError("x" * 10_000))) < 400


def test_no_more_images_are_opened_than_are_needed_soon(caption_filter, monkeypatch):
    """At most `PREFETCHED` batches wait while one is judged, however many rows there are."""
    opened, most = [0], [0]

    def judge(rows):
        most[0] = max(most[0], opened[0])
        opened[0] -= rows
        return [caption_filter.guard.unchecked("A star.", "not judged")] * rows

    def count(source, background):
        opened[0] += 1
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr("gazeguard.filtering.batches.open_image", count)
    monkeypatch.setattr(caption_filter.guard.tracer, "prepare", lambda images, captions, prompts, packed: len(captions))
    monkeypatch.setattr(caption_filter.guard, "check_prepared", judge)
    results = caption_filter({"image": [bytes([n]) for n in range(60)], "caption": ["A star."] * 60})
    assert results["gaze_reason"] == ["not judged"] * 60
    assert 0 < most[0] <= 3 * (PREFETCHED + 1)


def test_the_next_batch_is_encoded_while_the_model_is_busy(caption_filter, captions, monkeypatch):
    """The model's first pass waits here until the second batch has been encoded; in turns it would wait for ever."""
    encoded, waited, prepare = threading.Semaphore(0), [], caption_filter.guard.tracer.prepare

    def count(*arguments, **options):
        prepared = prepare(*arguments, **options)
        encoded.release()
        return prepared

    def wait(*_):
        if not waited:
            waited.extend(encoded.acquire(timeout=600) for _ in range(2))

    monkeypatch.setattr(caption_filter.guard.tracer, "prepare", count)
    handle = caption_filter.guard.model.register_forward_pre_hook(wait)
    try:
        results = CaptionFilter(caption_filter.guard, batch_size=2)({"image": IMAGES[:4], "caption": captions[:4]})
    finally:
        handle.remove()
    assert waited == [True, True]
    assert "unchecked" not in results["gaze_verdict"]


def test_a_filter_takes_a_guard_or_a_model(caption_filter, captions, tmp_path):
    """A model is loaded with its artifacts; what fits together badly is one sentence."""
    for name in ("heads.json", "detector.json"):
        (tmp_path / name).write_bytes((lab.checkpoint_path() / name).read_bytes())
    batch = {"image": IMAGES[:3], "caption": captions[:3], "prompt": PROMPTS[:3]}
    loaded = CaptionFilter(model="lab", artifacts=tmp_path, device="cpu", dtype="float32", policy="drop", batch_size=3)
    assert loaded(batch)["gaze_verdict"] == caption_filter(batch)["gaze_verdict"]
    assert set(loaded(batch)["gaze_policy"]) == {"drop"}
    with pytest.raises(InputError, match=r"neither a guard nor a model. Pass a GazeGuard, or model='folder or hub id'"):
        CaptionFilter()
    with pytest.raises(
        InputError, match=r"The guard is 'lab', expected a GazeGuard. Pass the folder or hub id of a model as model="
    ):
        CaptionFilter("lab")
    with pytest.raises(InputError, match="A guard has its own model, artifacts and policy"):
        CaptionFilter(caption_filter.guard, policy="drop")


def test_the_python_of_the_recipes_runs(capsys):
    recipes = (Path(__file__).parents[1] / "docs" / "filter-recipes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", recipes, re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "['unchecked']\n"  # there is no a.jpg
    assert all(f"`{name}`" in recipes for name in COLUMNS)
