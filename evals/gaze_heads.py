"""Gaze heads of the lab models: attention on what is described, and descriptions of what attention is steered to.

Attention: mass on the described panel (fresh strips that discovery has not seen), the staircase of live narrations, and the
stability of the choice of heads. Steering: every panel of a strip as the target of "Describe a panel.", one object of a scene
as the target of "Name one object.", and a target that changes within one narration. Controls: ten layer-matched random sets of
heads, all heads at once, no steering at all. The sweeps over the number of heads and the strength are made on validation
drawings; everything else on test drawings.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr

from evals import gaze_plots, plots, scenes_gaze
from evals.common import Artifacts, Dtype, Lab, Model, Out, Quick, figure, over_images, rate, with_issue_keys, write
from evals.common import Figure as Value
from evals.subject import Chosen, Subject, subject
from gazeguard.attention.backbone import Head
from gazeguard.attention.steering import STRENGTH, Target
from gazeguard.claims.parse import chunk, things
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.heads.discovery import find_heads
from gazeguard.heads.pictographs import COLOURS
from gazeguard.heads.strips import MAX_PANELS, Strip, draw_strips
from gazeguard.lab.truth import mentions
from gazeguard.lab.world import NOUNS, Drawing, Sample, describe, samples
from gazeguard.vision.encoding import encode

SEED = 100
SETS = 10  # random head sets
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 36)
STRENGTHS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
EVERY = 14  # tokens between two targets of a schedule, chosen on validation from 10 to 20
Named = tuple[str, str]  # noun, colour or ""
OBJECT = rf"an? (small )?({'|'.join(COLOURS)}) ({'|'.join(NOUNS)})"
SENTENCE = re.compile(rf"There is {OBJECT}((, {OBJECT})* and {OBJECT})?\.")  # as the lab's captions describe a panel


def first_nouns(strip: Strip) -> Strip:
    """The same strip, where only the first noun of each panel counts as its description."""
    heads = [chunk(strip.narration[start:end])[0].head for start, end in strip.spans]
    spans = ((start + head.start, start + head.end) for (start, _), head in zip(strip.spans, heads, strict=True))
    return replace(strip, spans=tuple(spans))


def strips_of(split: str, n: int, seed: int) -> list[Sample]:
    """The first ``n`` strips of six panels of a split."""
    return [sample for sample in samples(split, 12 * n, seed, "strip") if sample.drawing.panels == MAX_PANELS][:n]


def named_objects(text: str) -> list[tuple[int, Named]]:
    """The objects that a text names: first character, noun and colour of each."""
    named = []
    for phrase in things(text):
        colour = next((word.text for word in phrase.attributes if word.text in COLOURS), "")
        named.append((phrase.start, (text[phrase.head.start : phrase.head.end], colour)))
    return named


def described_panels(drawing: Drawing, named: Sequence[Named]) -> NDArray[np.float64]:
    """(panels,) how many of the objects each panel has; one that no panel has in its colour counts where its noun is."""
    votes = np.zeros(drawing.panels)
    for noun, colour in named:
        holds = [[each.noun == noun and each.colour == colour for each in drawing.in_panel(p)] for p in range(len(votes))]
        names = [[each.noun == noun for each in drawing.in_panel(p)] for p in range(len(votes))]
        fits = np.array([any(each) for each in (holds if any(map(any, holds)) else names)], float)
        votes += fits / max(1.0, fits.sum())
    return votes


class SteeredModel:
    """Answers of a model whose attention is steered by chosen heads."""

    def __init__(self, model: Any, processor: Any, heads: GazeHeads) -> None:
        self.model, self.processor, self.heads = model, processor, heads

    def write(
        self,
        samples: Sequence[Sample],
        instruction: str,
        targets: Sequence[Target],
        heads: Sequence[Head],
        new: int,
        **steering: Any,
    ) -> list[Any]:
        """One greedy report per sample and target."""
        guard = GazeGuard(self.model, self.processor, heads=self.heads.with_heads(heads))
        reports = []
        for start in range(0, len(samples), 48):
            rows = samples[start : start + 48]
            batch = encode(self.model, self.processor, [sample.image for sample in rows], [instruction] * len(rows))
            with guard.steer(list(targets[start : start + 48]), **steering):
                sizes = [[sample.image.size] for sample in rows]
                guard.generate(**batch.inputs, max_new_tokens=new, do_sample=False, picture_sizes=sizes)
            reports += guard.reports
        return reports

    def panels(
        self, samples: Sequence[Sample], heads: Sequence[Head], steer: bool = True, **steering: Any
    ) -> NDArray[np.float64]:
        """(samples, panels, 2): two rates of "Describe a panel.".

        The answer describes the target and no other panel, in a sentence; and the answer is a sentence at all.
        """
        rows = [(sample, panel) for sample in samples for panel in range(MAX_PANELS)]
        targets = [sample.drawing.panel_box(panel) if steer else None for sample, panel in rows]
        reports = self.write([sample for sample, _ in rows], "Describe a panel.", targets, heads, 24, **steering)
        hits = []
        for (sample, panel), report in zip(rows, reports, strict=True):
            votes = described_panels(sample.drawing, [named for _, named in named_objects(report.caption)])
            formed = SENTENCE.fullmatch(report.caption) is not None
            fits = votes.max() > 0 and votes[panel] == votes.max() and (votes == votes.max()).sum() == 1
            hits.append((fits and formed, formed))
        return np.array(hits, float).reshape(len(samples), MAX_PANELS, 2)

    def boxes(self, samples: Sequence[Sample], heads: Sequence[Head], steer: bool = True) -> NDArray[np.float64]:
        """(samples,): whether "Name one object." is answered with the object whose box is the target."""
        wanted = [random.Random(sample.id).choice(sample.drawing.objects) for sample in samples]
        targets = [each.box if steer else None for each in wanted]
        reports = self.write(samples, "Name one object.", targets, heads, 12)
        named = [[noun for _, (noun, _) in named_objects(report.caption)][:1] for report in reports]
        return np.array([nouns == [each.noun] for nouns, each in zip(named, wanted, strict=True)], float)

    def schedule(self, samples: Sequence[Sample], heads: Sequence[Head]) -> tuple[NDArray[np.float64], ...]:
        """Per sample: Spearman of the scheduled and the described panels, windows that describe the target, windows in all.

        The target changes every `EVERY` tokens, in a random order of all panels; a window counts when it describes anything.
        """
        orders = [random.Random(sample.id).sample(range(MAX_PANELS), MAX_PANELS) for sample in samples]
        targets = [
            {window * EVERY: sample.drawing.panel_box(panel) for window, panel in enumerate(order)}
            for sample, order in zip(samples, orders, strict=True)
        ]
        reports = self.write(samples, "Describe the panels in any order.", targets, heads, MAX_PANELS * EVERY, prompt=False)
        rows = []
        for sample, order, report in zip(samples, orders, reports, strict=True):
            windows: list[list[Named]] = [[] for _ in order]
            for start, named in named_objects(report.caption):
                token = int(np.searchsorted(report.trace.offsets[:, 1], start, side="right"))
                windows[token // EVERY].append(named)
            votes = [described_panels(sample.drawing, named) for named in windows]
            pairs = [(panel, int(vote.argmax())) for panel, vote in zip(order, votes, strict=True) if vote.max() > 0]
            scheduled, described = zip(*pairs, strict=True) if pairs else ((), ())
            varied = len(set(described)) > 1 and len(pairs) > 2
            rho = spearmanr(scheduled, described).statistic if varied else 0.0  # one panel alone follows no schedule
            rows.append((rho, sum(a == b for a, b in pairs), len(pairs)))
        return tuple(np.array(column, float) for column in zip(*rows, strict=True))


@dataclass(frozen=True)
class Staircase:
    """One narration, token by token.

    attention: (T, all heads, panels)
    every:     (T,) the panel that is described, -1 for none; each token of a panel's description
    named:     the same for the tokens that name objects alone
    invented:  the same for the tokens that name objects which are not there
    since:     (T,) number of tokens since the sentence began
    """

    attention: NDArray[np.float64]
    every: NDArray[np.int64]
    named: NDArray[np.int64]
    invented: NDArray[np.int64]
    since: NDArray[np.int64]


def staircase(sample: Sample, report: Any) -> Staircase:
    """The staircase of a strip's narration, from a report with all heads recorded."""
    trace, drawing = report.trace, sample.drawing
    shares = np.stack([trace.grid.overlap(drawing.panel_box(p)) for p in range(drawing.panels)], axis=1)
    every, named, invented = (np.full(len(trace), -1) for _ in range(3))
    since = np.zeros(len(trace), int)
    false = {mention.phrase.start for mention in mentions(drawing, trace.text) if not mention.located}
    for panel, match in enumerate(list(re.finditer(r"In panel \w+ there is (.*?)\.", trace.text))[: drawing.panels]):
        whole = trace.tokens(*match.span(0))
        since[list(whole)] = np.arange(len(whole))
        every[list(trace.tokens(*match.span(1)))] = panel
        for phrase in things(trace.text):
            if match.start(1) <= phrase.start < match.end(1):
                rows = list(trace.tokens(phrase.start, phrase.end))
                named[rows] = panel
                invented[rows] = panel if phrase.start in false else -1
    return Staircase(trace.gaze @ shares, every, named, invented, since)


