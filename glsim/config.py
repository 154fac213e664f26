"""Settings of every verb: name, type, default, help and checks in one place. Nothing here imports torch.

A dataclass here is a verb's command line (`cli` turns fields into options) and, for `Train`, the keys of a recipe.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from glsim.data.catalog import SETS
from glsim.data.images import MAX_MEGAPIXELS
from glsim.files import expand
from glsim.training.config import Train, change_recipe, find_checked_recipe, read_recipe, to_recipe  # noqa: F401
from glsim.types import EMBEDDINGS, ConfigError, choose

Size = int | list[int] | None
Role = Literal["reads", "file", "folder"]  # of a path: it is read, or a file or folder is written there


def setting(default: Any, help: str, path: Role | None = None) -> Any:  # noqa: A002
    """A dataclass field with a default and its one-line help; `path` where its text names a file or folder."""
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help, "path": path})
    return field(default=default, metadata={"help": help, "path": path})


def required(help: str, path: Role | None = None) -> Any:  # noqa: A002
    """A dataclass field that a recipe or the command line has to give."""
    return field(metadata={"help": help, "path": path})


def positional(default: Any, help: str, path: Role | None = None) -> Any:  # noqa: A002
    """A dataclass field that stands on the command line without its name; `MISSING` makes it mandatory."""
    return field(default=default, metadata={"help": help, "positional": True, "path": path})


class Settings:
    """What all settings have in common: in their paths `~` is the home folder, before anything is checked."""

    def __init_subclass__(cls) -> None:
        check = cls.__dict__.get("__post_init__")

        def __post_init__(self: Any) -> None:
            for f in dataclasses.fields(self):
                value = getattr(self, f.name)
                if f.metadata.get("path") and value is not None:
                    whole = isinstance(value, str | Path)
                    expanded = expand(str(value)) if whole else [expand(str(one)) for one in value]
                    object.__setattr__(self, f.name, expanded)
            if check is not None:
                check(self)

        cls.__post_init__ = __post_init__  # type: ignore[attr-defined]


def outputs(settings: Any) -> dict[str, tuple[str, Role]]:
    """The settings that name a path on this machine that will be written, with it, and what will be made there."""
    roles: dict[str, Any] = {f.name: f.metadata.get("path") for f in dataclasses.fields(settings)}
    if getattr(settings, "engine", None) == "ray":
        roles["out"] = "folder"
    paths = {name: getattr(settings, name) for name, role in roles.items() if role in ("file", "folder")}
    return {
        name: (path, roles[name])
        for name, path in paths.items()
        if path is not None and not re.match("hf-hub:|[a-z0-9]+://", path)
    }


def megapixels() -> Any:
    """The field `max_megapixels` of every verb that decodes images (`glsim.data.images:limited`)."""
    return setting(MAX_MEGAPIXELS, "megapixels of an image; a larger one is a bad file, and none of it is decoded")


@dataclass(frozen=True, kw_only=True)
class Predict(Settings):
    """Name what is in images: top-k classes with probabilities, and the crop box."""

    source: str = positional(MISSING, "bundle, hf-hub:owner/name, official .pth or exported .onnx", path="reads")
    images: list[str] = positional(MISSING, "files, folders or globs", path="reads")
    options: dict[str, Any] = setting({}, "options of the method to change, as --options.margin null")
    top_k: int = setting(5, "answers per image")
    flip: bool = setting(False, "average the logits of each image and its mirror image")
    reject: bool = setting(False, "answer unknown below the threshold that calibrate --max-error found")
    taxonomy: str | None = setting(
        None,
        "CSV label,genus,.. from fine to coarse: with --reject, answer with a coarser level where that is sure",
        path="reads",
    )
    embedding: Literal["global", "crop", "fused"] | None = setting(
        None, "write this vector too (jsonl, Parquet): of the image, of the crop, or what the head reads"
    )
    format: Literal["text", "jsonl", "csv"] | None = setting(None, "default: by the ending of --out, else text")
    out: str | None = setting(
        None,
        "write there instead of printing; --engine ray: folder or s3://.. for Parquet files",
        path="file",
    )
    engine: Literal["local", "ray"] = setting(
        "local", "ray: many workers, lists and object stores, Parquet out; the same command goes on where it stopped"
    )
    address: str | None = setting(
        None, "engine=ray: cluster to join, as auto or ray://HOST:10001; default: this machine"
    )
    part_size: int = setting(1000, "engine=ray: images in each Parquet file")
    batch_size: int = setting(32, "images at a time")
    workers: int = setting(2, "processes that load images; engine=ray: workers, each with the model and one core")
    skip_bad: bool = setting(False, "leave unreadable images out and list them")
    max_megapixels: float = megapixels()
    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")

    def __post_init__(self) -> None:
        _limit(self.max_megapixels)
        choose(self.engine, {"local": None, "ray": None}, "engine")
        _at_least(self, 1, "batch_size", "top_k", "part_size")
        _at_least(self, int(self.engine == "ray"), "workers")
        if self.taxonomy is not None and not self.reject:
            raise ConfigError(f"taxonomy={self.taxonomy}: it is for what is unsure; add --reject")
        if self.engine == "ray":
            if self.skip_bad:
                raise ConfigError(
                    "skip_bad: --engine ray always goes on, and says in a row what is wrong; leave it out"
                )
            if self.reject:
                raise ConfigError("reject: not with --engine ray; its files hold the confidence of each answer")
            if self.out is None:
                raise ConfigError("out: --engine ray writes Parquet files; name a folder with --out")
            if self.format is not None:
                raise ConfigError(f"format={self.format}: --engine ray writes Parquet; leave it out")
        elif remote := [one for one in self.images if "://" in one or _is_list(one)]:
            raise ConfigError(f"images={remote[0]}: lists and object stores need --engine ray, and --out FOLDER")
        elif self.address is not None:
            raise ConfigError(f"address={self.address}: only with --engine ray")
        elif self.part_size != Predict.part_size:
            raise ConfigError(f"part_size={self.part_size}: only with --engine ray")
        if self.format is None:
            ending = Path(self.out).suffix.lstrip(".").lower() if self.out else ""
            object.__setattr__(self, "format", ending if ending in ("jsonl", "csv") else "text")
        if self.embedding is not None:
            choose(self.embedding, EMBEDDINGS, "embedding")
            if self.engine == "local" and self.out is not None and self.format != "jsonl":
                raise ConfigError(f"embedding={self.embedding}: format {self.format} has no place for it; take jsonl")


@dataclass(frozen=True, kw_only=True)
class _Encode(Settings):
    """What every verb of an index takes besides its own."""

    batch_size: int = setting(32, "images at a time")
    workers: int = setting(2, "processes that load images")
    skip_bad: bool = setting(False, "leave unreadable images out and list them")
    max_megapixels: float = megapixels()
    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")

    def __post_init__(self) -> None:
        _limit(self.max_megapixels)
        _at_least(self, 1, "batch_size")
        _at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class IndexBuild(_Encode):
    """Keep the images of a data set as vectors, so that more classes can be added without training."""

    source: str = positional(MISSING, "bundle, hf-hub:owner/name or official .pth", path="reads")
    data: str = required("folder, CSV, hf:NAME or wds:FOLDER, as for train", path="reads")
    out: str = required("folder to make, say RUN/index", path="folder")
    dataset: str | None = setting(None, "name of a data set prepared in DATA")
    split: Literal["train", "val", "test"] = setting("train", "which images")
    embedding: Literal["global", "crop", "fused"] | None = setting(
        None, "vector of the image, of the crop, or what the head reads; default: what the head reads"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is not None:
            choose(self.dataset, SETS, "data set")
        if self.embedding is not None:
            choose(self.embedding, EMBEDDINGS, "embedding")


@dataclass(frozen=True, kw_only=True)
class IndexAdd(_Encode):
    """Add images to an index, of a new class or a known one; the class is recognised at once."""

    index: str = positional(MISSING, "folder of glsim index build", path="folder")
    images: list[str] = positional(MISSING, "files, folders or globs", path="reads")
    label: str | None = setting(None, "class of all these images; default: of each, the name of its folder")
    source: str | None = setting(None, "the model, where it is no longer where it was", path="reads")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label is not None and not self.label.strip():
            raise ConfigError("label='': give the class a name")


@dataclass(frozen=True, kw_only=True)
class IndexQuery(_Encode):
    """Name what is in images by an index: classes by similarity, nearest images and their vote."""

    index: str = positional(MISSING, "folder of glsim index build", path="reads")
    images: list[str] = positional(MISSING, "files, folders or globs", path="reads")
    top_k: int = setting(5, "classes per image")
    neighbours: int = setting(5, "nearest images that vote, and are shown")
    below: float = setting(-1.0, "similarity of the best class below which an image is unknown")
    source: str | None = setting(None, "the model, where it is no longer where it was", path="reads")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "top_k", "neighbours")
        if not -1 <= self.below <= 1:
            raise ConfigError(f"below={self.below}: a cosine, from -1 to 1")


@dataclass(frozen=True, kw_only=True)
class IndexEval(_Encode):
    """Measure an index beside the softmax head: recall, accuracy as classes are added, what is unknown."""

    index: str = positional(MISSING, "folder of glsim index build", path="reads")
    data: str = required(
        "folder, CSV, hf:NAME or wds:FOLDER, as for train; classes not in the index count as unknown", path="reads"
    )
    dataset: str | None = setting(None, "name of a data set prepared in DATA")
    split: Literal["train", "val", "test"] = setting("test", "which images")
    neighbours: int = setting(5, "nearest images that vote")
    shots: list[int] = setting([1, 5, 20], "images of each added class, where the index has classes the head has not")
    steps: int = setting(4, "steps in which those classes are added")
    seed: int = setting(0, "of which images are taken")
    source: str | None = setting(None, "the model, where it is no longer where it was", path="reads")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "neighbours", "steps")
        if not self.shots or min(self.shots) < 1:
            raise ConfigError(f"shots={self.shots}: one or more, at least 1")
        if self.dataset is not None:
            choose(self.dataset, SETS, "data set")


@dataclass(frozen=True, kw_only=True)
class Serve(Settings):
    """A web page and a JSON API on this machine: drop an image, see the answer and why. Needs glsim[demo]."""

    source: str = positional(MISSING, "bundle, hf-hub:owner/name or official .pth", path="reads")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: every network this machine is in")
    port: int = setting(7860, "port to listen on (0: any that is free)")
    allowed_hosts: list[str] | None = setting(None, "names it may be called by, besides addresses and localhost")
    batch_size: int = setting(16, "images answered together at most")
    max_wait_ms: float = setting(10.0, "milliseconds an image waits at most for others to be answered with")
    queue: int = setting(64, "images taken in at most; what comes then is refused (503) until some are answered")
    workers: int = setting(2, "threads that decode images")
    max_mb: float = setting(20.0, "megabytes of a request")
    max_megapixels: float = setting(50.0, "megapixels of an image")
    examples: str | None = setting(
        None, "folder or glob of images to try on the page; default: drawn birds", path="reads"
    )
    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "queue", "workers")
        _at_least(self, 0, "max_wait_ms", "port")
        _at_least(self, 0.001, "max_mb")
        _limit(self.max_megapixels)
        if self.port > 65535:
            raise ConfigError(f"port={self.port}: 0 to 65535")


@dataclass(frozen=True, kw_only=True)
class Convert(Settings):
    """Turn a checkpoint of the GLSim, TransFG or FFVT authors into a bundle, reporting every key used or ignored."""

    checkpoint: str = positional(MISSING, "official .pth file", path="reads")
    bundle: str = positional(MISSING, "folder to make", path="folder")
    method: Literal["glsim", "transfg", "ffvt"] = setting("glsim", "whose checkpoint it is")
    options: dict[str, Any] = setting({}, "what the file does not hold, as --options.num_heads 12 --options.stride 12")
    labels: str | None = setting(None, "text file with one class name a line, in the order of the logits", path="reads")


@dataclass(frozen=True, kw_only=True)
class Export(Settings):
    """Write a model as one graph that runs without glsim (ONNX, torch.export), and hold it to the model's answers."""

    source: str = positional(MISSING, "bundle, hf-hub:owner/name or official .pth", path="reads")
    out: str = required("file to write: model.onnx, or model.pt2 for torch.export", path="file")
    format: Literal["onnx", "torch"] | None = setting(None, "default: by the ending of --out")
    precision: Literal["float32", "int8"] = setting(
        "float32", "int8: ONNX with weights of 8 bits, smaller and faster on CPUs; its answers are no longer the same"
    )

    def __post_init__(self) -> None:
        named = {".onnx": "onnx", ".pt2": "torch"}.get(Path(self.out).suffix)
        if named is None or self.format not in (None, named):
            raise ConfigError(f"out={self.out}: name a file that ends in .onnx (format onnx) or .pt2 (format torch)")
        object.__setattr__(self, "format", named)
        choose(self.precision, {"float32": None, "int8": None}, "precision")
        if self.precision == "int8" and self.format != "onnx":
            raise ConfigError(f"precision=int8 is for ONNX; name an --out that ends in .onnx, not {self.out}")


