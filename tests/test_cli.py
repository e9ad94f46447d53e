"""The commands, run as a user runs them: data on stdout, progress on stderr, exit codes as documented."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from gazeguard import lab
from gazeguard.artifacts import DETECTOR_FILE
from gazeguard.cli import app
from gazeguard.cli.console import count
from gazeguard.cli.options import LAB_NOTE
from gazeguard.fitting import read_captions
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.truth import decided_claims, mentions
from gazeguard.policy import load_policy, policy_folder, policy_names
from gazeguard.progress import status, track

run = CliRunner().invoke


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A test picture on disk, and its sample."""
    sample = lab.samples("test", 2, seed=7)[1]
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    sample.image.save(path)
    return path, sample


def data_of(page: str) -> dict:
    """What a replay page holds."""
    return json.loads(re.search(r"<script[^>]*application/json[^>]*>(.*?)</script>", page, re.S).group(1))


def test_demo_shows_captions_truth_and_a_page(tmp_path):
    """Every caption is printed with its verdict, what is flagged has a reason, and the page opens by itself."""
    result = run(app, ["demo", "--out", str(tmp_path), "--images", "4"])
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^(PASS|FLAG|UNCHECKED)", result.stdout, re.M)) == 4
    assert result.stdout.count("truth:") >= 4
    summed = r"4 images, \d+ objects named, \d+ of them hallucinated \(absent, elsewhere or of another colour; CHAIR_i "
    assert re.search(summed, " ".join(result.stdout.split()))
    page = (tmp_path / "replay.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page
    assert page.count("test/0/") >= 4


def test_demo_counts_are_the_truth(tmp_path):
    """The printed sum agrees with a recount of the captions that the page holds."""
    result = run(app, ["demo", "--out", str(tmp_path), "--images", "4"])
    page = (tmp_path / "replay.html").read_text(encoding="utf-8")
    captions = [entry["report"]["caption"] for entry in data_of(page)["captions"]]
    pairs = list(zip(lab.samples("test", 4), captions, strict=True))
    total = sum(len(mentions(sample.drawing, text)) for sample, text in pairs)
    wrong = sum(len({c.phrase for c, _, false in decided_claims(sample.drawing, text) if false}) for sample, text in pairs)
    assert f"{total} objects named, {wrong} of them hallucinated" in " ".join(result.stdout.split())


def test_caption_writes_json_lines_and_a_page(picture, tmp_path):
    """--json prints one object per picture and nothing else."""
    html = tmp_path / "page.html"
    result = run(app, ["caption", str(picture[0]), str(picture[0]), "--json", "--html", str(html)])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["image"] for row in rows] == [str(picture[0])] * 2
    assert rows[0]["caption"].startswith("There is")
    assert result.exit_code == {"pass": 0, "flag": 1, "unchecked": 2}[rows[0]["verdict"]]
    assert html.stat().st_size > 10_000


