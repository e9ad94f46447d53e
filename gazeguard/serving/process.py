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
from typing import Any, NamedTuple

from gazeguard.errors import GazeGuardError, UnsupportedError
from gazeguard.serving.limits import LANES, RefusedError
from gazeguard.serving.tasks import Deltas, Facts, Stopped, Task, Worker

logger = logging.getLogger(__name__)
CONTEXT = multiprocessing.get_context("spawn")  # a fork would share threads, and a GPU that this process has touched
TICK = 0.05  # seconds between two questions whether anybody still waits
PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds before the model is loaded again after that has failed: at first, doubled up to the most
GRACE = 10.0  # seconds that the process has to end
PATIENCE = 60.0  # seconds that a task may go on when nobody waits for it any more
DIED = "The process of the model died over this request, and is started again. Try again later."


class _Lane(NamedTuple):
    """One end of a connection that has one task at a time, and for each row of that whether nobody waits for it any more."""

    wire: Connection
    stops: Any  # an array that both processes share


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
        self._make, self._rows = make, rows
        self._changed = threading.Condition()
        self._lanes: list[_Lane] = []  # to the process, once its model is loaded
        self._busy: list[_Lane] = []
        self._closed, self._seconds, self._waited_for = False, 0.0, 0.0
        atexit.register(self.close)  # else multiprocessing would wait for its end
        self._start()
        threading.Thread(target=self._supervise, name="gazeguard-supervisor", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return bool(self._lanes)

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
        lane = self._take_lane(lambda: all(map(stopped, rows)))
        try:
            answer = self._answer(lane, task, stopped, deltas)
        except (EOFError, OSError) as error:
            self._forget(lane)
            raise RefusedError(503, DIED, math.ceil(self._seconds)) from error
        finally:
            self._busy.remove(lane)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _answer(self, lane: _Lane, task: Task, stopped: Stopped, deltas: Deltas | None) -> Any:
        """What the process answers to a task."""
        wire, stops = lane
        stops[:] = [False] * len(stops)
        wire.send(task)
        self._waited_for = time.monotonic()
        while True:
            while not wire.poll(TICK):
                for row in range(len(task.rows)):
                    stops[row] = stopped(row)
                if not all(stops[: len(task.rows)]):
                    self._waited_for = time.monotonic()
                elif time.monotonic() - self._waited_for > self.patience:  # nor for the task in another lane
                    self._process.kill()
            answer = wire.recv()
            if not isinstance(answer, str):
                return answer
            if deltas is not None:
                deltas(answer)

    def close(self) -> None:
        """End the process, once no task is under way; it is not started again."""
        with self._changed:
            self._closed, lanes, self._lanes = True, self._lanes, []
            self._changed.notify_all()
        for lane in lanes:
            lane.wire.close()
        if lanes:
            self._process.join(GRACE)
        self._process.kill()
        self._process.join()

    # --------------------------------------------------------------------------------------------------- supervision

    def _start(self) -> None:
        """Start the process, and wait until its model is loaded; raises what kept it from that."""
        start = time.monotonic()
        pipes = [CONTEXT.Pipe() for _ in range(LANES)]
        arrays = [CONTEXT.RawArray("b", self._rows) for _ in range(LANES)]
        ours, theirs = (list(map(_Lane, ends, arrays)) for ends in zip(*pipes, strict=True))
        with self._changed:
            if self._closed:
                raise RefusedError(503, "The server is stopping.")
            self._process = CONTEXT.Process(target=_serve, args=(theirs, self._make), name="gazeguard-model", daemon=True)
            self._process.start()
        for lane in theirs:
            lane.wire.close()
        try:
            answer = ours[0].wire.recv()
        except EOFError:
            self._process.join()
            raise UnsupportedError(f"The process of the model died while it was loaded ({self._ending()}).") from None
        if isinstance(answer, Exception):
            raise answer
        self.facts, self._seconds = answer, time.monotonic() - start
        with self._changed:
            self._lanes = ours
            self._changed.notify_all()

    def _supervise(self) -> None:
        """Start the process again whenever it has ended, until the worker is closed."""
        pause = PAUSE
        while True:
            self._process.join()
            self._lanes = []
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

    def _take_lane(self, given_up: Callable[[], bool]) -> _Lane:
        """A lane without a task, once the model is loaded."""
        with self._changed:
            while not (free := [lane for lane in self._lanes if lane not in self._busy]):
                if self._closed or given_up():
                    raise RefusedError(503, "The model is being loaded. Try again later.", math.ceil(self._seconds))
                self._changed.wait(TICK)
            self._busy.append(free[0])
            return free[0]

    def _forget(self, lane: _Lane) -> None:
        """Use the lanes of a process no more, which is gone."""
        with self._changed:
            if lane in self._lanes:
                self._lanes = []

    def _ending(self) -> str:
        """How the process ended, in words."""
        code = self._process.exitcode or 0
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _serve(lanes: Sequence[_Lane], make: Callable[[], Worker]) -> None:
    """The life of the process: it loads the model, and works tasks off until the server is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a service; this one ends with the server
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError):
        try:
            worker = make()
        except Exception as error:
            lanes[0].wire.send(_portable(error))
            return
        lanes[0].wire.send(worker.facts)
        for lane in lanes[1:]:
            threading.Thread(target=_work, args=(lane, worker)).start()
        _work(lanes[0], worker)


def _work(lane: _Lane, worker: Worker) -> None:
    """Work off the tasks of a lane, until the server is gone."""
    wire, stops = lane
    with suppress(EOFError, BrokenPipeError):
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
