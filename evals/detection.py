"""Can gaze tell false claims from true ones? AUROC on test captions, beside what needs no gaze and what others read.

The positive class is *false*: nothing of that name is in the picture; it has another colour; it is elsewhere. The shipped
detector was fitted on captions of training pictures, probabilities and thresholds on validation pictures; the baselines that
learn were fitted on the same captions. ``text_only`` is the same regression on position, order of mention, repetition,
log-probability and entropy alone; ``looks`` is it on all but what lies under the gaze, see `UNDER`. ``within_bins``: the mean
area within bins of ten tokens, which position cannot help; ``first_within_bins``: of first mentions alone, which repetition
cannot help either. ``lift``: over ``text_only``, paired.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import typer
from matplotlib.figure import Figure as Plot
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, precision_score, recall_score

from evals.baselines import detection as peers
from evals.common import Figure, Out, Quick, auroc, figure, over_images, ranking, write
from gazeguard import lab
from gazeguard.detection import features
from gazeguard.detection.calibration import calibration_error, conformal, least_flagged
from gazeguard.detection.detector import Detector
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.training.tiny_fit import TEXT_ONLY, LabelledClaims, label_claims, write_captions
from gazeguard.lab.truth import decided_claims
from gazeguard.lab.world import COLOURS, describe
from gazeguard.report import Report
from gazeguard.trace import GazeTrace

SEED, FIT_SEED = 200, 1  # of the test pictures, and of those that `gazeguard.lab.fit` learns from
BIN = 10  # tokens
RESPLITS = 20
WAYS = (("sampled", True), ("greedy", False))
# In the lab the picture encoder's warm-up has taught every patch the name of what it shows, so that these alone know all
# about objects; what the heads' attention and output tell is measured without them, and so is the choice of heads.
UNDER = ("attended_logprob", "internal_confidence")

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Told:
    """Captions of samples, what they claim, and their replay with all heads heard."""

    samples: Sequence[lab.Sample]
    reports: Sequence[Report]
    table: LabelledClaims
    traces: Sequence[GazeTrace]

    def rows(self, table: LabelledClaims) -> list[peers.Row]:
        """What the baselines read of each claim of a part of the table."""
        columns = features.pick(table.x, self.reports[0].trace.heads, ("object_index", "repeated"))
        found = []
        for claim, image, (mention, repeated) in zip(table.claims, table.image, columns, strict=True):
            trace = self.traces[image]
            found.append(peers.Row(trace, trace.tokens(claim.span.start, claim.span.end).start, mention, repeated))
        return found

    def with_heads(self, heads: Sequence[tuple[int, int]]) -> LabelledClaims:
        """The table as other heads would have it."""
        at = [self.traces[0].heads.index(head) for head in heads]
        of_trace = [
            replace(
                t, heads=tuple(heads), gaze=t.gaze[:, at], segment_mass=t.segment_mass[:, at], attribution=t.attribution[:, at]
            )
            for t in self.traces
        ]
        return label_claims(self.samples, [replace(r, trace=t) for r, t in zip(self.reports, of_trace, strict=True)])


def replayed(
    guard: GazeGuard, samples: Sequence[lab.Sample], captions: Sequence[str], images: Sequence[Image.Image] | None = None
) -> list[Report]:
    """Captions checked in batches, by default with the samples' own pictures."""
    images = [sample.image for sample in samples] if images is None else images
    found: list[Report] = []
    for start in track(range(0, len(samples), 25), "replaying captions", console=Console(stderr=True), transient=True):
        group = slice(start, start + 25)
        found += guard.check_all(images[group], captions[group], [sample.prompt for sample in samples[group]])
    return found


def listener(guard: GazeGuard) -> GazeGuard:
    """A guard that hears all heads."""
    return GazeGuard(
        guard.model,
        guard.processor,
        heads=GazeHeads.model_validate(guard.heads.model_dump() | {"heads": guard.heads.all_heads}),
    )


def tell(guard: GazeGuard, samples: Sequence[lab.Sample], do_sample: bool) -> Told:
    """Captions of samples, with everything that is measured on them."""
    reports = write_captions(guard, samples, do_sample)
    heard = replayed(listener(guard), samples, [report.caption for report in reports])
    return Told(samples, reports, label_claims(samples, reports), [report.trace for report in heard])


