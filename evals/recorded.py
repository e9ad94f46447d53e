"""Recorded captions: what a model writes of images, its labelled claims, and what controls and published signals need of them.

Traces of all heads are large, so that they are reduced caption by caption to columns of the claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.baselines import detection as baselines
from gazeguard.attention.backbone import Head
from gazeguard.claims.parse import claims
from gazeguard.detection import features
from gazeguard.errors import given
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.labels import Decide, LabelledClaims, label_claims, write_captions
from gazeguard.progress import track
from gazeguard.report import Report
from gazeguard.trace import GazeTrace

BATCH = 25  # captions
F64 = NDArray[np.float64]
B8 = NDArray[np.bool_]


@dataclass(frozen=True)
class Recorded:
    """Captions of samples, and their claims that the drawings decide.

    labelled: the claims, with the features of the gaze heads
    by_heads: for each of the head sets that was asked for (claims, F) `features` of a replay
    signals:  name -> (claims, n), `baselines.columns`; empty when no head set was asked for
    """

    samples: Sequence[Any]
    captions: Sequence[str]
    labelled: LabelledClaims
    by_heads: Sequence[F64]
    signals: dict[str, F64]

    def select(self, chosen: B8) -> Recorded:
        """Some of the claims: ``chosen`` (claims,)."""
        signals = {name: values[chosen] for name, values in self.signals.items()}
        return replace(
            self, labelled=self.labelled.select(chosen), by_heads=[x[chosen] for x in self.by_heads], signals=signals
        )

    def of_kind(self, kind: str) -> Recorded:
        """The claims of a kind."""
        return self.select(self.labelled.kind == kind)

    @property
    def words(self) -> list[str]:
        """For each claim the word that names what it claims: the attribute, or the object's noun."""
        return [c.span.text if c.kind == "attribute" else c.phrase.head.text for c in self.labelled.claims]


def replay(
    guard: GazeGuard, samples: Sequence[Any], captions: Sequence[str], images: Sequence[Image.Image] | None = None
) -> list[Report]:
    """The reports of captions, checked in batches, by default with the samples' own images."""
    images = [sample.image for sample in samples] if images is None else images
    reports: list[Report] = []
    for start in track(range(0, len(samples), BATCH), "replaying captions"):
        group = slice(start, start + BATCH)
        reports += guard.check_all(images[group], captions[group], [sample.prompt for sample in samples[group]])
    return reports


def all_heads_guard(guard: GazeGuard) -> GazeGuard:
    """A guard that records all heads, without the logit lens."""
    heads = GazeHeads.model_validate(guard.heads.model_dump() | {"heads": guard.heads.all_heads, "unusable": ""})
    every = GazeGuard(guard.model, guard.processor, heads=heads, grid=guard.tracer.grid)
    every.tracer.lens = False
    return every


def of_heads(trace: GazeTrace, heads: Sequence[Head]) -> GazeTrace:
    """A trace with some of its heads."""
    columns = [trace.heads.index(head) for head in heads]
    arrays = {name: getattr(trace, name)[:, columns] for name in ("gaze", "segment_mass", "attribution")}
    return replace(trace, heads=tuple(heads), **arrays)


def record(
    guard: GazeGuard,
    decided: Decide,
    samples: Sequence[Any],
    do_sample: bool,
    head_sets: Sequence[Sequence[Head]] = (),
) -> Recorded:
    """Write captions, and record them. Without head sets only the features of the gaze heads are recorded."""
    every = all_heads_guard(guard) if head_sets else None
    reports: list[Report] = []
    parts: list[tuple[list[F64], dict[str, F64]]] = []
    for start in track(range(0, len(samples), BATCH), "recording captions"):
        group = samples[start : start + BATCH]
        live = write_captions(guard, group, do_sample, BATCH)
        reports += live
        if every is not None:
            for sample, report, again in zip(
                group, live, replay(every, group, [report.caption for report in live]), strict=True
            ):
                chosen = [claim for claim, _ in decided(sample, report.caption)]
                if report.trace is not None and chosen:
                    parts.append(_columns(given(again.trace), claims(report.caption), chosen, head_sets))
    labelled = label_claims(decided, samples, reports)
    by_heads = [np.concatenate([x[i] for x, _ in parts]) for i in range(len(head_sets))]
    signals = {name: np.concatenate([each[name] for _, each in parts]) for name in (parts[0][1] if parts else ())}
    return Recorded(samples, [report.caption for report in reports], labelled, by_heads, signals)


def _columns(
    trace: GazeTrace, every: Sequence[Any], chosen: Sequence[Any], head_sets: Sequence[Sequence[Head]]
) -> tuple[list[F64], dict[str, F64]]:
    """Of the chosen claims of one caption: the features by head set, and the columns of the published signals."""
    wanted = [every.index(claim) for claim in chosen]
    by_heads = [features.features(of_heads(trace, heads), every)[wanted] for heads in head_sets]
    rows = [baselines.columns(trace, trace.tokens(claim.span.start, claim.span.end).start) for claim in chosen]
    return by_heads, {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def join(first: Recorded, second: Recorded) -> Recorded:
    """Two recordings as one; the images of the second come after those of the first."""
    a, b = first.labelled, second.labelled
    labelled = LabelledClaims(
        np.concatenate((a.x, b.x)),
        np.concatenate((a.false, b.false)),
        np.concatenate((a.kind, b.kind)),
        np.concatenate((a.image, b.image + len(first.samples))),
        (*a.claims, *b.claims),
    )
    return Recorded(
        [*first.samples, *second.samples],
        [*first.captions, *second.captions],
        labelled,
        [np.concatenate(pair) for pair in zip(first.by_heads, second.by_heads, strict=True)],
        {name: np.concatenate((first.signals[name], second.signals[name])) for name in first.signals},
    )
