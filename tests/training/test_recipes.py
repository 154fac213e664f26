"""A recipe states its claim, builds, and is found by its name wherever the package is installed."""

import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, parsed

import glsim
from glsim import cli
from glsim.models import spell_out
from glsim.training.components import make_optimizer
from glsim.training.config import read_recipe
from glsim.training.recipes import PARTS, describe, find_recipe, recipes
from glsim.types import ConfigError


@pytest.mark.parametrize(("name", "path"), recipes().items(), ids=recipes())
def test_recipe_states_its_claim_and_builds(name, path):
    stated = describe(path)
    assert all(getattr(stated, part) for part in PARTS) and len(stated.title) > 20
    assert "%" in stated.claim and any(c.isdigit() for c in stated.claim), f"{path.name} claims no number"
    assert f"--recipe {name} " in stated.command or f"recipes/{name}.yaml " in stated.command
    assert (stated.name, stated.data) == (name, name.split("_")[0])
    s = parsed("train", ["--recipe", path, "--data", "d", "--out", "o"])
    # The least depth is enough to check names and sizes, options and image size are the recipe's own.
    few = {"resnet": {"layers": (1, 1, 1, 1)}, "swin": {"depths": (1, 1, 1, 1), "embed_dim": 48}}
    least = few.get(re.match("[a-z]*", str(s.backbone))[0], {"depth": 2})
    args = {**s.backbone_args, **least}
    model = glsim.create_model(s.method, s.backbone, 12, s.image_size, False, args, **s.options)
    assert model.config.method == s.method == stated.method
    for name, value in spell_out(s.method, s.options).items():
        assert model.config.options[name] == value
    make_optimizer(s, model)


def test_every_method_has_a_recipe_that_is_called_so():
    """DATA_METHOD, and after it what is particular."""
    methods = {name: read_recipe(name)["method"] for name in recipes()}
    assert set(methods.values()) == set(glsim.METHODS)
    for name, method in methods.items():
        assert name.split("_")[1] == method, name


def test_there_are_the_recipes_that_the_docs_promise():
    """Those that a page names, and one for CUB of every method that README names a paper for."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    sets = "|".join(sorted({name.split("_")[0] for name in recipes()}))
    named = set(re.findall(rf"(?<![\w/-])(?:recipes/)?((?:{sets})_[a-z0-9_]+)\b", text))
    papers = re.findall(r"^\| `(\w+)` \| \[", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(named) >= 20 and len(papers) >= 8
    assert not named - set(recipes())
    for method in papers:
        assert [name for name in recipes() if name.startswith(f"cub_{method}_")], f"README promises cub_{method}_*"


def test_a_recipe_is_found_by_name_or_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = recipes()
    path = known["cub_plain_vit_b16"]
    for name in ("cub_plain_vit_b16", "cub_plain_vit_b16.yaml", path, str(path), os.path.relpath(path)):
        assert find_recipe(name).samefile(path)
    (tmp_path / "cub_plain_vit_b16").mkdir()  # as --out makes it
    assert find_recipe("cub_plain_vit_b16") == path
    (tmp_path / "cub_plain_vit_b16.yaml").write_text("lr: 1.0\n")
    assert read_recipe("cub_plain_vit_b16.yaml") == {"lr": 1.0}
    assert find_recipe("cub_plain_vit_b16") == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_recipe("~/cub_plain_vit_b16.yaml") == tmp_path / "cub_plain_vit_b16.yaml"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cub_glsim_vit_b61", "did you mean cub_glsim_vit_b16 or "),
        ("recipes/cub_ielt_vit_b16.yaml", "did you mean cub_ielt_vit_b16 or "),
        ("cars", r"did you mean cars196_plain\? "),
        ("zzz", "no recipe of that name; glsim recipes lists them"),
        ("folder", "no such file, and no recipe"),
        ("fifo", "no such file, and no recipe"),
    ],
)
def test_an_unknown_recipe_is_refused_with_close_names(name, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match=rf"recipe {name} cannot be read: .*{said}"):
        find_recipe(name)
    for words in (["train", "--recipe", name], ["train", f"--recipe={name}"], ["reproduce", name]):
        assert cli.main([*words, "--data", "d", "--out", "o", "--json"]) == 2
        out = capsys.readouterr().out
        assert "no recipe of that name" in json.loads(out)["error"]
    assert not (tmp_path / "o").exists()


def test_glsim_recipes_lists_them(capsys):
    assert cli.main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [r["name"] for r in listed] == list(recipes()) and {r["method"] for r in listed} == set(glsim.METHODS)
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    for r in listed:
        assert f"{r['name']}: {r['method']} on {r['data']}. " in text
        assert f"    claim: {r['claim']}\n    hardware: {r['hardware']}\n" in text


def test_a_wheel_holds_all_that_the_package_reads(tmp_path):
    pytest.importorskip("hatchling", reason="the extra dev is not installed")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "glsim").rglob("*") if path.is_file()}
    assert names == {name for name in tracked if "__pycache__" not in name}
    assert {
        "glsim/py.typed",
        "glsim/inference/page/index.html",
        "glsim/training/recipes/cub_glsim_vit_b16.yaml",
    } <= names

    (tmp_path / "empty").mkdir()

    def installed(*words):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
        command = [sys.executable, "-m", "glsim.cli", *words]
        return subprocess.run(
            command, cwd=tmp_path / "empty", env=environment, check=True, capture_output=True, text=True
        ).stdout

    listed = json.loads(installed("recipes", "--json"))["recipes"]
    assert [r["name"] for r in listed] == list(recipes())
    assert all(r["path"].startswith(str(tmp_path / "installed")) for r in listed)
    words = ("train", "--recipe", "cub_glsim_vit_b16", "--data", "CUB", "--out", "runs", "--print-recipe")
    assert "backbone: vit_base_patch16_224.orig_in21k\n" in installed(*words)
