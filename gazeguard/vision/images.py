"""TODO vision.images."""

from __future__ import annotations

import io
import math
import stat
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gazeguard.errors import InputError

MAX_IMAGE_BYTES = 64 * 2**20
# What Pillow may read: pictures alone. For others it would start programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_OPENING = threading.Lock()  # warnings.catch_warnings changes what all threads see


def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """An upright RGB picture from a file of one of `FORMATS`, bytes or a PIL image. Raises `InputError` for anything else.

    Of an animation it is the first frame; sixteen bits become eight; transparency is dropped, and the colour beneath it shows.
    """
    if not isinstance(source, (str, Path, bytes, Image.Image)):
        raise InputError(f"Expected one picture (a path, bytes or a PIL image), not {type(source).__name__}.")
    name = str(source) if isinstance(source, (str, Path)) else "the given picture"
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name)
        if not isinstance(source, bytes):
            found = Path(source).stat()
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a pipe would be waited on for ever
                raise InputError(f"{name} is a device or a pipe. Give the path of a picture.")
            if found.st_size > MAX_IMAGE_BYTES:
                raise InputError(f"{name} is larger than {MAX_IMAGE_BYTES} bytes. Make the picture smaller first.")
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            known = [kind for kind in FORMATS if kind in Image.OPEN]
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known)  # its header alone
        with image:
            return _upright_rgb(image, name)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture that Pillow can read. Give a PNG, JPEG or WebP file.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} has more pixels than is safe to unpack ({error}). Make it smaller first.") from error
    except InputError:
        raise
    except Exception as error:
        if why := getattr(error, "strerror", None):  # the system's word, where Pillow's own errors have none
            raise InputError(f"{name} cannot be opened: {why}. Give the path of a picture.") from error
        # Pillow's many readers raise almost anything for a damaged file.
        raise InputError(f"{name} is damaged: {error}. Save the picture again, or leave it out.") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if not (image.width and image.height):
        raise InputError(f"{name} is {image.width} x {image.height} pixels: there is nothing in it. Leave it out.")
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):  # a PIL image may be of a file not unpacked yet
        size = f"{image.width} x {image.height}"
        raise InputError(f"{name} has more pixels than is safe to unpack ({size}). Make it smaller first.")
    if image.mode in ("I", "F"):
        raise InputError(f"{name} holds numbers of 32 bits, and nobody says which is white. Save it with 8 or 16 bits.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip sixteen bits at 255: a white page
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # Pillow wants it so
        image = image.convert("RGBA")
    return image.convert("RGB")