def scores(guard: GazeGuard, text_only: Detector, learnt: Told, told: Told) -> tuple[LabelledClaims, dict[str, F64]]:
    """The object claims of captions, and every score of them, higher for more likely invented."""
    known, objects = learnt.table.select(learnt.table.kind == "object"), told.table.select(told.table.kind == "object")
    heads = guard.heads.heads
    clock = ("position", "object_index", "repeated")
    prior = Detector.fit(known.x, known.false, known.kind, guard.heads, clock)
    column = dict(zip(features.TEXT_FEATURES, features.pick(objects.x, heads, features.TEXT_FEATURES).T, strict=True))
    learnt_rows, rows = learnt.rows(known), told.rows(objects)
    looks = Detector.fit(known.x, known.false, known.kind, guard.heads, without(heads))
    return objects, {
        "detector": guard.detector.risk(objects.x, objects.kind),
        "looks": looks.risk(objects.x, objects.kind),
        "attribution": -features.pick(objects.x, heads, ("attribution",))[:, 0],
        "text_only": text_only.risk(objects.x, objects.kind),
        "position": column["position"],
        "position_repetition": prior.risk(objects.x, objects.kind),
        "token_nll": column["token_nll"],
        "entropy": column["entropy"],
        "svar": peers.svar(rows),
        "preceding": peers.preceding(rows),
        "lookback": peers.lookback(learnt_rows, known.false, rows),
        "haloprobe": peers.haloprobe(learnt_rows, known.false, rows),
        "confidence": peers.confidence(guard, told.samples, objects.image, [c.phrase.head.text for c in objects.claims]),
    }


def without(heads: Sequence[tuple[int, int]]) -> list[str]:
    """All features but `UNDER`."""
    return [name for name in features.names(heads) if name not in UNDER]