def test_check_flags_what_is_not_there(picture):
    """A caption with a made-up thing ends with exit code 1, and the phrase is marked."""
    absent = next(n for n in ("skull", "castle", "anchor") if n not in {t.noun for t in picture[1].drawing.objects})
    false = picture[1].turns[0].answer.replace(picture[1].drawing.objects[0].noun, absent, 1)
    result = run(app, ["check", str(picture[0]), "--caption", false])
    assert result.exit_code == 1, result.output
    assert f" {absent}⟧" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check", "nowhere.png", "--caption", "A star."], "nowhere.png cannot be opened"),
        (["caption", "EMPTY"], "has no image (.avif, "),
        (["caption", "PICTURE", "--device", "gpu"], "Unknown device 'gpu'; expected one of: auto, cpu, cuda"),
        (["caption", "PICTURE", "--dtype", "int4"], "Unknown dtype 'int4'; expected one of: auto, bfloat16"),
        (["caption", "PICTURE", "--device", "cpu", "--device-map", "auto"], "Leave one of them out."),
        (["caption", "PICTURE", "--artifacts", "EMPTY"], "No gaze heads for "),
        (["heads", "lab", "--out", "heads.json"], "--out takes the folder"),
        (["heads", "show"], "The file to show is missing"),
        (["check", "pyproject.toml", "--caption", "A star."], "Pillow can read"),
        (["check", "https://example.org/a.png", "--caption", "A star."], "the image is a URL, which is not fetched"),
        (["caption", "PICTURE", "--policy", "mrak"], "Unknown policy 'mrak'; expected one of: "),
        (["caption", "PICTURE", "--model", "no/such/folder"], "cannot be loaded as a vision-language model"),
        (["heads", "no/such/folder"], "cannot be loaded as a vision-language model"),
    ],
)
def test_errors_are_one_line_on_stderr_and_exit_code_2(picture, tmp_path, arguments, told):
    """No traceback: what is wrong, why, and what to do."""
    result = run(app, [{"PICTURE": str(picture[0]), "EMPTY": str(tmp_path)}.get(a, a) for a in arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert told in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert all(line.startswith(("error: ", "note: ")) for line in result.stderr.splitlines())


def test_an_empty_caption_is_unchecked_and_exit_code_2(picture):
    """Nothing passes unseen."""
    result = run(app, ["check", str(picture[0]), "--caption", "", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["verdict"] == "unchecked"


def test_a_data_uri_is_named_short_for_people_and_whole_for_programs(picture, tmp_path):
    uri = f"data:image/png;base64,{base64.b64encode(picture[0].read_bytes()).decode()}"
    shown = run(app, ["caption", uri, "--temperature", "0", "--rows", str(tmp_path / "rows.jsonl")])
    by_path = run(app, ["caption", str(picture[0]), "--temperature", "0"])
    assert shown.stdout.splitlines()[0].endswith("\u2026")
    assert shown.stdout.splitlines()[1:] == by_path.stdout.splitlines()[1:]
    assert json.loads((tmp_path / "rows.jsonl").read_text())["image"] == uri


def test_replay_makes_one_page_of_many_rows(picture, tmp_path):
    """The rows in order, with their gaze; one without its picture is there, unchecked; those that pass may be left out."""
    path, sample = picture
    answer = sample.turns[0].answer
    told = [answer, answer.replace(sample.drawing.objects[0].noun, "skull", 1)]
    rows = [{"image": path.name, "caption": caption} for caption in told] + [{"image": "gone.png", "caption": told[0]}]
    source, page = path.parent / "rows.jsonl", tmp_path / "page.html"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(app, ["replay", str(source), str(page), "--batch-size", "2"])
    assert result.exit_code == 0, result.output
    data = data_of(page.read_text(encoding="utf-8"))
    captions = data["captions"]
    assert [caption["title"] for caption in captions] == [path.name, path.name, "gone.png"]
    assert [caption["report"]["caption"] for caption in captions] == [*told, told[0]]
    assert [caption["report"]["verdict"] for caption in captions] == ["pass", "flag", "unchecked"]
    assert [caption["image"] for caption in captions] == [0, 0, None]
    assert [caption["gaze"] is None for caption in captions] == [False, False, True]
    assert len(data["images"]) == 1

    run(app, ["replay", str(source), str(page), "--skip-passed", "--most", "1"])
    (caption,) = data_of(page.read_text(encoding="utf-8"))["captions"]
    assert caption["report"]["verdict"] == "flag"


def test_a_replay_page_without_a_folder_is_refused_before_the_work(picture, tmp_path):
    result = run(app, ["replay", str(picture[0].parent), str(tmp_path / "nowhere" / "page.html")])
    assert result.exit_code == 2
    assert "does not exist. Create it, or give another path." in result.stderr


def test_heads_are_found_and_kept(tmp_path):
    """gazeguard heads writes the file that a guard reads, in a folder for --artifacts; show writes only where it is told."""
    folder = tmp_path / "artifacts"
    result = run(app, ["heads", str(lab.checkpoint_path()), "--out", str(folder), "--strips", "8"])
    assert result.exit_code == 0, result.output
    assert "9 of 36 heads, ranked by narration over 8 strips." in result.stdout
    assert json.loads((folder / "heads.json").read_text())["heads"]
    with Image.open(folder / "heads.png") as drawn:
        assert drawn.width > drawn.height > 400
    again = run(app, ["heads", "show", str(folder / "heads.json"), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert again.stdout.replace("again", "artifacts") == result.stdout
    assert (tmp_path / "again" / "heads.png").read_bytes() == (folder / "heads.png").read_bytes()
    shown = run(app, ["heads", "show", str(folder)])
    assert shown.exit_code == 0
    assert result.stdout.startswith(shown.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "artifacts"]


def test_own_comics_find_heads_and_unusable_ones_are_said(tmp_path):
    """A folder of comics without words: ranked by questions, which the lab's model does not follow. Exit code 1, figures."""
    for comic in "ab":
        (tmp_path / comic).mkdir()
        for number in range(3):
            Image.new("RGB", (80, 80), (80 * number, 0, 0)).save(tmp_path / comic / f"{number}.png")
    arguments = ["heads", str(lab.checkpoint_path()), "--out", str(tmp_path / "heads"), "--material", str(tmp_path)]
    result = run(app, arguments)
    assert result.exit_code == 1, result.output
    assert "ranked by query over 2 strips" in result.stdout
    assert "No usable gaze heads" in result.stdout
    assert "next: try comics that the model understands: gazeguard heads " in result.stderr


def test_unusable_gaze_heads_leave_every_caption_unchecked(picture, lab_folder, tmp_path):
    """check and filter give the verdict and its reason; a detector cannot be fitted to such heads."""
    why = "No usable gaze heads: the best 2 of 48 heads attend to nothing. Find others."
    GazeHeads.from_pretrained(lab_folder).model_copy(update={"unusable": why}).save_pretrained(tmp_path / "heads")
    options = ["--model", str(lab_folder), "--artifacts", str(tmp_path / "heads")]
    shutil.copy(lab_folder / DETECTOR_FILE, tmp_path / "heads")
    checked = run(app, ["check", str(picture[0]), "--caption", "There is a red star.", "--json", *options])
    report = json.loads(checked.stdout)
    assert (checked.exit_code, report["verdict"]) == (2, "unchecked")
    assert report["reason"] == why.partition(". ")[0]
    assert "next: try comics that the model understands: gazeguard heads " in checked.stderr

    rows = tmp_path / "rows.jsonl"
    row = {"image": str(picture[0]), "caption": "There is a red star.", "objects": ["star"]}
    rows.write_text(json.dumps(row))
    filtered = run(app, ["filter", str(rows), str(tmp_path / "out"), "--json", *options])
    assert (filtered.exit_code, json.loads(filtered.stdout)["reasons"]) == (2, {"unchecked": {"No usable gaze heads": 1}})
    trained = run(app, ["train", str(rows), *options])
    assert trained.exit_code == 2
    assert why in " ".join(trained.stderr.split())


def test_a_policy_is_shown_so_that_the_output_is_one_again(tmp_path):
    """What show prints, validate takes, and it is the same policy."""
    for name in policy_names():
        shown = run(app, ["policy", "show", name])
        assert shown.exit_code == 0, shown.output
        (tmp_path / "again.yaml").write_text(shown.stdout)
        assert load_policy(tmp_path / "again.yaml") == load_policy(name)
        told = run(app, ["policy", "validate", str(tmp_path / "again.yaml")])
        assert told.exit_code == 0
        assert told.stdout.endswith(f"again.yaml is the policy {name!r}.\n")


def test_a_wrong_policy_is_told_with_key_value_and_what_is_allowed(tmp_path):
    (tmp_path / "mine.yaml").write_text("version: 1\nname: mine\non_flag: cut\n")
    told = run(app, ["policy", "validate", str(tmp_path / "mine.yaml")])
    assert told.exit_code == 2
    assert told.stdout == ""
    said = "mine.yaml: key 'on_flag' has the value 'cut': Input should be 'keep', 'drop' or 'abstain'."
    assert said in " ".join(told.stderr.split())


def commands() -> list[tuple[str, ...]]:
    """Every command, as it is typed."""
    tree = typer.main.get_command(app)
    return [
        (name, *inner)
        for name, made in tree.commands.items()
        for inner in ([(n,) for n in getattr(made, "commands", {})] or [()])
    ]


def test_help_names_every_command_and_the_exit_codes():
    """--help is complete, and quick, since nothing heavy is imported for it."""
    text = run(app, ["--help"]).output
    assert {name for name, *_ in commands()} == {
        "demo", "policy", "caption", "check", "filter", "replay", "doctor", "heads", "train", "lab", "audit",
        "eval", "serve", "fit",
    }  # fmt: skip
    assert all(name in text for name, *_ in commands())
    assert "Exit codes" in text
    for heading in ("Start here", "Check captions", "Filter data sets", "Prepare a model of your own"):
        assert heading in text


def test_help_imports_nothing_heavy():
    code = "import sys, gazeguard.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {"torch", "transformers", "sklearn", "matplotlib", "numpy"} & set(loaded) == set()


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_can_be_quiet_and_says_how_a_model_is_loaded(command):
    options = {name for parameter in node(command).params for name in parameter.opts}
    assert {"--verbose", "-v", "--quiet", "-q"} <= options
    if command[0] not in ("demo", "policy", "lab"):
        assert {"--device", "--dtype", "--device-map"} <= options
        assert "--model" in options or "model" in {parameter.name for parameter in node(command).params}
    if command[0] in ("caption", "check", "filter", "replay"):
        assert {"--artifacts", "--heads", "--detector", "--policy"} <= options


def node(command: tuple[str, ...]) -> object:
    made = typer.main.get_command(app)
    for name in command:
        made = made.commands[name]
    return made


def steps(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("next: ")]


def named(step: str) -> list[tuple[str, ...]]:
    """The commands that a line names."""
    every = sorted(commands(), key=len, reverse=True)
    found = []
    for typed in re.findall(r"gazeguard ((?:\S+ ?)+)", step):
        found.append(next(command for command in every if tuple(typed.split()[: len(command)]) == command))
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["policy", "list"],
        ["policy", "show", "drop"],
        ["policy", "validate", str(policy_folder() / "drop.yaml")],
        ["heads", "show", str(lab.checkpoint_path())],
        ["check", "PICTURE", "--caption", "There is a red star."],
        ["doctor", "lab"],
    ],
    ids=" ".join,
)
def test_a_command_ends_with_a_next_step_that_exists(picture, arguments):
    """One line on stderr, and none with --quiet; a command that it names is one."""
    arguments = [str(picture[0]) if a == "PICTURE" else a for a in arguments]
    (step,) = steps(run(app, arguments).stderr)
    if "gazeguard " in step:
        assert named(step)
    quiet = run(app, [*arguments, "--quiet"])
    assert quiet.stderr == ""
    assert quiet.stdout == run(app, ["-q", *arguments]).stdout != ""


def test_without_a_model_the_toy_model_says_so_in_one_line(picture, tmp_path):
    """Every command but the demo; none with --model lab."""
    told = run(app, ["check", str(picture[0]), "--caption", "A star."]).stderr
    assert [line for line in told.splitlines() if line.startswith("note: ")] == [f"note: {LAB_NOTE}"]
    assert "only drawn pictographs" in LAB_NOTE
    assert LAB_NOTE not in run(app, ["check", str(picture[0]), "--caption", "A star.", "--model", "lab"]).stderr
    assert LAB_NOTE not in run(app, ["demo", "--out", str(tmp_path), "--images", "1"]).stderr


def test_caption_takes_folders_and_goes_on_after_a_bad_image(picture, tmp_path):
    """In the order given, by name within a folder; what cannot be read is unchecked, with the reason: exit code 2."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        (folder / name).write_bytes(picture[0].read_bytes())
    (folder / "bad.png").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    arguments = ["caption", str(folder), str(picture[0]), "--json", "--batch-size", "2", "--max-new-tokens", "12"]
    result = run(app, [*arguments, "--temperature", "0"])
    assert result.exit_code == 2, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["image"] for row in rows] == [*(str(folder / name) for name in ("a.png", "b.png", "bad.png")), str(picture[0])]
    assert "Pillow can read" in rows[2]["reason"]
    assert rows[2]["verdict"] == "unchecked"
    assert rows[0]["caption"] == rows[1]["caption"] == rows[3]["caption"] != ""
    (folder / "a.png").rename(folder / "COCO_val2014_000000000042.png")
    result = run(app, [*arguments, "--temperature", "0", "--rows", str(tmp_path / "rows.jsonl")])
    written = read_captions(tmp_path / "rows.jsonl")
    assert [row.image for row in written if Path(row.image).is_file()] == [row.image for row in written]
    assert [row.image_id for row in written] == [42, None, None]
    assert {row.caption for row in written} == {rows[0]["caption"]}
    warm = [run(app, [*arguments, "--temperature", "3"]).stdout for _ in range(2)]
    assert warm[0] != result.stdout


def test_what_the_model_refuses_is_unchecked_one_image_at_a_time(picture):
    """A prompt with the model's image token cannot be encoded: no caption, no crash."""
    result = run(app, ["caption", str(picture[0]), str(picture[0]), "--prompt", "<image> <image>", "--json"])
    assert result.exit_code == 2
    assert {json.loads(line)["verdict"] for line in result.stdout.splitlines()} == {"unchecked"}


def test_artifacts_are_found_in_a_folder(picture, tmp_path):
    """Heads alone: watched, not judged, and the next step fits a detector; with the detector beside them: judged."""
    arguments = [
        "check",
        str(picture[0]),
        "--caption",
        picture[1].turns[0].answer,
        "--model",
        "lab",
        "--artifacts",
        str(tmp_path),
    ]
    shutil.copy(lab.checkpoint_path() / "heads.json", tmp_path)
    result = run(app, arguments)
    assert result.exit_code == 2
    assert steps(result.stderr) == [f"next: fit a detector, without labels: gazeguard fit lab --out {tmp_path}"]
    shutil.copy(lab.checkpoint_path() / "detector.json", tmp_path)
    assert run(app, arguments).exit_code in (0, 1)
    heads = ["--heads", str(tmp_path / "heads.json"), "--detector", str(tmp_path / "detector.json")]
    assert run(app, [*arguments[:-2], *heads]).stdout == run(app, arguments).stdout


def test_output_is_not_wrapped_when_it_is_piped(picture, monkeypatch):
    """One line of the caption is one line, however long."""
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = run(app, ["check", str(picture[0]), "--caption", "There is a red star. " * 20]).stdout.splitlines()
    assert max(map(len, lines)) > 400
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("command", [["policy", "list"], ["heads", "show", str(lab.checkpoint_path())]])
def test_tables_end_where_their_text_ends_when_they_are_piped(command, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = run(app, command).stdout.splitlines()
    assert len(lines) > 4
    assert not any(line != line.rstrip() for line in lines)


def test_what_is_needed_first_is_listed_first():
    """The help and the next steps name the way of the README: demo, then fit."""
    listed = list(typer.main.get_command(app).commands)
    assert listed[0] == "demo"
    assert listed.index("fit") < min(listed.index(name) for name in ("heads", "train", "audit", "doctor"))


def test_numbers_and_their_nouns():
    assert [count(n, "false positive") for n in (0, 1, 2)] == ["0 false positives", "1 false positive", "2 false positives"]


def test_verbose_logs_what_is_done(picture):
    told = run(app, ["check", str(picture[0]), "--caption", "A star.", "-v"]).stderr
    assert "info: loading lab (dtype auto) on " in told
    assert "info: " not in run(app, ["check", str(picture[0]), "--caption", "A star."]).stderr


def test_progress_is_shown_on_a_terminal_alone(capsys):
    """Nothing is written to what is no terminal, and whatever is iterated over comes through."""
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert list(track(iter("ab"), "counting", total=2)) == ["a", "b"]
    with status("waiting"):
        pass
    assert capsys.readouterr() == ("", "")


def test_shell_completion_knows_the_policies():
    environment = {
        **os.environ,
        "_GAZEGUARD_COMPLETE": "complete_bash",
        "COMP_WORDS": "gazeguard policy show ab",
        "COMP_CWORD": "3",
    }
    code = "from gazeguard.cli import app; app(prog_name='gazeguard')"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert told.stdout.split() == ["abstain"]
