"""The judge: verdicts, reasons and filtered captions from traces alone."""

import copy
import random
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from guardkit import SAMPLES
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from gazeguard import lab
from gazeguard.claims.ending import open_ending
from gazeguard.claims.parse import parse
from gazeguard.detection.detector import Detector
from gazeguard.detection.gate import Gate
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.judge import Judge, PrefixJudge
from gazeguard.lab.world import describe
from gazeguard.policy import parse_policy
from gazeguard.report import Verdict

REWIND = {"version": 1, "name": "own", "rewind": {"budget": 1}}


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
        ("I'm sorry, I can't help with that.", "refusal: the text is no caption"),
        ("As an AI language model, I cannot see images.", "refusal: the text is no caption"),
        ("N/A", "placeholder: the text is no caption"),
        ("null", "placeholder: the text is no caption"),
        ("error: 429 Too Many Requests", "error text: the text is no caption"),
        ("<|endoftext|>", "special token: the text is no caption"),
        ("There is a red star. " * 600, "more than the model's context of 2048"),
    ],
)
def test_what_cannot_be_checked_is_unchecked_and_says_why(guard, caption, reason):
    """Invariant (g): never a pass."""
    report = guard.check(SAMPLES[0].image, caption)
    assert report.verdict is Verdict.UNCHECKED
    assert reason in report.reason


def test_a_caption_cut_off_by_the_length_limit_does_not_pass(guard):
    """Invariant (g): a truncated caption is flagged or unchecked."""
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
    """Mark lets the caption through, drop cuts what is flagged and nothing else, abstain gives nothing, with the reason."""
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


def only_objects(guard, **policy):
    """A guard whose detector was fitted on objects alone."""
    detector = guard.detector.model_copy(update={"kinds": {"object": guard.detector.kinds["object"]}})
    rules = parse_policy({"version": 1, "name": "own", **policy})
    return GazeGuard(guard.model, guard.processor, rules, heads=guard.heads, detector=detector)


def test_a_kind_that_was_claimed_and_not_judged_is_said(guard):
    """A detector of objects says nothing about a false colour: the caption passes only where the policy asks for objects."""
    sample = next(s for s in lab.samples("test", 20, seed=7) if s.drawing.objects[0].colour != "green")
    noun = sample.drawing.objects[0].noun
    false_colour, bare = f"There is a green {noun}.", f"There is a {noun}."
    report = only_objects(guard).check(sample.image, false_colour, sample.prompt)
    assert (report.verdict, report.not_judged) == (Verdict.UNCHECKED, ("attribute",))
    assert report.reason == "attributes not judged: the detector knows only objects"
    assert [f.claim.kind for f in report.findings] == ["object"]
    why = {"left_out": {"attribute": "3 of all 40 attribute claims are false: 2 more false."}}
    told = replace(guard.judge, detector=only_objects(guard).detector.model_copy(update=why))
    assert told(report.trace).reason.endswith("knows only objects (3 of all 40 attribute claims are false: 2 more false)")
    assert "    not judged: attributes" in str(report).splitlines()
    assert report.to_dict()["not_judged"] == ["attribute"]
    assert only_objects(guard, on_flag="abstain").check(sample.image, false_colour, sample.prompt).filtered_caption == ""
    asked = only_objects(guard, require=["object"]).check(sample.image, false_colour, sample.prompt)
    assert (asked.verdict, asked.not_judged) == (Verdict.PASS, ("attribute",))
    complete = only_objects(guard, threshold=1.0).check(sample.image, bare, sample.prompt)
    assert (complete.verdict, complete.not_judged) == (Verdict.PASS, ())


def test_what_no_detector_judges_is_said_and_required_only_by_name(guard):
    """Counts are listed; a policy that requires them never passes a caption that counts."""
    sample = SAMPLES[1]
    caption = f"There are two {sample.drawing.objects[0].noun}s."
    by_default = guard.check(sample.image, caption, sample.prompt)
    assert by_default.not_judged == ("count",)
    assert "not judged" not in by_default.reason
    policy = parse_policy({"version": 1, "name": "own", "threshold": 1.0, "require": ["object", "count"]})
    strict = GazeGuard(guard.model, guard.processor, policy).check(sample.image, caption, sample.prompt)
    assert strict.verdict is Verdict.UNCHECKED
    assert strict.reason.startswith("counts not judged: ")


