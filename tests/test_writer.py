"""Result folder of a filter run: every row once, whatever happens on the way: kills, full disks, folders of something else."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console
from PIL import Image
from typer.testing import CliRunner

from gazeguard import lab
from gazeguard.cli import app
from gazeguard.errors import InputError, OutputError
from gazeguard.filtering.batches import open_image
from gazeguard.filtering.caption_filter import NO_CAPTION, CaptionFilter, ignore_rows
from gazeguard.filtering.readers import open_source
from gazeguard.filtering.rows import COLUMNS
from gazeguard.filtering.run import filter_files, replay_entries
from gazeguard.filtering.shard_writer import write_shards
from gazeguard.filtering.verdicts import saved_report
from gazeguard.filtering.writer import FILE_NAMES, Results, reason_category
from gazeguard.guard import GazeGuard
from gazeguard.progress import show_progress

run = CliRunner().invoke
CHUNK = 4
ROWS = 26


@pytest.fixture(scope="module")
def caption_filter(lab_vlm):
    return CaptionFilter(GazeGuard(*lab_vlm), batch_size=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A JSONL file of lab captions, one in five false, one in five without its image."""
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "rows.jsonl").open("w") as file:
        for i, sample in enumerate(lab.samples("test", ROWS, seed=7)):
            sample.image.save(folder / f"{i}.png")
            thing = sample.drawing.objects[0]
            there = f"There is a {thing.colour} {thing.noun}."
            caption = "There is a pink castle and a green skull." if i % 5 == 3 else there
            image = f"{i}.png" if i % 5 else f"gone-{i}.png"
            file.write(json.dumps({"id": i, "image": image, "caption": caption, "prompt": sample.prompt}) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def empty_rows(tmp_path_factory):
    """Rows that the model never sees, so that only the writing is at work."""
    path = tmp_path_factory.mktemp("empty") / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": i, "image": "a.png", "caption": ""}) + "\n" for i in range(10)))
    return path


def into(caption_filter: CaptionFilter, path: Path, folder: Path, label_only: bool = False) -> dict:
    source = open_source(path)
    root = path if path.is_dir() else path.parent
    return filter_files(
        caption_filter, source, Results(folder, caption_filter.run_settings(source, root, CHUNK, label_only), label_only), CHUNK
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(folder: Path) -> dict[str, list[int]]:
    return {path.stem: [row["id"] for row in read_lines(path)] for path in sorted(folder.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def unbroken(caption_filter, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    into(caption_filter, rows, folder)
    return folder


# ------------------------------------------------------------------------------------------------------ what comes out


def test_each_row_is_in_one_file_in_the_order_of_the_input(caption_filter, rows, unbroken):
    """And says what the filter says of it; the summary counts what the files hold."""
    found = ids(unbroken)
    assert sorted(number for numbers in found.values() for number in numbers) == list(range(ROWS))
    assert all(numbers == sorted(numbers) for numbers in found.values())
    assert set(found["excluded"]) >= set(range(0, ROWS, 5))
    assert set(found["flagged"]) >= set(range(3, ROWS, 5))
    summary = json.loads((unbroken / "summary.json").read_text())
    assert {place: summary[place] for place in found} == {place: len(numbers) for place, numbers in found.items()}
    assert summary["rows"] == ROWS
    for verdict, place in (("pass", "kept"), ("flag", "flagged"), ("unchecked", "excluded")):
        lines = read_lines(unbroken / f"{place}.jsonl")
        assert {row["gaze_verdict"] for row in lines} == {verdict}
        assert sum(summary["reasons"].get(verdict, {}).values()) == (0 if verdict == "pass" else len(lines))
        assert all(list(row) == ["id", "image", "caption", "prompt", *COLUMNS] for row in lines)
    assert sorted(path.name for path in unbroken.iterdir()) == ["excluded.jsonl", "flagged.jsonl", "kept.jsonl", "summary.json"]


@pytest.mark.parametrize("chunk", [1, 7, ROWS])
def test_the_chunk_changes_no_verdict_and_is_in_the_summary(caption_filter, rows, unbroken, tmp_path, chunk):
    """Batches lie within a chunk: a risk may differ in its last digits, nothing else; the summary records both sizes."""
    source = open_source(rows)
    settings = caption_filter.run_settings(source, rows.parent, chunk, False)
    summary = filter_files(caption_filter, source, Results(tmp_path / "out", settings), chunk)
    assert (summary["run"]["chunk"], summary["run"]["batch size"]) == (str(chunk), "2")
    for place in ("kept", "flagged", "excluded"):
        results, expected = (read_lines(folder / f"{place}.jsonl") for folder in (tmp_path / "out", unbroken))
        for row in (*results, *expected):
            row["risks"] = [row.pop("gaze_risk"), *(phrase.pop("risk") for phrase in row["gaze_phrases"])]
        for row, other in zip(results, expected, strict=True):
            for risk, before in zip(row.pop("risks"), other.pop("risks"), strict=True):
                assert risk == (before if before is None else pytest.approx(before, abs=1e-4))
        assert results == expected


def test_label_only_is_one_file_in_the_order_of_the_input(caption_filter, rows, unbroken, tmp_path):
    summary = into(caption_filter, rows, tmp_path / "out", label_only=True)
    assert ids(tmp_path / "out") == {"labelled": list(range(ROWS))}
    lines = (tmp_path / "out/labelled.jsonl").read_bytes().splitlines()
    assert sorted(lines) == sorted(b"".join(data for name, data in files(unbroken).items() if ".jsonl" in name).splitlines())
    assert summary["files"] == ["labelled.jsonl"]


def test_reasons_are_counted_without_what_is_particular():
    assert reason_category("not supported by the image: a red star") == "not supported by the image"
    assert reason_category("prompt and caption have 99 tokens, more than 64") == "prompt and caption have N tokens, more than N"
    assert reason_category("the image has more pixels than is safe (9 > 8)") == "the image has more pixels than is safe"


def test_parquet_comes_back_as_parquet(caption_filter, rows, tmp_path):
    """All columns and their types, embedded images too, with the verdicts behind them; empty files have the columns, too."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    lines = read_lines(rows)
    images = [p.read_bytes() if (p := rows.parent / row["image"]).is_file() else None for row in lines]
    table = pa.table(
        {
            "image": pa.array([{"bytes": data, "path": None} for data in images]),
            "when": pa.array(range(ROWS), pa.timestamp("s")),
            "gaze_risk": ["of another run"] * ROWS,
            **{name: [row[name] for row in lines] for name in ("id", "caption", "prompt")},
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 11), tmp_path / "in/0.parquet", row_group_size=3)
    pq.write_table(table.slice(11), tmp_path / "in/1.parquet")
    into(caption_filter, rows, tmp_path / "lines")
    summary = into(caption_filter, tmp_path / "in", tmp_path / "out")
    assert (summary["rows"], summary["files"]) == (ROWS, ["kept.parquet", "flagged.parquet", "excluded.parquet"])
    for place in ("kept", "flagged", "excluded"):
        written = pq.read_table(tmp_path / f"out/{place}.parquet")
        assert written.schema.names == ["image", "when", "id", "caption", "prompt", *COLUMNS, "gaze_row"]
        assert written["gaze_row"].to_pylist() == [number + 1 for number in written["id"].to_pylist()]
        source = open_source(tmp_path / f"out/{place}.parquet")
        named = replay_entries(((row, saved_report(row)) for row in source.rows()), "image")
        assert [entry.title for entry in named] == [f"row {number}" for number in written["gaze_row"].to_pylist()]
        assert written.schema.field("image").type == table.schema.field("image").type
        expected = read_lines(tmp_path / f"lines/{place}.jsonl")
        found = written.select(["id", *(name for name in COLUMNS if name != "gaze_reason")]).to_pylist()
        assert found == [{name: line[name] for name in found[0]} for line in expected]
        assert written["image"].to_pylist() == [{"bytes": images[line["id"]], "path": None} for line in expected]
    into(caption_filter, tmp_path / "in", tmp_path / "labels", label_only=True)
    assert pq.read_table(tmp_path / "labels/labelled.parquet")["id"].to_pylist() == list(range(ROWS))


def test_shards_get_results_beside_them_and_stay_as_they_are(caption_filter, tmp_path):
    """The same verdicts as for the files that were packed, named by shard and key; a broken shard is a row that says so."""
    for name, count in (("0.tar", 3), ("1.tar", 2)):
        with tarfile.open(tmp_path / name, "w") as tar:
            for i, sample in enumerate(lab.samples("test", count, seed=7)):
                sample.image.save(tmp_path / "a.png")
                (tmp_path / "a.txt").write_text(f"There is a {sample.drawing.objects[0].noun}.")
                for suffix in ("png", "txt"):
                    tar.add(tmp_path / f"a.{suffix}", f"{i}.{suffix}")
    data = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(data[:3000])
    before = files(tmp_path)
    summary = into(caption_filter, tmp_path, tmp_path / "out", label_only=True)
    lines = read_lines(tmp_path / "out/labelled.jsonl")
    assert [(row["shard"], row["key"]) for row in lines][:3] == [("0.tar", str(i)) for i in range(3)]
    assert lines[-1]["gaze_verdict"] == "unchecked"
    assert lines[-1]["gaze_reason"].startswith("the shard is damaged or breaks off")
    assert summary["rows"] == len(lines) > 3
    assert before.items() <= files(tmp_path).items()


def test_filtered_shards_have_every_file_of_a_row_and_its_results(caption_filter, tmp_path):
    """Two shards with keys of one name, other files beside the image, and a row that is no row; each shard is read again."""
    folder = tmp_path / "in"
    folder.mkdir()
    samples = lab.samples("test", 4, seed=7)
    contents: dict[tuple[str, str], bytes] = {}
    for shard in ("0.tar", "1.tar"):
        with tarfile.open(folder / shard, "w") as tar:
            for i, sample in enumerate(samples):
                caption = sample.turns[0].answer if i % 2 == 0 else "There is a purple elephant."
                image = io.BytesIO()
                sample.image.save(image, "PNG")
                parts = {"png": image.getvalue(), "txt": caption.encode(), "cls": b"3", "json": b'{"url": "u"}'}
                for suffix, data in parts.items():
                    contents[f"{shard} {i}", suffix] = data
                    info = tarfile.TarInfo(f"{i}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    into(caption_filter, folder, tmp_path / "out")
    written = write_shards(tmp_path / "out", open_source(folder))
    rows = {}
    for path in written:
        place = path.parent.name
        for row in open_source(path).rows():
            key = f"{path.name} {row.fields['key']}"
            rows[key] = place, row.fields["json"]
            with tarfile.open(path) as tar:
                for suffix in ("png", "txt", "cls"):
                    assert tar.extractfile(f"{row.fields['key']}.{suffix}").read() == contents[key, suffix]
    lines = {
        f"{row['shard']} {row['key']}": (place, row)
        for place in FILE_NAMES.values()
        for row in read_lines(tmp_path / f"out/{place}.jsonl")
    }
    assert rows.keys() == lines.keys()
    assert len(rows) == 8
    assert {place for place, _ in rows.values()} >= {"kept", "flagged"}
    for key, (place, row) in lines.items():
        assert rows[key] == (place, {"url": "u", **{name: row[name] for name in COLUMNS}})


def test_captions_are_written_for_a_folder_without_any(caption_filter, tmp_path):
    """Guarded generation first: the row holds what was written, and its verdict."""
    (tmp_path / "in").mkdir()
    for i, sample in enumerate(lab.samples("test", 3, seed=7)):
        sample.image.save(tmp_path / f"in/{i}.png")
    writing = CaptionFilter(caption_filter.guard, batch_size=2, write_captions=True)
    into(writing, tmp_path / "in", tmp_path / "out", label_only=True)
    lines = read_lines(tmp_path / "out/labelled.jsonl")
    assert [row["image"] for row in lines] == [str(tmp_path / f"in/{i}.png") for i in range(3)]
    for i, row in enumerate(lines):
        assert (
            row["caption"]
            == row["gaze_caption"]
            == caption_filter.guard.caption(tmp_path / f"in/{i}.png", do_sample=False).caption
        )


def test_progress_is_shown_on_a_terminal_and_can_be_switched_off(caption_filter, empty_rows, tmp_path, monkeypatch):
    """Rows, rate and remaining time; those of an earlier run count as done."""
    screen, console = io.StringIO(), rich.console.Console
    monkeypatch.setattr("rich.console.Console", lambda **_: console(file=screen, force_terminal=True, width=120))
    source = open_source(empty_rows)

    def run_into(folder: Path) -> str:
        results = Results(folder, caption_filter.run_settings(source, empty_rows.parent, CHUNK, False))
        with results.open():
            results.save(0, next(caption_filter.filter_chunks([list(source.rows())[:CHUNK]], ignore_rows)))
        filter_files(caption_filter, source, results, CHUNK, progress=True)
        text, _ = screen.getvalue(), screen.truncate(screen.seek(0))
        return text

    shown = run_into(tmp_path / "shown")
    assert all(part in shown for part in ("filtering", "4/10", "10/10", "rows/s"))
    show_progress(False)
    try:
        assert run_into(tmp_path / "hidden") == ""
    finally:
        show_progress(True)


# ------------------------------------------------------------------------------------------------------------ killed


def dies(at: int, caption_filter: CaptionFilter, path: Path, folder: Path) -> bool:
    """Run in a process of its own that kills itself, by SIGKILL, at its ``at``-th step of writing; whether it came so far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on, of forks with threads around
        child = os.fork()
    if child == 0:
        steps = [0]

        def come(steps=steps):
            steps[0] += 1
            if steps[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def deadly(step):
            def stepped(*args, **kwargs):
                come()
                result = step(*args, **kwargs)
                come()
                return result

            return stepped

        for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
            setattr(os, name, deadly(getattr(os, name)))
        with contextlib.suppress(BaseException):
            into(caption_filter, path, folder)
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_step_of_writing_loses_nothing(caption_filter, empty_rows, tmp_path):
    """Before and after every rename, sync, and removal: the next run ends with the same bytes as one that was never killed."""
    into(caption_filter, empty_rows, tmp_path / "unbroken")
    expected, at = files(tmp_path / "unbroken"), 1
    while dies(at, caption_filter, empty_rows, tmp_path / f"out{at}"):
        into(caption_filter, empty_rows, tmp_path / f"out{at}")
        assert files(tmp_path / f"out{at}") == expected, f"killed at step {at}"
        at += 1
    assert at > 40
    assert files(tmp_path / f"out{at}") == expected


# The command, which says on stdout that its second chunk is saved, and there waits for its signal.
WAITING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
from gazeguard.cli import app
from gazeguard.filtering.writer import Results
save = Results.save
def save_and_wait(results, number, rows):
    save(results, number, rows)
    if number == 1:
        print("saved", flush=True)
        sys.stdin.read()
Results.save = save_and_wait
app()
"""


def command_of(rows: Path, folder: Path, lab_folder: Path) -> list[str]:
    """The command whose results are those of ``unbroken``."""
    options = ["--model", str(lab_folder), "--chunk", str(CHUNK), "--batch-size", "2"]
    return ["filter", str(rows), str(folder), *options]


def interrupt(arguments: list[str], number: signal.Signals) -> tuple[int, str, list[str]]:
    """The command, sent a signal while it waits behind its second chunk: exit code, stderr and the parts."""
    command = [sys.executable, "-c", WAITING, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "saved\n", process.communicate()[1]
        process.send_signal(number)
        process.wait(600)  # before stdin is closed, which would let it go on
        errors = process.stderr.read()
    return process.returncode, errors, sorted(path.name for path in Path(arguments[2], "parts").iterdir())


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_stopped_goes_on(rows, unbroken, lab_folder, tmp_path, number):
    """Byte for byte the results of a run that was not; what was finished is not done again; a polite signal is answered."""
    arguments = command_of(rows, tmp_path / "out", lab_folder)
    code, errors, parts = interrupt(arguments, number)
    assert parts == ["00000000.jsonl", "00000001.jsonl", "lock", "run.json"]
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or f"stopped by {number.name}. Finished chunks are kept" in errors
    first = tmp_path / "out/parts/00000000.jsonl"
    first.write_bytes(marked := first.read_bytes().replace(b'"gaze_policy"', b'"gaze_policy" '))  # it is taken as it is
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    results, expected = files(tmp_path / "out"), files(unbroken)
    assert sum(data.count(b'"gaze_policy" ') for data in results.values()) == marked.count(b'"gaze_policy" ') == CHUNK
    assert {name: data.replace(b'"gaze_policy" ', b'"gaze_policy"') for name, data in results.items()} == expected


# --------------------------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of 64 KiB, where this process may mount one; elsewhere a limit of 4 KiB on every file."""
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True).returncode == 0
    )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ballast = folder / "ballast"
    if mounted:
        ballast.write_bytes(bytes(44 * 1024))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))

    def make_room():
        ballast.unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    try:
        yield make_room
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(caption_filter, rows, unbroken, tmp_path):
    """One line that says so; nothing half written under its name; after that the same results."""
    with small_disk(tmp_path / "disk") as make_room:
        out = tmp_path / "disk/out"
        with pytest.raises(OutputError, match=r"cannot be written: (No space left on device|File too large). Finished chunks"):
            into(caption_filter, rows, out)
        for part in out.glob("parts/*.jsonl"):
            assert read_lines(part)
        assert not list(out.glob("**/*.tmp"))
        make_room()
        into(caption_filter, rows, out)
        assert files(out) == files(unbroken)


def test_a_command_on_a_full_disk_says_so_and_goes_on_when_there_is_room(rows, unbroken, lab_folder, tmp_path):
    """Here no file may have more than 4 KiB: the chunks fit, the results do not. Exit code 2, one line, every chunk kept."""
    tight = (
        "import os, resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\nos.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-m", "gazeguard", *command_of(rows, tmp_path / "out", lab_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", tight, *command], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "out cannot be written: File too large. Finished chunks are kept: solve this" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert len(list((tmp_path / "out/parts").glob("*.jsonl"))) == -(-ROWS // CHUNK)
    assert not (tmp_path / "out/summary.json").exists()
    assert not list((tmp_path / "out").glob("**/*.tmp"))
    result = run(app, command[3:])
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out") == files(unbroken)


def test_exit_codes_are_in_the_help():
    text = " ".join(run(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    assert "2: something could not be checked, or the call was wrong, or a file cannot be read or written" in text
    assert "130, 143: stopped by Ctrl-C or SIGTERM; the same filter or fit command then continues" in text


def test_a_place_that_cannot_be_written_is_said(caption_filter, rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/out cannot be written: Not a directory"):
        into(caption_filter, rows, tmp_path / "file/out")


# ------------------------------------------------------------------------------------------------ folders of other runs


def test_a_finished_run_is_not_done_again(caption_filter, rows, unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    assert into(caption_filter, rows, unbroken)["rows"] == ROWS
    assert {path: path.stat().st_mtime_ns for path in unbroken.iterdir()} == before


def test_another_run_is_not_gone_on_with(caption_filter, rows, unbroken, empty_rows, tmp_path):
    """The message names what differs, for a finished run and for one that was broken off."""
    with pytest.raises(InputError, match=r"holds a run with another input, so this run cannot continue it"):
        into(caption_filter, empty_rows, unbroken)
    with pytest.raises(InputError, match="another label-only, so"):
        into(caption_filter, rows, unbroken, label_only=True)
    other = CaptionFilter(caption_filter.guard, batch_size=3)
    (tmp_path / "parts").mkdir()
    source = open_source(rows)
    (tmp_path / "parts/run.json").write_text(json.dumps(caption_filter.run_settings(source, rows.parent, CHUNK, False)))
    with pytest.raises(InputError, match="another batch size, so"):
        into(other, rows, tmp_path)
    (tmp_path / "parts/run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run.json is not what a run writes"):
        into(other, rows, tmp_path)


def test_a_folder_with_other_things_is_left_alone(caption_filter, rows, tmp_path):
    (tmp_path / "kept.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty, and holds no run that can be continued. Choose another folder"):
        into(caption_filter, rows, tmp_path)
    assert files(tmp_path) == {"kept.jsonl": b"mine"}


def test_two_runs_do_not_write_into_one_folder(caption_filter, rows, tmp_path):
    source = open_source(rows)
    results = Results(tmp_path / "out", caption_filter.run_settings(source, rows.parent, CHUNK, False))
    with results.open(), pytest.raises(InputError, match="Another run is writing into"):
        into(caption_filter, rows, tmp_path / "out")
    into(caption_filter, rows, tmp_path / "out")


# ------------------------------------------------------------------------------------------------- read back and shown


@pytest.fixture(scope="module")
def filtered(caption_filter, tmp_path_factory):
    """The same five rows as lines, as a table and as a shard, filtered: rows with a false caption and one without an image."""
    folder = tmp_path_factory.mktemp("filtered")
    samples = lab.samples("test", 5, seed=7)
    lines = []
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, sample in enumerate(samples):
            sample.image.save(folder / f"{i}.png")
            kind = sample.drawing.objects[0]
            caption = "There is a pink castle." if i == 3 else f"There is a {kind.colour} {kind.noun}."
            lines.append({"image": f"{i}.png" if i else "gone.png", "caption": caption, "prompt": sample.prompt})
            (folder / f"{i}.txt").write_text(caption)
            for suffix in ("png", "txt")[0 if i else 1 :]:
                tar.add(folder / f"{i}.{suffix}", f"{i}.{suffix}")
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ["a.jsonl", "a.tar"]
    if importlib.util.find_spec("pyarrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(lines), folder / "a.parquet")
        names.append("a.parquet")
    for name in names:
        into(caption_filter, folder / name, folder / f"deep/out/{name}", label_only=True)
    return {name: next((folder / f"deep/out/{name}").glob("labelled.*")) for name in names}


@pytest.mark.parametrize("name", ["a.jsonl", "a.tar", "a.parquet"])
def test_what_filter_writes_is_read_back_from_where_it_lies(filtered, name, monkeypatch, tmp_path):
    """From another working directory: every image opens; the verdicts that are there are shown, and no model runs."""
    if name not in filtered:
        pytest.skip("pyarrow is not installed")
    monkeypatch.chdir(tmp_path)
    rows = list(open_source(filtered[name]).rows())
    assert [isinstance(open_image(row.image), Image.Image) for row in rows] == [False, *[True] * 4]
    monkeypatch.setattr("gazeguard.cli.options.GuardOptions.guard", None)
    result = run(app, ["replay", str(filtered[name]), str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "the page shows the verdicts of the input" in result.stderr
    shown = json.loads(re.search(r'"captions":(\[.*\]),"remedy"', (tmp_path / "page.html").read_text())[1])
    assert [entry["report"]["verdict"] for entry in shown] == [row.fields["gaze_verdict"] for row in rows]
    assert [entry["report"]["reason"] for entry in shown] == [row.fields["gaze_reason"] for row in rows]
    assert {entry["report"]["verdict"] for entry in shown} >= {"unchecked", "flag"}
    assert [entry["image"] is None for entry in shown] == [True, *[False] * 4]
    for entry, row in zip(shown, rows, strict=True):
        assert entry["report"]["caption"] == (row.caption or "")
        told = [(p["text"], [p["start"], p["end"]], p["kind"], p["flagged"]) for p in entry["report"]["phrases"]]
        assert told == [(p["text"], p["span"], p["kind"], p["flagged"]) for p in row.fields["gaze_phrases"]]


def test_filtered_rows_can_be_filtered_again(caption_filter, filtered, tmp_path):
    """With the same verdicts, whatever they were read from."""
    first = read_lines(filtered["a.jsonl"])
    into(caption_filter, filtered["a.jsonl"], tmp_path / "again", label_only=True)
    assert read_lines(tmp_path / "again/labelled.jsonl") == first


def test_verdicts_that_cannot_be_read_are_unchecked_and_say_so(filtered):
    row = next(row for row in open_source(filtered["a.jsonl"]).rows() if row.fields["gaze_phrases"])
    assert saved_report(row).verdict == row.fields["gaze_verdict"]
    phrase = row.fields["gaze_phrases"][0]
    for change in (
        {"gaze_verdict": "fine"}, {"gaze_phrases": [{}]}, {"gaze_phrases": 7}, {"gaze_phrases": [{**phrase, "risk": 2}]},
        {"gaze_phrases": [{**phrase, "text": "another"}]}, {"gaze_phrases": [{**phrase, "box": "no"}]},
    ):  # fmt: skip
        report = saved_report(replace(row, fields={**row.fields, **change}))
        assert (report.verdict, report.reason) == ("unchecked", "the row has no verdict that can be read")
    bare = replace(row, fields={**row.fields, "gaze_phrases": [{**phrase, "kind": "relation"}]})
    assert saved_report(bare).findings[0].claim.text == phrase["text"]


def test_a_run_in_which_nothing_could_be_checked_says_so(empty_rows, tmp_path):
    """Exit code 2 and the commonest reason, of filter and of replay."""
    told = "error: no caption could be checked; 10 of 10: the caption is empty."
    for arguments in (
        ["filter", str(empty_rows), str(tmp_path / "out")],
        ["replay", str(empty_rows), str(tmp_path / "a.html")],
    ):
        result = run(app, arguments)
        assert result.exit_code == 2, result.output
        assert told in result.stderr.splitlines()
    again = run(app, ["replay", str(tmp_path / "out/excluded.jsonl"), str(tmp_path / "a.html")])
    assert again.exit_code == 2
    assert told in again.stderr.splitlines()


def test_an_input_without_rows_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    for name, told in (
        ("filter", "error: no caption could be checked; the input has no rows."),
        ("replay", "error: There is nothing to show: the input has no rows."),
    ):
        result = run(app, [name, str(tmp_path / "a.jsonl"), str(tmp_path / name)])
        assert (result.exit_code, told in result.stderr.splitlines()) == (2, True), result.output


# ------------------------------------------------------------------------------------------------------ the command


def test_captions_are_not_written_because_the_first_row_has_none(rows, lab_folder, tmp_path):
    """The rows' own texts stay in the output; the first line says what is done; --write-captions fills what is missing."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()[1:4]]
    own = [None, *(line["caption"] for line in lines[1:])]
    del lines[0]["caption"]
    source = rows.parent / "first.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["filter", str(source), "--label-only", "--batch-size", "2", "--model", str(lab_folder)]
    checked = run(app, [*arguments[:2], str(tmp_path / "out"), *arguments[2:]])
    assert checked.exit_code == 0, checked.output
    assert checked.stderr.splitlines()[0].startswith("note: only existing captions are checked")
    results = read_lines(tmp_path / "out/labelled.jsonl")
    assert [row.get("caption") for row in results] == own
    assert (results[0]["gaze_verdict"], results[0]["gaze_reason"]) == ("unchecked", NO_CAPTION)
    written = run(app, [*arguments[:2], str(tmp_path / "written"), *arguments[2:], "--write-captions"])
    assert written.stderr.splitlines()[0].startswith("note: existing captions are checked; rows without a caption get one")
    again = read_lines(tmp_path / "written/labelled.jsonl")
    assert [row["caption"] for row in again[1:]] == own[1:]
    assert again[0]["caption"]
    assert [row["gaze_verdict"] for row in again[1:]] == [row["gaze_verdict"] for row in results[1:]]


def test_the_command_prints_counts_and_reasons(rows, unbroken, lab_folder, tmp_path):
    """Text for people, JSON for programs; progress on stderr alone."""
    arguments = command_of(rows, tmp_path / "out", lab_folder)
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"{ROWS} rows: " in result.stdout
    assert "the image cannot be opened" in result.stdout
    assert "filtering" not in result.stdout
    again = run(app, [*arguments, "--json"])
    assert json.loads(again.stdout) == json.loads((unbroken / "summary.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl", "OUT"], "nowhere.jsonl does not exist"),
        (["IN", "OUT", "--policy", "mrak"], "Unknown policy 'mrak'"),
        (["IN", "FULL"], "is not empty"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(rows, tmp_path, arguments, message):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    places = {"IN": str(rows), "OUT": str(tmp_path / "out"), "FULL": str(tmp_path)}
    result = run(app, ["filter", *(places.get(word, word) for word in arguments)])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
