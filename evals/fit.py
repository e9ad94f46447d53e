"""Fit without labels: what its detector is worth beside one fitted on labels, in both labs and from one world to the other.

``tiny_*``: the tiny lab's model, fitted on drawn images of its own world (other ones than the test's); ``labelled`` is the
shipped detector. ``scenes_*``: the scenes lab's model, fitted on pictographs alone and tested on OpenMoji scenes, which no fit
has seen; ``with_pictures``: the same fit with unlabelled OpenMoji images as a user's own; ``labelled``: fitted on as many
captions of OpenMoji training scenes with labels. AUROC of objects is the mean within bins of ten tokens. ``lift``: over a
regression on text features fitted on the same drawings, paired; ``over_its_text_features``: over one on the two of them that
the detector itself has; ``over_token_nll``: over the log-probability of the token. ``ece``: calibration error on the other
world; ``outside_domain``: share of the test captions that are unlike the drawings, and *unchecked* for that. ``rerank_*``: what
was measured for rerank with the shipped detector. The drawings, captions and swaps are those of `gazeguard fit`.
What the gate answers to blind models is measured by `evals.blind_models`.

What is recorded is kept in ``--work FOLDER``: an interrupted run goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from evals.blind_models import recorded, text_only, together
from evals.common import Figure, Lab, Out, Quick, Work, auroc, figure, over_images, work_folder, write
from evals.detection_figures import position_bins
from evals.subject import Chosen, Subject, subject
from gazeguard.detection.calibration import calibration_error
from gazeguard.detection.cross_fitting import cross_fit
from gazeguard.detection.detector import Detector
from gazeguard.detection.features import TEXT_FEATURES, pick
from gazeguard.detection.metrics import lift, ranking
from gazeguard.detection.table import ClaimTable
from gazeguard.errors import given
from gazeguard.fitting.learn import TRANSFERRED, learn
from gazeguard.fitting.rows import Recorded, Rows
from gazeguard.fitting.run import Budget, Fitted, fit
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.labels import label_claims, write_captions
from gazeguard.lab.worlds import World
from gazeguard.progress import track

SEED, LABELLED_SEED, PICTURES_SEED = 200, 31, 77  # of the test images, the labelled captions, and the user's images
PROMPT = "Describe the picture."
TEXT = tuple(name for name in TRANSFERRED if name in TEXT_FEATURES)
UNIT = 24  # captions that are recorded together, and kept as one file
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    """How much is recorded: drawings, a user's images, captions with labels, test captions, swaps per caption, comic pages for
    the gaze heads (0: those that ship), and drawings on which each prompt is tried."""

    drawings: int
    pictures: int
    labelled: int
    test: int
    swaps: int = 2
    strips: int = 24
    probes: int = 8

    @property
    def budget(self) -> Budget:
        return Budget(self.drawings, self.pictures, self.swaps, max(1, self.strips), rerank=0, probes=self.probes)


FULL = {"tiny": Sizes(192, 0, 0, 200, strips=0), "scenes": Sizes(96, 200, 120, 144)}
QUICK = {"tiny": Sizes(24, 0, 0, 24, 1, 0), "scenes": Sizes(4, 1, 8, 6, 1, 0, probes=1)}


def tiny(measured: Subject, size: Sizes, folder: Path) -> dict[str, Figure]:
    """The tiny lab: both detectors on the same captions."""
    shipped = measured.guard()
    options: dict[str, Any] = {"budget": size.budget, "styles": ["pictographs"], "heads": shipped.heads}
    fitted = fit(measured.model, measured.processor, folder / "tiny", **options)
    test = captioned(shipped, measured.world, "test", size.test, SEED, True, folder / "tiny-captions").rows
    return tiny_figures(given(fitted.detector), shipped, test)


def tiny_figures(label_free: Detector, shipped: GazeGuard, test: Rows) -> dict[str, Figure]:
    """The figures of a detector fitted without labels, beside the shipped one, on test captions."""
    risks = {"label_free": risk(label_free, test), "labelled": risk(given(shipped.detector), test)}
    found = compared(test, risks, shipped.heads, "tiny")
    for kind in ("attribute", "location"):
        rows = test.kinds == kind
        part, judged = test.select(rows), kind in label_free.kinds
        found[f"tiny_refused_{kind}"] = figure(float(not judged))
        area = auroc(part.false, risks["label_free"][rows], part.image) if judged else figure(0.5)  # nothing is ranked
        found[f"tiny_auroc_{kind}_label_free"] = area
    return found | rerank_figures(given(shipped.detector), "tiny")


def scenes(measured: Subject, size: Sizes, folder: Path) -> dict[str, Figure]:
    """The scenes lab: from pictographs to OpenMoji."""
    model, processor, other = measured.model, measured.processor, measured.world
    shipped = measured.guard()
    heads = None if size.strips else shipped.heads
    images = folder / "pictures"
    images.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(other.samples("train", size.pictures, PICTURES_SEED)):
        sample.image.save(images / f"{number:04}.png")
    options: dict[str, Any] = {"budget": size.budget, "styles": ["pictographs"], "prompt": PROMPT, "heads": heads}
    joined = fit(model, processor, folder / "scenes", images=images, **options)
    alone = without_images(folder / "scenes", joined.heads)
    guard, captions = GazeGuard(model, processor, heads=alone.heads), folder / "scenes-captions"
    half = size.labelled // 2
    known = [captioned(guard, other, "train", half, LABELLED_SEED + greedy, not greedy, captions).rows for greedy in (0, 1)]
    known[1] = replace(known[1], image=known[1].image + half)
    test = captioned(guard, other, "test", size.test, SEED, True, captions)
    found = scenes_figures(alone, joined, Rows.joined(known), test, recorded(folder / "scenes").rows)
    return found | rerank_figures(given(shipped.detector), "scenes")


def without_images(folder: Path, heads: GazeHeads) -> Fitted:
    """What a fit would have found without the user's images, from what it recorded of drawings."""
    drawings = recorded(folder)
    states = dict(zip(drawings.images.tolist(), drawings.states, strict=True)) if drawings.states.size else {}
    learnt = learn(drawings.rows, heads, states, wording_nll=drawings.wording_nll)
    return Fitted(heads, learnt.detector, learnt.figures)


