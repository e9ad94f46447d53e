"""Do the lab's gaze heads look at what is described, and does the model describe what they are made to look at?

Looking: mass on the described panel (fresh strips that discovery has not seen), the staircase of live narrations, and how
stable the choice of heads is. Turning: every panel of a strip as the target of "Describe a panel.", every other thing of a
scene as the target of "Name one object.", and a target that changes within one narration. Controls: ten layer-matched
random sets of heads, all heads at once, no steering at all. The sweeps over the number of heads and the strength are made
on validation pictures; everything else on test pictures.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr

from evals.common import Figure as Value
from evals.common import Out, Quick, figure, over_images, rate, write
from gazeguard import lab
from gazeguard.artifacts import HEADS_FILE
from gazeguard.attention.backbone import Head
from gazeguard.attention.steering import STRENGTH, Target
from gazeguard.claims.parse import chunk, things
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.heads.discovery import find_heads
from gazeguard.heads.pictographs import COLOURS
from gazeguard.heads.plots import draw_heads
from gazeguard.heads.strips import MAX_PANELS, Strip, draw_strips
from gazeguard.lab.truth import mentions
from gazeguard.lab.world import NOUNS, Drawing, describe
from gazeguard.vision.encoding import encode

SEED = 100
SETS = 10  # random head sets
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 36)
STRENGTHS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
EVERY = 14  # tokens between two targets of a schedule, chosen on validation from 10 to 20
Found = tuple[str, str]  # noun, colour or ""
THING = rf"an? (small )?({'|'.join(COLOURS)}) ({'|'.join(NOUNS)})"
SENTENCE = re.compile(rf"There is {THING}((, {THING})* and {THING})?\.")  # what the lab's people say of a panel


def first_nouns(strip: Strip) -> Strip:
    """The same strip, where only the first noun of each panel counts as its words."""
    heads = [chunk(strip.narration[start:end])[0].head for start, end in strip.spans]
    spans = ((start + head.start, start + head.end) for (start, _), head in zip(strip.spans, heads, strict=True))
    return replace(strip, spans=tuple(spans))


def strips_of(split: str, n: int, seed: int) -> list[lab.Sample]:
    """The first ``n`` strips of six panels of a split."""
    return [sample for sample in lab.samples(split, 12 * n, seed, "strip") if sample.drawing.panels == MAX_PANELS][:n]


def said_in(text: str) -> list[tuple[int, Found]]:
    """The things that a text names: where each begins, its noun and its colour."""
    made = []
    for phrase in things(text):
        colour = next((word.text for word in phrase.attributes if word.text in COLOURS), "")
        made.append((phrase.start, (text[phrase.head.start : phrase.head.end], colour)))
    return made


def panels_told(picture: Drawing, found: Sequence[Found]) -> NDArray[np.float64]:
    """(panels,) how many of the things each panel holds; those that no panel holds as said count where the noun is."""
    votes = np.zeros(picture.panels)
    for noun, colour in found:
        holds = [[thing.noun == noun and thing.colour == colour for thing in picture.in_panel(p)] for p in range(len(votes))]
        names = [[thing.noun == noun for thing in picture.in_panel(p)] for p in range(len(votes))]
        fits = np.array([any(own) for own in (holds if any(map(any, holds)) else names)], float)
        votes += fits / max(1.0, fits.sum())
    return votes


class Steered:
    """Answers of a model whose chosen heads are turned."""

    def __init__(self, model: Any, processor: Any, heads: GazeHeads) -> None:
        self.model, self.processor, self.heads = model, processor, heads

    def write(
        self,
        samples: Sequence[lab.Sample],
        asked: str,
        targets: Sequence[Target],
        heads: Sequence[Head],
        new: int,
        **look: Any,
    ) -> list[Any]:
        """One greedy report per sample and target."""
        guard = GazeGuard(self.model, self.processor, heads=self.heads.with_heads(heads))
        reports = []
        for at in range(0, len(samples), 48):
            rows = samples[at : at + 48]
            batch = encode(self.model, self.processor, [sample.image for sample in rows], [asked] * len(rows))
            with guard.steer(list(targets[at : at + 48]), **look):
                sizes = [[sample.image.size] for sample in rows]
                guard.generate(**batch.inputs, max_new_tokens=new, do_sample=False, picture_sizes=sizes)
            reports += guard.reports
        return reports

    def panels(
        self, samples: Sequence[lab.Sample], heads: Sequence[Head], steer: bool = True, **look: Any
    ) -> NDArray[np.float64]:
        """(samples, panels, 2): whether "Describe a panel." is answered with the panel that is looked at, and no other, in a
        sentence; and whether the answer is a sentence at all.
        """
        rows = [(sample, panel) for sample in samples for panel in range(MAX_PANELS)]
        targets = [sample.drawing.panel_box(panel) if steer else None for sample, panel in rows]
        reports = self.write([sample for sample, _ in rows], "Describe a panel.", targets, heads, 24, **look)
        hits = []
        for (sample, panel), report in zip(rows, reports, strict=True):
            votes = panels_told(sample.drawing, [found for _, found in said_in(report.caption)])
            formed = SENTENCE.fullmatch(report.caption) is not None
            fits = votes.max() > 0 and votes[panel] == votes.max() and (votes == votes.max()).sum() == 1
            hits.append((fits and formed, formed))
        return np.array(hits, float).reshape(len(samples), MAX_PANELS, 2)

    def boxes(self, samples: Sequence[lab.Sample], heads: Sequence[Head], steer: bool = True) -> NDArray[np.float64]:
        """(samples,): whether "Name one object." is answered with the thing whose box is looked at."""
        wanted = [random.Random(sample.id).choice(sample.drawing.objects) for sample in samples]
        targets = [thing.box if steer else None for thing in wanted]
        reports = self.write(samples, "Name one object.", targets, heads, 12)
        named = [[noun for _, (noun, _) in said_in(report.caption)][:1] for report in reports]
        return np.array([nouns == [thing.noun] for nouns, thing in zip(named, wanted, strict=True)], float)

    def schedule(self, samples: Sequence[lab.Sample], heads: Sequence[Head]) -> tuple[NDArray[np.float64], ...]:
        """Per sample: Spearman of the scheduled and the described panels, windows that describe the target, windows in all.

        The target changes every `EVERY` tokens, in a random order of all panels; a window counts when it describes anything.
        """
        orders = [random.Random(sample.id).sample(range(MAX_PANELS), MAX_PANELS) for sample in samples]
        targets = [
            {window * EVERY: sample.drawing.panel_box(panel) for window, panel in enumerate(order)}
            for sample, order in zip(samples, orders, strict=True)
        ]
        asked = "Describe the panels in any order."
        reports = self.write(samples, asked, targets, heads, MAX_PANELS * EVERY, prompt=False)
        made = []
        for sample, order, report in zip(samples, orders, reports, strict=True):
            windows: list[list[Found]] = [[] for _ in order]
            for start, found in said_in(report.caption):
                token = int(np.searchsorted(report.trace.offsets[:, 1], start, side="right"))
                windows[token // EVERY].append(found)
            votes = [panels_told(sample.drawing, found) for found in windows]
            told = [(panel, int(vote.argmax())) for panel, vote in zip(order, votes, strict=True) if vote.max() > 0]
            scheduled, described = zip(*told, strict=True) if told else ((), ())
            varied = len(set(described)) > 1 and len(told) > 2
            rho = spearmanr(scheduled, described).statistic if varied else 0.0  # a narration that never moves follows nothing
            made.append((rho, sum(a == b for a, b in told), len(told)))
        return tuple(np.array(column, float) for column in zip(*made, strict=True))


@dataclass(frozen=True)
class Stairs:
    """One narration, token by token: attention (T, all heads, panels), and the panel that is described, -1 for none, by the
    rows that count: every row of what is said of a panel, the words that name things, and those that name invented things.
    ``since`` is how many tokens ago the sentence began.
    """

    looked: NDArray[np.float64]
    every: NDArray[np.int64]
    named: NDArray[np.int64]
    invented: NDArray[np.int64]
    since: NDArray[np.int64]


def stairs(sample: lab.Sample, report: Any) -> Stairs:
    """Of a report on a narration of a strip, watched by all heads."""
    trace, picture = report.trace, sample.drawing
    segment_mass = np.stack([trace.grid.overlap(picture.panel_box(p)) for p in range(picture.panels)], axis=1)
    every, named, invented = (np.full(len(trace), -1) for _ in range(3))
    since = np.zeros(len(trace), int)
    false = {mention.phrase.start for mention in mentions(picture, trace.text) if not mention.located}
    for panel, match in enumerate(list(re.finditer(r"In panel \w+ there is (.*?)\.", trace.text))[: picture.panels]):
        whole = trace.tokens(*match.span(0))
        since[list(whole)] = np.arange(len(whole))
        every[list(trace.tokens(*match.span(1)))] = panel
        for phrase in things(trace.text):
            if match.start(1) <= phrase.start < match.end(1):
                rows = list(trace.tokens(phrase.start, phrase.end))
                named[rows] = panel
                invented[rows] = panel if phrase.start in false else -1
    return Stairs(trace.gaze @ segment_mass, every, named, invented, since)


def told_and_true(
    model: Any, processor: Any, heads: GazeHeads, samples: Sequence[lab.Sample]
) -> tuple[list[Stairs], list[Stairs]]:
    """The stairs of the model's own narrations, and of true ones, replayed."""
    guard = GazeGuard(model, processor, heads=heads.with_heads(heads.all_heads))
    told, true = [], []
    for at in range(0, len(samples), 8):
        rows = samples[at : at + 8]
        asked = ["Describe all panels."] * len(rows)
        batch = encode(model, processor, [sample.image for sample in rows], asked)
        guard.generate(**batch.inputs, max_new_tokens=160, do_sample=False, picture_sizes=[[s.image.size] for s in rows])
        told += [stairs(sample, report) for sample, report in zip(rows, guard.reports, strict=True)]
        truths = [describe(sample.drawing, random.Random(sample.id), honest=True) for sample in rows]
        reports = guard.check_all([sample.image for sample in rows], truths, asked)
        true += [stairs(sample, report) for sample, report in zip(rows, reports, strict=True)]
    return told, true


