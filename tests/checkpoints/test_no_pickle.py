"""No file that somebody may hand over runs code: each is replaced by a pickle that would, and every verb reads it."""

import ast
import contextlib
import json
import os
import pickle
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY

from glsim import cli
from glsim.files import MARKER
from glsim.inference import ray_bulk
from glsim.training.resume import AVERAGED, CONTENTS, MODEL, OPTIMIZER, STATE

BUNDLE = ("model.safetensors", "config.json", "metrics.json", "README.md")
RUN = ("train.yaml", "run.json", "log.jsonl", "predictions_test.csv", "bad_images.txt", "curve.png")
CHECKPOINT = (STATE, *(f"{name}.safetensors" for name in (MODEL, AVERAGED, OPTIMIZER, CONTENTS)))
OTHERS = (  # names under which libraries look for something, or looked once
    *("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl", "random_states_1.pkl"),
    *("optimizer.bin", "optimizer.pt", "scheduler.bin", "scaler.pt", "sampler.bin", "dl_state_dict.bin", "state.pkl"),
    *(
        "pytorch_model.bin",
        "pytorch_model_0.bin",
        "model.pt",
        "model.pth",
        "averaged.pt",
        "ema.pt",
        "training_args.bin",
    ),
    *("pytorch_model.bin.index.json", "model.safetensors.index.json", "checkpoint.pt", "last.ckpt", "config.pkl"),
)


class Touch:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def plant(path, evil, kind):
    """A pickle under some name, as `pickle` writes it, as `torch` does, or as NumPy does."""
    if path.is_dir():
        shutil.rmtree(path)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Touch(evil)}, protocol=2))
    elif kind == "torch":
        with path.open("wb") as file:
            torch.save({"a": Touch(evil)}, file)
    else:
        with path.open("wb") as file:
            np.savez(file, a=np.array([Touch(evil)], dtype=object))


@pytest.fixture(scope="module")
def made(birds, tmp_path_factory):
    """A folder of `glsim reproduce` whose last run is not told as done, a run in it, its index and a job of its."""
    place = tmp_path_factory.mktemp("pickles")
    (place / "recipe.yaml").write_text(yaml.safe_dump({**TINY, "epochs": 1, "ema": 0.5}))
    words = ["reproduce", place / "recipe.yaml", "--data", birds, "--out", place / "paper", "--seeds", 1]
    assert cli.main([str(w) for w in words]) == 0
    state = json.loads((place / "paper/reproduce.json").read_text())
    state["runs"]["seed_1"] = {"state": "running", "seed": 1, "lr": TINY["lr"]}
    (place / "paper/reproduce.json").write_text(json.dumps(state))
    words = ["index", "build", place / "paper/seed_1", "--data", birds, "--out", place / "paper/index"]
    assert cli.main([str(w) for w in words] + ["--workers", "0"]) == 0
    return place / "paper"


@pytest.fixture
def ask(birds, made, tmp_path, monkeypatch):
    """Runs every verb that reads the folders in a copy of `made`; what they answer is for other tests."""
    fake = SimpleNamespace(exceptions=SimpleNamespace(RayError=RuntimeError))
    monkeypatch.setattr(ray_bulk, "need_ray", lambda: fake)
    monkeypatch.setattr(ray_bulk, "cluster", lambda *_: nullcontext())
    monkeypatch.setattr(ray_bulk, "answer_parts", lambda *_: iter(()))
    image = next((birds / "test").rglob("*.jpg"))
    paper = tmp_path / "paper"
    run = paper / "seed_1"

    def ask(*verbs):
        for words in (
            ["train", "--recipe", made / "seed_1/train.yaml", "--out", run, "--data", birds, "--resume"],
            ["reproduce", made.parent / "recipe.yaml", "--data", birds, "--out", paper, "--seeds", 1],
            ["report", paper],
            ["eval", run, "--data", birds, "--workers", 0],
            ["predict", run, image, "--workers", 0],
            ["predict", run, image, "--engine", "ray", "--out", paper / "job"],
            ["calibrate", run, "--data", birds, "--split", "test", "--workers", 0],
            ["index", "query", paper / "index", image, "--workers", 0],
        ):
            if words[0] in (verbs or words):
                with contextlib.suppress(Exception):
                    cli.main([*map(str, words), "--json"])

    shutil.copytree(made, paper)
    ask.paper = paper
    return ask


