"""Mitigation: do the policies make captions truer at the same recall, and with what overhead? All methods on the same images.

A *decoding method* has settings (a strength, a threshold). One setting is chosen on validation images, for all methods by one
rule: the least CHAIR_i, greedy and sampled captions together, among those that lose at most a point of recall against plain
in either. Test captions are written with the chosen setting; greedily with the others, too, for the curves.

``{method}_{figure}_{greedy|sampled}{|_shifted}``: ``chair_i``, ``chair_s``, ``recall``, ``f1``, ``mentions`` and ``words`` per
caption; ``misplaced``, mentions of objects that are in the image but not at the location that is named, which CHAIR does not
count, and ``wrong``, these and the false ones. Against plain, on the same images: ``chair_i_reduction``, ``wrong_reduction``
and ``words_change``, relative; ``recall_change``, a difference of rates; ``passes_ratio``, of rows that went through the
decoder; ``time_ratio``, interleaved. ``{method}_vs_{other}``: the difference in CHAIR_i at equal recall; below 0 is better. The
other may take any setting, or a mean of two, that keeps as much recall. ``drop_*_at_10``: when the tenth of objects with the
greatest risk is cut. ``yes_no_*``: POPE-form questions, greedily. With --quick: `QUICK_METHODS` on test images, greedily, with
their default settings.

The captions are written by worker processes; times are taken when they are done.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib import colormaps
from matplotlib.figure import Figure as Plot
from numpy.typing import NDArray

from evals.caption_counts import Counts, add_counts, caption_figures, compare, count_captions, difference_at_equal_recall, ratio
from evals.caption_jobs import QUESTIONS, SEED, Job, ObjectRisk, Result, questions, run_all
from evals.common import DECODING, Figure, Out, Quick, figure, over_images, with_issue_keys, write
from evals.counting import pope_figures
from evals.decoding_methods import cutters, methods, of_policy
from evals.guards import lab_guard
from evals.timing import time_ratio
from gazeguard import lab
from gazeguard.claims.removal import without
from gazeguard.policy import load_policy
from gazeguard.vision.encoding import encode

IMAGES, VALIDATION_IMAGES, QUICK_IMAGES = 120, 48, 8  # of a test split; of the validation split; of a test split with --quick
SAMPLED_SEEDS = 5
SLACK = 0.01  # of recall, that the choice of a setting may cost
PAIRS = 9  # of interleaved runs, for a time ratio
COVERAGES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4)
COVERAGE = 0.1  # the one that is a figure
SPLITS = {"test": "", "shifted": "_shifted"}
OURS = ("rerank", "rewind", "rewind_verify", "rerank_rewind", "drop")
FIVE_SEEDS = ("plain", "truncated", "drop", "text_only_drop", "rerank", "rewind", "rerank_rewind")
QUICK_METHODS = ("plain", "rerank", "rewind", "rewind_verify")
# The figures that issues ask for without an ending: lab test, greedy.
PLAIN_KEYS = {
    **dict.fromkeys(("rerank", "rewind"), ("chair_i_reduction", "recall_change", "time_ratio")),
    "rewind_verify": ("chair_i_reduction", "recall_change"),
    "drop": ("false_removed_at_10", "recall_change_at_10"),
    "text_only_drop": ("false_removed_at_10", "recall_change_at_10"),
}
ISSUE_KEYS = {f"{method}_{key}": f"{method}_{key}_greedy" for method, keys in PLAIN_KEYS.items() for key in keys}

CountTable = dict[tuple[str, str, str, str], list[Counts]]  # method, setting, split, decoding -> one per seed


# ------------------------------------------------------------------------------------------------- choice of settings


def tabulate(results: Mapping[Job, Result]) -> CountTable:
    """The counts of all captions that were written, and of those that were cut."""
    table: CountTable = {}
    for job, result in results.items():
        if job.questions:
            continue
        samples = lab.samples(job.split, job.count, SEED)
        for (method, setting), captions in {(job.method, job.setting): result.captions, **result.cut}.items():
            table.setdefault((method, setting, job.split, job.decoding), []).append(count_captions(samples, captions))
    return table


def decodings_of(method: str) -> list[str]:
    """A beam search is not sampled."""
    return ["greedy"] if method == "beam" else list(DECODING)


def by_setting(table: CountTable, method: str, split: str, decoding: str) -> dict[str, list[Counts]]:
    """The counts of a method by its settings."""
    return {key[1]: counts for key, counts in table.items() if (key[0], *key[2:]) == (method, split, decoding)}


def best_setting(settings: Mapping[str, Mapping[str, Counts]], plain: Mapping[str, Counts]) -> str:
    """The setting with the least CHAIR_i over all decodings among those that cost at most `SLACK` of recall in each.

    Where all cost more, it is the one that costs least. settings: setting -> decoding -> counts.
    """

    def over_all(counts: Counts, name: str) -> float:
        return ratio(counts, name, np.ones(len(counts["captions"]), np.int64))

    lost = {
        setting: max(over_all(plain[each], "recall") - over_all(counts, "recall") for each, counts in by_decoding.items())
        for setting, by_decoding in settings.items()
    }
    chair = {
        setting: float(np.mean([over_all(counts, "chair_i") for counts in by_decoding.values()]))
        for setting, by_decoding in settings.items()
    }
    allowed = [setting for setting in settings if lost[setting] <= SLACK]
    return min(allowed, key=chair.__getitem__) if allowed else min(settings, key=lost.__getitem__)


def choose_settings(table: CountTable) -> dict[str, str]:
    """The setting of every method that is best on validation images."""
    plain = {decoding: table["plain", "", "validation", decoding][0] for decoding in DECODING}
    chosen = {}
    for method in dict.fromkeys(key[0] for key in table):
        settings: dict[str, dict[str, Counts]] = {}
        for decoding in decodings_of(method):
            for setting, (counts, *_) in by_setting(table, method, "validation", decoding).items():
                settings.setdefault(setting, {})[decoding] = counts
        chosen[method] = best_setting(settings, plain)
    return chosen


# ------------------------------------------------------------------------------------------------------------ figures


def without_riskiest(captions: Sequence[str], risks: Sequence[Sequence[ObjectRisk]], by: str, coverage: float) -> list[str]:
    """Captions without this share of all their objects, the riskiest ones by one of the detectors."""
    order = sorted(((getattr(r, by), i, r.start, r.end) for i, each in enumerate(risks) for r in each), reverse=True)
    spans: list[list[tuple[int, int]]] = [[] for _ in captions]
    for _, i, start, end in order[: round(coverage * len(order))]:
        spans[i].append((start, end))
    return [without(caption, each) if each else caption for caption, each in zip(captions, spans, strict=True)]


def drop_figures(samples: Sequence[lab.Sample], plain: Result) -> tuple[dict[str, Figure], dict[str, list[list[float]]]]:
    """What dropping the riskiest objects removes: at `COVERAGE` as figures, and at all of `COVERAGES` as curves.

    A point of a curve has coverage, share of the false mentions that are removed, and change of recall.
    """
    before, images, figures, curves = count_captions(samples, plain.captions), len(samples), {}, {}
    once, by_detector = np.ones(images, np.int64), {}

    def removed(counts: Counts, name: str, drawn: NDArray[np.int64]) -> float:
        return float(1 - (counts[name] @ drawn) / max(1e-12, before[name] @ drawn))

    def recall_change(counts: Counts, drawn: NDArray[np.int64]) -> float:
        return ratio(counts, "recall", drawn) - ratio(before, "recall", drawn)

    for by in ("drop", "text_only_drop"):
        after = {c: count_captions(samples, without_riskiest(plain.captions, plain.risks, by, c)) for c in COVERAGES}
        curves[by] = [[c, removed(counts, "false", once), recall_change(counts, once)] for c, counts in after.items()]
        figures[f"{by}_false_removed_at_10"] = over_images(images, functools.partial(removed, after[COVERAGE], "false"))
        figures[f"{by}_mentions_removed_at_10"] = over_images(images, functools.partial(removed, after[COVERAGE], "mentions"))
        figures[f"{by}_recall_change_at_10"] = over_images(images, functools.partial(recall_change, after[COVERAGE]))
        by_detector[by] = after

    def lead(drawn: NDArray[np.int64]) -> float:
        ours, text_only = ([removed(each, "false", drawn) for each in after.values()] for after in by_detector.values())
        return float(np.subtract(ours, text_only).min())

    figures["drop_ahead_of_text_only_drop"] = over_images(images, lead)  # at the coverage where it is least
    return figures, curves


def answer_figures(result: Result, plain: Result, samples: Sequence[lab.Sample]) -> dict[str, Figure]:
    """Figures of yes/no answers, and the share that differs from plain's."""
    labels = ["yes" if turn.answer.startswith("Yes") else "no" for sample in samples for turn in questions(sample)]
    images = [sample.id for sample in samples for _ in range(QUESTIONS)]
    answers, before = ([answer.strip(" .").lower() for answer in each.captions] for each in (result, plain))
    figures = pope_figures(labels, answers, images)
    changed = np.array([a != b for a, b in zip(answers, before, strict=True)], float).reshape(-1, QUESTIONS).mean(1)
    return {
        **{f"yes_no_{key}": figures[key] for key in ("accuracy", "mcc", "yes_rate")},
        "yes_no_changed": over_images(len(changed), lambda drawn: float(np.average(changed, weights=drawn))),
    }


