"""The commands, run as a user runs them: data on stdout, progress on stderr, exit codes as documented."""

import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from gazeguard import lab
from gazeguard.cli import app
from gazeguard.lab.truth import decided_claims, mentions
from gazeguard.policy import load_policy, policy_names

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
    result = run(app, ["demo", "--out", str(tmp_path), "--pictures", "4"])
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^(PASS|FLAG|UNCHECKED)", result.stdout, re.M)) == 4
    assert result.stdout.count("truth:") >= 4
    summed = r"4 pictures, \d+ things named, \d+ of them not there, elsewhere or of another colour: \d+ flagged"
    assert re.search(summed, " ".join(result.stdout.split()))
    page = (tmp_path / "replay.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page
    assert page.count("test/0/") >= 4


def test_demo_counts_are_the_truth(tmp_path):
    """The printed sum agrees with a recount of the captions that the page holds."""
    result = run(app, ["demo", "--out", str(tmp_path), "--pictures", "4"])
    page = (tmp_path / "replay.html").read_text(encoding="utf-8")
    captions = [entry["report"]["caption"] for entry in data_of(page)["captions"]]
    pairs = list(zip(lab.samples("test", 4), captions, strict=True))
    total = sum(len(mentions(sample.drawing, text)) for sample, text in pairs)
    wrong = sum(len({c.phrase for c, _, false in decided_claims(sample.drawing, text) if false}) for sample, text in pairs)
    assert f"{total} things named, {wrong} of them not there" in " ".join(result.stdout.split())


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
    result = run(app, ["check", str(picture[0]), "--caption", f"There is a green {absent} in the middle."])
    assert result.exit_code == 1, result.output
    assert f"⟦a green {absent}⟧" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["caption", "nowhere.png"], "nowhere.png cannot be opened"),
        (["check", "pyproject.toml", "--caption", "A star."], "not a picture that Pillow can read"),
        (["caption", "PICTURE", "--policy", "mrak"], "Unknown policy 'mrak'; expected one of: "),
        (["caption", "PICTURE", "--model", "no/such/folder"], "cannot be loaded as a vision-language model"),
        (["heads", "no/such/folder"], "cannot be loaded as a vision-language model"),
    ],
)
def test_errors_are_one_line_on_stderr_and_exit_code_2(picture, arguments, told):
    """No traceback: what is wrong, why, and what to do."""
    result = run(app, [str(picture[0]) if a == "PICTURE" else a for a in arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert told in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_an_empty_caption_is_unchecked_and_exit_code_2(picture):
    """Nothing passes unseen."""
    result = run(app, ["check", str(picture[0]), "--caption", "", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["verdict"] == "unchecked"


def test_replay_makes_one_page_of_many_rows(picture, tmp_path):
    """The rows in order, with their gaze; one without its picture is there, unchecked; those that pass may be left out."""
    path, sample = picture
    thing = sample.drawing.objects[0]
    told = [f"There is a {thing.colour} {thing.noun}.", "There is a pink castle and a green skull."]
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
    assert [caption["picture"] for caption in captions] == [0, 0, None]
    assert [caption["gaze"] is None for caption in captions] == [False, False, True]
    assert len(data["pictures"]) == 1

    run(app, ["replay", str(source), str(page), "--skip-passed", "--most", "1"])
    (caption,) = data_of(page.read_text(encoding="utf-8"))["captions"]
    assert caption["report"]["verdict"] == "flag"


def test_a_replay_page_without_a_folder_is_refused_before_the_work(picture, tmp_path):
    result = run(app, ["replay", str(picture[0].parent), str(tmp_path / "nowhere" / "page.html")])
    assert result.exit_code == 2
    assert "where the page is to go, is no folder" in result.stderr


def test_heads_are_found_and_kept(tmp_path):
    """gazeguard heads writes the file that a guard reads."""
    file = tmp_path / "heads.json"
    result = run(app, ["heads", str(lab.checkpoint_path()), "--out", str(file), "--strips", "8"])
    assert result.exit_code == 0, result.output
    assert "5 of 36 heads, ranked by narration over 8 strips." in result.stdout
    assert json.loads(file.read_text())["heads"]
    with Image.open(file.with_suffix(".png")) as drawn:
        assert drawn.width > drawn.height > 400
    again = run(app, ["heads", "show", str(file), "--out", str(tmp_path / "again.json")])
    assert again.exit_code == 0, again.output
    assert again.stdout.replace("again.png", "heads.png") == result.stdout
    assert (tmp_path / "again.png").read_bytes() == file.with_suffix(".png").read_bytes()


def test_own_comics_find_heads_and_unusable_ones_are_said(tmp_path):
    """A folder of comics without words: ranked by questions, which the lab's model does not follow. Exit code 1, figures."""
    for comic in "ab":
        (tmp_path / comic).mkdir()
        for number in range(3):
            Image.new("RGB", (80, 80), (80 * number, 0, 0)).save(tmp_path / comic / f"{number}.png")
    file = tmp_path / "heads.json"
    result = run(app, ["heads", str(lab.checkpoint_path()), "--out", str(file), "--material", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert "ranked by query over 2 strips" in result.stdout
    assert "No usable gaze heads" in result.stdout
    assert run(app, ["heads", "show"]).exit_code == 2


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


def test_help_names_every_command_and_the_exit_codes():
    """--help is complete, and quick, since nothing heavy is imported for it."""
    text = run(app, ["--help"]).output
    assert all(name in text for name in ("demo", "caption", "check", "filter", "replay", "heads"))
    assert "Exit codes" in text
