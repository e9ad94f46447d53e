"""Overhead of guarded generation: its time over plain SDPA generate on the lab's VLM, both interleaved in one process.

``aa_baseline`` is plain over plain: the noise floor of the machine. Every pair generates the same tokens.
``replay``: checking 16 captions in one batch, images to reports, over generating them with the same model, in one batch and
(``replay_of_one``, per caption) one by one; ``prefill`` is one bare forward pass over the same rows, the least that a replay
can take.
"""

from __future__ import annotations

import torch
import typer
from torch import Tensor

from evals.common import Figure, Out, Quick, write
from evals.timing import time_ratio
from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

SEED = 300


def replay_figures(guard: GazeGuard, pairs: int) -> dict[str, Figure]:
    """The time of checking captions that exist already."""
    samples = lab.samples("test", 16, SEED)
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


def main(out: Out, quick: Quick = False) -> None:
    """Measure the overhead of each policy."""
    model, processor = lab.load()
    guards = {policy: GazeGuard(model, processor, policy=policy) for policy in ("mark", "rerank")}
    figures: dict[str, Figure] = {}
    for batch_size in (1, 8):
        samples = lab.samples("test", batch_size, SEED)
        batch = encode(model, processor, [s.image for s in samples], [s.prompt for s in samples])
        options = {**batch.inputs, "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}

        def plain(options: dict = options) -> object:
            return model.generate(**options)

        runs = {"aa_baseline": plain} | {
            name: lambda guard=guard, options=options: guard.generate(**options) for name, guard in guards.items()
        }
        for run in runs.values():
            run()
        for name, run in runs.items():
            figures[f"time_ratio_{name}_batch_{batch_size}"] = time_ratio(
                plain, run, (8 if quick else 60) // (1 if batch_size == 1 else 2)
            )
    figures |= replay_figures(guards["mark"], 4 if quick else 20)
    write(out, figures, quick, seed=SEED, new_tokens=64)


if __name__ == "__main__":
    typer.run(main)
