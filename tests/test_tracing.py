"""The tracer: live and replayed traces are the same, row by row, in the pixels of the given image."""

import copy
import re

import numpy as np
import pytest
from guardkit import SAMPLES, assert_same_trace, batch_of

from gazeguard.attention.steering import SteeringTarget
from gazeguard.errors import InputError
from gazeguard.guard import GazeGuard
from gazeguard.report import Verdict
from gazeguard.tracing import Tracer
from gazeguard.vision.encoding import encode
from gazeguard.vision.grid import ImageGrid


def test_replay_equals_live(guard):
    """Invariant (b): checking the caption that was generated gives the trace of its generation."""
    guard.generate(**batch_of(guard, max_new_tokens=200))
    live = guard.reports
    for sample, report in zip(SAMPLES, live, strict=True):
        replayed = guard.check(sample.image, report.caption, sample.prompt)
        assert_same_trace(replayed.trace, report.trace)
        assert [f.flagged for f in replayed.findings] == [f.flagged for f in report.findings]


def test_a_padded_batch_equals_its_single_rows(guard):
    """Invariant (d), live and replayed: prompts and captions of different lengths, together and alone."""
    prompts = ["Describe the picture.", "Is there a red star in panel one?", "Name one object."]
    images = [s.image for s in SAMPLES[:3]]
    made = encode(guard.model, guard.processor, images, prompts)
    assert not made.prompt_mask.bool().all(), "the test needs padding"
    guard.generate(**made.inputs, max_new_tokens=40, do_sample=False)
    together = guard.reports
    for report, image, prompt in zip(together, images, prompts, strict=True):
        alone = guard.caption(image, prompt, max_new_tokens=40, do_sample=False)
        assert_same_trace(alone.trace, report.trace)
    captions = [s.turns[0].answer for s in SAMPLES]
    replayed = guard.check_all([s.image for s in SAMPLES], captions)
    for report, sample, caption in zip(replayed, SAMPLES, captions, strict=True):
        assert_same_trace(guard.check(sample.image, caption).trace, report.trace)
    answered = guard.check_all([s.image for s in SAMPLES], captions, [s.prompt for s in SAMPLES])
    for report, sample, caption in zip(answered, SAMPLES, captions, strict=True):
        assert_same_trace(guard.check(sample.image, caption, sample.prompt).trace, report.trace)


def test_boxes_are_in_pixels_of_the_image_that_was_given(guard):
    """A larger copy of the same image gives the same gaze, in larger boxes."""
    sample = SAMPLES[1]
    small = guard.check(sample.image, sample.turns[0].answer)
    large = guard.check(sample.image.resize((288, 288), 0), sample.turns[0].answer)
    assert (small.trace.grid.sizes, large.trace.grid.sizes) == (((144, 144),), ((288, 288),))
    for one, two in zip(small.findings, large.findings, strict=True):
        assert two.box[2] - two.box[0] > 23, "a cell of the large image is 24 pixels wide"
        assert one.box == pytest.approx(tuple(edge / 2 for edge in two.box), abs=30)


@pytest.mark.parametrize("side", [144, 288])
def test_live_boxes_are_where_replay_sees_them(guard, side):
    """A generated caption's boxes are in the same pixels as those of its check, whatever the image's size."""
    image = SAMPLES[1].image.resize((side, side), 0)
    live = guard.caption(image, SAMPLES[1].prompt, do_sample=False)
    replayed = guard.check(image, live.caption, SAMPLES[1].prompt)
    assert live.trace.grid.sizes == ((side, side),)
    assert [finding.box for finding in live.findings] == [finding.box for finding in replayed.findings]


def test_boxes_of_a_bare_generate_are_in_the_processors_pixels(guard):
    """Without sizes the boxes are those of a image as the processor made it, for several captions per prompt, too."""
    guard.generate(**batch_of(guard, num_return_sequences=2, do_sample=True))
    assert {report.trace.grid.sizes for report in guard.reports} == {((144, 144),)}
    inputs = batch_of(guard, num_return_sequences=2, do_sample=True)
    guard.generate(**inputs, picture_sizes=[[(10 * i, 20)] for i in range(1, 7)])
    assert [report.trace.grid.sizes[0][0] for report in guard.reports] == [10 * i for i in range(1, 7) for _ in (0, 1)]


def test_a_grid_that_the_caller_knows_takes_the_place_of_the_rules(guard):
    """The same grid gives the same trace; another number of cells is refused with both numbers."""
    sample = SAMPLES[1]
    own = GazeGuard(guard.model, guard.processor, grid=ImageGrid.regular(12, 12, (1, 1)))
    one, two = (g.check(sample.image, sample.turns[0].answer) for g in (guard, own))
    assert_same_trace(one.trace, two.trace, 0)
    assert [f.box for f in one.findings] == [f.box for f in two.findings]
    short = GazeGuard(guard.model, guard.processor, grid=ImageGrid.regular(3, 3, (1, 1)))
    with pytest.raises(InputError, match="has 9 boxes, but the prompt has 144 image tokens"):
        short.caption(sample.image)