def test_a_pickle_of_these_tests_does_act(tmp_path):
    for kind in ("pickle", "torch", "numpy"):
        evil, file = tmp_path / f"{kind}.ran", tmp_path / kind
        plant(file, evil, kind)
        if kind == "pickle":
            pickle.loads(file.read_bytes())
        elif kind == "torch":
            torch.load(file, weights_only=False)
        else:
            with np.load(file, allow_pickle=True) as arrays:
                arrays["a"]
        assert evil.exists()


def test_these_are_all_the_files_there_are(ask):
    """A file that is new has to be planted too."""
    run = ask.paper / "seed_1"
    assert {p.name for p in run.iterdir()} == {*BUNDLE, *RUN, "checkpoint", MARKER}
    assert {p.name for p in (run / "checkpoint").iterdir()} == {*CHECKPOINT, MARKER}
    assert {p.name for p in ask.paper.iterdir()} - {"index"} == {"reproduce.json", "seed_1", MARKER}


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_no_file_of_a_run_folder_is_unpickled(ask, made, tmp_path, kind):
    evil, run = tmp_path / "ran", ask.paper / "seed_1"
    places = dict.fromkeys((run / "checkpoint" / name for name in CHECKPOINT), ("train", "reproduce"))
    places |= dict.fromkeys((run / name for name in (*BUNDLE, *RUN)), () if kind == "pickle" else ("train", "report"))
    for place, verbs in (places | {ask.paper / "reproduce.json": ("reproduce", "report")}).items():
        plant(place, evil, kind)
        ask(*verbs)
        assert not evil.exists(), place.name
        shutil.rmtree(ask.paper)
        shutil.copytree(made, ask.paper)


@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
def test_no_file_beside_those_of_a_run_folder_is_unpickled(ask, tmp_path, kind):
    evil, run = tmp_path / "ran", ask.paper / "seed_1"
    shutil.copytree(run / "checkpoint", run / "checkpoint.old")
    for folder in (run, run / "checkpoint", run / "checkpoint.old", ask.paper, ask.paper / "index", ask.paper / "job"):
        folder.mkdir(exist_ok=True)
        for name in OTHERS:
            plant(folder / name, evil, kind)
    ask()
    assert not evil.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_no_file_of_an_index_or_a_job_is_unpickled(ask, made, tmp_path, kind):
    evil, index, job = tmp_path / "ran", ask.paper / "index", ask.paper / "job"
    ask("predict")
    assert (job / "job.json").exists()
    for place in [*index.glob("*"), *job.glob("*"), job / "part-000000.parquet"]:
        if place.is_file() or not place.exists():
            before = place.read_bytes() if place.exists() else b""
            plant(place, evil, kind)
            ask("predict", "index")
            assert not evil.exists(), place.name
            place.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((f"x{end}", kind) for end in (".pth", ".pt", ".bin", ".npz") for kind in ("pickle", "torch", "numpy"))],
)
def test_no_file_to_start_from_or_to_load_is_unpickled(birds, tmp_path, name, kind):
    evil, file = tmp_path / "ran", tmp_path / name
    plant(file, evil, kind)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**TINY, "epochs": 1}))
    train = ["train", "--recipe", tmp_path / "recipe.yaml", "--data", birds, "--out", tmp_path / "r"]
    for words in (
        [*train, "--init-from", file],
        ["eval", file, "--data", birds, "--workers", 0],
        ["convert", file, tmp_path / "b"],
    ):
        assert cli.main([str(w) for w in words]) in (2, 3)
        assert not evil.exists()


def test_the_source_calls_nothing_that_unpickles():
    """`torch.load` says weights_only=True, arrays are never objects, YAML is read by the safe loader."""
    modules = {"pickle": {"UnpicklingError"}, "joblib": set(), "dill": set(), "cloudpickle": set(), "shelve": set()}
    found = []
    for path in sorted((ROOT / "glsim").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names}
                top = (node.module if isinstance(node, ast.ImportFrom) else "") or ""
                for module, allowed in modules.items():
                    if top == module and names - allowed:
                        found.append(where)
                    if module in names and module != "pickle":
                        found.append(where)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                found += [where] * (node.attr not in modules[node.value.id])
            if not isinstance(node, ast.Call):
                continue
            called, said = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called.endswith("torch.load") and said.get("weights_only") != "True":
                found.append(where)
            if "allow_pickle" in said and said["allow_pickle"] != "False":
                found.append(where)
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "pd.read_pickle"):
                found.append(where)
            if called.rpartition(".")[2] in ("load_state", "register_for_checkpointing", "load_custom_state"):
                found.append(where)  # Accelerate's, which unpickles
    assert not found