def climbed(
    steps: Sequence[Stairs], columns: Sequence[int], rows: str = "named", shuffle: np.random.Generator | None = None
) -> Value:
    """Share of the rows whose strongest panel, over the heads ``columns``, is the one that is described."""
    hits, of = [], []
    for step in steps:
        said = getattr(step, rows)
        strongest = step.looked[:, list(columns)].mean(1).argmax(-1)
        names = np.arange(MAX_PANELS) if shuffle is None else shuffle.permutation(MAX_PANELS)
        hits.append((names[strongest] == said)[said >= 0].sum())
        of.append((said >= 0).sum())
    return rate(hits, of)


def mean_of(values: NDArray[np.float64]) -> Value:
    """The mean over images of (images, ...) numbers."""
    own = values.reshape(len(values), -1).mean(1)
    return over_images(len(own), lambda drawn: float((own * drawn).sum() / drawn.sum()))


def agreement(model: Any, processor: Any, kept: GazeHeads, counts: Sequence[int]) -> dict[int, float]:
    """Top-K overlap of the rankings of two disjoint halves of 2n strips, for each n."""
    made = {}
    for n in counts:
        strips = draw_strips(2 * n, SEED + 1)
        halves = [find_heads(model, processor, strips[i * n : (i + 1) * n], progress=False).ranking() for i in (0, 1)]
        k = len(kept.heads)
        made[n] = len(set(halves[0][:k]) & set(halves[1][:k])) / k
    return made


