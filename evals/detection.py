"""Detection of false claims: AUROC on test captions, beside baselines without gaze heads and published signals.

The positive class is *false*: no object of that name is in the image; it has another colour; it is at another location. The
shipped detector was fitted to captions of training drawings, its probabilities and thresholds to validation drawings; the
baselines that are fitted used the same captions. ``text_only`` is the same regression on position, order of mention,
repetition, log-probability and entropy alone; ``without_logit_lens`` is it on all features but `LOGIT_LENS`.
``within_bins``: the mean AUROC within bins of ten tokens, where position cannot help; ``first_within_bins``: of first
mentions alone, where repetition cannot help either. ``lift``: over ``text_only``, paired. ``dla``: direct logit attribution
of the gaze heads alone, not fitted."""

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

from evals.baselines import detection as baselines
from evals.common import Figure, Out, Quick, auroc, figure, over_images, with_issue_keys, write
from evals.guards import without_logit_lens
from gazeguard import lab
from gazeguard.detection import features
from gazeguard.detection.calibration import calibration_error, conformal, least_flagged
from gazeguard.detection.detector import Detector
from gazeguard.detection.metrics import ranking
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.labels import LabelledClaims, label_claims, write_captions
from gazeguard.lab.training.tiny_fit import TEXT_ONLY
from gazeguard.lab.truth import decided_claims
from gazeguard.lab.world import COLOURS, describe
from gazeguard.lab.worlds import world
from gazeguard.report import Report
from gazeguard.trace import GazeTrace

SEED, FIT_SEED = 200, 1  # of the test drawings, and of those that the shipped detector was fitted to
BIN = 10  # tokens
RESPLITS = 20
DECODINGS = (("sampled", True), ("greedy", False))
# Keys by which issues ask for figures.
ISSUE_KEYS = {
    "auroc_readout_sampled": "auroc_dla_sampled",
    "ece": "ece_sampled",
    "auroc_shift_drop": "auroc_shift_drop_sampled",
    **{
        f"auroc_{part}_{decoding}": f"auroc_detector_{part}_{decoding}"
        for part in ("within_bins", "first_within_bins")
        for decoding in ("sampled", "greedy")
    },
}

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class RecordedCaptions:
    """Captions of samples, their labelled claims, and their replays with all heads recorded."""

    samples: Sequence[lab.Sample]
    reports: Sequence[Report]
    labelled: LabelledClaims
    traces: Sequence[GazeTrace]

    def recorded(self, part: LabelledClaims) -> list[baselines.RecordedClaim]:
        """The input of the baselines: each claim of a part of the labelled ones."""
        columns = features.pick(part.x, self.reports[0].trace.heads, ("object_index", "repeated"))
        rows = []
        for claim, image, (object_index, repeated) in zip(part.claims, part.image, columns, strict=True):
            trace = self.traces[image]
            token = trace.tokens(claim.span.start, claim.span.end).start
            rows.append(baselines.RecordedClaim(trace, token, object_index, repeated))
        return rows

    def with_heads(self, heads: Sequence[tuple[int, int]]) -> LabelledClaims:
        """The labelled claims with the features of other heads."""
        columns = [self.traces[0].heads.index(head) for head in heads]
        traces = [
            replace(
                t,
                heads=tuple(heads),
                gaze=t.gaze[:, columns],
                segment_mass=t.segment_mass[:, columns],
                attribution=t.attribution[:, columns],
            )
            for t in self.traces
        ]
        return label_claims(
            world().decided, self.samples, [replace(r, trace=t) for r, t in zip(self.reports, traces, strict=True)]
        )


def replay(
    guard: GazeGuard, samples: Sequence[lab.Sample], captions: Sequence[str], images: Sequence[Image.Image] | None = None
) -> list[Report]:
    """The reports of captions, checked in batches, by default with the samples' own images."""
    images = [sample.image for sample in samples] if images is None else images
    reports: list[Report] = []
    for start in track(range(0, len(samples), 25), "replaying captions", console=Console(stderr=True), transient=True):
        group = slice(start, start + 25)
        reports += guard.check_all(images[group], captions[group], [sample.prompt for sample in samples[group]])
    return reports


def all_heads_guard(guard: GazeGuard) -> GazeGuard:
    """A guard that records all heads."""
    return GazeGuard(
        guard.model,
        guard.processor,
        heads=GazeHeads.model_validate(guard.heads.model_dump() | {"heads": guard.heads.all_heads}),
    )