def passes_by_method(results: Mapping[Job, Result], split: str, decoding: str) -> dict[tuple[str, str], list[int]]:
    """Rows that went through the decoder, by method and setting, one number per seed."""
    passes: dict[tuple[str, str], list[int]] = {}
    for job, result in results.items():
        if (job.split, job.decoding, job.questions) == (split, decoding, False):
            passes.setdefault((job.method, job.setting), []).append(result.passes)
    return passes


def method_figures(
    results: Mapping[Job, Result], table: CountTable, chosen: Mapping[str, str], split: str, decoding: str
) -> dict[str, Figure]:
    """All figures of one split and decoding, without their endings; ``table`` is that of the ``results``."""
    figures: dict[str, Figure] = {}
    curves = {method: by_setting(table, method, split, decoding) for method in chosen}
    plain = curves["plain"][""]
    passes = passes_by_method(results, split, decoding)
    for method, setting in chosen.items():
        if setting not in curves[method]:
            continue
        counts = curves[method][setting]
        figures |= {f"{method}_{key}": each for key, each in caption_figures(add_counts(counts)).items()}
        if method == "plain":
            continue
        against = compare(add_counts(counts), add_counts(plain[: len(counts)]))
        figures |= {f"{method}_{key}": each for key, each in against.items()}
        if spent := passes.get((method, setting)):
            figures[f"{method}_passes_ratio"] = figure(sum(spent) / sum(passes["plain", ""][: len(counts)]))
        for other, settings in curves.items():
            if other not in ("plain", method) and (method in OURS or other == "truncated") and settings:
                seeds = min(len(counts), *map(len, settings.values()))
                curve = [add_counts(each[:seeds]) for each in (plain, *settings.values())]
                figures[f"{method}_vs_{other}"] = difference_at_equal_recall(add_counts(counts[:seeds]), curve)
    return figures


