"""Does a fit without labels make a detector that judges, resumes where it stopped, and is refused where it sees nothing?"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import gazeguard
from gazeguard import lab
from gazeguard.claims.parse import claims
from gazeguard.cli import app
from gazeguard.detection import features
from gazeguard.detection.detector import Detector
from gazeguard.errors import ArtifactError, InputError
from gazeguard.fitting import run
from gazeguard.fitting.drawn import available_styles, canonical, drawn
from gazeguard.fitting.learn import decide, learn, left_out, two_sample
from gazeguard.fitting.record import record
from gazeguard.fitting.rows import Recorded, Rows
from gazeguard.fitting.run import Budget, fit
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.labels import label_claims, write_captions
from gazeguard.lab.worlds import world
from gazeguard.loading import load
from gazeguard.policy import parse_policy
from gazeguard.report import Verdict

PROMPT = "Describe the picture."
SMALL = Budget(scenes=24, images=8, swaps=1, strips=4, rerank=0)


@pytest.fixture(scope="module")
def heads() -> GazeHeads:
    return GazeHeads.from_pretrained(lab.checkpoint_path())


@pytest.fixture(scope="module", autouse=True)
def one_prompt():
    """Of the prompts that are tried beside the drawings' own, the one that the lab's model answers: the others cost seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "PROMPTS", (PROMPT,))
        yield


@pytest.fixture(scope="module")
def bare(lab_vlm, tmp_path_factory):
    """The lab's model as transformers saves it: a folder without gaze heads."""
    folder = tmp_path_factory.mktemp("model")
    for part in lab_vlm:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(bare, tmp_path_factory):
    """A small fit of that model on pictographs, with the lab's test images as a user's own; its folder and what it said."""
    folder, images, said = tmp_path_factory.mktemp("fit"), tmp_path_factory.mktemp("images"), []
    for number, sample in enumerate(lab.samples("test", 8, seed=5)):
        sample.image.save(images / f"{number}.png")
    found = gazeguard.fit(
        *load(bare, device="cpu"), folder, images=images, budget=SMALL, styles=["pictographs"], prompt=PROMPT, say=said.append
    )
    return found, folder, images, said


def test_a_model_without_gaze_heads_is_fitted_from_python(bare, fitted):
    """No guard can be made of it, and the error names the door; what went through it has heads and verdicts."""
    with pytest.raises(InputError, match=r"No gaze heads for .*; in Python gazeguard\.fit\(model, processor, DIR\) finds them"):
        GazeGuard.from_pretrained(bare, device="cpu")
    guard = GazeGuard.from_pretrained(bare, artifacts=fitted[1], device="cpu")
    assert guard.heads == fitted[0].heads
    sample = lab.samples("test", 1, seed=5)[0]
    assert guard.check(sample.image, sample.turns[0].answer, sample.prompt).findings


def test_a_fit_needs_no_label_and_its_detector_judges_what_it_has_not_seen(fitted, lab_vlm):
    """The folder is all that a guard needs; new drawings are ranked; the card and the gate have the figures."""
    found, folder, *_ = fitted
    guard = GazeGuard(*lab_vlm, artifacts=folder)
    assert found.refused == ""
    assert guard.detector.gate.usable
    assert guard.detector.kinds["object"].verified.keys() >= {"f1", "bound_0.05"}, "thresholds after self-verification"
    fresh = lab.samples("test", 16, seed=9)
    torch.manual_seed(0)
    reports = write_captions(guard, fresh, do_sample=True)
    assert Verdict.FLAG in {report.verdict for report in reports}
    table = label_claims(world().decided, fresh, reports)
    objects = table.select(table.kind == "object")
    assert roc_auc_score(objects.false, guard.detector.risk(objects.x, objects.kind)) > 0.9
    card = (folder / "README.md").read_text()
    assert "without labels" in card
    assert "counts as *mostly* true" in card
    assert f"| lift over the text alone | {found.figures['lift']:.4g} |" in card
    assert 0.3 < found.figures["pictures_unlike"] <= 1


