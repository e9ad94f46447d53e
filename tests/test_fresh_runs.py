"""Is a caption judged as in a single, fresh run, or refused or unchecked by name, whatever stands beside it or came before?"""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from guardkit import SAMPLES, assert_same_trace, batch_of
from PIL import Image

from evals.combinations import guard_of, replayed, trace_difference
from gazeguard.decoding.verification import AnswerTokens, SelfVerification, question_suffixes
from gazeguard.errors import InputError
from gazeguard.filtering.caption_filter import CaptionFilter
from gazeguard.guard import GazeGuard
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

IMAGES = [sample.image for sample in SAMPLES[:2]]
CAPTIONS = ["A red star.", "A blue square beside a yellow moon at the top."]
PROMPTS = ["Describe the picture.", "Describe panel one of the picture."]
ORIENTATION = 274  # the EXIF tag that says how the camera was held


class PadsRight:
    """A processor of one's own that pads on the right, whatever the call asks for."""

    def __init__(self, processor):
        self.processor = processor

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def apply_chat_template(self, conversations, **options):
        options["processor_kwargs"] = {"padding": True, "padding_side": "right"}
        return self.processor.apply_chat_template(conversations, **options)


# ---------------------------------------------------------------------------------------------------------- padding


def test_a_tokenizer_that_pads_on_the_right_by_default_changes_nothing(guard):
    """The call says which side; rows of different lengths are judged as alone."""
    processor = copy.deepcopy(guard.processor)
    processor.tokenizer.padding_side = "right"
    other = GazeGuard(guard.model, processor)
    reports = other.check_all(IMAGES, CAPTIONS, PROMPTS)
    for report, image, caption, prompt in zip(reports, IMAGES, CAPTIONS, PROMPTS, strict=True):
        assert_same_trace(report.trace, guard.check(image, caption, prompt).trace)


def test_a_processor_that_pads_on_the_right_is_refused_by_name_and_filters_row_by_row(guard):
    other = GazeGuard(guard.model, PadsRight(guard.processor))
    with pytest.raises(InputError, match=r"The output of PadsRight is padded on the right.*padding_side='left'"):
        other.check_all(IMAGES, CAPTIONS, PROMPTS)
    rows, alone = CaptionFilter(other).judge(IMAGES, CAPTIONS, PROMPTS), CaptionFilter(guard).judge(IMAGES, CAPTIONS, PROMPTS)
    assert [row["gaze_verdict"] for row in rows] == [row["gaze_verdict"] for row in alone]
    np.testing.assert_allclose([row["gaze_risk"] for row in rows], [row["gaze_risk"] for row in alone], atol=1e-4)


def test_a_row_without_finite_numbers_is_unchecked_alone(guard):
    """NaN in one row's pixels, in a batch with rows that are padded: the others are what they are without it."""
    inputs = batch_of(guard, SAMPLES[:3], max_new_tokens=20)
    expected = guard.generate_with_reports(**inputs)[1]
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][1] = torch.nan
    reports = guard.generate_with_reports(**inputs)[1]
    assert reports[1].verdict == "unchecked"
    for row in (0, 2):
        assert (reports[row].verdict, reports[row].reason) == (expected[row].verdict, expected[row].reason)
        assert_same_trace(reports[row].trace, expected[row].trace)


# ------------------------------------------------------------------------------------------------- what came before


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL", "GLM-4V"])
def test_positions_of_an_earlier_image_are_not_used_again(name, quietly):
    """Models with M-RoPE keep the offset of the last image (rope_deltas): the next one's trace is that of a fresh model."""
    from invariants import MAKERS

    kind = MAKERS[name]()
    fresh = type(kind)(kind.name, copy.deepcopy(kind.model), kind.image_tokens, kind.image_inputs, kind.types)
    first, second = kind.batch([0, 1]), kind.batch([2])
    guard = guard_of(kind, first)
    ids = np.array([9, 11, 13, 17, 19])
    live = guard.generate_with_reports(**first, max_new_tokens=4, do_sample=False)[1]
    after = replayed(guard, second, ids)
    assert max(trace_difference(after, replayed(guard_of(fresh, second), second, ids)).values()) < 1e-5
    again = guard.generate_with_reports(**first, max_new_tokens=4, do_sample=False)[1]
    for one, other in zip(live, again, strict=True):
        assert max(trace_difference(one.trace, other.trace).values()) < 1e-5


