"""A recipe states its claim, and builds."""

import dataclasses

import pytest
from conftest import ROOT

import glsim
from glsim import cli, quickstart, train
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
    # The least depth is enough to check names and sizes, options and image size are the recipe's own.
    least = {"layers": (1, 1, 1, 1)} if str(s.backbone).startswith("resnet") else {"depth": 2}
    args = {**s.backbone_args, **least}
    model = glsim.create_model(s.method, s.backbone, 12, s.image_size, False, args, **s.options)
    assert model.config["method"] == s.method
    for name, value in s.options.items():
        assert model.config["options"][name] == value
    train.make_optimizer(s, model)


def test_there_are_the_recipes_we_promise():
    there = {p.stem for p in RECIPES}
    assert "cub_glsim_vit_b16" in there
    for method in glsim.METHODS:
        for data in ("cub", "flowers12", "synthetic"):
            name = f"{data}_{method}"
            found = sorted(stem for stem in there if stem == name or stem.startswith(f"{name}_"))
            assert found, f"no recipe {name}*.yaml"
            assert all(read_recipe(ROOT / "recipes" / f"{stem}.yaml")["method"] == method for stem in found)


@pytest.mark.parametrize("method", ["plain", "glsim"])
def test_quickstart_trains_what_the_recipe_says(method):
    names = {f.name for f in dataclasses.fields(Train)}
    recipe = read_recipe(ROOT / "recipes" / f"synthetic_{method}.yaml")
    assert set(quickstart.RECIPE) <= names
    assert {**quickstart.RECIPE, "method": method, "epochs": recipe["epochs"]} == recipe
