"""Model behind the server: batches of captions that it checks, and of captions that it generates."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from gazeguard.guard import GazeGuard
from gazeguard.report import Report
from gazeguard.serving.tasks import Deltas, Facts, Options, Row, Stopped, Task, Written
from gazeguard.vision.encoding import encode


class Model:
    """A guard as a `Worker` in this process. Its reports come without their traces, which no answer has.

    Attributes:
        guard: The guard; from now on nothing else may use its model.
        facts: What is known of it.
        ready: True: the guard has its model.
        restarts: 0: it lives and dies with this process.
    """

    ready, restarts = True, 0

    def __init__(self, guard: GazeGuard) -> None:
        self.guard = guard
        self._lock = threading.Lock()  # a guard serves one thread at a time
        self.facts = Facts(replace(guard.judge, detector=None, nlp=None), guard.tracer.background)

    def run(self, task: Task, stopped: Stopped, deltas: Deltas | None = None) -> Sequence[Any]:
        """Check or generate the captions of a batch in one pass: see `Worker`.

        What is to be checked is prepared while the model works on other rows.
        """
        if task.options is not None:
            with self._lock:
                return self._generate(task.rows, task.options, stopped, deltas)
        images, prompts, captions = zip(*task.rows, strict=True)
        prepared = self.guard.tracer.prepare(images, captions, prompts, packed=True)
        with self._lock:
            return [_without_trace(report) for report in self.guard.check_prepared(prepared)]

    @torch.no_grad()
    def _generate(self, rows: Sequence[Row], options: Options, stopped: Stopped, deltas: Deltas | None) -> list[Written]:
        """Generate captions, each until nobody waits for it any more."""
        guard = self.guard
        batch = encode(guard.model, guard.processor, [row.image for row in rows], [row.prompt for row in rows])
        streamer = None if deltas is None else _DeltaStreamer(guard.processor.tokenizer, deltas)
        _, reports = guard.generate_with_reports(
            **batch.inputs,
            **dict(options),
            picture_sizes=[[row.image.size] for row in rows],
            stopping_criteria=StoppingCriteriaList([_Stopped(len(rows), stopped)]),
            **({} if streamer is None else {"streamer": streamer}),
        )
        return [_written(report, length) for report, length in zip(reports, batch.prompt_mask.sum(1).tolist(), strict=True)]

    def close(self) -> None:
        """Nothing to end."""


def _without_trace(report: Report) -> Report:
    return replace(report, trace=None)


def _written(report: Report, prompt_tokens: int) -> Written:
    trace = report.trace
    tokens, finished = (0, True) if trace is None else (len(trace), trace.finished)
    return Written(_without_trace(report), prompt_tokens, tokens, finished)


class _Stopped(StoppingCriteria):
    """Ends the captions that nobody waits for any more."""

    def __init__(self, rows: int, stopped: Stopped) -> None:
        self.rows, self.stopped = rows, stopped

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(batch,) bool: which captions end here."""
        return torch.tensor([self.stopped(row) for row in range(self.rows)], device=input_ids.device)


class _DeltaStreamer(TextStreamer):
    """A streamer of transformers that hands whole words on."""

    def __init__(self, tokenizer: Any, deltas: Deltas) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.deltas = deltas

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece of text on."""
        if text:
            self.deltas(text)
