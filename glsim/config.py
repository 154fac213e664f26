"""Settings of every verb: name, type, default, help and checks in one place. Nothing here imports torch.

A dataclass here is a verb's command line (`cli` turns fields into options) and, for `Train`, the keys of a recipe.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from glsim.data.catalog import SETS
from glsim.data.limits import MAX_MEGAPIXELS
from glsim.files import expand, one_line, read_text
from glsim.models import METHODS
from glsim.training.recipes import find_recipe
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
    """The field `max_megapixels` of every verb that decodes images (`glsim.data.limits:limited`)."""
    return setting(MAX_MEGAPIXELS, "megapixels of an image; a larger one is a bad file, and none of it is decoded")


@dataclass(frozen=True, kw_only=True)
class Train(Settings):
    """Train a model on a folder or CSV of images. OUT becomes a bundle: load it, evaluate it, predict with it."""

    data: str = required(
        "folder (train/CLASS/.., or CLASS/..), CSV with path,label[,split], hf:NAME or wds:FOLDER", path="reads"
    )
    dataset: str | None = setting(None, "data set prepared in DATA; its settings hold unless others are given")
    out: str = required("run folder to make", path="folder")
    resume: bool = setting(False, "go on from the last checkpoint in OUT")

    method: str = setting("glsim", f"one of: {', '.join(METHODS)}")
    backbone: str | None = setting(None, "timm model name; default: vit_base_patch16_224, for cal resnet101")
    pretrained: bool = setting(True, "start from timm's weights (downloaded once)")
    image_size: Size = setting(None, "pixels, one side or [height,width]; default: the backbone's own")
    options: dict[str, Any] = setting({}, "options of the method, as --options.top_o 16 --options.metric gls_l2")
    backbone_args: dict[str, Any] = setting({}, "handed to timm, as --backbone-args.depth 6")

    init_from: str | None = setting(
        None, "start from a bundle, hf-hub:owner/name, .pth (what fits) or ViT .npz", path="reads"
    )

    val_fraction: float = setting(0.0, "share of train held out, stratified, to watch the run (0: none)")
    test_fraction: float = setting(0.2, "share held out as test where the data has no split of its own")
    test: bool = setting(False, "measure the test split too, once: after the last epoch; nothing is chosen by it")
    split_seed: int = setting(0, "of both shares; kept apart from seed so that repeated runs share their splits")
    skip_bad: bool = setting(False, "check every image first, leave unreadable ones out and list them")
    max_megapixels: float = megapixels()
    workers: int = setting(2, "processes that load images")
    cache: Literal["none", "ram"] = setting("none", "ram: decode and resize every training image once, and keep it")

    # None only until __post_init__ is done.
    resize_ratio: float = setting(None, "resize images to this many times image_size before cropping; default: 1.34")
    resize: Literal["square", "short"] = setting("square", "squeeze to a square, or keep the aspect: by the short side")
    augment: str = setting(
        "medium",
        "none, weak (flip), medium (flip,trivialaugment,erase), or a list of those and vflip, autoaugment, "
        "randaugment, jitter, blur, grey, solarise, affine",
    )
    crop: str = setting("random", "random or centre (of the resized image), or resized (RandomResizedCrop)")
    crop_scale: float = setting(0.5, "smallest share of the area with crop=resized")
    mean: list[float] | None = setting(None, "normalisation, 3 numbers; default: the backbone's")
    std: list[float] | None = setting(None, "normalisation, 3 numbers; default: the backbone's")

    repeats: int = setting(1, "times each image comes in a step, augmented anew; an epoch then shows fewer images")
    mixup: float = setting(0.0, "mix pairs of images; parameter of the Beta distribution (0: off)")
    cutmix: float = setting(0.0, "paste a piece of one image into another; parameter of the Beta distribution (0: off)")

    freeze: Literal["none", "backbone"] = setting("none", "backbone: only what the method puts on top is trained")
    lora: int = setting(0, "rank of low-rank adapters on the attention of a backbone otherwise frozen (0: off)")
    epochs: int = setting(50, "passes over train")
    batch_size: int = setting(8, "images at a time, on each device")
    accumulate: int = setting(1, "batches whose mean gradient makes one step")
    save_steps: int = setting(0, "save every so many steps too (0: after every epoch)")
    optimizer: str = setting("sgd", "sgd (Nesterov), adamw, or any other name timm knows")
    lr: float = setting(0.01, "peak learning rate")
    layer_decay: float = setting(1.0, "each layer's learning rate is this times that of the one above; heads: lr")
    weight_decay: float = setting(0.0, "not applied to biases and norms")
    momentum: float = setting(0.9, "of SGD")
    warmup_steps: int = setting(500, "steps from warmup_lr up to lr")
    warmup_lr: float = setting(1e-6, "learning rate of the first step")
    min_lr: float = setting(1e-5, "learning rate at the end of the cosine")
    schedule: Literal["cosine", "step"] = setting("cosine", "after the warm-up: down a cosine, or in steps")
    decay_epochs: float = setting(30.0, "schedule=step: epochs from one decay to the next")
    decay_rate: float = setting(0.1, "schedule=step: each decay multiplies the learning rate by it")
    label_smoothing: float = setting(0.1, "0 to below 1")
    focal: float = setting(0.0, "exponent of the focal loss (0: cross-entropy)")
    supcon: float = setting(0.0, "weight of the supervised-contrastive loss of the class tokens (0: off)")
    clip_grad: float = setting(1.0, "largest gradient norm (0: no clipping)")
    ema: float = setting(0.0, "decay of averaged weights, which are then the ones saved (0: off)")
    precision: Literal["no", "fp16", "bf16"] = setting("no", "mixed precision")
    grad_checkpointing: bool = setting(False, "keep less for the backward pass and compute it again: slower, smaller")
    compile: bool = setting(False, "compile the model with torch.compile")
    seed: int = setting(1, "of everything random")
    data_licence: str | None = setting(None, "of the images, for the model card; default: the named data set's")
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = setting(None, "log there too; pip install it first")

    def __post_init__(self) -> None:
        _limit(self.max_megapixels)
        choose(self.method, METHODS, "method")
        self._fill()
        if self.tracker is not None:
            choose(self.tracker, {"tensorboard": None, "trackio": None, "wandb": None}, "tracker")
        choose(self.schedule, {"cosine": None, "step": None}, "schedule")
        for name, choices in {"cache": "none ram", "resize": "square short", "freeze": "none backbone"}.items():
            choose(getattr(self, name), dict.fromkeys(choices.split()), name)
        _at_least(self, 1, "epochs", "batch_size", "accumulate", "repeats")
        _at_least(self, 0, "workers", "save_steps", "warmup_steps", "weight_decay", "clip_grad")
        _at_least(self, 0, "mixup", "cutmix", "focal", "supcon", "lora")
        _at_least(self, 0, "lr", "min_lr", "warmup_lr")
        _seeds(self.seed)
        _below_one(self, "val_fraction", "test_fraction", "label_smoothing", "ema", "momentum")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != 3:
                raise ConfigError(f"{name}={values}: three numbers are needed, one per colour")
        if self.std is not None and min(self.std) <= 0:
            raise ConfigError(f"std={self.std}: above 0, for it divides")
        if self.resize_ratio < 1:
            raise ConfigError(f"resize_ratio={self.resize_ratio}: at least 1, or the crop would not fit")
        if self.supcon and (self.mixup or self.cutmix):
            raise ConfigError("supcon needs one class an image; leave mixup and cutmix at 0")
        for name in ("crop_scale", "decay_rate", "layer_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: above 0, at most 1")
        if self.decay_epochs <= 0:
            raise ConfigError(f"decay_epochs={self.decay_epochs}: above 0")

    def _fill(self) -> None:
        """Give what is left open the values of the named data set, so that they stand in the resolved recipe."""
        chosen: dict[str, Any] = {"resize_ratio": 1.34}
        if self.dataset is not None:
            named = choose(self.dataset, SETS, "data set")
            chosen = {"resize_ratio": named.resize_ratio, "mean": list(named.mean), "std": list(named.std)}
            object.__setattr__(self, "options", {**named.options(self.method), **self.options})
        for name, value in chosen.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Reproduce(Settings):
    """Run a recipe by the paper's protocol: choose the lr on images held out of train, then train several seeds."""

    recipe: str = positional(
        MISSING, "YAML file, or the name of one that glsim recipes lists, as for train", path="reads"
    )
    data: str = required("folder or CSV, as for train", path="reads")
    out: str = required("folder for all the runs; the same command goes on where it was interrupted", path="folder")
    lrs: list[float] = setting([], "learning rates to choose from; default: the recipe's, and nothing is chosen")
    seeds: list[int] = setting([1, 10, 100], "of the runs that are measured on test; the first one's choose the lr")
    val_fraction: float = setting(0.2, "share of train held out while choosing, where the data has no val split")
    train: dict[str, Any] = setting({}, "settings instead of the recipe's, as --train.epochs 10 --train.workers 8")

    def __post_init__(self) -> None:
        _below_one(self, "val_fraction")
        for name in ("lrs", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name == "seeds" and not values):
                raise ConfigError(f"{name}={values}: {'one or more' if not values else 'each only once'}")
        if any(lr <= 0 for lr in self.lrs):
            raise ConfigError(f"lrs={self.lrs}: above 0")
        _seeds(*self.seeds)
        if self.lrs and not self.val_fraction:
            raise ConfigError("val_fraction=0: the lr is chosen on what is held out of train; above 0 is needed")
        fixed = {"data": "--data", "out": "--out", "lr": "--lrs", "seed": "--seeds", "val_fraction": "--val-fraction"}
        for name in self.train:
            if name in fixed:
                raise ConfigError(f"--train.{name}: use {fixed[name]}")
            if name in ("test", "resume"):
                raise ConfigError(f"--train.{name}: the protocol sets that itself")


