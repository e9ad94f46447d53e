"""Captions of a lab's VLM or of one's own: CHAIR, recall, colours, panels and yes/no answers, greedy and sampled, by split.

CHAIR_i is false mentions over all mentions and CHAIR_s captions with a false mention (Rohrbach et al. 2018, with the
lab's exact truth in place of word lists); recall is over the nouns in the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import typer

from evals.common import DECODING, Artifacts, Dtype, Figure, Lab, Model, Out, Quick, rate, with_issue_keys, write
from evals.counting import chair_figures, pope_figures
from evals.subject import Chosen, subject
from gazeguard.guard import GazeGuard
from gazeguard.lab.labels import write_captions
from gazeguard.lab.worlds import World
from gazeguard.progress import track
from gazeguard.vision.encoding import encode

SEED = 100  # of the drawings; nothing was fitted to any test drawing
ORDERS = ((0, 2), (2, 4), (4, 6), (6, 9), (9, 99))  # of mentions, for the rate by order


SIZES = {"tiny": (500, 40), "scenes": (100, 14)}  # images of the usual test split, and those with --quick

LAB_KEYS = ("chair_i_greedy", "recall_greedy", "yes_no_accuracy")  # by which issues ask, with the lab's name before them


def chair(world: World, samples: Sequence[Any], captions: Sequence[str]) -> dict[str, Figure]:
    """The figures of captions by one decoding."""
    named = [world.named(sample, caption) for sample, caption in zip(samples, captions, strict=True)]
    false = [[not each.present for each in found] for found in named]
    kinds = [[(each.noun, not each.present) for each in found] for found in named]
    counted = chair_figures(kinds, [set(world.nouns(sample)) for sample in samples])
    coloured = [[each.colour for each in found if each.colour is not None] for found in named]
    figures = {
        **{key: counted[key] for key in ("chair_i", "chair_s", "recall")},
        "colour_error": rate([len(c) - sum(c) for c in coloured], [len(c) for c in coloured]),
        "mentions_per_caption": rate([len(f) for f in false], [1] * len(false)),
    }
    if strips := [found for found in named if any(each.panel for each in found)]:
        wrong = [sum(each.present and not each.located for each in found) for found in strips]
        figures["wrong_panel"] = rate(wrong, [len(found) for found in strips])
    for first, last in ORDERS:
        window = [f[first:last] for f in false]
        if any(window):
            figures[f"chair_i_order_{first}_{last - 1}"] = rate([sum(f) for f in window], [len(f) for f in window])
    return figures


def yes_no(world: World, guard: GazeGuard, samples: Sequence[Any]) -> dict[str, Figure]:
    """Accuracy and yes-rate on the POPE-form questions of each image."""
    asked = [(sample, question) for sample in samples for question in world.questions(sample)]
    labels, answers = [], []
    for start in track(range(0, len(asked), 25), "yes/no questions"):
        group = asked[start : start + 25]
        batch = encode(guard.model, guard.processor, [s.image for s, _ in group], [q.prompt for _, q in group])
        tokens = guard.model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)[:, -1]
        labels += ["yes" if question.yes else "no" for _, question in group]
        answers += [answer.strip().lower() for answer in guard.processor.tokenizer.batch_decode(tokens[:, None])]
    counted = pope_figures(labels, answers, [sample.id for sample, _ in asked])
    return {"yes_no_accuracy": counted["accuracy"], "yes_rate": counted["yes_rate"]}


def plan(lab: str, splits: Sequence[str], quick: bool) -> list[tuple[str, int, tuple[str, ...]]]:
    """Split, number of images and decodings: in the scenes lab, less of what is not the usual split, none of it when quick."""
    usual, *others = splits
    size = SIZES[lab][quick]
    if lab == "tiny":
        return [(split, size, tuple(DECODING)) for split in splits]
    return [(usual, size, tuple(DECODING)), *((split, size // 2, ("greedy",)) for split in others if not quick)]


def main(
    out: Out,
    lab: Lab = "tiny",
    model: Model = None,
    artifacts: Artifacts = None,
    dtype: Dtype = "auto",
    quick: Quick = False,
) -> None:
    """Measure a captioner."""
    torch.manual_seed(SEED)
    measured = subject(Chosen(lab, model, artifacts, dtype))
    guard, world = measured.guard(), measured.world
    figures: dict[str, Figure] = {}
    ids: list[str] = []
    for split, size, decodings in plan(lab, world.splits, quick):
        samples = world.samples(split, size, SEED)
        ids += [sample.id for sample in samples]
        ending = "" if split == world.splits[0] else f"_{split}"
        for decoding in decodings:
            captions = [report.caption for report in write_captions(guard, samples, DECODING[decoding])]
            figures |= {f"{key}_{decoding}{ending}": value for key, value in chair(world, samples, captions).items()}
        figures |= {f"{key}{ending}": value for key, value in yes_no(world, guard, samples).items()}
    keys = {} if lab == "tiny" else measured.chosen.keyed(LAB_KEYS)
    command = f"evals.captioner{measured.options()}"
    write(out, with_issue_keys(figures, keys), quick, ids, measured.folder, seed=SEED, command=command, **measured.meta())


if __name__ == "__main__":
    typer.run(main)