def test_kinds_that_nothing_decides_are_named_with_what_is_missing(fitted):
    """Neither drawings nor labels decide counts: the detector, its card, and a verdict that needs them say so."""
    detector, card = fitted[0].detector, (fitted[1] / "README.md").read_text()
    assert {*detector.kinds, *detector.left_out} == {"object", "attribute", "location", "count", "relation"}
    assert "count claims in the fit's captions is known: 5 false and 5 true ones are missing." in detector.left_out["count"]
    assert f"- count: not judged. {detector.left_out['count']}" in card
    made = left_out(detector.model_copy(update={"left_out": {}}), ["Two cups are on a table.", "There are three stars."])
    assert "none of the 2 count claims" in made["count"]
    assert "none of the 1 relation claims" in made["relation"]


def test_what_was_recorded_is_not_recorded_again(fitted, lab_vlm):
    """The second fit reads the first one's files, and comes to the same detector; a damaged file is named."""
    found, folder, images, said = fitted
    files = {path: path.stat().st_mtime_ns for path in (folder / "fit-state").iterdir()}
    assert sum("drawings" in path.name for path in files) == 1
    again = fit(*lab_vlm, folder, images=images, budget=SMALL, styles=["pictographs"], prompt=PROMPT)
    assert again.detector == found.detector
    assert {path: path.stat().st_mtime_ns for path in (folder / "fit-state").iterdir()} == files
    assert any(line.startswith("next: ") for line in said)
    path = sorted(path for path in files if path.suffix == ".npz")[0]
    kept = path.read_bytes()
    path.write_bytes(kept[:100])
    with pytest.raises(ArtifactError, match="cannot be read as an intermediate result of fit"):
        Recorded.load(path)
    path.write_bytes(kept)


def test_captions_of_a_file_are_read_from_the_command_line(fitted, tmp_path, monkeypatch):
    """What `caption --rows` writes is what `fit --captions` reads, once it has lists of objects; before, it is refused."""
    shutil.copytree(fitted[1], tmp_path / "fit")
    monkeypatch.setitem(run.BUDGETS, "quick", replace(SMALL, images=0))
    folder, rows = str(tmp_path / "fit"), tmp_path / "rows.jsonl"
    again = ["fit", "lab", "--out", folder, "--budget", "quick", "--style", "pictographs", "--captions", str(rows)]

    written = invoke("caption", str(fitted[2]), "--artifacts", folder, "--prompt", PROMPT, "--rows", str(rows))
    assert written.exit_code in (0, 1, 2)  # what the verdicts are
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(lines) == 8
    unlabelled = invoke(*again)
    assert unlabelled.exit_code == 2
    assert "No claim of 8 captions has a label. Add objects" in flat(unlabelled.stderr)
    assert "testing" not in unlabelled.stderr, "said before the model runs"

    samples = lab.samples("test", 8, seed=5)
    for line, sample in zip(lines, samples, strict=True):
        line["objects"] = sorted(world().nouns(sample))
    lines.append(lines[0] | {"image": "gone.png"})
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    labelled = invoke(*again)
    assert labelled.exit_code in (0, 1), labelled.stderr
    assert "labelled captions that are left out: " in labelled.stderr
    assert "gone.png" in flat(labelled.stderr)
    assert "(1 of 9)" in labelled.stderr
    assert "9 labelled captions outweigh everything else" in (tmp_path / "fit" / "README.md").read_text()
    [drawings] = (fitted[1] / "fit-state").glob("drawings-*.npz")
    drawn_claims = int((Recorded.load(drawings).rows.kinds == "object").sum())
    named = sum(claim.kind == "object" for line in lines[:8] for claim in claims(line["caption"]))
    assert Detector.from_pretrained(tmp_path / "fit").kinds["object"].claims == drawn_claims + named

    rows.write_text("")
    assert "has no row" in invoke(*again).stderr
    rows.write_text('{"image": "a.png", "text": "A star."}\n')
    assert "line 1: caption: Field required" in flat(invoke(*again).stderr)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def recorded(lab_vlm, heads):
    shown = drawn("pictographs", 0, 8, 3, 144)
    torch.manual_seed(3)
    return record(GazeGuard(*lab_vlm, heads=heads), shown, True, [], 2, random.Random(3)), shown


