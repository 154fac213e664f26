"""The catalog of named data sets. No torch here.

`SETS` is the one table: counts, licence, protocol, the settings that hold unless one gives others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from glsim.data.publishers import (
    Row,
    read_aircraft,
    read_cars,
    read_cub,
    read_dogs,
    read_flowers,
    read_food,
    read_inat,
    read_inat21,
    read_pets,
    read_vegfru,
)
from glsim.types import DataError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A data set of the field.

    `read` turns the publisher's folder into rows; where it is None, the set is known by the field's lists (train.csv,
    test.csv, ..), which `glsim.data.readers` reads. `marker` is a file (or pattern) that tells the layout. `counts` is
    empty where nobody states them. `split_hash` is None until somebody has read the publisher's own files with
    this code.
    """

    title: str
    classes: int
    counts: dict[str, int]
    licence: str
    homepage: str
    protocol: str
    extras: str = ""  # what rides along
    marker: str = "test.csv"
    read: Callable[[Path], list[Row]] | None = None
    download: tuple[tuple[str, dict[str, Any]], ...] = ()  # torchvision's classes, and their arguments
    split_hash: str | None = None
    top_o: int = 8  # of GLSim
    top_k: int = 12  # of FFVT
    resize_ratio: float = 1.34
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]

    def options(self, method: str) -> dict[str, Any]:
        """The options of a method that depend on the data set."""
        return {"glsim": {"top_o": self.top_o}, "ffvt": {"top_k": self.top_k}}.get(method, {})


def prepared(data: str | Path, dataset: str | None) -> Path:
    """What `read_data` has to read: `data`, or in that folder the list of `dataset`. DataError when it is not there."""
    file = Path(data) / f"{dataset}.csv"
    if dataset is None or Path(data).is_file():
        return Path(data)
    if not file.is_file():
        raise DataError(f"{file} is not there; make it with: glsim datasets prepare {dataset} --root {data}")
    return file


INAT = "https://github.com/visipedia/inat_comp/tree/master"
VGG = "https://www.robots.ox.ac.uk/~vgg/data"
INAT_TERMS = "research and education only, no redistribution"
INAT_PROTOCOL = "train on train, test on val: the labels of the official test are secret"
LEAVES = "https://github.com/XiaohanYu-GU/Ultra-FGVC"
NOT_STATED = "not stated"

