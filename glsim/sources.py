"""Floor 3: the names of splits and classes, and data sets that are no folder of images: those of Hugging Face (`hf:`)
and WebDataset shards (`wds:`).

Shards are read where they are: an image is named SHARD.tar/NAME, and `glsim.images` opens it there. Images of Hugging
Face data sets lie in tables that only the library `datasets` reads; they are written out once, as files with a list.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shutil
import tarfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from glsim.files import is_junk, one_line, parse_json, read_text, real
from glsim.images import EXTENSIONS, members
from glsim.types import ConfigError, DataError, DataWarning

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
_ROOTS = ("train", "test", "valid")  # words that begin so may mean a split: Trainingsdaten
_HINTS = {"set", "split", "part", "fold", "holdout", "learn", "learning", "query", "gallery", "probe", "calibration"}
_NOTHING = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")  # unseen marks
CLASS_NAMES = "classnames.txt"  # beside shards whose labels are numbers: one name a line, as the CLIP benchmark has it


# --- names ------------------------------------------------------------------------------------------------------------


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
    return _joined(splits) if only else None


def _joined(splits: set[str]) -> str | None:
    return "train" if splits == {"train", "val"} else next(iter(splits)) if len(splits) == 1 else None


def holds_val(name: str) -> bool:
    """Whether a name is that of train and val together, as `trainval`."""
    return splits_named(name) == ({"train", "val"}, True)


def resembles_split(name: str) -> bool:
    """Whether a name that is none of a split may be meant as one: `train2`, `my_test`, `Trainingsdaten`, `fold1`."""
    return any(
        _splits_of_word(word) or word.startswith(_ROOTS) or word.removesuffix("s") in _HINTS for word in words_of(name)
    )


def holds_masks(name: str) -> bool:
    """Whether a folder is, by its name, one of masks and the like, which belong to images and are none to learn."""
    return bool({"mask", "masks", "segmentations", "annotations", "trimaps"} & set(words_of(name)))


def count_endings(names: Iterable[str]) -> str:
    """Files by their ending, most frequent first: "12 files: 7 .txt, 5 without an ending"."""
    counts = Counter(PurePosixPath(name).suffix.lower() for name in names)
    total, kinds = sum(counts.values()), sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = [f"{n:,} {ending or 'without an ending'}" for ending, n in kinds[:8]]
    shown += [f"{sum(n for _, n in kinds[8:]):,} others"] if len(kinds) > 8 else []
    return f"{total:,} file{'s' if total > 1 else ''}: {', '.join(shown)}"


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
    NAME.json under "label"; further dots belong to the name where a label has them too. `wds:FOLDER:label=KEY` names
    another key of the JSON file. Numbers get the names of classnames.txt, where that lies in the folder.

    Warns of samples that hold no image (DataWarning). Raises DataError naming the archive and the sample for anything
    missing, damaged or ambiguous.
    """
    parsed = parse(source)
    assert parsed is not None
    folder, key = Path(parsed.name), parsed.options.get("label")
    found = [p for p in folder.rglob("*.tar") if p.is_file()] if folder.is_dir() else []
    shards = sorted(p for p in found if not any(map(is_junk, p.relative_to(folder).parts)))
    if not shards:
        raise DataError(
            f"{source}: no .tar file in the folder {folder}; wanted archives like train-000.tar, test-000.tar"
        )
    splits = {shard: _split_of(shard.relative_to(folder)) for shard in shards}
    lost = next((shard for shard, split in splits.items() if split is None), None)
    if lost is not None and any(splits.values()):
        raise DataError(f"{lost}: train, val or test should be a word in its name, as in that of other shards")
    both = {"train", "val"}
    whole = next((s for s in shards if any(splits_named(p)[0] == both for p in s.relative_to(folder).parts)), None)
    if whole is not None and "val" in splits.values():
        part = next(shard for shard, split in splits.items() if split == "val")
        raise DataError(f"{part}: by its name a part of {whole}, which is train and val together; keep one of them")
    left: list[str] = []
    samples = [sample for shard in shards for sample in _samples(shard, splits[shard], key, left)]
    if left:
        warnings.warn(f"{source}: left out, as no image belongs to them, {count_endings(left)}", DataWarning, 2)
    names = folder / CLASS_NAMES
    return _named(samples, names) if names.is_file() else samples


def _split_of(path: Path) -> str | None:
    """The split of a shard; DataError where its path names two, or a word that may be meant as one."""
    named = [splits_named(part)[0] for part in path.with_suffix("").parts]
    found = {_joined(splits) or " or ".join(sorted(splits)) for splits in named if splits}
    if len(found) > 1 or any(" or " in split for split in found):
        raise DataError(f"{path}: is it {' or '.join(sorted(found))}? Its name says both")
    if not found and any(word.startswith(_ROOTS) for word in words_of(path.as_posix())):
        raise DataError(f"{path}: its name may be meant as that of a split; known are {KNOWN_SPLITS}; rename it")
    return found.pop() if found else None


