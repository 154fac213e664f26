"""Readers of the layouts in which publishers give their data sets away."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from glsim.files import check_regular, is_junk, read_bytes, read_text
from glsim.types import DataError

Box = tuple[int, int, int, int]
LARGEST_XML = 2**24  # bytes: a hundred thousand objects


class Row(NamedTuple):
    """An image as its publisher lists it."""

    path: Path
    key: str  # the path as listed, with "/": the same wherever the data lies
    label: str
    split: str
    box: Box | None = None  # left, top, right, bottom in pixels; right and bottom are exclusive
    mask: Path | None = None


def find(folder: Path, name: str) -> Path | None:
    """The first file or folder of that name (or pattern) in `folder`, in a folder of it or one deeper."""
    paths = (path for depth in ("", "*/", "*/*/") for path in sorted(folder.glob(depth + name)))
    return next((path for path in paths if not any(map(is_junk, path.relative_to(folder).parts))), None)


def read_cub(folder: Path) -> Iterator[Row]:
    """CUB and NABirds: tables of image ids. CUB's segmentations are taken where they were unpacked too."""
    top = _need(folder, "train_test_split.txt").parent
    images, labels, train = (
        _table(top / f"{name}.txt") for name in ("images", "image_class_labels", "train_test_split")
    )
    boxes = _table(top / "bounding_boxes.txt") if (top / "bounding_boxes.txt").is_file() else {}
    names = _unique(_table(top / "classes.txt"), labels.values())
    masks = next((f for f in (top / "segmentations", top.parent / "segmentations") if f.is_dir()), None)
    for i, image in images.items():
        box = None
        if i in boxes:
            x, y, width, height = map(float, boxes[i].split())
            box = (round(x), round(y), round(x + width), round(y + height))
        mask = _if_file(masks / Path(image).with_suffix(".png")) if masks else None
        split = "train" if train[i] == "1" else "test"
        yield Row(top / "images" / image, image, names[labels[i]], split, box, mask)


def read_dogs(folder: Path) -> Iterator[Row]:
    """Stanford Dogs: Images/, train_list.mat and test_list.mat, and Annotation/ for the boxes."""
    images, annotations = _need(folder, "Images"), find(folder, "Annotation")
    for split in ("train", "test"):
        for name in _mat(_need(folder, f"{split}_list.mat"))["file_list"]:
            box = _xml_box(annotations / Path(name).with_suffix("")) if annotations else None
            breed = PurePosixPath(name).parent.name.partition("-")[2]
            yield Row(images / name, str(name), breed, split, box)


def read_flowers(folder: Path) -> Iterator[Row]:
    """Oxford Flowers: jpg/, imagelabels.mat, setid.mat; the names of the classes are torchvision's."""
    from torchvision.datasets import Flowers102  # slow, and not needed to know the catalog

    top = _need(folder, "setid.mat").parent
    sets, labels = _mat(top / "setid.mat"), _mat(top / "imagelabels.mat")["labels"]
    for part, split in (("trnid", "train"), ("valid", "train"), ("tstid", "test")):
        for i in sets[part].tolist():
            name = f"jpg/image_{i:05d}.jpg"
            yield Row(top / name, name, Flowers102.classes[int(labels[i - 1]) - 1], split)


def read_pets(folder: Path) -> Iterator[Row]:
    """Oxford-IIIT Pets: images/, annotations/ with trimaps for masks, and xmls with boxes of heads."""
    top = _need(folder, "annotations/trainval.txt").parent
    for part, split in (("trainval", "train"), ("test", "test")):
        for name in _table(top / f"{part}.txt"):
            box, mask = _xml_box(top / "xmls" / f"{name}.xml"), _if_file(top / "trimaps" / f"{name}.png")
            label = name.rpartition("_")[0]
            yield Row(top.parent / "images" / f"{name}.jpg", f"images/{name}.jpg", label, split, box, mask)


