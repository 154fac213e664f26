"""Object masks of images: PNG masks, trimaps, and boxes in PASCAL VOC XML files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from glsim.data.image_files import find_images
from glsim.data.images import BadImage, read_image, read_stored
from glsim.data.publishers import xml_boxes
from glsim.data.transforms import Preprocessing, mask_transform
from glsim.files import real
from glsim.types import DataError, DataWarning

T = TypeVar("T")
OBJECT = "object"
SYNTHETIC = {OBJECT: "body", "part": "part"}  # folders of masks that `glsim.data.synthetic` writes
ENDINGS = (".png", ".PNG", ".xml", ".XML", "")  # Stanford Dogs' boxes have none
BORDER = 3  # of a trimap: neither object (1) nor background (2)


class Masked(NamedTuple):
    """An image and the files that say where things are in it, by target."""

    path: Path
    masks: dict[str, Path]


def find_masks(images: str | Path, masks: str | Path) -> list[Masked]:
    """Every image of a folder (or file, or glob) with its mask in the folder `masks`.

    A mask stands below `masks` as its image does below any folder that holds it, or has its name alone; it ends in .png
    or .xml (or in nothing: Stanford Dogs). In a folder with `body` and `part`, as `glsim.data.synthetic` writes them,
    they are two targets. A PNG in the folder of masks is an image only where its own XML stands beside it. Raises
    DataError naming the first image without mask.
    """
    folder = Path(masks)
    if not folder.is_dir():
        raise DataError(f"masks={masks} is no folder; wanted one with a PNG or a PASCAL VOC XML file for every image")
    both = all((folder / name).is_dir() for name in SYNTHETIC.values())
    folders = {target: folder / name for target, name in SYNTHETIC.items()} if both else {OBJECT: folder}
    found, taken = [], dict[Path, Path]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # masks may lie beside: they are not left out
        paths = find_images(images)
    for path in paths:
        if _is_mask(path, folder):
            continue
        chosen = {target: _mask_of(path, place) for target, place in folders.items()}
        found.append(Masked(path, chosen))
        for file in chosen.values():
            if file in taken:
                raise DataError(
                    f"{file} is the mask of {taken[file]} and of {path}; put masks in folders as the images"
                )
            taken[file] = path
    if not found:
        raise DataError(f"{images}: no image outside of the masks in {masks}")
    return found


def _is_mask(path: Path, folder: Path) -> bool:
    inside = path.suffix.lower() == ".png" and real(path).is_relative_to(real(folder))
    return inside and not any(path.with_suffix(ending).is_file() for ending in (".xml", ".XML"))


def _mask_of(path: Path, folder: Path) -> Path:
    parts = path.absolute().parts
    names = (Path(*parts[i:]) for i in range(1, len(parts)) if ".." not in parts[i:])
    for file in (folder / name.with_suffix(ending) for name in names for ending in ENDINGS):
        if file.is_file() and real(file) != real(path):
            return file
    wanted = folder / path.stem
    raise DataError(f"{path} has no mask in {folder}; wanted {wanted}.png or {wanted}.xml, or in folders as the image")


def check_masks(
    images: list[Masked], skip_bad: bool = False, done: Callable[[int], Any] = lambda count: None
) -> tuple[list[Masked], list[str]]:
    """The images that can be measured, and what is wrong with the others: everything is read, and let go again.

    Raises DataError for the first bad one unless `skip_bad`, and where none is left.
    """
    sound, bad = [], []
    pool = ThreadPoolExecutor()
    try:
        for image, fault in zip(images, pool.map(_fault, images), strict=True):
            if fault is None:
                sound.append(image)
            elif skip_bad:
                bad.append(str(fault))
            else:
                raise fault
            done(1)
    finally:
        pool.shutdown(cancel_futures=True)
    if not sound:
        raise DataError(f"no image is left: {bad[0]}")
    return sound, bad


def _fault(image: Masked) -> DataError | None:
    try:
        read_masked(image, lambda photograph: None)
    except DataError as error:
        return error.with_traceback(None)  # which would keep the pixels
    return None


def read_masked(image: Masked, use: Callable[[Image.Image], T]) -> tuple[T, dict[str, Image.Image]]:
    """What `use` makes of the upright photograph, and its masks by target, as `read_mask` gives them."""
    made, size = read_image(image.path, lambda photograph: (use(photograph), photograph.size))
    return made, {target: read_mask(file, size) for target, file in image.masks.items()}


def read_mask(file: Path, size: tuple[int, int]) -> Image.Image:
    """A mask for an upright image of `size` (width, height), mode "L": 255 object, 128 neither, 0 background.

    A PNG: what is neither zero nor wholly transparent is object; one with no values but 1, 2 and 3 is a trimap
    (Oxford-IIIT Pets): object, background, border, which is neither. An XML file: all boxes of it, first pixel (1, 1),
    last pixel included, as far as they lie in the image. Raises DataError for anything else, for another size than the
    image's, and for a mask without any object.
    """
    mask = _read_png(file, size) if file.suffix.lower() == ".png" else _read_xml(file, size)
    if not (np.asarray(mask) == 255).any():
        raise DataError(f"{file}: an empty mask, no pixel of it is object")
    return mask


def _read_png(file: Path, size: tuple[int, int]) -> Image.Image:
    def levels(opened: Image.Image) -> Image.Image:
        _check_size(file, opened.size, size)
        pixels = np.atleast_3d(np.asarray(opened))
        if opened.mode in ("LA", "RGBA"):
            pixels = pixels[..., :-1] * (pixels[..., -1:] > 0)
        values = pixels.max(axis=2)
        if values.min() >= 1 and 2 <= values.max() <= BORDER:
            return Image.fromarray(np.array([0, 255, 0, 128], np.uint8)[values])
        return Image.fromarray(np.where(values != 0, 255, 0).astype(np.uint8))

    try:
        return read_stored(file, levels, ("PNG",))
    except BadImage as error:
        raise DataError(f"{file}: no readable PNG ({error.reason})") from error


def _read_xml(file: Path, size: tuple[int, int]) -> Image.Image:
    told, boxes = xml_boxes(file)
    if told is not None:
        _check_size(file, told, size)
    if not boxes:
        raise DataError(f"{file}: no bndbox in it, as the format of PASCAL VOC has for every object")
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in boxes:
        shown = max(left, 1) - 1, max(top, 1) - 1, min(right, size[0]) - 1, min(bottom, size[1]) - 1
        if shown[0] > shown[2] or shown[1] > shown[3]:
            turned = left > right or top > bottom
            why = "is empty or turned round" if turned else f"lies outside of {size[0]} x {size[1]} pixels"
            raise DataError(f"{file}: box {left},{top},{right},{bottom} {why}")
        draw.rectangle(shown, fill=255)
    return mask


def _check_size(file: Path, found: tuple[int, int], size: tuple[int, int]) -> None:
    if found != size:
        (width, height), (w, h) = found, size
        raise DataError(f"{file} is of {width} x {height} pixels, its image of {w} x {h} (upright)")


def to_view(mask: Image.Image, p: Preprocessing) -> tuple[Tensor, Tensor]:
    """What `read_mask` gave, as the network sees its image: object, and object or background, both bool (H, W)."""
    transform, levels = mask_transform(p), np.asarray(mask)
    inside, neither = (transform(Image.fromarray((levels == level).astype(np.uint8) * 255)) for level in (255, 128))
    return inside, ~neither
