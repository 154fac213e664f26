"""Floor 3: data sets that are no folder of images: those of Hugging Face (`hf:`) and WebDataset shards (`wds:`).

Shards are read where they are: an image is named SHARD.tar/NAME, and `glsim.images` opens it there. Images of Hugging
Face data sets lie in tables that only the library `datasets` reads; they are written out once, as files with a list.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import tarfile
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from glsim.images import EXTENSIONS, members
from glsim.types import ConfigError, DataError

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CLASS_NAMES = "classnames.txt"  # beside shards whose labels are numbers: one name a line, as the CLIP benchmark has it


class Sample(NamedTuple):
    """An image in a shard."""

    path: Path  # SHARD.tar/NAME
    label: str
    split: str | None  # None: to be drawn


class Source(NamedTuple):
    """A `--data` that begins with `hf:` or `wds:`: KIND:NAME[:CONFIG][,KEY=VALUE ..], taken apart."""

    kind: str
    name: str  # owner/name on the Hub, or a folder
    options: dict[str, str]


KINDS = {"hf": ("config", "image", "label"), "wds": ("label",)}  # and the options of each


def parse(source: str | Path) -> Source | None:
    """Take a source apart; None for a path. Raises ConfigError for an option that its kind does not have."""
    kind, colon, name = str(source).partition(":")
    if kind not in KINDS or not colon:
        return None
    given = ""
    if not Path(name).exists():
        name, _, given = name.partition(":")
    options = {}
    for i, part in enumerate(given.split(",") if given else ()):
        key, equals, value = part.partition("=")
        if not equals and not i:
            key, value = "config", part
        if key not in KINDS[kind] or not value:
            raise ConfigError(f"{source}: cannot read {part!r}; options of {kind}: {', '.join(KINDS[kind])}")
        options[key] = value
    return Source(kind, name, options)


def is_shards(source: str | Path) -> bool:
    """Whether a source is a folder of WebDataset shards."""
    parsed = parse(source)
    return parsed is not None and parsed.kind == "wds"


def located(source: str | Path) -> Path:
    """Where the images of a source lie: the folder of the shards, the list of what was written out, or the path itself.

    Raises ConfigError and DataError as `parse` and `write_out` do.
    """
    parsed = parse(source)
    if parsed is None:
        return Path(source)
    if parsed.kind == "wds":
        return Path(parsed.name)
    return write_out(parsed.name, *(parsed.options.get(key) for key in KINDS["hf"]))


# --- WebDataset -------------------------------------------------------------------------------------------------------


def read_shards(source: str | Path) -> list[Sample]:
    """The images of `wds:FOLDER`: all tar archives in it, none of them unpacked.

    The split is a word in the path of an archive (train-000.tar, test/0.tar, birds-val-1.tar). Files whose names are
    equal up to the first dot are one sample: an image, and its label in NAME.cls (a name or a number, as text) or in
    NAME.json under "label". `wds:FOLDER:label=KEY` names another key of the JSON file. Numbers get the names of
    classnames.txt, where that lies in the folder.

    Raises DataError naming the archive and the sample for anything missing, damaged or ambiguous.
    """
    parsed = parse(source)
    assert parsed is not None
    folder, key = Path(parsed.name), parsed.options.get("label")
    shards = sorted(path for path in folder.rglob("*.tar") if path.is_file()) if folder.is_dir() else []
    if not shards:
        raise DataError(
            f"{source}: no .tar file in the folder {folder}; wanted archives like train-000.tar, test-000.tar"
        )
    splits = {shard: _split_of(shard.relative_to(folder)) for shard in shards}
    if None in splits.values() and any(splits.values()):
        lost = next(shard for shard, split in splits.items() if split is None)
        raise DataError(f"{lost}: train, val or test should be a word in its name, as in that of other shards")
    samples = [sample for shard in shards for sample in _samples(shard, splits[shard], key)]
    names = folder / CLASS_NAMES
    return _named(samples, names) if names.is_file() else samples


def _split_of(path: Path) -> str | None:
    words = {SPLIT_NAMES[w] for w in re.findall("[a-z]+", path.with_suffix("").as_posix().lower()) if w in SPLIT_NAMES}
    if len(words) > 1:
        raise DataError(f"{path}: is it {' or '.join(sorted(words))}? Its name says both")
    return words.pop() if words else None


def _samples(shard: Path, split: str | None, key: str | None) -> list[Sample]:
    try:
        files = members(shard)
    except tarfile.TarError as error:
        raise DataError(f"{shard}: damaged, cut off or compressed ({error}); a shard is a plain tar archive") from error
    groups: dict[str, dict[str, str]] = {}
    for name in files:
        path = PurePosixPath(name)
        stem, _, ending = path.name.partition(".")
        groups.setdefault((path.parent / stem).as_posix(), {})[ending.lower()] = name
    samples = []
    with shard.open("rb") as file:

        def text(name: str) -> str:
            start, length = files[name]
            file.seek(start)
            return file.read(length).decode("utf-8-sig").strip()

        for name, parts in groups.items():
            images = [file for ending, file in parts.items() if f".{ending}" in EXTENSIONS]
            if len(images) > 1:
                raise DataError(f"{shard}: sample {name} has several images: {', '.join(images)}; one is wanted")
            if not images:
                continue  # something that belongs to no image
            try:
                label = _label(parts, text, key)
            except ValueError as error:
                raise DataError(f"{shard}: label of sample {name}: {error}") from error
            samples.append(Sample(shard / images[0], label, split))
    if not samples:
        raise DataError(f"{shard}: no image in it; known endings: {' '.join(EXTENSIONS)}")
    return samples


def _label(parts: dict[str, str], text: Any, key: str | None) -> str:
    """The label of one sample; ValueError says why there is none."""
    if key is None and "cls" in parts:
        label: Any = text(parts["cls"])
    elif "json" in parts:
        about, wanted = json.loads(text(parts["json"])), key or "label"
        label = about.get(wanted) if isinstance(about, dict) else None
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(f"{wanted!r} in {parts['json']} should be a text or a number, got {label!r}")
    else:
        raise ValueError(f"no {'.json' if key else '.cls or .json'} beside the image")
    if not str(label).strip():
        raise ValueError("it is empty")
    return str(label).strip()


def _named(samples: list[Sample], file: Path) -> list[Sample]:
    names = file.read_text(encoding="utf-8").splitlines()
    for sample in samples:
        if not sample.label.isdecimal() or int(sample.label) >= len(names):
            raise DataError(f"{sample.path}: label {sample.label!r} is not the number of a line of {file}, from 0")
    return [sample._replace(label=names[int(sample.label)].strip()) for sample in samples]


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@cache
def write_out(name: str, config: str | None = None, image: str | None = None, label: str | None = None) -> Path:
    """Write the images of a Hugging Face data set as files, unchanged, beside a list.csv; returns that list.

    `name` is owner/name on the Hub, or a folder: one written by `save_to_disk`, or files that `load_dataset` reads.
    `config`, and the columns `image` and `label`, are only needed where there are several to choose from. It is done
    once for each version of the data, below the cache of `datasets`; an interrupted attempt leaves nothing behind.

    Splits without a label, and those not called train, validation or test, are left out, unless there is only one.
    Raises ConfigError without the library or for a column that is not there, DataError for all else that is missing.
    """
    try:
        import datasets
        from datasets.utils import tqdm
        from filelock import FileLock
    except ImportError as error:
        raise ConfigError(f"hf:{name} needs the library datasets ({error}): pip install 'glsim[hf]'") from error
    parts = _load(name, config)
    if len(parts) > 1:
        known = [split for split in parts if split in SPLIT_NAMES]
        if len({SPLIT_NAMES[split] for split in known}) != len(known) or not known:
            some = ", ".join(parts)
            raise DataError(f"hf:{name}: wanted one split each called train, validation, test; there are: {some}")
        parts = {split: parts[split] for split in known}
    parts = {SPLIT_NAMES.get(split, split): part for split, part in parts.items()}
    first = next(iter(parts.values()))
    image = _column(name, first, image, "image", datasets.Image)
    label = _column(name, first, label, "label", datasets.ClassLabel)
    labels = {split: _labels(name, split, part, label) for split, part in parts.items()}
    labels = {split: names for split, names in labels.items() if any(names)}
    if not labels:
        raise DataError(f"hf:{name}: no image has a label in column {label!r}")
    drawn = not {"val", "test"} & set(labels)  # by read_data

    version = "\n".join(f"{split} {part._fingerprint}" for split, part in parts.items())
    version = hashlib.sha256(f"{version}\n{image}\n{label}".encode()).hexdigest()[:16]
    title = re.sub(r"[^\w.-]+", "_", "_".join(filter(None, (Path(name).name, config))))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "glsim" / f"{title}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f"{folder.name}.partial")
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder / "list.csv"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            rows = [("path", "label") if drawn else ("path", "label", "split")]
            for split, names in labels.items():
                (fresh / split).mkdir(parents=True)
                part = parts[split].select_columns([image]).cast_column(image, datasets.Image(decode=False))
                for i, (row, given) in enumerate(zip(tqdm(part, desc=f"writing {split}"), names, strict=True)):
                    if given is None:
                        raise DataError(f"hf:{name}: image {i} of {split} has no label in column {label!r}")
                    data = _content(name, split, i, row[image])
                    key = f"{split}/{i:06d}{_ending(data)}"
                    (fresh / key).write_bytes(data)
                    rows.append((key, given) if drawn else (key, given, split))
            with (fresh / "list.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder / "list.csv"


def _load(name: str, config: str | None) -> dict[str, Any]:
    """The splits of a data set by name."""
    import datasets

    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config)
    except Exception as error:  # the library lets through what its many parts raise
        where = "is it whole?" if Path(name).exists() else "without a network, only what was loaded before can be had"
        raise DataError(f"hf:{name} could not be loaded ({type(error).__name__}: {error}); {where}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _column(name: str, part: Any, given: str | None, what: str, kind: type) -> str:
    known = ", ".join(part.features)
    if given is not None:
        if given not in part.features:
            raise ConfigError(f"hf:{name}: no column {given!r}; there are: {known}")
        return given
    found = [column for column, feature in part.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        some = f"several columns could be the {what}: {', '.join(found)}" if found else f"no column is marked as {what}"
        raise ConfigError(f"hf:{name}: {some}; name one, as hf:{name}:{what}=COLUMN; columns: {known}")
    return found[0]


def _labels(name: str, split: str, part: Any, column: str) -> list[str | None]:
    """The class of each image by name; None where it has none (-1 stands for the secret labels of a test)."""
    feature, values = part.features.get(column), list(part[column]) if column in part.features else [None] * len(part)
    if hasattr(feature, "int2str"):
        return [None if value is None or value < 0 else feature.int2str(value) for value in values]
    wrong = next((v for v in values if v is not None and (isinstance(v, bool) or not isinstance(v, str | int))), None)
    if wrong is not None:
        raise DataError(f"hf:{name}: column {column!r} of {split} holds {wrong!r}; a label is a text or a number")
    return [None if value is None else str(value) for value in values]


def _content(name: str, split: str, i: int, stored: dict[str, Any] | None) -> bytes:
    if not stored:
        raise DataError(f"hf:{name}: row {i} of {split} has no image")
    if stored["bytes"] is not None:
        return stored["bytes"]
    try:
        return Path(stored["path"]).read_bytes()
    except OSError as error:
        raise DataError(f"hf:{name}: image {i} of {split} cannot be read: {error}") from error


def _ending(data: bytes) -> str:
    """The ending of a file with this content; none where it is no image, which reading it will then say."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {"JPEG": ".jpg", "MPO": ".jpg"}.get(str(image.format), f".{image.format}".lower())
    except Exception:
        return ""