SETS = {
    "aircraft": NamedSet(
        title="FGVC-Aircraft",
        classes=100,
        counts={"train": 6667, "test": 3333},
        licence="research only, not commercial; rights with the photographers",
        homepage=f"{VGG}/fgvc-aircraft/",
        protocol="variants; train on trainval, test on test",
        extras="boxes",
        marker="images_variant_test.txt",
        read=read_aircraft,
        download=(("FGVCAircraft", {}),),
    ),
    "cars": NamedSet(
        title="Stanford Cars",
        classes=196,
        counts={"train": 8144, "test": 8041},
        licence=NOT_STATED,
        homepage="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        protocol="the publisher's train and test (with labels)",
        extras="boxes",
        marker="cars_*annos*.mat",
        read=read_cars,
        resize_ratio=1 / 0.875,
    ),
    "cotton": NamedSet(
        title="Cotton80",
        classes=80,
        counts={"train": 240, "test": 240},
        licence=NOT_STATED,
        homepage=LEAVES,
        protocol="the field's lists: 3 images a class each",
    ),
    "cub": NamedSet(
        title="CUB-200-2011",
        classes=200,
        counts={"train": 5994, "test": 5794},
        licence="none in its README",
        homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        protocol="train_test_split.txt",
        extras="boxes; masks from segmentations.tgz",
        marker="train_test_split.txt",
        read=read_cub,
    ),
    "dafb": NamedSet(
        title="DAF:re (DanbooruAnimeFaces revamped)",
        classes=3263,
        counts={},
        licence=NOT_STATED,
        homepage="https://github.com/arkel23/Danbooru2018AnimeCharacterRecognitionDataset_Revamped",
        protocol="the field's lists: 70 % train, 10 % val, 20 % test",
        mean=HALF[0],
        std=HALF[1],
    ),
    "dogs": NamedSet(
        title="Stanford Dogs",
        classes=120,
        counts={"train": 12000, "test": 8580},
        licence="images of ImageNet: research and education only",
        homepage="http://vision.stanford.edu/aditya86/ImageNetDogs/",
        protocol="train_list.mat and test_list.mat",
        extras="boxes from annotation.tar, around all dogs of an image",
        marker="train_list.mat",
        read=read_dogs,
        top_o=16,
        top_k=24,
    ),
    "flowers": NamedSet(
        title="Oxford Flowers 102",
        classes=102,
        counts={"train": 2040, "test": 6149},
        licence=NOT_STATED,
        homepage=f"{VGG}/flowers/102/",
        protocol="train on trnid and valid (10 a class each), test on tstid",
        marker="setid.mat",
        read=read_flowers,
        download=(("Flowers102", {}),),
    ),
    "food": NamedSet(
        title="Food-101",
        classes=101,
        counts={"train": 75750, "test": 25250},
        licence="images of Foodspotting's users: scientific fair use",
        homepage="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        protocol="meta/train.json (not cleaned) and meta/test.json",
        marker="meta/train.json",
        read=read_food,
        download=(("Food101", {}),),
    ),
    "inat17": NamedSet(
        title="iNaturalist 2017",
        classes=5089,
        counts={"train": 579184, "test": 95986},
        licence=INAT_TERMS,
        homepage=f"{INAT}/2017",
        protocol=INAT_PROTOCOL,
        marker="train2017.json",
        read=partial(read_inat, year=2017),
    ),
    "inat18": NamedSet(
        title="iNaturalist 2018",
        classes=8142,
        counts={"train": 437513, "test": 24426},
        licence=INAT_TERMS,
        homepage=f"{INAT}/2018",
        protocol=INAT_PROTOCOL,
        marker="train2018.json",
        read=partial(read_inat, year=2018),
    ),
    "inat21": NamedSet(
        title="iNaturalist 2021",
        classes=10000,
        counts={"train": 2686843, "test": 100000},
        licence=INAT_TERMS,
        homepage=f"{INAT}/2021",
        protocol=INAT_PROTOCOL,
        marker="val",
        read=read_inat21,
        download=(("INaturalist", {"version": "2021_train"}), ("INaturalist", {"version": "2021_valid"})),
    ),
    "moe": NamedSet(
        title="moeImouto faces",
        classes=173,
        counts={},
        licence=NOT_STATED,
        homepage="https://github.com/arkel23/moeimouto_animefacecharacterdataset",
        protocol="the field's lists: 80 % train, 20 % test",
        mean=HALF[0],
        std=HALF[1],
    ),
    "nabirds": NamedSet(
        title="NABirds",
        classes=555,
        counts={"train": 23929, "test": 24633},
        licence="terms on download; name the photographers",
        homepage="https://dl.allaboutbirds.org/nabirds",
        protocol="train_test_split.txt",
        extras="boxes",
        marker="train_test_split.txt",
        read=read_cub,
    ),
    "pets": NamedSet(
        title="Oxford-IIIT Pets",
        classes=37,
        counts={"train": 3680, "test": 3669},
        licence="CC BY-SA 4.0",
        homepage=f"{VGG}/pets/",
        protocol="train on trainval, test on test",
        extras="masks (trimaps); boxes of heads, of most training images only",
        marker="annotations/trainval.txt",
        read=read_pets,
        download=(("OxfordIIITPet", {}),),
    ),
    "soy": NamedSet(
        title="SoyLocal",
        classes=200,
        counts={"train": 600, "test": 600},
        licence=NOT_STATED,
        homepage=LEAVES,
        protocol="the field's lists: 3 images a class each",
    ),
    "vegfru": NamedSet(
        title="VegFru",
        classes=292,
        counts={"train": 29200, "val": 14600, "test": 116931},
        licence=NOT_STATED,
        homepage="https://github.com/ustc-vim/vegfru",
        protocol="the publisher's three lists; val only watches the run",
        marker="vegfru_train.txt",
        read=read_vegfru,
    ),
}
