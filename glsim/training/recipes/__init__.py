"""The recipes that come with the package, found by name, and what the header of each states."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import yaml

from glsim.files import read_text
from glsim.types import ConfigError, optional

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


@dataclass(frozen=True, kw_only=True)
class RecipeHeader:
    """What a recipe states of itself."""

    name: str
    path: str
    title: str
    data: str
    method: str
    claim: str | None = optional()  # measured accuracies
    source: str | None = optional()  # of the settings
    command: str | None = optional()  # one or several lines
    hardware: str | None = optional()  # and time


@dataclass(frozen=True)
class RecipeList:
    """The recipes of the package."""

    recipes: list[RecipeHeader]


def describe(path: Path) -> RecipeHeader:
    """The header of a recipe, and its name, data and method."""
    text = read_text(path)
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    title, *rest = re.split(rf"^({'|'.join(PARTS)}): ", "\n".join(lines), flags=re.M | re.I)
    stated = {key.lower(): value.strip() for key, value in zip(rest[::2], rest[1::2], strict=True)}
    return RecipeHeader(
        name=path.stem,
        path=str(path),
        title=" ".join(title.split()),
        data=path.stem.partition("_")[0],
        method=yaml.safe_load(text)["method"],
        **{key: value if key == "command" else " ".join(value.split()) for key, value in stated.items()},
    )


def list_recipes() -> RecipeList:
    """The recipes of the package, described."""
    return RecipeList([describe(path) for path in recipes().values()])
