"""The settings of a training run, which are the keys of a recipe; recipes read, changed and written. No torch here."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from glsim.data.box_options import BoxExamples
from glsim.data.catalog import SETS
from glsim.data.limits import MAX_MEGAPIXELS
from glsim.files import expand, one_line, read_text
from glsim.models import METHODS
from glsim.settings import Size, required, setting
from glsim.training.recipes import find_recipe
from glsim.types import ConfigError

# Settings that change nothing in a run; the data is watched by hashes.
WITHOUT_EFFECT = {
    "workers",
    "out",
    "data",
    "boxes",
    "cache",
    "tracker",
    "class_names",
    "data_licence",
    "max_megapixels",
}


class Train(BoxExamples):
    """Train a model on a folder or CSV of images. OUT becomes a bundle: load it, evaluate it, predict with it."""

    data: str = required(
        "folder (train/CLASS/.., or CLASS/..), CSV with path,label[,split], hf:NAME or wds:FOLDER", path="reads"
    )
    dataset: str | None = setting(
        None, "data set prepared in DATA; its settings hold unless others are given", choices=SETS
    )
    out: str = required("run folder to make", path="folder")
    resume: bool = setting(False, "go on from the last checkpoint in OUT")

    method: str = setting("glsim", f"one of: {', '.join(METHODS)}", choices=METHODS)
    backbone: str | None = setting(None, "timm model name; default: vit_base_patch16_224, for cal resnet101")
    pretrained: bool = setting(True, "start from timm's weights (downloaded once); init_from takes their place")
    image_size: Size = setting(None, "pixels, one side or [height,width]; default: the backbone's own")
    options: dict[str, Any] = setting({}, "options of the method, as --options.top_o 16 --options.metric gls_l2")
    backbone_args: dict[str, Any] = setting({}, "handed to timm, as --backbone-args.depth 6")

    init_from: str | None = setting(
        None, "start from a file of weights (glsim weights FILE), a bundle or hf-hub:owner/name", path="reads"
    )

    val_fraction: float = setting(
        0.0, "share of train held out, stratified, to watch the run (0: none)", least=0, below=1
    )
    test_fraction: float = setting(
        0.2, "share held out as test where the data has no split of its own", least=0, below=1
    )
    test: bool = setting(False, "measure the test split too, once: after the last epoch; nothing is chosen by it")
    split_seed: int = setting(0, "of both shares; kept apart from seed so that repeated runs share their splits")
    skip_bad: bool = setting(False, "check every image first, leave unreadable ones out and list them")
    max_megapixels: float = setting(
        MAX_MEGAPIXELS, "megapixels of an image; a larger one is a bad file, and none of it is decoded"
    )
    workers: int = setting(2, "processes that load images", least=0)
    cache: Literal["none", "ram"] = setting("none", "ram: decode and resize every training image once, and keep it")

    resize_ratio: float = setting(  # None only until the check is done
        None, "resize images to this many times image_size before cropping; default: 1.34"
    )
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

    repeats: int = setting(
        1, "times each image comes in a step, augmented anew; an epoch then shows fewer images", least=1
    )
    mixup: float = setting(0.0, "mix pairs of images; parameter of the Beta distribution (0: off)", least=0)
    cutmix: float = setting(
        0.0, "paste a piece of one image into another; parameter of the Beta distribution (0: off)", least=0
    )

    freeze: int | Literal["none", "backbone"] = setting(
        "none", "backbone: only what the method puts on top is trained; N: its first N blocks stay as they are"
    )
    lora: int = setting(
        0, "rank of low-rank adapters on the attention of a backbone otherwise frozen (0: off)", least=0
    )
    epochs: int = setting(50, "passes over train", least=1)
    batch_size: int = setting(8, "images at a time, on each device", least=1)
    accumulate: int = setting(1, "batches whose mean gradient makes one step", least=1)
    save_steps: int = setting(0, "save every so many steps too (0: after every epoch)", least=0)
    optimizer: str = setting("sgd", "sgd (Nesterov), adamw, or any other name timm knows")
    lr: float = setting(0.01, "peak learning rate", least=0)
    head_lr: float | None = setting(None, "peak learning rate of all above the backbone; default: lr", least=0)
    layer_decay: float = setting(1.0, "each layer's learning rate is this times that of the one above; top: lr")
    weight_decay: float = setting(0.0, "not applied to biases and norms", least=0)
    momentum: float = setting(0.9, "of SGD", least=0, below=1)
    warmup_steps: int = setting(500, "steps from warmup_lr up to lr", least=0)
    warmup_lr: float = setting(1e-6, "learning rate of the first step", least=0)
    min_lr: float = setting(1e-5, "learning rate at the end of the cosine", least=0)
    schedule: Literal["cosine", "step"] = setting("cosine", "after the warm-up: down a cosine, or in steps")
    decay_epochs: float = setting(30.0, "schedule=step: epochs from one decay to the next")
    decay_rate: float = setting(0.1, "schedule=step: each decay multiplies the learning rate by it")
    label_smoothing: float = setting(0.1, "0 to below 1", least=0, below=1)
    focal: float = setting(0.0, "exponent of the focal loss (0: cross-entropy)", least=0)
    supcon: float = setting(0.0, "weight of the supervised-contrastive loss of the class tokens (0: off)", least=0)
    clip_grad: float = setting(1.0, "largest gradient norm (0: no clipping)", least=0)
    ema: float = setting(0.0, "decay of averaged weights, which are then the ones saved (0: off)", least=0, below=1)
    precision: Literal["no", "fp16", "bf16"] = setting("no", "mixed precision")
    grad_checkpointing: bool = setting(False, "keep less for the backward pass and compute it again: slower, smaller")
    compile: bool = setting(False, "compile the model with torch.compile")
    seed: int = setting(1, "of everything random")
    data_licence: str | None = setting(None, "of the images, for the model card; default: the named data set's")
    class_names: str | None = setting(
        None, "CSV label,name,scientific_name,taxon_id: names that people use, kept in the bundle", path="reads"
    )
    tracker: Literal["tensorboard", "trackio", "wandb"] | None = setting(None, "log there too; pip install it first")

    def check(self) -> None:
        """Fill what is left open with the values of the named data set; hold together what concerns several settings.

        The filled values stand in the resolved recipe. Raises ConfigError for settings that do not fit each other.
        """
        super().check()
        if not 0 < self.max_megapixels < math.inf:
            raise ConfigError(f"max_megapixels={self.max_megapixels}: a number above 0 is needed")
        chosen: dict[str, Any] = {"resize_ratio": 1.34}
        if self.dataset is not None:
            named = SETS[self.dataset]
            chosen = {"resize_ratio": named.resize_ratio, "mean": list(named.mean), "std": list(named.std)}
            self.fill(options={**named.options(self.method), **self.options})
        self.fill(**{name: value for name, value in chosen.items() if getattr(self, name) is None})
        check_seeds(self.seed)
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
        if self.freeze not in ("none", "backbone") and (type(self.freeze) is not int or self.freeze < 1):
            raise ConfigError(f"freeze={self.freeze}: none, backbone or a number of blocks is needed")
        if self.decay_epochs <= 0:
            raise ConfigError(f"decay_epochs={self.decay_epochs}: above 0")


def check_seeds(*seeds: int) -> None:
    """Raise ConfigError for a seed that NumPy's generator does not take."""
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise ConfigError(f"seed={wrong[0]}: from 0 to 4294967295")


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
    """The settings of a recipe, some of them changed.

    Args:
        path: of the recipe.
        changes: as they came from the command line.
        fixed: above both.

    Raises:
        ConfigError: naming the setting that is unknown or of another type.
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


def plain_values(settings: Train, *without: str) -> dict[str, Any]:
    """The settings as JSON and YAML hold them, some left out."""
    return {k: v for k, v in yaml.safe_load(to_recipe(settings)).items() if k not in without}