def test_one_bad_row_does_not_cost_the_others(guard):
    """Each row gets its own verdict; the good rows get the one they get alone."""
    good = SAMPLES[1]
    rows = [(good.image, good.turns[0].answer), ("nowhere.png", "A red star."), (good.image, ""), (b"no picture", "A star.")]
    rows.append((good.image, "There is a red star. " * 600))
    reports = guard.check_all(*zip(*rows, strict=True))
    assert_same_trace(reports[0].trace, guard.check(*rows[0]).trace)
    assert [r.verdict is Verdict.UNCHECKED for r in reports[1:]] == [True] * 4
    assert "cannot be opened" in reports[1].reason
    assert "is not an image" in reports[3].reason


def test_two_images_where_one_is_expected(guard):
    """check and caption take one image; a list is refused or unchecked with the reason."""
    pair = [SAMPLES[0].image, SAMPLES[1].image]
    assert "Expected one image" in guard.check(pair, "A red star.").reason
    with pytest.raises(InputError, match="Expected one image"):
        guard.caption(pair)


def test_two_images_in_one_prompt_are_watched(guard):
    """generate takes what the processor makes: the cells of both images, each with its own number."""
    images = [SAMPLES[0].image, SAMPLES[1].image]
    content = [{"type": "image", "image": image} for image in images]
    talk = [{"role": "user", "content": [*content, {"type": "text", "text": "Describe the picture."}]}]
    inputs = guard.processor.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    guard.generate(**inputs, max_new_tokens=4)
    grid = guard.reports[0].trace.grid
    assert np.bincount(grid.image).tolist() == [144, 144]
    assert len(grid.sizes) == 2


def test_an_eager_model_is_watched(lab_vlm, guard):
    """Another attention implementation, the same trace."""
    model = copy.deepcopy(lab_vlm[0])
    model.set_attn_implementation("eager")
    twin = GazeGuard(model, lab_vlm[1], heads=guard.heads, detector=guard.detector)
    sample = SAMPLES[1]
    assert_same_trace(*(g.check(sample.image, sample.turns[0].answer).trace for g in (guard, twin)))


# --------------------------------------------------------------------------------------------------- the tracer alone


def test_a_tracer_replays_without_a_judge(guard):
    """prepare and replay give traces; what the model cannot read comes back with its reason; the logit lens can be left out."""
    images, captions = [s.image for s in SAMPLES[:3]], [s.turns[0].answer for s in SAMPLES[:3]]
    prompts = [s.prompt for s in SAMPLES[:3]]
    expected = [report.trace for report in guard.check_all(images, captions, prompts)]
    prepared = guard.tracer.prepare([*images, "nowhere.png"], [*captions, "A star."], [*prompts, "Describe the picture."])
    assert list(prepared.unchecked) == [3]
    assert prepared.unchecked[3][0] == "A star."
    assert "cannot be opened" in prepared.unchecked[3][1]
    blind = Tracer(guard.model, guard.processor, guard.heads, lens=False)
    for part in prepared.parts:
        traces, cache = guard.tracer.replay(part)
        assert cache is None
        for row, trace in zip(part.rows, traces, strict=True):
            assert_same_trace(trace, expected[row], 0)
        for row, trace in zip(part.rows, blind.replay(part)[0], strict=True):
            np.testing.assert_array_equal(trace.gaze, expected[row].gaze)
            assert np.isnan(trace.attended_logprob).all()
            assert np.isnan(trace.internal_confidence).all()


def test_steering_ends_with_its_context(guard):
    """Also after an exception, and nested targets come back."""
    tracer, outer, inner = guard.tracer, SteeringTarget((0, 0, 10, 10)), SteeringTarget((0, 0, 20, 20))
    with tracer.steer(outer):
        with pytest.raises(InputError, match="Expected one image"), tracer.steer(inner):
            guard.caption([SAMPLES[0].image, SAMPLES[1].image])
        assert tracer.steering is outer
    assert tracer.steering is None


def test_tokens_that_the_tokenizer_does_not_know_leave_a_caption_unchecked(guard, monkeypatch):
    """Invariant (g): what the model could not read is not judged, live and replayed. Here "red" stands for the unknown."""
    tokenizer = guard.processor.tokenizer
    red = tokenizer(" red", add_special_tokens=False).input_ids[0]
    monkeypatch.setattr(type(tokenizer), "unk_token_id", red, raising=False)
    image, known = SAMPLES[0].image, "There is a blue star."
    assert "tokenizer" not in guard.check(image, known).reason
    replayed = guard.check(image, "There is a red star and a red red moon.")
    asked = guard.check(image, known, prompt="Describe the red red picture.")
    live = guard.caption(image, "Describe the red red picture.", max_new_tokens=8)
    for report, what in ((replayed, "caption"), (asked, "prompt"), (live, "prompt")):
        assert report.verdict is Verdict.UNCHECKED
        assert re.fullmatch(rf"the tokenizer does not know \d\d% of the {what}'s tokens", report.reason)