def looking(model: Any, processor: Any, kept: GazeHeads, n: int) -> dict[str, Value]:
    """What discovery says of the kept heads on strips that it has not seen."""
    strips = draw_strips(n, SEED)
    few = min(n, 24)  # strips at once: a search stops when it is sure, and here all are to count
    groups = [strips[at : at + few] for at in range(0, n, few)]
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
        "gaze_head_routing": figure(mean("hit_rate", kept.heads).mean()),
        "null_mass": figure(mean("shuffled_mass", kept.heads).mean()),
        "most_sink_mass": figure(mean("sinks", kept.all_heads, "query").max()),
        "chance": figure(1 / kept.panels),
        "usable": figure(not kept.unusable),
        "split_half": figure(np.mean([own.split_half for own in found])),
        "same_heads_as_kept": figure(np.mean(same)),
        "gaze_heads": figure(len(kept.heads)),
        "all_heads": figure(len(kept.all_heads)),
    }


def main(
    out: Out,
    quick: Quick = False,
    model_folder: Annotated[Path | None, typer.Option("--model", help="Another checkpoint than the one that ships.")] = None,
) -> None:
    """Measure the gaze heads, and draw the sweeps beside the JSON file."""
    model, processor = lab.load(model_folder)
    folder = model_folder or lab.checkpoint_path()
    file = folder / HEADS_FILE
    kept = GazeHeads.from_pretrained(file) if file.is_file() else find_heads(model, processor)
    kept.check_model(model)
    strips, sets = (4, 3) if quick else (40, SETS)
    few = 4 if quick else 24
    test, validation = strips_of("test", strips, SEED), strips_of("validation", few, SEED)
    # With one thing in a scene every answer is right, so that chance would be high: four at least.
    scenes = [s for s in lab.samples("test", 8 * strips, SEED, "scene") if len(s.drawing.objects) >= 4][: 3 * strips]
    steered, rng = Steered(model, processor, kept), np.random.default_rng(SEED)
    controls = [kept.matched(rng) for _ in range(sets)]
    figures = looking(model, processor, kept, 4 if quick else 96)

    def on_validation(heads: Sequence[Head], strength: float = STRENGTH) -> float:
        return float(steered.panels(validation, heads, strength=strength)[..., 0].mean())

    jobs: dict[str, Callable[[], Any]] = {
        "panel_gaze": lambda: steered.panels(test, kept.heads),
        "panel_unsteered": lambda: steered.panels(test, kept.heads, steer=False),
        "panel_all": lambda: steered.panels(test, kept.all_heads),
        "box_gaze": lambda: steered.boxes(scenes, kept.heads),
        "box_unsteered": lambda: steered.boxes(scenes, kept.heads, steer=False),
        "schedule": lambda: steered.schedule(test, kept.heads),
        "schedule_random": lambda: steered.schedule(test, controls[0]),
        "stairs": lambda: told_and_true(model, processor, kept, test),
        "agreement": lambda: agreement(model, processor, kept, (2, 4) if quick else (2, 4, 8, 16, 24)),
        "panel_random": lambda: [steered.panels(test, own)[..., 0] for own in controls],
        "box_random": lambda: [steered.boxes(scenes, own) for own in controls],
        "counts": lambda: {k: on_validation(kept.ranking()[:k]) for k in (COUNTS[4:6] if quick else COUNTS)},
        "strengths": lambda: {b: on_validation(kept.heads, b) for b in (STRENGTHS[4:6] if quick else STRENGTHS)},
        "rankings": lambda: {
            f"{way}_{by}": steered.panels(test, kept.ranking(way, by)[: len(kept.heads)])[..., 0]
            for way in ("narration", "query")
            for by in ("contrast", "mass", "selectivity")
        },
    }
    with torch.no_grad():
        done = {name: job() for name, job in track(jobs.items(), "measuring", console=Console(stderr=True))}
        same = unchanged(model, processor, kept, test[: 4 if quick else 40] + scenes[: 4 if quick else 40])

    random_panels, random_boxes = np.stack(done["panel_random"], 1), np.stack(done["box_random"], 1)
    rho, hits, windows = done["schedule"]
    columns = [kept.all_heads.index(head) for head in kept.heads]
    told_live, true = done["stairs"]
    drawn_columns = [[kept.all_heads.index(head) for head in own] for own in controls]
    figures |= {
        "steer_panel_gaze": mean_of(done["panel_gaze"][..., 0]),
        "steer_panel_gaze_sentences": mean_of(done["panel_gaze"][..., 1]),
        "steer_panel_random_mean": mean_of(random_panels),
        "steer_panel_random_most": figure(random_panels.mean((0, 2)).max()),
        "steer_panel_all": mean_of(done["panel_all"][..., 0]),
        "steer_panel_all_sentences": mean_of(done["panel_all"][..., 1]),
        "steer_panel_unsteered": mean_of(done["panel_unsteered"][..., 0]),
        "steer_box_gaze": mean_of(done["box_gaze"]),
        "steer_box_random_mean": mean_of(random_boxes),
        "steer_box_random_most": figure(random_boxes.mean(0).max()),
        "steer_box_unsteered": mean_of(done["box_unsteered"]),
        "steer_schedule_spearman": mean_of(rho),
        "steer_schedule_match": rate(hits, windows),
        "steer_schedule_windows": mean_of(windows),
        "steer_schedule_spearman_random": mean_of(done["schedule_random"][0]),
        "staircase_accuracy": climbed(true, columns),
        "staircase_accuracy_random_mean": figure(np.mean([climbed(true, own)["value"] for own in drawn_columns])),
        "staircase_accuracy_shuffled": climbed(true, columns, shuffle=rng),
        "staircase_accuracy_live": climbed(told_live, columns),
        "staircase_accuracy_live_invented": climbed(told_live, columns, "invented"),
        "staircase_accuracy_live_every_row": climbed(told_live, columns, "every"),
        "best_k_on_validation": figure(max(done["counts"], key=done["counts"].get)),
        "best_strength_on_validation": figure(max(done["strengths"], key=done["strengths"].get)),
        "agreement_of_halves": figure(list(done["agreement"].values())[-1]),
        "unsteered_captions_unchanged": figure(same),
    }
    figures |= {f"steer_panel_by_{name}": mean_of(hit) for name, hit in done["rankings"].items()}
    since = after_a_switch(true, columns)
    told = {
        "steer_panel_by_k": done["counts"],
        "steer_panel_by_strength": done["strengths"],
        "steer_panel_by_panel": np.round(done["panel_gaze"][..., 0].mean(0), 4).tolist(),
        "steer_panel_random_sets": np.round(random_panels.mean((0, 2)), 4).tolist(),
        "steer_box_random_sets": np.round(random_boxes.mean(0), 4).tolist(),
        "agreement_by_strips": done["agreement"],
        "staircase_by_tokens_since_the_sentence_began": since,
    }
    ids = [sample.id for sample in (*test, *scenes)]
    name = type(model).__name__
    told |= {"model": name, "strength": STRENGTH, "heads": [list(head) for head in kept.heads]}
    told |= {"command": "evals.gaze_heads" + (" --model DIR" if model_folder else "")}
    write(out, figures, quick, ids, folder, seed=SEED, **told)
    draw(figures, told, len(kept.heads), name).savefig(out.with_suffix(".png"), dpi=100)
    draw_heads(kept).savefig(out.with_name(f"{out.stem}_map.png"), dpi=80)