def live_and_true(
    model: Any, processor: Any, heads: GazeHeads, samples: Sequence[Sample]
) -> tuple[list[Staircase], list[Staircase]]:
    """The staircases of the model's own narrations, and of true ones, replayed."""
    guard = GazeGuard(model, processor, heads=heads.with_heads(heads.all_heads))
    live, true = [], []
    for start in range(0, len(samples), 8):
        rows = samples[start : start + 8]
        prompts = ["Describe all panels."] * len(rows)
        batch = encode(model, processor, [sample.image for sample in rows], prompts)
        guard.generate(**batch.inputs, max_new_tokens=160, do_sample=False, picture_sizes=[[s.image.size] for s in rows])
        live += [staircase(sample, report) for sample, report in zip(rows, guard.reports, strict=True)]
        truths = [describe(sample.drawing, random.Random(sample.id), honest=True) for sample in rows]
        reports = guard.check_all([sample.image for sample in rows], truths, prompts)
        true += [staircase(sample, report) for sample, report in zip(rows, reports, strict=True)]
    return live, true


def staircase_accuracy(
    staircases: Sequence[Staircase], columns: Sequence[int], rows: str = "named", shuffle: np.random.Generator | None = None
) -> Value:
    """Share of the rows whose strongest panel, over the heads ``columns``, is the one that is described."""
    hits, counts = [], []
    for each in staircases:
        described = getattr(each, rows)
        strongest = each.attention[:, list(columns)].mean(1).argmax(-1)
        names = np.arange(MAX_PANELS) if shuffle is None else shuffle.permutation(MAX_PANELS)
        hits.append((names[strongest] == described)[described >= 0].sum())
        counts.append((described >= 0).sum())
    return rate(hits, counts)


