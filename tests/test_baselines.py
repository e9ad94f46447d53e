"""Published decoders as baselines: what they must be at strength 0, in a batch, and by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from evals.baselines import mitigation as baselines
from evals.guards import LOGIT_LENS, fit_random_guard
from gazeguard import _compat, lab
from gazeguard.artifacts import HEADS_FILE
from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.claims.parse import things
from gazeguard.heads.artifact import GazeHeads
from gazeguard.trace import SEGMENTS
from gazeguard.vision.encoding import encode
from gazeguard.vision.image_tokens import image_token_id

FOUND = GazeHeads.from_pretrained(lab.checkpoint_path() / HEADS_FILE)
GAZE, MIDDLE = FOUND.heads, [head for head in FOUND.all_heads if 0 < head[0] < 5]
SAMPLES = lab.samples("validation", 4, 77)
# Of different lengths, so that a batch is padded on the left.
PROMPTS = ["Describe the picture.", "Describe all panels.", "Is there a star in panel two?", "Name one object."]
PICTURE = SEGMENTS.index("image")


@pytest.fixture
def prompts(lab_vlm):
    """Four prompts as a batch, and the function that makes a batch of some of them."""

    def some(*rows: int) -> dict:
        return encode(*lab_vlm, [SAMPLES[i].image for i in rows], [PROMPTS[i] for i in rows]).inputs

    assert not some(0, 1, 2, 3)["attention_mask"].all()
    return some


def vcd(model, inputs, strength, **options):
    return baselines.vcd(model, inputs, alpha=strength, **options)


def pai(model, inputs, strength, **options):
    return baselines.pai(model, inputs, MIDDLE, boost=strength, alpha=strength, **options)


def image_ablated(model, inputs, strength, **options):
    return baselines.image_ablated(model, inputs, GAZE, alpha=strength, **options)


ALL = pytest.mark.parametrize("decoder", [vcd, pai, image_ablated])


def written(model, inputs, decoder=None, **options) -> list[list[int]]:
    """New ids of every row up to its end, by a decoder or plainly."""
    options = {"max_new_tokens": 40, "do_sample": False, **options}
    made = model.generate(**inputs, **options) if decoder is None else decoder(model, inputs, **options)
    end = model.generation_config.eos_token_id
    rows = made[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


# ------------------------------------------------------------------------------------------------------------ laws


@ALL
def test_strength_0_is_plain_generate(lab_vlm, prompts, decoder):
    """To the token, greedy and, where no word is cut, sampled."""
    model, inputs = lab_vlm[0], prompts(0, 1, 2, 3)
    assert written(model, inputs, decoder, strength=0) == written(model, inputs)
    torch.manual_seed(0)
    plain = written(model, inputs, do_sample=True)
    torch.manual_seed(0)
    assert written(model, inputs, decoder, strength=0, beta=0, do_sample=True) == plain


@ALL
def test_a_strength_changes_what_is_written(lab_vlm, prompts, decoder):
    """Or the other laws would say nothing."""
    model, inputs = lab_vlm[0], prompts(0, 1)
    assert written(model, inputs, decoder, strength=3.0) != written(model, inputs)


@ALL
def test_a_batch_is_its_single_rows(lab_vlm, prompts, decoder):
    model = lab_vlm[0]
    alone = [written(model, prompts(i), decoder, strength=1.0)[0] for i in range(4)]
    assert written(model, prompts(0, 1, 2, 3), decoder, strength=1.0) == alone


def test_vcd_with_the_clean_picture_as_the_noised_one_is_plain(lab_vlm, prompts):
    """However strong: (1 + a) l - a l = l."""
    model, inputs = lab_vlm[0], prompts(0, 1, 2, 3)
    assert written(model, inputs, baselines.vcd, alpha=2.0, steps=0) == written(model, inputs)


def test_a_blindfold_that_hides_nothing_is_plain(lab_vlm, prompts):
    model, inputs = lab_vlm[0], prompts(0, 1, 2, 3)
    assert written(model, inputs, baselines.image_ablated, heads=GAZE, alpha=2.0, bias=0.0) == written(model, inputs)


@torch.no_grad()
def test_a_branch_says_what_a_fresh_pass_over_its_own_prompt_says(lab_vlm, prompts):
    """Word by word, while the first branch fills a cache of its own: what VCD#7 and VCD#13 got wrong."""
    model, inputs = lab_vlm[0], prompts(0, 2)
    other = {**inputs, "pixel_values": baselines.noised(inputs["pixel_values"], 800)}
    branch, first = baselines.Branch(model, other), DynamicCache(config=model.config.text_config)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model(**inputs, **{_compat.cache_argument_name(): first}, use_cache=True)
    for word in (20, 21, 22):
        at = (mask.cumsum(-1) - 1).clamp(min=0)
        fresh = model(**(other | {"input_ids": ids, "attention_mask": mask}), position_ids=at, use_cache=False).logits[:, -1]
        torch.testing.assert_close(branch(ids), fresh, atol=1e-4, rtol=1e-4)
        ids = torch.cat((ids, ids.new_full((2, 1), word)), dim=1)
        mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
    assert first.get_seq_length() == inputs["input_ids"].shape[1]


