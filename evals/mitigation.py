"""Mitigation: do the policies make captions truer at the same recall, and with what overhead? All methods on the same images.

A *decoding method* has settings (a strength, a threshold). One setting is chosen on validation images, for all methods by one
rule: the least CHAIR_i, greedy and sampled captions together, among those that lose at most a point of recall against plain
in either. Test captions are written with the chosen setting; greedily with the others, too, for the curves.

``{method}_{figure}_{greedy|sampled}{|_shifted}``: ``chair_i``, ``chair_s``, ``recall``, ``f1``, ``mentions`` and ``words`` per
caption; ``misplaced``, mentions of objects that are in the image but not at the location that is named, which CHAIR does not
count, and ``wrong``, these and the false ones. Against plain, on the same images: ``chair_i_reduction``, ``wrong_reduction``
and ``words_change``, relative; ``recall_change``, a difference of rates; ``passes_ratio``, of rows that went through the
decoder; ``time_ratio``, interleaved. ``{method}_vs_{other}``: the difference in CHAIR_i at equal recall; below 0 is better. The
other may take any setting, or a mean of two, that keeps as much recall. ``vs_frontier``: the other is the best of all that
needs neither image nor gaze heads (`TRIVIAL`: a blind bonus on the full stop, truncation, text-only drop, random heads), and
``under_frontier`` is 1 where the difference is below 0 with confidence, Holm-corrected over the policies. ``drop_*_at_10``:
when the tenth of objects with the greatest risk is cut. ``yes_no_*``: POPE-form questions, greedily. With --quick:
`QUICK_METHODS` on a few test images, greedily, with default settings; the frontier is then the full stop and truncation alone.

The captions are written by worker processes; times are taken when they are done.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from evals import plots
from evals.caption_counts import (
    Counts,
    add_counts,
    caption_figures,
    compare,
    count_captions,
    difference_at_equal_recall,
    frontier_figures,
    ratio,
)
from evals.caption_jobs import SEED, Job, ObjectRisk, Result, run_all
from evals.common import DECODING, Artifacts, Dtype, Figure, Lab, Model, Out, Quick, figure, over_images, with_issue_keys, write
from evals.counting import pope_figures
from evals.decoding_methods import POLICIES, TRIVIAL, cutters, methods, of_policy, refused
from evals.guards import Setup, fit_controls, lab_guard
from evals.subject import Chosen, subject
from evals.timing import time_ratio
from gazeguard.claims.removal import without
from gazeguard.lab.worlds import QUESTIONS, World, world
from gazeguard.policy import load_policy
from gazeguard.vision.encoding import encode

SLACK = 0.01  # of recall, that the choice of a setting may cost
COVERAGES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4)
COVERAGE = 0.1  # the one that is a figure
SEVERAL_SEEDS = ("plain", "truncated", "drop", "text_only_drop", "rerank", "rewind", "rerank_rewind")
QUICK_METHODS = ("plain", "stop_bonus", "rerank", "rewind", "rewind_verify")
FEW_METHODS = ("plain", "stop_bonus", "rerank", "rewind", "random_rerank", "random_rewind")
# The figures that issues ask for without an ending: lab test, greedy; and those that begin with the lab's name.
PLAIN_KEYS = {
    **dict.fromkeys(("rerank", "rewind"), ("chair_i_reduction", "recall_change", "time_ratio")),
    "rewind_verify": ("chair_i_reduction", "recall_change"),
    "drop": ("false_removed_at_10", "recall_change_at_10"),
    "text_only_drop": ("false_removed_at_10", "recall_change_at_10"),
}
ISSUE_KEYS = {f"{method}_{key}": f"{method}_{key}_greedy" for method, keys in PLAIN_KEYS.items() for key in keys}
LAB_KEYS = ("rewind_chair_i_reduction", "rewind_recall_change", "rerank_under_frontier", "rewind_under_frontier")

CountTable = dict[tuple[str, str, str, str], list[Counts]]  # method, setting, split, decoding -> one per seed


@dataclass(frozen=True)
class Extent:
    """How much is measured in a laboratory.

    images, validation: images of each test split, and of the validation split, on which settings are chosen
    seeds:    of sampled captions, for `SEVERAL_SEEDS`
    splits:   test splits with the ending of their figures
    names:    methods; all if empty
    controls: greedy and as many sampled captions that the text-only and the random control are fitted to
    pairs:    of interleaved runs, for a time ratio; 0 takes no times (`evals.cost` does)
    decodings
    """

    images: int
    validation: int
    seeds: int
    splits: Mapping[str, str]
    names: Sequence[str]
    controls: int
    pairs: int
    decodings: Sequence[str] = tuple(DECODING)


EXTENTS = {
    "tiny": Extent(120, 48, 2, {"test": "", "shifted": "_shifted"}, (), 100, 9),
    "scenes": Extent(100, 24, 1, {"test": ""}, FEW_METHODS, 50, 0, ("greedy",)),
}
QUICK = {
    "tiny": Extent(8, 0, 1, {"test": ""}, QUICK_METHODS, 0, 1, ("greedy",)),
    "scenes": Extent(3, 0, 1, {"test": ""}, QUICK_METHODS, 0, 0, ("greedy",)),
}


# ------------------------------------------------------------------------------------------------- choice of settings


def tabulate(results: Mapping[Job, Result]) -> CountTable:
    """The counts of all captions that were written, and of those that were cut."""
    table: CountTable = {}
    for job, result in results.items():
        if job.questions:
            continue
        shown = world(job.setup.chosen.lab)
        samples = shown.samples(job.split, job.count, SEED)
        for (method, setting), captions in {(job.method, job.setting): result.captions, **result.cut}.items():
            table.setdefault((method, setting, job.split, job.decoding), []).append(count_captions(shown, samples, captions))
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


def choose_settings(table: CountTable, decodings: Sequence[str]) -> dict[str, str]:
    """The setting of every method that is best on validation images."""
    plain = {decoding: table["plain", "", "validation", decoding][0] for decoding in decodings}
    chosen = {}
    for method in dict.fromkeys(key[0] for key in table):
        settings: dict[str, dict[str, Counts]] = {}
        for decoding in (each for each in decodings_of(method) if each in decodings):
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


def drop_figures(shown: World, samples: Sequence[Any], plain: Result) -> tuple[dict[str, Figure], dict[str, list[list[float]]]]:
    """What dropping the riskiest objects removes: at `COVERAGE` as figures, and at all of `COVERAGES` as curves.

    A point of a curve has coverage, share of the false mentions that are removed, and change of recall.
    """
    before, images, figures, curves = count_captions(shown, samples, plain.captions), len(samples), {}, {}
    once, by_detector = np.ones(images, np.int64), {}

    def removed(counts: Counts, name: str, drawn: NDArray[np.int64]) -> float:
        return float(1 - (counts[name] @ drawn) / max(1e-12, before[name] @ drawn))

    def recall_change(counts: Counts, drawn: NDArray[np.int64]) -> float:
        return ratio(counts, "recall", drawn) - ratio(before, "recall", drawn)

    for by in ("drop", "text_only_drop"):
        after = {c: count_captions(shown, samples, without_riskiest(plain.captions, plain.risks, by, c)) for c in COVERAGES}
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


def answer_figures(result: Result, plain: Result, shown: World, samples: Sequence[Any]) -> dict[str, Figure]:
    """Figures of yes/no answers, and the share that differs from plain's."""
    labels = ["yes" if question.yes else "no" for sample in samples for question in shown.questions(sample)]
    images = [sample.id for sample in samples for _ in range(QUESTIONS)]
    answers, before = ([answer.strip().rstrip(".").lower() for answer in each.captions] for each in (result, plain))
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
            if other not in ("plain", method) and (method in POLICIES or other == "truncated") and settings:
                seeds = min(len(counts), *map(len, settings.values()))
                curve = [add_counts(each[:seeds]) for each in (plain, *settings.values())]
                figures[f"{method}_vs_{other}"] = difference_at_equal_recall(add_counts(counts[:seeds]), curve)
    trivial = [counts[0] for method in TRIVIAL for counts in curves.get(method, {}).values()]
    ours = {
        method: curves[method][chosen[method]][0] for method in POLICIES if chosen.get(method, "-") in curves.get(method, {})
    }
    return figures | frontier_figures(ours, trivial)


