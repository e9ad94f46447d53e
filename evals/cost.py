"""What does watching cost? Time of watched over plain SDPA generate on the lab's VLM, both interleaved in one process.

``null`` is plain over plain: what the noise of the machine alone looks like. Every pair writes the same tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from evals.common import Figure, Out, Quick, figure, write
from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.inputs import encode

SEED = 300


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(plain: Callable[[], object], other: Callable[[], object], pairs: int) -> Figure:
    """Median of the ratio other/plain over interleaved pairs, with the interval of the median by order statistics."""
    found = []
    for i in track(range(pairs), "timing", console=Console(stderr=True), transient=True):
        if i % 2:
            first, second = seconds(other), seconds(plain)
            found.append(first / second)
        else:
            first, second = seconds(plain), seconds(other)
            found.append(second / first)
    found.sort()
    spread = int(np.sqrt(pairs))
    return figure(statistics.median(found), (found[max(0, pairs // 2 - spread)], found[min(pairs - 1, pairs // 2 + spread)]))


def main(out: Out, quick: Quick = False) -> None:
    """Measure the price of each policy."""
    model, processor = lab.load()
    guards = {policy: GazeGuard(model, processor, policy=policy) for policy in ("mark", "rerank")}
    figures: dict[str, Figure] = {}
    for batch_size in (1, 8):
        samples = lab.samples("test", batch_size, SEED)
        batch = encode(model, processor, [s.image for s in samples], [s.prompt for s in samples])
        asked = {**batch.inputs, "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}

        def plain(asked: dict = asked) -> object:
            return model.generate(**asked)

        runs = {"null": plain} | {
            name: lambda guard=guard, asked=asked: guard.generate(**asked) for name, guard in guards.items()
        }
        for run in runs.values():
            run()
        for name, run in runs.items():
            figures[f"time_ratio_{name}_batch_{batch_size}"] = ratios(
                plain, run, (8 if quick else 60) // (1 if batch_size == 1 else 2)
            )
    write(out, figures, quick, seed=SEED, new_tokens=64)


if __name__ == "__main__":
    typer.run(main)
