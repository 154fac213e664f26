"""Settings: dataclasses whose fields state help, choices and limits, of verbs and recipes alike. No torch here."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from glsim.files import expand, real
from glsim.types import ConfigError, choose

Size = int | list[int] | None
Role = Literal["reads", "file", "folder"]  # of a path: it is read, or a file or folder is written there
LIMITS = {"least": operator.ge, "above": operator.gt, "most": operator.le, "below": operator.lt}


def setting(
    default: Any,
    help: str,  # noqa: A002
    *,
    path: Role | None = None,
    choices: Any = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a default and its one-line help.

    `path` where its text names a file or folder; `choices` a collection of the values it may have, where its type is no
    Literal; `least` or `above`, and beside it `most` or `below`, limits of a number, or of each in a list. None is
    always allowed as the default.
    """
    stated = {"help": help, "path": path, "choices": choices}
    stated |= {"least": least, "above": above, "most": most, "below": below}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=stated)
    return field(default=default, metadata=stated)


def required(help: str, *, path: Role | None = None, choices: Any = None) -> Any:  # noqa: A002
    """A dataclass field that a recipe or the command line has to give."""
    return field(metadata={"help": help, "path": path, "choices": choices})


def positional(help: str, default: Any = MISSING, *, path: Role | None = None, choices: Any = None) -> Any:  # noqa: A002
    """A dataclass field that stands on the command line without its name; without a default it is mandatory."""
    return field(default=default, metadata={"help": help, "positional": True, "path": path, "choices": choices})


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings whose fields are checked by what they state; `check` adds what concerns several of them.

    A class that inherits is a frozen dataclass by that alone; to decorate it would lose what its fields state.
    In paths `~` is the home folder. Raises ConfigError naming the setting, its value and what would work.
    """

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None:
                if role := f.metadata.get("path"):
                    whole = isinstance(value, str | Path)
                    value = _path(f.name, str(value), role) if whole else [_path(f.name, str(v), role) for v in value]
                    object.__setattr__(self, f.name, value)
                _check(f, hints[f.name], value)
        self.check()

    def check(self) -> None:
        """Raise ConfigError for what does not go together, and fill in what follows from other settings."""

    def fill(self, **values: Any) -> None:
        """Set what is left open, while checking."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _path(name: str, path: str, role: Role) -> str:
    if not path.strip() or "\0" in path:
        raise ConfigError(f"{name}={path!r}: the path of a {'file' if role == 'file' else 'folder or file'} is needed")
    expanded = expand(path)
    if role == "reads":
        return expanded
    if expanded.startswith("~"):
        raise ConfigError(f"{name}={path}: there is no such user; for a file of this name, write ./{path}")
    return str(real(expanded)) if ".." in Path(expanded).parts else expanded


def _check(f: dataclasses.Field, hint: Any, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False, skipkeys=True, default=str)
    except ValueError as error:
        raise ConfigError(f"{f.name}={value}: finite numbers are needed") from error
    what, several = f.name.replace("_", " "), value if isinstance(value, list | tuple) else [value]
    choices = f.metadata.get("choices") or choices_of(hint)
    for one in several if choices else ():
        choose(one, dict.fromkeys(choices), what)
    limits = {name: f.metadata[name] for name in LIMITS if f.metadata.get(name) is not None}
    if not all(LIMITS[name](number, limit) for name, limit in limits.items() for number in several):
        (kind, low), *high = limits.items()
        if not high:
            raise ConfigError(f"{f.name}={value}: {'above' if kind == 'above' else 'at least'} {low} is needed")
        raise ConfigError(f"{f.name}={value}: from {low} to {'below ' if 'below' in limits else ''}{high[0][1]}")


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of one that may be None; () of any other type, a Literal or a number too."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        parts = [choices_of(part) for part in typing.get_args(hint) if part is not type(None)]
        return tuple(value for part in parts for value in part) if all(parts) else ()
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def outputs(settings: Any) -> dict[str, tuple[str, Role]]:
    """The settings that name a path on this machine that will be written, with it, and what will be made there."""
    roles: dict[str, Any] = {f.name: f.metadata.get("path") for f in dataclasses.fields(settings)}
    paths = {name: getattr(settings, name) for name, role in roles.items() if role in ("file", "folder")}
    return {
        name: (path, roles[name])
        for name, path in paths.items()
        if path is not None and not re.match("hf-hub:|[a-z0-9]+://", path)
    }
