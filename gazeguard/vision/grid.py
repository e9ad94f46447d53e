"""TODO vision.grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gazeguard.errors import InputError

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """The image cells of one prompt, in the order of their tokens.

    boxes:  (cells, 4) float32, x0 y0 x1 y1 as shares of the picture in [0, 1]; NaN for a token without a place
    image:  (cells,) int64, which of the prompt's pictures the cell belongs to
    sizes:  (width, height) of each picture in pixels
    """

    boxes: NDArray[np.float32]
    image: NDArray[np.int64]
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.image.ndim != 1 or self.boxes.shape != (len(self.image), 4):
            raise InputError(
                f"An ImageGrid needs one box per cell: boxes have shape {self.boxes.shape} for {self.image.size} cells. "
                "Pass boxes of shape (cells, 4)."
            )
        if len(self.image) and not 0 <= self.image.min() <= self.image.max() < len(self.sizes):
            raise InputError(
                f"An ImageGrid has cells of pictures {self.image.min()} to {self.image.max()}, but the sizes of "
                f"{len(self.sizes)}. Pass the (width, height) of every picture."
            )

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def regular(cls, rows: int, columns: int, size: tuple[int, int], view: Box = (0.0, 0.0, 1.0, 1.0)) -> ImageGrid:
        """``rows`` x ``columns`` equal cells, row by row, over ``view``, a box in shares of a picture of ``size`` pixels."""
        return cls(_lattice(rows, columns, view), np.zeros(rows * columns, dtype=np.int64), (size,))

    def overlap(self, box: Box, image: int = 0) -> NDArray[np.float32]:
        """(cells,) float32: the share of each cell's area that lies in ``box`` (pixels of that picture)."""
        width, height = self.sizes[image]
        x0, y0, x1, y1 = (self.boxes[:, i] * (width, height)[i % 2] for i in range(4))
        across = np.clip(np.minimum(x1, box[2]) - np.maximum(x0, box[0]), 0, None)
        down = np.clip(np.minimum(y1, box[3]) - np.maximum(y0, box[1]), 0, None)
        share = across * down / np.maximum((x1 - x0) * (y1 - y0), 1e-9)
        return np.where(self.image == image, np.nan_to_num(share), 0).astype(np.float32)

    def pixels(self, cell: int) -> Box:
        """The box of a cell in pixels of its picture."""
        width, height = self.sizes[self.image[cell]]
        x0, y0, x1, y1 = self.boxes[cell].tolist()
        return (x0 * width, y0 * height, x1 * width, y1 * height)


WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def _lattice(rows: int, columns: int, view: Box = WHOLE) -> NDArray[np.float32]:
    """(rows * columns, 4) float32 boxes, row-major, over ``view``."""
    return _between(np.linspace(view[1], view[3], rows + 1), np.linspace(view[0], view[2], columns + 1))


def _between(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float32]:
    """((len(y) - 1) * (len(x) - 1), 4) float32 boxes, row-major, between lines at ``y`` and ``x``."""
    top, left = (index.ravel() for index in np.indices((len(y) - 1, len(x) - 1)))
    return np.stack((x[left], y[top], x[left + 1], y[top + 1]), axis=1).astype(np.float32)
