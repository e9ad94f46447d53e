"""Attention steering: target boxes in an image, turned into the bias that `AttentionRecorder.steer` adds to attention scores.

The bias is Gandikota & Bau's (2026, arXiv 2606.14703, section 4): ``+strength`` on the image tokens of the target and
``-strength`` on the other image tokens, before the softmax, in the gaze heads alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

# Odds of exp(2 x 5) between an image token inside and one outside: attention arrives, and within the target a head keeps its
# own profile. Large numbers flatten it: bfloat16 has steps of 64 at 10,000, more than any difference of scores, so that
# attention becomes a plain mean over the target.
STRENGTH, MAX_STRENGTH = 5.0, 50.0
SIGNS: dict[str, tuple[float, float]] = {"both": (1.0, -1.0), "boost": (1.0, 0.0), "suppress": (0.0, -1.0)}


@dataclass(frozen=True)
class SteeringTarget:
    """Where the gaze heads are made to attend while something is generated.

    Attributes:
        targets: One for all rows of a batch, or one per row: a box x0 y0 x1 y1 in pixels of the image; or a schedule,
            ``{0: box, 20: another, 40: None}``, of the new token from which each holds; None leaves attention alone.
        strength: Logits; 5 saturates.
        mode: ``boost`` the target, ``suppress`` the rest of the image, or ``both``.
        prompt: Steer the queries of the prompt, too, not only those that predict new tokens.
        image: Which of a prompt's images the boxes are in.

    Raises:
        InputError: One of these is not what it must be.
    """

    targets: Target | Sequence[Target]
    strength: float = STRENGTH
    mode: Mode = "both"
    prompt: bool = True
    image: int = 0

    def __post_init__(self) -> None:
        if self.mode not in SIGNS:
            raise InputError(f"Unknown steering mode {self.mode!r}; expected one of: {', '.join(SIGNS)}.")
        if not 0 < self.strength <= MAX_STRENGTH:
            raise InputError(
                f"Steering strength {self.strength} is out of range; expected a number above 0 and up to {MAX_STRENGTH:.0f}. "
                "5 saturates; much more only flattens attention over the target."
            )
        for schedule in self._schedules():
            for step, box in schedule.items():
                if not isinstance(step, int) or step < 0:
                    raise InputError(f"Unexpected key {step!r} in a schedule; expected numbers of new tokens, 0 or more.")
                if box is not None and not (len(box) == 4 and box[0] < box[2] and box[1] < box[3]):
                    raise InputError(
                        f"Unexpected steering target {box!r}; expected a box (x0, y0, x1, y1) in pixels with x0 < x1 and "
                        "y0 < y1."
                    )

    def _schedules(self) -> list[Mapping[int, Box | None]]:
        """The targets of every row, or of all, each as a schedule."""
        targets: Any = self.targets
        if not isinstance(targets, Sequence) or (targets and np.isscalar(targets[0])):
            targets = [targets]
        return [target if isinstance(target, Mapping) else {0: target} for target in targets]

    def steer(self, recorder: AttentionRecorder, grids: Sequence[ImageGrid]) -> None:
        """Steer a recorder that has begun with a batch.

        Args:
            recorder: After ``begin``.
            grids: The image grid of each row of the batch.

        Raises:
            InputError: There are other targets than rows, or a box is outside of its image.
        """
        schedules = self._schedules()
        if len(schedules) not in (1, len(grids)):
            raise InputError(
                f"Got {len(schedules)} steering targets for {len(grids)} prompts; expected one for all, or one per prompt in "
                "order."
            )
        schedules *= len(grids) // len(schedules)
        if not 0 <= self.image < min(len(grid.sizes) for grid in grids):
            raise InputError(f"There is no image {self.image} in the prompt. Images are counted from 0.")
        for step in sorted({step for schedule in schedules for step in schedule}):
            boxes = [_box_at(schedule, step) for schedule in schedules]
            bias = self._bias(boxes, grids) if any(boxes) else None
            recorder.steer(
                None if bias is None else bias[:, None].expand(-1, len(recorder.heads), -1).to(recorder.model.device),
                prompt=self.prompt and step == 0,
                start=step,
            )

    def _bias(self, boxes: Sequence[Box | None], grids: Sequence[ImageGrid]) -> Tensor:
        """(batch, N) float32 logits; 0 for a row without a box and for image tokens that a row lacks."""
        bias = torch.zeros(len(grids), max(map(len, grids)))
        inside, outside = (sign * self.strength for sign in SIGNS[self.mode])
        for row, (box, grid) in enumerate(zip(boxes, grids, strict=True)):
            if box is not None:
                bias[row, : len(grid)] = torch.from_numpy(np.where(image_tokens_in(grid, box, self.image), inside, outside))
        return bias


def _box_at(schedule: Mapping[int, Box | None], step: int) -> Box | None:
    """The box that holds at a step; None before the first entry."""
    entries = [entry for entry in schedule if entry <= step]
    return schedule[max(entries)] if entries else None


def image_tokens_in(grid: ImageGrid, box: Box, image: int = 0) -> NDArray[np.bool_]:
    """Which image tokens lie in a box by more than half, or the one that lies in it most when none does.

    Args:
        grid: The image grid.
        box: x0 y0 x1 y1 in pixels of the image.
        image: Which of the prompt's images.

    Returns:
        (N,) bool.

    Raises:
        InputError: The box touches no image token.
    """
    overlap = grid.overlap(box, image)
    if not overlap.any():
        width, height = grid.sizes[image]
        raise InputError(
            f"The box {tuple(box)} touches no image token of its image, which has {width} x {height} pixels. Boxes are in "
            "pixels of the image; when generate gets the processor's output alone, pass picture_sizes, too."
        )
    return overlap >= min(0.5, float(overlap.max()))


def undescribed_regions(grid: ImageGrid, gaze: NDArray[np.floating], count: int) -> list[Box]:
    """The regions of the first image, cut into thirds both ways, that a caption attended to least.

    Args:
        grid: The image grid.
        gaze: (objects, N), attention at the words that name objects; without objects every region is undescribed alike.
        count: How many regions.

    Returns:
        Boxes in pixels, the least attended first.
    """
    width, height = grid.sizes[0]
    regions = [(x * width / 3, y * height / 3, (x + 1) * width / 3, (y + 1) * height / 3) for y in range(3) for x in range(3)]
    # The best object's, not that of all: a region is described when one object in it was.
    attended = [gaze[:, image_tokens_in(grid, region)].sum(1).max(initial=0) for region in regions]
    return [regions[i] for i in np.argsort(attended, kind="stable")[:count]]
