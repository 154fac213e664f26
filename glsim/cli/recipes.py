"""`glsim recipes`: the recipes that come with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.options import Settings, dataclass

if TYPE_CHECKING:
    from glsim.training.recipes import RecipeList

PURPOSE = "Train"


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """List the recipes of the package, which train and reproduce take by name: claim, data, method, hardware."""


def run(options: Options, progress: bool) -> RecipeList:
    """Read their headers."""
    from glsim.training.recipes import list_recipes

    return list_recipes()


def show(r: RecipeList, options: Options) -> str:
    """A paragraph a recipe: name, method, data, what its header claims, and on what hardware."""
    lines = []
    for recipe in r.recipes:
        lines.append(f"{recipe.name}: {recipe.method} on {recipe.data}. {recipe.title}")
        lines += [f"    claim: {recipe.claim}", f"    hardware: {recipe.hardware}"]
    return "\n".join([*lines, "", "next: glsim train --recipe NAME --data DATA --out RUN (path and source: --json)"])
