"""Bundles: model folders with `model.safetensors`, `config.json`, `metrics.json` and `README.md`.

Loading a bundle never unpickles anything; the publishers' `.pth` files are read by `official.py`, exported graphs by
`onnx_runtime.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor

from glsim.checkpoints.card import UNKNOWN, model_card
from glsim.checkpoints.config import (
    FORMAT,
    MODEL_KEYS,
    TooLarge,
    check_config,
    no_larger_than,
    read_metrics,
    some,
)
from glsim.checkpoints.hub import fetch
from glsim.checkpoints.official import convert_official
from glsim.checkpoints.onnx_runtime import open_graph
from glsim.checkpoints.tensors import read_safetensors
from glsim.data.class_names import ClassName
from glsim.data.transforms import Preprocessing
from glsim.files import (
    BUNDLE,
    expand,
    make_folder,
    one_line,
    read_json,
    replacing,
    write_json,
    write_text,
)
from glsim.models import create_model, resample_positions, spell_out
from glsim.models.base import Model
from glsim.models.config import ModelConfig
from glsim.models.patch_embed import to_pair
from glsim.types import ConfigError, DataError, GlsimError

FILES = CONFIG, WEIGHTS, METRICS_FILE, CARD = BUNDLE
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
WHERE_FROM = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}  # for timm


def default_preprocessing(backbone: str, image_size: Sequence[int]) -> Preprocessing:
    """Mean and standard deviation the backbone's weights were trained with (timm's), the paper's resize ratio 1.34."""
    cfg = get_pretrained_cfg(backbone, allow_unregistered=True)
    mean, std = (cfg.mean, cfg.std) if cfg is not None else ((0.5,) * 3, (0.5,) * 3)
    return Preprocessing(to_pair(image_size), 1.34, tuple(mean), tuple(std))