def time_figures(setup: Setup, chosen: Mapping[str, str], decodings: Sequence[str], pairs: int) -> dict[str, Figure]:
    """The overhead of every method, with its chosen setting, for a batch of eight."""
    guard = lab_guard(setup.chosen)
    samples = world(setup.chosen.lab).samples("test", 8, SEED)
    inputs = encode(guard.model, guard.processor, [s.image for s in samples], [s.prompt for s in samples]).inputs
    known = methods(setup)
    writers = {method: known[method][setting] for method, setting in chosen.items() if method in known}
    writers["drop"] = of_policy(load_policy("drop"), functools.partial(lab_guard, setup.chosen))
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
    """What is written: the extent, the methods that are compared, and what is measured."""

    extent: Extent
    names: Sequence[str]
    setup: Setup
    quick: bool

    def settings(self, name: str) -> list[str]:
        """The settings of a method."""
        return list(methods(self.setup)[name])

    def all_settings(self) -> list[Job]:
        """Validation captions by every setting of every method that has a choice; those of the frontier are all taken."""
        return [
            Job(name, setting, "validation", self.extent.validation, decoding, setup=self.setup)
            for name in self.names
            if name == "plain" or (name not in TRIVIAL and len(self.settings(name)) > 1)
            for setting in self.settings(name)
            for decoding in decodings_of(name)
            if decoding in self.extent.decodings
        ]

    def choose(self, workers: int) -> dict[str, str]:
        """The setting of every method: chosen on validation captions, or the default one."""
        every = {name: self.settings(name) for name in self.names} | {n: list(each) for n, each in cutters(self.setup).items()}
        chosen = {name: settings[0] for name, settings in every.items()}
        if not self.quick:
            tried = tabulate(run_all(self.all_settings(), workers, "choosing settings"))
            chosen |= choose_settings(tried, self.extent.decodings)
        return {name: setting for name, setting in chosen.items() if name != "random_drop"}

    def test_captions(self, chosen: Mapping[str, str]) -> list[Job]:
        """Test captions with the chosen settings, greedily with the others, too, and answers to questions."""
        extent = self.extent
        captions = [
            Job(name, setting, split, extent.images, decoding, seed, setup=self.setup)
            for split in extent.splits
            for name in self.names
            for decoding in decodings_of(name)
            if decoding in extent.decodings
            for setting in self.settings(name)
            if setting == chosen[name] or (decoding == "greedy" and (not self.quick or name in TRIVIAL))
            for seed in range(extent.seeds if decoding == "sampled" and name in SEVERAL_SEEDS else 1)
        ]
        return captions + [self.answers(name, chosen) for name in self.names if name == "plain" or name not in TRIVIAL]

    def answers(self, name: str, chosen: Mapping[str, str]) -> Job:
        """Answers to questions about test images."""
        return Job(name, chosen[name], "test", self.extent.images, "greedy", questions=True, setup=self.setup)


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
        for name in (*chosen, "random_drop")
    }