@dataclass(frozen=True, kw_only=True)
class Report(Settings):
    """Tables of finished runs: mean and std over seeds, one table a data set, McNemar between pairs of runs."""

    runs: list[str] = positional(MISSING, "run folders, folders of glsim reproduce, or globs of them", path="reads")
    against: str | None = setting(
        None, "method or run folder: pair every other row with this one (exact McNemar)", path="reads"
    )
    best_on_test: bool = setting(False, "a column with the best seed's accuracy, named so; not a result to quote")
    out: str | None = setting(None, "folder for report.md, report.csv and report.png", path="folder")


@dataclass(frozen=True, kw_only=True)
class Calibrate(Settings):
    """Fit confidences on validation images, and when a first pass may answer alone; changes the bundle."""

    source: str = positional(MISSING, "bundle folder", path="folder")
    data: str = required("folder, CSV, hf:NAME or wds:FOLDER, as for train", path="reads")
    dataset: str | None = setting(None, "name of a data set prepared in DATA")
    split: Literal["train", "val", "test", "all"] = setting(
        "val", "which images, as eval takes them; none that the model was trained on; all: every one there is"
    )
    max_loss: float = setting(0.1, "points of accuracy (of 100) that skipping second passes may cost on these images")
    max_error: float | None = setting(
        None, "points (of 100) of the answers that may be wrong: below the threshold found, --reject says unknown"
    )
    batch_size: int = setting(32, "images at a time")
    workers: int = setting(2, "processes that load images")
    max_megapixels: float = megapixels()
    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")

    def __post_init__(self) -> None:
        _limit(self.max_megapixels)
        _at_least(self, 1, "batch_size")
        _at_least(self, 0, "workers", "max_loss")
        if self.max_error is not None and not 0 <= self.max_error < 100:
            raise ConfigError(f"max_error={self.max_error}: points of 100, from 0 to below 100")
        if self.dataset is not None:
            choose(self.dataset, SETS, "data set")


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
class Explain(Settings):
    """Draw why: heat-map, box and crop as PNG, by one score or several; a sheet of all images beside."""

    source: str = positional(MISSING, "bundle, hf-hub:owner/name or official .pth", path="reads")
    images: list[str] = positional(MISSING, "files, folders or globs", path="reads")
    out: str = required("folder for the pictures", path="folder")
    options: dict[str, Any] = setting({}, "options of the method to change, as --options.top_o 16")
    metrics: list[str] | None = setting(None, "scores to draw, or all; default: the model's own, gls_cos for plain")
    contrast: list[str] | None = setting(None, "two classes: draw what speaks for the first against the second")
    alpha: float = setting(0.7, "opacity of the heat-map where it is highest, 0 to 1")
    colormap: str = setting("turbo", "of the heat-map, as matplotlib names them")
    top_only: int = setting(0, "show the scores of only so many best patches (0: all)")
    power: float = setting(1.0, "exponent on the heat-map in [0, 1]; above 1 leaves the peaks")
    layers: bool = setting(False, "instead, what becomes of the tokens from block to block: layers.png, layers.json")
    limit: int = setting(100, "draw at most this many images")
    skip_bad: bool = setting(False, "leave unreadable images out and list them")
    max_megapixels: float = megapixels()
    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")

    def __post_init__(self) -> None:
        _limit(self.max_megapixels)
        _at_least(self, 1, "limit")
        _at_least(self, 0, "top_only")
        names = ("metrics", "contrast", "alpha", "colormap", "top_only", "power")
        given = [name for name in names if getattr(self, name) != getattr(Explain, name)]
        if self.layers and given:
            raise ConfigError(f"layers draws no heat-map: no {', '.join(given)} with it")
        if self.contrast is not None:
            if len(self.contrast) != 2 or self.contrast[0] == self.contrast[1]:
                raise ConfigError(f"contrast: two different classes are needed, got: {' '.join(self.contrast)}")
            if self.metrics is not None or self.top_only or self.colormap != "turbo":
                raise ConfigError("contrast draws every patch in two colours: no metrics, top_only or colormap with it")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha}: from 0 to 1")
        if not self.power > 0:
            raise ConfigError(f"power={self.power}: above 0 is needed")


