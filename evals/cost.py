"""Overhead of guarded generation: its time over plain SDPA generate, both interleaved in one process.

``aa_baseline`` is plain over plain: the noise floor of the machine. Every run of a turn generates as many tokens; ``rewind``,
which writes other captions, stands beside plain captions of the same images, both to their end. ``passes_ratio_rewind`` is the
ratio of their forward passes: what rolled back phrases cost by themselves. ``cpu_time_ratio`` is the same of the process's CPU
time, which others on the machine change little. ``memory_ratio`` is the process's peak over that of plain, one run each.
``replay``: checking 16 captions in one batch, images to reports, over generating them with the same model, in one batch and
(``replay_of_one``, per caption) one by one; ``prefill`` is one bare forward pass over the same rows, the least that a replay
can take.
"""

from __future__ import annotations

import os
from functools import partial

import torch
import typer
from torch import Tensor

from evals.common import Artifacts, Figure, Lab, Model, Out, Quick, figure, with_issue_keys, write
from evals.subject import Chosen, Subject, subject
from evals.timing import interleaved, time_and_memory, time_ratio
from gazeguard.guard import GazeGuard
from gazeguard.policy import Rerank, load_policy
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

SEED = 300
RERANK = Rerank(attended_logprob=2.0, end_bonus=2.0)  # of any model: its cost is measured, not whether it helps
POLICIES = {
    "mark": load_policy("mark"),
    "rerank": load_policy("rerank").model_copy(update={"rerank": RERANK}),
    "rewind": load_policy("rewind"),
}
NEW_TOKENS, LONGEST = 64, 100  # of every run of a turn; of captions that end by themselves
NEW_TOKENS_QUICK, LONGEST_QUICK = 16, 24
TURNS = {"tiny": {1: 12, 8: 12}, "scenes": {8: 6}}  # of each batch size
TURNS_QUICK = {"tiny": {1: 3, 8: 2}, "scenes": {8: 1}}
REPLAY_PAIRS = {"tiny": 6, "scenes": 0}  # the scenes lab's sixteen captions one by one take minutes


def replay_figures(measured: Subject, guard: GazeGuard, pairs: int) -> dict[str, Figure]:
    """The time of checking captions that exist already."""
    samples = measured.world.samples("test", 16, SEED)
    images, prompts = [s.image for s in samples], [s.prompt for s in samples]

    def generate(some: slice = slice(None)) -> Tensor:
        inputs = encode(guard.model, guard.processor, images[some], prompts[some]).inputs
        return guard.model.generate(**inputs, max_new_tokens=200, do_sample=False)[:, inputs["input_ids"].shape[1] :]

    captions = guard.processor.tokenizer.batch_decode(generate(), skip_special_tokens=True)

    def one_by_one() -> None:
        for i in range(16):
            generate(slice(i, i + 1))

    @torch.no_grad()
    def prefill() -> None:
        inputs = encode(guard.model, guard.processor, images, prompts, captions).inputs
        guard.model(**model_inputs(guard.model, inputs), use_cache=False, logits_to_keep=1)

    def replay() -> None:
        guard.check_all(images, captions, prompts)

    replay()
    return {
        "time_ratio_replay_batch_16": time_ratio(generate, replay, pairs),
        "time_ratio_prefill_batch_16": time_ratio(generate, prefill, pairs),
        "time_ratio_replay_of_one": time_ratio(one_by_one, replay, pairs),
    }


def policy_figures(
    measured: Subject, guards: dict[str, GazeGuard], batch_size: int, turns: int, quick: bool
) -> dict[str, Figure]:
    """Time, memory and passes of each policy, beside plain generation."""
    samples, model = measured.world.samples("test", batch_size, SEED), measured.model
    batch = encode(model, measured.processor, [s.image for s in samples], [s.prompt for s in samples])
    new, longest = (NEW_TOKENS_QUICK, LONGEST_QUICK) if quick else (NEW_TOKENS, LONGEST)
    captions = {**batch.inputs, "max_new_tokens": longest, "do_sample": False}
    equal = {**captions, "max_new_tokens": new, "min_new_tokens": new}
    runs = {
        "plain": partial(model.generate, **equal),
        "aa_baseline": partial(model.generate, **equal),
        "mark": partial(guards["mark"].generate, **equal),
        "rerank": partial(guards["rerank"].generate, **equal),
        "captions": partial(model.generate, **captions),
        "rewind": partial(guards["rewind"].generate, **captions),
    }
    beside = {"aa_baseline": "plain", "mark": "plain", "rerank": "plain", "rewind": "captions"}
    passes, peaks, count = {}, {}, [0]
    counter = model.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    for name, run in runs.items():
        count[0] = 0
        peaks[name], passes[name] = time_and_memory(run, "cpu")[1], count[0]
    counter.remove()
    taken, figures = interleaved(runs, turns), {}
    for name, other in beside.items():
        figures[f"time_ratio_{name}"] = taken.ratio(name, other)
        figures[f"cpu_time_ratio_{name}"] = taken.cpu_ratio(name, other)
        figures[f"memory_ratio_{name}"] = figure(peaks[name] / peaks[other])
    figures["passes_ratio_rewind"] = figure(passes["rewind"] / passes["captions"])
    return {f"{key}_batch_{batch_size}": each for key, each in figures.items()}


def main(out: Out, quick: Quick = False, lab: Lab = "tiny", model: Model = None, artifacts: Artifacts = None) -> None:
    """Measure the overhead of each policy."""
    measured = subject(Chosen(lab, model, artifacts))
    guards = {name: measured.guard(policy) for name, policy in POLICIES.items()}
    figures: dict[str, Figure] = {}
    for batch_size, turns in (TURNS_QUICK if quick else TURNS)[lab].items():
        figures |= policy_figures(measured, guards, batch_size, turns, quick)
    if pairs := min(REPLAY_PAIRS[lab], 4 if quick else 20):
        figures |= replay_figures(measured, guards["mark"], pairs)
    keys = {f"{measured.chosen.prefix}{name}_time_ratio": f"time_ratio_{name}_batch_8" for name in POLICIES}
    load = {"load": [round(each, 1) for each in os.getloadavg()], "cores": os.cpu_count()}
    write(
        out,
        with_issue_keys(figures, keys),
        quick,
        checkpoint=measured.folder,
        seed=SEED,
        new_tokens=NEW_TOKENS_QUICK if quick else NEW_TOKENS,
        command=f"evals.cost{measured.options()}",
        **load,
        **measured.meta(),
    )


if __name__ == "__main__":
    typer.run(main)