def position(table: LabelledClaims, heads: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """(claims,) bins of `BIN` tokens."""
    return (np.expm1(features.pick(table.x, heads, ("position",))[:, 0]).round().astype(np.int64)) // BIN


def measured(guard: GazeGuard, objects: LabelledClaims, made: dict[str, F64]) -> dict[str, Figure]:
    """AUROC of every score: overall, within bins of position, and of first mentions there; and the lift over text alone."""
    heads = guard.heads.heads
    first = features.pick(objects.x, heads, ("repeated",))[:, 0] == 0
    bins, count = position(objects, heads), int(objects.image.max()) + 1
    parts = {"": (np.ones(len(first), bool), None), "_within_bins": (np.ones(len(first), bool), bins)}
    parts["_first_within_bins"] = (first, bins)
    found = {}
    for part, (of, inside) in parts.items():
        at = None if inside is None else inside[of]
        areas = {name: ranking(objects.false[of], score[of], objects.image[of], at) for name, score in made.items()}
        for name in made:
            found[f"auroc_{name}{part}"] = over_images(int(objects.image[of].max()) + 1, areas[name])

        def lift(drawn: NDArray[np.int64], areas: dict = areas) -> float:
            return areas["detector"](drawn) - areas["text_only"](drawn)

        found[f"lift{part}"] = over_images(count, lift)
    return found


def of_kinds(guard: GazeGuard, text_only: Detector, told: Told) -> dict[str, Figure]:
    """The other claims: colours, and places in strips (the panel) and in scenes; beside text alone and the best peer."""
    table = told.table
    words = np.array([claim.text.lower() in COLOURS for claim in table.claims])
    in_strip = np.array([mention.object is not None and mention.object.panel is not None for mention in table.mentions])
    found = {}
    for name, of in (
        ("colour", (table.kind == "attribute") & words),
        ("wrong_panel", (table.kind == "location") & in_strip),
        ("wrong_place", (table.kind == "location") & ~in_strip),
    ):
        part = table.select(of)
        said = [claim.span.text if claim.kind == "attribute" else claim.phrase.head.text for claim in part.claims]
        made = {
            "": guard.detector.risk(part.x, part.kind),
            "text_only_": text_only.risk(part.x, part.kind),
            "confidence_": peers.confidence(guard, told.samples, part.image, said),
        }
        for whose, score in made.items():
            found[f"auroc_{whose}{name}"] = auroc(part.false, score, part.image)
        found[f"claims_{name}"] = figure(of.sum())
    return found


def trusted(guard: GazeGuard, objects: LabelledClaims, risk: F64) -> dict[str, Figure]:
    """Can the probability be believed? Calibration, the shipped threshold, and the conformal bound over resplits."""
    false, image = objects.false, objects.image
    count = int(image.max()) + 1
    flagged = risk >= guard.detector.threshold("object", "f1")
    found = {
        "ece": over_images(count, lambda drawn: calibration_error(*(np.repeat(v, drawn[image]) for v in (risk, false)))),
        "brier": figure(brier_score_loss(false, risk)),
        "average_precision": figure(average_precision_score(false, risk)),
        "precision": figure(precision_score(false, flagged)),
        "recall": figure(recall_score(false, flagged)),
        "f1": figure(f1_score(false, flagged)),
        "base_rate": figure(false.mean()),
        "claims": figure(len(false)),
    }
    rng = np.random.default_rng(SEED)
    splits = [np.isin(image, rng.permutation(count)[: count // 2]) for _ in range(RESPLITS)]
    for alpha in (0.05, 0.02):
        lost, dropped = [], []
        for half in splits:
            if (limit := conformal(risk[half], false[half], image[half], alpha)) is None:
                continue
            kept = (risk[~half] < limit) & false[~half]
            made = np.bincount(image[~half], minlength=count)
            per_image = np.bincount(image[~half], kept, minlength=count)[made > 0] / made[made > 0]
            lost.append(per_image.mean())
            dropped.append((risk[~half] >= limit).mean())
        if lost:
            found[f"conformal_{alpha}_false_kept"] = figure(np.mean(lost), tuple(np.quantile(lost, (0.025, 0.975))))
            found[f"conformal_{alpha}_flagged"] = figure(np.mean(dropped))
        found[f"conformal_{alpha}_least_flagged"] = figure(least_flagged(false.mean(), alpha))
    return found


def random_detectors(guard: GazeGuard, learnt: Told, told: Told) -> list[float]:
    """AUROC, within bins, of detectors that read other heads, fitted in the same way on their looks."""
    rng = np.random.default_rng(SEED)
    areas = []
    for _ in range(10):
        heads = guard.heads.with_heads(guard.heads.matched(rng))
        known, table = (each.with_heads(heads.heads) for each in (learnt, told))
        table = table.select(table.kind == "object")
        detector = Detector.fit(known.x, known.false, known.kind, heads, without(heads.heads))
        risk = detector.risk(table.x, table.kind)
        areas.append(ranking(table.false, risk, table.image, position(table, heads.heads))(np.ones(len(told.samples))))
    return areas


def transfer(guard: GazeGuard, learnt: Told, sampled: Told) -> dict[str, Figure]:
    """Detectors that learnt from one kind of caption, on another."""
    known, half = learnt.table, len(learnt.samples) // 2  # the first half of the captions is greedy
    from_strip = np.array([learnt.samples[image].drawing.panels > 0 for image in known.image])
    table = sampled.table.select(sampled.table.kind == "object")
    scene = table.select(np.array([sampled.samples[image].drawing.panels == 0 for image in table.image]))
    found = {}
    for name, part, tested in (("strips_to_scenes", from_strip, scene), ("greedy_to_sampled", known.image < half, table)):
        some = known.select(part)
        risk = Detector.fit(some.x, some.false, some.kind, guard.heads).risk(tested.x, tested.kind)
        found[f"auroc_{name}"] = auroc(tested.false, risk, tested.image)
    return found


def wrong_image(guard: GazeGuard, samples: Sequence[lab.Sample], held_out: Sequence[lab.Sample]) -> dict[str, Figure]:
    """True captions, checked with their own picture and with another one of the same kind.

    A caption's risk is that of its riskiest object; the threshold lets 5 % of the true captions of validation pictures through
    as false alarms. Another picture that happens to hold all that is said is no wrong one, and is left out.
    """

    def riskiest(of: Sequence[lab.Sample], captions: Sequence[str], images: Sequence[Image.Image]) -> F64:
        reports = replayed(guard, of, captions, images)
        return np.array([max(f.risk for f in report.findings if f.claim.kind == "object") for report in reports])

    def honest(of: Sequence[lab.Sample]) -> list[str]:
        return [describe(sample.drawing, random.Random(sample.id), honest=True) for sample in of]

    own = [sample.image for sample in samples]
    limit = np.quantile(riskiest(held_out, honest(held_out), [sample.image for sample in held_out]), 0.95)
    told = honest(samples)
    others = [(i + 2) % len(samples) for i in range(len(samples))]  # strips and scenes take turns
    wrong = [
        i
        for i, j in enumerate(others)
        if any(m.kind == "object" and false for m, _, false in decided_claims(samples[j].drawing, told[i]))
    ]
    caught = riskiest([samples[i] for i in wrong], [told[i] for i in wrong], [own[others[i]] for i in wrong]) >= limit
    alarms = riskiest(samples, told, own) >= limit
    return {
        "wrong_image_recall_at_5fpr": over_images(len(wrong), lambda drawn: float(np.average(caught, weights=drawn))),
        "wrong_image_false_alarms": over_images(len(samples), lambda drawn: float(np.average(alarms, weights=drawn))),
    }


def blank_image(guard: GazeGuard, told: Told) -> dict[str, Figure]:
    """The same captions replayed with white pictures: what is left knows the text alone."""
    white = [Image.new("RGB", sample.image.size, (255, 255, 255)) for sample in told.samples]
    blind = label_claims(told.samples, replayed(guard, told.samples, [report.caption for report in told.reports], white))
    objects = blind.select(blind.kind == "object")
    risk = guard.detector.risk(objects.x, objects.kind)
    return {"auroc_blank_image_within_bins": auroc(objects.false, risk, objects.image, position(objects, guard.heads.heads))}


def selective(told: Told, objects: LabelledClaims, made: dict[str, F64], name: str) -> tuple[F64, F64]:
    """CHAIR_i and recall of what is left when the riskiest objects are dropped, for every number of drops."""
    of_noun = {}  # a kind of thing is told as long as one true mention of it is kept
    order = np.argsort(-made[name], kind="stable")
    there = sum(len({thing.noun for thing in sample.drawing.objects}) for sample in told.samples)
    nouns = [(image, claim.phrase.head.text.lower()) for image, claim in zip(objects.image, objects.claims, strict=True)]
    for noun, false in zip(nouns, objects.false, strict=True):
        of_noun[noun] = of_noun.get(noun, 0) + (not false)
    left, bad, recalled = len(order), int(objects.false.sum()), sum(count > 0 for count in of_noun.values())
    chair, recall = [bad / left], [recalled / there]
    for i in order[:-1]:
        left, bad = left - 1, bad - int(objects.false[i])
        if not objects.false[i]:
            of_noun[nouns[i]] -= 1
            recalled -= of_noun[nouns[i]] == 0
        chair.append(bad / left)
        recall.append(recalled / there)
    return np.array(chair), np.array(recall)


def drawn(path: Path, told: Told, objects: LabelledClaims, made: dict[str, F64]) -> None:
    """Reliability, and what dropping the riskiest objects buys."""
    plot = Plot(figsize=(9, 4), layout="constrained")
    left, right = plot.subplots(1, 2)
    share, risk = calibration_curve(objects.false, made["detector"], n_bins=10)
    left.plot([0, 1], [0, 1], color="grey", linewidth=1)
    left.plot(risk, share, "o-")
    left.set(xlabel="risk said", ylabel="share invented", title="reliability (ten bins, test)")
    for name in ("detector", "text_only", "token_nll", "svar"):
        chair, recall = selective(told, objects, made, name)
        some = slice(0, len(chair) * 4 // 10)
        right.plot(chair[some], recall[some], label=name.replace("_", " "))
    right.set(xlabel="CHAIR_i of what is kept", ylabel="recall", title="dropping the riskiest objects")
    right.legend()
    plot.savefig(path, dpi=110)


def main(out: Out, quick: Quick = False) -> None:
    """Measure the detector."""
    torch.manual_seed(SEED)
    guard = GazeGuard(*lab.load())
    text_only = Detector.from_pretrained(lab.checkpoint_path() / TEXT_ONLY)
    n, fit_n = (60, 60) if quick else (500, 600)
    train, samples = lab.samples("train", 2 * fit_n, FIT_SEED), lab.samples("test", n, SEED)
    greedy, random_ones = (tell(guard, part, way) for part, way in ((train[:fit_n], False), (train[fit_n:], True)))
    learnt = Told(
        train, [*greedy.reports, *random_ones.reports], label_claims(train, [*greedy.reports, *random_ones.reports]),
        [*greedy.traces, *random_ones.traces],
    )  # fmt: skip
    figures: dict[str, Figure] = {}
    for way, do_sample in WAYS:
        told = tell(guard, samples, do_sample)
        objects, made = scores(guard, text_only, learnt, told)
        risk = made["detector"]
        found = measured(guard, objects, made) | of_kinds(guard, text_only, told) | trusted(guard, objects, risk)
        shifted = lab.samples("shifted", n, SEED)
        moved = label_claims(shifted, write_captions(guard, shifted, do_sample))
        moved = moved.select(moved.kind == "object")
        found["auroc_shifted"] = auroc(moved.false, guard.detector.risk(moved.x, moved.kind), moved.image)
        found["auroc_shift_drop"] = figure(found["auroc_detector"]["value"] - found["auroc_shifted"]["value"])
        if do_sample:
            areas = random_detectors(guard, learnt, told)
            found["auroc_random_heads_mean_within_bins"] = figure(np.mean(areas))
            found["auroc_random_heads_best_within_bins"] = figure(max(areas))
            found |= transfer(guard, learnt, told) | blank_image(guard, told)
            drawn(out.with_suffix(".png"), told, objects, made)
        figures |= {f"{key}_{way}": value for key, value in found.items()}
    figures["ece"], figures["auroc_shift_drop"] = figures["ece_sampled"], figures["auroc_shift_drop_sampled"]
    held_out = lab.samples("validation", n, SEED)
    figures |= wrong_image(guard, samples, held_out)
    write(out, figures, quick, [sample.id for sample in samples], seed=SEED, heads=[list(h) for h in guard.heads.heads])


if __name__ == "__main__":
    typer.run(main)