def scenes_figures(alone: Fitted, joined: Fitted, known: Rows, test: Recorded, drawings: Rows) -> dict[str, Figure]:
    """The figures of fits to drawings alone, and with a user's images, on test captions; beside a fit to labelled claims."""
    heads = alone.heads
    detectors = {
        "label_free_other_style": given(alone.detector),
        "labelled": cross_fit(ClaimTable(known.x, known.false, known.kinds, known.image), heads).detector,
        "label_free_with_pictures": given(joined.detector),
        "text_only_other_style": text_only(drawings, heads),
    }
    risks = {name: risk(each, test.rows) for name, each in detectors.items()}
    texts = {
        "": risks["text_only_other_style"],
        "_over_its_text_features": risk(text_only(drawings, heads, TEXT), test.rows),
        "_over_token_nll": pick(test.rows.x, heads.heads, ("token_nll",))[:, 0],
    }
    found = compared(test.rows, risks, heads, "scenes")
    found["scenes_ece_labelled"] = ece(test.rows, risks["labelled"])
    for key, name, each in (
        ("", "label_free_other_style", alone), ("_with_pictures", "label_free_with_pictures", joined),
    ):  # fmt: skip
        found[f"scenes_ece_label_free{key}"] = ece(test.rows, risks[name])
        for over, score in texts.items():
            found[f"scenes_lift_label_free{over}{key}"] = lift_within_bins(test.rows, risks[name], score, heads)
        found[f"scenes_outside_domain{key}"] = outside(test, detectors[name])
        found[f"scenes_usable{key}"] = figure(float(not each.refused))
        found |= {f"scenes_gate{key}_{of_gate}": figure(value) for of_gate, value in each.figures.items()}
        print(f"scenes{key}: {each.refused or 'usable'}")
    return found


def rerank_figures(detector: Detector, prefix: str) -> dict[str, Figure]:
    """What the shipped detector says of rerank: how far below the trivial frontier, at equal recall, and whether that helps."""
    evidence = given(detector.rerank)
    found = {f"{prefix}_rerank_{name}": figure(value) for name, value in evidence.figures.items() if "against" not in name}
    value, *ends = (evidence.figures[f"against_frontier{end}"] for end in ("", "_low", "_high"))
    found[f"{prefix}_rerank_against_frontier"] = figure(value, tuple(ends))
    return found | {f"{prefix}_rerank_usable": figure(float(evidence.usable))}