def draw(path: Path, curves: Mapping[str, Any], coverage: Mapping[str, Any], chosen: Mapping[str, str]) -> None:
    """CHAIR_i against recall for the policies and the trivial frontier, and what dropping removes, on the test split."""
    plot, (left, right) = plots.axes_of(10.5, 4.4, 2)
    by_method = curves["test"]
    trivial = sorted(point for name in TRIVIAL for point in by_method.get(name, {}).values())
    frontier = [min(chair for recall, chair in trivial if recall >= least) for least, _ in trivial]
    left.fill_between([recall for recall, _ in trivial], frontier, 1, color="0.93", linewidth=0)
    plots.line(left, [recall for recall, _ in trivial], frontier, "trivial frontier", 6, False)
    for number, name in enumerate(name for name in ("rewind", "rerank", "drop") if by_method.get(name)):
        points = sorted(by_method[name].values())
        plots.line(left, *zip(*points, strict=True), name, number, True, marker="o", markersize=4)
        left.plot(*by_method[name][chosen[name]], "o", markersize=9, color=plots.COLOURS[number], markerfacecolor="none")
    for number, name in enumerate(("stop_bonus", "text_only_drop"), 3):
        if points := sorted(by_method.get(name, {}).values()):
            plots.line(left, *zip(*points, strict=True), name.replace("_", " "), number, False)
    plots.shares(left, "x")
    highest = max(chair for points in by_method.values() for _, chair in points.values())
    left.set_ylim(0, min(1.0, 1.3 * highest))
    left.set(xlabel="recall", ylabel="CHAIR_i", title="test, greedy (ring: setting chosen on validation)")
    for by, points in coverage.get("test", {}).items():
        share, removed, _ = zip(*points, strict=True)
        name = "detector" if by == "drop" else "text alone"
        plots.line(right, [0, *share], [0, *removed], name, 0 if by == "drop" else 4, by == "drop")
    right.plot([0, 1], [0, 1], color=plots.GREY, linestyle=":", linewidth=1)
    plots.shares(right)
    right.set(
        xlabel="share of objects dropped", ylabel="share of false mentions removed", title="test, greedy (dotted: chance)"
    )
    plots.save(plot, path)


def renew_times(out: Path, setup: Setup, quick: bool, pairs: int) -> None:
    """Measure the time ratios of a result file again; all else stays as the file has it."""
    result = json.loads(out.read_text(encoding="utf-8"))
    meta = {key: value for key, value in result["meta"].items() if key in KEPT_META}
    timed = {name: setting for name, setting in meta["chosen"].items() if name not in ("random_rewind", "random_rerank")}
    figures = result["figures"] | time_figures(setup, timed, ("greedy",) if quick else list(DECODING), pairs)
    keys = issue_keys(setup.chosen)
    write(out, with_issue_keys(figures, keys), ids=result["meta"]["image_ids"], checkpoint=subject(setup.chosen).folder, **meta)


