"""WebDataset shards: images with their labels inside tar archives, which are not unpacked."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from glsim.data.image_files import Labelled, LeftOut, count_endings
from glsim.data.images import EXTENSIONS
from glsim.data.names import KNOWN_SPLITS, clean_label, hints_at_split, joined_split, splits_named, words_of
from glsim.data.uri import members
from glsim.files import is_junk, one_line, parse_json, read_lines, shorten
from glsim.types import DataError

CLASS_NAMES = "classnames.txt"  # beside shards whose labels are numbers: one name a line, as the CLIP benchmark has it


def read_shards(source: str | Path, folder: Path, key: str | None, left: LeftOut) -> list[Labelled]:
    """The images of `source`, which is `wds:FOLDER`: all tar archives in it, none of them unpacked.

    The split is a word in the path of an archive (train-000.tar, test/0.tar, birds-val-1.tar). Files whose names are
    equal up to the first dot are one sample: an image, and its label in NAME.cls (a name or a number, as text) or in
    NAME.json under "label"; further dots belong to the name where a label has them too. `key` is another key of the
    JSON file (`wds:FOLDER:label=KEY`). Numbers get the names of classnames.txt, where that lies in the folder.

    What holds no image goes into `left`. Raises DataError naming the archive and the sample for anything missing,
    damaged or ambiguous.
    """
    inside = [p for p in folder.rglob("*") if ".tar" in map(str.lower, p.suffixes) or p.suffix.lower() == ".tgz"]
    inside = [p for p in inside if not any(map(is_junk, p.relative_to(folder).parts)) and not p.is_dir()]
    shards = sorted(p for p in inside if p.suffix.lower() == ".tar" and p.is_file())
    if others := sorted(set(inside) - set(shards)):
        some = others[0].relative_to(folder)
        left.said.append(f"left out {len(others):,} files that are no plain tar archives, as {some}")
    if not shards:
        raise DataError(
            f"{source}: no .tar file in the folder {folder}; wanted archives like train-000.tar, test-000.tar"
        )
    splits = {shard: _split_of(shard.relative_to(folder)) for shard in shards}
    lost = next((shard for shard, split in splits.items() if split is None), None)
    if lost is not None and any(splits.values()):
        raise DataError(f"{lost}: train, val or test should be a word in its name, as in that of other shards")
    kinds = {" ".join(word for word in words_of(shard.stem) if not word.isdigit()) for shard in shards}
    if lost is not None and len(kinds) > 1:
        named = ", ".join(sorted(kinds)[:5])
        left.said.append(f"no archive has the name of a split ({named}): all are read as one")
    both = {"train", "val"}
    whole = next((s for s in shards if any(splits_named(p)[0] == both for p in s.relative_to(folder).parts)), None)
    if whole is not None and "val" in splits.values():
        part = next(shard for shard, split in splits.items() if split == "val")
        raise DataError(f"{part}: by its name a part of {whole}, which is train and val together; keep one of them")
    alone: list[str] = []
    rows = [row for shard in shards for row in _samples(shard, folder, splits[shard], key, alone)]
    if alone:
        left.said.append(f"left out, as no image belongs to them, {count_endings(alone)}")
    names = folder / CLASS_NAMES
    return _named(rows, names) if os.path.lexists(names) else rows


def _split_of(path: Path) -> str | None:
    """The split of a shard; DataError where its path names two, or a word that may be meant as one."""
    named = [splits_named(part)[0] for part in path.with_suffix("").parts]
    found = {joined_split(splits) or " or ".join(sorted(splits)) for splits in named if splits}
    if len(found) > 1 or any(" or " in split for split in found):
        raise DataError(f"{path}: is it {' or '.join(sorted(found))}? Its name says both")
    if not found and any(map(hints_at_split, path.with_suffix("").parts)):
        raise DataError(f"{path}: its name may be meant as that of a split; known are {KNOWN_SPLITS}; rename it")
    return found.pop() if found else None


def _samples(shard: Path, folder: Path, split: str | None, key: str | None, alone: list[str]) -> list[Labelled]:
    try:
        files = members(shard)
    except tarfile.TarError as error:
        raise DataError(f"{shard}: damaged, cut off or compressed ({error}); a shard is a plain tar archive") from error
    files = {name: place for name, place in files.items() if not any(map(is_junk, PurePosixPath(name).parts))}
    labelled = {PurePosixPath(name).with_suffix("") for name in files if name.lower().endswith((".cls", ".json"))}
    groups: dict[str, dict[str, str]] = {}
    for name in files:
        inside = PurePosixPath(name)
        whole = inside.with_suffix("") in labelled  # the label says where the name of the sample ends
        stem = inside.stem if whole else inside.name.partition(".")[0]
        groups.setdefault((inside.parent / stem).as_posix(), {})[inside.name[len(stem) + 1 :].lower()] = name
    samples = []
    with shard.open("rb") as file:

        def text(name: str) -> str:
            start, length = files[name]
            file.seek(start)
            return file.read(length).decode("utf-8-sig").strip()

        for name, parts in groups.items():
            images = [file for ending, file in parts.items() if f".{ending}" in EXTENSIONS]
            images = images or [file for file in parts.values() if PurePosixPath(file).suffix.lower() in EXTENSIONS]
            if len(images) > 1:
                raise DataError(f"{shard}: sample {name} has several images: {', '.join(images)}; one is wanted")
            if not images:
                alone += [file for ending, file in parts.items() if ending not in ("cls", "json")]
                continue
            try:
                label = _label(parts, text, key)
            except ValueError as error:
                raise DataError(f"{shard}: label of sample {name}: {error}") from error
            path = shard / images[0]
            samples.append(Labelled(path, path.relative_to(folder).as_posix(), label, str(path), split))
    if not samples:
        raise DataError(f"{shard}: no image in it; known endings: {' '.join(EXTENSIONS)}")
    return samples


def _label(parts: dict[str, str], text: Any, key: str | None) -> str:
    """The label of one sample; ValueError says why there is none."""
    if key is None and "cls" in parts:
        label: Any = text(parts["cls"])
    elif "json" in parts:
        about, wanted = parse_json(text(parts["json"]), None), key or "label"
        label = about.get(wanted) if isinstance(about, dict) else None
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(f"{wanted!r} in {parts['json']} should be a text or a number, got {label!r}")
    else:
        raise ValueError(f"no {'.json' if key else '.cls or .json'} beside the image")
    if not str(label).strip():
        raise ValueError("it is empty")
    return str(label).strip()


def _named(samples: list[Labelled], file: Path) -> list[Labelled]:
    try:
        names = [clean_label(name) for name in read_lines(file)]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text in UTF-8 ({one_line(error)})") from error
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{file}: {twice[0]!r} comes twice; a line is the name of one class")
    numbered = {str(i): name for i, name in enumerate(names)}
    for sample in samples:
        if (sample.label.lstrip("0") or "0") not in numbered:
            number = shorten(sample.label, 40)
            raise DataError(f"{sample.path}: label {number!r} is not the number of a line of {file}, from 0")
    return [sample._replace(label=numbered[sample.label.lstrip("0") or "0"]) for sample in samples]
