"""Time and peak memory of a run, and time ratios of interleaved runs."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from evals.common import Figure, median


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of a run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_ratio(plain: Callable[[], object], other: Callable[[], object], pairs: int) -> Figure:
    """Median of the time ratio other/plain over interleaved pairs, which begin with either in turn."""
    ratios = []
    for i in track(range(pairs), "timing", console=Console(stderr=True), transient=True):
        if i % 2:
            first, second = seconds(other), seconds(plain)
            ratios.append(first / second)
        else:
            first, second = seconds(plain), seconds(other)
            ratios.append(second / first)
    return median(ratios)


class Turns(NamedTuple):
    """Seconds of interleaved runs, by name, one number per turn: by the clock, and of the process's own CPU time.

    On a machine that others use the clock counts their work, too; CPU time does not, and is what a free core would take.
    """

    clock: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def ratio(self, run: str, plain: str) -> Figure:
        """Median over the turns of the ratio of a run's seconds to those of another."""
        return median([a / b for a, b in zip(self.clock[run], self.clock[plain], strict=True)])

    def cpu_ratio(self, run: str, plain: str) -> Figure:
        """`ratio` of CPU time."""
        return median([a / b for a, b in zip(self.cpu[run], self.cpu[plain], strict=True)])


def interleaved(runs: Mapping[str, Callable[[], object]], turns: int, limit: float = math.inf, least: int = 2) -> Turns:
    """Every run once in each turn, in an order that rotates from turn to turn.

    Args:
        runs: What is run, by name.
        turns: How often at most.
        limit: Seconds that the turns may take, of which there are at least ``least``.
        least: Of turns.
    """
    names, taken = list(runs), Turns({name: [] for name in runs}, {name: [] for name in runs})
    begun, console = time.perf_counter(), Console(stderr=True)
    for turn in range(turns):
        if turn >= least and (time.perf_counter() - begun) * (turn + 1) / turn > limit:
            break
        for name in (names[(i + turn) % len(names)] for i in range(len(names))):
            start = time.process_time()
            taken.clock[name].append(seconds(runs[name]))
            taken.cpu[name].append(time.process_time() - start)
        console.print(f"  turn {turn + 1}: " + ", ".join(f"{name} {each[-1]:.2f} s" for name, each in taken.clock.items()))
    return taken


def time_and_memory(run: Callable[[], object], device: str) -> tuple[float, int]:
    """Seconds of a run, and the peak bytes of the process (or of the GPU's allocator) meanwhile, model included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated()
    taken = time.perf_counter() - start
    return taken, int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
