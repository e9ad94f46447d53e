"""Loader of images: from a file, bytes or a PIL image to upright RGB, safe against hostile files."""

from __future__ import annotations

import base64
import io
import math
import re
import stat
import threading
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from gazeguard.errors import InputError

MAX_IMAGE_BYTES = 64 * 2**20
# What Pillow may read: images alone. For others it would start programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
BACKGROUND = "white"  # what shows through transparency, as in viewers, browsers and inference engines
NAMELESS = "the given image"  # what a message calls bytes or a PIL image
URI = re.compile(r"data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # C:\ is a path
_URL_SAFE = bytes.maketrans(b"-_", b"+/")  # letters of base64 that URLs have in the place of others
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {  # value of the tag -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TAGS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow keeps it
OPEN_LOCK = threading.Lock()  # warnings.catch_warnings changes what all threads see


def load_image(
    source: str | Path | bytes | Image.Image, background: str = BACKGROUND, most_pixels: int | None = None
) -> Image.Image:
    """Load an image, upright and in RGB.

    An animation gives its first frame; sixteen bits become eight; transparent parts are laid on a background, so that colours
    that a viewer never shows do not reach the model.

    Args:
        source: The path of a file of one of `FORMATS`, a data URI, the file's content, or a PIL image.
        background: A colour as Pillow names it (``"white"``, ``"#808080"``), on which transparent images are composed.
        most_pixels: A limit below that of Pillow, which is `Image.MAX_IMAGE_PIXELS`.

    Raises:
        InputError: The source is none of these, or is damaged or too large; or the background is no colour.
    """
    colour = background_colour(background)
    if not isinstance(source, (str, Path, bytes, Image.Image)):
        raise InputError(f"Expected one image (a path, bytes or a PIL image), not {type(source).__name__}.")
    if isinstance(source, str) and URI.match(source):
        source = read_uri(source)
    name = str(source) if isinstance(source, (str, Path)) else NAMELESS
    limit = min(most_pixels or math.inf, Image.MAX_IMAGE_PIXELS or math.inf)
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name, colour, limit)
        if not isinstance(source, bytes):
            _check_file(Path(source), name)
        with _opened(source) as image:
            return _upright_rgb(image, name, colour, limit)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image that Pillow can read. Give a PNG, JPEG or WebP file.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} has more pixels than is safe to unpack ({error}). Make it smaller first.") from error
    except InputError:
        raise
    except Exception as error:
        if reason := getattr(error, "strerror", None):  # the system's word, where Pillow's own errors have none
            raise InputError(f"{name} cannot be opened: {reason}. Give the path of an image.") from error
        # Pillow's many readers raise almost anything for a damaged file.
        raise InputError(f"{name} is damaged: {error}. Save the image again, or leave it out.") from error


def image_key(source: Any) -> Hashable:
    """What tells whether two sources are of one image: equal for the same path, URI or bytes, and for the same object."""
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    try:
        hash(source)
    except TypeError:  # arrays, PIL images
        return id(source)
    return source


def read_uri(uri: str) -> bytes:
    """Return the bytes of a data: URI; broken lines, missing padding and the URL-safe letters of base64 are read, too.

    Raises:
        InputError: It holds too much, or no base64; or it is a URL, which is not fetched.
    """
    header, comma, data = uri.partition(",")
    if not header.lower().startswith("data:"):
        raise InputError("the image is a URL, which is not fetched; download it first and give its path")
    if not comma or not header.lower().endswith(";base64"):
        raise InputError("the image is a data URI without base64. Write data:image/png;base64,...")
    if len(data) * 3 // 4 > MAX_IMAGE_BYTES:
        raise InputError(f"the image is larger than {MAX_IMAGE_BYTES} bytes. Make it smaller first.")
    content = b"".join(unquote_to_bytes(data).split()).translate(_URL_SAFE).rstrip(b"=")
    try:
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except ValueError as error:
        raise InputError(f"the image is a data URI with damaged base64: {error}") from error


def background_colour(background: str) -> tuple[int, int, int]:
    """Red, green and blue of a background; raises `InputError` for what is no colour."""
    try:
        return ImageColor.getrgb(background)[:3]
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"Unknown background {background!r:.40}; expected a colour such as 'white' or '#808080'.") from error


def _check_file(path: Path, name: str) -> None:
    """Raise `InputError` for what is too large, or no file."""
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # a pipe would be waited on for ever
        raise InputError(f"{name} is a device or a pipe. Give the path of an image.")
    if status.st_size > MAX_IMAGE_BYTES:
        raise InputError(f"{name} is larger than {MAX_IMAGE_BYTES} bytes. Make the image smaller first.")


def _opened(source: str | Path | bytes) -> Image.Image:
    """The image whose header alone was read."""
    with OPEN_LOCK, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Corrupt EXIF data")  # see `_upright`
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


def _upright_rgb(image: Image.Image, name: str, background: tuple[int, int, int], most_pixels: float) -> Image.Image:
    if not (image.width and image.height):
        raise InputError(f"{name} is {image.width} x {image.height} pixels: there is nothing in it. Leave it out.")
    if image.width * image.height > most_pixels:  # a PIL image may be of a file not unpacked yet
        size = f"{image.width} x {image.height}"
        raise InputError(f"{name} has more pixels than is safe to unpack ({size}). Make it smaller first.")
    if image.mode in ("I", "F"):
        raise InputError(f"{name} holds numbers of 32 bits, and nothing says which is white. Save it with 8 or 16 bits.")
    image = _upright(image)
    if image.mode.startswith("I;16"):  # Pillow would clip sixteen bits at 255: a white page
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)  # colours multiplied by alpha are divided again
    layer = image.convert(straight).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF tag says that the camera was held; as it is, as in viewers, where the tags cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever Pillow's reader of TIFF raises; damaged pixels are met behind
        return image
    if turn is None:
        return image
    upright = image.transpose(turn)
    for name in _TAGS:  # or it would be turned again
        upright.info.pop(name, None)
    return upright


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of sixteen bits of grey in eight, with its transparent value, if a PNG names one, as transparency."""
    values, clear = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
