"""Where the object of an image is: PNG masks, trimaps, and the boxes and points of `glsim.data.annotations`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glsim.data.annotations import Annotation, Size, fit, read_annotations, read_voc
from glsim.data.image_files import find_images
from glsim.data.images import BadImage, read_image, read_stored
from glsim.data.matching import match_paths
from glsim.data.transforms import Preprocessing, mask_transform, places_to_view
from glsim.files import real
from glsim.types import DataError, DataWarning

T = TypeVar("T")
OBJECT, BOXES = "object", "box"
SYNTHETIC = {OBJECT: "body", "part": "part"}  # folders of masks that `glsim.data.synthetic` writes
ENDINGS = (".png", ".PNG", ".xml", ".XML", "")  # Stanford Dogs' boxes have none
BORDER = 3  # of a trimap: neither object (1) nor background (2)


class Masked(NamedTuple):
    """An image, and what says where things are in it, by target: files, or what was read in one."""

    path: Path
    masks: dict[str, Path | Annotation]
    points: Annotation | None = None


class Found(NamedTuple):
    """Images with masks or boxes, and what a person should know of the lists of boxes and points."""

    images: list[Masked]
    without: dict[str, list[str]]  # by "boxes", "points": images that the list has none of; without boxes, left out
    unused: dict[str, int]  # the same: images that the list has, and that are not among these


def find_annotated(
    images: str | Path,
    masks: str | Path | None,
    boxes: str | Path | None,
    points: str | Path | None,
    min_confidence: float = 0.0,
    categories: Collection[str] | None = None,
) -> Found:
    """Every image that has boxes, of those of a folder (or file, or glob) that have a mask where `masks` are given.

    `boxes` and `points` are what `glsim.data.annotations:read_annotations` reads; points may stand in the file of the
    boxes too. Boxes are chosen by `min_confidence` and `categories`. An image has what is listed by the end of its
    path, with or without its ending. Raises DataError where no image has a box, or two have the same.
    """
    found = [Masked(path, {}) for path in _images(images)] if masks is None else find_masks(images, masks)
    entries: dict[str, dict[Path, Annotation | Path]] = {"boxes": {}, "points": {}}
    without, unused = dict[str, list[str]](), dict[str, int]()
    for kind, source in (("boxes", boxes), ("points", points)):
        if source is None:
            continue
        table = read_annotations(source, min_confidence, categories)
        listed = match_paths([image.path for image in found], table, source)
        known = {found[number].path: table[key] for number, key in listed.items()}
        for other in (kind, "points"):  # in COCO and CUB both stand in one place
            entries[other] = {path: e for path, e in known.items() if _marked(e, other)} or entries[other]
        if not entries[kind]:
            raise DataError(
                f"{source}: no {kind} of any of the {len(found)} images: none of their paths, as {found[0].path}, ends "
                f"in what it has {kind} of, as {next(iter(e for e in table if _marked(table[e], kind)), 'none')}"
            )
        without[kind] = [str(image.path) for image in found if image.path not in entries[kind]]
        unused[kind] = len(table) - len(known)
    if boxes is not None:
        found = [image for image in found if image.path in entries["boxes"]]
        for image in found:
            image.masks[BOXES] = entries["boxes"][image.path]
    points_of = cast("dict[Path, Annotation]", entries["points"])
    return Found([image._replace(points=points_of.get(image.path)) for image in found], without, unused)


def _marked(entry: Annotation | Path, kind: str) -> bool:
    """Whether there are "boxes" or "points"; of an XML file that is still to be read it is boxes."""
    return bool(getattr(entry, kind)) if isinstance(entry, Annotation) else kind == "boxes"


def _ends(path: Path) -> Iterator[Path]:
    """Every end of a path, the longest first: how it stands below each folder that holds it."""
    parts = path.absolute().parts
    return (Path(*parts[i:]) for i in range(1, len(parts)) if ".." not in parts[i:])


def _images(images: str | Path) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # masks and lists may lie beside: they are not left out
        return find_images(images)


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
    found, taken = list[Masked](), dict[Path, Path]()
    for path in _images(images):
        if _is_mask(path, folder):
            continue
        chosen = {target: _mask_of(path, place) for target, place in folders.items()}
        found.append(Masked(path, {**chosen}))
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
    for file in (folder / name.with_suffix(ending) for name in _ends(path) for ending in ENDINGS):
        if file.is_file() and real(file) != real(path):
            return file
    wanted = folder / path.stem
    raise DataError(f"{path} has no mask in {folder}; wanted {wanted}.png or {wanted}.xml, or in folders as the image")


def check_masks(
    images: list[Masked], skip_bad: bool = False, done: Callable[[int], Any] = lambda count: None
) -> tuple[list[Masked], list[str]]:
    """The images that can be measured, and what is wrong with the others: everything is read, and pixels let go again.

    Annotations are those of `fit` then. Raises DataError for the first bad one unless `skip_bad`, and where none is
    left.
    """
    sound, bad = [], []
    pool = ThreadPoolExecutor()
    try:
        for found in pool.map(_checked, images):
            if isinstance(found, Masked):
                sound.append(found)
            elif skip_bad:
                bad.append(str(found))
            else:
                raise found
            done(1)
    finally:
        pool.shutdown(cancel_futures=True)
    if not sound:
        raise DataError(f"no image is left: {bad[0]}")
    return sound, bad


def _checked(image: Masked) -> Masked | DataError:
    try:
        _, masks, points = read_masked(image, lambda photograph: None)
    except DataError as error:
        return error.with_traceback(None)  # which would keep the pixels
    fitted = {target: mask for target, mask in masks.items() if isinstance(mask, Annotation)}
    return Masked(image.path, {**image.masks, **fitted}, points)


def read_masked(
    image: Masked, use: Callable[[Image.Image], T]
) -> tuple[T, dict[str, Image.Image | Annotation], Annotation | None]:
    """What `use` makes of the upright photograph, its masks by target, as `read_mask` gives them, and its points."""
    made, size = read_image(image.path, lambda photograph: (use(photograph), photograph.size))
    masks = {target: read_mask(mask, size) for target, mask in image.masks.items()}
    return made, masks, image.points and fit(image.points, size)


def read_mask(mask: Path | Annotation, size: tuple[int, int]) -> Image.Image | Annotation:
    """A mask for an upright image of `size` (width, height): of a PNG, mode "L", 255 object, 128 neither, 0 background.

    A PNG: what is neither zero nor wholly transparent is object; one with no values but 1, 2 and 3 is a trimap
    (Oxford-IIIT Pets): object, background, border, which is neither. A file of PASCAL VOC, or boxes of a list: as
    `glsim.data.annotations:fit` gives them; all of them together are the object. Raises DataError for anything else,
    for a PNG of another size than the image's, and for a mask without any object.
    """
    if isinstance(mask, Annotation) or mask.suffix.lower() != ".png":
        return fit(mask if isinstance(mask, Annotation) else read_voc(mask), size)
    levels = _read_png(mask, size)
    if not (np.asarray(levels) == 255).any():
        raise DataError(f"{mask}: an empty mask, no pixel of it is object")
    return levels


def _read_png(file: Path, size: tuple[int, int]) -> Image.Image:
    def levels(opened: Image.Image) -> Image.Image:
        if opened.size != size:
            (width, height), (w, h) = opened.size, size
            raise DataError(f"{file} is of {width} x {height} pixels, its image of {w} x {h} (upright)")
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


def to_view(mask: Image.Image | Annotation, p: Preprocessing) -> tuple[Tensor, Tensor]:
    """What `read_mask` gave, as the network sees its image: object, and object or background, both bool (H, W).

    A pixel is object where the nearest one of the mask is, or where its middle lies in a box.
    """
    if isinstance(mask, Annotation):
        inside = torch.zeros(p.image_size, dtype=torch.bool)
        corners = torch.tensor([mark.sides for mark in mask.boxes], dtype=torch.double).view(-1, 2)
        places = (places_to_view(corners, cast("Size", mask.size), p) - 0.5).ceil().clamp(min=0).long()
        for left, top, right, bottom in places.view(-1, 4).tolist():
            inside[top:bottom, left:right] = True
        return inside, torch.ones_like(inside)
    transform, levels = mask_transform(p), np.asarray(mask)
    inside, neither = (transform(Image.fromarray((levels == level).astype(np.uint8) * 255)) for level in (255, 128))
    return inside, ~neither


def points_to_view(points: Annotation | None, names: list[tuple[str, int]], p: Preprocessing) -> Tensor:
    """The points of these names as the network sees their image, x, y (P, 2); NaN where one is not visible.

    Those that are cropped away lie outside of (W, H).
    """
    seen = points.visible() if points is not None else {}
    places = torch.tensor([seen.get(name, (torch.nan,) * 2) for name in names], dtype=torch.double).view(len(names), 2)
    return places_to_view(places, cast("Size", points.size), p) if points is not None else places
