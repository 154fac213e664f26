"""Conversion of an official checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glsim.checkpoints.bundle import CONFIG, save
from glsim.checkpoints.official import convert_official
from glsim.config import Convert
from glsim.files import one_line, read_text
from glsim.types import ConfigError, DataError


def run(s: Convert) -> dict[str, Any]:
    """The verb: write `s.bundle` and report every key of `s.checkpoint`."""
    if (Path(s.bundle) / CONFIG).exists():
        raise ConfigError(f"{s.bundle} already holds a bundle; name another folder")
    if not Path(s.checkpoint).is_file():
        raise DataError(f"{s.checkpoint} does not exist, or is no file")
    if {"path", "method"} & set(s.options):
        raise ConfigError("options: path and method are no options; the checkpoint is named first, and --method")
    labels = None
    if s.labels is not None:
        try:
            labels = read_text(s.labels).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"labels file {s.labels} cannot be read: {one_line(error)}") from error
    model = convert_official(s.checkpoint, s.method, **s.options)
    save(model, s.bundle, labels, converted_from=Path(s.checkpoint).name)
    return {"bundle": s.bundle, "options": model.config["options"], **model.conversion._asdict()}