def save(model: Model, folder: str | Path, labels: list[str] | None = None, **info: Any) -> Path:
    """Write a model as a bundle.

    Args:
        model: made by `create_model` or `load`.
        folder: to make, or to write into.
        labels: class names in the order of the logits; default: those the model has.
        info: `preprocessing` (a `Preprocessing`), `metrics` (a dict, written to `metrics.json`), `licence` (of `data`,
            `backbone`, `model`: names by which they are known); anything else that JSON can hold goes into
            `config.json`.

    Returns:
        The folder.

    Raises:
        ConfigError: for a config that `load` would refuse; nothing is written then.
    """
    folder = Path(expand(str(folder)))
    config = model.config.as_dict()
    config["backbone_args"] = {k: v for k, v in config["backbone_args"].items() if k not in WHERE_FROM}
    labels = labels if labels is not None else config.get("label_names")
    if labels is not None and len(labels) != config["num_classes"]:
        raise ConfigError(f"{len(labels)} labels for a model of {config['num_classes']} classes")
    preprocessing = info.pop("preprocessing", None) or preprocessing_of(model)
    metrics = info.pop("metrics", None)
    config |= {
        "format": FORMAT,
        "architecture": config["backbone"],
        "label_names": list(labels) if labels is not None else None,
        "preprocessing": preprocessing.as_dict(),
        "pretrained_cfg": {
            "input_size": [3, *preprocessing.image_size],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": "bicubic",
            "crop_pct": round(1 / preprocessing.resize_ratio, 6),
            "crop_mode": {"square": "squash", "short": "center"}[preprocessing.resize_rule],  # as timm calls them
        },
        "licence": {"data": UNKNOWN, "backbone": UNKNOWN, **config.get("licence", {}), **info.pop("licence", {})},
        **info,
    }
    try:
        checked = check_config(config, folder / CONFIG)
    except DataError as error:
        raise ConfigError(f"this would be a bundle that cannot be loaded: {error}") from error
    folder = make_folder(folder)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"format": "pt", "sha256": digest(weights)})
    if metrics is not None:
        write_json(folder / METRICS_FILE, metrics)
    write_text(folder / CARD, model_card(checked, metrics))
    write_json(folder / CONFIG, config)
    return folder


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, on whatever device they are.

    Kept in the file of the weights, so that one rename swaps both.
    """
    found = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        found.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load(source: str | Path, **overrides: Any) -> Model:
    """Load a model.

    Args:
        source: a bundle folder, `hf-hub:owner/name` (or `owner/name@revision`), `local-dir:path`, an official `.pth`,
            or an exported `.onnx`, which answers and does nothing else.
        overrides: `image_size` (positions are resampled) or options of the method (`top_o=16`). For a `.pth`, `method`
            names the publisher's model; sizes that its file does not hold are given too (`num_heads=12`), and named by
            the error where they have no usual value.

    Returns:
        The model in eval mode; of a `.pth`, its `conversion` tells which keys were used.

    Raises:
        ConfigError: for a wrong option.
        DataError: for files that are missing, damaged or not what they should be.
    """
    if isinstance(source, str) and source.startswith("hf-hub:"):
        return load_bundle(fetch(source.removeprefix("hf-hub:"), FILES), **overrides)
    path = Path(expand(str(source)).removeprefix("local-dir:"))
    if path.is_dir():
        return load_bundle(path, **overrides)
    if path.is_file() and path.suffix in (".pth", ".pt", ".bin"):
        return convert_official(path, **overrides)
    if path.is_file() and path.suffix == ".onnx":
        if overrides:
            raise ConfigError(f"{path} is exported and takes no {', '.join(overrides)}; export the bundle again")
        return open_graph(path)
    what = "is no bundle folder, .pth or .onnx file" if path.exists() else "does not exist"
    raise DataError(f"{source} {what}; give a bundle folder, hf-hub:owner/name, local-dir:path, official .pth or .onnx")


def read_config(folder: Path) -> ModelConfig:
    """`config.json` of a bundle; DataError when it is missing, not one of ours, or a link to somewhere else."""
    check_inside(folder)
    try:
        return check_config(read_json(folder / CONFIG), folder / CONFIG)
    except FileNotFoundError:
        raise DataError(f"{folder} is no bundle: it has no {CONFIG}") from None


def check_inside(folder: Path) -> None:
    """DataError where a file of a bundle is a link that leads out of it: to something its sender could not have sent.

    The Hub's own cache is let through, whose snapshots hold links to its `blobs`.
    """
    root = Path(os.path.realpath(folder))
    places = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in (folder / name for name in FILES):
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(place) for place in places):
            raise DataError(f"{path} was refused: it is a link to {real}, outside of the bundle; copy the file there")
        if real.exists() and not real.is_file():
            raise DataError(f"{path} is no file")


def load_bundle(folder: Path, **overrides: Any) -> Model:
    """Load a bundle folder in eval mode, some options replaced.

    Raises DataError for a bundle that is damaged or asks for other files, ConfigError for options that do not fit.
    """
    config = read_config(folder)
    kept = {k: v for k, v in vars(config).items() if k not in MODEL_KEYS}
    # Nothing that a config says may make timm read other files or the network: older versions of it unpickle them.
    unsafe = (set(config.backbone_args) & WHERE_FROM) | (set(config.options) & {*MODEL_KEYS, "pretrained"})
    if unsafe:
        raise DataError(f"{folder / CONFIG} was refused: a bundle may not set {', '.join(sorted(unsafe))}")
    weights = read_bundle_weights(folder)
    stored = {k: getattr(config, k) for k in MODEL_KEYS if k != "options"} | config.options
    try:
        arguments = stored | spell_out(config.method, overrides)
        with no_larger_than(weights.values()):
            model = create_model(**arguments, pretrained=False)
    except TooLarge as error:
        raise DataError(f"{folder / CONFIG} was refused: its model is far larger than {WEIGHTS}") from error
    except GlsimError as error:
        if overrides:
            raise
        raise DataError(f"{folder / CONFIG}: no model can be built from it: {error}") from error
    except Exception as error:  # timm's and torch's, of odd arguments, have no class in common but this one
        raise DataError(f"{folder / CONFIG} is damaged: no model can be built from it: {one_line(error)}") from error
    if overrides.keys() & {"image_size", "first_size"}:
        weights = resample_positions(weights, model.backbone.net)
        kept["preprocessing"] = {**kept["preprocessing"], "image_size": model.config.image_size}
    own = model.state_dict()
    unfit = {
        "missing": own.keys() - weights.keys(),
        "of another shape": [k for k, v in weights.items() if k in own and own[k].shape != v.shape],
        "of another type": [
            k for k, v in weights.items() if k in own and (own[k].dtype in FLOATS) != (v.dtype in FLOATS)
        ],
        "not part of the model": weights.keys() - own.keys(),
    }
    if any(unfit.values()):
        told = "; ".join(f"{what}: {some(sorted(names))}" for what, names in unfit.items() if names)
        raise DataError(f"{folder / WEIGHTS} does not fit its {CONFIG}; {told}")
    model.load_state_dict(weights)
    model.config = replace(model.config, **kept)
    return model.eval()


def read_bundle_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a bundle; DataError when the file is missing, cut short, no safetensors, a byte has changed, or a
    number is not finite.

    Bundles of the first versions hold no checksum and are read without.
    """
    path = folder / WEIGHTS
    try:
        weights, metadata = read_safetensors(path)
    except FileNotFoundError:
        raise DataError(f"{folder} is no bundle: it has no {WEIGHTS}") from None
    written = metadata.get("sha256")
    if written is not None and written != digest(weights):
        raise DataError(f"{path} is damaged: its weights are not those that were saved; copy it again")
    return weights


