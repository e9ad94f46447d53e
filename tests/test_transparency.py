"""Transparent and unusual modes of images: every path shows the model what a viewer shows."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gazeguard.errors import InputError
from gazeguard.filtering.caption_filter import CaptionFilter
from gazeguard.guard import GazeGuard
from gazeguard.lab.world import samples
from gazeguard.vision.images import load_image

WHITE, RED, HIDDEN = (255, 255, 255), (220, 40, 40), (20, 60, 200)
GREY = 100
STAR = Image.new("L", (16, 16), 0)
ImageDraw.Draw(STAR).rectangle((4, 4, 11, 11), fill=255)
INSIDE, OUTSIDE = (8, 8), (1, 1)


@functools.cache
def guard() -> GazeGuard:
    return GazeGuard.from_pretrained("lab", device="cpu")


def coloured() -> Image.Image:
    """A red square that is opaque; a hidden blue under alpha 0 around it."""
    image = Image.new("RGB", STAR.size, HIDDEN)
    image.paste(RED, (4, 4, 12, 12))
    image.putalpha(STAR)
    return image


def grey(alpha: str = "LA") -> Image.Image:
    """The same in grey: the hidden colour is black."""
    image = Image.merge("LA", [Image.eval(STAR, lambda value: GREY if value else 0), STAR])
    return image if alpha == "LA" else image.convert(alpha)


def palette(mode: str = "P") -> Image.Image:
    image = Image.new(mode, STAR.size, 0 if mode == "P" else (0, 0))
    image.putpalette([*HIDDEN, *RED])
    image.paste(1 if mode == "P" else (1, 255), (4, 4, 12, 12))
    if mode == "P":
        image.info["transparency"] = 0
    return image


def as_png(image: Image.Image, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def sixteen(clear: int | None = None) -> Image.Image:
    values = np.where(np.asarray(STAR) > 0, GREY * 257, 300).astype(np.uint16)
    image = Image.fromarray(values)
    if clear is not None:
        image.info["transparency"] = clear
    return image


MODES = {
    "RGBA": (coloured(), RED, WHITE),
    "RGBA in a file": (as_png(coloured()), RED, WHITE),
    "RGBa": (coloured().convert("RGBa"), RED, WHITE),
    "LA": (grey(), (GREY,) * 3, WHITE),
    "La": (grey("La"), (GREY,) * 3, WHITE),
    "PA": (palette("PA"), RED, WHITE),
    "P+tRNS": (palette(), RED, WHITE),
    "P+tRNS in a file": (as_png(palette(), transparency=0), RED, WHITE),
    "P+tRNS with an alpha for each colour": (as_png(palette(), transparency=b"\x00\xff"), RED, WHITE),
    "RGB+tRNS": (as_png(coloured().convert("RGB"), transparency=HIDDEN), RED, WHITE),
    "L+tRNS": (as_png(grey().convert("L"), transparency=0), (GREY,) * 3, WHITE),
    "1+tRNS": (as_png(STAR.convert("1"), transparency=0), WHITE, WHITE),
    "I;16": (sixteen(), (GREY,) * 3, (1, 1, 1)),
    "I;16+tRNS": (sixteen(300), (GREY,) * 3, WHITE),
    "1": (STAR.convert("1"), WHITE, (0, 0, 0)),
    "L": (grey().convert("L"), (GREY,) * 3, (0, 0, 0)),
    "CMYK": (coloured().convert("RGB").convert("CMYK"), RED, HIDDEN),
    "YCbCr": (coloured().convert("RGB").convert("YCbCr"), RED, HIDDEN),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_what_a_viewer_shows(name: str) -> None:
    image, inside, outside = MODES[name]
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    np.testing.assert_allclose(loaded.getpixel(INSIDE), inside, atol=3)
    np.testing.assert_allclose(loaded.getpixel(OUTSIDE), outside, atol=3)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_32_bits_are_refused(mode: str) -> None:
    with pytest.raises(InputError, match="holds numbers of 32 bits, and nothing says which is white"):
        load_image(Image.new(mode, (8, 8)))


def test_half_transparent_is_mixed_with_the_background() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    np.testing.assert_allclose(load_image(half).getpixel((0, 0)), (127,) * 3, atol=1)
    np.testing.assert_allclose(load_image(half, "#ff0000").getpixel((0, 0)), (127, 0, 0), atol=1)
    assert load_image(coloured(), "black").getpixel(OUTSIDE) == (0, 0, 0)


@pytest.mark.parametrize("background", ["no colour", "", 7, None], ids=repr)
def test_a_background_that_is_no_colour_is_refused(background: object) -> None:
    """At the door of the guard, too, before any image is there."""
    message = r"Unknown background .*; expected a colour such as 'white' or '#808080'"
    for call in (lambda: load_image(coloured(), background), lambda: GazeGuard(*pair(), background=background)):
        with pytest.raises(InputError, match=message):
            call()


def pair() -> tuple[object, object]:
    watching = guard()
    return watching.model, watching.processor


def cut_out() -> tuple[Image.Image, Image.Image]:
    """A drawn image on white, and the same with all that is white transparent and another image hidden beneath."""
    shown, hidden = (row.image.convert("RGB") for row in samples("test", 2, seed=5))
    values = np.asarray(shown)
    ink = (values != values[0, 0]).any(-1)
    plain = np.where(ink[..., None], values, 255).astype(np.uint8)
    layered = np.dstack([np.where(ink[..., None], values, np.asarray(hidden.resize(shown.size))), ink * 255])
    return Image.fromarray(plain), Image.fromarray(layered.astype(np.uint8))


def test_check_caption_and_filter_see_the_same(tmp_path) -> None:
    """Each as for the image on white; the ids that a live run writes are traced alike when they are replayed."""
    watching, (plain, layered) = guard(), cut_out()
    layered.save(tmp_path / "cut-out.png")
    live, expected = (watching.caption(image, max_new_tokens=60, do_sample=False) for image in (layered, plain))
    assert live.caption == expected.caption
    assert live.caption
    np.testing.assert_array_equal(live.trace.gaze, expected.trace.gaze)
    for source in (layered, tmp_path / "cut-out.png", (tmp_path / "cut-out.png").read_bytes()):
        again = watching.check(source, live.caption)
        assert again.verdict == live.verdict
        np.testing.assert_allclose(again.trace.gaze, live.trace.gaze[: len(again.trace.gaze)], atol=2e-3)
    columns = CaptionFilter(guard=watching)({"image": [layered, plain], "caption": [live.caption] * 2})
    assert columns["gaze_verdict"][0] == columns["gaze_verdict"][1] == live.verdict
    assert columns["gaze_risk"][0] == columns["gaze_risk"][1]


def test_the_background_is_a_setting_of_the_guard() -> None:
    watching, (plain, layered) = guard(), cut_out()
    black = GazeGuard(watching.model, watching.processor, heads=watching.heads, background="black")
    on_black = load_image(layered, "black")
    caption = "A red star."
    gaze = black.check(layered, caption).trace.gaze
    np.testing.assert_array_equal(gaze, watching.check(on_black, caption).trace.gaze)
    assert np.abs(gaze - watching.check(plain, caption).trace.gaze).max() > 1e-4
