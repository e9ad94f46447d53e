"""Packed captions: several captions of one image and prompt in one row are judged as each in a row of its own."""

import numpy as np
import pytest
import torch
from families import family
from guardkit import SAMPLES, assert_same_trace, two_lengths
from invariants import MAKERS, keys, works

from gazeguard.attention.backbone import find_backbone
from gazeguard.attention.buffers import CapturedActivations
from gazeguard.attention.layout import KeyLayout
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.filtering.batches import PendingRow, batches_of
from gazeguard.filtering.caption_filter import CaptionFilter
from gazeguard.guard import GazeGuard
from gazeguard.tracing import Captured, can_pack
from gazeguard.vision import packing
from gazeguard.vision.inputs import append_tokens, model_inputs
from gazeguard.vision.packing import pack, worth_packing

ROWS, LENGTHS = (0, 1, 0, 2, 0, 2), (4, 6, 3, 5, 7, 2)  # of six captions
QUICK = ("Idefics3", "LLaVA", "Qwen2.5-VL", "Qwen3-VL", "InternVL", "Mistral3")
STATEFUL = ("Qwen3.5", "Gemma3", "Florence-2", "Mllama", "PaliGemma", "Lfm2-VL")


def captured(kind, inputs, whole):
    with AttentionRecorder(kind.model, find_backbone(kind.model).heads()) as recorder:
        recorder.begin(KeyLayout.from_ids(*keys(kind, inputs)))
        kind.model(**model_inputs(kind.model, whole), use_cache=False)
        return recorder.collect()


def assert_packed_is_apart(kind):
    """Attention, head outputs and states of every token, in a padded batch whose rows have different numbers of captions."""
    drawn = torch.Generator().manual_seed(3)
    captions = [torch.randint(2, 119, (length,), generator=drawn).numpy() for length in LENGTHS]
    inputs = kind.batch(ROWS)
    apart = captured(kind, inputs, append_tokens(kind.model, inputs, captions))
    inputs = kind.batch((0, 1, 2))
    whole, packing = pack(kind.model, inputs, captions, ROWS)
    together = Captured(captured(kind, inputs, whole), None).unpacked(packing).activations
    for number, length in enumerate(LENGTHS):
        one, other = (
            CapturedActivations(*(tensor[number, :length] for tensor in vars(rows).values())) for rows in (apart, together)
        )
        for name in ("gaze", "segment_mass", "output", "hidden"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=3e-5, msg=lambda m: m[:300])


@pytest.mark.usefixtures("quietly")
@pytest.mark.parametrize("name", QUICK)
def test_packed_captions_are_recorded_as_if_apart(name):
    assert can_pack(family(name).model, find_backbone(family(name).model))
    assert_packed_is_apart(family(name))


@pytest.mark.slow
@pytest.mark.usefixtures("quietly")
@pytest.mark.parametrize("name", MAKERS)
def test_every_family_that_packs_packs_rightly(name):
    if not works(name) or not can_pack((kind := MAKERS[name]()).model, find_backbone(kind.model)):
        pytest.skip("its captions are not packed")
    assert_packed_is_apart(kind)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_cannot_pack_says_so(name):
    """Recurrent states, sliding windows, cross-attention, prompts that attend both ways."""
    model = MAKERS[name]().model
    assert not can_pack(model, find_backbone(model))


def test_other_kernels_read_captions_apart(lab_vlm):
    model = lab_vlm[0]
    model.set_attn_implementation("eager")
    try:
        assert not can_pack(model, find_backbone(model))
    finally:
        model.set_attn_implementation("sdpa")


def several(vlm):
    """Images, captions and prompts of two lengths: three or four captions of an image, one image for two prompts."""
    samples, prompts, _ = two_lengths(vlm)
    rows = [0, 1, 0, 0, 1, 0, 1, 2, 2, 2, 2]
    told = [samples[i].turns[0].answer for i in rows]
    told = [" ".join(text.split()[: 5 + 3 * (n % 4)]).rstrip(".,") + "." for n, text in enumerate(told)]
    asked = [prompts[i] for i in rows]
    asked[-1] = "Describe the picture in detail."
    images = [sample.image for sample in samples[:3]]
    return [images[i] for i in rows], told, asked


@pytest.mark.parametrize("policy", ["mark", "verify"])
def test_reports_of_packed_captions_are_those_of_each_alone(lab_vlm, policy):
    """Verdicts, risks, answers and traces, with prompts of different lengths in one batch."""
    guard = GazeGuard(*lab_vlm, policy)
    images, captions, prompts = several(lab_vlm)
    prepared = guard.tracer.prepare(images, captions, prompts, packed=True)
    assert prepared.parts[0].batch.packing is not None
    together = guard.check_prepared(prepared)
    apart = guard.check_prepared(guard.prepare(images, captions, prompts))
    assert len({report.verdict for report in apart}) > 1
    for one, other in zip(together, apart, strict=True):
        assert (one.caption, one.verdict, one.reason) == (other.caption, other.verdict, other.reason)
        assert [f.flagged for f in one.findings] == [f.flagged for f in other.findings]
        np.testing.assert_allclose([f.risk for f in one.findings], [f.risk for f in other.findings], atol=1e-5)
        answers = [[np.nan if f.answer is None else f.answer for f in report.findings] for report in (one, other)]
        np.testing.assert_allclose(*answers, atol=1e-5)
        if one.trace is not None:
            assert_same_trace(one.trace, other.trace, 2e-5)