@dataclass(frozen=True, kw_only=True)
class Localize(Settings):
    """Measure where the model looks against masks: scores and boxes of every mechanism, beside controls."""

    source: str = positional(MISSING, "bundle, hf-hub:owner/name or official .pth", path="reads")
    images: str = required("folder (or file, or glob) of images", path="reads")
    masks: str = required(
        "folder of masks, one an image: PNG, trimap or PASCAL VOC XML; or with body/ and part/", path="reads"
    )
    metrics: list[str] | None = setting(None, "mechanisms, or all; default: the model's own, gls_cos for plain")
    controls: bool = setting(False, "boxes of the same size too: centre, random place; random patches; whole image")
    faithfulness: bool = setting(False, "deletion and insertion curves too (18 more passes a mechanism)")
    options: dict[str, Any] = setting({}, "options of the method to change, as --options.top_o 16")
    limit: int | None = setting(None, "measure at most this many images, evenly spaced")
    resamples: int = setting(1000, "bootstrap draws of the images, for the intervals")
    seed: int = setting(0, "of these draws and of the random boxes")
    batch_size: int = setting(32, "images at a time")
    skip_bad: bool = setting(False, "leave unreadable images, and bad masks with theirs, out and list them")
    max_megapixels: float = megapixels()
    out: str | None = setting(None, "file for the result as JSON", path="file")
    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")

    def __post_init__(self) -> None:
        _limit(self.max_megapixels)
        _at_least(self, 1, "batch_size")
        _at_least(self, 100, "resamples")
        if self.limit is not None:
            _at_least(self, 1, "limit")
        _seeds(self.seed)


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
class Bench(Settings):
    """Time models in turn: answers, training steps, images a second, peak memory, and their ratios."""

    methods: list[str] = setting(["plain", "glsim"], "what to measure; options after a colon: glsim:crop_size=112")
    sources: list[str] = setting(
        [], "trained bundles or exported .onnx to measure instead, at their own image size", path="reads"
    )
    backbones: list[str] = setting(["vit_base_patch16_224"], "timm model names")
    sizes: list[int] = setting([224], "sides of the images in pixels")
    batch_sizes: list[int] = setting([1, 8], "images at a time")
    dtypes: list[str] = setting(["float32"], "float32, bfloat16, float16: of the weights; in training, of autocast")
    compile: Literal["no", "yes", "both"] = setting("no", "compile the models with torch.compile")
    against: str | None = setting(
        None, "a method (or source): divide what the others took by what this one took", path="reads"
    )
    training: bool = setting(True, "time training steps too: forward, backward, SGD")
    memory: bool = setting(True, "measure peak memory too, each row in a process of its own")
    data: str | None = setting(
        None,
        "images (folder or glob): how many a second are read, prepared and answered; with --sources a data set as "
        "for train, whose test images are what is answered (the cost of a model may depend on them)",
        path="reads",
    )
    images: int = setting(128, "with --sources and --data: test images in every turn, in memory beforehand")
    loader: str | None = setting(
        None, "recipe: instead, the images a second that training loads from DATA, and uses", path="reads"
    )
    train: dict[str, Any] = setting({}, "with --loader: settings instead of the recipe's, as --train.cache ram")
    seconds: float = setting(15.0, "with --loader: how long loading, model and both together are timed each")
    workers: int | None = setting(None, "processes that load images; default: 2, with --loader those of the recipe")
    max_megapixels: float = megapixels()
    repeats: int = setting(10, "rounds in which every model has its turn; median and quartiles are over these")
    warmup: int = setting(2, "rounds before those, not counted")
    num_classes: int = setting(200, "outputs of the last layer")
    backbone_args: dict[str, Any] = setting({}, "handed to timm, as --backbone-args.depth 6")
    out: str | None = setting(None, "folder for bench.json and plots", path="folder")
    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")

    def __post_init__(self) -> None:
        _limit(self.max_megapixels)
        for method in self.methods:
            choose(method.partition(":")[0], METHODS, "method")
        for dtype in self.dtypes:
            choose(dtype, dict.fromkeys(("float32", "bfloat16", "float16")), "dtype")
        choose(self.compile, dict.fromkeys(("no", "yes", "both")), "compile")
        if self.against is not None:
            choose(self.against, dict.fromkeys(self.sources or self.methods), "method to compare against")
        for name in ("methods", "sources", "backbones", "sizes", "batch_sizes", "dtypes"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not (values or name == "sources"):
                raise ConfigError(f"{name}={values}: {'each only once' if values else 'one or more'}")
        if self.sources:
            if self.loader is not None:
                raise ConfigError("sources: not with --loader")
            usual = Bench()
            for name in ("methods", "backbones", "sizes", "num_classes", "backbone_args"):
                if getattr(self, name) != getattr(usual, name):
                    raise ConfigError(f"{name}={getattr(self, name)}: not with --sources, which have their own")
            if self.images < max(self.batch_sizes):
                raise ConfigError(f"images={self.images}: at least the largest of batch_sizes, {max(self.batch_sizes)}")
        if min(self.sizes + self.batch_sizes) < 1:
            raise ConfigError(f"sizes={self.sizes}, batch_sizes={self.batch_sizes}: at least 1 is needed")
        _at_least(self, 1, "repeats", "num_classes")
        _at_least(self, 0, "warmup")
        if self.loader is not None and self.data is None:
            raise ConfigError(f"loader={self.loader}: name the images to load with --data, as for train")
        if self.train and self.loader is None:
            raise ConfigError(f"--train.{next(iter(self.train))}: only with --loader RECIPE")
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds}: above 0 is needed")
        if self.workers is None and self.loader is None:
            object.__setattr__(self, "workers", 2)
        if self.workers is not None:
            _at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class Flops(Settings):
    """Count parameters and floating point operations of a model, or of each way to choose patches; nothing is timed."""

    method: str = setting("glsim", f"shown beside plain; one of: {', '.join(METHODS)}")
    backbone: str | None = setting(None, "timm model name; default: vit_base_patch16_224, for cal resnet101")
    image_size: Size = setting(None, "pixels, one side or [height,width]; default: the backbone's own")
    num_classes: int = setting(200, "outputs of the last layer")
    options: dict[str, Any] = setting({}, "options of the method, as --options.crop_size 112")
    backbone_args: dict[str, Any] = setting({}, "handed to timm, as --backbone-args.depth 6")
    convention: Literal["paper", "honest"] | None = setting(
        None, "count each way to choose patches instead, as GLSim's paper does or all by one rule (docs/cost.md)"
    )
    sizes: list[int] = setting([224, 448, 768, 1024], "sides of the images in pixels, with --convention")

    def __post_init__(self) -> None:
        choose(self.method, METHODS, "method")
        _at_least(self, 1, "num_classes")
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"sizes={self.sizes}: one or more, at least 1")
        if self.convention is not None:
            choose(self.convention, {"paper": None, "honest": None}, "convention")
            if self.image_size is not None:
                raise ConfigError("image_size: with --convention use --sizes")
            if self.options or self.method != "glsim":
                raise ConfigError("method and options: --convention counts every way to choose, and the paper's GLSim")