def _samples(shard: Path, split: str | None, key: str | None, left: list[str]) -> list[Sample]:
    try:
        files = members(shard)
    except tarfile.TarError as error:
        raise DataError(f"{shard}: damaged, cut off or compressed ({error}); a shard is a plain tar archive") from error
    files = {name: place for name, place in files.items() if not any(map(is_junk, PurePosixPath(name).parts))}
    labelled = {PurePosixPath(name).with_suffix("") for name in files if name.lower().endswith((".cls", ".json"))}
    groups: dict[str, dict[str, str]] = {}
    for name in files:
        path = PurePosixPath(name)
        whole = path.with_suffix("") in labelled  # the label says where the name of the sample ends
        stem = path.stem if whole else path.name.partition(".")[0]
        groups.setdefault((path.parent / stem).as_posix(), {})[path.name[len(stem) + 1 :].lower()] = name
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
                left += [file for ending, file in parts.items() if ending not in ("cls", "json")]
                continue
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
        about, wanted = parse_json(text(parts["json"]), None), key or "label"
        label = about.get(wanted) if isinstance(about, dict) else None
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(f"{wanted!r} in {parts['json']} should be a text or a number, got {label!r}")
    else:
        raise ValueError(f"no {'.json' if key else '.cls or .json'} beside the image")
    if not str(label).strip():
        raise ValueError("it is empty")
    return str(label).strip()


def _named(samples: list[Sample], file: Path) -> list[Sample]:
    try:
        names = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text in UTF-8 ({one_line(error)})") from error
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

    Splits without a label, and those not called train, validation or test, are left out with a DataWarning, unless
    there is only one. Raises ConfigError without the library or for a column that is not there, DataError for all
    else that is missing.
    """
    try:
        import datasets
        from datasets.utils import tqdm
        from filelock import FileLock
    except ImportError as error:
        raise ConfigError(f"hf:{name} needs the library datasets ({error}): pip install 'glsim[hf]'") from error
    parts = _load(name, config)
    if len(parts) > 1:
        known = [split for split in parts if split_of(split)]
        together = any(map(holds_val, known)) and any(split_of(split) == "val" for split in known)
        if len({split_of(split) for split in known}) != len(known) or not known or together:
            some = ", ".join(parts)
            raise DataError(f"hf:{name}: wanted one split each called train, validation, test; there are: {some}")
        if others := [f"{split} ({len(parts[split]):,} images)" for split in parts if split not in known]:
            warnings.warn(f"hf:{name}: left out, as no known split: {', '.join(others)}", DataWarning, 2)
        parts = {split: parts[split] for split in known}
    parts = {split_of(split) or split: part for split, part in parts.items()}
    first = next(iter(parts.values()))
    image = _column(name, first, image, "image", datasets.Image)
    label = _column(name, first, label, "label", datasets.ClassLabel)
    labels = {split: _labels(name, split, part, label) for split, part in parts.items()}
    secret = [split for split, names in labels.items() if not any(names)]
    labels = {split: names for split, names in labels.items() if split not in secret}
    if not labels:
        raise DataError(f"hf:{name}: no image has a label in column {label!r}")
    if secret:
        warnings.warn(f"hf:{name}: left out, as without labels: {', '.join(secret)}", DataWarning, 2)
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
        if Path(name).is_dir() and not saved:
            _check_files(name)
    except DataError:
        raise
    except Exception as error:  # the library lets through what its many parts raise
        where = "is it whole?" if Path(name).exists() else "without a network, only what was loaded before can be had"
        raise DataError(f"hf:{name} could not be loaded ({type(error).__name__}: {error}); {where}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _check_files(name: str) -> None:
    """DataError unless the library reads every file of the kinds that it reads in the folder `name`.

    It takes the words of splits in names of files for their splits, and then leaves the other files out.
    """
    import datasets

    builders = [datasets.load_dataset_builder(name, c) for c in datasets.get_dataset_config_names(name)]
    files = [str(f) for b in builders for part in (b.config.data_files or {}).values() for f in part]
    taken = {real(file) for file in files if "://" not in file}
    kinds = {file.suffix.lower() for file in taken}
    kinds |= set(EXTENSIONS) if kinds & set(EXTENSIONS) else set()
    below = [(f, f.relative_to(name)) for f in Path(name).rglob("*") if f.suffix.lower() in kinds and f.is_file()]
    there = {real(f): inside for f, inside in below if not any(map(is_junk, inside.parts))}
    if taken and (missed := sorted(inside for file, inside in there.items() if file not in taken)):
        raise DataError(
            f"hf:{name}: the library datasets reads {len(there) - len(missed):,} of {len(there):,} files, and not "
            f"{missed[0]}: it goes by the words of splits in names; what works: --data {name} for class folders, or "
            "each file in a folder train, validation or test"
        )


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
