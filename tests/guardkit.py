"""What tests of guards share: lab samples, batches of them, and comparison of traces."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from gazeguard import lab
from gazeguard.lab.truth import mentions
from gazeguard.vision.encoding import encode

SAMPLES = lab.samples("test", 6, seed=7)


def batch_of(guard, samples=SAMPLES, **changes):
    made = encode(guard.model, guard.processor, [s.image for s in samples], [s.prompt for s in samples])
    return {**made.inputs, "max_new_tokens": 60, "do_sample": False, **changes}


def assert_same_trace(one, other, tolerance=1e-4):
    assert one.text == other.text
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_array_equal(one.offsets, other.offsets)
    for name in ("gaze", "segment_mass", "attribution", "attended_logprob", "internal_confidence", "logprobs", "entropy"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=tolerance, err_msg=name)
    assert (one.image_state is None) == (other.image_state is None)
    if one.image_state is not None:
        np.testing.assert_allclose(one.image_state, other.image_state, atol=tolerance, err_msg="image_state")


def plain(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=120, **{"do_sample": False, **options})


def invented(samples: Any, reports: Any) -> int:
    return sum(not m.present for s, r in zip(samples, reports, strict=True) for m in mentions(s.drawing, r.caption))


def two_lengths(vlm: tuple) -> tuple[list, list[str], dict[str, Tensor]]:
    """Samples, prompts and batch of twelve images with prompts of two lengths, so that rows are left-padded."""
    samples = lab.samples("validation", 12, seed=7)
    long = "Describe the panels in any order."
    prompts = [long if i % 3 == 0 and s.drawing.panels else s.prompt for i, s in enumerate(samples)]
    inputs = encode(*vlm, [s.image for s in samples], prompts).inputs
    assert not inputs["attention_mask"][:, 0].all(), "a row is padded"
    return samples, prompts, inputs
