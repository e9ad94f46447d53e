"""Do labels become a detector: a person's, a list of what is there, the model's own answers; and bad rows clear errors?"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labkit import ANYTHING
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from gazeguard import lab
from gazeguard.cli import app
from gazeguard.detection.detector import Detector
from gazeguard.errors import InputError
from gazeguard.fitting import Label, LabelledCaption, fit_detector, labelled_claims, read_captions, yes_probability
from gazeguard.guard import GazeGuard
from gazeguard.lab.labels import label_claims, write_captions
from gazeguard.lab.truth import decided_claims
from gazeguard.lab.worlds import world


def brief(row: LabelledCaption) -> list[tuple[str, str, bool]]:
    return [(claim.kind, claim.text, false) for claim, false in labelled_claims(row)]


def test_labels_reach_the_claims_that_they_lie_on():
    """By kind and characters; what has no label is not known."""
    caption = "There is a red star and a moon on the left."
    labels = (Label(start=11, end=19, false=False), Label(start=11, end=14, kind="attribute", false=True))
    assert brief(LabelledCaption(image="x", caption=caption, labels=labels)) == [
        ("object", "a red star", False),
        ("attribute", "red", True),
    ]
    assert brief(LabelledCaption(image="x", caption=caption)) == []


def test_a_list_of_what_is_there_judges_objects_alone():
    """Plurals and capitals are the same thing; labels, where given, are believed instead."""
    row = LabelledCaption(
        image="x", caption="Two dogs, a Dining table and a glass on the left.", objects=("Dog", "dining tables")
    )
    assert brief(row) == [("object", "Two dogs", False), ("object", "a Dining table", False), ("object", "a glass", True)]
    assert brief(row.model_copy(update={"labels": ()})) == []
    assert brief(row.model_copy(update={"objects": ()})) == [(*found[:2], True) for found in brief(row)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: the whole line: Invalid JSON"),
        ('{"image": "x"}', "line 2: caption: Field required. A row has image, caption, and labels or objects."),
        ('{"image": "x", "caption": "y", "mood": 1}', "line 2: mood: Extra inputs are not permitted"),
        ('{"image": "x", "caption": "y", "labels": [{"start": -1, "end": 2, "false": true}]}', "line 2: labels.0.start: Input"),
        ('{"image": "x", "caption": "y", "labels": [{"start": 0, "end": 2, "false": "yes"}]}', "line 2: labels.0.false: Input"),
        (json.dumps({"image": "x", "caption": "y" * 2**20}), "line 2: longer than 1048576 bytes"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "x", "caption": "y"}\n' + line + "\n")
    with pytest.raises(InputError) as caught:
        read_captions(path)
    assert str(caught.value).startswith(f"{path}, {said}")


@given(ANYTHING | st.dictionaries(st.sampled_from(list(LabelledCaption.model_fields)), ANYTHING))
def test_any_json_is_a_row_or_refused(tmp_path_factory, anything):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(anything))
    try:
        rows = read_captions(path)
    except InputError:
        return
    assert all(claim.text for row in rows for claim, _ in labelled_claims(row))


def test_pictures_lie_beside_their_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text('\n{"image": "images/1.png", "caption": "A dog."}\n\n')
    (row,) = read_captions(tmp_path / "rows.jsonl")
    assert row.image == str(tmp_path / "images" / "1.png")
    with pytest.raises(InputError, match=r"No such file or directory\. Give a JSONL file of captioned images"):
        read_captions(tmp_path / "none.jsonl")


@pytest.fixture(scope="module")
def written(lab_vlm, tmp_path_factory):
    """A folder of lab pictures with sampled captions, labelled in every kind by the lab's truth; and what was said of them."""
    folder = tmp_path_factory.mktemp("captioned")
    samples = lab.samples("train", 120, seed=3)
    torch.manual_seed(0)
    reports = write_captions(GazeGuard(*lab_vlm), samples, do_sample=True)
    with (folder / "rows.jsonl").open("w") as out:
        for number, (sample, report) in enumerate(zip(samples, reports, strict=True)):
            sample.image.save(folder / f"{number}.png")
            labels = [
                {"start": c.start, "end": c.end, "kind": c.kind, "false": false}
                for c, _, false in decided_claims(sample.drawing, report.caption)
            ]
            row = {"image": f"{number}.png", "caption": report.caption, "prompt": sample.prompt, "labels": labels}
            out.write(json.dumps(row) + "\n")
        out.write(json.dumps({"image": "gone.png", "caption": "A star."}) + "\n")
    return folder, samples, reports


@pytest.mark.slow
def test_train_makes_a_detector_from_labels(written, guard):
    """The command, as a user runs it: the detector works on unseen pictures, and the card says how it was made."""
    folder, *_ = written
    made = CliRunner().invoke(app, ["train", str(folder / "rows.jsonl"), "--out", str(folder / "mine"), "--verify"])
    assert made.exit_code == 0, made.output
    told = " ".join(made.stdout.split())
    assert "object: fitted on " in told
    assert "left out: 1 of 121 captions: " in told
    detector = Detector.from_pretrained(folder / "mine")
    assert f"| object | {detector.kinds['object'].claims:,}" in (folder / "mine" / "README.md").read_text()
    assert detector.check_heads(guard.heads) is None
    assert detector.kinds["object"].answer is not None
    assert GazeGuard(guard.model, guard.processor, "verify", heads=guard.heads, detector=detector)
    fresh = lab.samples("test", 40, seed=3)
    table = label_claims(world().decided, fresh, write_captions(guard, fresh, do_sample=True))
    objects = table.select(table.kind == "object")
    assert roc_auc_score(objects.false, detector.risk(objects.x, objects.kind)) > 0.95


@pytest.mark.slow
def test_no_picture_is_on_both_sides(written, guard):
    """What is held out is held out picture by picture, and is what `fit_detector` says it is."""
    folder, samples, _ = written
    detector, left_out = fit_detector(guard, read_captions(folder / "rows.jsonl"))
    made = detector.kinds["object"]
    assert made.answer is None
    assert made.validation.cross_fitted
    assert made.validation.images <= len(samples)
    total = sum(1 for row in read_captions(folder / "rows.jsonl") for c, _ in labelled_claims(row) if c.kind == "object")
    assert made.claims == made.validation.claims == total
    assert sum(left_out.values()) == 1


def test_asking_labels_what_is_unknown(written, guard):
    """The model's own answers are used as they are. The lab's says no to everything, which teaches nothing; that is said."""
    folder = written[0]
    rows = [row.model_copy(update={"labels": None}) for row in read_captions(folder / "rows.jsonl")][:6]
    answers = yes_probability(guard, [row.image for row in rows], ["star", "moons", "apple", "glass", "cup", "horse"])
    assert all(0 <= answer <= 1 for answer in answers)
    alone = yes_probability(guard, [rows[2].image], ["apple"])
    assert alone == pytest.approx(answers[2:3], abs=1e-5)
    with pytest.raises(InputError, match=r"No claim of 6 captions has a label\. Give labels or objects"):
        fit_detector(guard, rows)
    with pytest.raises(InputError, match="object claims are false; a detector needs at least 5 false and 5 true ones"):
        fit_detector(guard, rows, ask=True)