# ---------------------------------------------------------------------------------------------------- the judge alone


@pytest.fixture(scope="module")
def judged(lab_vlm):
    """A judge, and the report on a caption with a hallucinated object."""
    guard = GazeGuard(*lab_vlm)
    absent = next(n for n in ("skull", "castle", "anchor") if n not in {o.noun for o in SAMPLES[1].drawing.objects})
    return guard.judge, guard.check(SAMPLES[1].image, f"There is a green {absent} and a blue {absent}.", SAMPLES[1].prompt)


def test_the_judge_needs_no_torch():
    script = "import sys, gazeguard.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_judge_has_no_state(judged):
    """The same trace gives the same report, whatever was judged between; nothing of it can be changed."""
    judge, report = judged
    judge(replace(report.trace, finished=False))
    assert judge(report.trace).to_dict() == report.to_dict()
    with pytest.raises(FrozenInstanceError):
        judge.policy = None


def test_a_saved_trace_is_judged_as_the_live_one(judged, tmp_path):
    judge, report = judged
    report.trace.save(tmp_path / "trace.safetensors")
    assert judge(type(report.trace).load(tmp_path / "trace.safetensors")).to_dict() == report.to_dict()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"segment_mass": lambda v: np.tile(np.float32([0, 1, 0, 0]), (*v.shape[:2], 1))}, "the gaze heads never attended"),
        ({"logprobs": lambda v: np.full_like(v, np.nan)}, "the model gave no finite number for "),
        ({"offsets": lambda v: np.zeros_like(v)}, "no token covers '"),
    ],
)
def test_a_trace_that_is_no_evidence_is_unchecked(judged, change, reason):
    """Invariant (g): never a pass, and the reason says what is wrong with the numbers."""
    judge, report = judged
    trace = replace(report.trace, **{name: edit(getattr(report.trace, name)) for name, edit in change.items()})
    unchecked = judge(trace)
    assert unchecked.verdict is Verdict.UNCHECKED
    assert unchecked.reason.startswith(reason)
    assert unchecked.findings == ()
    assert unchecked.trace is trace


def test_an_answer_updates_only_claims_that_it_counts_for(judged):
    """Answers as numbers: a no raises the risk of what was asked about, and is a reason; other findings stay."""
    judge, report = judged
    kinds = {k: r.model_copy(update={"answer": (1.0, -2.0, 0.0)}) for k, r in judge.detector.kinds.items()}
    policy = parse_policy({"version": 1, "name": "v", "verify": {"threshold": 0.0}})
    asking = replace(judge, detector=judge.detector.model_copy(update={"kinds": kinds}), policy=policy)
    assessment = asking.assess(report.trace)
    phrases = asking.questions(assessment)
    assert len(phrases) == 2
    updated = asking.report(assessment, {phrases[0]: -3.0})
    for before, after in zip(report.findings, updated.findings, strict=True):
        if after.claim.phrase == phrases[0] and after.claim.kind != "location":
            assert after.risk >= before.risk
            assert after.answer == pytest.approx(1 / (1 + np.exp(3.0)))
            assert after.reasons[-1] == "asked whether it is there, the model answers no"
        else:
            assert (after.risk, after.answer) == (before.risk, None)


@pytest.mark.parametrize(("weight", "log_odds"), [(-2.0, np.nan), (-2.0, 0.01), (-1e-3, -3.0)])
def test_evidence_that_does_not_count_is_no_reason(judged, weight, log_odds):
    """The model gave no answer, an undecided one, or one whose learnt weight is near zero."""
    judge, report = judged
    kinds = {k: r.model_copy(update={"answer": (1.0, weight, 0.0)}) for k, r in judge.detector.kinds.items()}
    policy = parse_policy({"version": 1, "name": "v", "verify": {"threshold": 0.0}})
    asking = replace(judge, detector=judge.detector.model_copy(update={"kinds": kinds}), policy=policy)
    assessment = asking.assess(report.trace)
    answered = asking.report(assessment, dict.fromkeys(asking.questions(assessment), log_odds))
    assert not any("asked" in reason for finding in answered.findings for reason in finding.reasons)
    if np.isnan(log_odds):
        assert answered.findings == asking.report(assessment).findings


