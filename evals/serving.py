"""Load test of ``gazeguard serve`` on this machine's loopback: throughput, latency, and answers under overload.

The captions are those of the lab's world, true and false, about drawings of the test split. The server is the command, in a
process of its own; the load comes from a bounded number of callers, each with a bounded number of requests.

* ``serving_seconds_to_first_answer``: from the command to its first answer, with nothing loaded before
* ``serving_throughput_ratio``: captions per second over those of `check_all` at the same batch size, in this process, in turns;
  every caller sends twelve requests, so that the first batches and the last, which are not full, count little
* ``serving_throughput_ratio_batched``: the same for requests of a batch of conversations each
* ``serving_p50_seconds``, ``serving_p99_seconds``: of requests of one caption, two batches of callers at a time
* ``serving_overload_*``: four times as many callers as the queue and the model hold, who do not wait: answers that are lost
  (neither given nor refused with 429) or mixed (not those of `check_all`), the share that is refused, and the 99th percentile
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from evals.common import Figure, Out, Quick, figure, median, write
from evals.timing import seconds
from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.lab.world import describe

SEED = 1700
BATCH, QUEUE, OVERLOAD = 8, 64, 4
PROMPT = "Describe the picture."
PATIENCE = 300  # seconds


@dataclass(frozen=True)
class Row:
    """A caption, its image, the request that asks about them, and the verdict and risks of `check_all`."""

    image: Image.Image
    caption: str
    body: bytes
    expected: Any = None


class Answer(NamedTuple):
    """What came back for a row: the status, the report, and the seconds that it took; status 0 for nothing."""

    row: int
    status: int
    report: Any
    seconds: float


def rows(count: int) -> list[Row]:
    """Captions that differ from one another in their images, every second one of another image than its own."""
    samples = lab.samples("test", count, SEED)
    drawn = []
    for i, sample in enumerate(samples):
        buffer = io.BytesIO()
        sample.image.save(buffer, "PNG")
        caption = describe(samples[i - i % 2].drawing, random.Random(f"{SEED} {i}"))
        drawn.append(Row(sample.image, caption, json.dumps(_conversation(buffer.getvalue(), caption)).encode()))
    return drawn


def _conversation(image: bytes, caption: str) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]}


@contextmanager
def serving() -> Iterator[tuple[int, float]]:
    """The port of a server in a process of its own, and the seconds until it was ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--batch-size", str(BATCH), "--queue", str(QUEUE), "--timeout", str(PATIENCE)]
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "gazeguard", "serve", "--quiet", *options], env=os.environ) as process:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)):
                    break
            except ConnectionRefusedError:
                if process.poll() is not None:
                    raise SystemExit("gazeguard serve ended before it was ready.") from None
                time.sleep(0.02)
        yield port, time.perf_counter() - start
        process.send_signal(signal.SIGTERM)


def ask(port: int, drawn: Sequence[Row], numbers: Sequence[int]) -> list[Answer]:
    """One caller: a request after the other on one connection, anew where it was closed."""
    answers, wire = [], http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    for number in numbers:
        start = time.perf_counter()
        try:
            wire.request("POST", "/v1/check", drawn[number].body, {"Content-Type": "application/json"})
            response = wire.getresponse()
            status, content = response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            status, content = 0, None
            wire.close()
        answers.append(Answer(number, status, content, time.perf_counter() - start))
    wire.close()
    return answers


def load(port: int, drawn: Sequence[Row], callers: int, each: int) -> list[Answer]:
    """The answers to so many callers at once with so many requests each, whose rows are different ones."""
    begin = threading.Barrier(callers)

    def call(caller: int) -> list[Answer]:
        begin.wait()
        return ask(port, drawn, [(caller + i * callers) % len(drawn) for i in range(each)])

    with ThreadPoolExecutor(callers) as pool:
        return [answer for answers in pool.map(call, range(callers)) for answer in answers]


def same(row: Row, report: Any) -> bool:
    """Whether a report is that of `check_all`: the caption, the verdict, and the risks, which rounding may move."""
    wanted = row.expected
    if (report["caption"], report["verdict"]) != (wanted["caption"], wanted["verdict"]):
        return False
    risks = [[phrase["risk"] for phrase in each["phrases"]] for each in (report, wanted)]
    return len(risks[0]) == len(risks[1]) and bool(np.allclose(*risks, atol=1e-3))


