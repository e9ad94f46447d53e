"""Card of a fitted detector: how it was fitted, what the gate found, and how far a user's images lie from the drawn ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gazeguard.detection.detector import CARD_FILE, Detector
from gazeguard.errors import given
from gazeguard.fitting.learn import LIKE

MADE = """
## How it was fitted

`gazeguard fit` fitted it without labels, on captions that the model itself wrote for drawn images (styles: {styles}). The
content of a drawing is known exactly, so every claim about it is known to be true or false. Further claims are false by
construction: the same captions with one claim swapped for another plausible one, with another image, and with a blank image.
These claims help to fit the weights and never set a probability or a threshold.{images}{captions}

| gate | |
|---|---|
| verdicts | {usable} |
{figures}
"""
PICTURES = """

The model also captioned {count} of the user's own images. Each claim about them counts as *mostly* true: such a claim weighs
less than one about a drawing, and still less if it seems risky, so that a hallucination among them does little harm. Swapped
claims about these images are false by construction. {unlike}"""
UNLIKE = (
    "A classifier tells claims about these images from claims about drawings with AUROC {area:.2f} (.5: the gaze heads "
    "attend alike to both; 1: never alike). {advice}"
)
CAPTIONS = """

{count} labelled captions outweigh everything else. If they have enough false claims, they alone set probabilities and
thresholds."""
WORDS = {
    "false_objects": "false claims about objects",
    "true_objects": "true claims about objects",
    "auroc": "AUROC, objects of drawings, cross-fitted by image",
    "text_auroc": "AUROC of the text alone",
    "lift": "lift over the text alone",
    "lift_low": "lift, lower end of the 95 % interval",
    "lift_high": "lift, upper end",
    "image_auroc": "AUROC of true claims against the same captions with another image",
    "image_auroc_low": "the same, lower end of the 95 % interval",
    "image_auroc_high": "the same, upper end",
    "pictures_auroc": "AUROC of swapped objects on the user's images",
    "pictures_auroc_low": "the same, lower end of the 95 % interval",
    "pictures_auroc_high": "the same, upper end",
    "pictures_unlike": "AUROC of a classifier of the user's images against drawings",
}


def write_fit_card(
    folder: Path, detector: Detector, figures: Mapping[str, float], styles: Sequence[str], images: int, captions: int
) -> None:
    """Write the card of a detector with how it was fitted, in the place of any other.

    Args:
        folder: Where ``detector.json`` is.
        detector: The detector.
        figures: Of `learn`.
        styles: Of the drawings.
        images: Number of the user's images.
        captions: Number of labelled captions.
    """
    gate = given(detector.gate)
    text = MADE.format(
        styles=", ".join(styles),
        images=PICTURES.format(count=images, unlike=_unlike(figures)) if images else "",
        captions=CAPTIONS.format(count=captions) if captions else "",
        usable="given" if gate.usable else f"withheld (`usable: false`), every caption is *unchecked*: {gate.reason}",
        figures="\n".join(f"| {WORDS.get(name, name)} | {value:.4g} |" for name, value in figures.items()),
    )
    (folder / CARD_FILE).write_text(detector.card() + text, encoding="utf-8")


def _unlike(figures: Mapping[str, float]) -> str:
    area = figures.get("pictures_unlike")
    if area is None:
        return ""
    advice = (
        "They lie far apart: the probabilities are those of drawings, and what is outside the detector's domain is *unchecked*."
        if area >= LIKE
        else "They lie close together."
    )
    return UNLIKE.format(area=area, advice=advice)