def mean_of(values: NDArray[np.float64]) -> Value:
    """The mean over images of (images, ...) numbers."""
    means = values.reshape(len(values), -1).mean(1)
    return over_images(len(means), lambda drawn: float((means * drawn).sum() / drawn.sum()))


def agreement(model: Any, processor: Any, kept: GazeHeads, counts: Sequence[int]) -> dict[int, float]:
    """Top-K overlap of the rankings of two disjoint halves of 2n strips, for each n."""
    overlaps = {}
    for n in counts:
        strips = draw_strips(2 * n, SEED + 1)
        halves = [find_heads(model, processor, strips[i * n : (i + 1) * n], progress=False).ranking() for i in (0, 1)]
        k = len(kept.heads)
        overlaps[n] = len(set(halves[0][:k]) & set(halves[1][:k])) / k
    return overlaps


def attention_figures(model: Any, processor: Any, kept: GazeHeads, n: int) -> dict[str, Value]:
    """The scores of the kept heads on strips that discovery has not seen."""
    strips = draw_strips(n, SEED)
    few = min(n, 24)  # strips at once: a search stops when the ranking is stable, and here all are to count
    groups = [strips[start : start + few] for start in range(0, n, few)]
    found = [find_heads(model, processor, group, progress=False) for group in groups]
    found_nouns = [find_heads(model, processor, [first_nouns(strip) for strip in own], progress=False) for own in groups]

    def mean(field: str, heads: Sequence[Head], way: str = "narration", of: Sequence[GazeHeads] = found) -> NDArray[np.float64]:
        where = [kept.all_heads.index(head) for head in heads]
        return np.mean([np.array(getattr(own.score(way), field))[where] for own in of], axis=0)

    figures = {}
    for way, name in (("narration", ""), ("query", "_query")):
        mass, others = mean("mass", kept.heads, way), mean("mass", kept.others(), way)
        figures |= {
            f"gaze_head_mass{name}": figure(mass.mean()),
            f"least_gaze_head_mass{name}": figure(mass.min()),
            f"best_other_mass{name}": figure(others.max()),
        }
    same = [len(set(own.heads) & set(kept.heads)) / len(set(own.heads) | set(kept.heads)) for own in found]
    return figures | {
        "gaze_head_mass_nouns": figure(mean("mass", kept.heads, of=found_nouns).mean()),
        "best_other_mass_nouns": figure(mean("mass", kept.others(), of=found_nouns).max()),
        "gaze_head_selectivity": figure(mean("selectivity", kept.heads).mean()),
        "gaze_head_hit_rate": figure(mean("hit_rate", kept.heads).mean()),
        "shuffled_mass": figure(mean("shuffled_mass", kept.heads).mean()),
        "most_sink_mass": figure(mean("sink_mass", kept.all_heads, "query").max()),
        "chance": figure(1 / kept.panels),
        "usable": figure(not kept.unusable),
        "split_half": figure(np.mean([own.split_half for own in found])),
        "same_heads_as_kept": figure(np.mean(same)),
        "gaze_heads": figure(len(kept.heads)),
        "all_heads": figure(len(kept.all_heads)),
    }


