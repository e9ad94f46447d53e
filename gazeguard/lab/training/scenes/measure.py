"""Measured figures of a built scenes VLM: captions and yes/no answers per split, greedy and at temperature 1.

``python -m gazeguard.lab.training.scenes.measure DIR --out figures.json`` writes the figures and prints the model card's
tables. Intervals are 95 %, by bootstrap over images.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from gazeguard.lab.scenes.samples import Sample, samples
from gazeguard.lab.scenes.truth import Mention, Scores, mentions
from gazeguard.lab.scenes.world import Split
from gazeguard.lab.training.scenes.evaluation import ANSWER_TOKENS, CAPTION_TOKENS, answers

SPLITS: tuple[Split, ...] = ("test", "shifted", "line")
RESAMPLES = 1000
ORDERS = 8  # mentions after the eighth count as the eighth


@dataclass(frozen=True)
class Captioned:
    """One image with the caption that the model wrote and the replies to its yes/no questions."""

    sample: Sample
    caption: str
    replies: tuple[str, ...]


def caption(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, drawn: Sequence[Sample], sampled: bool, questions: bool
) -> list[Captioned]:
    """Captions (greedy or at temperature 1) and, if wanted, greedy answers to the samples' questions."""
    images = [sample.truth for sample in drawn]
    written = answers(model, processor, images, [sample.prompt for sample in drawn], CAPTION_TOKENS, sampled)
    pairs = [(sample.truth, turn.prompt) for sample in drawn for turn in (sample.questions if questions else ())]
    replies = answers(model, processor, [image for image, _ in pairs], [prompt for _, prompt in pairs], ANSWER_TOKENS)
    remaining = iter(replies)
    return [
        Captioned(sample, text, tuple(next(remaining) for _ in (sample.questions if questions else ())))
        for sample, text in zip(drawn, written, strict=True)
    ]


def interval(rows: Sequence[tuple[float, float]]) -> list[float]:
    """A ratio of sums over images, and its 95 % interval.

    Args:
        rows: (numerator, denominator) of each image.
    """
    table = np.array(rows, float).reshape(-1, 2)
    picks = np.random.default_rng(0).integers(len(table), size=(RESAMPLES, len(table)))
    sums = table[picks].sum(1)
    ratios = sums[:, 0] / np.maximum(sums[:, 1], 1e-9)
    total = table.sum(0)
    return [round(float(value), 4) for value in (total[0] / max(total[1], 1e-9), *np.quantile(ratios, (0.025, 0.975)))]


def figures(captioned: Sequence[Captioned]) -> dict[str, object]:
    """All figures of one split: rates with intervals, hallucination rate by mention order, commonest confusions."""
    sums = [Scores().add(item.sample.truth, item.caption) for item in captioned]
    result: dict[str, object] = {
        "images": len(captioned),
        "chair_i": interval([(row.hallucinated, row.mentions) for row in sums]),
        "chair_s": interval([(row.hallucinated_captions, row.captions) for row in sums]),
        "recall": interval([(row.named, row.drawn) for row in sums]),
        "wrong_colour": interval([(row.wrong_colour, row.coloured) for row in sums]),
        "wrong_location": interval([(row.wrong_location, row.located) for row in sums]),
        "mentions_per_image": round(float(np.mean([row.mentions for row in sums])), 3),
    }
    found = [mentions(item.sample.truth, item.caption) for item in captioned]
    result["hallucination_by_order"] = [
        [sum(not mention.present for mention in group), len(group)]
        for group in (_of_order(found, order) for order in range(ORDERS))
    ]
    result["confusions"] = confusions(captioned, found)
    if captioned[0].replies:
        pairs = [list(zip(item.replies, item.sample.questions, strict=True)) for item in captioned]
        right = [(sum(reply.strip() == turn.answer for reply, turn in row), len(row)) for row in pairs]
        yes = [(sum(reply.strip().lower().startswith("yes") for reply, _ in row), len(row)) for row in pairs]
        result |= {"yes_no_accuracy": interval(right), "yes_rate": interval(yes)}
    return result


def _of_order(found: Sequence[Sequence[Mention]], order: int) -> list[Mention]:
    return [mention for row in found for mention in row if min(mention.order, ORDERS - 1) == order]


def confusions(captioned: Sequence[Captioned], found: Sequence[Sequence[Mention]], most: int = 12) -> list[list[object]]:
    """[drawn noun, named instead, count]: of images where one noun was left out and one hallucinated."""
    counts: Counter[tuple[str, str]] = Counter()
    for item, row in zip(captioned, found, strict=True):
        missed = {drawn.noun for drawn in item.sample.truth.objects} - {mention.noun for mention in row}
        false = {mention.noun for mention in row if not mention.present}
        if len(missed) == len(false) == 1:
            counts[missed.pop(), false.pop()] += 1
    return [[*pair, count] for pair, count in counts.most_common(most)]


def measure(folder: Path, count: int, seed: int) -> dict[str, dict[str, object]]:
    """Figures of ``test``, ``shifted``, ``line`` (greedy) and of ``test`` at temperature 1 and on comic pages."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    results: dict[str, dict[str, object]] = {}
    for split in SPLITS:
        results[split] = figures(caption(model, processor, samples(split, count, seed), False, True))
        print(split, json.dumps(results[split]), flush=True)
    torch.manual_seed(seed)
    results["test, T = 1"] = figures(caption(model, processor, samples("test", count, seed), True, False))
    results["test, comic pages"] = figures(caption(model, processor, samples("test", count // 2, seed, "page"), False, True))
    return results


def table(results: dict[str, dict[str, object]]) -> str:
    """The figures as a Markdown table, one row per split."""
    names = ("chair_i", "chair_s", "recall", "wrong_colour", "wrong_location", "yes_no_accuracy", "yes_rate")
    lines = [f"| split | images | {' | '.join(names)} |", f"|---|---{'|---' * len(names)}|"]
    for split, row in results.items():
        values = [_entry(row.get(name)) for name in names]
        lines.append(f"| {split} | {row['images']} | {' | '.join(values)} |")
    return "\n".join(lines)


def _entry(value: object) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value) if isinstance(value, list) else "-"


def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="Measure a built scenes VLM.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    parser.add_argument("--images", type=int, default=200, help="per split")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = measure(options.folder, options.images, options.seed)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