def captioned(guard: GazeGuard, source: World, split: str, count: int, seed: int, do_sample: bool, folder: Path) -> Recorded:
    """Captions of a split's images and their claims with labels, unit by unit; what the folder has is not recorded again."""
    parts = []
    for first in track(range(0, count, UNIT), f"captions of {split} images"):
        stop = min(first + UNIT, count)
        path = folder / f"{split}-{seed}-{'sampled' if do_sample else 'greedy'}-{first:04}-{stop:04}.npz"
        if not path.is_file():
            torch.manual_seed(seed * 10**4 + first)
            samples = source.samples(split, stop, seed)[first:]
            reports = write_captions(guard, samples, do_sample, UNIT)
            claims = label_claims(source.decided, samples, reports)
            image, of_rows = claims.image + first, np.full(len(claims.x), "labelled")
            unknown = np.full(len(claims.x), np.nan)
            rows = Rows(claims.x, claims.false, claims.kind, image, image, of_rows, np.full(len(claims.x), ""), unknown)
            states = np.zeros((len(samples), 0), np.float32) if claims.states is None else claims.states
            numbers = np.arange(first, stop)
            captions = tuple(report.caption for report in reports)
            Recorded(rows, captions, numbers, states, given(claims.wording_nll)).save(path)
        parts.append(Recorded.load(path))
    return together(parts)


# ---------------------------------------------------------------------------------------------------------- figures


def risk(detector: Detector, rows: Rows) -> F64:
    """(claims,): the detector's risks."""
    return detector.risk(rows.x, rows.kinds.tolist())


def compared(test: Rows, risks: dict[str, F64], heads: GazeHeads, prefix: str) -> dict[str, Figure]:
    """AUROC of objects within bins by each detector, and paired differences from the labelled one."""
    rows = test.kinds == "object"
    part = test.select(rows)
    bins, count = position_bins(part, heads.heads), int(part.image.max()) + 1
    areas = {name: ranking(part.false, risk[rows], part.image, bins) for name, risk in risks.items()}
    found = {f"{prefix}_auroc_{name}": over_images(count, area) for name, area in areas.items()}
    for name in areas:
        if name != "labelled":
            key = f"{prefix}_difference_{name}"
            found[key] = over_images(count, lambda drawn, name=name: areas[name](drawn) - areas["labelled"](drawn))
    found[f"{prefix}_claims"], found[f"{prefix}_base_rate"] = figure(len(part.false)), figure(float(part.false.mean()))
    return found


def lift_within_bins(test: Rows, risk: F64, text: F64, heads: GazeHeads) -> Figure:
    """Paired difference of AUROC of objects within bins, over the text alone."""
    rows = test.kinds == "object"
    part = test.select(rows)
    return figure(*lift(part.false, risk[rows], text[rows], part.image, position_bins(part, heads.heads)))


def ece(test: Rows, risk: F64) -> Figure:
    """Expected calibration error of objects."""
    rows = test.kinds == "object"
    part, of_part = test.select(rows), risk[rows]

    def error(drawn: NDArray[np.int64]) -> float:
        return calibration_error(np.repeat(of_part, drawn[part.image]), np.repeat(part.false, drawn[part.image]))

    return over_images(int(part.image.max()) + 1, error)


def outside(test: Recorded, detector: Detector) -> Figure:
    """Share of captions that lie outside of the detector's domain."""
    domain, rows = detector.domain, test.rows
    if domain is None:  # a fit to few images has none
        return figure(0.0)
    answers = [
        bool(domain.outside(rows.x[rows.image == image], detector.heads, state if state.size else None))
        for image, state in zip(test.images, test.states, strict=True)
    ]
    return over_images(len(answers), lambda drawn: float(np.average(answers, weights=drawn)))


MEASURED: dict[str, Callable[[Subject, Sizes, Path], dict[str, Figure]]] = {"tiny": tiny, "scenes": scenes}


def main(out: Out, lab: Lab = "tiny", work: Work = None, quick: Quick = False) -> None:
    """Measure fits without labels."""
    measured, size = subject(Chosen(lab)), (QUICK if quick else FULL)[lab]
    with work_folder(work) as folder:
        figures = MEASURED[lab](measured, size, folder)
    command = f"evals.fit{measured.options()}"
    write(out, figures, quick, checkpoint=measured.folder, seed=SEED, command=command, **measured.meta(), **asdict(size))


if __name__ == "__main__":
    typer.run(main)