def test_constructed_claims_are_false_and_only_the_gaze_tells(recorded):
    """Own claims have the labels of the drawing; each other claim has the text features of a claim that the model wrote."""
    rows, shown = recorded[0].rows, recorded[1]
    own = rows.select(rows.of("own"))
    truth = [false for each, text in zip(shown, recorded[0].captions, strict=True) for _, false in each.decide(text)]
    assert own.false.tolist() == truth
    made = rows.select(~rows.of("own"))
    assert made.false.all()
    assert set(made.origin) == {"swapped", "wrong", "blank"}
    text = slice(0, len(features.TEXT_FEATURES))
    written = {(image, *row) for image, row in zip(own.image, own.x[:, text].tolist(), strict=True) for row in [row]}
    blank = made.select(made.of("blank"))
    known = [(image, *row) in written for image, row in zip(blank.image, blank.x[:, text].tolist(), strict=True)]
    assert np.mean(known) > 0.8  # the rest are claims that the drawing does not decide
    assert not np.isin(blank.x[:, text.stop], own.x[:, text.stop]).all()


def test_rows_are_saved_whole(recorded, tmp_path):
    recorded[0].save(tmp_path / "a.npz")
    again = Recorded.load(tmp_path / "a.npz")
    assert again.captions == recorded[0].captions
    for name, column in vars(recorded[0].rows).items():
        np.testing.assert_array_equal(getattr(again.rows, name), column)


def test_synonyms_count_as_the_drawn_object():
    """And only those of what is drawn; plurals and capitals as they stand."""
    assert canonical("Airplanes and a mug.", frozenset({"plane"})) == "planes and a mug."
    shown = drawn("pictographs", 0, 12, 1, 144)
    noun = {"cup": "mug", "plane": "airplane", "phone": "telephone", "bolt": "lightning bolt", "gear": "cog"}
    decided = [
        each.decide(f"There is a {other}.") for each in shown for known, other in noun.items()
        if (claims(f"There is a {known}.")[0], False) in each.decide(f"There is a {known}.")
    ]  # fmt: skip
    assert decided
    assert all(found and not found[0][1] for found in decided)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"false_objects": 4.0}, "4 false and 300 true claims about objects of drawings; the gate asks for 10 of each"),
        ({"lift_low": -0.01}, "lift +0.100, 95 % interval -0.010 to +0.200"),
        ({"image_auroc": 0.55, "image_auroc_low": 0.5}, "with another image seem hardly less true to it: AUROC 0.550"),
        ({"pictures_auroc": 0.6, "pictures_auroc_low": 0.5}, "on your images it ranks swapped claims with AUROC 0.600"),
    ],
)
def test_the_gate_says_what_is_missing(changed, reason):
    figures = {"false_objects": 50, "true_objects": 300, "auroc": 0.9, "text_auroc": 0.8}
    figures |= {"lift": 0.1, "lift_low": 0.05, "lift_high": 0.2, "image_auroc": 0.9, "image_auroc_low": 0.8} | changed
    gate = decide(figures)
    assert gate.usable == (not reason)
    assert reason in gate.reason


def test_a_user_s_images_are_compared_with_drawings(recorded, heads):
    """The same claims as of a user's images are alike; other ones are not."""
    own = recorded[0].rows.select(recorded[0].rows.of("own"))
    for shift, expected in ((0.0, 0.65), (3.0, 1.0)):
        x = own.x.copy()
        x[:, len(features.TEXT_FEATURES) :] += shift * own.x[:, len(features.TEXT_FEATURES) :].std(0)
        twin = replace(own, x=x, image=own.image + 100, origin=np.full(len(own), "picture"))
        area = two_sample(Rows.joined([own, twin]), heads)
        assert area < expected if shift == 0 else area > 0.95