# -------------------------------------------------------------------------------------------------- loops and cuts


def judging(judge, threshold=0.5, false=(), **policy):
    """A judge whose detector takes claims of these words for false, everything else for true."""
    policy = parse_policy({"version": 1, "name": "own", "threshold": threshold, **policy})

    class Oracle(Judge):
        def assess(self, trace):
            found = super().assess(trace)
            return replace(found, risks=np.array([0.9 if str(c) in false else 0.1 for c in found.claims]))

    return Oracle(judge.detector, policy, judge.model)


@pytest.mark.parametrize(
    ("caption", "false", "left"),
    [
        ("a yellow star at the top", {"yellow (a yellow star)", "at the top (a yellow star)"}, ""),
        ("a yellow star at the top", {"yellow (a yellow star)"}, "A star at the top"),
        ("a yellow star at the top", {"at the top (a yellow star)"}, "A yellow star"),
        ("a yellow star at the top", {"a yellow star", "yellow (a yellow star)", "at the top (a yellow star)"}, ""),
        (
            "a blue moon and a yellow star at the top",
            {"yellow (a yellow star)", "at the top (a yellow star)"},
            "A blue moon",
        ),
        (
            "There is a yellow star at the top and a red hat.",
            {"a yellow star"},
            "There is a red hat.",
        ),
        (
            "There is a blue moon. The large star is yellow. It is bright.",
            {"large (The large star)", "yellow (The large star)"},
            "There is a blue moon.",
        ),
    ],
)
def test_no_cut_makes_a_false_claim_sound_true(guard, caption, false, left):
    """What is said of an object goes with it, and an object of which everything said is false goes, too."""
    trace = guard.check(SAMPLES[1].image, caption, SAMPLES[1].prompt).trace
    report = judging(guard.judge, false=false, on_flag="drop")(trace)
    assert report.verdict is Verdict.FLAG
    assert report.filtered_caption == left


@pytest.mark.parametrize("flagged", [True, False])
def test_a_repetition_loop_is_said_once(guard, flagged):
    """One finding per distinct claim, a bounded reason, never a pass; every repeat of what is flagged is cut."""
    sample = SAMPLES[1]
    caption = f"There is a blue moon, {', '.join(['a red horse'] * 80)}."
    trace = guard.check(sample.image, caption, sample.prompt).trace
    judge = judging(guard.judge, false={"a red horse"} if flagged else (), on_flag="drop")
    report = judge(trace)
    loop = "degenerate text: 'a red horse' repeated 80 times"
    assert report.reason == loop + "; not supported by the image: a red horse" * flagged
    assert report.verdict is (Verdict.FLAG if flagged else Verdict.UNCHECKED)
    assert [str(f.claim) for f in report.findings if f.claim.kind != "location"] == [
        "a blue moon", "blue (a blue moon)", "a red horse", "red (a red horse)"
    ]  # fmt: skip
    assert report.filtered_caption == ("There is a blue moon." if flagged else caption)


def test_a_reason_names_at_most_ten_claims(guard):
    """The others are counted; nothing is named twice."""
    nouns = ["star", "moon", "hat", "cat", "dog", "tree", "boat", "fish", "bird", "cup", "key", "drum", "star"]
    caption = " ".join(f"There is a {noun}." for noun in nouns)
    trace = guard.check(SAMPLES[1].image, caption, SAMPLES[1].prompt).trace
    report = judging(guard.judge, threshold=0.0)(trace)
    assert report.reason.endswith("a bird, a cup, 1 more")
    assert report.reason.count("a star") == 1


