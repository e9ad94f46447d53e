"""Where shall it look? Targets in a picture, turned into the bias that `gazeguard.recorder.AttentionRecorder.steer` adds to attention scores.

The bias is Gandikota & Bau's (2026, arXiv 2606.14703, section 4): ``+strength`` on the image cells of the target and
``-strength`` on the other image cells, before the softmax, in the gaze heads alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gazeguard.attention.recorder import AttentionRecorder
from gazeguard.errors import InputError
from gazeguard.vision.geometry import Box
from gazeguard.vision.grid import ImageGrid

Mode = Literal["both", "boost", "suppress"]
Target = Box | Mapping[int, Box | None] | None

# Odds of exp(2 x 5) between a cell inside and one outside: the look arrives, and within the target a head keeps its own
# profile. Large numbers flatten it: bfloat16 has steps of 64 at 10,000, more than any difference of scores, so that
# attention becomes a plain mean over the target.
STRENGTH, MOST = 5.0, 50.0
SIGNS: dict[str, tuple[float, float]] = {"both": (1.0, -1.0), "boost": (1.0, 0.0), "suppress": (0.0, -1.0)}


@dataclass(frozen=True)
class SteeringTarget:
    """Where the gaze heads are made to look while something is written.

    targets:  one for all rows of a batch, or one per row: a box x0 y0 x1 y1 in pixels of the picture; or a schedule,
              ``{0: box, 20: another, 40: None}``, of the new token from which each holds; None leaves the gaze alone
    strength: logits; 5 saturates
    mode:     ``boost`` the target, ``suppress`` the rest of the picture, or ``both``
    prompt:   turn the prompt's rows, too, not only those that predict new words
    image:    which of a prompt's pictures the boxes are in
    Raises `InputError` for what is none of these.
    """

    targets: Target | Sequence[Target]
    strength: float = STRENGTH
    mode: Mode = "both"
    prompt: bool = True
    image: int = 0

    def __post_init__(self) -> None:
        if self.mode not in SIGNS:
            raise InputError(f"There is no way {self.mode!r} to look at something. Choose one of {', '.join(SIGNS)}.")
        if not 0 < self.strength <= MOST:
            raise InputError(
                f"A strength of {self.strength} is not between 0 and {MOST:.0f}. 5 saturates; much more only flattens the look "
                "over its target."
            )
        for schedule in self._schedules():
            for step, box in schedule.items():
                if not isinstance(step, int) or step < 0:
                    raise InputError(f"A schedule's keys are numbers of new tokens, 0 or more, not {step!r}.")
                if box is not None and not (len(box) == 4 and box[0] < box[2] and box[1] < box[3]):
                    raise InputError(f"A target is a box (x0, y0, x1, y1) in pixels with x0 < x1 and y0 < y1, not {box!r}.")

    def _schedules(self) -> list[Mapping[int, Box | None]]:
        """The targets of every row, or of all, each as a schedule."""
        many = isinstance(self.targets, Sequence) and not (self.targets and np.isscalar(self.targets[0]))
        return [own if isinstance(own, Mapping) else {0: own} for own in (self.targets if many else [self.targets])]

    def steer(self, recorder: AttentionRecorder, grids: Sequence[ImageGrid]) -> None:
        """Turn a recorder that has begun to listen to a batch, whose rows have these grids.

        Raises `InputError` for another number of targets than of rows, and for a box outside of its picture.
        """
        schedules = self._schedules()
        if len(schedules) not in (1, len(grids)):
            raise InputError(
                f"{len(schedules)} targets were given for {len(grids)} prompts. Give one for all, or one per prompt in order."
            )
        schedules *= len(grids) // len(schedules)
        if not 0 <= self.image < min(len(grid.sizes) for grid in grids):
            raise InputError(f"There is no picture {self.image} in the prompt. Pictures are counted from 0.")
        for step in sorted({step for schedule in schedules for step in schedule}):
            boxes = [schedule[max(at)] if (at := [s for s in schedule if s <= step]) else None for schedule in schedules]
            bias = self._bias(boxes, grids) if any(boxes) else None
            recorder.steer(
                None if bias is None else bias[:, None].expand(-1, len(recorder.heads), -1).to(recorder.model.device),
                prompt=self.prompt and step == 0,
                start=step,
            )

    def _bias(self, boxes: Sequence[Box | None], grids: Sequence[ImageGrid]) -> Tensor:
        """(batch, cells) float32 logits; 0 for a row without a box and for cells past a row's own."""
        bias = torch.zeros(len(grids), max(map(len, grids)))
        inside, outside = (sign * self.strength for sign in SIGNS[self.mode])
        for row, (box, grid) in enumerate(zip(boxes, grids, strict=True)):
            if box is not None:
                bias[row, : len(grid)] = torch.from_numpy(np.where(image_tokens_in(grid, box, self.image), inside, outside))
        return bias


def image_tokens_in(grid: ImageGrid, box: Box, image: int = 0) -> NDArray[np.bool_]:
    """(cells,) which image cells lie in ``box`` by more than half, or the one that lies in it most when none does.

    Raises `InputError` for a box that touches no cell.
    """
    share = grid.overlap(box, image)
    if not share.any():
        width, height = grid.sizes[image]
        raise InputError(
            f"The box {tuple(box)} touches no image cell of its picture, which has {width} x {height} pixels. Boxes are in "
            "pixels of the picture; when generate gets the processor's output alone, pass picture_sizes, too."
        )
    return share >= min(0.5, float(share.max()))


def undescribed_regions(grid: ImageGrid, gaze: NDArray[np.floating], count: int) -> list[Box]:
    """Where has a caption not been? The ``count`` fields of the first picture, cut into thirds both ways, on which the gaze
    rested least; boxes in pixels.

    gaze: (things, cells) attention at the words that name things; none at all leaves every field undescribed_regions alike
    """
    width, height = grid.sizes[0]
    fields = [(x * width / 3, y * height / 3, (x + 1) * width / 3, (y + 1) * height / 3) for y in range(3) for x in range(3)]
    # At the best thing's, not in all: a field is described when one thing in it was.
    seen = [gaze[:, image_tokens_in(grid, field)].sum(1).max(initial=0) for field in fields]
    return [fields[i] for i in np.argsort(seen, kind="stable")[:count]]
