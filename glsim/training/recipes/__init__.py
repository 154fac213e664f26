"""The recipes that come with the package, found by name, and what the header of each states."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from glsim.files import read_text
from glsim.types import ConfigError

FOLDER = Path(__file__).parent
PARTS = ("claim", "source", "command", "hardware")  # of a header: `# Claim: ..`, on as many lines as it takes


def recipes() -> dict[str, Path]:
    """The recipes of the package by name, which is DATA_METHOD and perhaps more."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: one of the package by its name, with or without .yaml, or any other by its path.

    A bare name means the package's, a file of that name beside it is ./NAME. Raises ConfigError listing close names.
    """
    known, path = recipes(), Path(name).expanduser()
    if str(name) in known:
        return known[str(name)]
    if path.is_file():
        return path
    if (stem := str(name).removesuffix(".yaml")) in known:
        return known[stem]
    close = get_close_matches(path.stem, known) or [other for other in known if path.stem and path.stem in other][:3]
    advice = f"did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(
        f"recipe {name} cannot be read: no such file, and no recipe of that name; {advice}glsim recipes lists them"
    )


def describe(path: Path) -> dict[str, Any]:
    """What a recipe states: name, path, title, data, method, and `PARTS` of its header; only a command has lines."""
    text = read_text(path)
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    title, *rest = re.split(rf"^({'|'.join(PARTS)}): ", "\n".join(lines), flags=re.M | re.I)
    stated = {key.lower(): value.strip() for key, value in zip(rest[::2], rest[1::2], strict=True)}
    return {
        "name": path.stem,
        "path": str(path),
        "title": " ".join(title.split()),
        "data": path.stem.partition("_")[0],
        "method": yaml.safe_load(text)["method"],
        **{key: value if key == "command" else " ".join(value.split()) for key, value in stated.items()},
    }


def run(_: Any) -> dict[str, Any]:
    """The verb `glsim recipes`: `describe` of each under `recipes`."""
    return {"recipes": [describe(path) for path in recipes().values()]}
