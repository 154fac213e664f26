"""Floor 3: models on disk. A bundle is a folder: `model.safetensors`, `config.json`, `metrics.json` and `README.md`.

Loading a bundle never unpickles anything; the publishers' `.pth` files are read by `official.py`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer

from glsim.backbone import Model, to_pair
from glsim.models import create_model, resample_positions
from glsim.official import OFFICIAL, convert_official
from glsim.transforms import Preprocessing
from glsim.types import ConfigError, DataError

FORMAT = 2  # raised when config.json or the weight names change; `load` keeps reading the older ones
WEIGHTS, CONFIG, METRICS_FILE, CARD = "model.safetensors", "config.json", "metrics.json", "README.md"
WHERE_FROM = {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}  # for timm
MODEL_KEYS = ("method", "backbone", "num_classes", "image_size", "backbone_args", "options")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: under a temporary name first, then renamed."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def default_preprocessing(backbone: str, image_size: Sequence[int]) -> Preprocessing:
    """Mean and standard deviation the backbone's weights were trained with (timm's), the paper's resize ratio 1.34."""
    cfg = get_pretrained_cfg(backbone, allow_unregistered=True)
    mean, std = (cfg.mean, cfg.std) if cfg is not None else ((0.5,) * 3, (0.5,) * 3)
    return Preprocessing(to_pair(image_size), 1.34, tuple(mean), tuple(std))


def save(model: Model, folder: str | Path, labels: list[str] | None = None, **info: Any) -> Path:
    """Write `model` (made by `create_model` or `load`) as a bundle and return the folder.

    `labels` are the class names in the order of the logits. `info`: `preprocessing` (a `Preprocessing`), `metrics` (a
    dict, written to `metrics.json`), anything else that JSON can hold goes into `config.json`.
    """
    folder = Path(folder)
    config = dict(model.config)
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
        **info,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    temporary = folder / (WEIGHTS + ".tmp")
    safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
    temporary.replace(folder / WEIGHTS)
    if metrics is not None:
        write_text(folder / METRICS_FILE, json.dumps(metrics, indent=2) + "\n")
    write_text(folder / CARD, _card(config, metrics))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def load(source: str | Path, **overrides: Any) -> Model:
    """Load a model in eval mode from a bundle folder, `hf-hub:owner/name`, `local-dir:path` or an official `.pth` file.

    `overrides` change the model: `image_size` (positions are resampled) or options of the method (`top_o=16`). For a
    `.pth`, `method` names the publisher's model ("glsim", "transfg", "ffvt"), and `model.conversion` tells which keys
    were used; TransFG's and FFVT's files do not hold `num_heads`, `image_size`, `patch_size`, `stride` and `top_k`,
    which default to those of the published ViT-B/16.

    Raises ConfigError for a wrong option and DataError for files that are missing, damaged or not what they should be.
    """
    if isinstance(source, str) and source.startswith("hf-hub:"):
        from huggingface_hub import snapshot_download

        wanted = [WEIGHTS, CONFIG, METRICS_FILE, CARD]
        try:
            folder = snapshot_download(source.removeprefix("hf-hub:"), allow_patterns=wanted)
        except (OSError, ValueError) as error:  # not there, no access, no network, no such name
            raise DataError(f"{source} cannot be had: {str(error).splitlines()[0]}") from error
        return load_bundle(Path(folder), **overrides)
    path = Path(str(source).removeprefix("local-dir:"))
    if path.is_dir():
        return load_bundle(path, **overrides)
    if path.is_file() and path.suffix in (".pth", ".pt", ".bin"):
        return convert_official(path, **overrides)
    what = "is no bundle folder and no .pth file" if path.exists() else "does not exist"
    raise DataError(f"{source} {what}; give a bundle folder, hf-hub:owner/name, local-dir:path or an official .pth")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a bundle; DataError when it is missing or not one of ours."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} is no bundle: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    missing = [k for k in (*MODEL_KEYS, "preprocessing") if not isinstance(config, dict) or k not in config]
    if missing:
        raise DataError(f"{path} is no glsim config: it lacks {', '.join(missing)}")
    kinds = {"method": str, "backbone": str, "num_classes": int, "image_size": list, "backbone_args": dict}
    kinds |= {"options": dict, "preprocessing": dict, "format": int}
    wrong = [k for k, kind in kinds.items() if k in config and not isinstance(config[k], kind)]
    if wrong:
        raise DataError(f"{path} is damaged: {', '.join(f'{k}={config[k]!r}' for k in wrong)}")
    if config.get("format", 0) > FORMAT:
        raise DataError(f"{path} has format {config['format']}, this glsim reads up to {FORMAT}; upgrade glsim")
    return config


def load_bundle(folder: Path, **overrides: Any) -> Model:
    """Load a bundle folder in eval mode; see `load`."""
    config = read_config(folder)
    kept = {k: v for k, v in config.items() if k not in MODEL_KEYS}
    # Nothing that a config says may make timm read other files or the network: older versions of it unpickle them.
    unsafe = (set(config["backbone_args"]) & WHERE_FROM) | (set(config["options"]) & {*MODEL_KEYS, "pretrained"})
    if unsafe:
        raise DataError(f"{folder / CONFIG} was refused: a bundle may not set {', '.join(sorted(unsafe))}")
    arguments = {k: config[k] for k in MODEL_KEYS if k != "options"} | config["options"] | overrides
    model = create_model(**arguments, pretrained=False)
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise DataError(f"{folder} is no bundle: it has no {WEIGHTS}") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder / WEIGHTS} is damaged: {error}") from error
    if list(model.config["image_size"]) != list(config["image_size"]):
        weights = resample_positions(weights, model.backbone.net)
        kept["preprocessing"] = {**kept["preprocessing"], "image_size": model.config["image_size"]}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {' '.join(str(error).split())}") from error
    model.config = {**kept, **model.config}
    return model.eval()


