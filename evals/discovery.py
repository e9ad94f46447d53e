"""Memory of finding the gaze heads of a deep model, beside plain inference: 36 layers of 32 heads, as in an 8B model.

The lab's class at that depth and number of heads, with random weights and narrow heads, so that a CPU can run it: attention
is as large as in the 8B model, everything else is smaller, which makes the ratio larger, not smaller. Peak memory over that
of one plain pass over the same batch, weights included: ``search`` is ``find_heads``, which reads all 1,152 heads;
``output_attentions`` is the same pass with all attention matrices, which is what other tools need.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import typer

from evals.common import Out, Quick, figure, write
from evals.timing import time_and_memory
from gazeguard.heads.discovery import find_heads
from gazeguard.heads.strips import draw_strips
from gazeguard.lab.training.tiny_model import build_model, build_processor
from gazeguard.vision.encoding import encode
from gazeguard.vision.inputs import model_inputs

LAYERS, WIDTH, STRIPS, REPEATS = 36, 1024, 8, 3


def main(out: Out, quick: Quick = False) -> None:
    """Measure the memory of a search for gaze heads."""
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor, *((128, 4) if quick else (WIDTH, LAYERS))).eval()
    strips = draw_strips(STRIPS)
    columns = [[getattr(strip, name) for strip in strips] for name in ("image", "prompt", "narration")]
    inputs = model_inputs(model, encode(model, processor, *columns).inputs)

    def run(attention: str, **options: bool) -> Callable[[], object]:
        def forward() -> None:
            model.set_attn_implementation(attention)
            with torch.no_grad():
                model(**inputs, use_cache=False, **options)

        return forward

    def search() -> None:
        model.set_attn_implementation("sdpa")
        find_heads(model, processor, strips, batch_size=STRIPS, progress=False)

    runs = {"plain": run("sdpa"), "search": search, "output_attentions": run("eager", output_attentions=True)}
    peaks: dict[str, list[int]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, each in runs.items():
            peaks[name].append(time_and_memory(each, "cpu")[1])
    figures = {"plain_bytes": figure(median(peaks["plain"]))}
    for name in ("search", "output_attentions"):
        ratios = [peak / plain for peak, plain in zip(peaks[name], peaks["plain"], strict=True)]
        figures[f"{name}_memory_ratio"] = figure(median(ratios), (min(ratios), max(ratios)))
    write(out, figures, quick, seed=0, layers=len(model.model.text_model.layers), strips=STRIPS, intervals="range")


if __name__ == "__main__":
    typer.run(main)
