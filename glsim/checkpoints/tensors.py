"""Files of tensors, read without running anything they contain: safetensors, pickles of PyTorch, arrays of NumPy.

Pickles are read with `weights_only=True`, which keeps to tensors and plain values; `argparse.Namespace`, which holds
the authors' arguments, is the one class let through.
"""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glsim.checkpoints.config import check_finite, some
from glsim.files import one_line, open_regular
from glsim.types import DataError, GlsimError

LARGEST_HEADER = 2**23  # bytes of names, types and shapes; a model of a thousand tensors has 2**17
NUMBERS = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "bool"}
MOST_WRAPPERS = 8  # dictionaries inside of each other before the tensors
COMPRESSED = 4  # times that an .npz may grow: weights hardly do, and more would fill the memory
# What training code wraps tensors in, the best first: averaged weights before those of the last step.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema", "teacher", "target_encoder", "state_dict", "model_state_dict"),
    *("model", "module", "student", "net", "network", "backbone", "encoder", "weights"),
)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file by name, and the names of what they were wrapped in.

    Raises DataError for a file that is damaged, no regular one, or holds code, no tensors, or numbers that are not
    finite.
    """
    try:
        with open_regular(path) as file:
            safe = file.read(9)[8:] == b"{"
    except OSError as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    wrappers: list[str] = []
    if safe or path.suffix == ".safetensors":
        held: Any = read_safetensors(path)[0]
    else:
        held = _read_npz(path) if path.suffix == ".npz" else read_pickle(path)
    while len(wrappers) < MOST_WRAPPERS and isinstance(held, Mapping):
        inner = next((name for name in WRAPPERS if isinstance(held.get(name), Mapping)), None)
        if inner is None:
            break
        held, wrappers = held[inner], [*wrappers, inner]
    named = {k: v for k, v in held.items() if isinstance(v, Tensor)} if isinstance(held, Mapping) else {}
    if not named:
        found = some(map(str, held)) if isinstance(held, Mapping) else type(held).__name__
        raise DataError(
            f"{path} holds no tensors by name, but {found or 'nothing'}; a state dict is needed: "
            "torch.save(network.state_dict(), FILE)"
        )
    return check_tensors(named, path), wrappers


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; DataError for one that is damaged or refused, and
    FileNotFoundError where there is none."""
    try:
        with open_regular(path) as head:
            if int.from_bytes(head.read(8), "little") > LARGEST_HEADER:
                raise DataError(f"{path} is damaged: its header has more than {LARGEST_HEADER:,} bytes")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, DataError):
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {one_line(error)}") from error
    return check_tensors(weights, path), metadata


def check_tensors(weights: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """Hold what was read to be tensors of a model; DataError names what is not."""
    kinds = {str(w.dtype).removeprefix("torch.") for w in weights.values() if isinstance(w, Tensor)}
    wrong = [str(k) for k, v in weights.items() if not isinstance(k, str) or not _is_weight(v)]
    if wrong and kinds <= NUMBERS:
        raise DataError(f"{path} is damaged: no weights under {some(wrong)}")
    if odd := kinds - NUMBERS:
        raise DataError(f"{path} was refused: a model has no numbers of type {', '.join(sorted(odd))}")
    check_finite(weights, path)
    return weights


def _is_weight(value: Any) -> bool:
    """Whether it is a tensor of which every number is stored: not one repeated to any size, nor sparse."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_complex():
        return False
    return value.device.type == "cpu" and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def read_pickle(path: Path) -> Any:
    """What a file of `torch.save` holds; DataError for one that is damaged, compressed, or holds more than it may."""
    try:
        with open_regular(path) as file:
            if "constants.pkl" in _check_archive(file, path, 1):
                raise DataError(
                    f"{path} was refused: it is a TorchScript archive, which holds code; where you trust it, save its "
                    f"weights alone: torch.save(torch.jit.load({path.name!r}, 'cpu').state_dict(), 'weights.pth')"
                )
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of checks that are slow
                return torch.load(file, map_location="cpu", weights_only=True)
    except GlsimError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} was refused: it holds more than tensors and arguments ({_unsafe(error)}); where you trust it, "
            "save its tensors alone: torch.save(network.state_dict(), FILE)"
        ) from error
    except Exception as error:  # a damaged pickle or archive raises nearly anything
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def _unsafe(error: Exception) -> str:
    return str(error).split("GLOBAL ")[-1].split(" was not")[0].split("\n")[0][:120]


def _read_npz(path: Path) -> dict[str, Any]:
    """The arrays of an `.npz` file as tensors; no objects are read."""
    try:
        with open_regular(path) as file:
            _check_archive(file, path, COMPRESSED)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except GlsimError:
        raise
    except Exception as error:  # as `read_pickle`
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


def _check_archive(file: BinaryIO, path: Path, times: int) -> set[str]:
    """The names in a zip archive, without their folder; DataError where they would be more than `times` as large as
    it. None are in what is no archive. torch stores tensors as they are: what is compressed may become gigabytes."""
    names: set[str] = set()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > times * os.fstat(file.fileno()).st_size:
                raise DataError(f"{path} was refused: it is smaller than its tensors; torch.save it again")
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    file.seek(0)
    return names
