"""Card of a detector: what to know before relying on it, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gazeguard.detection.regression import Regression

CARD = """---
library_name: gazeguard
tags: [gazeguard, hallucination-detection, vision-language]
---
# A GazeGuard detector

The probability that a claim of a caption is false, from the attention of the gaze heads of one model while it generates the
caption. It belongs to the model with fingerprint `{model}` and its heads (layer, head) {heads}, and refuses others.

```python
guard = GazeGuard(model, processor, heads=..., detector=Detector.from_pretrained(...))
```

| kind of claim | fitted on (false) | data | validation (false), images | data | AUROC | average precision | Brier | ECE |
|---|---|---|---|---|---|---|---|---|
{metrics}

No image is in both parts. The metrics are those of the validation data, which also set the probabilities and the thresholds
below: measure on your own images before relying on them. False is the positive class.

| kind of claim | rule | threshold |
|---|---|---|
{thresholds}

`bound_0.05`: at most 5 % of the claims stay as false ones, in expectation over captions like these: the same model,
prompt, decoder and kind of image. Under any other the bound is void.

![reliability](reliability.png)
"""


def write_card(model: str, heads: Sequence[tuple[int, int]], kinds: Mapping[str, Regression]) -> str:
    """The card of a detector.

    Args:
        model: Fingerprint of the model.
        heads: The gaze heads as (layer, head).
        kinds: The regression of each kind of claim.

    Returns:
        Markdown with the front matter that the hub reads.
    """
    rules = [f"| {kind} | {rule} | {risk:.3f} |" for kind, each in kinds.items() for rule, risk in each.thresholds.items()]
    return CARD.format(
        model=model,
        heads=list(heads),
        metrics="\n".join(_metrics(kind, regression) for kind, regression in kinds.items()),
        thresholds="\n".join(rules),
    )


def _metrics(kind: str, regression: Regression) -> str:
    """The row of a kind of claim."""
    row = f"| {kind} | {regression.claims:,} ({regression.false:,}) | {regression.data} | "
    metrics = regression.validation
    if metrics is None:
        return row + "none | | | | | |"
    return row + (
        f"{metrics.claims:,} ({metrics.false:,}) of {metrics.images:,} | {metrics.data} | {metrics.auroc:.3f} | "
        f"{metrics.average_precision:.3f} | {metrics.brier:.3f} | {metrics.ece:.3f} |"
    )
