"""Scores of claims, higher for more likely false: the detector's, those of other signals, and those of random head sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.baselines import detection as baselines
from evals.guards import without_logit_lens
from evals.recorded import BATCH, Recorded
from gazeguard.attention.backbone import Head
from gazeguard.claims.english import singular
from gazeguard.claims.parse import claims
from gazeguard.detection import features
from gazeguard.detection.cross_fitting import choose_regularisation
from gazeguard.detection.detector import Detector
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.labels import LabelledClaims, self_verification_answers
from gazeguard.progress import track
from gazeguard.vision.encoding import encode

F64 = NDArray[np.float64]
PRIOR = ("position", "object_index", "repeated")
MATCHED_SETS, ANY_SETS, DRAWS = 10, 20, 200
MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class HeadSets:
    """The gaze heads, and random sets of as many other heads: of the same layers, and of any."""

    gaze: tuple[Head, ...]
    matched: tuple[tuple[Head, ...], ...]
    any_layer: tuple[tuple[Head, ...], ...]

    @staticmethod
    def draw(heads: GazeHeads, matched: int, any_layer: int, seed: int) -> HeadSets:
        """Different sets, as many as asked for or as there are."""
        rng = np.random.default_rng(seed)
        others = heads.others()
        same = dict.fromkeys(heads.matched(rng) for _ in range(DRAWS if matched else 0))
        size = min(len(heads.heads), len(others))
        loose = [tuple(sorted(others[i] for i in rng.permutation(len(others))[:size])) for _ in range(any_layer)]
        return HeadSets(heads.heads, tuple(same)[:matched], tuple(loose))

    @property
    def all(self) -> tuple[tuple[Head, ...], ...]:
        """The gaze heads first, then the matched sets, then the others."""
        return (self.gaze, *self.matched, *self.any_layer)


@dataclass(frozen=True)
class Fitted:
    """What was fitted to training captions: the data, the detector that is measured, and the text-only regression."""

    guard: GazeGuard
    detector: Detector
    text_only: Detector
    train: Recorded  # of objects
    sets: Sequence[Detector]  # of the gaze heads without the logit lens, then of every random set


def other_scores(fitted: Fitted, test: Recorded, confidence: F64) -> dict[str, F64]:
    """Every score of object claims but those of `set_scores` and of sampling.

    confidence: (claims,) internal confidence at the layer that was chosen on validation captions
    """
    known, objects, heads = fitted.train.labelled, test.labelled, fitted.guard.heads
    column = dict(zip(features.TEXT_FEATURES, features.pick(objects.x, heads.heads, features.TEXT_FEATURES).T, strict=True))
    prior, train_prior = (features.pick(each.x, heads.heads, PRIOR) for each in (objects, known))
    lookback, inside = (fitted.train.signals[name] for name in ("lookback", "haloprobe"))
    return {
        "detector": fitted.detector.risk(objects.x, objects.kind),
        "dla": -features.pick(objects.x, heads.heads, ("attribution",))[:, 0],
        "text_only": fitted.text_only.risk(objects.x, objects.kind),
        "position": column["position"],
        "position_repetition": baselines.probe(known.table, train_prior, prior),
        "token_nll": column["token_nll"],
        "entropy": column["entropy"],
        "svar": test.signals["svar"][:, 0],
        "preceding": test.signals["preceding"][:, 0],
        "lookback": baselines.probe(known.table, lookback, test.signals["lookback"]),
        "haloprobe": baselines.haloprobe(known.table, inside, train_prior, test.signals["haloprobe"], prior),
        "confidence": confidence,
    }


def lean_detector(known: LabelledClaims, x: F64, heads: GazeHeads) -> Detector:
    """A regression on all features ``x`` of training claims but the logit lens, regularised by nested validation."""
    names = without_logit_lens(heads.heads)
    strength = choose_regularisation(features.pick(x, heads.heads, names), known.table, names)
    return Detector.fit(x, known.false, known.kind, heads, names, strength)


def set_detectors(train: Recorded, heads: GazeHeads, sets: HeadSets) -> list[Detector]:
    """A `lean_detector` for each of ``sets.all``."""
    pairs = track(list(zip(sets.all, train.by_heads, strict=True)), "fitting random heads")
    return [lean_detector(train.labelled, x, heads.with_heads(chosen)) for chosen, x in pairs]


def set_scores(detectors: Sequence[Detector], test: Recorded) -> tuple[list[F64], list[F64]]:
    """For each head set the risk by its detector, and minus the DLA of its heads, not fitted."""
    kinds = test.labelled.kind
    trained = [each.risk(x, kinds) for each, x in zip(detectors, test.by_heads, strict=True)]
    untrained = [
        -features.pick(x, each.heads, ("attribution",))[:, 0] for each, x in zip(detectors, test.by_heads, strict=True)
    ]
    return trained, untrained


def nouns(caption: str) -> set[str]:
    """The objects that a caption names, in the singular."""
    return {singular(claim.phrase.head.text.lower()) for claim in claims(caption) if claim.kind == "object"}


@torch.no_grad()
def disagreement(guard: GazeGuard, test: Recorded, samples: int) -> F64:
    """(claims,) the share of sampled captions of the same image that do not name the claim's object.

    Agreement with samples of one's own is SelfCheckGPT's signal (Manakul et al. 2023, arXiv 2303.08896).
    """
    named: list[list[set[str]]] = [[] for _ in test.samples]
    for start in track(range(0, len(test.samples), BATCH), "sampling captions"):
        group: Sequence[Any] = test.samples[start : start + BATCH]
        inputs = encode(guard.model, guard.processor, [s.image for s in group], [s.prompt for s in group]).inputs
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": True}
        for _ in range(samples):
            ids = guard.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            for i, caption in enumerate(guard.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)):
                named[start + i].append(nouns(caption))
    objects = [singular(word.lower()) for word in test.words]
    return np.array(
        [np.mean([noun not in each for each in named[i]]) for noun, i in zip(objects, test.labelled.image, strict=True)]
    )


def asked(guard: GazeGuard, test: Recorded) -> F64:
    """(claims,) minus the log-odds of yes to "is it there?", 0 where the model does not answer."""
    return -np.nan_to_num(self_verification_answers(guard, test.samples, test.labelled))
