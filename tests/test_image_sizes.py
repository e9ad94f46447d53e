"""Images that are too small or too narrow for a model's image tokens are unchecked, alone."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from guardkit import assert_same_trace
from PIL import Image

from gazeguard import lab
from gazeguard.guard import GazeGuard
from gazeguard.report import Verdict
from gazeguard.vision.encoding import encode
from gazeguard.vision.grid import ImageGrid

CAPTION = "A red star."
TOO_SMALL, TOO_NARROW = "is too small: a side has fewer pixels", "is stretched"


@functools.cache
def guard() -> GazeGuard:
    return GazeGuard.from_pretrained("lab", device="cpu")


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 401), (401, 2), (3, 3), (11, 300)])
def test_an_image_with_fewer_pixels_than_tokens_is_unchecked(size: tuple[int, int]) -> None:
    """In a check, and in a live run that knows the sizes."""
    image = Image.new("RGB", size, "red")
    for report in (guard().check(image, CAPTION), guard().caption(image, max_new_tokens=4)):
        assert report.verdict is Verdict.UNCHECKED
        assert report.reason.startswith(f"the image of {size[0]} x {size[1]} pixels {TOO_SMALL}")


def test_neighbours_are_untouched() -> None:
    """What stands beside it in a batch has the report that it has alone."""
    samples = lab.samples("test", 2, seed=7)
    alone = [guard().check(sample.image, CAPTION) for sample in samples]
    odd = [Image.new("RGB", size, "red") for size in ((1, 1), (1, 4000), (2, 401))]
    one, *between, other = guard().check_all([samples[0].image, *odd, samples[1].image], [CAPTION] * 5)
    assert [report.verdict for report in between] == [Verdict.UNCHECKED] * 3
    for report, expected in zip((one, other), alone, strict=True):
        assert (report.verdict, report.reason) == (expected.verdict, expected.reason)
        assert_same_trace(report.trace, expected.trace)
    sizes = [[image.size] for image in (samples[0].image, odd[0])]
    inputs = encode(guard().model, guard().processor, [samples[0].image, odd[0]], ["Describe the picture."] * 2).inputs
    _, live = guard().generate_with_reports(**inputs, max_new_tokens=60, do_sample=False, picture_sizes=sizes)
    again = guard().check(samples[0].image, live[0].caption)
    assert (live[0].verdict, live[1].verdict) == (again.verdict, Verdict.UNCHECKED)


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        (ImageGrid.regular(8, 8, (8, 8)), ""),
        (ImageGrid.regular(8, 8, (640, 80)), ""),
        (ImageGrid.regular(8, 8, (648, 80)), TOO_NARROW),
        (ImageGrid.regular(2, 20, (800, 80)), ""),  # a processor that keeps the shape
        (ImageGrid.regular(24, 24, (23, 500)), TOO_SMALL),
        (ImageGrid.regular(1, 1, (900, 30)), ""),  # one token for the whole image says nothing of its shape
        (ImageGrid.regular(1, 1, (7, 7)), TOO_SMALL),
        (ImageGrid.regular(1, 1, (9000, 9)), "times longer than wide"),
        (ImageGrid(np.full((3, 4), np.nan, np.float32), np.zeros(3, np.int64), ((64, 64),)), ""),
    ],
    ids=repr,
)
def test_what_is_illegible(grid: ImageGrid, reason: str) -> None:
    assert reason in grid.illegible()
    assert bool(grid.illegible()) == bool(reason)


def test_every_image_of_a_prompt_counts() -> None:
    """And the finest view does not decide: a thumbnail may show what its tiles cannot."""
    good, small = ImageGrid.regular(4, 4, (64, 64)), ImageGrid.regular(4, 4, (3, 64))
    both = ImageGrid(np.concatenate((good.boxes, small.boxes)), np.repeat([0, 1], 16), ((64, 64), (3, 64)))
    assert both.illegible().startswith("the image of 3 x 64 pixels is too small")
    tiles = ImageGrid.regular(48, 48, (40, 40))
    views = np.concatenate((ImageGrid.regular(24, 24, (40, 40)).boxes, tiles.boxes))
    assert tiles.illegible()
    assert not ImageGrid(views, np.zeros(len(views), np.int64), ((40, 40),)).illegible()
