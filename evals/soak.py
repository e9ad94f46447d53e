"""Soak: the filter for hours, over mutated rows, while runs beside it are killed and find the disk full.

* ``memory_growth``: resident memory at the end over that at half time, medians of a tenth of the rounds each; one process that
  filters data sets of all kinds (`evals.mutations`), each into a new folder
* ``rows_lost``, ``crashes``, ``silent_passes``, ``neighbours_changed``: of that process, as in `evals.torture`
* ``interrupted_equal``: whether every run of the command that SIGKILL ended (``kills``), or that could write no more
  (``full_disks``: a small tmpfs where this process may mount one, else a limit on the size of files; the file says which), has
  the bytes of an unbroken one once it was given again
* ``full_disks_named``: whether each of the latter ended with one line that says so

``--minutes 120`` is what a release should stand; the file says how long it was.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from evals.common import Figure, Out, Quick, figure, write
from evals.filtering import bytes_of, draw
from evals.mutations import WRITERS
from evals.torture import RowTorture

SEED = 2201
ROWS_OF_A_ROUND = 24
ROWS_OF_A_COMMAND, CHUNK = 120, 8
EVERY = 2  # rounds between two interruptions
FILE_LIMIT = 6000  # bytes: less than a chunk's results
DISK = "16k"  # less than the results


def resident_mib() -> float:
    """The resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("This system does not say how much memory a process has: /proc/self/status")


class Interruptions:
    """Runs of the command that are killed, or may write no large file, and are then given again."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.rng = work, random.Random(seed)
        self.rows = draw(work / "rows", ROWS_OF_A_COMMAND)
        self._finish(work / "unbroken")
        self.expected = bytes_of(work / "unbroken")
        self.kills = self.full_disks = self.named = self.number = 0
        self.unequal: list[str] = []
        self.mounts = _mount(work / "probe", DISK)
        if self.mounts:
            _call("umount", str(work / "probe"))

    def interrupt(self) -> None:
        """One run, killed or without room, and what comes of it."""
        out = self.work / "interrupted"
        if self.number % 2 == 0:
            self._fill(out)
        else:
            self._kill(out)
        self.number += 1
        self._finish(out)
        if bytes_of(out) != self.expected:
            self.unequal.append(f"interruption {self.number}")
        if out.is_mount():
            _call("umount", str(out))
        shutil.rmtree(out)

    def _command(self, out: Path) -> list[str]:
        return [sys.executable, "-m", "gazeguard", "filter", str(self.rows), str(out), "--chunk", str(CHUNK)]

    def _finish(self, out: Path) -> None:
        subprocess.run(self._command(out), check=True, capture_output=True)

    def _kill(self, out: Path) -> None:
        """A run that is killed when some of its chunks are finished."""
        chunks = self.rng.randrange(1, ROWS_OF_A_COMMAND // CHUNK)
        with subprocess.Popen(self._command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(out.glob("parts/*.jsonl"))) < chunks:
                time.sleep(0.01)
            process.kill()
        self.kills += process.returncode == -signal.SIGKILL

    def _fill(self, out: Path) -> None:
        """A run that the system refuses a write; there is room afterwards."""
        command = self._command(out)
        if self.mounts:
            _mount(out, DISK)
        else:
            command[1:1] = ["-c", _LIMITED, str(FILE_LIMIT)]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        if self.mounts:
            _call("mount", "-o", "remount,size=16m", str(out))
        self.full_disks += 1
        self.named += made.returncode == 2 and "cannot be written" in made.stderr


def _call(*command: str) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _mount(folder: Path, size: str) -> bool:
    """Whether there is now a file system of this size at ``folder``: only the superuser of a machine of one's own may."""
    folder.mkdir()
    return shutil.which("mount") is not None and _call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))


# Sets the limit, and becomes the command.
_LIMITED = (
    "import os, resource, sys; limit = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


def memory_growth(samples: list[float]) -> float:
    """The median of the last tenth over that of the first tenth of the second half."""
    second = samples[len(samples) // 2 :]
    tenth = max(1, len(samples) // 10)
    return statistics.median(second[-tenth:]) / statistics.median(second[:tenth])


def soak(work: Path, seconds: float, seed: int) -> tuple[dict[str, Figure], list[str], str]:
    """The figures of so many seconds, what went wrong, and how the disk was full."""
    torture, beside = RowTorture(seed, 24), Interruptions(work, seed)
    samples: list[float] = []
    kinds = list(WRITERS)
    start = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("soaking", total=seconds)
        while (elapsed := time.monotonic() - start) < seconds:
            progress.update(task, completed=elapsed)
            for kind in kinds:
                torture.run(kind, torture.tally.rows, ROWS_OF_A_ROUND)
            if len(samples) % EVERY == 0:
                beside.interrupt()
            samples.append(resident_mib())
    tally = torture.tally
    figures = {
        "memory_growth": figure(memory_growth(samples)),
        "resident_mib": figure(samples[-1]),
        "peak_mib": figure(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "minutes": figure((time.monotonic() - start) / 60),
        "rounds": figure(len(samples)),
        "rows": figure(tally.rows),
        "rows_lost": figure(len(tally.lost)),
        "crashes": figure(len(tally.crashes)),
        "silent_passes": figure(len(tally.passes)),
        "neighbours_changed": figure(len(tally.neighbours)),
        "kills": figure(beside.kills),
        "full_disks": figure(beside.full_disks),
        "full_disks_named": figure(beside.named == beside.full_disks),
        "interrupted_equal": figure(not beside.unequal),
    }
    trouble = tally.lost + tally.crashes + tally.passes + tally.neighbours + beside.unequal
    return figures, trouble, "tmpfs" if beside.mounts else "limit on the size of files"


Minutes = Annotated[float | None, typer.Option("--minutes", help="How long.", show_default="120, or 0.4 with --quick")]


def main(out: Out, quick: Quick = False, minutes: Minutes = None) -> None:
    """Filter, kill, fill the disk, and watch the memory."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    length = minutes if minutes is not None else 0.4 if quick else 120
    with tempfile.TemporaryDirectory() as folder:
        figures, trouble, disk = soak(Path(folder), length * 60, SEED)
    write(out, figures, quick, seed=SEED, trouble=trouble, full_disk=disk)


if __name__ == "__main__":
    typer.run(main)