@dataclass(frozen=True)
class Setup:
    """The heads, their controls, and the drawings of a run."""

    kept: GazeHeads
    controls: Sequence[Sequence[Head]]
    strips: Sequence[Sample]
    validation: Sequence[Sample]
    scenes: Sequence[Sample]


def measurements(model: Any, processor: Any, setup: Setup, quick: bool) -> dict[str, Any]:
    """The raw results of every experiment, by name."""
    kept, strips, scenes = setup.kept, setup.strips, setup.scenes
    steered = SteeredModel(model, processor, kept)

    def on_validation(heads: Sequence[Head], strength: float = STRENGTH) -> float:
        return float(steered.panels(setup.validation, heads, strength=strength)[..., 0].mean())

    jobs: dict[str, Callable[[], Any]] = {
        "panel_gaze": lambda: steered.panels(strips, kept.heads),
        "panel_unsteered": lambda: steered.panels(strips, kept.heads, steer=False),
        "panel_all": lambda: steered.panels(strips, kept.all_heads),
        "box_gaze": lambda: steered.boxes(scenes, kept.heads),
        "box_unsteered": lambda: steered.boxes(scenes, kept.heads, steer=False),
        "schedule": lambda: steered.schedule(strips, kept.heads),
        "schedule_random": lambda: steered.schedule(strips, setup.controls[0]),
        "staircases": lambda: live_and_true(model, processor, kept, strips),
        "agreement": lambda: agreement(model, processor, kept, (2, 4) if quick else (2, 4, 8, 16, 24)),
        "panel_random": lambda: [steered.panels(strips, heads)[..., 0] for heads in setup.controls],
        "box_random": lambda: [steered.boxes(scenes, heads) for heads in setup.controls],
        "counts": lambda: {k: on_validation(kept.ranking()[:k]) for k in (COUNTS[4:6] if quick else COUNTS)},
        "strengths": lambda: {b: on_validation(kept.heads, b) for b in (STRENGTHS[4:6] if quick else STRENGTHS)},
        "rankings": lambda: {
            f"{score}_{by}": steered.panels(strips, kept.ranking(score, by)[: len(kept.heads)])[..., 0]
            for score in ("narration", "query")
            for by in ("contrast", "mass", "selectivity")
        },
    }
    with torch.no_grad():
        results = {name: job() for name, job in track(jobs.items(), "measuring", console=Console(stderr=True))}
        some = 4 if quick else 40
        results["unchanged"] = unchanged(model, processor, kept, [*strips[:some], *scenes[:some]])
    return results


