"""Gaze heads of a model on the images of the scenes lab: the figures of `evals.gaze_heads --lab scenes`.

Attention: mass on the named object, at the rows that predict its noun, in true captions of test scenes; the staircase, at
the same rows of true narrations of comic pages. Steering: one object of a scene as the target of "Name one object.", and one
panel of a page as that of "Describe a panel.". Controls: layer-matched random sets of heads, described objects shuffled, no
steering. The number of heads is swept on validation scenes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from evals.common import Figure, figure, over_images
from evals.subject import Subject
from gazeguard.attention.backbone import Head
from gazeguard.attention.steering import Target, image_tokens_in
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.heads.discovery import noun_rows, panel_shares
from gazeguard.heads.strips import Strip
from gazeguard.lab.scenes import samples
from gazeguard.lab.scenes.samples import Sample
from gazeguard.lab.scenes.strips import strips
from gazeguard.progress import track
from gazeguard.vision.encoding import encode

SEED = 100  # of the images; heads and detector were fitted to others
OBJECTS, PANELS = 4, 6  # of a scene whose captions are replayed, and of a page
LEAST_OBJECTS = 4  # of a scene in which one is to be named, so that chance is low
COUNTS = (1, 2, 4, 8, 12, 16, 23, 32, 64)
# By which issues ask for figures, with the lab's name before them.
LAB_KEYS = (
    "gaze_head_mass_nouns",
    "best_other_mass_nouns",
    "null_mass",
    "steer_box_gaze",
    "steer_box_random_mean",
    "staircase_accuracy",
)


class Sizes(NamedTuple):
    """Numbers of images and of random sets of heads."""

    replayed: int
    scenes: int
    pages: int
    validation: int
    sets: int
    counts: tuple[int, ...]


FULL, QUICK = Sizes(48, 40, 6, 16, 10, COUNTS), Sizes(8, 8, 2, 4, 2, COUNTS[3:4])


def mean_figure(values: NDArray[np.float64]) -> Figure:
    """The mean over images, (images,), with its interval."""
    return over_images(len(values), lambda drawn: float(np.average(values, weights=drawn)))


# ---------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Replayed:
    """Attention of all heads at the rows that predict the nouns of strips.

    mass:   (strips, H, described, attended) attention mass by the boxes' share of each image token
    tokens: the same by whole image tokens, those that lie in a box by more than half, as steering counts them
    hits:   each strip's (rows, H, attended) mass, weighed to equal area, and (rows,) the described panel
    area:   (strips, panels) share of the image tokens
    """

    mass: NDArray[np.float64]
    tokens: NDArray[np.float64]
    hits: tuple[tuple[NDArray[np.float64], NDArray[np.int64]], ...]
    area: NDArray[np.float64]


def replay(guard: GazeGuard, shown: Sequence[Strip], batch_size: int = 8) -> Replayed:
    """Replay true narrations; ``guard`` records all heads."""
    mass, tokens, hits, area = [], [], [], []
    for start in track(range(0, len(shown), batch_size), "replaying narrations"):
        group = shown[start : start + batch_size]
        columns = ([getattr(strip, name) for strip in group] for name in ("image", "narration", "prompt"))
        for strip, report in zip(group, guard.check_all(*columns), strict=True):
            trace = report.trace
            rows = noun_rows(strip, trace.offsets)
            shares = panel_shares(trace.grid, strip)
            inside = np.stack([image_tokens_in(trace.grid, box) for box in strip.panels], 1)
            weights = rows / rows.sum(1, keepdims=True)
            mean = np.einsum("pt,thn->hpn", weights, trace.gaze)
            mass.append(mean @ shares)
            tokens.append(mean @ inside)
            where, tokens_at = np.nonzero(rows)
            hits.append((trace.gaze[tokens_at] @ (shares / shares.sum(0)), where))
            area.append(shares.sum(0) / len(shares))
    return Replayed(np.array(mass), np.array(tokens), tuple(hits), np.array(area))


def diagonal(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """(strips, H): the mean mass on what is described."""
    return np.diagonal(matrices, axis1=-2, axis2=-1).mean(-1)


def attention_figures(heads: GazeHeads, replayed: Replayed) -> dict[str, Figure]:
    """Mass of the gaze heads, of the best other head, and of the gaze heads when the described objects are shuffled."""
    chosen = [heads.all_heads.index(head) for head in heads.heads]
    best = [heads.all_heads.index(head) for head in heads.ranking()[:8]]
    others = [heads.all_heads.index(head) for head in heads.others()]
    figures = {}
    for ending, matrices in (("", replayed.mass), ("_whole_tokens", replayed.tokens)):
        own = diagonal(matrices)
        other = int(np.argmax(own[:, others].mean(0)))
        panels = matrices.shape[-1]
        elsewhere = (matrices.sum((-2, -1)) / panels - own) / (panels - 1)
        figures |= {
            f"gaze_head_mass_nouns{ending}": mean_figure(own[:, chosen].mean(1)),
            f"best_eight_mass_nouns{ending}": mean_figure(own[:, best].mean(1)),
            f"most_mass_nouns{ending}": mean_figure(own[:, chosen].max(1)),
            f"best_other_mass_nouns{ending}": mean_figure(own[:, others][:, other]),
            f"null_mass{ending}": mean_figure(elsewhere[:, chosen].mean(1)),
        }
    figures["gaze_head_selectivity_nouns"] = mean_figure(
        (diagonal(replayed.mass)[:, chosen] / replayed.mass[:, chosen].sum(-1).mean(-1)).mean(1)
    )
    return figures | {"chance": mean_figure(replayed.area.mean(1))}


def staircase(replayed: Replayed, columns: Sequence[int]) -> NDArray[np.float64]:
    """(strips,) share of the nouns at which the panel that is described has the most attention of some heads."""
    return np.array([(mass[:, columns].mean(1).argmax(-1) == where).mean() for mass, where in replayed.hits])


# ----------------------------------------------------------------------------------------------------------- steering


def steerable(split: str, n: int) -> list[tuple[Sample, int]]:
    """Scenes of at least `LEAST_OBJECTS` objects whose nouns all differ, each with the object that is the target."""
    drawn = (sample for sample in samples(split, 12 * n, SEED, "scene"))  # type: ignore[arg-type]
    fit = [s for s in drawn if len({item.noun for item in s.truth.objects}) == len(s.truth.objects) >= LEAST_OBJECTS][:n]
    return [(sample, random.Random(sample.id).randrange(len(sample.truth.objects))) for sample in fit]


@dataclass(frozen=True)
class Steering:
    """Answers of a model whose attention is steered by chosen heads."""

    subject: Subject
    heads: GazeHeads

    def answers(
        self, shown: Sequence[Sample], prompt: str, targets: Sequence[Target], heads: Sequence[Head], tokens: int
    ) -> list[list[str]]:
        """For each image and target, the nouns that the greedy answer names."""
        guard = GazeGuard(self.subject.model, self.subject.processor, heads=self.heads.with_heads(heads))
        nouns = []
        for start in range(0, len(shown), 20):
            rows, group = shown[start : start + 20], list(targets[start : start + 20])
            batch = encode(guard.model, guard.processor, [s.image for s in rows], [prompt] * len(rows))
            with guard.steer(group):
                sizes = [[s.image.size] for s in rows]
                guard.generate(**batch.inputs, max_new_tokens=tokens, do_sample=False, picture_sizes=sizes)
            named = [self.subject.world.named(s, r.caption) for s, r in zip(rows, guard.reports, strict=True)]
            nouns += [[each.noun for each in row] for row in named]
        return nouns

    def boxes(self, shown: Sequence[tuple[Sample, int]], heads: Sequence[Head], steer: bool = True) -> NDArray[np.float64]:
        """(images,) whether "Name one object." is answered with the object whose box is the target."""
        images, wanted = [sample for sample, _ in shown], [sample.truth.objects[i] for sample, i in shown]
        targets = [item.box if steer else None for item in wanted]
        named = self.answers(images, "Name one object.", targets, heads, 8)
        return np.array([nouns[:1] == [item.noun] for nouns, item in zip(named, wanted, strict=True)], float)

    def panels(self, pages: Sequence[Sample], heads: Sequence[Head], steer: bool = True) -> NDArray[np.float64]:
        """(pages,) share of the panels, each the target once, that "Describe a panel." is answered with."""
        rows = [(page, panel) for page in pages for panel in range(len(page.truth.panels))]
        targets = [page.truth.panels[panel] if steer else None for page, panel in rows]
        named = self.answers([page for page, _ in rows], "Describe a panel.", targets, heads, 20)
        hits: dict[str, list[float]] = {}
        for (page, panel), nouns in zip(rows, named, strict=True):
            held = [{item.noun for item in page.truth.in_panel(p)} for p in range(len(page.truth.panels))]
            votes = np.array([sum(noun in objects for noun in nouns) for objects in held])
            hits.setdefault(page.id, []).append(float(votes[panel] > 0 and (votes >= votes[panel]).sum() == 1))
        return np.array([np.mean(each) for each in hits.values()])


# ------------------------------------------------------------------------------------------------------------ figures


def measure(subject: Subject, sizes: Sizes) -> tuple[dict[str, Figure], dict[str, Any]]:
    """All figures, and what the result file says beside them."""
    heads, rng = subject.heads(), np.random.default_rng(SEED)
    controls = [heads.matched(rng) for _ in range(sizes.sets)]
    recording = GazeGuard(subject.model, subject.processor, heads=heads.with_heads(heads.all_heads))
    scenes = replay(recording, strips(sizes.replayed, SEED, OBJECTS, "scene", "test", hard=True))
    pages = replay(recording, strips(sizes.replayed // 2, SEED, PANELS, "page", "test"))
    steering, targets, validation = (
        Steering(subject, heads),
        steerable("test", sizes.scenes),
        steerable("validation", sizes.validation),
    )
    comics = [page for page in samples("test", 60, SEED, "page") if len(page.truth.panels) == OBJECTS][: sizes.pages]
    jobs: dict[str, Callable[[], NDArray[np.float64]]] = {
        "steer_box_gaze": lambda: steering.boxes(targets, heads.heads),
        "steer_box_unsteered": lambda: steering.boxes(targets, heads.heads, steer=False),
        "steer_panel_gaze": lambda: steering.panels(comics, heads.heads),
        "steer_panel_unsteered": lambda: steering.panels(comics, heads.heads, steer=False),
        "steer_panel_random": lambda: steering.panels(comics, controls[0]),
        **{f"box {i}": lambda chosen=chosen: steering.boxes(targets, chosen) for i, chosen in enumerate(controls)},
        **{f"k {k}": lambda k=k: steering.boxes(validation, heads.ranking()[:k]) for k in sizes.counts},
    }
    with torch.no_grad():
        results = {name: job() for name, job in track(list(jobs.items()), "steering")}
    random_boxes = np.stack([results[f"box {i}"] for i in range(len(controls))])
    counts = {k: round(float(results[f"k {k}"].mean()), 4) for k in sizes.counts}
    columns = {
        name: [heads.all_heads.index(head) for head in chosen]
        for name, chosen in (("", heads.heads), *((str(i), each) for i, each in enumerate(controls)))
    }
    figures = attention_figures(heads, scenes)
    figures |= {name: mean_figure(results[name]) for name in jobs if name.startswith("steer")}
    figures |= {
        "steer_box_random_mean": mean_figure(random_boxes.mean(0)),
        "steer_box_random_most": figure(random_boxes.mean(1).max()),
        "staircase_accuracy": mean_figure(staircase(pages, columns[""])),
        "staircase_accuracy_random_mean": mean_figure(
            np.mean([staircase(pages, each) for name, each in columns.items() if name], 0)
        ),
        "staircase_accuracy_objects": mean_figure(staircase(scenes, columns[""])),
        "best_k_on_validation": figure(max(counts, key=lambda k: counts[k])),
        "split_half": figure(heads.split_half),
        "length_agreement": figure(float("nan") if heads.length_agreement is None else heads.length_agreement),
        "gaze_heads": figure(len(heads.heads)),
        "all_heads": figure(len(heads.all_heads)),
        "distinct_matched_sets": figure(heads.distinct_matched_sets()),
    }
    meta = {"steer_box_by_k": counts, "steer_box_random_sets": np.round(random_boxes.mean(1), 4).tolist()}
    meta |= {"heads": [list(head) for head in heads.heads], **subject.meta()}
    return figures, meta | {"image_ids": [sample.id for sample, _ in targets]}
