"""Filtering of captions: rows kept across kills, and throughput. Lab captions through ``gazeguard filter``.

The captions are those of the lab's world, true and false, about drawings of the test split.

* ``rows_exactly_once``, ``byte_equal``: a run that SIGKILL ends ``kills`` times at random moments, each time started again with
  the same command, beside an uninterrupted run
* ``throughput_ratio``: rows per second from the input's files to the results' files, over those of a bare loop of the model's
  forward passes over the same batches, whose inputs lie ready in memory; ``throughput_ratio_to_inputs``: over a loop that opens
  the images and calls the processor, too. Interleaved in one process; the interval is that of the median
* ``filter_kv_reuse_time_ratio``: five captions of a picture with one reading of image and prompt, over a reading each (also in
  CPU time); ``..._same_verdicts`` and ``..._risk_difference`` say how equal the two are
* ``rows_per_core_second``: rows over the CPU time of the process, one caption a picture; ``share_outside_model`` of it is not
  spent in the model's forward pass (images, tokens, logit lens, claims, detector, report)
* ``ray_equal``: two Ray actors, one of them killed, beside a run without Ray; left out where Ray is not installed
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from evals.common import Figure, Lab, Out, Quick, figure, with_issue_keys, write
from evals.subject import Chosen, Subject, subject
from evals.timing import interleaved, seconds
from gazeguard import lab as laboratory
from gazeguard.filtering.caption_filter import CaptionFilter
from gazeguard.filtering.ray import RayActorPool
from gazeguard.filtering.readers import open_source
from gazeguard.filtering.run import filter_files
from gazeguard.filtering.writer import FILE_NAMES, Results
from gazeguard.guard import GazeGuard
from gazeguard.lab.world import describe
from gazeguard.report import Report
from gazeguard.vision.encoding import encode
from gazeguard.vision.images import load_image
from gazeguard.vision.inputs import model_inputs

SEED = 900
KILLS = 5
CHUNK = 256
EACH = 5  # captions of a picture, as in COCO


def draw(folder: Path, count: int) -> Path:
    """A JSONL file of so many rows, with their images beside it; files of an earlier run are kept."""
    path = folder / "rows.jsonl"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, sample in enumerate(laboratory.samples("test", count, SEED)):
        sample.image.save(folder / f"{i}.png")
        caption = describe(sample.drawing, random.Random(f"{SEED} {i}"))
        rows.append(json.dumps({"id": i, "image": f"{i}.png", "caption": caption, "prompt": sample.prompt}) + "\n")
    path.write_text("".join(rows))
    return path


def start(rows: Path, out: Path, chunk: int) -> subprocess.Popen[bytes]:
    """The command, in a process of its own, on one thread."""
    command = [sys.executable, "-m", "gazeguard", "filter", str(rows), str(out), "--chunk", str(chunk)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def finish(rows: Path, out: Path, chunk: int) -> float:
    """Seconds until the command has come to its end."""

    def run() -> None:
        with start(rows, out, chunk) as process:
            if process.wait():
                raise RuntimeError(f"filter ended with {process.returncode}")

    return seconds(run)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_figures(work: Path, count: int, kills: int) -> dict[str, Figure]:
    """Whether a run that is killed at random moments has the same output as one that is not."""
    rows = draw(work / "rows", count)
    duration = finish(rows, work / "unbroken", CHUNK)
    moments, done = random.Random(SEED), 0
    for _ in track(range(kills), "killing", console=Console(stderr=True), transient=True):
        with start(rows, work / "killed", CHUNK) as process:
            time.sleep(moments.uniform(0, duration / (kills + 1)))
            process.send_signal(signal.SIGKILL)
        done += process.returncode == -signal.SIGKILL
    finish(rows, work / "killed", CHUNK)
    output = bytes_of(work / "killed")
    ids = [json.loads(line)["id"] for place in FILE_NAMES.values() for line in output[f"{place}.jsonl"].splitlines()]
    return {
        "rows": figure(count),
        "kills": figure(done),
        "rows_exactly_once": figure(sorted(ids) == list(range(count))),
        "byte_equal": figure(output == bytes_of(work / "unbroken")),
    }


def speed_figures(work: Path, count: int, turns: int) -> dict[str, Figure]:
    """The filter beside bare loops over the same batches, on one thread, as a pool of one process per core runs."""
    torch.set_num_threads(1)
    model, processor = laboratory.load()
    caption_filter = CaptionFilter(GazeGuard(model, processor))
    source = open_source(draw(work / "speed", count))
    rows = sorted(source.rows(), key=lambda row: len(row.caption))  # as `CaptionFilter.judge` batches them
    batches = [rows[at : at + caption_filter.batch_size] for at in range(0, count, caption_filter.batch_size)]

    def inputs() -> list[dict[str, torch.Tensor]]:
        images = [[load_image(row.image) for row in batch] for batch in batches]
        return [
            model_inputs(
                model,
                encode(model, processor, each, [row.prompt for row in batch], [row.caption for row in batch]).inputs,
            )
            for each, batch in zip(images, batches, strict=True)
        ]

    @torch.no_grad()
    def bare(inputs_of_batches: list[dict[str, torch.Tensor]]) -> None:
        for each in inputs_of_batches:
            model(**each, use_cache=False)

    def filtered() -> None:
        with tempfile.TemporaryDirectory() as out:
            run = caption_filter.run_settings(source, source.path.parent, count, False)
            filter_files(caption_filter, source, Results(Path(out) / "out", run), count)

    ready = inputs()
    runs: dict[str, Callable[[], object]] = {
        "filter": filtered,
        "bare": lambda: bare(ready),
        "to_inputs": lambda: bare(inputs()),
    }
    durations: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for turn in track(range(turns), "timing", console=Console(stderr=True), transient=True):
        for name in sorted(runs, reverse=turn % 2 == 1):
            durations[name].append(seconds(runs[name]))

    def over(other: str) -> Figure:
        found = sorted(theirs / ours for ours, theirs in zip(durations["filter"], durations[other], strict=True))
        spread = int(turns**0.5)
        edges = found[max(0, turns // 2 - spread)], found[min(turns - 1, turns // 2 + spread)]
        return figure(statistics.median(found), edges)

    return {
        "throughput_ratio": over("bare"),
        "throughput_ratio_to_inputs": over("to_inputs"),
        "rows_per_second": figure(count / statistics.median(durations["filter"])),
    }


def captions_of_pictures(measured: Subject, pictures: int) -> tuple[list[Image.Image], list[str], list[str]]:
    """Images, captions and prompts of so many pictures with `EACH` captions: a true one, and true ones of other pictures."""
    samples = list(measured.world.samples("test", pictures + EACH, SEED))
    told = [measured.world.true_caption(sample) for sample in samples]
    shown = [(sample.image, sample.prompt) for sample in samples[:pictures]]
    rows = [(shown[n][0], told[n + k], shown[n][1]) for n in range(pictures) for k in range(EACH)]
    images, captions, prompts = (list(column) for column in zip(*rows, strict=True))
    return images, captions, prompts


def reuse_figures(measured: Subject, pictures: int, turns: int) -> dict[str, Figure]:
    """Several captions of a picture with one reading of it, beside a reading each."""
    guard, rows = measured.guard(), captions_of_pictures(measured, pictures)

    def check(packed: bool) -> list[Report]:
        return guard.check_prepared(guard.tracer.prepare(*rows, packed=packed))

    pairs = list(zip(check(True), check(False), strict=True))
    risks = [(a.risk - b.risk) for one, other in pairs for a, b in zip(one.findings, other.findings, strict=True)]
    runs = {"once": lambda: check(True), "each": lambda: check(False)}
    taken = interleaved(runs, turns)
    return {
        "filter_kv_reuse_time_ratio": taken.ratio("once", "each"),
        "filter_kv_reuse_cpu_time_ratio": taken.cpu_ratio("once", "each"),
        "filter_kv_reuse_same_verdicts": figure(float(np.mean([one.verdict == other.verdict for one, other in pairs]))),
        "filter_kv_reuse_risk_difference": figure(max(map(abs, risks), default=0.0)),
    }


def model_figures(measured: Subject, count: int) -> dict[str, Figure]:
    """Rows that a core filters per second of its own time, one caption a picture, and what of that is not the model's."""
    samples = measured.world.samples("test", count, SEED)
    caption_filter = CaptionFilter(measured.guard())
    columns = {
        "image": [sample.image for sample in samples],
        "caption": [measured.world.true_caption(sample) for sample in samples],
        "prompt": [sample.prompt for sample in samples],
    }
    inside, begun = [0.0], [0.0]
    model = measured.model
    handles = [
        model.register_forward_pre_hook(lambda *_: begun.__setitem__(0, time.thread_time())),
        model.register_forward_hook(lambda *_: inside.__setitem__(0, inside[0] + time.thread_time() - begun[0])),
    ]
    start = time.process_time()
    caption_filter(columns)
    taken = time.process_time() - start
    for handle in handles:
        handle.remove()
    return {
        "rows_per_core_second": figure(count / taken),
        "share_outside_model": figure(1 - inside[0] / taken),
    }


