"""Fit without labels: what its detector is worth beside one fitted on labels, in both labs and from one world to the other.

``tiny_*``: the tiny lab's model, fitted on drawn images of its own world (other ones than the test's); ``labelled`` is the
shipped detector. ``scenes_*``: the scenes lab's model, fitted on pictographs alone and tested on OpenMoji scenes, which no fit
has seen; ``with_pictures``: the same fit with unlabelled OpenMoji images as a user's own; ``labelled``: fitted on as many
captions of OpenMoji training scenes with labels. AUROC of objects is the mean within bins of ten tokens. ``lift``: over a
regression on text features fitted on the same drawings, paired. ``ece``: calibration error on the other world.
``refused_*``: 1 when the gate refuses a model that does not look: a copy of the lab's whose image features are shuffled over
positions and channels, and one with random weights. The drawings, captions and swaps are those of `gazeguard fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText

from evals.common import Figure, Out, Quick, auroc, figure, over_images, write
from evals.detection_figures import position_bins
from gazeguard import lab
from gazeguard.detection import features
from gazeguard.detection.calibration import calibration_error
from gazeguard.detection.cross_fitting import cross_fit
from gazeguard.detection.detector import Detector
from gazeguard.detection.metrics import ranking
from gazeguard.detection.table import ClaimTable
from gazeguard.errors import InputError, given
from gazeguard.fitting.rows import Recorded, Rows
from gazeguard.fitting.run import STATE_FOLDER, Budget, Fitted, fit
from gazeguard.guard import GazeGuard
from gazeguard.heads.artifact import GazeHeads
from gazeguard.lab.labels import LabelledClaims, caption_and_label, label_claims, write_captions
from gazeguard.lab.worlds import world

SEED, LABELLED_SEED, PICTURES_SEED = 200, 31, 77  # of the test images, the labelled captions, and the user's images
PROMPT = "Describe the picture."
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    """Images of each part."""

    drawings: int
    pictures: int
    test: int
    swaps: int = 2

    @property
    def budget(self) -> Budget:
        return Budget(self.drawings, self.pictures, self.swaps, 24, rerank=0)


FULL = {"tiny": Sizes(192, 0, 200), "scenes": Sizes(72, 48, 72)}  # a quarter of an hour each
QUICK = {"tiny": Sizes(48, 0, 48, 1), "scenes": Sizes(24, 8, 16, 1)}


# ------------------------------------------------------------------------------------------------------------- tiny


def tiny(size: Sizes, folder: Path) -> dict[str, Figure]:
    """The tiny lab: both detectors on the same captions, and the models that do not look."""
    model, processor = lab.load()
    shipped = GazeGuard(model, processor)
    fitted = fit(model, processor, folder / "tiny", budget=size.budget, styles=["pictographs"], heads=shipped.heads)
    torch.manual_seed(SEED)
    samples = world("tiny").samples("test", size.test, SEED)
    test = label_claims(world("tiny").decided, samples, write_captions(shipped, samples, do_sample=True))
    risks = {"label_free": given(fitted.detector), "labelled": given(shipped.detector)}
    found = compared(test, {name: each.risk(test.x, test.kind.tolist()) for name, each in risks.items()}, shipped.heads, "tiny")
    for kind in ("attribute", "location"):
        part = test.select(test.kind == kind)
        if kind in given(fitted.detector).kinds:
            risk = given(fitted.detector).risk(part.x, part.kind.tolist())
            found[f"tiny_auroc_{kind}_label_free"] = auroc(part.false, risk, part.image)
    return found | blind(size, folder, shipped.heads)


def blind(size: Sizes, folder: Path, heads: GazeHeads) -> dict[str, Figure]:
    """Gate figures of models that do not look."""
    found = {}
    model, processor = lab.load()
    with shuffled_features(model):
        few = Budget(min(96, size.drawings), 0, 1, 24, rerank=0)
        options: dict[str, Any] = {"budget": few, "styles": ["pictographs"]}
        given_heads = refusal(lambda: fit(model, processor, folder / "shuffled", heads=heads, **options))
        own_heads = refusal(lambda: fit(model, processor, folder / "shuffled-own", **options))
    torch.manual_seed(SEED)
    untrained = AutoModelForImageTextToText.from_config(model.config).eval()
    random = refusal(lambda: fit(untrained, processor, folder / "random", **options))
    for name, (reason, figures) in {"shuffled": given_heads, "shuffled_own_heads": own_heads, "random": random}.items():
        print(f"{name}: {reason or 'NOT REFUSED'}")
        found[f"refused_{name}"] = figure(float(bool(reason)))
        if "lift" in figures:
            found[f"lift_{name}"] = figure(figures["lift"], (figures["lift_low"], figures["lift_high"]))
    return found


def refusal(run: Callable[[], Fitted]) -> tuple[str, dict[str, float]]:
    """Why a fit is refused, "" if it is not; and its figures."""
    try:
        fitted = run()
    except InputError as error:
        return str(error), {}
    return fitted.refused, fitted.figures


@contextmanager
def shuffled_features(model: Any) -> Iterator[None]:
    """Inside, what the connector makes of images is shuffled over positions and channels, another way for other images."""

    def shuffle(_: Any, __: Any, states: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(states.abs().sum() * 1000) % 2**31)  # the self-test repeats a pass
        return states.flatten()[torch.randperm(states.numel(), generator=generator)].view_as(states)

    handle = model.model.connector.register_forward_hook(shuffle)
    try:
        yield
    finally:
        handle.remove()


# ----------------------------------------------------------------------------------------------------------- scenes


def scenes(size: Sizes, folder: Path) -> dict[str, Figure]:
    """The scenes lab: from pictographs to OpenMoji."""
    model, processor = lab.load("scenes")
    other = world("scenes")
    options: dict[str, Any] = {"budget": size.budget, "styles": ["pictographs"], "prompt": PROMPT}
    alone = fit(model, processor, folder / "scenes", **options)
    alone_detector = given(alone.detector)
    images = folder / "pictures"
    images.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(other.samples("train", size.pictures, PICTURES_SEED)):
        sample.image.save(images / f"{number:04}.png")
    joined = fit(model, processor, folder / "scenes", images=images, **options)
    guard = GazeGuard(model, processor, heads=alone.heads)
    known = caption_and_label(guard, other, "train", size.drawings // 2, LABELLED_SEED)
    labelled = cross_fit(ClaimTable(known.x, known.false, known.kind, known.image), alone.heads).detector
    torch.manual_seed(SEED)
    samples = other.samples("test", size.test, SEED)
    test = label_claims(other.decided, samples, write_captions(guard, samples, do_sample=True))
    detectors = {
        "label_free_other_style": alone_detector,
        "labelled": labelled,
        "label_free_with_pictures": given(joined.detector),
        "text_only_other_style": text_only(recorded(folder / "scenes"), alone.heads),
    }
    risks = {name: each.risk(test.x, test.kind.tolist()) for name, each in detectors.items()}
    found = compared(test, risks, alone.heads, "scenes")
    objects = test.kind == "object"
    for key, name in (("", "label_free_other_style"), ("_with_pictures", "label_free_with_pictures")):
        found[f"scenes_ece_label_free{key}"] = ece(test.select(objects), risks[name][objects])
        found[f"scenes_lift_label_free{key}"] = lift(test, risks[name], risks["text_only_other_style"], alone.heads)
    found["scenes_ece_labelled"] = ece(test.select(objects), risks["labelled"][objects])
    for key, each in (("", alone), ("_with_pictures", joined)):
        found[f"scenes_usable{key}"] = figure(float(not each.refused))
        found |= {f"scenes_gate{key}_{name}": figure(value) for name, value in each.figures.items()}
        print(f"scenes{key}: {each.refused or 'usable'}; features {given(each.detector).kinds['object'].names}")
    return found


def recorded(folder: Path) -> Rows:
    """The claims about drawings that a fit has recorded."""
    return Rows.joined([Recorded.load(path).rows for path in sorted((folder / STATE_FOLDER).glob("drawings-*.npz"))])


def text_only(rows: Rows, heads: GazeHeads) -> Detector:
    """A detector on text features alone, fitted on the model's own claims about drawings."""
    own = rows.select(rows.of("own"))
    table = ClaimTable(own.x, own.false, own.kinds, own.image)
    return cross_fit(table, heads, features.TEXT_FEATURES).detector


