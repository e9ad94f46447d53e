"""Labelled claims: captions that a model writes of a laboratory's images, and which of their claims the drawings make false."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gazeguard.claims.parse import Claim, parse
from gazeguard.decoding.verification import ask
from gazeguard.detection import features
from gazeguard.detection.table import ClaimTable, stack_states
from gazeguard.guard import GazeGuard
from gazeguard.lab.worlds import Sample, World
from gazeguard.progress import track
from gazeguard.report import Report
from gazeguard.vision.encoding import encode

Decide = Callable[[Any, str], Sequence[tuple[Claim, bool]]]


def write_captions(guard: GazeGuard, samples: Sequence[Sample], do_sample: bool, batch_size: int = 25) -> list[Report]:
    """One guarded caption per sample, greedy or sampled at temperature 1."""
    reports: list[Report] = []
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    for batch in track(batches, "writing captions"):
        encoded = encode(guard.model, guard.processor, [s.image for s in batch], [s.prompt for s in batch])
        guard.generate(**encoded.inputs, max_new_tokens=200, do_sample=do_sample)
        reports += guard.reports
    return reports


@dataclass(frozen=True)
class LabelledClaims:
    """The claims of several captions that the drawings decide.

    x:        (claims, F) `features`
    false:    (claims,) labels
    kind:     (claims,) "object", "attribute" or "location"
    image:    (claims,) index of the image of each
    claims:   the claims themselves
    states:   (images, width) `GazeTrace.image_state` of each image; None where no image has one
    wording_nll: (captions,) `features.wording_nll` of each caption
    """

    x: NDArray[np.float64]
    false: NDArray[np.bool_]
    kind: NDArray[np.str_]
    image: NDArray[np.int64]
    claims: tuple[Claim, ...]
    states: NDArray[np.float32] | None = None
    wording_nll: NDArray[np.float64] | None = None

    @property
    def table(self) -> ClaimTable:
        """As detectors are fitted to it."""
        return ClaimTable(self.x, self.false, self.kind, self.image, states=self.states, wording_nll=self.wording_nll)

    def select(self, chosen: NDArray[np.bool_]) -> LabelledClaims:
        """Some of the claims: ``chosen`` (claims,)."""
        rows = np.flatnonzero(chosen)
        claims = tuple(self.claims[i] for i in rows)
        return LabelledClaims(
            self.x[rows], self.false[rows], self.kind[rows], self.image[rows], claims, self.states, self.wording_nll
        )


def label_claims(decided: Decide, samples: Sequence[Sample], reports: Sequence[Report]) -> LabelledClaims:
    """The features and labels of the claims of captions; captions without a trace are left out.

    Args:
        decided: `World.decided`: the claims of a caption whose truth is known.
        samples: What the captions describe.
        reports: One per sample.
    """
    rows, image, wording_nll = [], [], []
    labelled: list[tuple[Claim, bool]] = []
    for index, (sample, report) in enumerate(zip(samples, reports, strict=True)):
        of_caption = decided(sample, report.caption)
        if report.trace is None or not of_caption:
            continue
        caption = parse(report.caption)
        every = list(caption.claims)
        wording_nll.append(features.wording_nll(report.trace, caption.phrases))
        rows.append(features.features(report.trace, every)[[every.index(claim) for claim, _ in of_caption]])
        image += [index] * len(of_caption)
        labelled += of_caption
    chosen, false = zip(*labelled, strict=True)
    kinds = np.array([claim.kind for claim in chosen])
    states = stack_states([None if report.trace is None else report.trace.image_state for report in reports])
    return LabelledClaims(np.concatenate(rows), np.array(false), kinds, np.array(image), chosen, states, np.array(wording_nll))


def caption_and_label(guard: GazeGuard, world: World, split: str, n: int, seed: int) -> LabelledClaims:
    """The labelled claims of ``n`` greedy and ``n`` sampled captions of different images of a split."""
    torch.manual_seed(seed)
    samples = world.samples(split, 2 * n, seed)
    reports = write_captions(guard, samples[:n], do_sample=False) + write_captions(guard, samples[n:], do_sample=True)
    return label_claims(world.decided, samples, reports)


def self_verification_answers(
    guard: GazeGuard, samples: Sequence[Sample], labelled: LabelledClaims, batch_size: int = 25
) -> NDArray[np.float64]:
    """(claims,) log-odds of yes to the question whether the object of each claim is there; NaN for locations.

    samples: those that the captions of the labelled claims describe
    """
    answers = np.full(len(labelled.claims), np.nan)
    batches = [range(i, min(i + batch_size, len(samples))) for i in range(0, len(samples), batch_size)]
    for batch in track(batches, "self-verification"):
        in_batch = (labelled.image >= batch.start) & (labelled.image < batch.stop)
        chosen = np.flatnonzero((labelled.kind != "location") & in_batch)
        images, prompts = zip(*((samples[i].image, samples[i].prompt) for i in batch), strict=True)
        rows, phrases = (labelled.image[chosen] - batch.start).tolist(), [labelled.claims[i].phrase for i in chosen]
        answers[chosen] = ask(guard.model, guard.processor, images, prompts, rows, phrases).cpu().numpy()
    return answers
