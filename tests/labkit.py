"""What several tests need: the lab's processor, an untrained model of its class, and traces of any shape."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from gazeguard.lab.training.tiny_model import build_model, build_processor
from gazeguard.trace import SEGMENTS, GazeTrace
from gazeguard.vision.grid import ImageGrid

# Anything that a JSON or YAML file may hold.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@functools.cache
def processor() -> Idefics3Processor:
    return build_processor()


@functools.cache
def untrained() -> Idefics3ForConditionalGeneration:
    torch.manual_seed(0)
    return build_model(processor(), width=32, layers=2).eval()


def make_trace(words: list[str], count: int = 2, side: int = 2, seed: int = 0, **given: Any) -> GazeTrace:
    """A trace with one token per word, ``count`` heads and random figures; ``given`` replaces fields."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum([len(word) for word in words], dtype=np.int64)
    tokens, cells = len(words), side * side
    made = {
        "text": "".join(words),
        "token_ids": rng.integers(0, 2**40, tokens),
        "offsets": np.stack((ends - [len(word) for word in words], ends), axis=1).astype(np.int64).reshape(-1, 2),
        "logprobs": -rng.random(tokens, np.float32),
        "entropy": rng.random(tokens, np.float32),
        "gaze": rng.random((tokens, count, cells), np.float32) / cells,
        "segment_mass": rng.dirichlet(np.ones(len(SEGMENTS)), (tokens, count)).astype(np.float32),
        "attribution": rng.normal(size=(tokens, count)).astype(np.float32),
        "attended_logprob": -rng.random(tokens, np.float32),
        "internal_confidence": -rng.random(tokens, np.float32),
        "heads": tuple((1, head) for head in range(count)),
        "grid": ImageGrid.regular(side, side, (60, 40)),
        "model": "0123456789abcdef",
    }
    return GazeTrace(**{**made, **given})