def test_a_flagged_caption_that_was_cut_off_says_both(judged):
    judge, report = judged
    cut = judge(replace(report.trace, finished=False))
    assert (cut.verdict, cut.reason) == (Verdict.FLAG, f"{report.reason}; the caption was cut off by the length limit")


# ------------------------------------------------------------------------------------------------------------ prefixes


def test_an_object_is_judged_once_when_it_is_complete(judged):
    """Word by word: a claim comes up when the next word stands behind it, and again only after a rollback."""
    judge, _ = judged
    prefix, seen = PrefixJudge(judge), []
    words = ["There", " is", " a", " red", " star", " and", " a", " blue", " gear", "."]
    for count in range(1, len(words) + 1):
        text = "".join(words[:count])
        parsed, objects = prefix.extend(text, count, ended=False)
        seen += [(count, parsed[i].text) for i in objects]
        prefix._judged |= {(parsed[i].start, parsed[i].end) for i in objects}
    assert seen == [(6, "a red star"), (10, "a blue gear")]
    assert prefix.extend("".join(words), len(words), ended=True)[1] == []
    prefix.roll_back("".join(words[:8]), 8)
    parsed, objects = prefix.extend("".join([*words[:8], " moon."]), 9, ended=True)
    assert [parsed[i].text for i in objects] == ["a blue moon"]


def test_a_decided_prefix_is_committed_up_to_its_last_object(judged):
    judge, report = judged
    prefix, trace = PrefixJudge(judge), report.trace
    parsed, objects = prefix.extend(trace.text, len(trace), ended=True)
    doubtful = PrefixJudge(replace(judge, policy=parse_policy({**REWIND, "threshold": 0.0}))).decide(trace, parsed, objects)
    assert doubtful == parsed[objects[0]]
    sure = replace(judge, policy=parse_policy({**REWIND, "threshold": 1.0}))
    prefix = PrefixJudge(sure)
    assert prefix.decide(trace, parsed, objects) is None
    assert trace.offsets[prefix.committed - 1, 1] == parsed[objects[-1]].end


def test_a_detector_that_its_gate_refuses_judges_nothing(guard):
    """Every verdict is unchecked with the gate's reason, nothing is rolled back, and the file keeps the figures."""
    sample = next(s for s in lab.samples("test", 20, seed=7) if not s.drawing.panels)
    gate = Gate(usable=False, reason="no lift over text alone", figures={"lift": 0.01, "lift_low": -0.02})
    refused = guard.detector.model_copy(update={"gate": gate})
    report = GazeGuard(guard.model, guard.processor, detector=refused).check(sample.image, "There is a skull.", sample.prompt)
    assert (report.verdict, report.findings) == (Verdict.UNCHECKED, ())
    assert report.reason == "the detector is not usable for this model: no lift over text alone"
    rolling = Judge(refused, parse_policy(REWIND), guard.heads.model)
    claims = rolling.parse(report.caption).claims
    assert Judge(guard.detector, parse_policy(REWIND), guard.heads.model).doubtful(report.trace, claims, [0]) is not None
    assert rolling.doubtful(report.trace, claims, [0]) is None
    assert Detector.model_validate_json(refused.model_dump_json()).gate == gate


CHINA = "A Chinese palace with a red roof under a blue sky, with trees in the foreground."


def test_a_photograph_is_not_judged_by_the_detector_of_the_lab(guard):
    """The image lies outside of the drawings, with the figure; nothing is rolled back; without the domain all is flagged."""
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    report = guard.check(photograph, CHINA)
    assert (report.verdict, report.findings) == (Verdict.UNCHECKED, ())
    assert re.fullmatch(
        r"the image is far from all that the detector was fitted on \(the drawings of the lab, which are all that its model "
        r"knows\): Mahalanobis distance \d+\.\d, limit 1\.\d",
        report.reason,
    )
    claims = guard.judge.parse(CHINA).claims
    assert Judge(guard.detector, parse_policy(REWIND), guard.heads.model).doubtful(report.trace, claims, [0]) is None
    anywhere = guard.detector.model_copy(update={"domain": None})
    assert GazeGuard(guard.model, guard.processor, detector=anywhere).check(photograph, CHINA).verdict is Verdict.FLAG


