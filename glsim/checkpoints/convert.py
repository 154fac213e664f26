"""Conversion of an official checkpoint to a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glsim.checkpoints.bundle import CONFIG, save
from glsim.checkpoints.official import convert_official
from glsim.files import one_line, read_lines
from glsim.types import ConfigError, DataError


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What `convert_checkpoint` returns: what became of every key of the checkpoint."""

    bundle: str
    options: dict[str, Any]  # of the method, as read from the checkpoint or given
    used: dict[str, str]  # published key -> ours
    ignored: dict[str, str]  # published key -> why
    missing: list[str]  # ours, found nowhere


def convert_checkpoint(
    checkpoint: str | Path,
    bundle: str | Path,
    *,
    method: str = "glsim",
    options: Mapping[str, Any] | None = None,
    labels: str | Path | None = None,
) -> ConvertedCheckpoint:
    """Write a published checkpoint as a bundle.

    Args:
        checkpoint: the authors' `.pth` file.
        bundle: folder to make.
        method: of which it is, a name of `glsim.checkpoints.official:published_methods`.
        options: what the file does not hold, as `num_heads` and `stride`.
        labels: text file with one class name a line, in the order of the logits.

    Raises:
        ConfigError: for a folder that holds a bundle, an option that does not fit, other labels than classes.
        DataError: for files that are missing, damaged, or hold more than tensors and arguments.
    """
    options = options or {}
    if (Path(bundle) / CONFIG).exists():
        raise ConfigError(f"{bundle} already holds a bundle; name another folder")
    if not Path(checkpoint).is_file():
        raise DataError(f"{checkpoint} does not exist, or is no file")
    if {"path", "method"} & set(options):
        raise ConfigError("options: path and method are no options; the checkpoint is named first, and --method")
    names = None
    if labels is not None:
        try:
            names = read_lines(labels)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"labels file {labels} cannot be read: {one_line(error)}") from error
    model = convert_official(checkpoint, method, **options)
    save(model, bundle, names, converted_from=Path(checkpoint).name)
    return ConvertedCheckpoint(str(bundle), model.config.options, *model.conversion)
