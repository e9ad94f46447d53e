"""What does watching cost? Time of watched over plain SDPA generate on the lab's VLM, both interleaved in one process.

``null`` is plain over plain: what the noise of the machine alone looks like. Every pair writes the same tokens.
``replay``: checking 16 captions in one batch, pictures to reports, over writing them with the same model, in one batch and
(``replay_of_one``, per caption) one by one; ``prefill`` is one bare forward pass over the same rows, less than which no
replay can take.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from evals.common import Figure, Out, Quick, median, write
from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

SEED = 300


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(plain: Callable[[], object], other: Callable[[], object], pairs: int) -> Figure:
    """Median of the ratio other/plain over interleaved pairs."""
    found = []
    for i in track(range(pairs), "timing", console=Console(stderr=True), transient=True):
        if i % 2:
            first, second = seconds(other), seconds(plain)
            found.append(first / second)
        else:
            first, second = seconds(plain), seconds(other)
            found.append(second / first)
    return median(found)


def of_replay(guard: GazeGuard, pairs: int) -> dict[str, Figure]:
    """The price of checking captions that are there already."""
    samples = lab.samples("test", 16, SEED)
    images, prompts = [s.image for s in samples], [s.prompt for s in samples]

    def written(some: slice = slice(None)) -> Tensor:
        inputs = encode(guard.model, guard.processor, images[some], prompts[some]).inputs
        return guard.model.generate(**inputs, max_new_tokens=200, do_sample=False)[:, inputs["input_ids"].shape[1] :]

    captions = guard.processor.tokenizer.batch_decode(written(), skip_special_tokens=True)

    def one_by_one() -> None:
        for i in range(16):
            written(slice(i, i + 1))

    @torch.no_grad()
    def prefill() -> None:
        inputs = encode(guard.model, guard.processor, images, prompts, captions).inputs
        guard.model(**model_inputs(guard.model, inputs), use_cache=False, logits_to_keep=1)

    def replay() -> None:
        guard.check_all(images, captions, prompts)

    replay()
    return {
        "time_ratio_replay_batch_16": ratios(written, replay, pairs),
        "time_ratio_prefill_batch_16": ratios(written, prefill, pairs),
        "time_ratio_replay_of_one": ratios(one_by_one, replay, pairs),
    }


def main(out: Out, quick: Quick = False) -> None:
    """Measure the price of each policy."""
    model, processor = lab.load()
    guards = {policy: GazeGuard(model, processor, policy=policy) for policy in ("mark", "rerank")}
    figures: dict[str, Figure] = {}
    for batch_size in (1, 8):
        samples = lab.samples("test", batch_size, SEED)
        batch = encode(model, processor, [s.image for s in samples], [s.prompt for s in samples])
        asked = {**batch.inputs, "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}

        def plain(asked: dict = asked) -> object:
            return model.generate(**asked)

        runs = {"null": plain} | {
            name: lambda guard=guard, asked=asked: guard.generate(**asked) for name, guard in guards.items()
        }
        for run in runs.values():
            run()
        for name, run in runs.items():
            figures[f"time_ratio_{name}_batch_{batch_size}"] = ratios(
                plain, run, (8 if quick else 60) // (1 if batch_size == 1 else 2)
            )
    figures |= of_replay(guards["mark"], 4 if quick else 20)
    write(out, figures, quick, seed=SEED, new_tokens=64)


if __name__ == "__main__":
    typer.run(main)
