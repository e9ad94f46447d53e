"""Overhead of guarded generation: its time over plain SDPA generate, both interleaved in one process.

``aa_baseline`` is plain over plain: the noise floor of the machine. Every pair generates the same tokens; with ``rewind``,
which writes other captions, both write captions of the same images to their end.
``replay``: checking 16 captions in one batch, images to reports, over generating them with the same model, in one batch and
(``replay_of_one``, per caption) one by one; ``prefill`` is one bare forward pass over the same rows, the least that a replay
can take.
"""

from __future__ import annotations

import torch
import typer
from torch import Tensor

from evals.common import Artifacts, Figure, Lab, Model, Out, Quick, with_issue_keys, write
from evals.subject import Chosen, Subject, subject
from evals.timing import time_ratio
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
NEW_TOKENS = 64
PAIRS, PAIRS_QUICK = 60, 4  # of batch 1; half as many of batch 8


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


def main(out: Out, quick: Quick = False, lab: Lab = "tiny", model: Model = None, artifacts: Artifacts = None) -> None:
    """Measure the overhead of each policy."""
    measured = subject(Chosen(lab, model, artifacts))
    guards = {name: measured.guard(policy) for name, policy in POLICIES.items()}
    figures: dict[str, Figure] = {}
    for batch_size in (1, 8):
        samples = measured.world.samples("test", batch_size, SEED)
        batch = encode(measured.model, measured.processor, [s.image for s in samples], [s.prompt for s in samples])
        captions = {**batch.inputs, "max_new_tokens": 100, "do_sample": False}
        equal = {**batch.inputs, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        pairs = (PAIRS_QUICK if quick else PAIRS) // (1 if batch_size == 1 else 2)
        for name in ("aa_baseline", *POLICIES):
            options = captions if name == "rewind" else equal

            def plain(options: dict = options) -> object:
                return measured.model.generate(**options)

            def run(name: str = name, options: dict = options) -> object:
                return guards[name].generate(**options) if name in guards else measured.model.generate(**options)

            run()
            figures[f"time_ratio_{name}_batch_{batch_size}"] = time_ratio(plain, run, pairs)
    figures |= replay_figures(measured, guards["mark"], 4 if quick else 20)
    keys = {f"{measured.chosen.prefix}{name}_time_ratio": f"time_ratio_{name}_batch_8" for name in POLICIES}
    write(
        out,
        with_issue_keys(figures, keys),
        quick,
        checkpoint=measured.folder,
        seed=SEED,
        new_tokens=NEW_TOKENS,
        **measured.meta(),
    )


if __name__ == "__main__":
    typer.run(main)