def time_figures(chosen: Mapping[str, str], decodings: Sequence[str], pairs: int) -> dict[str, Figure]:
    """The overhead of every method, with its chosen setting, for a batch of eight."""
    guard = lab_guard()
    samples = lab.samples("test", 8, SEED)
    inputs = encode(guard.model, guard.processor, [s.image for s in samples], [s.prompt for s in samples]).inputs
    writers = {method: methods()[method][setting] for method, setting in chosen.items() if method in methods()}
    writers["drop"] = of_policy(load_policy("drop"))
    figures = {}
    for method, writer in writers.items():
        for decoding in set(decodings_of(method)) & set(decodings):
            torch.manual_seed(SEED)
            plain, other = (functools.partial(each, inputs, DECODING[decoding]) for each in (writers["plain"], writer))
            other()
            figures[f"{method}_time_ratio_{decoding}"] = time_ratio(plain, other, pairs)
    return figures


# --------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Plan:
    """The extent of an evaluation: methods by name, decodings and test splits, and the number of images of each split."""

    names: Sequence[str]
    decodings: Sequence[str]
    splits: Mapping[str, str]
    images: int
    quick: bool

    def all_settings(self) -> list[Job]:
        """Validation captions by every setting of every method."""
        return [
            Job(name, setting, "validation", VALIDATION_IMAGES, decoding)
            for name in self.names
            for setting in methods()[name]
            for decoding in decodings_of(name)
        ]

    def test_captions(self, chosen: Mapping[str, str]) -> list[Job]:
        """Test captions with the chosen settings, greedily with the others, too, and answers to questions."""
        captions = [
            Job(name, setting, split, self.images, decoding, seed)
            for split in self.splits
            for name in self.names
            for decoding in decodings_of(name)
            if decoding in self.decodings
            for setting in methods()[name]
            if setting == chosen[name] or (decoding == "greedy" and not self.quick)
            for seed in range(SAMPLED_SEEDS if decoding == "sampled" and name in FIVE_SEEDS else 1)
        ]
        return captions + [self.answers(name, chosen) for name in self.names]

    def answers(self, name: str, chosen: Mapping[str, str]) -> Job:
        """Answers to questions about test images."""
        return Job(name, chosen[name], "test", self.images, "greedy", questions=True)


def recall_and_chair(
    table: CountTable, chosen: Mapping[str, str], split: str, images: int
) -> dict[str, dict[str, list[float]]]:
    """For the plot: method -> setting -> recall and CHAIR_i of greedy captions."""
    once = np.ones(images, np.int64)
    return {
        name: {
            setting: [ratio(counts, "recall", once), ratio(counts, "chair_i", once)]
            for setting, (counts, *_) in by_setting(table, name, split, "greedy").items()
        }
        for name in chosen
    }