KEPT_META = ("quick", "seed", "chosen", "curves", "coverage", "refused", "lab", "model", "artifacts", "dtype", "command")


def issue_keys(chosen: Chosen) -> dict[str, str]:
    """Key of an issue -> key of the evaluation."""
    return ISSUE_KEYS | {chosen.prefix + key: f"{key}_greedy" for key in LAB_KEYS}


def plan(setup: Setup, quick: bool, only: str) -> Plan:
    """What is measured. Raises `typer.BadParameter` for unknown methods."""
    known: Mapping[str, Mapping[str, Callable]] = methods(setup)
    if unknown := sorted(set(only.split(",")) - {"", *known}):
        raise typer.BadParameter(f"Unknown method {unknown[0]!r}; expected some of: {', '.join(known)}.")
    extent = (QUICK if quick else EXTENTS)[setup.chosen.lab]
    wanted = only.split(",") if only else extent.names or known
    without_random = () if setup.controls or not quick else ("random_rerank", "random_rewind")
    left_out = {*refused(setup), *without_random}
    return Plan(extent, [n for n in known if n == "plain" or (n in wanted and n not in left_out)], setup, quick)


def measure(of: Plan, workers: int) -> tuple[dict[str, Figure], dict[str, Any]]:
    """All figures, and what the result file says beside them."""
    chosen = of.choose(workers)
    results = run_all(of.test_captions(chosen), workers, "writing captions")
    table, extent, shown = tabulate(results), of.extent, world(of.setup.chosen.lab)
    figures: dict[str, Figure] = {}
    curves: dict[str, Any] = {}
    coverage: dict[str, Any] = {}
    for split, ending in extent.splits.items():
        samples = shown.samples(split, extent.images, SEED)
        for decoding in extent.decodings:
            plain = results[Job("plain", "", split, extent.images, decoding, setup=of.setup)]
            measured = method_figures(results, table, chosen, split, decoding)
            if any(plain.risks):
                dropped, lines = drop_figures(shown, samples, plain)
                measured |= dropped
                coverage |= {split: lines} if decoding == "greedy" else {}
            figures |= {f"{key}_{decoding}{ending}": each for key, each in measured.items()}
        curves[split] = recall_and_chair(table, chosen, split, extent.images)
    samples = shown.samples("test", extent.images, SEED)
    for name in of.names:
        if (job := of.answers(name, chosen)) in results:
            answers = answer_figures(results[job], results[of.answers("plain", chosen)], shown, samples)
            figures |= {f"{name}_{key}": each for key, each in answers.items()}
    ids = [sample.id for split in extent.splits for sample in shown.samples(split, extent.images, SEED)]
    return figures, {"chosen": chosen, "curves": curves, "coverage": coverage, "image_ids": ids}


def main(
    out: Out,
    lab: Lab = "tiny",
    model: Model = None,
    artifacts: Artifacts = None,
    dtype: Dtype = "auto",
    quick: Quick = False,
    only: Annotated[str, typer.Option("--methods", help="Names, with commas; by default all that the lab's extent has.")] = "",
    workers: Annotated[int, typer.Option(help="Processes that write captions; with --quick one.")] = 2,
    times: Annotated[bool, typer.Option("--times", help="Only the time ratios anew, others as the file has them.")] = False,
) -> None:
    """Measure every decoding method, and draw the curves beside the JSON file."""
    setup, extent = Setup(Chosen(lab, model, artifacts, dtype)), (QUICK if quick else EXTENTS)[lab]
    if times:
        renew_times(out, setup, quick, extent.pairs)
        return
    with tempfile.TemporaryDirectory() as folder:
        if not quick:
            setup = fit_controls(setup.chosen, extent.controls, Path(folder))
        of = plan(setup, quick, only)
        figures, meta = measure(of, 1 if quick else workers)
        timed = {name: meta["chosen"][name] for name in of.names if name not in ("random_rewind", "random_rerank")}
        figures |= time_figures(setup, timed, extent.decodings, extent.pairs) if extent.pairs else {}
    for policy in refused(setup):  # not recommended on this model, whatever its captions would be
        figures[f"{policy}_under_frontier_greedy"] = figure(0.0)
    draw(out.with_suffix(".png"), meta["curves"], meta["coverage"], meta["chosen"])
    measured, command = subject(setup.chosen), f"evals.mitigation{subject(setup.chosen).options()}"
    ids = meta.pop("image_ids")
    said = {**measured.meta(), "refused": refused(setup), "command": command}
    write(out, with_issue_keys(figures, issue_keys(setup.chosen)), quick, ids, measured.folder, seed=SEED, **said, **meta)


if __name__ == "__main__":
    typer.run(main)
