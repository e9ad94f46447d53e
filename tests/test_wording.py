"""The wording of a caption as part of a detector's domain: nothing in a wording that the model never uses is blamed."""

import re

import numpy as np
import pytest

from gazeguard import lab
from gazeguard.claims.parse import parse
from gazeguard.detection import features
from gazeguard.detection.domain import MIN_IMAGES, Wording
from gazeguard.guard import GazeGuard
from gazeguard.lab.labels import write_captions
from gazeguard.lab.truth import decided_claims
from gazeguard.report import Verdict

SCENES = [s for s in lab.samples("test", 12, seed=9) if not s.drawing.panels]
FOREIGN = ("There is a {} {}.", "The image shows a {} {}.", "I can see a {} {} in this picture.", "A {} {}.", "A {1}.")


@pytest.fixture(scope="module")
def shipped():
    """A guard with the detector that ships."""
    return GazeGuard.from_pretrained("lab", device="cpu")


def test_nothing_of_a_foreign_wording_is_blamed(shipped):
    """True captions in wordings that the lab's model never writes: unchecked, with the figure."""
    things = [(s, s.drawing.objects[-1]) for s in SCENES if len(s.drawing.objects) > 1]
    captions = [(s, wording.format(o.colour, o.noun)) for s, o in things for wording in FOREIGN]
    images, prompts = [s.image for s, _ in captions], [s.prompt for s, _ in captions]
    for report in shipped.check_all(images, [text for _, text in captions], prompts):
        assert report.verdict is Verdict.UNCHECKED, report.caption
        assert report.reason.startswith("the wording is far from all that the detector was fitted on"), report.reason
        assert "token NLL in nats" in report.reason


def test_a_false_word_in_the_model_s_own_wording_is_judged(shipped):
    """The model's own captions stay inside, and so does one of them with a noun that the model would never have written."""
    reports = write_captions(shipped, SCENES, do_sample=False)
    assert all(report.verdict is not Verdict.UNCHECKED for report in reports)
    flagged = 0
    for sample, report in zip(SCENES, reports, strict=True):
        said = report.findings[0].claim
        absent = next(n for n in ("skull", "castle", "cup") if n not in report.caption and n != said.phrase.head.text)
        start, end = said.phrase.head.start, said.phrase.head.end
        again = shipped.check(sample.image, f"{report.caption[:start]}{absent}{report.caption[end:]}", sample.prompt)
        assert again.verdict is not Verdict.UNCHECKED, again.reason
        flagged += any(f.flagged and f.claim.start <= start < f.claim.end for f in again.findings)
    assert flagged >= len(SCENES) - 1


def test_true_objects_in_another_order_may_be_flagged(shipped):
    """A known limit, which the README says: the model doubts a word where it would have named another object first."""
    samples = lab.samples("test", 24, seed=5, kind="scene")
    own = [report.caption for report in write_captions(shipped, samples, do_sample=False)]
    true = [
        (sample, text)
        for sample, text in zip(samples, own, strict=True)
        if not any(false for *_, false in decided_claims(sample.drawing, text))
    ]

    def flagged_share(texts: list[str]) -> float:
        reports = shipped.check_all([s.image for s, _ in true], texts, [s.prompt for s, _ in true])
        findings = [finding for report in reports for finding in report.findings]
        return sum(finding.flagged for finding in findings) / len(findings)

    assert flagged_share([text for _, text in true]) < 0.03
    assert 0.1 < flagged_share([reordered(text) for _, text in true]) < 0.35


def reordered(caption: str) -> str:
    """The same with the last object of each sentence first: "There is a cup, a fork and a key." """

    def rotated(sentence: re.Match[str]) -> str:
        *objects, last = re.split(r", | and ", sentence[1])
        return "here is " + " and ".join(filter(None, (", ".join([last, *objects[:-1]]), *objects[-1:]))) + "."

    return re.sub(r"here is ([^.]*)\.", rotated, caption)


def test_words_of_claims_say_nothing_of_the_wording(shipped):
    """The figure is the mean over all tokens outside of objects and locations, and an article in front."""
    trace = shipped.check(SCENES[0].image, "A red star is at the top.", SCENES[0].prompt).trace
    words = [trace.text[slice(*span)].strip() for span in trace.offsets.tolist()]
    expected = -trace.logprobs[[i for i, word in enumerate(words) if word in ("A", "is", ".")]].mean()
    assert features.wording_nll(trace, parse(trace.text).phrases) == pytest.approx(float(expected))
    named = shipped.check(SCENES[0].image, "Stars", SCENES[0].prompt).trace
    assert np.isnan(features.wording_nll(named, parse(named.text).phrases))


def test_the_limit_lets_the_captions_pass_that_set_it():
    values = np.random.default_rng(0).gamma(2, 0.1, 200)
    wording = Wording.fit(np.append(values, np.nan))
    assert (wording.count, bool((values < wording.limit).all())) == (200, True)
    assert Wording.fit(values[: MIN_IMAGES - 1]) is None
