"""Service behind the routes: requests become jobs of the queue, and their results reports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from PIL import Image

from gazeguard.errors import InputError
from gazeguard.report import Report
from gazeguard.serving.batching import BatchQueue, Job
from gazeguard.serving.contracts import ChatRequest
from gazeguard.serving.conversation import Exchange, read_question
from gazeguard.serving.limits import DEFAULT_NEW_TOKENS, Limits, RefusedError
from gazeguard.serving.metrics import Metrics
from gazeguard.serving.tasks import Options, Row, Work, Worker, Written
from gazeguard.vision.images import load_image


class Service:
    """One model, its queue and its metrics.

    Attributes:
        worker: Has the model; only the queue's thread gives it tasks.
        name: What the model is called in answers.
        limits: What is taken on.
        metrics: What has been done.
        queue: What waits for the model.
    """

    def __init__(self, worker: Worker, name: str, limits: Limits) -> None:
        self.worker, self.name, self.limits = worker, name, limits
        self.metrics = Metrics()
        self.queue = BatchQueue(limits.batch, limits.queue, self.metrics.observe_batch)
        self.metrics.watch(self.queue, worker)

    @property
    def status(self) -> str:
        """Whether it takes requests and answers them: "ok", "loading" while the model is lost, "stopping" at the end."""
        return "stopping" if self.queue.closed else "ok" if self.worker.ready else "loading"

    def unchecked(self, caption: str, reason: str) -> Report:
        """The report on a caption that cannot be checked."""
        return self.worker.facts.judge.unchecked(caption, reason)

    def close(self) -> None:
        """Finish what waits, and end the worker."""
        self.queue.close()
        self.worker.close()

    # ------------------------------------------------------------------------------------------------------- check

    async def check(self, exchanges: Sequence[Exchange]) -> list[Report]:
        """The reports on answers; an image that cannot be read makes its answer *unchecked*.

        Raises:
            RefusedError: The queue is full or closed, or there is no answer in time.
        """
        deadline = time.monotonic() + self.limits.seconds
        images = await asyncio.gather(*(asyncio.to_thread(self._open, each.question.image) for each in exchanges))
        reports: dict[int, Report] = {}
        jobs: dict[int, Job] = {}
        for i, (exchange, image) in enumerate(zip(exchanges, images, strict=True)):
            if isinstance(image, InputError):
                reports[i] = self.unchecked(exchange.answer, str(image))
            else:
                jobs[i] = Job(Work(self.worker), Row(image, exchange.question.prompt, exchange.answer))
        if jobs:
            self.queue.submit(list(jobs.values()))
            reports |= zip(jobs, await self.results(list(jobs.values()), deadline), strict=True)
        for report in reports.values():
            self.metrics.count(report)
        return [reports[i] for i in range(len(exchanges))]

    def _open(self, data: bytes) -> Image.Image | InputError:
        try:
            return load_image(data, self.worker.facts.background, self.limits.pixels)
        except InputError as error:
            return error

    async def results(self, jobs: Sequence[Job], deadline: float) -> list[Any]:
        """What jobs come to; they are cancelled when they do not by the deadline (`time.monotonic`), or the caller is gone."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        except TimeoutError as error:
            raise self.too_late() from error
        finally:
            for job in jobs:
                job.cancel()

    def too_late(self) -> RefusedError:
        """The error of a request that is not answered in time."""
        return RefusedError(503, f"There was no answer within {self.limits.seconds:g} seconds. Try again later.", 1)

    # ----------------------------------------------------------------------------------------------------- caption

    async def caption(self, request: ChatRequest) -> Written:
        """A guarded caption; requests with the same options share batches."""
        deadline = time.monotonic() + self.limits.seconds
        job = Job(Work(self.worker, self._options(request)), await self._row(request))
        self.queue.submit([job])
        (written,) = await self.results([job], deadline)
        self.metrics.count(written.report)
        return written

    async def stream(self, request: ChatRequest) -> AsyncIterator[str | Written]:
        """A guarded caption piece by piece, and at the end as a whole; whatever refuses it is raised here, not on the way.

        Every piece stands. Where the policy may withhold what it flags, the only piece is what it lets through.
        """
        if self.worker.facts.policy.on_flag != "keep":
            written = await self.caption(request)
            return _at_once(written)
        deadline = time.monotonic() + self.limits.seconds
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def put(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = Job(Work(self.worker, self._options(request), put), await self._row(request))
        job.future.add_done_callback(lambda _: put(None))
        self.queue.submit([job])
        return self._pieces(job, pieces, deadline)

    async def _pieces(self, job: Job, pieces: asyncio.Queue[str | None], deadline: float) -> AsyncIterator[str | Written]:
        try:
            while (piece := await asyncio.wait_for(pieces.get(), max(0, deadline - time.monotonic()))) is not None:
                yield piece
            written = job.future.result()
        except TimeoutError as error:
            raise self.too_late() from error
        finally:
            job.cancel()
        self.metrics.count(written.report)
        yield written

    async def _row(self, request: ChatRequest) -> Row:
        question = read_question(request.messages)
        image = await asyncio.to_thread(self._open, question.image)
        if isinstance(image, InputError):
            raise image
        return Row(image, question.prompt)

    def _options(self, request: ChatRequest) -> Options:
        """The options of ``generate`` for a request; raises `InputError` for too long a caption."""
        tokens = request.max_completion_tokens or request.max_tokens or min(DEFAULT_NEW_TOKENS, self.limits.new_tokens)
        if tokens > self.limits.new_tokens:
            raise InputError(f"{tokens} tokens are asked for, and the limit is {self.limits.new_tokens}. Ask for fewer.")
        options: dict[str, Any] = {"max_new_tokens": tokens}
        if request.temperature is not None:
            options |= {"do_sample": request.temperature > 0}
        if request.temperature:
            options |= {"temperature": request.temperature}
        if request.top_p is not None and request.temperature != 0:
            options |= {"do_sample": True, "top_p": request.top_p}
        return tuple(options.items())


async def _at_once(written: Written) -> AsyncIterator[str | Written]:
    if written.report.filtered_caption:
        yield written.report.filtered_caption
    yield written
