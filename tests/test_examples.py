"""The examples: each runs as it stands, with the lab's model; the notebook is saved with its outputs."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gazeguard import lab

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = EXAMPLES / "gazeguard.ipynb"
RUN_ELSEWHERE = {"lmms_eval/utils.py"}  # lmms-eval itself
SAMPLE = lab.samples("test", 2, seed=7)[1]
CAPTION = SAMPLE.turns[0].answer


def run(name: str, *arguments: str) -> dict[str, Any]:
    """Run an example as a program, in this process, which has torch already; its names."""
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before


def test_every_example_has_its_test():
    here = Path(__file__).read_text(encoding="utf-8")
    scripts = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")} - RUN_ELSEWHERE
    assert {name for name in scripts if f'"{name}"' not in here} == set()


def test_every_example_is_listed_and_short():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.rglob("*.py"):
        assert path.relative_to(EXAMPLES).as_posix() in listed
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 75


def test_wrapping_generate(capsys, tmp_path):
    run("wrap_generate.py")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("In panel one there is a blue star.")
    assert shown[1].startswith("FLAG")
    assert "⟦a purple gear⟧" in shown[2]
    SAMPLE.image.save(tmp_path / "image.png")
    run("wrap_generate.py", str(tmp_path / "image.png"))
    assert capsys.readouterr().out


def test_checking_a_jsonl_file(capsys, tmp_path):
    SAMPLE.image.save(tmp_path / "image.png")
    first = SAMPLE.drawing.objects[0]
    captions = [CAPTION, CAPTION.replace(first.noun, "skull", 1), ""]
    rows = [{"image": "image.png", "caption": caption, "id": i} for i, caption in enumerate(captions)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run("check_jsonl.py", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    checked = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["verdict"] for row in checked] == ["pass", "flag", "unchecked"]
    assert [row["flagged"] for row in checked] == [[], [f"a {first.colour} skull"], []]
    assert [{name: row[name] for name in rows[0]} for row in checked] == rows
    assert f"flag\timage.png\ta {first.colour} skull" in capsys.readouterr().out


def test_mapping_a_dataset(capsys):
    filtered = run("datasets_map.py")["main"]()
    assert {"image", "caption", "gaze_verdict", "gaze_phrases"} <= set(filtered.column_names)
    assert capsys.readouterr().out.count(" skull") >= 6  # in each caption, and in why it is flagged


@pytest.mark.slow  # an actor of its own
def test_filtering_with_ray(patient_ray, tmp_path):
    pytest.importorskip("ray")
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "ray_filter.py")],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("flag\t") == 3


# ------------------------------------------------------------------------------------------------------------ notebook


def outputs(notebook: dict[str, Any]) -> list[list[str]]:
    """For each cell of code the kinds of its outputs."""
    kinds = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            kinds.append([kind for output in cell["outputs"] for kind in output.get("data", {output["output_type"]: 0})])
    return kinds


def test_the_notebook_is_saved_with_outputs_and_pictures(guard):
    """Of the lab's present artifacts: else run it again and save it."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert repr(guard) in json.dumps(notebook)
    kinds = outputs(notebook)
    assert all(kinds)
    assert sum("image/png" in cell for cell in kinds) >= 5
    assert sum("text/html" in cell for cell in kinds) >= 2
    assert not [cell for cell in kinds if "error" in cell]
    assert NOTEBOOK.stat().st_size < 500_000


@pytest.mark.slow  # a kernel of its own
@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
def test_the_notebook_runs_and_shows_what_is_saved():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    saved = nbformat.read(NOTEBOOK, as_version=4)
    again = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(again, timeout=600, kernel_name="python3").execute()
    for before, after in zip(saved.cells, again.cells, strict=True):
        if before.cell_type == "code":
            assert texts(after) == texts(before)


def texts(cell: Any) -> list[str]:
    """What a cell shows as text: reports, captions, names of pictures."""
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return [text for text, output in zip(shown, cell.outputs, strict=True) if output.get("name") != "stderr"]


# ----------------------------------------------------------------------------------------------------------- lmms-eval


def test_the_data_of_the_lmms_eval_task(tmp_path):
    """An answer without a mistake names every object, one of nothing none."""
    datasets = pytest.importorskip("datasets")
    run("lmms_eval/write_data.py", str(tmp_path / "data"), "3")
    rows = datasets.load_from_disk(str(tmp_path / "data"))["test"]
    task = runpy.run_path(str(EXAMPLES / "lmms_eval" / "utils.py"))
    for row, sample in zip(rows, lab.samples("test", 3, seed=3), strict=True):
        assert task["doc_to_visual"](row)[0].tobytes() == sample.image.tobytes()
        assert task["doc_to_text"](row) == sample.prompt
        assert task["process_results"](row, [row["answer"]]) == {"objects_named": 1}
        assert task["process_results"](row, [""]) == {"objects_named": 0}


@pytest.mark.slow  # three runs of another program
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (pip install lmms-eval)")
def test_lmms_eval_runs_the_task_with_the_same_answers_in_every_batch_size(tmp_path):
    """By its own command line, with our entry point: batches of 1, 2 and 4 give the same captions, verdicts and score."""
    run("lmms_eval/write_data.py", str(tmp_path / "lab_data"), "9")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(EXAMPLES.parent)}
    results = []
    for size in ("1", "2", "4"):
        command = [sys.executable, "-m", "lmms_eval", "--model", "gazeguard", "--batch_size", size]
        command += ["--model_args", f"pretrained=lab,reports=reports{size}.jsonl", "--tasks", "gazeguard_lab"]
        command += ["--include_path", str(EXAMPLES / "lmms_eval"), "--output_path", f"logs{size}"]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        reports = [json.loads(line) for line in (tmp_path / f"reports{size}.jsonl").read_text(encoding="utf-8").splitlines()]
        (written,) = (tmp_path / f"logs{size}").rglob("*results.json")
        score = json.loads(written.read_text(encoding="utf-8"))["results"]["gazeguard_lab"]["objects_named,none"]
        results.append((score, [(report["caption"], report["verdict"]) for report in reports]))
    assert len(results[0][1]) == 9
    assert results[0][0] > 0.9
    assert results[1:] == results[:1] * 2