def preprocessing_of(model: Model) -> Preprocessing:
    """The preprocessing stored with `model`, or its backbone's default."""
    stored = model.config.preprocessing
    if stored is not None:
        return Preprocessing.from_dict(stored)
    return default_preprocessing(model.config.backbone, model.config.image_size)


def labels_of(model: Model) -> list[str]:
    """Class names in the order of the logits; "class 0", "class 1", .. where none were stored."""
    return model.config.label_names or [f"class {i}" for i in range(model.config.num_classes)]


def names_of(model: Model) -> dict[str, ClassName]:
    """The names that people use for the classes, by label; {} where none were stored."""
    return {label: ClassName(**told) for label, told in model.config.class_names.items()}


def temperature_of(model: Model) -> float:
    """What `glsim calibrate` found that logits have to be divided by before the softmax; 1 where it has not been."""
    return float(model.config.calibration.get("temperature", 1.0))


def threshold_of(model: Model) -> float:
    """The confidence below which `--reject` answers "unknown"; ConfigError where `glsim calibrate` found none."""
    calibration = model.config.calibration
    threshold = calibration.get("threshold")
    if isinstance(threshold, int | float):
        return float(threshold)
    if "max_error" in calibration:
        raise ConfigError(
            f"reject: no threshold keeps the error of this model at {calibration['max_error']:g} points on its "
            "validation images; allow more with glsim calibrate --max-error"
        )
    raise ConfigError("reject: this model has no threshold; glsim calibrate RUN --data .. --max-error 5 chooses one")


def amend(folder: str | Path, options: dict[str, Any], **info: Any) -> None:
    """Change what the `config.json` of a bundle says, and its card with it.

    Args:
        folder: the bundle.
        options: of the method, to replace.
        info: anything else, by key.
    """
    folder = Path(folder)
    config = read_config(folder)
    changed = config.as_dict() | {"options": config.options | options, **info}
    write_text(folder / CARD, model_card(check_config(changed, folder / CONFIG), read_metrics(folder / METRICS_FILE)))
    write_json(folder / CONFIG, changed)
