"""Batching queue: jobs that wait, and the one thread that the model belongs to. Jobs that may share a batch do.

There is no time to wait for company: a free worker takes what is there, and what arrives meanwhile is the next batch.
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

from gazeguard.serving.limits import RefusedError

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
    """Jobs in the order of their arrival, and the thread that works them off.

    An error of a batch of several is no error of each: they are tried again one by one, so that one row that the model refuses
    costs no other its answer; but a `RefusedError` is for all of them. The thread outlives whatever a job raises.
    """

    def __init__(self, batch: int, room: int, observe: Callable[[int, float], None] = lambda rows, seconds: None) -> None:
        """Start the worker.

        Args:
            batch: Jobs in a batch at most.
            room: Jobs that may wait.
            observe: Told the number of jobs and the seconds of every batch.
        """
        self.batch, self.room, self.observe = batch, room, observe
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_per_job = 0.0
        self._thread = threading.Thread(target=self._work, name="gazeguard-worker", daemon=True)
        self._thread.start()

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
                raise RefusedError(429, f"{len(self._waiting)} captions are waiting, and no more may. Try again later.", after)
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Take no more jobs, finish those that wait, and end the worker."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            start = time.perf_counter()
            _answer(jobs)
            seconds = time.perf_counter() - start
            pace = seconds / len(jobs)
            self._seconds_per_job += (pace - self._seconds_per_job) * (SMOOTHING if self._seconds_per_job else 1)
            self.observe(len(jobs), seconds)

    def _next(self) -> list[Job]:
        """The next batch: the first job, and the first of those that may share its batch; empty once the queue is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                run = self._waiting[0].run
                jobs = [job for job in self._waiting if job.run == run][: self.batch]
                taken = set(map(id, jobs))
                self._waiting = deque(job for job in self._waiting if id(job) not in taken)
                if live := [job for job in jobs if job.future.set_running_or_notify_cancel()]:
                    return live


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
