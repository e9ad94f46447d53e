"""Fitting of a detector: without labels on drawn scenes (`run`), or to captions with labels (`labelled`)."""

from gazeguard.fitting.labelled import (
    Label,
    LabelledCaption,
    fit_detector,
    labelled_claims,
    read_captions,
    yes_probability,
)
from gazeguard.fitting.rerank import measure_rerank

__all__ = ["Label", "LabelledCaption", "fit_detector", "labelled_claims", "measure_rerank", "read_captions", "yes_probability"]
