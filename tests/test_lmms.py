"""lmms-eval model: requests are objects with ``args``; lmms-eval itself takes part only where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

from gazeguard import lab
from gazeguard.errors import InputError
from gazeguard.integrations.lmms_eval import GazeGuarded, manifest

EXAMPLE, EXAMPLE_TASK = Path(__file__).resolve().parents[1] / "examples" / "lmms_eval", "gazeguard_lab"
SAMPLES = lab.samples("test", 5, seed=11)
DOCUMENTS = {"lab": {"test": [{"image": sample.image} for sample in SAMPLES]}}


def request(number: int, question: str, **options) -> SimpleNamespace:
    return SimpleNamespace(args=(question, options, lambda document: [document["image"]], number, "lab", "test"))


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    reports = tmp_path_factory.mktemp("reports") / "reports.jsonl"
    model = GazeGuarded(
        "lab", artifacts=str(lab.checkpoint_path()), reports=str(reports), batch_size="2", device="cpu", max_length=None
    )
    model.task_dict = DOCUMENTS
    return model, reports


def test_answers_are_the_guards_own(answering, guard):
    """In order, in batches of equal options, cut at the task's stop words; a report is written for each."""
    model, reports = answering
    requests = [request(i, "<image>\nDescribe the picture.", max_new_tokens=30) for i in range(3)]
    requests += [request(3, "Describe the picture.", max_new_tokens=30, until=["."]), request(4, "Describe the picture.")]
    answers = model.generate_until(requests)
    plain = [guard.caption(sample.image, max_new_tokens=n, do_sample=False).caption for sample, n in zip(
        SAMPLES, (30, 30, 30, 30, 128), strict=True)]  # fmt: skip
    assert answers[:3] == plain[:3]
    assert answers[3] == plain[3].split(".")[0]
    assert answers[4] == plain[4]
    rows = [json.loads(line) for line in reports.read_text().splitlines()]
    assert [row["caption"] for row in rows] == plain
    assert all(row["verdict"] in ("pass", "flag", "unchecked") for row in rows)


def test_an_item_without_an_image_costs_no_other(answering, caplog):
    """The other answers stand; the odd ones are answered without an image, unwatched, and named in report and log."""
    model, reports = answering
    requests = [request(i, "Describe the picture.", max_new_tokens=30) for i in range(5)]
    plain = model.generate_until(requests)
    odd = {
        1: (lambda _: [], "item 1 of lab has 0 images, not one: answered from the question alone, unwatched"),
        2: (lambda _: None, "item 2 of lab has 0 images, not one: answered"),
        3: (lambda document: [document["image"]] * 2, "item 3 of lab has 2 images, not one: answered"),
        4: (lambda _: [b"no image"], "item 4 of lab is answered from the question alone, unwatched: the given image"),
    }
    for number, (to_visual, reason) in odd.items():
        question, options, *_ = requests[number].args
        changed = [*requests]
        changed[number] = SimpleNamespace(args=(question, options, to_visual, number, "lab", "test"))
        answers = model.generate_until(changed)
        assert [answer for i, answer in enumerate(answers) if i != number] == plain[:number] + plain[number + 1 :]
        assert isinstance(answers[number], str)
        report = [json.loads(line) for line in reports.read_text().splitlines()[-5:]][number]
        assert report["verdict"] == "unchecked"
        assert report["reason"].startswith(reason)
        assert reason in caplog.text
    blind = [SimpleNamespace(args=("Hello?", {"max_new_tokens": 5}, lambda _: [], 0, "lab", "test"))] * 2
    assert len(model.generate_until(blind)) == 2


def test_what_it_cannot_do_is_said(answering):
    model, _ = answering
    with pytest.raises(InputError, match="watches what is generated: choose tasks with output_type"):
        model.loglikelihood([])
    with pytest.raises(InputError, match="answers in one round"):
        model.generate_until_multi_round([])
    with pytest.raises(InputError, match="model_args mood are not known to GazeGuard"):
        GazeGuarded(str(lab.checkpoint_path()), mood="good")


def test_lmms_eval_finds_it():
    """The entry point leads here; with lmms-eval installed its registry gets the class."""
    (entry_point,) = [point for point in entry_points(group="lmms_eval.models") if point.name == "gazeguard"]
    assert entry_point.load() is manifest
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed")
    result = manifest()
    assert (result.model_id, result.simple_class_path) == ("gazeguard", "gazeguard.integrations.lmms_eval.GazeGuarded")


@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed: make test-lmms has an environment with it",
)
def test_lmms_eval_runs_the_task_of_the_examples(tmp_path):
    """From the command line, as the examples have it: batches of 1, 2 and 4 give the same captions, verdicts and score."""
    subprocess.run([sys.executable, str(EXAMPLE / "write_data.py"), "lab_data", "4"], cwd=tmp_path, check=True)
    seen = []
    for batch in ("1", "2", "4"):
        reports = tmp_path / f"reports-{batch}.jsonl"
        command = [
            sys.executable,
            "-m",
            "lmms_eval",
            "--model",
            "gazeguard",
            "--batch_size",
            batch,
            "--output_path",
            f"scores-{batch}",
        ]
        command += [
            "--model_args",
            f"pretrained=lab,reports={reports}",
            "--include_path",
            str(EXAMPLE),
            "--tasks",
            EXAMPLE_TASK,
        ]
        subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        rows = [json.loads(line) for line in reports.read_text(encoding="utf-8").splitlines()]
        (scores,) = (tmp_path / f"scores-{batch}").rglob("*_results.json")
        score = json.loads(scores.read_text(encoding="utf-8"))["results"][EXAMPLE_TASK]["objects_named,none"]
        seen.append(([(row["caption"], row["verdict"]) for row in rows], score))
    assert len(seen[0][0]) == 4
    assert seen[0][1] > 0.5
    assert seen[0] == seen[1] == seen[2]
