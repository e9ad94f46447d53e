"""Captions of lab images, and answers to questions about them, by several decoding methods in several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from evals.common import DECODING
from evals.decoding_methods import MAX_NEW_TOKENS, cutters, methods, random_drops
from evals.guards import Setup, lab_guard, text_only_guard
from evals.recorded import replay
from gazeguard.lab.worlds import Sample, world
from gazeguard.progress import track
from gazeguard.report import Report
from gazeguard.vision.encoding import encode

SEED = 400  # of the images
BATCH = 25  # prompts


class Job(NamedTuple):
    """Captions of the first ``count`` images of a split, or answers to questions about them, by one method and setting."""

    method: str
    setting: str
    split: str
    count: int
    decoding: str
    seed: int = 0
    questions: bool = False
    setup: Setup = Setup()


class ObjectRisk(NamedTuple):
    """An object of a caption: its characters, its risk, and its risk by the text alone."""

    start: int
    end: int
    drop: float
    text_only_drop: float


class Result(NamedTuple):
    """The result of a job.

    captions: one per image, or one answer per question
    passes:   rows that went through the decoder
    cut:      of plain captions, what each method that cuts leaves of them
    risks:    of plain captions, the risks of the objects of each
    """

    captions: list[str]
    passes: int
    cut: dict[tuple[str, str], list[str]]
    risks: list[list[ObjectRisk]]


@contextmanager
def count_passes(model: PreTrainedModel) -> Iterator[list[int]]:
    """Inside, the list grows by the number of rows of every pass of the text decoder."""
    rows: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(next(v for v in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args) if v is not None).shape[0])

    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


def prompts_of(job: Job) -> list[tuple[Sample, str]]:
    """The prompts of a job, each with its sample."""
    shown = world(job.setup.chosen.lab)
    samples = shown.samples(job.split, job.count, SEED)
    if not job.questions:
        return [(sample, sample.prompt) for sample in samples]
    return [(sample, question.prompt) for sample in samples for question in shown.questions(sample)]


@torch.no_grad()
def run(job: Job) -> Result:
    """Do a job; the same job gives the same captions in any process."""
    guard, write = lab_guard(job.setup.chosen), methods(job.setup)[job.method][job.setting]
    guarded = job.method == "plain" and not job.questions  # the ids are the same, and there are reports to cut
    captions: list[str] = []
    reports: list[Report] = []
    prompts = prompts_of(job)
    with count_passes(guard.model) as rows:
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            torch.manual_seed(1000 * job.seed + start)
            inputs = encode(guard.model, guard.processor, [s.image for s, _ in batch], [prompt for _, prompt in batch]).inputs
            if guarded:
                guard.generate(**inputs, do_sample=DECODING[job.decoding], max_new_tokens=MAX_NEW_TOKENS)
                reports += guard.reports
            else:
                captions += write(inputs, DECODING[job.decoding])
    if not guarded:
        return Result(captions, sum(rows), {}, [])
    captions = [report.caption for report in reports]
    cut = {
        (method, setting): [report.caption if report.trace is None else cutter(report) for report in reports]
        for method, settings in cutters(job.setup).items()
        for setting, cutter in settings.items()
    }
    samples = [sample for sample, _ in prompts]
    cut |= random_drops(job.setup, lambda other: replay(other, samples, captions))
    return Result(captions, sum(rows), cut, [object_risks(report, job.setup) for report in reports])


def object_risks(report: Report, setup: Setup) -> list[ObjectRisk]:
    """The risks of the objects of a plain report; none where there is no text-only detector beside the subject's."""
    if report.trace is None or "text_only_drop" not in cutters(setup):
        return []
    risks, text_only = (
        {(f.claim.start, f.claim.end): f.risk for f in each.findings if f.claim.kind == "object"}
        for each in (report, text_only_guard(setup).judge(report.trace))
    )
    return [ObjectRisk(*span, risk, text_only[span]) for span, risk in risks.items() if span in text_only]


def run_all(jobs: Sequence[Job], workers: int, description: str) -> dict[Job, Result]:
    """The results of all jobs, which several processes of one thread share; one worker is this process itself."""
    if workers == 1:
        return {job: run(job) for job in track(jobs, description)}
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return dict(zip(jobs, track(pool.map(run, jobs), description, total=len(jobs)), strict=True))
