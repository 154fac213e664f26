"""Example images of the server's page: those of a folder, or drawn birds."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from glsim.data import synthetic
from glsim.data.image_files import find_images
from glsim.data.images import open_image
from glsim.files import read_bytes

EXAMPLES, THUMBNAIL = 8, 192  # how many, and pixels of the longer side


class Example(NamedTuple):
    """An image to try."""

    name: str
    content: bytes
    thumbnail: bytes  # JPEG


def find_examples(source: str | None, max_pixels: int) -> list[Example]:
    """Some images spread over a folder or glob; without one, drawn birds. Raises DataError for one that is bad."""
    if source is None:
        birds = [synthetic.draw(b, np.random.default_rng([0, i]), 448) for i, b in enumerate(synthetic.species(5))]
        return [as_example(f"bird {i}.jpg", as_jpeg(bird.image), bird.image) for i, bird in enumerate(birds, start=1)]
    paths = find_images(source)
    chosen = [paths[i * len(paths) // EXAMPLES] for i in range(EXAMPLES)] if len(paths) > EXAMPLES else paths
    contents = [read_bytes(path) for path in chosen]
    return [
        as_example(path.name, content, open_image(path, content, max_pixels))
        for path, content in zip(chosen, contents, strict=True)
    ]


def as_example(name: str, content: bytes, image: Image.Image) -> Example:
    """An example with its thumbnail."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return Example(name, content, as_jpeg(small))


def as_jpeg(image: Image.Image) -> bytes:
    """An RGB image as the bytes of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
