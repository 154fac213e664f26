"""A recipe states its claim, and builds."""

import dataclasses

import pytest
from conftest import ROOT

import glsim
from glsim import cli, quickstart
from glsim.config import Train, read_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_states_its_claim_and_builds(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for word in ("Claim:", "Source:", "Command:", "Hardware:"):
        assert word in text, f"{path.name} lacks {word}"
    claim = text.split("Claim:")[1].split("Source:")[0]
    assert "%" in claim and any(c.isdigit() for c in claim), f"{path.name} claims no number"
    s = cli.parse("train", cli.VERBS["train"], ["--recipe", str(path), "--data", "d", "--out", "o"])
    args = {**s.backbone_args, "depth": 1}  # one block is enough to check names and sizes
    model = glsim.create_model(s.method, s.backbone, 12, s.image_size, False, args, **s.options)
    assert model.config["method"] == s.method


def test_there_are_the_recipes_we_promise():
    assert {"cub_glsim_vit_b16", "flowers12_glsim", "flowers12_plain", "synthetic_glsim", "synthetic_plain"} <= {
        p.stem for p in RECIPES
    }


@pytest.mark.parametrize("method", ["plain", "glsim"])
def test_quickstart_trains_what_the_recipe_says(method):
    names = {f.name for f in dataclasses.fields(Train)}
    recipe = read_recipe(ROOT / "recipes" / f"synthetic_{method}.yaml")
    assert set(quickstart.RECIPE) <= names
    assert {**quickstart.RECIPE, "method": method, "epochs": recipe["epochs"]} == recipe
