"""Card of a detector: what to know before relying on it, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gazeguard.claims.parse import ClaimKind, Kind
from gazeguard.detection.domain import Domain
from gazeguard.detection.gate import Gate
from gazeguard.detection.regression import Regression

CARD = """---
library_name: gazeguard
tags: [gazeguard, hallucination-detection, vision-language]
---
# A GazeGuard detector

It estimates the probability that a claim of a caption is false, from the attention of one model's gaze heads while the model
generates the caption. It belongs to the model with fingerprint `{model}` and its heads (layer, head) {heads}, and refuses
others.

```python
guard = GazeGuard(model, processor, heads=..., detector=Detector.from_pretrained(...))
```

| kind of claim | fitted on (false) | data | validation (false), images | data | AUROC | average precision | Brier | ECE |
|---|---|---|---|---|---|---|---|---|
{metrics}

No image is in both parts. *Cross-fitted* claims are the claims of the fit, each judged by a fit to the other images. The
metrics come from the validation data, which also set the probabilities and the thresholds below: measure on your own images
before you rely on them. False is the positive class; intervals are 95 %, over images.

{notes}

| kind of claim | rule | threshold | after self-verification |
|---|---|---|---|
{thresholds}

`bound_0.05`: at most 5 % of the claims are false and not flagged, in expectation over captions like these (same model, prompt,
decoder and kind of image); for other captions the bound does not hold. Under a policy that verifies, thresholds apply to the
risk after the model's answers.

![reliability](reliability.png)
"""


def write_card(model: str, heads: Sequence[tuple[int, int]], kinds: Mapping[Kind, Regression], notes: Sequence[str]) -> str:
    """The card of a detector.

    Args:
        model: Fingerprint of the model.
        heads: The gaze heads as (layer, head).
        kinds: The regression of each kind of claim.
        notes: What else to know, each a sentence.

    Returns:
        Markdown with the front matter that the hub reads.
    """
    return CARD.format(
        model=model,
        heads=list(heads),
        metrics="\n".join(_metrics(kind, regression) for kind, regression in kinds.items()),
        thresholds="\n".join(row for kind, each in kinds.items() for row in _rules(kind, each)),
        notes="\n".join(f"- {note}" for note in notes),
    )


def notes(
    kinds: Mapping[Kind, Regression], left_out: Mapping[ClaimKind, str], domain: Domain | None, gate: Gate | None
) -> list[str]:
    """What to know beside the metrics, each a sentence: how the detector was made, and what it does not judge.

    Args:
        kinds: The regression of each kind of claim.
        left_out: Why other kinds have none.
        domain: What it was fitted on, if it says so.
        gate: Whether it is usable, if that was measured.
    """
    cross_fitted = [kind for kind, each in kinds.items() if each.validation and each.validation.cross_fitted]
    sentences = [f"Cross-fitted: {', '.join(cross_fitted)}."] * bool(cross_fitted)
    sentences += [
        f"{kind}: uses the direct logit attribution of the gaze heads, not a regression, because it ranked these few claims "
        "better; its scale and threshold are calibrated."
        for kind, each in kinds.items()
        if each.method == "attribution"
    ]
    sentences += [f"{kind}: not judged. {reason}" for kind, reason in left_out.items()]
    sentences += [] if domain is None else domain.notes()
    if gate is not None and not gate.usable:
        sentences.append(f"Not usable, every verdict is *unchecked*: {gate.reason}")
    return sentences


def _rules(kind: str, regression: Regression) -> list[str]:
    """The rows of a kind of claim: the threshold of each rule, and that after the answers, "as before" for what nobody asks."""
    after = {name: f"{risk:.3f}" for name, risk in regression.verified.items()}
    asked = regression.answer is not None
    return [
        f"| {kind} | {rule} | {risk:.3f} | {after.get(rule, 'none') if asked else 'as before'} |"
        for rule, risk in regression.thresholds.items()
    ]


def _metrics(kind: str, regression: Regression) -> str:
    """The row of a kind of claim."""
    row = f"| {kind} | {regression.claims:,} ({regression.false:,}) | {regression.data} | "
    metrics = regression.validation
    if metrics is None:
        return row + "none | | | | | |"
    return row + (
        f"{metrics.claims:,} ({metrics.false:,}) of {metrics.images:,} | {metrics.data} | {metrics.area} | "
        f"{metrics.average_precision:.3f} | {metrics.brier:.3f} | {metrics.ece:.3f} |"
    )