@dataclass(frozen=True, kw_only=True)
class Doctor(Settings):
    """Look through a data set before training: bad files, duplicates, leaks, labels, sizes, memory; writes a page."""

    data: str = positional(MISSING, "folder or CSV, as for train", path="reads")
    out: str = setting("doctor.html", "page to write; an older one is replaced", path="file")
    near: int = setting(32, "pictures are nearly the same when at most so many of the 256 bits of their hash differ")
    min_images: int = setting(5, "training images a class should have")
    test_fraction: float = setting(0.2, "share held out as test where the data has no split of its own")
    split_seed: int = setting(0, "of that share")
    workers: int | None = setting(None, "processes that read images; default: one a core; 0: none beside this one")
    max_megapixels: float = megapixels()

    method: str = setting("glsim", "the planned run, as for train; its memory is estimated")
    backbone: str | None = setting(None, "timm model name; default: vit_base_patch16_224, for cal resnet101")
    image_size: Size = setting(None, "pixels, one side or [height,width]; default: the backbone's own")
    options: dict[str, Any] = setting({}, "options of the method")
    backbone_args: dict[str, Any] = setting({}, "handed to timm")
    batch_size: int = setting(8, "images at a time, on each device")
    optimizer: str = setting("sgd", "sgd (Nesterov), adamw, or any other name timm knows")
    precision: Literal["no", "fp16", "bf16"] = setting("no", "mixed precision")
    device: str | None = setting(None, "cpu, cuda, ..; default: the best there is")

    def __post_init__(self) -> None:
        _limit(self.max_megapixels)
        choose(self.method, METHODS, "method")
        _at_least(self, 1, "batch_size", "min_images")
        _at_least(self, 0, "near")
        _below_one(self, "test_fraction")
        if self.workers is not None:
            _at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class Quickstart(Settings):
    """Train plain ViT and GLSim on the embedded synthetic birds, evaluate and explain them, write a report."""

    out: str = setting("quickstart", "folder for data, runs and report", path="folder")
    epochs: int = setting(16, "passes over train, for each of the two models")
    train: int = setting(120, "training images a species")
    test: int = setting(40, "test images a species")
    workers: int = setting(2, "processes that load images")

    def __post_init__(self) -> None:
        _at_least(self, 1, "epochs", "train", "test")


