"""State of a training run: checkpoints that are written at once and resumed from, and a feed of prepared batches."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def save(folder: Path, name: str, step: int, parts: dict[str, dict[str, Any]]) -> None:
    """Write ``name.pt`` in one move: a reader finds the earlier or the new state, never half of one."""
    temporary = folder / f"{name}.pt.part"
    torch.save({"step": step, **parts}, temporary)
    os.replace(temporary, folder / f"{name}.pt")


def load(folder: Path, name: str) -> dict[str, Any] | None:
    """The saved state, or None where there is none yet."""
    path = folder / f"{name}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module that training changes."""
    learnt = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    buffers = {name for name, _ in module.named_buffers()}
    return {name: value for name, value in module.state_dict().items() if name in learnt or name in buffers}


class _Steps(Dataset):
    """The batch of every step, as a function of the step's number alone."""

    def __init__(self, build: Callable[[int], Any], first: int, last: int) -> None:
        self.build, self.first, self.last = build, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Any:
        return self.build(self.first + index)


def feed(build: Callable[[int], Any], first: int, last: int, workers: int = 1) -> Iterator[Any]:
    """The batches of steps ``first`` to ``last`` (exclusive), drawn ahead of time by background processes."""
    ahead: dict[str, Any] = {"num_workers": 0}
    if workers:
        ahead = {"num_workers": workers, "prefetch_factor": 4, "multiprocessing_context": "fork"}
    return iter(DataLoader(_Steps(build, first, last), batch_size=None, shuffle=False, **ahead))


class Threads:
    """As many threads as the machine has idle cores, decided anew now and then.

    Two threads that wait for each other on a busy machine are several times slower than one. Without ``/proc/stat`` (not
    Linux) the number stays as it is.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most or os.cpu_count() or 1
        self.before = self._times()

    @staticmethod
    def _times() -> tuple[float, float, float] | None:
        """Seconds: the clock, all processes' computing, this process's computing."""
        try:
            fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        except (OSError, ValueError):
            return None
        idle = fields[3] + fields[4]
        busy = (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, time.process_time()

    def adapt(self) -> int:
        """Set the number of threads by what other processes used since the last call; returns it."""
        now = self._times()
        if now and self.before and now[0] - self.before[0] > 1:
            others = (now[1] - self.before[1] - (now[2] - self.before[2])) / (now[0] - self.before[0])
            torch.set_num_threads(max(1, round(self.most - others)))
            self.before = now
        return torch.get_num_threads()


class Log:
    """Progress on standard output and in ``log.jsonl``: figures of a step and an estimate of the time that remains."""

    def __init__(self, folder: Path, stage: str, first: int, last: int) -> None:
        self.path, self.stage, self.first, self.last, self.start = folder / "log.jsonl", stage, first, last, time.monotonic()

    def __call__(self, step: int, **figures: float) -> None:
        """Log the figures of a step, with the elapsed and the remaining time."""
        elapsed = time.monotonic() - self.start
        remaining = elapsed / max(1, step - self.first) * (self.last - step)
        figures = {key: round(value, 4) for key, value in figures.items()}
        entry = {"time": time.strftime("%H:%M:%S"), "stage": self.stage, "step": step, "seconds": round(elapsed), **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        written = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"{entry['time']} {self.stage} {step}/{self.last}: {written}; {remaining / 60:.0f} min left", flush=True)