def draw(path: Path, curves: Mapping[str, Any], coverage: Mapping[str, Any], chosen: Mapping[str, str]) -> None:
    """CHAIR_i against recall for all methods and settings, and what dropping removes; one row per split."""
    plot = Plot(figsize=(11, 8.5), layout="constrained")
    for (split, by_method), row in zip(curves.items(), plot.subplots(len(curves), 2, squeeze=False), strict=True):
        row[0].set_prop_cycle(color=colormaps["tab20"].colors)  # more methods than the usual ten colours
        for method, points in by_method.items():
            (line,) = row[0].plot(
                *zip(*sorted(points.values()), strict=True), "o-", markersize=3, linewidth=1, label=method.replace("_", " ")
            )
            if chosen[method] in points:
                row[0].plot(*points[chosen[method]], "o", markersize=8, color=line.get_color(), markerfacecolor="none")
        row[0].set(xlabel="recall", ylabel="CHAIR_i", title=f"{split}, greedy (ring: setting chosen on validation)")
        row[0].legend(fontsize=7)
        for by, points in coverage[split].items():
            share, removed, _ = zip(*points, strict=True)
            row[1].plot([0, *share], [0, *removed], "o-", markersize=3, label=by.replace("_", " "))
        row[1].set(xlabel="share of objects dropped", ylabel="share of false mentions removed", title=f"{split}, greedy")
        row[1].set_ylim(0, 1)
        row[1].legend()
    plot.savefig(path, dpi=110, metadata={"Software": None})


def renew_times(out: Path, quick: bool) -> None:
    """Measure the time ratios of a result file again; all else stays as the file has it."""
    result = json.loads(out.read_text(encoding="utf-8"))
    meta = {key: result["meta"][key] for key in ("quick", "seed", "chosen", "curves", "coverage")}
    figures = result["figures"] | time_figures(meta["chosen"], list(DECODING), 1 if quick else PAIRS)
    write(out, with_issue_keys(figures, ISSUE_KEYS), ids=result["meta"]["image_ids"], **meta)


def plan(quick: bool, only: str) -> Plan:
    """The extent of an evaluation. Raises `typer.BadParameter` for unknown methods."""
    known: Mapping[str, Mapping[str, Callable]] = methods()
    if unknown := sorted(set(only.split(",")) - {"", *known}):
        raise typer.BadParameter(f"Unknown method {unknown[0]!r}; expected some of: {', '.join(known)}.")
    wanted = only.split(",") if only else QUICK_METHODS if quick else known
    names = [name for name in known if name == "plain" or name in wanted]
    if quick:
        return Plan(names, ["greedy"], {"test": ""}, QUICK_IMAGES, True)
    return Plan(names, list(DECODING), SPLITS, IMAGES, False)


def main(
    out: Out,
    quick: Quick = False,
    only: Annotated[str, typer.Option("--methods", help="Names, with commas; by default all.")] = "",
    workers: Annotated[int, typer.Option(help="Processes that write captions.")] = 2,
    times: Annotated[bool, typer.Option("--times", help="Only the time ratios anew, others as the file has them.")] = False,
) -> None:
    """Measure every decoding method, and draw the curves beside the JSON file."""
    if times:
        renew_times(out, quick)
        return
    extent = plan(quick, only)
    if quick:
        every = methods() | cutters()
        chosen = {name: next(iter(every[name])) for name in every if name in (*extent.names, *cutters())}
    else:
        chosen = choose_settings(tabulate(run_all(extent.all_settings(), workers, "choosing settings")))
    results = run_all(extent.test_captions(chosen), workers, "writing captions")
    table = tabulate(results)
    figures: dict[str, Figure] = {}
    curves: dict[str, Any] = {}
    coverage: dict[str, Any] = {}
    for split, ending in extent.splits.items():
        samples = lab.samples(split, extent.images, SEED)
        for decoding in extent.decodings:
            dropped, lines = drop_figures(samples, results[Job("plain", "", split, extent.images, decoding)])
            measured = method_figures(results, table, chosen, split, decoding) | dropped
            figures |= {f"{key}_{decoding}{ending}": each for key, each in measured.items()}
            if decoding == "greedy":
                coverage[split] = lines
        curves[split] = recall_and_chair(table, chosen, split, extent.images)
    samples = lab.samples("test", extent.images, SEED)
    plain = results[extent.answers("plain", chosen)]
    for name in extent.names:
        answers = answer_figures(results[extent.answers(name, chosen)], plain, samples)
        figures |= {f"{name}_{key}": each for key, each in answers.items()}
    figures |= time_figures({name: chosen[name] for name in extent.names}, extent.decodings, 1 if quick else PAIRS)
    ids = [sample.id for split in extent.splits for sample in lab.samples(split, extent.images, SEED)]
    draw(out.with_suffix(".png"), curves, coverage, chosen)
    write(out, with_issue_keys(figures, ISSUE_KEYS), quick, ids, seed=SEED, chosen=chosen, curves=curves, coverage=coverage)


if __name__ == "__main__":
    typer.run(main)
