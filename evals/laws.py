"""Do the laws hold over many captions? Identical ids under ``mark``, and replay against live, on test pictures."""

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


def main(out: Out, quick: Quick = False) -> None:
    """Measure the laws, half of the captions greedy and half sampled."""
    guard = GazeGuard(*lab.load())
    samples = lab.samples("test", 40 if quick else 200, SEED)
    same, differences = [], {name: [] for name in ("gaze", "attribution", "logprobs", "entropy")}
    for start in range(0, len(samples), BATCH):
        group = samples[start : start + BATCH]
        images, prompts = [sample.image for sample in group], [sample.prompt for sample in group]
        asked = {**encode(guard.model, guard.processor, images, prompts).inputs, "max_new_tokens": 200}
        asked["do_sample"] = start >= len(samples) // 2
        torch.manual_seed(SEED)
        plain = guard.model.generate(**asked)
        torch.manual_seed(SEED)
        same += (guard.generate(**asked) == plain).all(dim=1).tolist()
        live = guard.reports
        replayed = guard.check_all(images, [report.caption for report in live], prompts)
        for replay, report in zip(replayed, live, strict=True):
            for name, found in differences.items():
                found.append(float(np.abs(getattr(replay.trace, name) - getattr(report.trace, name)).max()))
    figures = {"mark_ids_identical": figure(np.mean(same)), "captions": figure(len(same))}
    figures |= {f"live_replay_{name}_difference": figure(max(found)) for name, found in differences.items()}
    write(out, figures, quick, [sample.id for sample in samples], seed=SEED)


if __name__ == "__main__":
    typer.run(main)
