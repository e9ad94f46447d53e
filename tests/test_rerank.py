"""Rerank decoding: plausible tokens move by the evidence of the gaze heads, and nothing else does."""

import pytest
import torch
from guardkit import SAMPLES, assert_same_trace, batch_of, invented, plain, two_lengths

from gazeguard.guard import GazeGuard
from gazeguard.policy import Rerank, load_policy, parse_policy

RERANKS = [
    {"attribution": 5.0, "plausible": 0.01},
    {"attribution": 0.0, "plausible": 0.001, "attended_logprob": 2.0, "end_bonus": 2.0},
]


@pytest.fixture(scope="module")
def batch(lab_vlm):
    """Twelve images with prompts of two lengths, so that rows are left-padded."""
    return two_lengths(lab_vlm)


@pytest.mark.parametrize("rerank", RERANKS, ids=["attribution", "attended_logprob"])
@pytest.mark.parametrize("beams", [1, 3])
def test_rerank_works_while_beams_change_places_and_guesses_are_taken_back(guard, beams, rerank):
    """Rerank reads the row of the word that is being chosen, whatever else the pass held."""
    strong, moved = GazeGuard(guard.model, guard.processor, parse_policy({"version": 1, "name": "r", "rerank": rerank})), 0
    for sample in SAMPLES:
        inputs = batch_of(guard, [sample], num_beams=beams)
        ids = strong.generate(**inputs)
        moved += not torch.equal(ids, guard.model.generate(**inputs))
        if beams == 1:
            assert torch.equal(strong.generate(**inputs, prompt_lookup_num_tokens=3), ids)
        caption = strong.reports[0].caption
        assert_same_trace(guard.check(sample.image, caption, sample.prompt).trace, strong.reports[0].trace)
    assert moved, "a test of rerank needs a word that moves"


@pytest.mark.parametrize("rerank", RERANKS, ids=["attribution", "attended_logprob"])
def test_rerank_of_no_strength_is_plain_and_of_some_is_not(guard, rerank):
    """Strength 0 equals plain generate; a strength moves words, and the trace is still that of what was written."""
    none = {key: value if key == "plausible" else 0.0 for key, value in rerank.items()}
    off, on = (parse_policy({"version": 1, "name": "r", "rerank": own}) for own in (none, rerank))
    inputs = batch_of(guard)
    plain = guard.model.generate(**inputs)
    assert torch.equal(GazeGuard(guard.model, guard.processor, off).generate(**inputs), plain)
    strong = GazeGuard(guard.model, guard.processor, on)
    assert not torch.equal(strong.generate(**inputs), plain)
    for sample, report in zip(SAMPLES, strong.reports, strict=True):
        if report.trace.finished:
            assert_same_trace(guard.check(sample.image, report.caption, sample.prompt).trace, report.trace)


def test_rerank_invents_less_by_what_lies_under_the_gaze(lab_vlm, batch):
    """With what was measured for the model, and with no strength at all."""
    none, left = load_policy("rerank").model_copy(update={"rerank": Rerank(attribution=0.0)}), []
    for policy in (none, "rerank"):
        guard = GazeGuard(*lab_vlm, policy=policy)
        plain(guard, batch[2])
        left.append(invented(batch[0], guard.reports))
    assert left[1] < left[0]


def test_rerank_in_a_padded_batch_is_that_of_each_row_alone(lab_vlm, batch):
    samples, prompts, inputs = batch
    guard = GazeGuard(*lab_vlm, policy="rerank")
    plain(guard, inputs)
    together = [report.caption for report in guard.reports]
    for i in range(6):
        report = guard.caption(samples[i].image, prompts[i], max_new_tokens=120, do_sample=False)
        assert report.caption == together[i]