def record(guard: GazeGuard, samples: Sequence[lab.Sample], do_sample: bool) -> RecordedCaptions:
    """Captions of samples, with everything that is measured on them."""
    reports = write_captions(guard, samples, do_sample)
    replays = replay(all_heads_guard(guard), samples, [report.caption for report in reports])
    return RecordedCaptions(
        samples, reports, label_claims(world().decided, samples, reports), [report.trace for report in replays]
    )


def object_scores(
    guard: GazeGuard, text_only: Detector, train: RecordedCaptions, test: RecordedCaptions
) -> tuple[LabelledClaims, dict[str, F64]]:
    """The object claims of test captions, and every score of them, higher for more likely false."""
    known, objects = (
        train.labelled.select(train.labelled.kind == "object"),
        test.labelled.select(test.labelled.kind == "object"),
    )
    heads = guard.heads.heads
    order = ("position", "object_index", "repeated")
    prior = Detector.fit(known.x, known.false, known.kind, guard.heads, order)
    column = dict(zip(features.TEXT_FEATURES, features.pick(objects.x, heads, features.TEXT_FEATURES).T, strict=True))
    train_rows, rows = train.recorded(known), test.recorded(objects)
    no_lens = Detector.fit(known.x, known.false, known.kind, guard.heads, without_logit_lens(heads))
    return objects, {
        "detector": guard.detector.risk(objects.x, objects.kind),
        "without_logit_lens": no_lens.risk(objects.x, objects.kind),
        "dla": -features.pick(objects.x, heads, ("attribution",))[:, 0],
        "text_only": text_only.risk(objects.x, objects.kind),
        "position": column["position"],
        "position_repetition": prior.risk(objects.x, objects.kind),
        "token_nll": column["token_nll"],
        "entropy": column["entropy"],
        "svar": baselines.svar(rows),
        "preceding": baselines.preceding(rows),
        "lookback": baselines.lookback(train_rows, known.false, rows),
        "haloprobe": baselines.haloprobe(train_rows, known.false, rows),
        "confidence": baselines.confidence(guard, test.samples, objects.image, [c.phrase.head.text for c in objects.claims]),
    }


