"""Image grid: the part of an image that each image token covers.

An `ImageGrid` is a plain value: one box per image token. Tiles, thumbnails and separators need no modes: the tokens of a
tile have boxes inside the tile, those of a thumbnail cover the image once more, and a separator has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gazeguard.errors import InputError
from gazeguard.vision.geometry import WHOLE, Box, lattice

MIN_SIDE = 8  # pixels: no vision encoder has smaller patches
MAX_STRETCH = 8  # how many times wider than high, or higher than wide, the part of an image may be that is one square token
MAX_RATIO = 200  # of the sides of an image: where Qwen's processors refuse it, whatever its tokens


@dataclass(frozen=True, eq=False, repr=False)
class ImageGrid:
    """The image tokens of one prompt, in the order of the sequence.

    Attributes:
        boxes: (N, 4) float32, x0 y0 x1 y1 as shares of the image in [0, 1]; NaN for a token without a location.
        image: (N,) int64, which of the prompt's images a token belongs to.
        sizes: (width, height) of each image in pixels.
    """

    boxes: NDArray[np.float32]
    image: NDArray[np.int64]
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.image.ndim != 1 or self.boxes.shape != (len(self.image), 4):
            raise InputError(
                f"An ImageGrid needs one box per image token: boxes have shape {self.boxes.shape} for {self.image.size} image "
                "tokens. Pass boxes of shape (image tokens, 4)."
            )
        if len(self.image) and not 0 <= self.image.min() <= self.image.max() < len(self.sizes):
            raise InputError(
                f"An ImageGrid has tokens of images {self.image.min()} to {self.image.max()}, but the sizes of "
                f"{len(self.sizes)}. Pass the (width, height) of every image."
            )

    def __len__(self) -> int:
        return len(self.image)

    def __repr__(self) -> str:
        tokens = f"{len(self)} image tokens" if self.shape is None else "{} x {} image tokens".format(*self.shape)
        images = "image {} x {}".format(*self.sizes[0]) if len(self.sizes) == 1 else f"{len(self.sizes)} images"
        return f"ImageGrid({tokens}, {images})"

    @property
    def shape(self) -> tuple[int, int] | None:
        """(rows, columns) where the tokens are those of one image in rows of equal length, row by row; None elsewhere.

        Rows and columns need not cover the whole image (a centre crop), nor be of one width (the last ones may be cut by the
        edge of the image). Tiles, several views, separators and tokens without a location are no regular grid.
        """
        if len(self.sizes) != 1 or not len(self) or np.isnan(self.boxes).any():
            return None
        columns = int(np.argmax(np.append(self.boxes[1:, 0] <= self.boxes[:-1, 0], True))) + 1
        rows, rest = divmod(len(self), columns)
        if rest:
            return None
        boxes = self.boxes.reshape(rows, columns, 4)
        pairs = (
            (boxes[:, :, 0::2], boxes[:1, :, 0::2]),  # every row has the columns of the first
            (boxes[:, :, 1::2], boxes[:, :1, 1::2]),  # every column has the rows of the first
            (boxes[:, :-1, 2], boxes[:, 1:, 0]),  # neighbours touch
            (boxes[:-1, :, 3], boxes[1:, :, 1]),
        )
        return (rows, columns) if all(np.allclose(*pair, atol=1e-6) for pair in pairs) else None

    @classmethod
    def regular(cls, rows: int, columns: int, size: tuple[int, int], view: Box = WHOLE) -> ImageGrid:
        """A grid of equal image tokens, row by row.

        Args:
            rows: Rows of image tokens.
            columns: Columns of image tokens.
            size: Width and height of the image in pixels.
            view: The part of the image that they cover, in shares of its width and height.
        """
        return cls(lattice(rows, columns, view), np.zeros(rows * columns, dtype=np.int64), (size,))

    def overlap(self, box: Box, image: int = 0) -> NDArray[np.float32]:
        """(N,) float32: the share of each token's area that lies in ``box``, given in pixels of image number ``image``."""
        width, height = self.sizes[image]
        x0, y0, x1, y1 = (self.boxes[:, i] * (width, height)[i % 2] for i in range(4))
        across = np.clip(np.minimum(x1, box[2]) - np.maximum(x0, box[0]), 0, None)
        down = np.clip(np.minimum(y1, box[3]) - np.maximum(y0, box[1]), 0, None)
        share = across * down / np.maximum((x1 - x0) * (y1 - y0), 1e-9)
        return np.where(self.image == image, np.nan_to_num(share), 0).astype(np.float32)

    def illegible(self) -> str:
        """Why the model cannot have seen what an image shows, by its size and its image tokens; "" if it can.

        It needs the original sizes. If the caller gave none, the sizes of the processed images are used, and these are never
        illegible.
        """
        reasons = (self._illegible(image, *size) for image, size in enumerate(self.sizes))
        return next(filter(None, reasons), "")

    def _illegible(self, image: int, width: int, height: int) -> str:
        x0, y0, x1, y1 = self.boxes[(self.image == image) & np.isfinite(self.boxes).all(1)].astype(np.float64).T
        across, down = (x1 - x0) * width, (y1 - y0) * height
        seen = (across > 0) & (down > 0)
        across, down = across[seen], down[seen]
        name = f"the image of {width} x {height} pixels"
        if min(width, height) < MIN_SIDE or (seen.any() and min(across.max(), down.max()) < 1 - 1e-3):
            return f"{name} is too small: a side has fewer pixels than the model has image tokens for, or fewer than {MIN_SIDE}"
        stretch = float(np.maximum(across / down, down / across).min()) if seen.any() else 1.0
        whole = seen.any() and across.min() >= width and down.min() >= height  # tokens of everything say nothing of its shape
        if stretch > MAX_STRETCH and not whole:
            return f"{name} is stretched {stretch:.0f} times by the processor, more than {MAX_STRETCH}: it is too narrow"
        if max(width, height) > MAX_RATIO * min(width, height):
            return f"{name} is more than {MAX_RATIO} times longer than wide"
        return ""

    def pixels(self, token: int) -> Box:
        """The box of image token number ``token`` in pixels of its image."""
        width, height = self.sizes[self.image[token]]
        x0, y0, x1, y1 = self.boxes[token].tolist()
        return (x0 * width, y0 * height, x1 * width, y1 * height)
