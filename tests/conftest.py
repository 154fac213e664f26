"""Shared by all tests: small models, and where the reference material lies."""

import os
import random
import sys
from importlib import import_module
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run beside each other, one on a core
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests need no network, and must not wait for one

# The same examples on every machine and at every run; how long one takes says nothing on a busy machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}


def needs(path):
    """Skip mark for tests that need reference material which does not come with the package."""
    return pytest.mark.skipif(not path.exists(), reason=f"reference material {path.name} is not here")


@pytest.fixture(autouse=True)
def same_chance():
    """What a test draws without a seed of its own does not depend on the tests before it: they run in any order."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def script(monkeypatch):
    """Imports a script of `benchmarks/` by its name; the methods that scripts make known are forgotten after the test."""
    from glsim import models

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name, file in {"tokens": "one_pass", "ruled": "rules"}.items():
        monkeypatch.setitem(models.METHODS, name, file)
    return import_module


def scene(size: tuple[int, int] = (48, 32), seed: int = 0) -> Image.Image:
    """A gradient with noise: compresses like a photograph, and no turn of it looks like another."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    noise = np.random.default_rng(seed).normal(0, 3, (*x.shape, 3))
    return Image.fromarray((np.stack([x, y, x * y], -1) * 215 + 20 + noise).clip(0, 255).astype(np.uint8))


def touch(root: Path, *names: str) -> Path:
    """Image files by name only: read_data never opens them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


SMALL_OPTIONS = {  # for grids of 16 patches
    "glsim": {"top_o": 4},
    "ffvt": {"top_k": 3},
    "ielt": {"tokens": 12, "votes": 4},
}
SMALL_MAPS = {  # networks that are no transformer on one grid, small, and with a gradient in everything at the start
    "resnet18": {"zero_init_last": False},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)},
}


def choices(names):
    """How an error lists what there is."""
    return f"choose from: {', '.join(sorted(names))}"


def small_model(
    method="glsim", backbone="vit_tiny_patch16_224", size=64, classes=5, head=True, seed=0, args=None, **options
):
    """A shrunken model in eval mode; with `head`, the zero-initialised classifier is given values.

    `args` go to timm besides those that make it small, `options` replace the small ones of the method.
    """
    import torch

    from glsim import create_model

    torch.manual_seed(seed)
    small = {} if backbone.startswith("test_") else SMALL_MAPS.get(backbone, SMALL)
    options = SMALL_OPTIONS.get(method, {}) | options
    model = create_model(method, backbone, classes, size, backbone_args=small | (args or {}), **options).eval()
    if head:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and not module.weight.any():
                torch.nn.init.normal_(module.weight, std=0.5)
        for name, p in model.named_parameters():
            if name.endswith("combiner.alpha"):  # which gates what it multiplies, and starts at zero
                torch.nn.init.constant_(p, 0.5)
    return model


def assert_same_weights(one, other):
    """Two models hold the same tensors under the same names, bit by bit.

    What they answer is compared with a tolerance: how a number is summed up may depend on where a tensor lies.
    """
    import torch

    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.fixture(scope="session")
def birds(tmp_path_factory):
    """A tiny synthetic data set: 3 species, 6 train and 3 test images each, 64 pixels."""
    from glsim.data import synthetic

    folder = tmp_path_factory.mktemp("data") / "birds"
    synthetic.write(folder, classes=3, train=6, test=3, size=64, seed=0)
    return folder


TINY = dict(
    method="glsim",
    backbone="vit_tiny_patch16_224",
    pretrained=False,
    backbone_args={"depth": 2, "embed_dim": 64, "num_heads": 2},
    image_size=64,
    options={"top_o": 4},
    epochs=2,
    batch_size=6,
    optimizer="adamw",
    lr=1e-3,
    warmup_steps=2,
    workers=0,
)


@pytest.fixture(scope="session")
def run_folder(birds, tmp_path_factory):
    """A trained run: two epochs of a tiny GLSim on the birds."""
    from glsim.training.config import Train
    from glsim.training.train import train

    out = tmp_path_factory.mktemp("runs") / "glsim"
    train(Train(data=str(birds), out=str(out), test=True, **TINY), progress=False)
    return out


def parsed(name, words):
    """The options of a verb, from words of the command line."""
    from glsim import cli

    verb = cli.load_verb(name)
    return cli.parse(name, verb.options, [str(word) for word in words], verb.recipe)