def steering_figures(results: dict[str, Any]) -> dict[str, Value]:
    """Panels, boxes and schedules: answers that follow the target."""
    random_panels, random_boxes = np.stack(results["panel_random"], 1), np.stack(results["box_random"], 1)
    rho, hits, windows = results["schedule"]
    return {
        "steer_panel_gaze": mean_of(results["panel_gaze"][..., 0]),
        "steer_panel_gaze_sentences": mean_of(results["panel_gaze"][..., 1]),
        "steer_panel_random_mean": mean_of(random_panels),
        "steer_panel_random_most": figure(random_panels.mean((0, 2)).max()),
        "steer_panel_all": mean_of(results["panel_all"][..., 0]),
        "steer_panel_all_sentences": mean_of(results["panel_all"][..., 1]),
        "steer_panel_unsteered": mean_of(results["panel_unsteered"][..., 0]),
        "steer_box_gaze": mean_of(results["box_gaze"]),
        "steer_box_random_mean": mean_of(random_boxes),
        "steer_box_random_most": figure(random_boxes.mean(0).max()),
        "steer_box_unsteered": mean_of(results["box_unsteered"]),
        "steer_schedule_spearman": mean_of(rho),
        "steer_schedule_match": rate(hits, windows),
        "steer_schedule_windows": mean_of(windows),
        "steer_schedule_spearman_random": mean_of(results["schedule_random"][0]),
    }


def staircase_figures(results: dict[str, Any], setup: Setup, rng: np.random.Generator) -> dict[str, Value]:
    """Share of the tokens at which the heads attend most to the panel that is described."""
    columns = [setup.kept.all_heads.index(head) for head in setup.kept.heads]
    random_columns = [[setup.kept.all_heads.index(head) for head in heads] for heads in setup.controls]
    live, true = results["staircases"]
    return {
        "staircase_accuracy": staircase_accuracy(true, columns),
        "staircase_accuracy_random_mean": figure(np.mean([staircase_accuracy(true, each)["value"] for each in random_columns])),
        "staircase_accuracy_shuffled": staircase_accuracy(true, columns, shuffle=rng),
        "staircase_accuracy_live": staircase_accuracy(live, columns),
        "staircase_accuracy_live_invented": staircase_accuracy(live, columns, "invented"),
        "staircase_accuracy_live_every_row": staircase_accuracy(live, columns, "every"),
    }


