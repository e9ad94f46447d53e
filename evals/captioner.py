"""Captions of the lab's VLM: CHAIR, recall, colours, panels and yes/no answers, greedy and sampled, on both test splits.

CHAIR_i is false mentions over all mentions and CHAIR_s captions with a false mention (Rohrbach et al. 2018, with the
lab's exact truth in place of word lists); recall is over the nouns in the image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import typer

from evals.common import DECODING, Figure, Out, Quick, rate, write
from evals.counting import chair_figures, pope_figures
from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.lab.labels import write_captions
from gazeguard.lab.truth import mentions
from gazeguard.lab.world import Sample, yes_no_question
from gazeguard.vision.encoding import encode

SEED = 100  # of the drawings; nothing was fitted to any test drawing
ORDERS = ((0, 2), (2, 4), (4, 6), (6, 9), (9, 99))  # of mentions, for the rate by order


def chair(samples: Sequence[Sample], captions: Sequence[str]) -> dict[str, Figure]:
    """The figures of captions by one decoding."""
    named = [mentions(sample.drawing, caption) for sample, caption in zip(samples, captions, strict=True)]
    false = [[not mention.present for mention in found] for found in named]
    kinds = [[(mention.phrase.head.text.lower(), not mention.present) for mention in found] for found in named]
    counted = chair_figures(kinds, [{each.noun for each in sample.drawing.objects} for sample in samples])
    coloured = [[m.colour for m in found if m.located and m.colour is not None] for found in named]
    strips = [i for i, sample in enumerate(samples) if sample.drawing.panels]
    figures = {
        **{key: counted[key] for key in ("chair_i", "chair_s", "recall")},
        "colour_error": rate([len(c) - sum(c) for c in coloured], [len(c) for c in coloured]),
        "wrong_panel": rate(
            [sum(m.present and not m.located for m in named[i]) for i in strips], [len(named[i]) for i in strips]
        ),
        "mentions_per_caption": rate([len(f) for f in false], [1] * len(false)),
    }
    for first, last in ORDERS:
        window = [f[first:last] for f in false]
        if any(window):
            figures[f"chair_i_order_{first}_{last - 1}"] = rate([sum(f) for f in window], [len(f) for f in window])
    return figures


def yes_no(guard: GazeGuard, samples: Sequence[Sample]) -> dict[str, Figure]:
    """Accuracy and yes-rate on one POPE-form question per drawing."""
    labels, answers = [], []
    for start in range(0, len(samples), 25):
        group = samples[start : start + 25]
        turns = [yes_no_question(sample.drawing, random.Random(sample.id)) for sample in group]
        batch = encode(guard.model, guard.processor, [s.image for s in group], [t.prompt for t in turns])
        tokens = guard.model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)[:, -1]
        texts = guard.processor.tokenizer.batch_decode(tokens[:, None])
        labels += ["yes" if turn.answer.startswith("Yes") else "no" for turn in turns]
        answers += [answer.lower() for answer in texts]
    counted = pope_figures(labels, answers, [sample.id for sample in samples])
    return {"yes_no_accuracy": counted["accuracy"], "yes_rate": counted["yes_rate"]}


def main(out: Out, quick: Quick = False) -> None:
    """Measure the lab's captioner."""
    torch.manual_seed(SEED)
    guard = GazeGuard(*lab.load())
    figures: dict[str, Figure] = {}
    ids: list[str] = []
    for split, ending in (("test", ""), ("shifted", "_shifted")):
        samples = lab.samples(split, 40 if quick else 500, SEED)
        ids += [sample.id for sample in samples]
        for decoding, do_sample in DECODING.items():
            captions = [report.caption for report in write_captions(guard, samples, do_sample)]
            figures |= {f"{key}_{decoding}{ending}": value for key, value in chair(samples, captions).items()}
        figures |= {f"{key}{ending}": value for key, value in yes_no(guard, samples).items()}
    write(out, figures, quick, ids, seed=SEED)


if __name__ == "__main__":
    typer.run(main)