def read_aircraft(folder: Path) -> Iterator[Row]:
    """FGVC-Aircraft: lists of variants and boxes, both in data/."""
    top = _need(folder, "images_variant_test.txt").parent
    boxes = _table(top / "images_box.txt") if (top / "images_box.txt").is_file() else {}
    for part, split in (("trainval", "train"), ("test", "test")):
        for i, variant in _table(top / f"images_variant_{part}.txt").items():
            box = None
            if i in boxes:  # the publisher's first pixel is (1, 1), and the last one belongs to the box
                left, upper, right, lower = map(int, boxes[i].split())
                box = (left - 1, upper - 1, right, lower)
            yield Row(top / "images" / f"{i}.jpg", f"images/{i}.jpg", variant, split, box)


def read_cars(folder: Path) -> Iterator[Row]:
    """Stanford Cars: car_ims/ and cars_annos.mat, or cars_train/, cars_test/, devkit and the labels of test."""
    if whole := find(folder, "cars_annos.mat"):
        mat, top = _mat(whole), _need(folder, "car_ims").parent
        for car in mat["annotations"]:
            key, split = str(car["relative_im_path"]), "test" if int(car["test"]) else "train"
            yield _car(top / key, key, mat["class_names"], split, car)
        return
    names = _mat(_need(folder, "cars_meta.mat"))["class_names"]
    for split, file in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        images = _need(folder, f"cars_{split}")
        inside = images if not (images / images.name).is_dir() else images / images.name  # as Kaggle packs it
        for car in _mat(_need(folder, file))["annotations"]:
            yield _car(inside / str(car["fname"]), f"cars_{split}/{car['fname']}", names, split, car)


def read_food(folder: Path) -> Iterator[Row]:
    """Food-101: images/ and lists by class in meta/."""
    top = _need(folder, "meta/train.json").parent.parent
    for split in ("train", "test"):
        for label, names in _json(top / "meta" / f"{split}.json").items():
            yield from (Row(top / "images" / f"{name}.jpg", f"{name}.jpg", label, split) for name in names)


