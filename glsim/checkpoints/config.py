"""Validation of a stranger's model files (`config.json`, sizes, names), before a model is built from them.

One table says which keys of a `config.json` (or of a graph's metadata) are ever read, and what each may hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glsim.data.transforms import Preprocessing
from glsim.files import printable, read_json, shorten
from glsim.models.boxes import CONTROLS
from glsim.models.config import MODEL_KEYS, ModelConfig
from glsim.models.glsim import RULES
from glsim.types import ConfigError, DataError

FORMAT = 3  # raised when config.json or the weight names change; `load` keeps reading the older ones
LARGEST_SIDE = 4096  # pixels of an image that a bundle may ask for
LARGEST_ARGUMENT = 65536  # a whole number in the arguments of a model; timm lists the layers before it makes the first
LARGEST_CROP = 4  # sides of a crop, in sides of the image
LONGEST = 4096  # characters of a name, entries of an argument
HOTTEST = 1e6  # a temperature, and one over it the coldest: the softmax stays finite


# --- the config -------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a value has to be, in words, and whether one is."""

    words: str
    holds: Callable[[Any], bool]


def whole(least: int, most: float = math.inf) -> Kind:
    """A whole number in a range; true and false are none."""
    return Kind(f"a whole number, {_range(least, most)}", lambda v: type(v) is int and least <= v <= most)


def number(least: float, most: float = math.inf) -> Kind:
    """A finite number in a range; true and false are none."""

    def holds(value: Any) -> bool:
        return type(value) in (int, float) and least <= value <= most and abs(value) < math.inf

    return Kind(f"a number, {_range(least, most)}", holds)


def _range(least: float, most: float) -> str:
    return f"from {least:g} on" if most == math.inf else f"from {least:g} to {most:g}"


def maybe(kind: Kind) -> Kind:
    """The kind, or null."""
    return Kind(f"{kind.words}, or null", lambda v: v is None or kind.holds(v))


def listed(kind: Kind, count: int) -> Kind:
    """So many of a kind."""
    words = f"a list of {count}, each {kind.words}"
    return Kind(words, lambda v: isinstance(v, list | tuple) and len(v) == count and all(map(kind.holds, v)))


def mapped(kind: Kind) -> Kind:
    """An object whose values are of a kind."""

    def holds(value: Any) -> bool:
        return isinstance(value, dict) and all(TEXT.holds(k) and kind.holds(v) for k, v in value.items())

    return Kind(f"an object, each value {kind.words}", holds)


def _are_labels(value: Any) -> bool:
    named = isinstance(value, list | tuple) and all(isinstance(name, str) and name.strip() for name in value)
    return named and len(set(value)) == len(value)