def test_labels_outweigh_everything_else(recorded, heads):
    """Labels that contradict the drawings turn the ranking."""
    rows = recorded[0].rows
    own = rows.select(rows.of("own"))
    opposite = replace(own, false=~own.false, image=own.image + 100, origin=np.full(len(own), "labelled"))
    objects = own.kinds == "object"
    detector = learn(Rows.joined([rows, opposite, opposite]), heads, names=features.names(heads.heads)).detector
    assert roc_auc_score(own.false[objects], detector.risk(own.x[objects], own.kinds[objects])) < 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "lavish"}, "Unknown budget 'lavish'; expected one of: quick, standard, thorough."),
        ({"styles": ["oil"]}, "Unknown style of drawings 'oil'; expected one of: pictographs"),
        ({"styles": []}, "No style of drawings is given"),
        ({"images": "/nowhere"}, "/nowhere is no folder"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_model_runs(lab_vlm, tmp_path, options, said):
    with pytest.raises(InputError, match=said.split(";")[0].replace("(", r"\(")):
        fit(*lab_vlm, tmp_path, **options)


def test_the_command_refuses_in_one_line(tmp_path):
    result = CliRunner().invoke(app, ["fit", "lab", "--out", str(tmp_path / "a"), "--pictures", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds no image" in result.stderr
    assert "pictographs" in available_styles()


@pytest.mark.slow
def test_a_model_that_does_not_see_is_refused(heads, tmp_path):
    """Its image features are shuffled over all positions and channels, so that its words follow from the text alone."""
    model, processor = lab.load()
    handle = model.model.connector.register_forward_hook(lambda module, args, out: shuffled(out))
    try:
        found = fit(model, processor, tmp_path, budget=Budget(96, 0, 1, rerank=0), styles=["pictographs"], heads=heads)
    finally:
        handle.remove()
    assert any(words in found.refused for words in ("with another image", "that of the text alone", "better than by chance"))
    report = GazeGuard(model, processor, artifacts=tmp_path).check(lab.samples("test", 1)[0].image, "There is a red star.")
    assert report.verdict == Verdict.UNCHECKED


@pytest.mark.slow
def test_the_bound_holds_on_held_out_scenes_after_self_verification(lab_vlm, tmp_path):
    """At most 2 % of a caption's objects stay although they are not drawn, on drawings that set nothing."""
    found = gazeguard.fit(*lab_vlm, tmp_path, budget=Budget(96, 0, 1, strips=4, rerank=0), styles=["pictographs"])
    assert found.detector.kinds["object"].verified["bound_0.02"] < 1
    policy = parse_policy({"version": 1, "name": "asked", "verify": {}, "threshold": "bound_0.02"})
    guard = GazeGuard(*lab_vlm, policy, artifacts=tmp_path)
    samples, kept, false = lab.samples("test", 96, seed=9), [], []
    torch.manual_seed(0)
    for sample, report in zip(samples, write_captions(guard, samples, do_sample=True), strict=True):
        flagged = {finding.claim for finding in report.findings if finding.flagged}
        objects = [(claim, wrong) for claim, wrong in world().decided(sample, report.caption) if claim.kind == "object"]
        if report.findings and objects:
            kept.append(np.mean([wrong and claim not in flagged for claim, wrong in objects]))
            false.append(np.mean([wrong for _, wrong in objects]))
    assert len(kept) > 80
    assert np.mean(kept) <= 0.02 + 2 * np.std(kept) / np.sqrt(len(kept))
    assert np.mean(false) > 0.04, "a test of nothing where nothing is false"


def shuffled(states: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(states.abs().sum() * 1000) % 2**31)
    return states.flatten()[torch.randperm(states.numel(), generator=generator)].view_as(states)