def read_inat(folder: Path, year: int) -> Iterator[Row]:
    """iNaturalist 2017 and 2018: COCO-like lists; the labels of the official test are secret, so val is our test.

    The names of 2018 are obscured; where the publisher's later categories.json was unpacked too, they are its names.
    """
    clear = find(folder, "categories.json")
    for part, split in (("train", "train"), ("val", "test")):
        content = _json(_need(folder, f"{part}{year}.json"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        categories = _json(clear) if clear else content["categories"]
        labels = {a["image_id"]: a["category_id"] for a in content["annotations"]}
        names = _unique({c["id"]: c["name"] for c in categories}, {c["id"] for c in categories})
        top = _images_at(folder, files.values())
        yield from (Row(top / file, file, names[labels[i]], split) for i, file in files.items())


def read_inat21(folder: Path) -> Iterator[Row]:
    """iNaturalist 2021: train/ and val/ (2021_train, 2021_valid from torchvision) of folders named by the taxonomy."""
    for split, given, renamed in (("train", "train", "2021_train"), ("test", "val", "2021_valid")):
        top = find(folder, renamed) or _need(folder, given)
        for taxon in sorted(path for path in top.iterdir() if path.is_dir() and not is_junk(path.name)):
            label = " ".join(taxon.name.split("_")[6:])  # number_kingdom_phylum_class_order_family_genus_species
            if not label:
                raise DataError(f"{taxon}: not named as number_kingdom_phylum_class_order_family_genus_species")
            images = sorted(path for path in taxon.glob("*.jpg") if not is_junk(path.name))
            yield from (Row(image, f"{given}/{taxon.name}/{image.name}", label, split) for image in images)


def read_vegfru(folder: Path) -> Iterator[Row]:
    """VegFru: three lists of veg200_images/CLASS/x.jpg and fru92_images/CLASS/x.jpg."""
    lists = {split: _table(_need(folder, f"vegfru_{split}.txt")) for split in ("train", "val", "test")}
    top = _images_at(folder, lists["train"])
    for split, names in lists.items():
        yield from (Row(top / name, name, PurePosixPath(name).parent.name, split) for name in names)


def _need(folder: Path, name: str) -> Path:
    path = find(folder, name)
    if path is None:
        raise DataError(f"{folder}: {name} is not there, nor in the folders in it; unpack the publisher's files there")
    return path


def _images_at(folder: Path, names: Iterable[str]) -> Path:
    """The folder that listed paths count from."""
    return _need(folder, PurePosixPath(next(iter(names))).parts[0]).parent


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _table(file: Path) -> dict[str, str]:
    """Lines of a first word and the rest."""
    lines = (line.strip().partition(" ") for line in _text(file).splitlines() if line.strip())
    return {first: rest.strip() for first, _, rest in lines if not first.startswith("#")}


def _text(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: no JSON ({error})") from error


def _mat(file: Path) -> dict[str, Any]:
    """The arrays of a .mat file, flat."""
    import numpy as np

    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        raise DataError(f"{file}: reading .mat files needs scipy: pip install scipy") from None
    try:
        check_regular(file)
        # Squeezed, a name is a string and not an array in an array.
        return {name: np.ravel(value) for name, value in loadmat(file, squeeze_me=True).items()}
    except (OSError, ValueError, NotImplementedError, MatReadError) as error:
        raise DataError(f"{file}: no readable .mat file ({error})") from error


def _xml_box(file: Path) -> Box | None:
    """The box around all objects of a file in the format of PASCAL VOC; None where there is no file."""
    sides = xml_boxes(file)[1] if file.is_file() else []
    if not sides:
        return None
    lefts, tops, rights, bottoms = zip(*sides, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def xml_boxes(file: Path) -> tuple[tuple[int, int] | None, list[Box]]:
    """The size (width, height) of the image, where it is told, and the boxes of a file in the format of PASCAL VOC.

    The numbers are the publisher's. Raises DataError for a file that cannot be read.
    """
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        top = ElementTree.fromstring(read_bytes(file, LARGEST_XML), parser)  # its first line tells the encoding
        boxes = [_numbers(box, "xmin", "ymin", "xmax", "ymax") for box in top.iter("bndbox")]
        told = top.find("size")
        size = _numbers(told, "width", "height") if told is not None else (0, 0)
    except (OSError, ElementTree.ParseError, LookupError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: no boxes in the format of PASCAL VOC ({error})") from error
    return ((size[0], size[1]) if all(size) else None), [(box[0], box[1], box[2], box[3]) for box in boxes]


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses what declares entities, which a small file can unfold to gigabytes."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, and none is needed")


def _numbers(element: ElementTree.Element, *names: str) -> tuple[int, ...]:
    return tuple(int(float(element.findtext(name) or "")) for name in names)


def _car(path: Path, key: str, names: Any, split: str, car: Any) -> Row:
    left, top, right, bottom = (int(car[f"bbox_{side}"]) for side in ("x1", "y1", "x2", "y2"))
    return Row(path, key, str(names[int(car["class"]) - 1]), split, (left, top, right, bottom))


def _unique(names: dict[Any, str], used: Iterable[Any]) -> dict[Any, str]:
    """Names by id; where two ids in use share one, the id stands before it."""
    often = Counter(names[i] for i in set(used))
    return {i: f"{i} {name}" if often[name] > 1 else name for i, name in names.items()}


LAYOUTS: dict[str, tuple[str, Callable[[Path], Iterable[Row]] | None]] = {  # name -> file that tells it, its reader
    "aircraft": ("images_variant_test.txt", read_aircraft),
    "cars": ("cars_*annos*.mat", read_cars),
    "cub": ("train_test_split.txt", read_cub),
    "dogs": ("train_list.mat", read_dogs),
    "flowers": ("setid.mat", read_flowers),
    "food": ("meta/train.json", read_food),
    "inat17": ("train2017.json", partial(read_inat, year=2017)),
    "inat18": ("train2018.json", partial(read_inat, year=2018)),
    "inat21": ("val", read_inat21),
    "lists": ("test.csv", None),  # of the field
    "pets": ("annotations/trainval.txt", read_pets),
    "vegfru": ("vegfru_train.txt", read_vegfru),
}