@dataclass(frozen=True, kw_only=True)
class Push(Settings):
    """Send a bundle to the Hugging Face Hub, with its licence; load it there as hf-hub:owner/name."""

    run: str = positional(MISSING, "bundle folder", path="reads")
    repository: str = positional(MISSING, "owner/name; made where it is not there yet")
    licence: str | None = setting(None, "of the weights, by the Hub's name for it: apache-2.0, cc-by-nc-4.0, ..")
    data_licence: str | None = setting(None, "of the images; default: what the bundle says")
    backbone_licence: str | None = setting(None, "of the weights it started from; default: what the bundle says")
    private: bool = setting(False, "make the repository private")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository):
            raise ConfigError(f"repository={self.repository!r}: owner/name is needed")
        for name in ("licence", "data_licence", "backbone_licence"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or (name == "licence" and value == "unknown")):
                raise ConfigError(f"{name}={value!r}: name the licence, for example apache-2.0")


@dataclass(frozen=True, kw_only=True)
class Datasets(Settings):
    """List the data sets glsim knows by name, or prepare one in a folder for --dataset NAME."""

    action: Literal["list", "prepare"] = positional("list", "list, or prepare NAME")
    name: str | None = positional(None, "synthetic, or a name of the list")
    root: str | None = setting(None, "folder to make, or to fill", path="folder")
    source: list[str] | None = setting(
        None, "the publisher's archives, or the folder they were unpacked in", path="reads"
    )
    partial: bool = setting(False, "leave out listed images that are not there, and accept other counts")
    classes: int = setting(8, "synthetic: how many species")
    train: int = setting(60, "synthetic: training images a class")
    val: int = setting(0, "synthetic: validation images a class")
    test: int = setting(20, "synthetic: test images a class")
    size: int = setting(224, "synthetic: pixels a side")
    part_scale: float = setting(1.0, "synthetic: size of the parts that tell species apart")
    clutter: float = setting(1.0, "synthetic: how busy the background is")
    seed: int = setting(0, "synthetic: another seed draws other images")


def _is_list(path: str) -> bool:
    return path.lower().endswith((".csv", ".parquet")) and not Path(path).is_dir()


def _at_least(settings: Any, least: float, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < least:
            raise ConfigError(f"{name}={getattr(settings, name)}: at least {least} is needed")


def _limit(megapixels: float) -> None:
    if not 0 < megapixels < math.inf:
        raise ConfigError(f"max_megapixels={megapixels}: a number above 0 is needed")


def _seeds(*seeds: int) -> None:
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:  # what NumPy's generator takes
        raise ConfigError(f"seed={wrong[0]}: from 0 to 4294967295")


def _below_one(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: from 0 to below 1")
