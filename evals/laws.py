"""Invariants over many captions: identical ids under ``mark``, and replay against live, on test drawings."""

from __future__ import annotations

import numpy as np
import torch
import typer

from evals.common import Artifacts, Dtype, Lab, Model, Out, Quick, figure, with_issue_keys, write
from evals.subject import Chosen, subject
from gazeguard.progress import track
from gazeguard.vision.encoding import encode

SEED = 400
BATCH = 20  # captions at a time
# Key of a figure -> field of the trace.
FIELDS = {"gaze": "gaze", "dla": "attribution", "logprobs": "logprobs", "entropy": "entropy"}


SIZES = {"tiny": (200, 40), "scenes": (60, 12)}  # captions, and those with --quick


def main(
    out: Out,
    lab: Lab = "tiny",
    model: Model = None,
    artifacts: Artifacts = None,
    dtype: Dtype = "auto",
    quick: Quick = False,
) -> None:
    """Measure the invariants, half of the captions greedy and half sampled."""
    measured = subject(Chosen(lab, model, artifacts, dtype))
    guard = measured.guard()
    samples = measured.world.samples("test", SIZES[lab][quick], SEED)
    same, differences = [], {key: [] for key in FIELDS}
    size = min(BATCH, len(samples) // 2)
    for start in track(range(0, len(samples), size), "captions, live and replayed"):
        group = samples[start : start + size]
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
    keys = {} if lab == "tiny" else measured.chosen.keyed(figures)
    meta = {"command": f"evals.laws{measured.options()}", **measured.meta()}
    write(out, with_issue_keys(figures, keys), quick, [s.id for s in samples], measured.folder, seed=SEED, **meta)


if __name__ == "__main__":
    typer.run(main)
