"""Decoded images of any mode as RGB of 8 bits, upright, on white: what a viewer shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from glsim.data.limits import Refused

BAND = 2**20  # pixels


def as_shown(image: Image.Image) -> Image.Image:
    """Return a decoded image of any mode the way a viewer shows it: RGB, 8 bit, upright, on white.

    Numbers are scaled so that 0 is black and the top of their range white: 65535 for 16 bits; for 32-bit integers the
    first of 255, 65535, 2^31 - 1, 2^32 - 1 that holds all values; for floats the first of 1, 255, 65535, else the
    highest value. What is below 0, not a number or infinite is black.

    Raises ValueError where no value can be seen: all are below 0, not a number or infinite.
    """
    return upright(to_rgb(image), orientation_of(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """The same picture in RGB, as it lies in the file."""
    if image.mode.startswith("I;16"):
        return _scaled(image, 65535)
    if image.mode == "I":
        sixteen = image.format == "PPM"  # Pillow has scaled it to 16 bits
        return _scaled(image, *(() if sixteen else (255,)), 65535, 2**31 - 1, 2**32 - 1)
    if image.mode == "F":
        return _scaled(image, 1, 255, 65535)
    if not image.has_transparency_data:
        return image.convert("RGB")
    flat = Image.new("RGB", image.size)
    for box in bands(image):
        part = image.crop(box)
        part = part.convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), box)
    return flat


def _scaled(image: Image.Image, *tops: int) -> Image.Image:
    """Scale [0, top] to [0, 255] for the first of `tops` that holds all values, give or take a resize's overshoot."""

    def values(box: tuple[int, int, int, int]) -> np.ndarray:
        part = np.asarray(image.crop(box))
        if unsigned:
            part = part.view(np.uint32)
        return np.nan_to_num(part.astype(np.float32), nan=-1, posinf=-1, neginf=-1)

    # Pillow reads unsigned integers of 32 bits as signed ones.
    unsigned = image.mode == "I" and getattr(image, "tag_v2", {}).get(339) == (1,)
    highest = max(float(values(box).max()) for box in bands(image))
    if highest < 0:
        raise Refused("no value can be seen: all are below 0, not a number or infinite")
    top = next((top for top in tops if highest <= 1.1 * top), highest)
    flat = Image.new("RGB", image.size)
    for box in bands(image):
        grey = (values(box) / top * 255).clip(0, 255).round().astype(np.uint8)
        flat.paste(Image.fromarray(grey).convert("RGB"), box)
    return flat


def bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of some whole rows each, from top to bottom, for what takes more memory a pixel than the image."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def orientation_of(image: Image.Image) -> int:
    """How the camera was held, by EXIF; 1, upright, where that is not told."""
    with contextlib.suppress(Exception):  # a damaged EXIF block: viewers show the picture as it is stored
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def upright(shown: Image.Image, orientation: int) -> Image.Image:
    """The image turned to stand upright, in place, without metadata."""
    # With the rest of the EXIF block there, exif_transpose would write it anew, and fail on tags of no concern here.
    shown.info = {}
    shown.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(shown, in_place=True)
    return shown
