"""Settings: dataclasses whose fields state help, choices and limits, of verbs and recipes alike. No torch here."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from glsim.files import expand, real
from glsim.types import ConfigError, choose

Size = int | list[int] | None
Role = Literal["reads", "file", "folder"]  # of a path: it is read, or a file or folder is written there


def setting(
    default: Any,
    help: str,  # noqa: A002
    *,
    path: Role | None = None,
    choices: Any = None,
    least: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a default and its one-line help.

    `path` where its text names a file or folder; `choices` a collection of the values it may have, where its type is no
    Literal; `least` and `below` limits of a number, or of each in a list. None is always allowed as the default.
    """
    stated = {"help": help, "path": path, "choices": choices, "least": least, "below": below}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=stated)
    return field(default=default, metadata=stated)


def required(help: str, *, path: Role | None = None, choices: Any = None) -> Any:  # noqa: A002
    """A dataclass field that a recipe or the command line has to give."""
    return field(metadata={"help": help, "path": path, "choices": choices})


def positional(default: Any, help: str, *, path: Role | None = None, choices: Any = None) -> Any:  # noqa: A002
    """A dataclass field that stands on the command line without its name; `MISSING` makes it mandatory."""
    return field(default=default, metadata={"help": help, "positional": True, "path": path, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings whose fields are checked by what they state; `check` adds what concerns several of them.

    In paths `~` is the home folder. Raises ConfigError naming the setting, its value and what would work.
    """

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


def _finite(value: Any) -> bool:
    """Whether no number in a setting is infinite or none."""
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _check(f: dataclasses.Field, hint: Any, value: Any) -> None:
    if not _finite(value):
        raise ConfigError(f"{f.name}={value}: finite numbers are needed")
    what, several = f.name.replace("_", " "), value if isinstance(value, list | tuple) else [value]
    choices = f.metadata.get("choices") or choices_of(hint)
    for one in several if choices else ():
        choose(one, dict.fromkeys(choices), what)
    least, below = f.metadata.get("least"), f.metadata.get("below")
    for number in several if (least, below) != (None, None) else ():
        if not (math.isfinite(number) and (least is None or number >= least) and (below is None or number < below)):
            if below is None:
                raise ConfigError(f"{f.name}={value}: at least {least} is needed")
            raise ConfigError(f"{f.name}={value}: from {least or 0} to below {below}")


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