def position_bins(labelled: LabelledClaims, heads: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """(claims,) bins of `BIN` tokens."""
    return (np.expm1(features.pick(labelled.x, heads, ("position",))[:, 0]).round().astype(np.int64)) // BIN


def auroc_figures(guard: GazeGuard, objects: LabelledClaims, scores: dict[str, F64]) -> dict[str, Figure]:
    """AUROC of every score: overall, within bins of position, and of first mentions there; and the lift over text alone."""
    heads = guard.heads.heads
    first = features.pick(objects.x, heads, ("repeated",))[:, 0] == 0
    bins, count = position_bins(objects, heads), int(objects.image.max()) + 1
    parts = {"": (np.ones(len(first), bool), None), "_within_bins": (np.ones(len(first), bool), bins)}
    parts["_first_within_bins"] = (first, bins)
    found = {}
    for part, (of, inside) in parts.items():
        at = None if inside is None else inside[of]
        areas = {name: ranking(objects.false[of], score[of], objects.image[of], at) for name, score in scores.items()}
        for name in scores:
            found[f"auroc_{name}{part}"] = over_images(int(objects.image[of].max()) + 1, areas[name])

        def lift(drawn: NDArray[np.int64], areas: dict = areas) -> float:
            return areas["detector"](drawn) - areas["text_only"](drawn)

        found[f"lift{part}"] = over_images(count, lift)
    return found


def other_kinds(guard: GazeGuard, text_only: Detector, test: RecordedCaptions) -> dict[str, Figure]:
    """Other claims: colours, and locations in strips (the panel) and in scenes; beside text alone and the best baseline."""
    table = test.labelled
    is_colour = np.array([claim.text.lower() in COLOURS for claim in table.claims])
    in_strip = np.array(["panel" in f"{claim.related and claim.related.text}{claim.text}".lower() for claim in table.claims])
    found = {}
    for name, of in (
        ("colour", (table.kind == "attribute") & is_colour),
        ("wrong_panel", (table.kind == "location") & in_strip),
        ("wrong_location", (table.kind == "location") & ~in_strip),
    ):
        part = table.select(of)
        words = [claim.span.text if claim.kind == "attribute" else claim.phrase.head.text for claim in part.claims]
        scores = {
            "": guard.detector.risk(part.x, part.kind),
            "text_only_": text_only.risk(part.x, part.kind),
            "confidence_": baselines.confidence(guard, test.samples, part.image, words),
        }
        for prefix, score in scores.items():
            found[f"auroc_{prefix}{name}"] = auroc(part.false, score, part.image)
        found[f"claims_{name}"] = figure(of.sum())
    return found


def calibration_figures(guard: GazeGuard, objects: LabelledClaims, risk: F64) -> dict[str, Figure]:
    """Calibration, the shipped threshold, and the conformal bound over resplits."""
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
            claims = np.bincount(image[~half], minlength=count)
            per_image = np.bincount(image[~half], kept, minlength=count)[claims > 0] / claims[claims > 0]
            lost.append(per_image.mean())
            dropped.append((risk[~half] >= limit).mean())
        if lost:
            found[f"conformal_{alpha}_false_kept"] = figure(np.mean(lost), tuple(np.quantile(lost, (0.025, 0.975))))
            found[f"conformal_{alpha}_flagged"] = figure(np.mean(dropped))
        found[f"conformal_{alpha}_least_flagged"] = figure(least_flagged(false.mean(), alpha))
    return found


def random_head_aurocs(guard: GazeGuard, train: RecordedCaptions, test: RecordedCaptions) -> list[float]:
    """AUROC within bins of detectors on random heads of the same layers, fitted alike without the logit lens."""
    rng = np.random.default_rng(SEED)
    areas = []
    for _ in range(10):
        heads = guard.heads.with_heads(guard.heads.matched(rng))
        known, table = (each.with_heads(heads.heads) for each in (train, test))
        table = table.select(table.kind == "object")
        detector = Detector.fit(known.x, known.false, known.kind, heads, without_logit_lens(heads.heads))
        risk = detector.risk(table.x, table.kind)
        areas.append(ranking(table.false, risk, table.image, position_bins(table, heads.heads))(np.ones(len(test.samples))))
    return areas


def transfer(guard: GazeGuard, train: RecordedCaptions, sampled: RecordedCaptions) -> dict[str, Figure]:
    """Detectors that were fitted to one kind of caption, on another."""
    known, half = train.labelled, len(train.samples) // 2  # the first half of the captions is greedy
    from_strip = np.array([train.samples[image].drawing.panels > 0 for image in known.image])
    table = sampled.labelled.select(sampled.labelled.kind == "object")
    scene = table.select(np.array([sampled.samples[image].drawing.panels == 0 for image in table.image]))
    found = {}
    for name, part, tested in (("strips_to_scenes", from_strip, scene), ("greedy_to_sampled", known.image < half, table)):
        some = known.select(part)
        risk = Detector.fit(some.x, some.false, some.kind, guard.heads).risk(tested.x, tested.kind)
        found[f"auroc_{name}"] = auroc(tested.false, risk, tested.image)
    return found


def wrong_image(guard: GazeGuard, samples: Sequence[lab.Sample], held_out: Sequence[lab.Sample]) -> dict[str, Figure]:
    """True captions, checked with their own image and with another one of the same kind.

    A caption's risk is that of its riskiest object; the threshold flags 5 % of the true captions of validation drawings.
    Another image that happens to have all objects of the caption is not a wrong one, and is left out.
    """

    def riskiest(of: Sequence[lab.Sample], captions: Sequence[str], images: Sequence[Image.Image]) -> F64:
        reports = replay(guard, of, captions, images)
        return np.array([max(f.risk for f in report.findings if f.claim.kind == "object") for report in reports])

    def honest(of: Sequence[lab.Sample]) -> list[str]:
        return [describe(sample.drawing, random.Random(sample.id), honest=True) for sample in of]

    own = [sample.image for sample in samples]
    limit = np.quantile(riskiest(held_out, honest(held_out), [sample.image for sample in held_out]), 0.95)
    captions = honest(samples)
    others = [(i + 2) % len(samples) for i in range(len(samples))]  # strips and scenes take turns
    wrong = [
        i
        for i, j in enumerate(others)
        if any(m.kind == "object" and false for m, _, false in decided_claims(samples[j].drawing, captions[i]))
    ]
    caught = riskiest([samples[i] for i in wrong], [captions[i] for i in wrong], [own[others[i]] for i in wrong]) >= limit
    alarms = riskiest(samples, captions, own) >= limit
    return {
        "wrong_image_recall_at_5fpr": over_images(len(wrong), lambda drawn: float(np.average(caught, weights=drawn))),
        "wrong_image_false_positive_rate": over_images(len(samples), lambda drawn: float(np.average(alarms, weights=drawn))),
    }


def blank_image(guard: GazeGuard, test: RecordedCaptions) -> dict[str, Figure]:
    """The same captions replayed with white images, which leaves the text alone."""
    white = [Image.new("RGB", sample.image.size, (255, 255, 255)) for sample in test.samples]
    captions = [report.caption for report in test.reports]
    blind = label_claims(world().decided, test.samples, replay(guard, test.samples, captions, white))
    objects = blind.select(blind.kind == "object")
    risk = guard.detector.risk(objects.x, objects.kind)
    return {
        "auroc_blank_image_within_bins": auroc(objects.false, risk, objects.image, position_bins(objects, guard.heads.heads))
    }


def selective(test: RecordedCaptions, objects: LabelledClaims, scores: dict[str, F64], name: str) -> tuple[F64, F64]:
    """CHAIR_i and recall when the riskiest objects are dropped, for every number of dropped ones."""
    of_noun = {}  # a noun is recalled as long as one true mention of it is kept
    order = np.argsort(-scores[name], kind="stable")
    there = sum(len({thing.noun for thing in sample.drawing.objects}) for sample in test.samples)
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


def draw(path: Path, test: RecordedCaptions, objects: LabelledClaims, scores: dict[str, F64]) -> None:
    """Reliability, and recall against CHAIR_i when the riskiest objects are dropped."""
    plot = Plot(figsize=(9, 4), layout="constrained")
    left, right = plot.subplots(1, 2)
    share, risk = calibration_curve(objects.false, scores["detector"], n_bins=10)
    left.plot([0, 1], [0, 1], color="grey", linewidth=1)
    left.plot(risk, share, "o-")
    left.set(xlabel="predicted risk", ylabel="share that is false", title="reliability (ten bins, test)")
    for name in ("detector", "text_only", "token_nll", "svar"):
        chair, recall = selective(test, objects, scores, name)
        some = slice(0, len(chair) * 4 // 10)
        right.plot(chair[some], recall[some], label=name.replace("_", " "))
    right.set(xlabel="CHAIR_i of what is kept", ylabel="recall", title="dropping the riskiest objects")
    right.legend()
    plot.savefig(path, dpi=110)


def train_captions(guard: GazeGuard, n: int) -> RecordedCaptions:
    """``n`` greedy and ``n`` sampled captions of training drawings, the captions that detector and baselines are fitted to."""
    samples = lab.samples("train", 2 * n, FIT_SEED)
    greedy, sampled = record(guard, samples[:n], False), record(guard, samples[n:], True)
    reports = [*greedy.reports, *sampled.reports]
    return RecordedCaptions(
        samples, reports, label_claims(world().decided, samples, reports), [*greedy.traces, *sampled.traces]
    )


def shifted_split(guard: GazeGuard, n: int, do_sample: bool) -> Figure:
    """AUROC of the detector on drawings without pairs and usual colours."""
    samples = lab.samples("shifted", n, SEED)
    labelled = label_claims(world().decided, samples, write_captions(guard, samples, do_sample))
    objects = labelled.select(labelled.kind == "object")
    return auroc(objects.false, guard.detector.risk(objects.x, objects.kind), objects.image)


def main(out: Out, quick: Quick = False) -> None:
    """Measure the detector."""
    torch.manual_seed(SEED)
    guard = GazeGuard(*lab.load())
    text_only = Detector.from_pretrained(lab.checkpoint_path() / TEXT_ONLY)
    n, train_n = (60, 60) if quick else (500, 600)
    samples = lab.samples("test", n, SEED)
    train = train_captions(guard, train_n)
    figures: dict[str, Figure] = {}
    for decoding, do_sample in DECODINGS:
        test = record(guard, samples, do_sample)
        objects, scores = object_scores(guard, text_only, train, test)
        found = auroc_figures(guard, objects, scores) | other_kinds(guard, text_only, test)
        found |= calibration_figures(guard, objects, scores["detector"])
        found["auroc_shifted"] = shifted_split(guard, n, do_sample)
        found["auroc_shift_drop"] = figure(found["auroc_detector"]["value"] - found["auroc_shifted"]["value"])
        if do_sample:
            areas = random_head_aurocs(guard, train, test)
            found["auroc_random_heads_mean_within_bins"] = figure(np.mean(areas))
            found["auroc_random_heads_best_within_bins"] = figure(max(areas))
            found |= transfer(guard, train, test) | blank_image(guard, test)
            draw(out.with_suffix(".png"), test, objects, scores)
        figures |= {f"{key}_{decoding}": value for key, value in found.items()}
    figures |= wrong_image(guard, samples, lab.samples("validation", n, SEED))
    heads = [list(head) for head in guard.heads.heads]
    write(out, with_issue_keys(figures, ISSUE_KEYS), quick, [sample.id for sample in samples], seed=SEED, heads=heads)


if __name__ == "__main__":
    typer.run(main)