def unchanged(model: Any, processor: Any, kept: GazeHeads, samples: Sequence[lab.Sample]) -> float:
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


def after_a_switch(steps: Sequence[Stairs], columns: Sequence[int]) -> dict[int, float]:
    """Accuracy of the strongest panel by the number of tokens since the sentence about the panel began."""
    hit = np.concatenate([step.looked[:, list(columns)].mean(1).argmax(-1) == step.named for step in steps])
    named = np.concatenate([step.named for step in steps]) >= 0
    since = np.concatenate([step.since for step in steps])
    return {int(at): round(float(hit[named & (since == at)].mean()), 4) for at in np.unique(since[named]) if at < 16}


def draw(figures: dict[str, Value], told: dict[str, Any], k: int, name: str) -> Figure:
    """The sweeps and controls: heads, strength, the staircase after a switch, and stability."""
    made = Figure(figsize=(16, 4), layout="constrained")
    axes = made.subplots(1, 4, sharey=True)
    plots = (
        ("steer_panel_by_k", "heads steered (validation)", k),
        ("steer_panel_by_strength", "strength (validation)", STRENGTH),
        ("staircase_by_tokens_since_the_sentence_began", "tokens since the sentence began (test)", None),
        ("agreement_by_strips", "strips in each half", None),
    )
    titles = ("panel described = panel steered to", "the same", "strongest panel = panel described", "overlap of the top heads")
    for ax, (key, label, default), title in zip(axes, plots, titles, strict=True):
        ax.plot(list(told[key]), list(told[key].values()), marker="o", color="#1f4e79")
        if default is not None:
            ax.axvline(default, color="#d62728", linestyle="--", label=f"default: {default:g}")
            band = told["steer_panel_random_sets"]
            ax.axhspan(min(band), max(band), color="0.85", label="random head sets (test)")
            ax.legend(fontsize=8, loc="lower right")
        ax.set(xlabel=label, title=title, ylim=(0, 1.03))
    axes[1].set_xscale("log")
    made.suptitle(name, x=0.01, ha="left")
    return made


if __name__ == "__main__":
    typer.run(main)
