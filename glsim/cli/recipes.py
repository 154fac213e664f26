"""`glsim recipes`: the recipes that come with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.options import Lines, Settings

if TYPE_CHECKING:
    from glsim.training.recipes import RecipeList

PURPOSE = "Train"
CALL = "glsim.training.recipes:list_recipes"


class Options(Settings):
    """List the recipes of the package, which train and reproduce take by name: claim, data, method, hardware."""


def show(r: RecipeList, options: Options) -> Lines:
    """A paragraph a recipe: name, method, data, what its header claims, and on what hardware."""
    for recipe in r.recipes:
        yield f"{recipe.name}: {recipe.method} on {recipe.data}. {recipe.title}"
        yield f"    claim: {recipe.claim}"
        yield f"    hardware: {recipe.hardware}"
    yield "\nnext: glsim train --recipe NAME --data DATA --out RUN (path and source: --json)"
