"""Data sets of Hugging Face, which lie in tables: their images written out once, as files with a list."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from glsim.data.images import EXTENSIONS
from glsim.data.names import holds_val, split_of
from glsim.files import is_junk, real
from glsim.types import ConfigError, DataError, DataWarning


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