def ray_figures(work: Path, count: int, chunk: int) -> dict[str, Figure]:
    """Two actors, the first killed when the first chunk is there, beside the command in one process."""
    if importlib.util.find_spec("ray") is None:
        return {}
    path = draw(work / "ray", count)
    source, killed = open_source(path), []
    with RayActorPool(laboratory.checkpoint_path(), 2) as pool:

        def kill_one(_: int) -> None:
            if not killed:
                killed.append(pool.process_ids()[0])
                os.kill(killed[0], signal.SIGKILL)

        run = pool.run_settings(source, path.parent, chunk, False)
        filter_files(pool, source, Results(work / "by-ray", run), chunk, kill_one)
    finish(path, work / "by-one", chunk)
    return {
        "ray_rows": figure(count),
        "ray_killed": figure(len(killed)),
        "ray_equal": figure(bytes_of(work / "by-ray") == bytes_of(work / "by-one")),
    }


Only = Annotated[
    str | None, typer.Option("--only", help="speed, reuse, kills or ray: this part anew, others as the file has them.")
]


def reuse(lab_name: str, quick: bool) -> dict[str, Figure]:
    """`reuse_figures` and `model_figures` in a lab, on one thread."""
    torch.set_num_threads(1)
    measured = subject(Chosen(lab_name))
    tiny = lab_name == "tiny"
    figures = reuse_figures(measured, 3 if tiny else 2, 2 if quick else 12 if tiny else 4)
    return figures | model_figures(measured, 32 if tiny and not quick else 8)