# ---------------------------------------------------------------------------------------------------------- figures


def compared(test: LabelledClaims, risks: dict[str, F64], heads: GazeHeads, prefix: str) -> dict[str, Figure]:
    """AUROC of objects within bins by each detector, and paired differences from the labelled one."""
    rows = test.kind == "object"
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


def lift(test: LabelledClaims, risk: F64, text: F64, heads: GazeHeads) -> Figure:
    """Paired difference of AUROC of objects within bins, over the text alone."""
    rows = test.kind == "object"
    part = test.select(rows)
    bins = position_bins(part, heads.heads)
    areas = [ranking(part.false, each[rows], part.image, bins) for each in (risk, text)]
    return over_images(int(part.image.max()) + 1, lambda drawn: areas[0](drawn) - areas[1](drawn))


def ece(part: LabelledClaims, risk: F64) -> Figure:
    """Expected calibration error."""

    def error(drawn: NDArray[np.int64]) -> float:
        return calibration_error(np.repeat(risk, drawn[part.image]), np.repeat(part.false, drawn[part.image]))

    return over_images(int(part.image.max()) + 1, error)


MEASURED = {"tiny": tiny, "scenes": scenes}


def main(
    out: Out,
    lab: Annotated[str, typer.Option("--lab", help="tiny, scenes, or both.")] = "both",
    work: Annotated[Path | None, typer.Option(help="Folder of the fits, to go on with; by default a temporary one.")] = None,
    quick: Quick = False,
) -> None:
    """Measure fits without labels."""
    chosen = list(MEASURED) if lab == "both" else [lab]
    figures: dict[str, Figure] = {}
    with TemporaryDirectory() as temporary:
        for name in chosen:
            figures |= MEASURED[name]((QUICK if quick else FULL)[name], work or Path(temporary))
    write(out, figures, quick, seed=SEED, labs=chosen)


if __name__ == "__main__":
    typer.run(main)