# ------------------------------------------------------------------------------------------------------- prompts


def test_an_image_token_among_the_words(guard):
    """In a prompt it is refused by name, at every door; in a caption it is text, which costs nothing of what it says."""
    prompt = "What is behind the <image>?"
    assert guard.check(IMAGES[0], CAPTIONS[0], prompt).reason.startswith("The prompt contains the special token '<image>'")
    with pytest.raises(InputError, match="The prompt contains the special token '<image>'"):
        guard.caption(IMAGES[0], prompt)
    report = guard.check(IMAGES[0], f"{CAPTIONS[0]} <image>")
    assert len(report.trace.grid) == len(guard.check(IMAGES[0], CAPTIONS[0]).trace.grid)


def test_a_prompt_that_ends_in_reasoning_is_not_asked(guard):
    """Behind "<think>" a model does not begin with yes or no: what has less than half of the probability is no answer."""
    processor = copy.deepcopy(guard.processor)
    processor.chat_template = guard.processor.chat_template.replace("<assistant>", "<assistant><think>\n")
    question = "Is there a red star in the picture?"
    (plain,), (thinking,) = (question_suffixes(guard.model, each, [question]) for each in (guard.processor, processor))
    assert len(thinking) > len(plain)
    prompt = encode(guard.model, processor, IMAGES, [question] * 2).prompt
    logits = guard.model(**model_inputs(guard.model, prompt)).logits[:, -1].log_softmax(-1)
    tokens = AnswerTokens.from_tokenizer(processor.tokenizer)
    mass = logits[:, [*tokens.yes, *tokens.no]].exp().sum(-1)
    answers = SelfVerification.for_model(guard.model, processor).answer_tokens.log_odds(logits)
    assert torch.equal(answers.isnan(), mass < 0.5)
    assert answers.isnan().all(), "the test needs a model that thinks instead"


# -------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("how", range(1, 9))
def test_an_image_that_the_user_opened_himself_is_turned_upright(guard, how):
    """A PIL image of a file with an EXIF orientation, opened but not turned, is judged as the file is."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = how
    IMAGES[0].save(buffer, "PNG", exif=exif)
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        one, other = guard.check(opened, CAPTIONS[1]), guard.check(buffer.getvalue(), CAPTIONS[1])
    assert_same_trace(one.trace, other.trace, 0)
    assert one.trace.grid.sizes == other.trace.grid.sizes


def test_several_captions_of_several_pictures(guard):
    """Every caption of a prompt has that prompt's own image and its size, in the order of the prompts."""
    samples = SAMPLES[:3]
    sizes = [[(100 + 10 * i, 90)] for i in range(3)]
    inputs = batch_of(guard, samples, do_sample=True, num_return_sequences=2, max_new_tokens=16, picture_sizes=sizes)
    torch.manual_seed(0)
    reports = guard.generate_with_reports(**inputs)[1]
    for number, report in enumerate(reports):
        sample = samples[number // 2]
        assert report.trace.grid.sizes == tuple(sizes[number // 2])
        replay = guard.check(sample.image, report.caption, sample.prompt).trace
        np.testing.assert_allclose(replay.gaze, report.trace.gaze, atol=1e-4)


@pytest.mark.parametrize("size", [(320, 120), (90, 200), (40, 40)])
def test_an_untiled_idefics3_judges_images_of_other_shapes_as_alone(guard, size):
    """The lab's processor does not split images: each is one square of tokens over its whole, whatever stands beside it."""
    images = [IMAGES[0].resize(size), IMAGES[1]]
    reports = guard.check_all(images, CAPTIONS)
    for report, image, caption in zip(reports, images, CAPTIONS, strict=True):
        alone = guard.check(image, caption).trace
        assert_same_trace(report.trace, alone)
        assert alone.grid.sizes == (image.size,)
        assert np.nanmax(alone.grid.boxes) == 1
        assert np.nanmin(alone.grid.boxes) == 0
