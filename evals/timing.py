"""Time and peak memory of a run, and time ratios of interleaved runs."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

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