def _is_argument(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) <= LONGEST and all(TEXT.holds(k) and _is_argument(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return len(value) <= LONGEST and all(map(_is_argument, value))
    if type(value) is int:
        return 0 <= value <= LARGEST_ARGUMENT
    return (
        value is None
        or isinstance(value, bool)
        or (isinstance(value, str) and len(value) <= LONGEST)
        or (isinstance(value, float) and math.isfinite(value))
    )


TEXT = Kind(f"a text of 1 to {LONGEST} characters", lambda v: isinstance(v, str) and 0 < len(v) <= LONGEST)
SIZE = listed(whole(1, LARGEST_SIDE), 2)
LABELS = Kind("a list of names, each of them once", _are_labels)
COUNT, SHARE = whole(0), number(0, 1)
NAME_KEYS = ("name", "scientific_name", "taxon_id")  # as in `glsim.data.class_names:ClassName`
NAMES = Kind(
    f"an object with texts under {', '.join(NAME_KEYS)}",
    lambda v: isinstance(v, dict) and set(v) <= set(NAME_KEYS) and all(isinstance(t, str) for t in v.values()),
)
ARGUMENTS = Kind(
    f"an object of plain values, whole numbers from 0 to {LARGEST_ARGUMENT}",
    lambda v: isinstance(v, dict) and _is_argument(v),
)

# Every key that any verb reads; keys beside them may hold anything. A table in the table is an object of such keys.
CONFIG_KEYS: dict[str, Any] = {
    "method": TEXT,
    "backbone": TEXT,
    "num_classes": whole(1),
    "image_size": SIZE,
    "backbone_args": ARGUMENTS,
    "options": ARGUMENTS,
    "format": whole(0),
    "label_names": maybe(LABELS),
    "class_names": mapped(NAMES),
    "preprocessing": {
        "image_size": SIZE,
        "resize_ratio": number(1, LARGEST_SIDE),
        "mean": listed(number(-HOTTEST, HOTTEST), 3),
        "std": listed(number(1 / HOTTEST, HOTTEST), 3),
        "resize_rule": TEXT,
    },
    "pretrained_cfg": {},
    "licence": mapped(TEXT),
    "data": {
        "source": TEXT,
        "counts": mapped(COUNT),
        "split_hash": TEXT,
        "split_seed": whole(-(2**63), 2**63),
        "test_fraction": SHARE,
        "val_fraction": SHARE,
    },
    "training": {
        "start": TEXT,
        "epochs": COUNT,
        "optimizer": TEXT,
        "lr": number(0),
        "batch_size": COUNT,
        "seed": whole(-(2**63), 2**63),
    },
    "calibration": {
        "temperature": number(1 / HOTTEST, HOTTEST),
        "threshold": maybe(SHARE),
        "max_error": number(0, 100),
        "count": COUNT,
        "data": TEXT,
        "coverage": SHARE,
        "answered": COUNT,
        "answered_correct": COUNT,
    },
}
MEASURED: dict[str, Any] = {"top1": SHARE, "top5": SHARE, "per_class_mean": SHARE, "correct": COUNT, "count": COUNT}


def check_config(config: Any, path: Path) -> ModelConfig:
    """The values of a config, read from `path`, whatever their origin; DataError names what lacks or what cannot be."""
    missing = [k for k in (*MODEL_KEYS, "preprocessing") if not isinstance(config, dict) or k not in config]
    if missing:
        raise DataError(f"{path} is no glsim config: it lacks {', '.join(missing)}")
    check_kinds(config, CONFIG_KEYS, path)
    if config.get("format", 0) > FORMAT:
        raise DataError(f"{path} has format {config['format']}, this glsim reads up to {FORMAT}; upgrade glsim")
    names, stored = config.get("label_names"), config["preprocessing"]
    if names is not None and len(names) != config["num_classes"]:
        raise DataError(f"{path} is damaged: {len(names)} label_names for {config['num_classes']} classes")
    try:
        p = Preprocessing.from_dict(stored)
    except ConfigError as error:
        raise DataError(f"{path} is damaged: {shorten(error)}") from error
    if list(p.image_size) != list(config["image_size"]):
        raise DataError(
            f"{path} is damaged: its preprocessing.image_size is {list(p.image_size)}, its image_size "
            f"{list(config['image_size'])}; both have to be what the model was trained with"
        )
    if not SIZE.holds(p.resize):
        raise DataError(f"{path} was refused: images of {p.resize} pixels; up to {LARGEST_SIDE} a side are read")
    for name in ("crop_size", "first_size"):
        given = config["options"].get(name)
        sides = given if isinstance(given, list | tuple) else [given]
        if any(type(side) is int and side > LARGEST_CROP * max(p.image_size) for side in sides):
            raise DataError(
                f"{path} was refused: {name} of {shorten(given, 80)} pixels for images of {list(p.image_size)}"
            )
    return ModelConfig.from_dict(config | {"options": _options(config)})


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The options of a config; in formats 1 and 2, GLSim's had the published rule's values where they said nothing."""
    options = config["options"]
    if config["method"] != "glsim" or config.get("format", 0) > 2:
        return options
    box = options.get("box")
    named = {"box": f"{box}:exclusive"} if isinstance(box, str) and box in CONTROLS else {}
    return RULES["published"] | options | named


def check_kinds(values: Mapping[str, Any], table: Mapping[str, Any], path: Path, within: str = "") -> None:
    """Hold values that come from a file to what they should be.

    Args:
        values: by key.
        table: what each key has to be.
        path: the file, for the message.
        within: name of the part of it, for the message.

    Raises:
        DataError: naming the keys that are something else.
    """
    wrong = []
    for key, kind in table.items():
        if key not in values:
            continue
        value, name = values[key], within + key
        if isinstance(kind, Kind) and not kind.holds(value):
            wrong.append(f"{name}={printable(shorten(repr(value), 80))} ({kind.words} is needed)")
        elif isinstance(kind, dict) and not isinstance(value, dict):
            wrong.append(f"{name}={printable(shorten(repr(value), 80))} (an object is needed)")
        elif isinstance(kind, dict):
            check_kinds(value, kind, path, f"{name}.")
    if wrong:
        raise DataError(f"{path} is damaged: {some(wrong, '; ')}")


def read_metrics(path: Path) -> dict[str, Any] | None:
    """What a bundle's `metrics.json` holds, None where there is none; DataError for a damaged one."""
    try:
        metrics: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return None
    check_kinds(metrics, {k: MEASURED for k, v in metrics.items() if isinstance(v, dict) and "top1" in v}, path)
    return metrics


# --- the weights ------------------------------------------------------------------------------------------------------


def some(names: Iterable[str], between: str = ", ", most: int = 5) -> str:
    """The first few of many names, and how many there are more.

    Args:
        names: any number.
        between: separates them.
        most: that are shown.
    """
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return between.join(printable(shorten(name, 200)) for name in names[:most]) + more


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """DataError names the tensors of `path` that hold NaN or infinity."""
    wrong = [name for name, w in weights.items() if w.is_floating_point() and not bool(w.isfinite().all())]
    if wrong:
        raise DataError(f"{path} was refused: not every number is finite in {some(wrong)}; train or convert it again")


class TooLarge(BaseException):
    """A network is far larger than it may be. Passes through what takes errors for those of odd arguments."""


# What makes a tensor out of nothing but its size.
_FACTORIES = {"empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint"}
_FACTORIES |= {f"new_{name}" for name in ("empty", "empty_strided", "zeros", "ones", "full")}


class _Counting(TorchDispatchMode):
    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()
        self.largest, self.elements, self.tensors = elements, elements, tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _FACTORIES:
            sizes = next((a for a in args if isinstance(a, list | tuple)), ())
            self.elements -= math.prod(sizes)
            self.tensors -= 1
            if self.elements < 0 or self.tensors < 0:
                raise TooLarge
        elif torch.Tag.pointwise in func.tags:  # all pairs of positions are one broadcast of two short lists
            shapes = [a.shape for a in args if isinstance(a, Tensor)]
            if len(shapes) > 1 and math.prod(torch.broadcast_shapes(*shapes)) > self.largest:
                raise TooLarge
        return func(*args, **(kwargs or {}))


@contextmanager
def no_larger_than(weights: Iterable[Tensor]) -> Iterator[None]:
    """Inside, TooLarge ends the making of networks in this thread far larger than what `weights` are for.

    Numbers are counted, and tensors, for layers of a few numbers take time and memory too. It is raised before a tensor
    is made, so that memory merely asked for is never used.
    """
    sizes = [w.numel() for w in weights]
    # Resampled positions may grow; a network makes some tensors that it does not keep, and may look at an image.
    with _Counting(4 * sum(sizes) + 20_000_000, 4 * len(sizes) + 1000):
        yield
