"""Comparison of policies: one caption of an image under each, side by side."""

from __future__ import annotations

import json
import re

import pytest
from guardkit import SAMPLES
from reportkit import NASTY, blank, make_report

from gazeguard.errors import InputError
from gazeguard.replay.comparison import Comparison

SAMPLE = SAMPLES[0]


def test_each_policy_gives_what_a_guard_of_its_own_gives(guard):
    """With the same heads and detector; the guard that compares stays as it was."""
    options = {"max_new_tokens": 40, "do_sample": False}
    comparison = guard.compare(["mark", "rewind"], SAMPLE.image, SAMPLE.prompt, **options)
    assert [report.policy for report in comparison.reports] == ["mark", "rewind"]
    marked = guard.caption(SAMPLE.image, SAMPLE.prompt, **options)
    assert comparison.reports[0].to_dict() == marked.to_dict()
    assert guard.policy.name == "mark"
    assert repr(comparison).startswith(f"Comparison(mark: {marked.verdict}, rewind: ")
    assert str(comparison).startswith(f"mark: {marked}\nrewind: ")
    data = json.loads(re.search(r'id="data">(.*?)</script>', comparison.page())[1])
    assert [caption["title"] for caption in data["captions"]] == ["policy mark", "policy rewind"]
    assert len(data["images"]) == 1  # so that the page shows them side by side


def test_reports_name_the_model_without_the_path_to_it(guard):
    """The page is made to be passed on."""
    report = guard.unchecked("", "no caption")
    assert report.model_name == "Idefics3ForConditionalGeneration from checkpoint"


def test_a_notebook_shows_the_policies_side_by_side():
    """As text, whatever the captions say."""
    comparison = Comparison(blank(), (make_report(NASTY[0]), make_report(NASTY[1])))
    shown = comparison._repr_html_()
    assert shown.count("policy balanced") == 2
    assert "<script" not in shown
    assert "<img" not in shown
    assert "display:flex" in shown


def test_nothing_to_compare_is_refused(guard):
    with pytest.raises(InputError, match=r"no policies to compare\. Pass at least one"):
        guard.compare([], SAMPLE.image)