def sweeps_of(results: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """The curves and lists that stand in the file beside the figures."""
    columns = [setup.kept.all_heads.index(head) for head in setup.kept.heads]
    random_panels, random_boxes = np.stack(results["panel_random"], 1), np.stack(results["box_random"], 1)
    return {
        "steer_panel_by_k": results["counts"],
        "steer_panel_by_strength": results["strengths"],
        "steer_panel_by_panel": np.round(results["panel_gaze"][..., 0].mean(0), 4).tolist(),
        "steer_panel_random_sets": np.round(random_panels.mean((0, 2)), 4).tolist(),
        "steer_box_random_sets": np.round(random_boxes.mean(0), 4).tolist(),
        "agreement_by_strips": results["agreement"],
        "staircase_by_tokens_since_the_sentence_began": accuracy_by_tokens(results["staircases"][1], columns),
    }


def main(
    out: Out,
    lab: Lab = "tiny",
    model: Model = None,
    artifacts: Artifacts = None,
    dtype: Dtype = "auto",
    quick: Quick = False,
) -> None:
    """Measure the gaze heads of a lab's model or of one's own, and draw the sweeps beside the JSON file."""
    torch.manual_seed(SEED)
    measured = subject(Chosen(lab, model, artifacts, dtype))
    command = f"evals.gaze_heads{measured.options()}"
    if lab == "tiny":
        tiny(out, measured, quick, command)
        return
    figures, meta = scenes_gaze.measure(measured, scenes_gaze.QUICK if quick else scenes_gaze.FULL)
    figures = with_issue_keys(figures, measured.chosen.keyed(scenes_gaze.LAB_KEYS))
    write(out, figures, quick, meta.pop("image_ids"), measured.folder, seed=scenes_gaze.SEED, command=command, **meta)


def tiny(out: Path, measured: Subject, quick: bool, command: str) -> None:
    """The figures on the images of the tiny lab."""
    model, processor, kept = measured.model, measured.processor, measured.heads()
    strips, sets = (4, 3) if quick else (40, SETS)
    few = 4 if quick else 24
    test, validation = strips_of("test", strips, SEED), strips_of("validation", few, SEED)
    # With one object in a scene every answer is right, so that chance would be high: four at least.
    scenes = [s for s in samples("test", 8 * strips, SEED, "scene") if len(s.drawing.objects) >= 4][: 3 * strips]
    rng = np.random.default_rng(SEED)
    setup = Setup(kept, [kept.matched(rng) for _ in range(sets)], test, validation, scenes)
    figures = attention_figures(model, processor, kept, 4 if quick else 96)
    results = measurements(model, processor, setup, quick)
    figures |= steering_figures(results) | staircase_figures(results, setup, rng)
    figures |= {
        "best_k_on_validation": figure(max(results["counts"], key=results["counts"].get)),
        "best_strength_on_validation": figure(max(results["strengths"], key=results["strengths"].get)),
        "agreement_of_halves": figure(list(results["agreement"].values())[-1]),
        "unsteered_captions_unchanged": figure(results["unchanged"]),
        "distinct_matched_sets": figure(kept.distinct_matched_sets()),
    }
    figures |= {f"steer_panel_by_{name}": mean_of(hit) for name, hit in results["rankings"].items()}
    meta = {"model": type(model).__name__, "strength": STRENGTH, "heads": [list(head) for head in kept.heads]}
    meta |= {"command": command, **sweeps_of(results, setup)}
    write(out, figures, quick, [sample.id for sample in (*test, *scenes)], measured.folder, seed=SEED, **meta)
    plots.save(gaze_plots.sweeps(figures, meta), out.with_suffix(".png"))
    gaze_plots.save_map(kept, out.with_name(f"{out.stem}_map.png"))


def unchanged(model: Any, processor: Any, kept: GazeHeads, samples: Sequence[Sample]) -> float:
    """Share of captions that are the same to the token with and without a watch whose target is None."""
    guard = GazeGuard(model, processor, heads=kept.with_heads(kept.heads))
    same = 0
    for sample in samples:
        batch = encode(model, processor, [sample.image], [sample.prompt])
        options = {"max_new_tokens": 160, "do_sample": False}
        with guard.steer(None):
            watched = guard.generate(**batch.inputs, **options)
        same += torch.equal(watched, model.generate(**batch.inputs, **options))
    return same / len(samples)


def accuracy_by_tokens(staircases: Sequence[Staircase], columns: Sequence[int]) -> dict[int, float]:
    """Accuracy of the strongest panel by the number of tokens since the sentence about the panel began."""
    hit = np.concatenate([step.attention[:, list(columns)].mean(1).argmax(-1) == step.named for step in staircases])
    named = np.concatenate([step.named for step in staircases]) >= 0
    since = np.concatenate([step.since for step in staircases])
    return {int(n): round(float(hit[named & (since == n)].mean()), 4) for n in np.unique(since[named]) if n < 16}


if __name__ == "__main__":
    typer.run(main)
