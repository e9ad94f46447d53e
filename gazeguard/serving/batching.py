"""Batching queue: jobs that wait, and the threads that hand them to the model. Jobs that may share a batch do.

There is no time to wait for company: an idle worker takes what is there, and what arrives meanwhile is the next batch. Once
that is full it is handed over, so that the worker prepares it beside the batch it works on, and goes on with it at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from gazeguard.serving.limits import LANES, RefusedError

SMOOTHING = 0.2  # weight of the newest batch in the seconds per job
MAX_RETRY_AFTER = 60  # seconds


@dataclass(eq=False)
class Job:
    """Work for the model.

    Attributes:
        run: Gets a batch of jobs and returns a result for each. Jobs with equal ``run`` share batches.
        payload: What it works on.
        future: Its result.
        stopped: Set when nobody waits for the result any more; ``run`` should then come to an end.
    """

    run: Callable[[Sequence[Job]], Sequence[Any]]
    payload: Any
    future: Future[Any] = field(default_factory=Future)
    stopped: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for the result any more."""
        self.stopped.set()
        self.future.cancel()


class BatchQueue:
    """Jobs in the order of their arrival, and the threads that have them worked off, in batches of one kind.

    An error of a batch of several is no error of each: they are tried again one by one, so that one row that the model refuses
    costs no other its answer; but a `RefusedError` is for all of them. The threads outlive whatever a job raises.
    """

    def __init__(self, batch: int, room: int, observe: Callable[[int, float], None] = lambda rows, seconds: None) -> None:
        """Start the threads.

        Args:
            batch: Jobs in a batch at most.
            room: Jobs that may wait.
            observe: Told the number of jobs of every batch, and the seconds since it began or the one before it ended.
        """
        self.batch, self.room, self.observe = batch, room, observe
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._running = 0  # batches
        self._ended = self._seconds_per_job = 0.0
        self._threads = [threading.Thread(target=self._work, name="gazeguard-worker", daemon=True) for _ in range(LANES)]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """The number of jobs that wait."""
        return len(self._waiting)

    @property
    def closed(self) -> bool:
        """Whether it takes no more jobs."""
        return self._closed

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs in the queue, all or none.

        Raises:
            RefusedError: The queue is full (429, with the seconds until there should be room again) or closed (503).
        """
        with self._changed:
            if self._closed:
                raise RefusedError(503, "The server is stopping. Try again later.", 1)
            if len(self._waiting) + len(jobs) > self.room:
                after = min(MAX_RETRY_AFTER, max(1, math.ceil(len(self._waiting) * self._seconds_per_job)))
                what = f"{len(self._waiting)} captions are waiting, and only {self.room} may. Try again later."
                raise RefusedError(429, what, after)
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more jobs, finish those that wait, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            start = time.perf_counter()
            _answer(jobs)
            with self._changed:
                end = time.perf_counter()
                seconds = end - max(start, self._ended)
                self._ended, self._running = end, self._running - 1
                pace = seconds / len(jobs)
                self._seconds_per_job += (pace - self._seconds_per_job) * (SMOOTHING if self._seconds_per_job else 1)
                self._changed.notify_all()
            self.observe(len(jobs), seconds)

    def _next(self) -> list[Job]:
        """The next batch; empty once the queue is closed and no job waits."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._due())
                if not (jobs := self._due()):
                    return []
                taken = set(map(id, jobs))
                self._waiting = deque(job for job in self._waiting if id(job) not in taken)
                if live := [job for job in jobs if job.future.set_running_or_notify_cancel()]:
                    self._running += 1
                    return live

    def _due(self) -> list[Job]:
        """The first job and the first of those that may share its batch; none while the worker is busy and that is not full."""
        if not self._waiting:
            return []
        jobs = [job for job in self._waiting if job.run == self._waiting[0].run][: self.batch]
        return jobs if not self._running or self._closed or len(jobs) == self.batch else []


def _answer(jobs: Sequence[Job]) -> None:
    """Run a batch and hand out its results or its error."""
    try:
        for job, result in zip(jobs, jobs[0].run(jobs), strict=True):
            job.future.set_result(result)
    except BaseException as error:  # the thread must not end with it
        if len(jobs) == 1 or isinstance(error, RefusedError):
            for job in jobs:
                job.future.set_exception(error)
        else:
            for job in jobs:
                if not job.future.done():
                    _answer([job])
