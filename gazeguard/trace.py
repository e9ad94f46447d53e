"""Gaze trace: a caption, and the attention of the gaze heads behind each of its tokens.

The ten invariants that everything in GazeGuard rests on; each has a test:

(a) decoding step t is the query that *predicted* token t (for the first token: the last prompt position);
(b) ``check`` of a generated caption gives the trace of the generation, within float tolerance;
(c) recording changes no logit;
(d) a left-padded batch equals its single rows, logits and gaze;
(e) policy ``mark`` leaves the generated ids identical to plain ``generate``;
(f) leaving the context restores the model exactly, also after an exception;
(g) empty, truncated or imageless input is *unchecked*, never pass;
(h) a detector or heads file made for another model is refused;
(i) a recorder that captured nothing raises: no silent no-op;
(j) the features of a claim do not depend on tokens after it.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gazeguard.errors import ArtifactError, InputError
from gazeguard.vision.grid import ImageGrid
from gazeguard.vision.images import load_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEGMENTS = ("image", "prompt", "generated", "first")  # the parts of the keys; attention on the four sums to one
MAX_FILE_BYTES = 2**30
MAX_EDGE = 2**24  # pixels
FORMAT = 2
INTEGER_ARRAYS = ("token_ids", "offsets", "grid_image")  # in a file; all others are float32
SHARES = ("gaze", "segment_mass")  # arrays of attention, from 0 to 1
MAX_REPR_TEXT = 40  # characters of a caption in the repr
HEAT = "#d62728"

F32 = NDArray[np.float32]


class Characters(Protocol):
    """A span of a caption, such as `gazeguard.claims.parse.Span`: characters ``start`` to ``end``, end exclusive."""

    @property
    def start(self) -> int:
        """First character."""
        ...

    @property
    def end(self) -> int:
        """One after the last character."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class GazeTrace:
    """One caption and the gaze behind each of its T tokens, for H gaze heads over N image tokens.

    Attributes:
        text: The caption.
        token_ids: (T,) int64.
        offsets: (T, 2) int64, the characters of ``text`` that each token covers, end exclusive.
        logprobs: (T,) float32, nats, of the generated token under the model (before temperature or any processor).
        entropy: (T,) float32, nats, of the model's next-token distribution.
        gaze: (T, H, N) float32, attention on each image token.
        segment_mass: (T, H, 4) float32, attention by segment, see `SEGMENTS`.
        attribution: (T, H) float32, logits: what the head adds to the generated token over its contrast tokens (see
            `gazeguard.attention.attribution.direct_logit_attribution`).
        attended_logprob: (T,) float32, nats, log-probability of the generated token in the logit lens of the attended image
            tokens; NaN when their states were not captured (see `gazeguard.attention.logit_lens.attended_logprobs`).
        internal_confidence: (T,) float32, nats, the same at the best image token of all.
        heads: (layer, head) of each gaze head.
        grid: The part of the image that each image token covers.
        model: The fingerprint of the model.
        finished: The caption ended by itself, not by a length limit.
        image_state: (width,) float32, mean over the image tokens of their normed states in the last layer; None when these were
            not captured, or there are none (cross-attention).

    Raises:
        ArtifactError: The arrays do not fit the tokens, heads and image tokens.
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
    image_state: F32 | None = None

    def __post_init__(self) -> None:
        t, h, n = len(self.token_ids), len(self.heads), len(self.grid)
        expected = {
            "offsets": (t, 2),
            "logprobs": (t,),
            "entropy": (t,),
            "gaze": (t, h, n),
            "segment_mass": (t, h, len(SEGMENTS)),
            "attribution": (t, h),
            "attended_logprob": (t,),
            "internal_confidence": (t,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ArtifactError(
                    f"A trace of {t} tokens, {h} heads and {n} image tokens needs {name} of shape {shape}, "
                    f"not {getattr(self, name).shape}."
                )
        if self.image_state is not None and self.image_state.ndim != 1:
            raise ArtifactError(f"A trace needs image_state with one dimension, not {self.image_state.ndim}.")

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= MAX_REPR_TEXT else f"{self.text[: MAX_REPR_TEXT - 3]}..."
        counts = (len(self), "token"), (len(self.heads), "gaze head"), (len(self.grid), "image token")
        sizes = ", ".join(f"{count} {name}" if count == 1 else f"{count} {name}s" for count, name in counts)
        return f"GazeTrace({sizes}: {text!r})"

    @cached_property
    def _edges(self) -> tuple[list[int], list[int]]:
        """Where the tokens start and end, as lists: a caption's spans are located a hundred times, faster than in arrays."""
        return self.offsets[:, 0].tolist(), self.offsets[:, 1].tolist()

    def tokens(self, start: int, end: int) -> range:
        """The tokens that cover any of the characters ``start`` to ``end`` of the text; empty when none does."""
        # Neither column ever falls, so the tokens are found by bisection.
        starts, ends = self._edges
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        return range(first, last) if first < last else range(0)

    def mean_gaze(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Attention on each image token, (N,), mean over heads and the given tokens; NaN, and no tokens, count as none."""
        if not len(tokens) or not self.heads:
            return np.zeros(len(self.grid))
        gaze = self.gaze[list(tokens)].astype(np.float64).mean(axis=(0, 1))
        return np.where(np.isfinite(gaze), gaze, 0)

    def heatmap(
        self, at: Characters | str | Iterable[int] | int, image: Any = None, image_index: int = 0, title: str | None = None
    ) -> Figure:
        """Draw the attention of the gaze heads over the image grid while some tokens were generated.

        Args:
            at: Numbers of tokens; or a span of the caption, an object with ``start`` and ``end``; or words of the caption,
                the first time that they occur in it.
            image: The image, for the background: a path, bytes or a PIL image.
            image_index: Which of the prompt's images.
            title: By default the text of the tokens.

        Returns:
            A matplotlib figure; ``figure.savefig`` writes it, and a notebook shows it.

        Raises:
            InputError: The caption has no such tokens, the prompt no such image, or the image cannot be read.
        """
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import to_rgba_array
        from matplotlib.figure import Figure

        tokens = self._tokens_at(at)
        if not 0 <= image_index < len(self.grid.sizes):
            raise InputError(f"The trace has no image {image_index}; expected a number below {len(self.grid.sizes)}.")
        width, height = self.grid.sizes[image_index]
        figure = Figure(figsize=(6, 6 * height / width + 0.6), layout="constrained")
        axes = figure.subplots()
        if image is not None:
            axes.imshow(load_image(image), extent=(0, width, height, 0))
        located = np.flatnonzero((self.grid.image == image_index) & np.isfinite(self.grid.boxes).all(axis=1))
        mass = self.mean_gaze(tokens)[located]
        if mass.max(initial=0) > 0:
            x0, y0, x1, y1 = (self.grid.boxes[located] * np.tile((width, height), 2)).T
            colours = to_rgba_array([HEAT] * len(mass), 0.7 * np.sqrt(mass / mass.max()))  # the root shows faint attention, too
            corners = np.stack(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), axis=0).transpose(2, 0, 1)
            axes.add_collection(PolyCollection(list(corners), facecolors=colours, linewidths=0))
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=(), yticks=())
        axes.set_frame_on(image is None)  # without an image its edges are drawn
        if title is None:
            title = " ".join("".join(self.text[slice(*self.offsets[token])] for token in tokens).split())
        axes.set_title(title, fontsize=10, parse_math=False, wrap=True)
        return figure

    def _tokens_at(self, at: Characters | str | Iterable[int] | int) -> list[int]:
        """The numbers of the tokens that the argument of `heatmap` names, at least one."""
        if isinstance(at, str):
            start = self.text.find(at) if at else -1
            tokens = list(self.tokens(start, start + len(at))) if start >= 0 else []
        elif hasattr(at, "start") and hasattr(at, "end"):
            tokens = list(self.tokens(at.start, at.end))
        else:
            tokens = [int(token) for token in ([at] if isinstance(at, int) else at)]
        if not tokens or not all(0 <= token < len(self) for token in tokens):
            raise InputError(
                f"The caption {self.text!r} has no tokens at {at!r}; expected words or a span of it, or numbers of tokens "
                f"below {len(self)}."
            )
        return tokens

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
        """Read a trace; nothing in the file is executed.

        Raises:
            ArtifactError: The file is not a trace.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ArtifactError(f"{path} is larger than {MAX_FILE_BYTES} bytes, more than any trace. Is it the right file?")
            with safe_open(path, framework="numpy") as file:
                meta = json.loads((file.metadata() or {})["gazeguard"])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            _check_arrays(path, arrays)
            if meta["format"] != FORMAT:
                raise ArtifactError(f"{path} has trace format {meta['format']!r}; this version reads format {FORMAT}.")
            sizes = tuple((int(w), int(h)) for w, h in meta["sizes"])
            if not all(0 < edge <= MAX_EDGE for size in sizes for edge in size):
                raise ArtifactError(f"{path} has image sizes outside of 1 to {MAX_EDGE} pixels, which no image has.")
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


def _check_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Raises `ArtifactError` for an array of another type, and for attention that is none."""
    for name, array in arrays.items():
        if array.dtype != (expected := np.int64 if name in INTEGER_ARRAYS else np.float32):
            raise ArtifactError(f"{path} has {name} in {array.dtype}, where a trace has {np.dtype(expected)}.")
        if name in SHARES and ((array < 0) | (array > 1.001)).any():  # NaN, of a model's overflow, may be
            raise ArtifactError(f"{path} has {name} outside of 0 to 1, which is no attention.")
