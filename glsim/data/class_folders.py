"""Class folders: which folders are splits, which are classes, and the images in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from glsim.data.image_files import Labelled, LeftOut, folders_in, images_in, loose_images
from glsim.data.lists import LAYOUTS
from glsim.data.names import (
    KNOWN_SPLITS,
    clean_label,
    holds_masks,
    holds_val,
    one_of_each_split,
    resembles_split,
    split_of,
    splits_named,
)
from glsim.types import DataError

FOR_CLASSES = "rename the folders, or give a list with the columns path,label"


def read_class_folders(folder: Path, left: LeftOut, classes: Sequence[str] | None) -> list[Labelled]:
    """The images of train|val|test/CLASS/.. or of CLASS/..; what else lies there goes into `left`.

    Raises DataError for folders that may be read as classes and as splits, and for a class without an image.
    """
    tops = _split_folders(folder, left, classes)
    rows: list[Labelled] = []
    for split, top in tops.items() or ((None, folder),):
        images = {inside: images_in(inside, left) for inside in folders_in(top, left)}
        if not any(images.values()):
            raise DataError(f"{top}: no images in class folders; {LAYOUTS}")
        left.loose |= {str(path) for path in loose_images(top)}
        for inside, paths in images.items():
            if not paths and split in (None, "train"):
                raise DataError(f"{inside}: no image to train class {inside.name!r} on; add some or remove the folder")
            rows += [Labelled(p, p.relative_to(folder).as_posix(), inside.name, str(inside), split) for p in paths]
    return rows


class _Top(NamedTuple):
    """A folder at the top of a data set."""

    path: Path
    inside: set[str]  # names of the folders in it
    loose: bool  # whether images lie directly in it

    @property
    def nested(self) -> bool:
        """Whether it is built as a split is: folders, and no images beside them."""
        return bool(self.inside) and not self.loose


def _split_folders(folder: Path, left: LeftOut, classes: Sequence[str] | None) -> dict[str, Path]:
    """The folders of the splits in `folder`; {} where its folders are the classes.

    Raises DataError, naming both readings, where they may be either: names with the word of a split that are no split's
    (`train2`), a split's among those of classes (`bus`, `car`, `train`), splits by unknown names.
    """
    tops = [
        _Top(path, {inside.name for inside in folders_in(path, LeftOut())}, any(loose_images(path)))
        for path in folders_in(folder, left)
    ]
    splits = [top for top in tops if split_of(top.path.name)]
    if not splits:
        _refuse_unknown_splits(folder, [top for top in tops if top.inside or top.loose], classes)
        return {}
    _refuse_doubtful_splits(folder, splits, [top for top in tops if top not in splits], left)
    found = one_of_each_split([top.path for top in splits], lambda path: path.name)
    if "val" in found and "train" in found and holds_val(found["train"].name):
        raise DataError(f"{found['val']}: by its name a part of {found['train']}; keep one of them")
    return found


def _refuse_unknown_splits(folder: Path, tops: list[_Top], classes: Sequence[str] | None) -> None:
    """DataError where folders that have no split's name may be those of splits all the same, or hold them."""
    nested = [top for top in tops if top.nested]
    if len(tops) == 1 and nested:
        _refuse_wrapper(nested[0].path, classes)
    inner = [top for top in nested if any(map(split_of, top.inside))]
    if inner and (len(inner) == len(tops) or any(len({split_of(n) for n in top.inside} - {None}) > 1 for top in inner)):
        raise DataError(
            f"{folder}: folders of splits lie in those of classes, as in {inner[0].path}; what works: train/CLASS and "
            "test/CLASS, or a list with the columns path,label,split"
        )
    worded = [top for top in tops if splits_named(top.path.name)[0]]
    alike = [top for top in nested if resembles_split(top.path.name)]
    inside = [top.inside for top in tops]
    suspects = [top for top in worded if top.nested]
    if len(worded) == len(tops):
        suspects = worded
    elif any(a is not b and a.inside & b.inside for a in alike for b in nested) or len(alike) == len(tops):
        suspects = alike
    elif len(nested) == len(tops) and 1 < len(tops) < len(set().union(*inside)) and len(set.intersection(*inside)) > 1:
        suspects = nested  # a few folders with the same many in each of them
    if suspects:
        raise DataError(
            f"{folder}: {_names(suspects)} may be splits by names that are not known, or classes; known are "
            f"{KNOWN_SPLITS}. For splits, rename them so; for classes, {FOR_CLASSES}"
        )


def _refuse_doubtful_splits(folder: Path, splits: list[_Top], others: list[_Top], left: LeftOut) -> None:
    """DataError where what lies beside folders of splits may be meant as they are, or they as classes; what is neither
    is left out."""
    for top in splits:
        if top.nested and all(map(split_of, top.inside)):
            raise DataError(f"{top.path}: holds {', '.join(sorted(top.inside))}, not classes; move up what is in there")
    images = {top.path: images_in(top.path, LeftOut()) for top in others}
    others = [top for top in others if images[top.path] and not holds_masks(top.path.name)]
    inside = [name for top in splits for name in top.inside]
    certain = len(set(inside)) < len(inside)  # a class in two splits
    doubtful = [
        top
        for top in others
        if splits_named(top.path.name)[0]
        or (top.nested and resembles_split(top.path.name))
        or not (certain or top.inside & set(inside))
    ]
    if doubtful:
        raise DataError(
            f"{folder}: {_names(splits)} beside {_names(doubtful)} may be splits, or classes. For splits, move away or "
            f"rename {_names(doubtful)}; for classes, {FOR_CLASSES}"
        )
    left.said += [f"left out {top.path} ({len(images[top.path]):,} images), which is no split" for top in others]


def _refuse_wrapper(top: Path, classes: Sequence[str] | None) -> None:
    """DataError where the only folder is no class, but holds the data set."""
    wrapper = top
    while len(inside := folders_in(wrapper, LeftOut())) == 1 and not any(loose_images(wrapper)):
        if split_of(inside[0].name):
            break
        wrapper = inside[0]
    if any(loose_images(wrapper)) or not inside:
        return
    known = {clean_label(name) for name in classes or ()}
    if any(split_of(path.name) for path in inside) or clean_label(top.name) not in known:
        raise DataError(f"{top.parent}: holds nothing but {top.name}/; the data set seems to be {wrapper}: name that")


def _names(tops: Sequence[_Top]) -> str:
    return ", ".join(f"{top.path.name}/" for top in tops[:5]) + (", .." if len(tops) > 5 else "")