def init_from(model: Model, source: str | Path) -> list[str]:
    """Give `model` the weights of another one wherever name and shape agree; returns the names it kept as they were.

    `source` is anything `load` takes, or a `.npz` file of the ViT authors (ImageNet-21k: where the field starts from),
    which timm reads. Positions are resampled to the grid of `model`. Raises ConfigError when not even the backbones
    agree, and DataError for a file that cannot be read.
    """
    if Path(source).suffix == ".npz":
        return _init_from_npz(model, Path(source))
    method = model.config["method"]
    published = {"method": method} if str(source).endswith((".pth", ".pt", ".bin")) and method in OFFICIAL else {}
    other = resample_positions(load(source, **published).state_dict(), model.backbone.net)
    own = model.state_dict()
    taken = {k: v for k, v in other.items() if k in own and own[k].shape == v.shape}
    kept = sorted(set(own) - set(taken))
    lacking = [k for k in kept if k.startswith("backbone.")]
    if lacking:
        raise ConfigError(f"{source} has another backbone than {model.config['backbone']!r}: nothing for {lacking[0]}")
    model.load_state_dict(taken, strict=False)
    model.initialised(kept)
    return kept


def _init_from_npz(model: Model, path: Path) -> list[str]:
    net = model.backbone.net
    if not isinstance(net, VisionTransformer):
        raise ConfigError(f"{path}: .npz files hold the weights of a ViT, {model.config['backbone']!r} is none")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        net.load_pretrained(str(path))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        net.load_state_dict(before)
        raise DataError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    except (RuntimeError, AssertionError, IndexError, TypeError) as error:
        net.load_state_dict(before)
        raise ConfigError(f"{path} does not fit {model.config['backbone']!r}: {error}") from error
    kept = sorted(k for k in model.state_dict() if not k.startswith("backbone."))
    model.initialised(kept)
    return kept


def preprocessing_of(model: Model) -> Preprocessing:
    """The preprocessing stored with `model`, or its backbone's default."""
    stored = model.config.get("preprocessing")
    if stored is not None:
        return Preprocessing.from_dict(stored)
    return default_preprocessing(model.config["backbone"], model.config["image_size"])


def labels_of(model: Model) -> list[str]:
    """Class names in the order of the logits; "class 0", "class 1", .. where none were stored."""
    return model.config.get("label_names") or [f"class {i}" for i in range(model.config["num_classes"])]


def temperature_of(model: Model) -> float:
    """What `glsim calibrate` found that logits have to be divided by before the softmax; 1 where it has not been."""
    return float((model.config.get("calibration") or {}).get("temperature", 1.0))


def amend(folder: str | Path, options: dict[str, Any], **info: Any) -> None:
    """Change options of the method and anything else in the `config.json` of a bundle, and its card with it."""
    folder = Path(folder)
    config = read_config(folder)
    config |= {"options": config["options"] | options, **info}
    metrics = folder / METRICS_FILE
    write_text(folder / CARD, _card(config, json.loads(metrics.read_text()) if metrics.exists() else None))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def weights_hash(model: Model) -> str:
    """The sha256 (64 hex digits) of a model's weights, by name, kind and value, on whatever device they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def pick_device(name: str | None = None) -> torch.device:
    """The device `name` ("cpu", "cuda:1"), by default the best there is; ConfigError when it is not there."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = accelerator or torch.device("cpu")
    try:
        device = torch.device(name) if name is not None else best
    except RuntimeError as error:
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", best.type):
        raise ConfigError(f"device={name} is not here; the best there is: {best.type}")
    return device


def _card(config: dict[str, Any], metrics: dict[str, Any] | None) -> str:
    """The model card: what it is, how well it did, how to use it."""
    labels = config.get("label_names") or []
    shown = ", ".join(labels[:20]) + (f", .. ({len(labels)} in all)" if len(labels) > 20 else "")
    size = config["image_size"]
    lines = [
        "---",
        "library_name: glsim",
        "pipeline_tag: image-classification",
        "tags: [glsim, fine-grained, image-classification]",
        "---",
        f"# {config['method']} on {config['backbone']}",
        "",
        f"Tells {config['num_classes']} classes apart in images of {size[0]} x {size[1]} pixels"
        + (f": {shown}." if shown else "."),
        "",
        f"- Method: `{config['method']}`, options `{json.dumps(config['options'])}`",
        f"- Backbone: `{config['backbone']}` (timm), arguments `{json.dumps(config['backbone_args'])}`",
    ]
    if data := config.get("data"):
        lines.append(f"- Data: `{data['source']}`, {data['counts']}, split hash `{data['split_hash'][:16]}`")
    if calibration := config.get("calibration"):
        lines.append(f"- Calibrated on {calibration['count']} images of `{calibration['data']}`")
    for split, result in (metrics or {}).items():
        if isinstance(result, dict) and "top1" in result:
            lines.append(f"- {split}: top-1 {result['top1']:.2%} ({result['correct']} of {result['count']})")
    lines += ["", "```python", "import glsim", 'for answer in glsim.Predictor("PATH_TO_THIS_FOLDER")(["image.jpg"]):']
    lines += ["    print(answer.labels[0], answer.probabilities[0])", "```", ""]
    return "\n".join(lines)
