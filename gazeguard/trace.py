"""What was seen? The `GazeTrace`: what was written, and where the gaze heads looked while it was written.

The laws that everything here rests on; each has a test:

(a) row t is the query that *predicted* token t (for the first token: the last prompt position);
(b) ``check`` of a generated caption gives the trace of the generation, within float tolerance;
(c) watching changes no logit;
(d) a left-padded batch equals its single rows, logits and gaze;
(e) policy ``mark`` leaves the generated ids identical to plain ``generate``;
(f) leaving the context restores the model exactly, also after an exception;
(g) empty, truncated or imageless input is *unchecked*, never pass;
(h) a detector or heads file made for another model is refused;
(i) a hook that saw nothing raises: no silent no-op.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gazeguard.errors import ArtifactError
from gazeguard.vision.grid import ImageGrid

SEGMENTS = ("image", "prompt", "generated", "first")  # where a row's attention goes; the four sum to one
MAX_FILE_BYTES = 2**30
FORMAT = 2

WHOLE = ("token_ids", "offsets", "grid_image")  # arrays of whole numbers in a file; all others are float32

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class GazeTrace:
    """One caption and the gaze behind each of its T tokens, for H gaze heads over N image cells.

    token_ids:  (T,) int64
    offsets:    (T, 2) int64, the characters of ``text`` that each token covers, end exclusive
    logprobs:   (T,) float32, nats, of the written token under the model (before temperature or any processor)
    entropy:    (T,) float32, nats, of the model's next-token distribution
    gaze:       (T, H, N) float32, attention on each image cell
    segment_mass:     (T, H, 4) float32, attention on `SEGMENTS`: all image tokens, other prompt, generated text, first token
    attribution:    (T, H) float32, logits: what the head's look adds to the written token over its rivals
                (direct logit attribution of the head's output; see `gazeguard.recorder.attribution`)
    content:    (T,) float32, nats, log-probability of the written token where the heads look; named: at the best cell of all;
                NaN when the cells were not heard (see `gazeguard.recorder.attended_logprob`)
    heads:      (layer, head) of each gaze head
    finished:   the caption ended by itself, not by a length limit
    """

    text: str
    token_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    logprobs: F32
    entropy: F32
    gaze: F32
    segment_mass: F32
    attribution: F32
    attended_logprob: F32
    internal_confidence: F32
    heads: tuple[tuple[int, int], ...]
    grid: ImageGrid
    model: str
    finished: bool = True

    def __post_init__(self) -> None:
        t, h, n = len(self.token_ids), len(self.heads), len(self.grid)
        wanted = {
            "offsets": (t, 2),
            "logprobs": (t,),
            "entropy": (t,),
            "gaze": (t, h, n),
            "segment_mass": (t, h, len(SEGMENTS)),
            "attribution": (t, h),
            "attended_logprob": (t,),
            "internal_confidence": (t,),
        }
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise ArtifactError(
                    f"A trace of {t} tokens, {h} heads and {n} cells needs {name} of shape {shape}, "
                    f"not {getattr(self, name).shape}."
                )

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def _edges(self) -> tuple[list[int], list[int]]:
        """Where the tokens start and end, as lists: a caption's spans are looked up a hundred times, faster than in arrays."""
        return self.offsets[:, 0].tolist(), self.offsets[:, 1].tolist()

    def tokens(self, start: int, end: int) -> range:
        """The tokens that cover any of the characters ``start`` to ``end`` of the text; empty when none does."""
        # Neither column ever falls, so the tokens are found by bisection.
        starts, ends = self._edges
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        return range(first, last) if first < last else range(0)

    def save(self, path: str | Path) -> None:
        """Write the trace as one safetensors file."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)}
        arrays |= {"grid_boxes": self.grid.boxes, "grid_image": self.grid.image}
        meta = {
            "format": FORMAT,
            "text": self.text,
            "heads": self.heads,
            "model": self.model,
            "finished": self.finished,
            "sizes": self.grid.sizes,
        }
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path, {"gazeguard": json.dumps(meta)})

    @classmethod
    def load(cls, path: str | Path) -> GazeTrace:
        """Read a trace. Raises `ArtifactError` for anything that is not one; nothing in the file is executed."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ArtifactError(f"{path} is larger than {MAX_FILE_BYTES} bytes, more than any trace. Is it the right file?")
            with safe_open(path, framework="numpy") as file:
                meta = json.loads((file.metadata() or {})["gazeguard"])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            for name, array in arrays.items():
                if array.dtype != (wanted := np.int64 if name in WHOLE else np.float32):
                    raise ArtifactError(f"{path} has {name} in {array.dtype}, where a trace has {np.dtype(wanted)}.")
                if (
                    name in ("gaze", "segment_mass") and ((array < 0) | (array > 1.001)).any()
                ):  # NaN, of a model's overflow, may be
                    raise ArtifactError(f"{path} has {name} outside of 0 to 1, which is no attention.")
            if meta["format"] != FORMAT:
                raise ArtifactError(f"{path} has trace format {meta['format']!r}; this version reads format {FORMAT}.")
            sizes = tuple((int(w), int(h)) for w, h in meta["sizes"])
            return cls(
                text=str(meta["text"]),
                heads=tuple((int(layer), int(head)) for layer, head in meta["heads"]),
                model=str(meta["model"]),
                finished=bool(meta["finished"]),
                grid=ImageGrid(arrays.pop("grid_boxes"), arrays.pop("grid_image"), sizes),
                **arrays,
            )
        except (
            OSError, SafetensorError, LookupError, TypeError, ValueError, OverflowError, AttributeError, RecursionError
        ) as error:  # fmt: skip
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{path} is not a gaze trace ({error}). Traces are written by GazeTrace.save.") from error