def test_images_of_the_lab_are_judged_whatever_is_said_of_them(guard):
    """At most 2 % of test images stay unchecked, with true captions and with another's, short as a user's or long."""
    samples = lab.samples("test", 50, seed=9)
    true = [describe(sample.drawing, random.Random(0), honest=True) for sample in samples]
    for captions in (true, [*true[2:], *true[:2]], ["There is a red star and a skull."] * 50):
        reports = guard.check_all([s.image for s in samples], captions, [s.prompt for s in samples])
        assert sum(report.verdict is Verdict.UNCHECKED for report in reports) <= 1


@pytest.mark.parametrize(
    "wrong", [{"usable": True, "reason": "none"}, {"usable": False}, {"usable": True, "figures": {"a": np.nan}}]
)
def test_a_gate_says_why_and_in_numbers(wrong):
    with pytest.raises(ValidationError):
        Gate(**wrong)


@pytest.mark.parametrize(
    ("caption", "ending"),
    [
        ("There is a red star at the top and a", "top and a"),
        ("There is a red star at the top,", "at the top,"),
        ("There is a red star and a small blue", "a small blue"),
        ("There is a red star and there is", "and there is"),
        ("A group of", "A group of"),
        ("A star with", "A star with"),
        ("A red star", ""),
        ("There is a red star on the left", ""),
        ("A bench to sit on", ""),
        ("The star is red", ""),
        ("- a star\n- a moon", ""),
        ("He looks at her", ""),
        ("A star (white)", ""),
        ("", ""),
    ],
)
def test_a_text_that_stops_in_the_middle_of_a_clause_is_told_by_its_last_words(caption, ending):
    """A full stop that is missing is no such end."""
    assert open_ending(parse(caption).reading) == ending


def test_a_caption_that_stops_in_the_middle_of_a_clause_does_not_pass(lab_vlm):
    """Invariant (g), for a caption that somebody else cut off; a flag stays a flag, and says both."""
    guard = GazeGuard(*lab_vlm)
    report = next(
        r
        for r in (guard.caption(s.image, s.prompt) for s in lab.samples("test", 20, seed=7) if not s.drawing.panels)
        if r.verdict is Verdict.PASS and len(r.findings) > 4
    )
    trace, end = report.trace, report.caption.rindex(" and a")
    tokens = trace.tokens(0, end + len(" and a"))
    fields = ("token_ids", "offsets", "logprobs", "entropy", "gaze", "segment_mass", "attribution")
    part = {name: getattr(trace, name)[: len(tokens)] for name in (*fields, "attended_logprob", "internal_confidence")}
    cut = replace(trace, text=report.caption[: end + len(" and a")], **part)
    unchecked = guard.judge(cut)
    assert (unchecked.verdict, unchecked.filtered_caption) == (Verdict.UNCHECKED, cut.text)
    assert re.fullmatch(r"the caption ends in the middle of a clause: '.* and a'", unchecked.reason)
    strict = replace(guard.judge, policy=parse_policy({"version": 1, "name": "own", "threshold": 0.0}))(cut)
    assert strict.verdict is Verdict.FLAG
    assert str(strict).splitlines()[-1].strip() == unchecked.reason


def test_what_is_over_its_threshold_and_not_flagged_says_why(lab_vlm):
    """The colour of an object that is not there; the threshold stands beside every risk."""
    judge = GazeGuard(*lab_vlm, policy=parse_policy({"version": 1, "name": "own", "threshold": 0.0})).judge
    trace = GazeGuard(*lab_vlm).caption(SAMPLES[1].image, SAMPLES[1].prompt).trace
    of_objects, others = [], []
    for finding in judge(trace).findings:
        (of_objects if finding.claim.kind == "object" else others).append(finding)
        assert finding.threshold == 0.0
    assert others
    assert all(finding.flagged for finding in of_objects)
    assert {(finding.flagged, finding.reasons) for finding in others} == {(False, ("its object is flagged",))}