def test_a_caption_that_cannot_be_read_costs_the_others_of_its_image_nothing(guard):
    """Nor does an image that cannot be opened."""
    image, told = SAMPLES[0].image, SAMPLES[0].turns[0].answer
    captions = [told, "", told, "A star. " * 4000, told, "A star."]
    reports = guard.check_all([image] * 5 + ["nowhere.png"], captions, SAMPLES[0].prompt)
    alone = guard.check(image, told, SAMPLES[0].prompt)
    assert [report.verdict for report in reports[0:5:2]] == [alone.verdict] * 3
    assert [report.verdict for report in reports[1::2]] == ["unchecked"] * 3
    assert "context" in reports[3].reason
    assert "cannot be opened" in reports[5].reason


def test_captions_whose_mask_would_fill_the_memory_are_read_apart(lab_vlm, monkeypatch):
    """One endless caption beside others of its image costs no memory; many long ones are judged as each alone."""
    guard = GazeGuard(*lab_vlm, "mark")
    images, captions, prompts = several(lab_vlm)
    monkeypatch.setattr(packing, "MAX_MASK", 10**5)
    prepared = guard.tracer.prepare(images, captions, prompts, packed=True)
    assert prepared.parts[0].batch.packing is None
    for one, other in zip(
        guard.check_prepared(prepared), guard.check_prepared(guard.prepare(images, captions, prompts)), strict=True
    ):
        assert one.to_json() == other.to_json()
    assert not packing.fits(200, [np.zeros(400_000, np.int64), np.zeros(9, np.int64)], [0, 0])
    assert packing.fits(10, [np.zeros(9, np.int64)] * 3, [0, 0, 1])


def test_steered_captions_are_read_apart(guard):
    with guard.steer((0, 0, 10, 10)):
        prepared = guard.tracer.prepare([SAMPLES[0].image] * 4, ["A star."] * 4, ["Describe the picture."] * 4, packed=True)
    assert prepared.parts[0].batch.packing is None


@pytest.mark.parametrize(
    ("rows", "worth"), [([0] * 5, True), ([0, 0, 1, 1], True), ([0, 1, 2, 3], False), ([*range(15), 14], False)]
)
def test_captions_are_packed_where_the_model_reads_less(rows, worth):
    assert worth_packing(rows) == worth


def test_batches_keep_the_captions_of_an_image_together():
    """Paths are told apart by name, other images as objects; a batch holds whole images where they fit."""
    one, other = (np.zeros((2, 2, 3), np.uint8) for _ in range(2))
    images = ["a.png", one, "b.png", "a.png", other, one, "a.png", "b.png", one]
    rows = [PendingRow(number, image, "x" * (number % 4 + 1), "Say it.") for number, image in enumerate(images)]
    batches = batches_of(rows, 4)
    assert sorted(row.number for batch in batches for row in batch) == list(range(9))
    assert max(map(len, batches)) <= 4
    where = {number: at for at, batch in enumerate(batches) for number in (row.number for row in batch)}
    for group in ((0, 3, 6), (1, 5, 8), (2, 7)):
        assert len({where[number] for number in group}) == 1
    assert [len(batch) for batch in batches_of([PendingRow(n, "a.png", "A.", "Say it.") for n in range(9)], 4)] == [4, 4, 1]
    assert batches_of([], 4) == []


def test_the_filter_opens_an_image_of_several_captions_once(guard, tmp_path, monkeypatch):
    """And says of each row what the guard says of it alone."""
    from gazeguard.filtering import batches

    opened = []
    real = batches.open_image
    monkeypatch.setattr(batches, "open_image", lambda source, background: opened.append(source) or real(source, background))
    paths = []
    for number, sample in enumerate(SAMPLES[:2]):
        sample.image.save(tmp_path / f"{number}.png")
        paths += [str(tmp_path / f"{number}.png")] * 4
    told = [SAMPLES[0].turns[0].answer, "A red star.", SAMPLES[1].turns[0].answer, "A blue moon."] * 2
    rows = CaptionFilter(guard).judge(paths, told)
    assert sorted(opened) == sorted(set(paths))
    for row, path, caption in zip(rows, paths, told, strict=True):
        assert row["gaze_verdict"] == guard.check(path, caption).verdict