def main(out: Out, quick: Quick = False, only: Only = None, lab: Lab = "tiny") -> None:
    """Filter, kill, and time; in the scenes lab, whose model is large, only what the model's own time decides."""
    if lab != "tiny":
        measured = subject(Chosen(lab))
        made = reuse(lab, quick)
        keys = {f"{lab}_{key}": key for key in made}
        told = {"command": f"evals.filtering --lab {lab}", "load": [round(each, 1) for each in os.getloadavg()]}
        write(out, with_issue_keys(made, keys), quick, checkpoint=measured.folder, seed=SEED, **told)
        return
    parts: dict[str, Callable[[Path], dict[str, Figure]]] = {
        "reuse": lambda _: reuse(lab, quick),
        "speed": lambda work: speed_figures(work, 32 if quick else CHUNK, 2 if quick else 12),
        "kills": lambda work: kill_figures(work, 60 if quick else 5000, 1 if quick else KILLS),
        "ray": lambda work: ray_figures(work, 32 if quick else 128, 8 if quick else 16),
    }
    figures = json.loads(out.read_text())["figures"] if only and out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            if only in (None, name):
                figures |= part(Path(folder))
    write(out, figures, quick, seed=SEED, chunk=CHUNK)


if __name__ == "__main__":
    typer.run(main)
