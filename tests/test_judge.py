"""The judge: verdicts, reasons and filtered captions from traces alone."""

import copy

import pytest
import torch
from guardkit import SAMPLES

from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.policy import parse_policy
from gazeguard.report import Verdict


def test_a_claim_about_what_is_not_there_is_no_second_flag(guard):
    """Of an invented thing only the thing is flagged; of a real one its false colour is, and the words say which."""
    sample = next(s for s in lab.samples("test", 20, seed=7) if s.drawing.panels and s.drawing.in_panel(0)[0].colour != "green")
    thing = sample.drawing.in_panel(0)[0]
    absent = next(noun for noun in ("skull", "castle", "anchor") if noun not in {t.noun for t in sample.drawing.objects})
    invented = guard.check(sample.image, f"In panel one there is a green {absent}.", sample.prompt)
    assert [f.claim.kind for f in invented.findings if f.flagged] == ["object"]
    recoloured = guard.check(sample.image, f"In panel one there is a green {thing.noun}.", sample.prompt)
    assert [str(f.claim) for f in recoloured.findings if f.flagged] == [f"green (a green {thing.noun})"]
    assert recoloured.reason == f"not supported by the image: green (a green {thing.noun})"


def test_a_number_that_is_not_finite_leaves_the_caption_unchecked(lab_vlm):
    """Weights that overflow: no risk is made of them, and nothing passes."""
    model, processor = copy.deepcopy(lab_vlm[0]), lab_vlm[1]
    guard = GazeGuard(model, processor)
    with torch.no_grad():
        guard.tracer.recorder.backbone.norm.weight[0] = torch.inf
    report = guard.check(SAMPLES[0].image, "There is a red star.", SAMPLES[0].prompt)
    assert report.verdict == Verdict.UNCHECKED
    assert report.reason.startswith("the model gave no finite number for ")


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "the caption is empty"),
        ("  \n", "the caption is empty"),
        ("It is very nice here.", "names nothing that could be checked"),
        ("There is a red star. " * 600, "more than the model's context of 2048"),
    ],
)
def test_what_cannot_be_checked_is_unchecked_and_says_why(guard, caption, reason):
    """Law (g): never a pass."""
    report = guard.check(SAMPLES[0].image, caption)
    assert report.verdict is Verdict.UNCHECKED
    assert reason in report.reason


def test_a_caption_cut_off_by_the_length_limit_does_not_pass(guard):
    """Law (g): a truncated caption is flagged or unchecked."""
    for sample in SAMPLES:
        report = guard.caption(sample.image, sample.prompt, max_new_tokens=8, do_sample=False)
        assert not report.trace.finished
        assert report.verdict is not Verdict.PASS


def test_without_a_detector_everything_is_watched_and_nothing_judged(lab_vlm):
    """No detector, no verdict."""
    heads = GazeHeads.from_pretrained(lab.checkpoint_path() / "heads.json")
    report = GazeGuard(*lab_vlm, heads=heads).check(SAMPLES[0].image, "There is a red star.")
    assert report.verdict is Verdict.UNCHECKED
    assert "no detector" in report.reason
    assert report.trace is not None


def test_what_is_left_of_a_caption_is_as_the_policy_says(guard):
    """mark lets the caption through, drop cuts what is flagged and nothing else, abstain gives nothing, with the reason."""
    sample = next(s for s in lab.samples("test", 20, seed=7) if not s.drawing.panels and len(s.drawing.objects) == 2)
    one, two = sample.drawing.objects
    absent = next(noun for noun in ("skull", "castle", "anchor") if noun not in {one.noun, two.noun})
    wrong = f"There is a {one.colour} {one.noun} {one.location}, a green {absent} in the middle and a {two.colour} {two.noun}."
    dropped = f"There is a {one.colour} {one.noun} {one.location} and a {two.colour} {two.noun}."
    right = f"There is a {one.colour} {one.noun} {one.location}."
    expected = {"keep": (wrong, right), "drop": (dropped, right), "abstain": ("", right)}
    for left, texts in expected.items():
        policy = parse_policy({"version": 1, "name": "own", "threshold": 0.5, "on_flag": left})
        strict = GazeGuard(guard.model, guard.processor, policy)
        reports = [strict.check(sample.image, text, sample.prompt) for text in (wrong, right)]
        assert tuple(report.filtered_caption for report in reports) == texts
        assert reports[0].reason == f"not supported by the image: a green {absent}"
        assert reports[0].caption == wrong
        assert reports[0].to_dict()["filtered_caption"] == texts[0]
    assert GazeGuard(guard.model, guard.processor, "abstain").check(sample.image, "").filtered_caption == ""
