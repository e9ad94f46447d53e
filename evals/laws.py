"""Invariants over many captions: identical ids under ``mark``, and replay against live, on test drawings."""

from __future__ import annotations

import numpy as np
import torch
import typer

from evals.common import Out, Quick, figure, write
from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.vision.encoding import encode

SEED = 400
BATCH = 20
# Key of a figure -> field of the trace.
FIELDS = {"gaze": "gaze", "dla": "attribution", "logprobs": "logprobs", "entropy": "entropy"}


def main(out: Out, quick: Quick = False) -> None:
    """Measure the invariants, half of the captions greedy and half sampled."""
    guard = GazeGuard(*lab.load())
    samples = lab.samples("test", 40 if quick else 200, SEED)
    same, differences = [], {key: [] for key in FIELDS}
    for start in range(0, len(samples), BATCH):
        group = samples[start : start + BATCH]
        images, prompts = [sample.image for sample in group], [sample.prompt for sample in group]
        options = {**encode(guard.model, guard.processor, images, prompts).inputs, "max_new_tokens": 200}
        options["do_sample"] = start >= len(samples) // 2
        torch.manual_seed(SEED)
        plain = guard.model.generate(**options)
        torch.manual_seed(SEED)
        same += (guard.generate(**options) == plain).all(dim=1).tolist()
        live = guard.reports
        replayed = guard.check_all(images, [report.caption for report in live], prompts)
        for replay, report in zip(replayed, live, strict=True):
            for key, field in FIELDS.items():
                difference = np.abs(getattr(replay.trace, field) - getattr(report.trace, field)).max()
                differences[key].append(float(difference))
    figures = {"mark_ids_identical": figure(np.mean(same)), "captions": figure(len(same))}
    figures |= {f"live_replay_{key}_difference": figure(max(each)) for key, each in differences.items()}
    write(out, figures, quick, [sample.id for sample in samples], seed=SEED)


if __name__ == "__main__":
    typer.run(main)