@dataclass(frozen=True, kw_only=True)
class Recipes(Settings):
    """List the recipes of the package, which train and reproduce take by name: claim, data, method, hardware."""


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys of a recipe: a YAML file by its path, or one of the package by name.

    Raises ConfigError naming the file and any key that `Train` does not have.
    """
    path = find_recipe(expand(str(path)))
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"recipe {path} cannot be read: {error.problem or one_line(error)}{where}") from error
    except RecursionError:
        raise ConfigError(f"recipe {path} cannot be read: lists and objects too deep inside each other") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path} holds no 'key: value' lines")
    known = {f.name for f in dataclasses.fields(Train)} - {"resume"}
    unknown = sorted(str(k) for k in set(values) - known)
    if unknown:
        raise ConfigError(f"recipe {path}: unknown {', '.join(unknown)}; known keys: {', '.join(sorted(known))}")
    for name, hint in typing.get_type_hints(Train).items():
        value = values.get(name)
        if hint in (str, str | None) and value is not None and not isinstance(value, str):
            raise ConfigError(f"recipe {path}: {name}: {value} is no text in YAML; put it between quotes")
    return values


def find_checked_recipe(name: str) -> Path:
    """The file of a recipe that `read_recipe` takes."""
    path = find_recipe(expand(name))
    read_recipe(path)
    return path


def change_recipe(path: str | Path, changes: dict[str, Any], **fixed: Any) -> Train:
    """The settings of a recipe with `changes` as they came from the command line, and `fixed` ones above both.

    Raises ConfigError naming the setting that is unknown or of another type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    recipe = read_recipe(path)
    values = recipe | changes | fixed
    for name in ("options", "backbone_args"):
        # Words after --train.options.NAME arrive as they were typed.
        given = {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in (changes.get(name) or {}).items()}
        values[name] = (recipe.get(name) or {}) | given
    if values.get("precision") is False:  # a bare `no` in YAML
        values["precision"] = "no"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Train)
    try:
        checked = parser.parse_object(values).as_dict()
    except ArgumentError as error:
        raise ConfigError(f"{path} with --train: {' '.join(str(error).split())}") from None
    return Train(**checked)


def to_recipe(settings: Train) -> str:
    """The resolved settings as YAML that `read_recipe` takes."""
    values = dataclasses.asdict(settings)
    del values["resume"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


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
