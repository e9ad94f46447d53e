"""Process of the model: started by the server, and started again when it dies, while the server goes on answering."""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from gazeguard.errors import GazeGuardError, UnsupportedError
from gazeguard.serving.limits import RefusedError
from gazeguard.serving.tasks import Deltas, Facts, Stopped, Task, Worker

logger = logging.getLogger(__name__)
CONTEXT = multiprocessing.get_context("spawn")  # a fork would share threads, and a GPU that this process has touched
TICK = 0.05  # seconds between two questions whether anybody still waits
PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds before the model is loaded again after that has failed: at first, doubled up to the most
GRACE = 10.0  # seconds that the process has to end
PATIENCE = 60.0  # seconds that a task may go on when nobody waits for it any more
DIED = "The process of the model died over this request, and is started again. Try again later."


class ModelProcess:
    """A `Worker` in a process of its own.

    When it dies (killed for its memory, crashed on the GPU), the rows under way are refused with 503, and it is started again;
    rows that wait are answered when the model is loaded. One that hangs is killed.

    Attributes:
        facts: What is known of the model.
        restarts: How often the process has died and been started again.
    """

    facts: Facts

    def __init__(self, make: Callable[[], Worker], rows: int, patience: float = PATIENCE) -> None:
        """Start the process, and wait until its model is loaded.

        Args:
            make: Loads the model, in the new process, to which it is sent.
            rows: Most rows of a task.
            patience: Seconds that a task may go on when nobody waits for it any more, before it counts as hanging.

        Raises:
            GazeGuardError: The model cannot be loaded.
        """
        self.restarts, self.patience = 0, patience
        self._make, self._stops = make, CONTEXT.RawArray("b", rows)
        self._changed = threading.Condition()
        self._wire: Connection | None = None
        self._closed, self._seconds = False, 0.0
        atexit.register(self.close)  # else multiprocessing would wait for its end
        self._start()
        threading.Thread(target=self._supervise, name="gazeguard-supervisor", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self._wire is not None

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

    def run(self, task: Task, stopped: Stopped, deltas: Deltas | None = None) -> Sequence[Any]:
        """Have a batch worked off: see `Worker`.

        Raises:
            RefusedError: The process died over it, or has not come back while somebody waited (503).
        """
        rows = range(len(task.rows))
        wire = self._await_model(lambda: all(map(stopped, rows)))
        try:
            self._stops[:] = [False] * len(self._stops)
            wire.send(task)
            waited_for = time.monotonic()
            while True:
                while not wire.poll(TICK):
                    for row in rows:
                        self._stops[row] = stopped(row)
                    if not all(self._stops[: len(rows)]):
                        waited_for = time.monotonic()
                    elif time.monotonic() - waited_for > self.patience:
                        self._process.kill()
                answer = wire.recv()
                if not isinstance(answer, str):
                    break
                if deltas is not None:
                    deltas(answer)
        except (EOFError, OSError) as error:
            self._forget(wire)
            raise RefusedError(503, DIED, math.ceil(self._seconds)) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, once no task is under way; it is not started again."""
        with self._changed:
            self._closed, wire, self._wire = True, self._wire, None
            self._changed.notify_all()
        if wire is not None:
            wire.close()
            self._process.join(GRACE)
        self._process.kill()
        self._process.join()

    # --------------------------------------------------------------------------------------------------- supervision

    def _start(self) -> None:
        """Start the process, and wait until its model is loaded; raises what kept it from that."""
        start = time.monotonic()
        ours, theirs = CONTEXT.Pipe()
        arguments = (theirs, self._make, self._stops)
        with self._changed:
            if self._closed:
                raise RefusedError(503, "The server is stopping.")
            self._process = CONTEXT.Process(target=_serve, args=arguments, name="gazeguard-model", daemon=True)
            self._process.start()
        theirs.close()
        try:
            answer = ours.recv()
        except EOFError:
            self._process.join()
            raise UnsupportedError(f"The process of the model died while it was loaded ({self._ending()}).") from None
        if isinstance(answer, Exception):
            raise answer
        self.facts, self._seconds = answer, time.monotonic() - start
        with self._changed:
            self._wire = ours
            self._changed.notify_all()

    def _supervise(self) -> None:
        """Start the process again whenever it has ended, until the worker is closed."""
        pause = PAUSE
        while True:
            self._process.join()
            self._forget(self._wire)
            if self._closed:
                return
            logger.error("the process of the model died (%s) and is started again", self._ending())
            self.restarts += 1
            try:
                self._start()
                pause = PAUSE
            except Exception as error:
                if not self._closed:
                    logger.error("the model cannot be loaded: %s; the next attempt is in %.0f seconds", error, pause)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause)
                pause = min(2 * pause, MAX_PAUSE)

    def _await_model(self, given_up: Callable[[], bool]) -> Connection:
        """The connection to the process, once its model is loaded."""
        with self._changed:
            while self._wire is None:
                if self._closed or given_up():
                    raise RefusedError(503, "The model is being loaded. Try again later.", math.ceil(self._seconds))
                self._changed.wait(TICK)
            return self._wire

    def _forget(self, wire: Connection | None) -> None:
        """Use a connection no more, whose other end is gone."""
        with self._changed:
            if self._wire is wire:
                self._wire = None

    def _ending(self) -> str:
        """How the process ended, in words."""
        code = self._process.exitcode or 0
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _serve(wire: Connection, make: Callable[[], Worker], stops: Sequence[int]) -> None:
    """The life of the process: it loads the model, and works tasks off until the server is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a service; this one ends with the server
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError):
        try:
            worker = make()
        except Exception as error:
            wire.send(_portable(error))
            return
        wire.send(worker.facts)
        while True:
            task = wire.recv()
            try:
                answer: Any = worker.run(task, lambda row: bool(stops[row]), wire.send if task.streamed else None)
            except BaseException as error:  # the process must not end with it
                answer = _portable(error)
            wire.send(answer)


def _portable(error: BaseException) -> Exception:
    """An error as the server can raise it: what is refused on purpose by its message, whatever else with its traceback."""
    if isinstance(error, GazeGuardError):
        return GazeGuardError(str(error))
    unexpected = RuntimeError(f"{type(error).__name__}: {error}")
    unexpected.add_note("".join(traceback.format_exception(error)))
    return unexpected
