"""Prompt of a layout rule: one row of a batch, and everything that says how its image tokens lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prompt:
    """One row of a batch of prompts, as numpy arrays, and the objects that it was made with.

    Attributes:
        ids: (T,) int64 token ids, without padding.
        runs: (start, length) of each unbroken run of image tokens.
        inputs: This row's part of the processor's output.
        sizes: (width, height) of each image in pixels.
        model: The model, of which rules read the configuration.
        processor: The processor, or None.
        original_sizes: Whether ``sizes`` are those of the original images, not of what the processor made of them.
    """

    ids: NDArray[np.int64]
    runs: tuple[tuple[int, int], ...]
    inputs: Mapping[str, Any]
    sizes: tuple[tuple[int, int], ...]
    model: Any
    processor: Any
    original_sizes: bool = True

    @property
    def model_type(self) -> str:
        """The family, as transformers' configurations call it."""
        return self.model.config.model_type

    @property
    def run_lengths(self) -> list[int]:
        """The number of image tokens in each run."""
        return [length for _, length in self.runs]

    @property
    def token_count(self) -> int:
        """The number of image tokens."""
        return sum(self.run_lengths)

    @property
    def image_token_ids(self) -> NDArray[np.int64]:
        """(N,) int64, the ids of the image tokens alone."""
        return np.concatenate([self.ids[start : start + length] for start, length in self.runs])

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, or None."""
        return getattr(self.processor, "tokenizer", None)

    @property
    def image_processor(self) -> Any:
        """The processor's image processor, or None."""
        return getattr(self.processor, "image_processor", None)


RUN_SHAPES = ("spatial_shapes", "target_sizes")  # as the processors of Lfm2-VL and MiniCPM-V call them


def run_shapes(prompt: Prompt) -> list[tuple[int, int]] | None:
    """(rows, columns) of image tokens in each run, or None where they do not fit.

    Some processors report (height, width) of each run in patches, of which two by two or four by four become one token; the
    runs of the others are squares.
    """
    reported = next((prompt.inputs[name] for name in RUN_SHAPES if prompt.inputs.get(name) is not None), None)
    lengths = prompt.run_lengths
    if reported is None:
        return [(round(length**0.5),) * 2 for length in lengths]
    if len(reported) != len(lengths):
        return None
    shapes = []
    for (height, width), length in zip(np.asarray(reported).tolist(), lengths, strict=True):
        side = max(1, math.isqrt(height * width // length))
        if height % side or width % side or height * width != side**2 * length:
            return None
        shapes.append((height // side, width // side))
    return shapes