@torch.no_grad()
def test_a_prompt_without_its_picture_is_the_words_alone(lab_vlm, prompts):
    """Closed image cells are as good as cells that were never there."""
    model, inputs = lab_vlm[0], prompts(0)
    ids = inputs["input_ids"]
    words = ids[ids != image_token_id(model)][None]
    assert words.shape[1] < ids.shape[1] / 2
    alone = model(input_ids=words, use_cache=False).logits[:, -1]
    torch.testing.assert_close(
        baselines.Branch(model, baselines.without_image(model, inputs))(ids), alone, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_a_bias_turns_the_look_to_the_picture_or_away(lab_vlm, prompts):
    """The share of the heads' attention that is on the picture, of the query that writes."""
    model, inputs = lab_vlm[0], prompts(0, 1)
    segment_mass = {}
    for bias in (0.0, 2.0, baselines.ABLATION):
        with AttentionRecorder(model, GAZE) as recorder:
            baselines.steer_to_image(recorder, inputs, bias)
            model.generate(**inputs, max_new_tokens=8, do_sample=False)
            segment_mass[bias] = recorder.collect().segment_mass[..., PICTURE]
    assert segment_mass[2.0].mean() > segment_mass[0.0].mean() + 0.05
    assert segment_mass[baselines.ABLATION].max() < 1e-6


def test_beams_are_refused(lab_vlm, prompts):
    with pytest.raises(ValueError, match=r"^4 rows for 2 prompts; a second branch cannot follow beams\.$"):
        baselines.vcd(lab_vlm[0], prompts(0, 1), num_beams=2, do_sample=False, max_new_tokens=4)


def test_middle_heads_are_all_of_the_layers_in_between():
    assert baselines.middle_heads(FOUND.all_heads) == MIDDLE


# ---------------------------------------------------------------------------------------------------------- by hand


def test_contrast_by_hand():
    """p = .5 .4 .1 and q = .25 .7 .05: with alpha 1, p^2/q = 1, .229, .2; the third is under .3 of .5, so it is cut."""
    p, q = torch.tensor([[0.5, 0.4, 0.1]]), torch.tensor([[0.25, 0.7, 0.05]])
    made = baselines.contrast(p.log(), q.log(), alpha=1.0, beta=0.3)
    torch.testing.assert_close(made.exp(), torch.tensor([[1.0, 0.16 / 0.7, 0.0]]))
    torch.testing.assert_close(made.softmax(-1), torch.tensor([[0.813953, 0.186047, 0.0]]))
    torch.testing.assert_close(baselines.contrast(p.log(), q.log(), 1.0, 0).exp(), torch.tensor([[1.0, 0.16 / 0.7, 0.2]]))


def test_noise_by_hand():
    """One step keeps 1 - b of the variance, b = sigmoid(-6) 4.99e-3 + 1e-5; a thousand keep .11; all pictures get one noise."""
    clean = torch.zeros(2, 3, 50, 50)
    clean[1] = 1
    assert baselines.noised(clean, 0) is clean
    b = (0.5e-2 - 1e-5) / (1 + math.exp(6)) + 1e-5
    one, many = baselines.noised(clean, 1), baselines.noised(clean, 1000)
    torch.testing.assert_close(one[1] - one[0], torch.full((3, 50, 50), math.sqrt(1 - b)))
    assert one[0].std().item() == pytest.approx(math.sqrt(b), rel=0.03)
    assert (many[1] - many[0]).pow(2).mean().item() == pytest.approx(0.08, abs=0.01)
    torch.testing.assert_close(baselines.noised(clean, 500), baselines.noised(clean, 500))


@pytest.mark.parametrize(
    ("most", "left"),
    [
        (0, ""),
        (1, "There is a red star at the top."),
        (2, "There is a red star at the top, a blue moon on the left."),
        (3, "There is a red star at the top, a blue moon on the left and a small cup."),
        (4, "There is a red star at the top, a blue moon on the left and a small cup. In the middle there is a horse."),
    ],
)
def test_truncation_keeps_a_thing_with_its_place(most, left):
    caption = "There is a red star at the top, a blue moon on the left and a small cup. In the middle there is a horse."
    assert baselines.first_objects(caption, most) == left


@given(st.sampled_from(SAMPLES), st.integers(0, 12))
def test_truncation_is_a_beginning_with_so_many_things(sample, most):
    caption = sample.turns[0].answer
    left = baselines.first_objects(caption, most)
    assert caption.startswith(left.removesuffix("."))
    assert len(things(left)) == min(most, len(things(caption)))


@pytest.mark.slow
def test_random_heads_are_others_of_the_same_layers_with_a_detector_of_their_own(guard):
    made = fit_random_guard(guard, 120, 3, policy="rewind")
    assert not set(made.heads.heads) & set(GAZE)
    assert Counter(layer for layer, _ in made.heads.heads) == Counter(layer for layer, _ in GAZE)
    assert made.detector.heads == made.heads.heads
    assert not made.detector.uses(*LOGIT_LENS)
    assert np.isfinite(made.caption(SAMPLES[0].image).findings[0].risk)