def several(drawn: Sequence[Row]) -> list[Row]:
    """The same rows as requests of a batch each."""
    groups = [drawn[i : i + BATCH] for i in range(0, len(drawn), BATCH)]
    bodies = [b'{"conversations": [' + b", ".join(row.body for row in group) + b"]}" for group in groups]
    return [Row(group[0].image, group[0].caption, body) for group, body in zip(groups, bodies, strict=True)]


def speed_figures(port: int, guard: GazeGuard, drawn: Sequence[Row], turns: int, each: int) -> dict[str, Figure]:
    """Throughput and latency beside `check_all`, of so many requests of each caller."""
    count = 2 * BATCH * each
    batches = [drawn[i : i + BATCH] for i in range(0, len(drawn), BATCH)]
    requests, ratios, answers = several(drawn), {"": [], "_batched": []}, []

    def directly() -> None:
        for batch in islice(cycle(batches), count // BATCH):
            guard.check_all([row.image for row in batch], [row.caption for row in batch], PROMPT)

    def one_by_one() -> None:
        answers.extend(load(port, drawn, 2 * BATCH, each))

    def batched() -> None:
        answered = load(port, requests, 2, each)
        assert all(answer.status == 200 for answer in answered)

    directly(), one_by_one()  # what is compiled and allocated once
    answers.clear()
    rates = []
    for _ in track(range(turns), "timing", console=Console(stderr=True), transient=True):
        before, single, grouped, after = (seconds(run) for run in (directly, one_by_one, batched, directly))
        direct = (before + after) / 2
        ratios[""].append(direct / single)
        ratios["_batched"].append(direct / grouped)
        rates.append(count / single)
    assert all(answer.status == 200 and same(drawn[answer.row], answer.report) for answer in answers)
    latencies = [answer.seconds for answer in answers]
    figures = {f"serving_throughput_ratio{name}": median(values) for name, values in ratios.items()}
    return figures | {
        "serving_rows_per_second": median(rates),
        "serving_p50_seconds": figure(float(np.quantile(latencies, 0.5))),
        "serving_p99_seconds": figure(float(np.quantile(latencies, 0.99))),
    }


def overload_figures(port: int, drawn: Sequence[Row], each: int) -> dict[str, Figure]:
    """Answers to four times as many callers as there is room for."""
    callers = OVERLOAD * (QUEUE + BATCH)
    answers = load(port, drawn, callers, each)
    given = [answer for answer in answers if answer.status == 200]
    refused = sum(answer.status == 429 for answer in answers)
    return {
        "serving_overload_requests": figure(len(answers)),
        "serving_overload_refused_share": figure(refused / len(answers)),
        "serving_overload_lost": figure(len(answers) - len(given) - refused),
        "serving_overload_mixed": figure(sum(not same(drawn[answer.row], answer.report) for answer in given)),
        "serving_overload_p99_seconds": figure(float(np.quantile([answer.seconds for answer in given], 0.99))),
    }


def main(out: Out, quick: Quick = False) -> None:
    """Start the server, load it, overload it."""
    guard = GazeGuard.from_pretrained("lab")
    drawn = rows(48)
    with serving() as (port, ready):
        start = time.perf_counter()
        (first,) = ask(port, drawn, [0])
        assert first.status == 200
        figures = {"serving_seconds_to_first_answer": figure(ready + time.perf_counter() - start)}
        reports = guard.check_all([row.image for row in drawn], [row.caption for row in drawn], PROMPT)
        drawn = [Row(row.image, row.caption, row.body, report.to_dict()) for row, report in zip(drawn, reports, strict=True)]
        figures |= speed_figures(port, guard, drawn, 2 if quick else 12, 3 if quick else 12)
        figures |= overload_figures(port, drawn, 2 if quick else 8)
    setup = {"batch": BATCH, "queue": QUEUE, "callers": 2 * BATCH, "overload": OVERLOAD, "load_average": os.getloadavg()}
    write(out, figures, quick, seed=SEED, **setup)


if __name__ == "__main__":
    typer.run(main)
