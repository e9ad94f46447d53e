"""`gazeguard eval`: figures of a detector on captions with labels, whatever the model."""

from __future__ import annotations

import json

import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from gazeguard import GazeGuard, lab
from gazeguard.cli import app
from gazeguard.errors import InputError
from gazeguard.evaluation import JSON_FILE, PLOT_FILE, TABLE_FILE, Evaluation, evaluate
from gazeguard.fitting import labelled_claims, read_captions

CAPTIONS = 24


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Captions of one object that is there and two that are not, the false ones also first; one row has no image."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number, sample in enumerate(lab.samples("validation", CAPTIONS)):
        sample.image.save(folder / f"{number}.png")
        there = sorted({thing.noun for thing in sample.drawing.objects})
        absent = sorted({"anchor", "castle", "gear", "skull", "umbrella", "sun", "cup"} - set(there))
        names = [there[0], absent[number % len(absent)], absent[(number + 1) % len(absent)]]
        first, second, third = names[number % 3 :] + names[: number % 3]
        caption = f"There is a {first}, a {second} and a {third}."
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption, "objects": there}))
    lines.append(json.dumps({"image": "missing.png", "caption": "There is a cup.", "objects": []}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def guard(lab_vlm):
    return GazeGuard(*lab_vlm)


@pytest.fixture(scope="module")
def evaluation(guard, rows):
    return evaluate(guard, read_captions(rows))


def test_the_areas_are_those_of_the_risks(guard, rows, evaluation):
    """Over all claims, the ranking is scikit-learn's of the reports' own risks; unread images are counted, not judged."""
    captions = read_captions(rows)
    risks, labels = [], []
    for row in captions[:CAPTIONS]:
        report = guard.check(row.image, row.caption, row.prompt)
        of = {finding.claim: finding.risk for finding in report.findings}
        for claim, false in labelled_claims(row):
            risks.append(of[claim])
            labels.append(false)
    everything = next(row for row in evaluation.rankings if row.part == "all")
    assert (everything.claims, everything.false, everything.images) == (3 * CAPTIONS, 2 * CAPTIONS, CAPTIONS)
    assert everything.auroc.value == pytest.approx(roc_auc_score(labels, risks), abs=1e-3)
    assert sum(evaluation.skipped.values()) == 1
    assert "missing.png" in next(iter(evaluation.skipped))


def test_text_alone_stands_beside_every_area(evaluation):
    """The lift is the difference of the two, paired: on the same claims."""
    assert {row.part for row in evaluation.rankings} == {"all", "within_bins", "first_within_bins"}
    for row in evaluation.rankings:
        assert row.lift.value == pytest.approx(row.auroc.value - row.text_only.value)
        low, high = row.auroc.interval
        assert low <= row.auroc.value <= high


def test_of_few_images_no_interval_is_said(guard, rows):
    evaluation = evaluate(guard, read_captions(rows)[:3])
    assert all(row.auroc.interval is None for row in evaluation.rankings)
    assert "of too few claims for an interval" in evaluation.table()


def test_the_command_writes_table_figures_and_diagram(guard, rows, evaluation, tmp_path):
    model = guard.model.name_or_path
    result = CliRunner().invoke(app, ["eval", str(rows), "--out", str(tmp_path), "--model", model])
    assert result.exit_code == 0, result.stderr
    assert "text only" in result.stdout
    assert "next: filter a dataset: gazeguard filter IN OUT --model" in result.stderr
    saved = Evaluation.model_validate_json((tmp_path / JSON_FILE).read_bytes())
    assert saved.rankings[0].claims == evaluation.rankings[0].claims
    assert saved.table() == (tmp_path / TABLE_FILE).read_text()
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_without_a_detector_or_a_judged_claim_there_are_no_figures(guard, rows):
    """The message says what is missing and what to do."""
    bare = GazeGuard(guard.model, guard.processor, heads=guard.heads)
    with pytest.raises(InputError, match=r"no detector to evaluate.*gazeguard train"):
        evaluate(bare, read_captions(rows))
    unusable = guard.heads.model_copy(update={"unusable": "No head follows the narration. Find others."})
    with pytest.raises(InputError, match=r"these gaze heads: No head follows the narration\."):
        evaluate(GazeGuard(guard.model, guard.processor, heads=unusable), read_captions(rows))
    with pytest.raises(InputError, match=r"No labelled claim of 1 caption was judged: 1 x .*missing"):
        evaluate(guard, read_captions(rows)[-1:])
