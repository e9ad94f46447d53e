"""The doors of the package: the public names, and the path from a model to its reports by the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gazeguard
from gazeguard import GazeGuardError, GazeHeads, lab
from gazeguard.cli import app
from gazeguard.lab.training.tiny_model import build_llava, build_llava_processor

PUBLIC = [
    "fit",
    "GazeGuard",
    "GazeHeads",
    "find_heads",
    "Detector",
    "Policy",
    "CaptionFilter",
    "Report",
    "Finding",
    "Verdict",
    "GazeTrace",
    "ImageGrid",
    "GazeGuardError",
]


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_package_is_imported_without_anything_heavy():
    """Neither torch nor any other library that takes its time."""
    heavy = {"torch", "transformers", "numpy", "sklearn", "pydantic", "matplotlib", "typer", "PIL", "yaml"}
    loaded = fresh("import sys, gazeguard; print(*sys.modules)").split()
    assert "gazeguard" in loaded
    assert heavy & set(loaded) == set()


def test_the_public_names_are_those_of_their_modules():
    assert set(gazeguard.__all__) == {*PUBLIC, "__version__"}
    for name in PUBLIC:
        value = getattr(gazeguard, name)
        assert name in dir(gazeguard)
        if isinstance(value, type):
            assert getattr(import_module(value.__module__), name) is value


def test_an_import_in_a_fresh_interpreter_needs_no_order():
    """Whichever public name comes first, its module imports."""
    assert fresh("from gazeguard import GazeGuardError, ImageGrid, Report; print(Report.__name__)") == "Report\n"


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'gazeguard' has no attribute 'GazeGaurd'"):
        gazeguard.GazeGaurd  # noqa: B018


# ------------------------------------------------------------------- a model in one folder, its artifacts in another


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny untrained model of the LLaVA class with its processor, as its makers would ship it."""
    folder = tmp_path_factory.mktemp("model")
    processor = build_llava_processor()
    torch.manual_seed(0)
    build_llava(processor, width=64, layers=3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Captions that name one object of their image and one that is not there, in this order, with the list of objects."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number, sample in enumerate(lab.samples("train", 90)):
        sample.image.save(folder / f"{number}.png")
        there = sorted({thing.noun for thing in sample.drawing.objects})
        absent = sorted({"anchor", "castle", "gear", "skull", "umbrella", "sun", "cup"} - set(there))
        caption = f"There is a {there[0]} and a {absent[number % len(absent)]}."
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption, "objects": there}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_from_a_model_to_its_reports_by_the_command_line(model_folder, rows, tmp_path):
    """Each command's next step leads on: doctor, heads, train, then check, caption, eval, filter and replay.

    An untrained model has no usable gaze heads, and every command says so. The rest of the path is walked with two of its
    heads all the same, put into the same file.
    """
    artifacts, image = tmp_path / "artifacts", rows.parent / "0.png"
    chosen = ["--model", model_folder, "--artifacts", artifacts]
    caption = json.loads(rows.read_text().splitlines()[0])["caption"]

    code, _, told = command("check", image, "--caption", caption, "--model", model_folder)
    assert code == 2
    assert f"No gaze heads for {model_folder}" in told
    assert "`gazeguard fit " in told

    code, shown, told = command("doctor", model_folder)
    assert code == 0, shown
    assert told.splitlines()[-1] == f"next: fit a detector, without labels: gazeguard fit {model_folder} --out DIR"

    code, shown, told = command("heads", model_folder, "--out", artifacts, "--strips", 4, "--panels", 2)
    assert code == 1, shown
    assert "No usable gaze heads" in shown
    assert f"gazeguard heads {model_folder} --material " in told.splitlines()[-1]
    assert sorted(path.name for path in artifacts.iterdir()) == ["heads.json", "heads.png"]
    code, shown, _ = command("check", image, "--caption", caption, *chosen)
    assert code == 2
    assert shown.startswith("UNCHECKED"), shown
    assert "No usable gaze heads" in shown

    heads = GazeHeads.from_pretrained(artifacts)
    heads.with_heads(heads.all_heads[:2]).save_pretrained(artifacts)
    code, shown, told = command("heads", "show", artifacts)
    assert code == 0, shown
    assert "2 of 6 heads" in shown

    code, _, told = command("check", image, "--caption", caption, *chosen)
    assert code == 2  # recorded, not judged: there is no detector
    assert told.splitlines()[-1] == f"next: fit a detector, without labels: gazeguard fit {model_folder} --out {artifacts}"

    code, shown, told = command("train", rows, *chosen)
    assert code == 0, told
    assert "object: fitted on " in shown
    assert {"heads.json", "detector.json", "README.md"} <= {path.name for path in artifacts.iterdir()}
    assert told.splitlines()[-1].endswith(
        f"gazeguard check IMAGE --caption TEXT --model {model_folder} --artifacts {artifacts}"
    )

    code, shown, told = command("check", image, "--caption", caption, *chosen, "--json")
    assert code in (0, 1), told
    assert [phrase["kind"] for phrase in json.loads(shown)["phrases"]].count("object") == 2
    code, shown, told = command("caption", image, *chosen, "--json", "--max-new-tokens", 8)
    assert code in (0, 1, 2), told
    assert json.loads(shown)["image"] == str(image)

    code, shown, told = command("eval", rows, *chosen, "--out", tmp_path / "evaluation")
    assert code == 0, told
    assert "calibration error" in shown
    code, shown, told = command("filter", rows, tmp_path / "out", *chosen, "--json")
    assert code == 0, told
    summary = json.loads(shown)
    assert summary["rows"] == 90
    assert summary["kept"] + summary["flagged"] == 90
    code, shown, told = command("replay", rows, tmp_path / "page.html", *chosen, "--most", 3)
    assert code == 0, told
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_from_a_model_to_its_reports_in_python(model_folder, rows, tmp_path):
    """The same three names in Python: artifacts are found by `from_pretrained`, and written by `save_pretrained`."""
    with pytest.raises(GazeGuardError, match=r"No gaze heads for .*gazeguard fit"):
        gazeguard.GazeGuard.from_pretrained(model_folder)
    guard = gazeguard.GazeGuard.from_pretrained("lab", policy=gazeguard.Policy.load("drop"))
    guard.save_pretrained(tmp_path / "artifacts")
    again = gazeguard.GazeGuard.from_pretrained("lab", artifacts=tmp_path / "artifacts", policy="drop")
    image = rows.parent / "0.png"
    assert again.check(image, "There is a green skull.").to_dict() == guard.check(image, "There is a green skull.").to_dict()
