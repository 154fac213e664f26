"""Names of splits and of classes, however they are spelt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from glsim.types import DataError

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {  # word -> split
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
KNOWN_SPLITS = "train, training, val, valid, validation, dev, eval, test, testing, also with set, data, images, .."
_BESIDE = {  # words that may stand beside these without saying anything
    *("set", "split", "subset", "part", "data", "dataset", "folder", "file"),
    *("image", "img", "picture", "pic", "photo", "sample", "example"),
}
SPLIT_ROOTS = ("train", "test", "valid")  # words that begin so may mean a split: Trainingsdaten
_PIECES = {"set", "part"}  # words of splits, and of pieces of one
_HINTS = {
    *("split", "fold", "holdout", "hold", "heldout", "held", "rest", "learn", "learning", "query", "gallery", "probe"),
    *("calibration", "seen", "unseen", "minival", "lernen", "pruefung", "prüfung", "apprentissage", "essai"),
}
_NOTHING = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)  # unseen marks


def clean_label(text: str) -> str:
    """The name of a class as it is compared and stored: composed (NFC), every kind of space as one plain space, none at
    its ends, no marks that nobody sees."""
    return " ".join(_NOTHING.sub("", unicodedata.normalize("NFC", text)).split())


def words_of(name: str) -> list[str]:
    """The words and numbers in a name: `trainImages_2` is train, images, 2."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", name))
    return re.findall(r"[^\W\d_]+|\d+", name.casefold())


def splits_named(name: str) -> tuple[set[str], bool]:
    """The splits whose words stand in a name, and whether nothing else does: `train_images` is ({train}, True),
    `train2` ({train}, False), `trainval` ({train, val}, True)."""
    found, only = set[str](), True
    for word in words_of(name):
        splits = _splits_of_word(word)
        found |= splits
        only &= bool(splits) or word in _BESIDE or word.removesuffix("s") in _BESIDE
    return found, only and bool(found)


@cache
def _splits_of_word(word: str) -> frozenset[str]:
    """A split's word, in the plural or with another written to it (`trainset`, `trainval`) too."""
    if split := SPLIT_WORDS.get(word) or SPLIT_WORDS.get(word.removesuffix("s")):
        return frozenset({split})
    for first, split in SPLIT_WORDS.items():
        rest = word.removeprefix(first)
        if rest != word and (rest.removesuffix("s") in _BESIDE or rest in SPLIT_WORDS):
            return frozenset({split, SPLIT_WORDS.get(rest, split)})
    return frozenset()


def split_of(name: str) -> str | None:
    """The split that a name is one of, whatever its case; None for any other name. `trainval` is train."""
    splits, only = splits_named(name)
    return joined_split(splits) if only else None


def joined_split(splits: set[str]) -> str | None:
    """The one split that several words name together: train and val are train; None for any others."""
    return "train" if splits == {"train", "val"} else next(iter(splits)) if len(splits) == 1 else None


def holds_val(name: str) -> bool:
    """Whether a name is that of train and val together, as `trainval`."""
    return splits_named(name) == ({"train", "val"}, True)


def resembles_split(name: str) -> bool:
    """Whether a name that is none of a split may be meant as one: `train2`, `my_test`, `Trainingsdaten`, `fold1`."""
    return any(
        _splits_of_word(word) or word.startswith(SPLIT_ROOTS) or word.removesuffix("s") in _HINTS | _PIECES
        for word in words_of(name)
    )


def hints_at_split(name: str) -> bool:
    """`resembles_split`, for a name that is one of many pieces of a data set: `part-0001` may be any of them."""
    return any(word.startswith(SPLIT_ROOTS) or word.removesuffix("s") in _HINTS for word in words_of(name))


def holds_masks(name: str) -> bool:
    """Whether a folder is, by its name, one of masks and the like, which belong to images and are none to learn."""
    return bool({"mask", "masks", "segmentations", "annotations", "trimaps"} & set(words_of(name)))


def one_of_each_split(paths: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """The path of each split, in the order of SPLITS; DataError where two are of one. `train_val` is train, where val
    and train are there too."""
    found: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (not holds_val(name_of(path)), path)):
        split = split_of(name_of(path))
        assert split is not None
        if split in found and not (split == "train" and path.suffix and holds_val(name_of(found[split]))):
            raise DataError(f"{found[split]} and {path} are both the {split!r} split; keep one of them")
        found.setdefault(split, path)
    return {split: found[split] for split in SPLITS if split in found}
