"""Detection of false claims: AUROC on test captions, beside text alone, published signals and random head sets.

The positive class is *false*: no object of that name is in the image; it has another colour; it is at another location. The
detector that is measured is the subject's own; what is fitted beside it is fitted to captions of training images, and choices
(the layer of internal confidence, the best random set) are made on validation images. ``text_only`` is the same regression on
position, order of mention, repetition, log-probability and entropy alone; ``without_logit_lens`` is one on all features but
`LOGIT_LENS`. ``within_bins``: the mean AUROC within bins of ten tokens, where position cannot help; ``first_within_bins``: of
first mentions alone, where repetition cannot help either. ``lift``: over ``text_only``, paired; ``lift_over_X``: over another
score. Not fitted: ``dla``, direct logit attribution of the gaze heads; ``svar``, ``preceding``, ``confidence``; ``samples``:
the share of five sampled captions that do not name the object; ``self_verification``: the model's answer whether it is there.
``random_heads`` and ``random_dla``: ten layer-matched sets of other heads and (``any_``) twenty of any layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from evals import detection_figures as figures_of
from evals.baselines.detection import ImageConfidence
from evals.common import Artifacts, Dtype, Figure, Lab, Model, Out, Quick, auroc, over_images, with_issue_keys, write
from evals.detection_plots import draw
from evals.detection_scores import Fitted, HeadSets, asked, disagreement, other_scores, set_detectors, set_scores
from evals.recorded import Recorded, join, record, replay
from evals.subject import Chosen, Subject, subject
from gazeguard.claims.parse import claims
from gazeguard.detection import features
from gazeguard.detection.cross_fitting import cross_fit
from gazeguard.detection.detector import Detector
from gazeguard.detection.metrics import ranking
from gazeguard.guard import GazeGuard
from gazeguard.heads.pictographs import COLOURS
from gazeguard.lab.labels import LabelledClaims, label_claims

SEED, FIT_SEED = 200, 1  # of the test images, and of those that the tiny lab's detector was fitted to
DECODINGS = (("sampled", True), ("greedy", False))
SAMPLES = 5  # captions beside each test caption, for their agreement
# Keys by which issues ask for figures.
ISSUE_KEYS = {
    "auroc_readout_sampled": "auroc_dla_sampled",
    "ece": "ece_sampled",
    "auroc_shift_drop": "auroc_shift_drop_sampled",
    "auroc_random_heads_best_within_bins_sampled": "auroc_best_random_heads_within_bins_sampled",
    **{
        f"auroc_{part}_{decoding}": f"auroc_detector_{part}_{decoding}"
        for part in ("within_bins", "first_within_bins")
        for decoding in ("sampled", "greedy")
    },
}
# Keys that begin with the lab's name: objects, T = 1, within bins.
LAB_KEYS = {
    "auroc_detector_within_bins": "auroc_detector_within_bins_sampled",
    "auroc_text_only_within_bins": "auroc_text_only_within_bins_sampled",
    "lift_within_bins": "lift_within_bins_sampled",
    "auroc_untrained_dla_within_bins": "auroc_dla_within_bins_sampled",
    "auroc_best_random_dla_within_bins": "auroc_best_random_dla_within_bins_sampled",
    "lift_over_best_baseline": "lift_over_best_baseline_within_bins_sampled",
}

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    """Numbers of images: greedy and as many sampled training captions, validation, test, and of each other test split."""

    train: int
    validation: int
    test: int
    other: int
    matched: int = 10  # random head sets
    any_layer: int = 20


SIZES = {"tiny": Sizes(200, 80, 250, 200), "scenes": Sizes(200, 30, 140, 50)}
QUICK = {"tiny": Sizes(50, 20, 30, 16, 2, 2), "scenes": Sizes(6, 3, 4, 3, 1, 1)}


# ---------------------------------------------------------------------------------------------------------- measurements


def fit(measured: Subject, guard: GazeGuard, sets: HeadSets, n: int) -> tuple[Fitted, Recorded]:
    """What is fitted to ``n`` greedy and ``n`` sampled captions of training images, and these captions with all claims.

    A subject without a detector gets one that is fitted to them.
    """
    samples, decided = measured.world.samples("train", 2 * n, FIT_SEED), measured.world.decided
    parts = [record(guard, decided, some, kind, sets.all) for some, kind in ((samples[:n], False), (samples[n:], True))]
    train = join(*parts)
    known = train.of_kind("object")
    text_only = cross_fit(known.labelled.table, guard.heads, features.TEXT_FEATURES).detector
    detector = guard.detector or cross_fit(train.labelled.table, guard.heads).detector
    with_detector = GazeGuard(guard.model, guard.processor, heads=guard.heads, detector=detector, grid=guard.tracer.grid)
    return Fitted(with_detector, detector, text_only, known, set_detectors(known, guard.heads, sets)), train


def best_of(labelled: LabelledClaims, scores: Sequence[F64], heads: Sequence[tuple[int, int]]) -> int:
    """The number of the score with the greatest AUROC within bins."""
    bins, once = figures_of.position_bins(labelled, heads), np.ones(int(labelled.image.max()) + 1, np.int64)
    return int(np.argmax([ranking(labelled.false, score, labelled.image, bins)(once) for score in scores]))


@dataclass(frozen=True)
class Choices:
    """What was chosen on validation captions: the layer of internal confidence, and the best random set by use."""

    layer: int
    best: dict[str, int]

    @staticmethod
    def make(fitted: Fitted, validation: Recorded) -> Choices:
        """Choose on sampled validation captions."""
        table, heads, guard = validation.labelled, fitted.guard.heads, fitted.guard
        confidence = ImageConfidence.read(guard.model, guard.processor, validation.samples).scores(
            table.image, validation.words
        )
        trained, untrained = set_scores(fitted.sets, validation)
        best = {"trained": 1 + best_of(table, trained[1:], heads.heads)}
        best["untrained"] = 1 + best_of(table, untrained[1:], heads.heads)
        return Choices(best_of(table, list(confidence.T), heads.heads), best)


def object_figures(
    fitted: Fitted, test: Recorded, sets: HeadSets, choices: Choices, confidence: ImageConfidence, full: bool
) -> tuple[dict[str, Figure], dict[str, F64]]:
    """The figures of object claims and their scores; ``full``: also sampling, self-verification and random heads."""
    table, heads = test.labelled, fitted.guard.heads
    scores = other_scores(fitted, test, confidence.scores(table.image, test.words)[:, 0])
    scores["without_logit_lens"] = fitted.sets[0].risk(table.x, table.kind)
    if full:
        scores["samples"] = disagreement(fitted.guard, test, SAMPLES)
        scores["self_verification"] = asked(fitted.guard, test)
    found = figures_of.auroc_figures(table, scores, heads.heads)
    if full:
        controls = set_scores(fitted.sets, test)
        found |= figures_of.control_figures(table, heads.heads, *controls, choices.best, len(sets.matched))
    threshold = fitted.detector.threshold("object", "f1")
    return found | figures_of.calibration_figures(table.false, table.image, scores["detector"], threshold), scores


def other_kinds(fitted: Fitted, train: Recorded, test: Recorded, confidence: ImageConfidence) -> dict[str, Figure]:
    """Colours, panels and locations; beside text alone and internal confidence. Kinds that the detector lacks are left out."""
    table, every = test.labelled, train.labelled
    panel = np.array(["panel" in f"{c.text} {c.related.text if c.related else ''}".lower() for c in table.claims])
    coloured = np.array([claim.text.lower() in COLOURS for claim in table.claims])
    text_only = Detector.fit(every.x, every.false, every.kind, fitted.guard.heads, features.TEXT_FEATURES)
    found: dict[str, Figure] = {}
    for name, kind, chosen in (
        ("colour", "attribute", coloured),
        ("wrong_panel", "location", panel),
        ("wrong_location", "location", ~panel),
    ):
        part = test.select(chosen & (table.kind == kind))
        claimed = part.labelled
        if kind not in fitted.detector.kinds or not len(claimed.false):
            continue
        scores = {"": fitted.detector.risk(claimed.x, claimed.kind)}
        if kind in text_only.kinds:
            scores["text_only_"] = text_only.risk(claimed.x, claimed.kind)
        scores["confidence_"] = confidence.scores(claimed.image, part.words)[:, 0]
        found |= figures_of.kind_figures(claimed, scores, name)
    return found


def transfer(fitted: Fitted, train: Recorded, test: Recorded) -> dict[str, Figure]:
    """A detector that was fitted to greedy captions, on sampled ones; in the tiny lab, one fitted to strips, on scenes."""
    known, table = train.of_kind("object").labelled, test.labelled
    greedy = known.image < len(train.samples) // 2  # the first half of the captions is greedy
    parts = {"greedy_to_sampled": (greedy, np.ones(len(table.false), bool))}
    if hasattr(train.samples[0], "drawing"):
        strip, scene = (
            np.array([(each.samples[image].drawing.panels > 0) is is_strip for image in labelled.image])
            for each, labelled, is_strip in ((train, known, True), (test, table, False))
        )
        parts["strips_to_scenes"] = (strip, scene)
    found = {}
    for name, (chosen, tested) in parts.items():
        some, others = known.select(chosen), table.select(tested)
        if min(some.false.sum(), (~some.false).sum()) >= 20 and others.false.any():
            risk = Detector.fit(some.x, some.false, some.kind, fitted.guard.heads).risk(others.x, others.kind)
            found[f"auroc_{name}"] = auroc(others.false, risk, others.image)
    return found


def wrong_image(measured: Subject, guard: GazeGuard, n: int) -> dict[str, Figure]:
    """True captions, checked with their own image and with another one of the same kind.

    A caption's risk is that of its riskiest object; the threshold flags 5 % of the true captions of validation images.
    Another image that happens to have all objects of the caption is not a wrong one, and is left out.
    """
    world = measured.world
    samples, held_out = (world.samples(split, n, SEED) for split in ("test", "validation"))

    def riskiest(of: Sequence[Any], captions: Sequence[str], images: Sequence[Image.Image]) -> F64:
        risks = []
        for caption, report in zip(captions, replay(guard, of, captions, images), strict=True):
            every = claims(caption)
            x = features.features(report.trace, every)
            risk = guard.detector.risk(x, [claim.kind for claim in every])
            risks.append(max(r for r, claim in zip(risk, every, strict=True) if claim.kind == "object"))
        return np.array(risks)

    own, captions = [sample.image for sample in samples], [world.true_caption(sample) for sample in samples]
    limit = np.quantile(
        riskiest(held_out, [world.true_caption(s) for s in held_out], [sample.image for sample in held_out]), 0.95
    )
    others = [(i + 2) % n for i in range(n)]  # in the tiny lab, strips and scenes take turns
    wrong = [
        i
        for i, j in enumerate(others)
        if any(false for claim, false in world.decided(samples[j], captions[i]) if claim.kind == "object")
    ]
    caught = riskiest([samples[i] for i in wrong], [captions[i] for i in wrong], [own[others[i]] for i in wrong]) >= limit
    alarms = riskiest(samples, captions, own) >= limit
    return {
        "wrong_image_recall_at_5fpr": over_images(len(wrong), lambda drawn: float(np.average(caught, weights=drawn))),
        "wrong_image_false_positive_rate": over_images(len(samples), lambda drawn: float(np.average(alarms, weights=drawn))),
    }


def blank_image(measured: Subject, guard: GazeGuard, test: Recorded) -> dict[str, Figure]:
    """The same captions replayed with white images, which leaves the text alone."""
    white = [Image.new("RGB", sample.image.size, (255, 255, 255)) for sample in test.samples]
    blind = label_claims(measured.world.decided, test.samples, replay(guard, test.samples, test.captions, white))
    objects = blind.select(blind.kind == "object")
    bins = figures_of.position_bins(objects, guard.heads.heads)
    risk = guard.detector.risk(objects.x, objects.kind)
    return {"auroc_blank_image_within_bins": auroc(objects.false, risk, objects.image, bins)}


# ------------------------------------------------------------------------------------------------------------ evaluation


def measure(measured: Subject, sizes: Sizes, picture: Path) -> tuple[dict[str, Figure], dict[str, Any]]:
    """All figures, and what the result file says beside them."""
    guard, world = measured.guard(), measured.world
    sets = HeadSets.draw(guard.heads, sizes.matched, sizes.any_layer, SEED)
    fitted, train = fit(measured, guard, sets, sizes.train)
    shipped, guard = guard.detector is not None, fitted.guard
    held_out = record(guard, world.decided, world.samples("validation", sizes.validation, FIT_SEED), True, sets.all)
    choices = Choices.make(fitted, held_out.of_kind("object"))
    samples = world.samples("test", sizes.test, SEED)
    confidence = ImageConfidence.read(guard.model, guard.processor, samples, choices.layer)
    figures: dict[str, Figure] = {}
    for decoding, do_sample in DECODINGS:
        test = record(guard, world.decided, samples, do_sample, sets.all if do_sample else (guard.heads.heads,))
        objects = test.of_kind("object")
        found, scores = object_figures(fitted, objects, sets, choices, confidence, do_sample)
        found |= other_kinds(fitted, train, test, confidence)
        for split in world.splits[1:]:
            if do_sample or split == "shifted":
                other = record(guard, world.decided, world.samples(split, sizes.other, SEED), do_sample).of_kind("object")
                found |= figures_of.split_figures(guard.detector, objects.labelled, other.labelled, guard.heads.heads, split)
        if do_sample:
            found |= transfer(fitted, train, objects) | blank_image(measured, guard, test)
            draw(picture, world, objects, scores)
        figures |= {f"{key}_{decoding}": value for key, value in found.items()}
    figures |= wrong_image(measured, guard, sizes.other)
    layers = {"confidence_layer": choices.layer, "distinct_matched_sets": guard.heads.distinct_matched_sets()}
    sizes_said = {key: getattr(sizes, key) for key in ("train", "validation", "test", "other")}
    meta = {
        "detector": "the subject's own" if shipped else "fitted here",
        "heads": [list(head) for head in guard.heads.heads],
        "sizes": sizes_said,
        **layers,
        **measured.meta(),
    }
    return figures, meta | {"image_ids": [sample.id for sample in samples]}


def main(
    out: Out, lab: Lab = "tiny", model: Model = None, artifacts: Artifacts = None, dtype: Dtype = "auto", quick: Quick = False
) -> None:
    """Measure the detector, and draw its calibration beside the JSON file."""
    torch.manual_seed(SEED)
    chosen = Chosen(lab, model, artifacts, dtype)
    measured = subject(chosen)
    figures, meta = measure(measured, (QUICK if quick else SIZES)[lab], out.with_suffix(".png"))
    keys = ISSUE_KEYS | {chosen.prefix + key: value for key, value in LAB_KEYS.items()}
    meta["command"] = "evals.detection" + measured.options()
    write(out, with_issue_keys(figures, keys), quick, meta.pop("image_ids"), measured.folder, seed=SEED, **meta)


if __name__ == "__main__":
    typer.run(main)
