"""Host waits: how often the host waits for the device, or moves data between the two, while something runs, and where."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from gazeguard.errors import given

# Operations of which the host needs the result; on a CPU, too, where nothing waits.
NEED_RESULT = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
# What the CUDA runtime is asked to wait by.
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
_OWN = (str(Path(torch.__file__).parent), __file__)


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for the device, or carry a tensor from one to the other.

    Attributes:
        found: Their names.
        places: File and line of the caller outside of torch, with how often it waited; counted only with ``placed``.
    """

    def __init__(self, placed: bool = False) -> None:
        super().__init__()
        self.found: list[str] = []
        self.places: Counter[str] = Counter()
        self.placed = placed

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        moved = name == "_to_copy" and (kwargs or {}).get("device") is not None
        if moved or name in NEED_RESULT:
            self.found.append(name)
            if self.placed:
                self.places[_caller()] += 1
        return function(*args, **(kwargs or {}))


def _caller() -> str:
    """Where torch was called from."""
    frame = given(given(inspect.currentframe()).f_back)
    while frame.f_code.co_filename.startswith(_OWN) and frame.f_back is not None:
        frame = frame.f_back
    return _place(frame.f_code.co_filename, frame.f_lineno)


def _place(file: str, line: int | None) -> str:
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"


def count_waits(run: Callable[[], object], device: str, placed: bool = True) -> tuple[int, Counter[str]]:
    """How often the host waits in a run, and by file and line, where.

    On a GPU the count is that of `SYNCHRONISATIONS` by torch's profiler, and the places, of a second run, are those that
    ``torch.cuda.set_sync_debug_mode`` warns of; on a CPU both are those of `Waits`.

    Args:
        run: What is run.
        device: cuda or cpu.
        placed: Whether the places are wanted.
    """
    if device == "cpu":
        with Waits(placed) as waits:
            run()
        return len(waits.found), waits.places
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    # The events as they come: torch's averages of them take minutes for a model of real size.
    count = sum(event.name() in SYNCHRONISATIONS for event in given(profiler.profiler).kineto_results.events())
    return count, _warned(run) if placed else Counter()


def _warned(run: Callable[[], object]) -> Counter[str]:
    """Where CUDA's debug mode warns of a wait."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(_place(each.filename, each.lineno) for each in caught if "synchroniz" in str(each.message))
