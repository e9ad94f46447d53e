"""Ray backends of the filter: the results are those of one process, also when a worker is killed on the way."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gazeguard import lab
from gazeguard.cli import app
from gazeguard.errors import InputError
from gazeguard.filtering.caption_filter import CaptionFilter
from gazeguard.filtering.ray import ArrowCaptionFilter, RayActorPool, ray_filter
from gazeguard.filtering.readers import open_source
from gazeguard.filtering.rows import COLUMNS
from gazeguard.filtering.run import filter_files
from gazeguard.filtering.writer import Results
from gazeguard.guard import GazeGuard

pytestmark = [
    pytest.mark.slow,  # actors take a core each, and long where there are two
    # Ray leaves the pipes and logs of processes that are gone to the garbage collector, and is told of killed ones.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    # Ray sets settings of its own that it calls deprecated.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
    # Of a setting of GPUs that is to change in some release of Ray.
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]
CHUNK, ROWS = 4, 26


@pytest.fixture(scope="module")
def cluster(patient_ray):
    """A local Ray of two CPUs; its workers find this checkout."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    root = str(Path(__file__).parents[1])
    before = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
    )
    yield ray
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def samples():
    return lab.samples("test", ROWS, seed=7)


@pytest.fixture(scope="module")
def table(samples):
    """Columns: every fifth caption is false, every fifth image is missing."""
    columns = {"id": list(range(ROWS)), "image": [], "caption": [], "prompt": [s.prompt for s in samples]}
    for i, sample in enumerate(samples):
        buffer = io.BytesIO()
        sample.image.save(buffer, "PNG")
        columns["image"].append(buffer.getvalue() if i % 5 else b"")
        there = sample.turns[0].answer
        columns["caption"].append(there.replace(sample.drawing.objects[0].noun, "skull", 1) if i % 5 == 3 else there)
    return columns


@pytest.fixture(scope="module")
def rows(table, tmp_path_factory):
    """The same as a JSONL file."""
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "rows.jsonl").open("w") as file:
        for i, image in enumerate(table["image"]):
            (folder / f"{i}.png").write_bytes(image)
            row = {"id": i, "image": f"{i}.png", "caption": table["caption"][i], "prompt": table["prompt"][i]}
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def caption_filter(lab_vlm):
    return CaptionFilter(GazeGuard(*lab_vlm), batch_size=2)


@pytest.fixture(scope="module")
def alone(caption_filter, rows, tmp_path_factory):
    """The results of one process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    source = open_source(rows)
    filter_files(caption_filter, source, Results(folder, caption_filter.run_settings(source, rows.parent, CHUNK, False)), CHUNK)
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_actors_one_killed_give_the_files_of_one_process(cluster, lab_folder, rows, alone, tmp_path):
    """Byte for byte, in the order of the input; the other actor goes on, and the killed one is started anew."""
    source, seen, killed = open_source(rows), [], []

    def kill_one(more: int) -> None:
        seen.append(more)
        if not killed:
            killed.extend(pool.process_ids()[:1])
            os.kill(killed[0], signal.SIGKILL)

    with RayActorPool(lab_folder, actors=2, batch_size=2) as pool:
        assert len(set(pool.process_ids())) == 2
        run = pool.run_settings(source, rows.parent, CHUNK, False)
        filter_files(pool, source, Results(tmp_path / "out", run), CHUNK, kill_one)
        after = pool.process_ids()
    assert files(tmp_path / "out") == alone
    assert sum(seen) == ROWS
    assert killed[0] not in after
    assert len(set(after)) == 2
    assert cluster.is_initialized()  # it was there before the pool


def test_what_the_actors_cannot_do_is_one_line(cluster, rows, tmp_path):
    """A model that is not there, on any machine of the cluster."""
    arguments = ["filter", str(rows), str(tmp_path / "out"), "--ray", "--actors", "1", "--model", "nowhere/at all"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Ray's actors cannot go on: " in result.stderr
    assert "nowhere/at all cannot be loaded as a vision-language model" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_dataset_keeps_its_columns_and_every_row_when_an_actor_is_killed(
    cluster, lab_folder, caption_filter, table, tmp_path, monkeypatch
):
    """The verdicts of one process for every row, with types that do not depend on the block."""
    pa = pytest.importorskip("pyarrow")
    expected, killed = caption_filter(table), tmp_path / "killed"

    class Dying(ArrowCaptionFilter):
        """Kills its own process over one block, once."""

        def __call__(self, batch):
            if 7 in batch["id"].to_pylist() and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    monkeypatch.setattr("gazeguard.filtering.ray.ArrowCaptionFilter", Dying)
    dataset = cluster.data.from_arrow([pa.table(table).slice(start, 2) for start in range(0, ROWS, 2)])
    filtered = ray_filter(dataset, lab_folder, actors=2, rows=2, batch_size=2)
    rows = {}
    for batch in filtered.iter_batches(batch_size=2, batch_format="pyarrow", prefetch_batches=0):
        assert batch.schema.names == [*table, *COLUMNS]
        assert batch.schema.field("gaze_phrases").type.value_type.num_fields == 6
        rows |= {row["id"]: row for row in batch.to_pylist()}
    assert killed.exists()
    assert sorted(rows) == list(range(ROWS))
    for i, row in rows.items():
        values = {name: expected[name][i] for name in COLUMNS}
        risk = values.pop("gaze_risk")
        assert row["gaze_risk"] == (None if risk is None else pytest.approx(risk, abs=1e-4))
        spans = [(p["span"], p["flagged"], p["box"]) for p in values.pop("gaze_phrases")]
        assert [(p["span"], p["flagged"], p["box"]) for p in row["gaze_phrases"]] == spans
        assert {name: row[name] for name in values} == values


def test_arrays_of_a_dataset_are_images(cluster, lab_folder, caption_filter, samples):
    """As ``ray.data.read_images`` gives them; captions that are missing are written."""
    items = [{"image": np.asarray(s.image), "prompt": s.prompt} for s in samples[:2]]
    rows = ray_filter(cluster.data.from_items(items), lab_folder, batch_size=2, write_captions=True).take_all()
    writing = CaptionFilter(caption_filter.guard, batch_size=2, write_captions=True)
    expected = writing({"image": [s.image for s in samples[:2]], "prompt": [s.prompt for s in samples[:2]]})
    assert sorted(row["caption"] for row in rows) == sorted(expected["caption"])
    assert sorted(row["gaze_verdict"] for row in rows) == sorted(expected["gaze_verdict"])


def test_the_command_with_ray_gives_the_same_files(cluster, lab_folder, rows, alone, tmp_path):
    """And goes on with what a run without Ray began."""
    arguments = ["filter", str(rows), str(tmp_path / "out"), "--chunk", str(CHUNK), "--batch-size", "2", "--ray"]
    result = CliRunner().invoke(app, [*arguments, "--actors", "1", "--model", str(lab_folder)])
    assert result.exit_code == 0, result.output
    assert f"{ROWS} rows: " in result.stdout
    assert files(tmp_path / "out") == alone


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install '.\[ray\]'"):
        RayActorPool(lab.checkpoint_path())
