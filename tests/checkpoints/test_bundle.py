import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, SHARED, SMALL, assert_same_weights, needs, small_model
from PIL import Image
from safetensors.torch import load_file, save_file

import glsim
from glsim import ConfigError, DataError, GlsimError
from glsim.checkpoints.bundle import (
    amend,
    digest,
    labels_of,
    preprocessing_of,
    read_config,
    temperature_of,
    threshold_of,
)
from glsim.checkpoints.config import MODEL_KEYS
from glsim.checkpoints.convert import convert_checkpoint
from glsim.checkpoints.init_from import init_from
from glsim.checkpoints.official import convert_official
from glsim.data.transforms import Preprocessing


@pytest.fixture
def bundle(tmp_path):
    return glsim.save(small_model(), tmp_path / "bundle", labels=list("abcde"), metrics={"test": {}}, note="hello")


def test_a_copied_bundle_answers_the_same(bundle, tmp_path):
    moved = shutil.copytree(bundle, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(bundle)
    images = torch.randn(2, 3, 64, 64)
    for source in (moved, str(moved), f"local-dir:{moved}"):
        model = glsim.load(source)
        assert not model.training and model.config.extra["note"] == "hello"
        assert_same_weights(model, small_model())
        torch.testing.assert_close(model(images).logits, small_model()(images).logits, atol=1e-5, rtol=1e-5)


def test_overrides_change_options_and_size(bundle):
    images = torch.randn(1, 3, 96, 96)
    model = glsim.load(bundle, top_o=2, image_size=96)
    output = model(images)
    assert output.selection.grid == (6, 6) and output.selection.indices.shape == (1, 2)
    assert model.config.preprocessing["image_size"] == [96, 96]
    with pytest.raises(ConfigError, match="has no option topo"):
        glsim.load(bundle, topo=2)


def test_the_model_card_says_how_to_use_it(bundle):
    card = (bundle / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: glsim" in card and "a, b, c, d, e" in card
    assert "glsim.Predictor" in card


# Answers like a bundle of a stranger on a strange machine: no network, and not a file of those in argv[3:] is opened.
ELSEWHERE = """
import sys

def forbid(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        raise PermissionError(event)
    if event == "open" and isinstance(args[0], str) and args[0].startswith(tuple(sys.argv[3:])):
        raise PermissionError(args[0])

sys.addaudithook(forbid)
import torch
import glsim

model = glsim.load(sys.argv[1])
torch.save((model.state_dict(), model(torch.load(sys.argv[2], weights_only=True)).logits), sys.argv[2])
"""


def test_a_run_unzipped_elsewhere_is_the_same_bit_by_bit_and_answers_the_same(run_folder, birds, tmp_path):
    """Trained, zipped, unzipped by another program, loaded in another process that sees neither run nor data."""
    names = ["model.safetensors", "config.json", "metrics.json", "README.md"]
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(run_folder / name, name)
    elsewhere = tmp_path / "another" / "place"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(tmp_path / "bundle.zip"), str(elsewhere)], check=True)
    images = torch.randn(3, 3, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    words = [str(elsewhere), str(tmp_path / "images.pt"), str(run_folder), str(birds)]
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, *words], check=True, env=alone, cwd=ROOT)
    weights, logits = torch.load(tmp_path / "images.pt", weights_only=True)
    here = glsim.load(run_folder)
    assert weights.keys() == here.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in here.state_dict().items())
    torch.testing.assert_close(logits, here(images).logits, atol=1e-5, rtol=1e-5)


def test_labels_must_fit(tmp_path):
    with pytest.raises(ConfigError, match="2 labels for a model of 5 classes"):
        glsim.save(small_model(), tmp_path / "b", labels=["a", "b"])
    assert not (tmp_path / "b").exists()


def test_damage_is_named(bundle, tmp_path):
    def damaged(name):
        return shutil.copytree(bundle, tmp_path / name)

    with pytest.raises(DataError, match="nowhere does not exist"):
        glsim.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no config.json"):
        glsim.load(tmp_path)
    a = damaged("a")
    (a / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"a/config.json is damaged or cannot be read"):
        glsim.load(a)
    b = damaged("b")
    (b / "config.json").write_text('{"method": "glsim"}')
    with pytest.raises(DataError, match=r"lacks backbone, num_classes"):
        glsim.load(b)
    c = damaged("c")
    weights = (c / "model.safetensors").read_bytes()
    (c / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DataError, match=r"c/model.safetensors is damaged"):
        glsim.load(c)
    d = damaged("d")
    tensors = load_file(d / "model.safetensors")
    del tensors["head.linear.bias"]
    save_file(tensors, d / "model.safetensors")
    with pytest.raises(DataError, match=r"does not fit its config.json.*head.linear.bias"):
        glsim.load(d)
    e = damaged("e")
    config = json.loads((e / "config.json").read_text())
    (e / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(DataError, match=r"format 99, this glsim reads up to \d; upgrade"):
        glsim.load(e)
    f = damaged("f")
    (f / "config.json").write_text(json.dumps(config | {"method": "os.system"}))
    with pytest.raises(DataError, match=r"f/config\.json: no model can be built from it: unknown method 'os.system'"):
        glsim.load(f)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DataError, match="is no bundle folder, .pth or .onnx file"):
        glsim.load(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("part", "key"),
    [("backbone_args", "checkpoint_path"), ("backbone_args", "pretrained_cfg_overlay"), ("options", "pretrained")],
)
def test_a_bundle_cannot_make_timm_read_other_files(bundle, part, key):
    config = json.loads((bundle / "config.json").read_text())
    config[part][key] = "/tmp/evil.pth"
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=f"refused: a bundle may not set {key}"):
        glsim.load(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("options", None), ("num_classes", "5"), ("format", "9"), ("image_size", 64)),
        *(("training", 5), ("pretrained_cfg", [1]), ("calibration", "abc"), ("calibration", [1])),
        *(("calibration", {"temperature": t}) for t in (0, -1.0, True, 10**400, 1e-320, "2", None)),
    ],
)
def test_a_config_of_the_wrong_types_is_named(bundle, key, value):
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(config | {key: value}))
    key = "calibration.temperature" if isinstance(value, dict) else key
    with pytest.raises(DataError, match=rf"config.json is damaged: {key}=.*is needed"):
        glsim.load(bundle)


def test_any_flipped_bit_of_the_weights_is_found(bundle):
    """Only what the header says beside the tensors may change unseen: then the weights are those that were saved."""
    file = bundle / "model.safetensors"
    whole, truth = file.read_bytes(), load_file(file)
    begin = 8 + int.from_bytes(whole[:8], "little")
    places = np.random.default_rng(0).integers(0, len(whole), 60).tolist()
    for place in (*range(8), *range(8, begin, 97), begin, *places, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            weights = glsim.load(bundle).state_dict()
            assert place < begin and all(torch.equal(weights[k], v) for k, v in truth.items())
        except DataError as error:
            assert "model.safetensors" in str(error)


def test_weights_cut_short_or_longer_are_refused(bundle):
    file = bundle / "model.safetensors"
    whole = file.read_bytes()
    for cut in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"model.safetensors is damaged"):
            glsim.load(bundle)
    file.write_bytes(whole + b"more")
    with pytest.raises(DataError, match=r"model.safetensors is damaged"):
        glsim.load(bundle)


def test_bundles_without_a_checksum_are_read(bundle):
    file = bundle / "model.safetensors"
    before = glsim.load(bundle)
    save_file(load_file(file), file, metadata={"format": "pt"})
    assert torch.equal(glsim.load(bundle).head.linear.weight, before.head.linear.weight)


def test_a_file_that_leads_out_of_the_bundle_is_refused(bundle, tmp_path):
    secret = tmp_path / "secret"
    for name in ("model.safetensors", "config.json", "metrics.json", "README.md"):
        shutil.move(bundle / name, secret)
        for target in (secret, "../secret"):
            (bundle / name).symlink_to(target)
            with pytest.raises(
                DataError, match=rf"{name} was refused: it is a link to .*secret, outside of the bundle"
            ):
                glsim.load(bundle)
            (bundle / name).unlink()
        shutil.move(secret, bundle / name)
    (bundle / "sub").mkdir()
    shutil.move(bundle / "model.safetensors", bundle / "sub" / "w")
    (bundle / "model.safetensors").symlink_to("sub/w")  # a link that stays inside
    (tmp_path / "best").symlink_to(bundle)  # and a name for the whole
    assert glsim.load(tmp_path / "best").config.extra["note"] == "hello"
    (bundle / "config.json").unlink()
    (bundle / "config.json").symlink_to("config.json")
    with pytest.raises(DataError, match=r"config.json is damaged or cannot be read"):
        glsim.load(bundle)
    (bundle / "config.json").unlink()
    os.mkfifo(bundle / "config.json")  # reading it would wait for ever
    with pytest.raises(DataError, match=r"config.json is no file"):
        glsim.load(bundle)


def test_archives_are_not_opened(bundle, tmp_path):
    """A zip may hold names that climb out (../x); nothing here unpacks one."""
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        archive.write(bundle / "config.json", "../../config.json")
    with pytest.raises(DataError, match="is no bundle folder, .pth or .onnx file"):
        glsim.load(tmp_path / "bundle.zip")


HUGE = 10**9
ONE = torch.zeros(1)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "os.system"},
        {"method": "../../models/glsim"},
        {"method": "__init__"},
        {"backbone": "hf-hub:somebody/evil"},
        {"backbone": "local-dir:/tmp/evil"},
        {"backbone": "torch.nn.Linear"},
        {"backbone": "resnet18"},
        {"backbone_args": {"embed_layer": "os.system"}},
        {"backbone_args": {"norm_layer": "os.system"}},
        {"backbone_args": {"act_layer": {"a": 1}}},
        {"backbone_args": {"features_only": True}},
        {"backbone_args": {"scriptable": True, "exportable": True, "depth": "2"}},
        {"backbone_args": {"depth": HUGE}},
        {"backbone_args": {"depth": -1}},
        {"backbone_args": {"embed_dim": HUGE, "num_heads": 1}},
        {"backbone_args": {"embed_dim": 0}},
        {"backbone_args": {"patch_size": 0}},
        {"backbone_args": {"img_size": HUGE}},
        {"backbone_args": {"reg_tokens": HUGE}},
        {"num_classes": HUGE * HUGE},
        {"num_classes": 0},
        {"num_classes": -5},
        {"image_size": [HUGE, HUGE]},
        {"image_size": [0, 64]},
        {"image_size": [64]},
        {"image_size": [64.0, 64]},
        {"image_size": [4096, 4096]},
        {"options": {"aggregator_depth": HUGE}},
        {"options": {"top_o": HUGE}},
        {"options": {"crop_size": HUGE}},
        {"options": {"metric": "os.system"}},
        {"options": {"box": ["exclusive"]}},
        {"options": {"stride": -1}},
        {"options": {"norm_eps": "x"}},
        {"label_names": 5},
        {"label_names": ["a"]},
        {"label_names": [1, 2, 3, 4, 5]},
        {"preprocessing": {}},
        {"preprocessing": {"image_size": [64, 64], "resize_ratio": HUGE, "mean": [0.5] * 3, "std": [0.5] * 3}},
        {"preprocessing": {"image_size": [64, 64], "resize_ratio": float("nan"), "mean": [0.5] * 3, "std": [0.5] * 3}},
        {"preprocessing": {"image_size": [64, 64], "resize_ratio": 1.0, "mean": [0.5] * 3, "std": [0, 0, 0]}},
        {"preprocessing": {"image_size": [64, 64], "resize_ratio": 1.0, "mean": [0.5], "std": [0.5]}},
        {"preprocessing": {"image_size": [64, 64], "resize_ratio": 1.0, "mean": [0.5] * 3, "std": [1e-320] * 3}},
        {"preprocessing": {"image_size": [48, 64], "resize_ratio": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}},
        {"preprocessing": {"image_size": [4096] * 2, "resize_ratio": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}},
        {"backbone_args": {"depth": 65000, "embed_dim": 2, "num_heads": 1}},
        {"backbone_args": {"patch_size": 1}, "image_size": [4096, 4096], "preprocessing": {"image_size": [4096, 4096]}},
        {
            "backbone": "beit_base_patch16_224",
            "image_size": [2048, 2048],
            "preprocessing": {"image_size": [2048, 2048]},
        },
        {"backbone": "resnet18", "image_size": [4096, 4096], "preprocessing": {"image_size": [4096, 4096]}},
        {"backbone_args": {"num_heads": -1}},
        {"backbone_args": {"proj_drop_rate": 5.0}},
        {"backbone_args": {"x" * 5000: 1}},
        {"backbone_args": {f"x{i}": 1 for i in range(5000)}},
        {"options": {"dropout": 5.0}},
        {"options": {"crop_size": 4096}},
        {"label_names": list("aabcd")},
        {"label_names": ["a", "b", "c", "d", " "]},
        {"label_names": [str(i) for i in range(100_000)]},
    ],
    ids=lambda change: str(change)[:80],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_config_that_names_nonsense_is_refused_at_once(bundle, change):
    """Whatever it asks for: one of our errors, quickly, and no memory used for what does not fit the weights."""
    config = json.loads((bundle / "config.json").read_text())
    for key, value in change.items():
        partly = (
            key in ("backbone_args", "options") or list(value) == ["image_size"] if isinstance(value, dict) else False
        )
        config[key] = config[key] | value if partly else value
    (bundle / "config.json").write_text(json.dumps(config))
    start, before = time.perf_counter(), psutil.Process().memory_info().rss
    with pytest.raises(GlsimError) as error:
        glsim.load(bundle)
    assert 0 < len(str(error.value)) < 2000
    assert time.perf_counter() - start < 20 and psutil.Process().memory_info().rss - before < 500 * 2**20


def test_a_config_nested_too_deep_or_without_numbers_is_refused(bundle):
    config = json.loads((bundle / "config.json").read_text())
    deep = '{"a":' * 970 + "1" + "}" * 970
    wrong = [json.dumps(config | {"note": 0}).replace('"note": 0', f'"note": {v}') for v in ("NaN", "1e999", deep)]
    for text in ("[" * 100_000, "[]", "null", *wrong):
        (bundle / "config.json").write_text(text)
        with pytest.raises(DataError, match=r"config.json is damaged or cannot be read"):
            glsim.load(bundle)


ODD = (None, True, 0, -1, 0.5, 1e30, 10**30, "", "x", "a\n# b", "\udcff", [], {}, [1], {"a": 1}, [[0.1] * 9000])


def places(value, way=()):
    """The way to every value inside of one from JSON."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*way, key)
        yield from places(value[key], (*way, key))


def changed(value, way, odd):
    value = inside = json.loads(json.dumps(value))
    for key in way[:-1]:
        inside = inside[key]
    inside[way[-1]] = odd
    return value


@pytest.fixture(scope="module")
def told_all(tmp_path_factory):
    """A bundle of few numbers in whose config is every key that anything reads."""
    args = {"depth": 1, "embed_dim": 8, "num_heads": 1, "patch_size": 8}
    model = glsim.create_model("glsim", "vit_tiny_patch16_224", 3, 32, backbone_args=args, top_o=3, early_loss=0.5)
    about = {
        "data": {
            "source": "birds",
            "counts": {"train": 4},
            "split_hash": "0" * 64,
            "split_seed": 0,
            "test_fraction": 0.2,
            "val_fraction": 0.0,
        },
        "training": {"start": "nothing", "epochs": 1, "optimizer": "sgd", "lr": 0.1, "batch_size": 4, "seed": 0},
        "calibration": {
            "temperature": 1.5,
            "threshold": 0.5,
            "max_error": 5.0,
            "count": 4,
            "data": "birds",
            "coverage": 0.5,
            "answered": 2,
            "answered_correct": 1,
        },
    }
    measured = {"top1": 0.5, "correct": 2, "count": 4, "top5": 1.0, "per_class_mean": 0.5}
    return glsim.save(
        model, tmp_path_factory.mktemp("told") / "bundle", list("abc"), metrics={"test": measured}, **about
    )


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: ascii(odd)[:12])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_whatever_stands_in_a_config_is_used_or_refused(told_all, tmp_path, odd):
    """Each value in turn is replaced; then all that reads a config: the model and an answer, the card, thresholds."""
    folder, image = shutil.copytree(told_all, tmp_path / "b"), Image.new("RGB", (40, 30))
    good, start = json.loads((folder / "config.json").read_text()), time.perf_counter()
    kept = 0
    for way in places(good):
        (folder / "config.json").write_text(json.dumps(changed(good, way, odd)))
        try:
            config = read_config(folder)
            amend(folder, {}, calibration=config.calibration | {"count": 7})
            assert "\n# b" not in (folder / "README.md").read_text().partition("\n---\n")[2]
            read = SimpleNamespace(config=config)
            assert temperature_of(read) > 0 and len(labels_of(read)) == 3 and preprocessing_of(read)
            kept += 1
            threshold_of(read)
            if way[0] in (*MODEL_KEYS, "preprocessing"):
                glsim.Predictor(folder)([image])
        except GlsimError as error:
            assert 0 < len(str(error)) < 2000
    assert kept and time.perf_counter() - start < 60
    (folder / "config.json").write_text(json.dumps(good))
    measured = json.loads((folder / "metrics.json").read_text())
    for way in places(measured):
        (folder / "metrics.json").write_text(json.dumps(changed(measured, way, odd)))
        try:
            amend(folder, {})
        except DataError as error:
            assert "metrics.json is damaged" in str(error)
    assert glsim.load(folder)


@pytest.mark.parametrize(
    "about",
    [
        {"data": {"counts": 1}},
        {"training": {"epochs": "1"}},
        {"licence": {"model": 5}},
        {"labels": list("aabcd")},
        {"preprocessing": Preprocessing((48, 64), 1.34, (0.5,) * 3, (0.5,) * 3)},
    ],
    ids=str,
)
def test_what_could_not_be_loaded_is_not_saved(about, tmp_path):
    with pytest.raises(ConfigError, match="this would be a bundle that cannot be loaded: .*config.json is damaged"):
        glsim.save(small_model(), tmp_path / "b", **about)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(bundle, value):
    weights = load_file(bundle / "model.safetensors")
    weights["backbone.net.norm.weight"][3] = value
    hashed = {"sha256": digest(weights)}
    save_file(weights, bundle / "model.safetensors", metadata=hashed)
    with pytest.raises(DataError, match=r"model.safetensors was refused: not every number is finite in backbone.net.n"):
        glsim.load(bundle)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (torch.int8, "has no numbers of type int8"),
        (torch.complex64, "has no numbers of type complex64"),
        (torch.float8_e4m3fn, "has no numbers of type float8_e4m3fn"),
        (torch.bool, "of another type"),
        (torch.int64, "of another type"),
    ],
    ids=str,
)
def test_weights_of_another_type_are_refused(bundle, kind, said):
    file = bundle / "model.safetensors"
    weights = {name: weight.to(kind) for name, weight in load_file(file).items()}
    try:
        save_file(weights, file, {"sha256": digest(weights)})
    except KeyError:
        pytest.skip("the library safetensors cannot write this type")
    with pytest.raises(DataError, match=said):
        glsim.load(bundle)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_fewer_or_more_bits_are_read(bundle, kind):
    file = bundle / "model.safetensors"
    weights = {n: w.to(kind) if w.is_floating_point() else w for n, w in load_file(file).items()}
    save_file(weights, file, {"sha256": digest(weights)})
    assert {p.dtype for p in glsim.load(bundle).parameters()} == {torch.float32}


def test_a_header_as_large_as_weights_is_refused(bundle):
    (bundle / "model.safetensors").write_bytes((2**23 + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="its header has more than 8,388,608 bytes"):
        glsim.load(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backbone", "no_such_net"),
        ("method", "no_such_method"),
        ("options", {"top_o": 0}),
        ("options", {"drop_path": -1}),
        ("backbone_args", {"num_heads": 0}),
        ("backbone_args", {"patch_size": 0}),
        ("backbone_args", {"norm_layer": "os"}),
    ],
)
def test_a_config_that_cannot_be_built_is_named(bundle, key, value):
    config = json.loads((bundle / "config.json").read_text())
    config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"config\.json"):
        glsim.load(bundle)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "metrics.json", "README.md"])
def test_only_regular_files_of_a_bundle_are_opened(bundle, name):
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(DataError, match=f"{name} is no file"):
        glsim.load(bundle)
    (bundle / name).unlink()
    (bundle / name).mkdir()
    with pytest.raises(DataError, match=f"{name} is no file"):
        glsim.load(bundle)


def test_thousands_of_names_are_counted_instead(bundle):
    weights = load_file(bundle / "model.safetensors")
    save_file(weights | {f"more.{i}": torch.zeros(1) for i in range(2000)}, bundle / "model.safetensors")
    with pytest.raises(DataError, match=r"not part of the model: more.0, .* and 1,995 more$") as error:
        glsim.load(bundle)
    assert len(str(error.value)) < 500


def official(path, change=lambda weights, arguments: None):
    """The authors' GLSim file with something changed."""
    with torch.serialization.safe_globals([Namespace]):
        file = torch.load(SHARED / "golden" / "glsim_cos.pth", weights_only=True)
    change(file["model"], vars(file["config"]))
    torch.save(file, path)
    return path


@needs(SHARED / "golden")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, a: w.update({f"model.encoder.blocks.{i}.x": ONE for i in range(500)}), "a far larger model"),
        (lambda w, a: w.update({f"model.aggregator.blocks.{i}.x": ONE for i in range(5000)}), "a far larger model"),
        (lambda w, a: a.update(image_size=8192), "a far larger model"),
        (lambda w, a: a.update(test_resize_size=10**9), "resize_ratio=15625000"),
        (lambda w, a: a.update(test_resize_size=float("nan")), "resize_ratio=nan"),
        (lambda w, a: a.update(num_attention_heads=0), "no model can be built"),
        (lambda w, a: w.update({"model.patch_embedding.weight": ONE}), "no model can be built"),
        (lambda w, a: w.update({"model.head.weight": ONE.expand(10**9, 16)}), "no weights under model.head.weight"),
        (lambda w, a: w.update({"model.head.weight": 5, 7: ONE}), "no weights under model.head.weight, 7"),
        (lambda w, a: w["model.head.weight"].fill_(float("nan")), "not every number is finite in model.head.weight"),
        (lambda w, a: [w.pop(k) for k in list(w) if ".proj" in k], r"missing: .* and \d+ more"),
    ],
)
def test_a_checkpoint_that_asks_for_more_than_it_holds_is_refused(tmp_path, change, said):
    file, start, before = official(tmp_path / "x.pth", change), time.perf_counter(), psutil.Process().memory_info().rss
    with pytest.raises(DataError, match=rf"x.pth .*{said}") as error:
        glsim.load(file)
    assert len(str(error.value)) < 1000
    assert time.perf_counter() - start < 20 and psutil.Process().memory_info().rss - before < 500 * 2**20


@pytest.mark.timeout(60)
def test_a_compressed_checkpoint_and_one_that_is_no_file_are_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(1_000_000)}}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    with pytest.raises(DataError, match="small.pth was refused: it is smaller than its tensors"):
        glsim.load(tmp_path / "small.pth")
    for name in ("fifo.pth", "fifo.onnx", "fifo.npz"):
        os.mkfifo(tmp_path / name)
    for name in ("fifo.pth", "fifo.onnx"):
        with pytest.raises(DataError, match=f"{name} is no bundle folder"):
            glsim.load(tmp_path / name)
    with pytest.raises(DataError, match=r"fifo.pth cannot be read: .*not a regular file"):
        convert_official(tmp_path / "fifo.pth")
    with pytest.raises(DataError, match=r"fifo.npz cannot be read: .*not a regular file"):
        init_from(small_model("plain"), tmp_path / "fifo.npz")


class Evil:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('/tmp/glsim_evil').touch()",))


@pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
def test_a_pickle_in_the_place_of_the_weights_is_not_read(bundle, kind):
    file = bundle / "model.safetensors"
    if kind == "raw":
        file.write_bytes(pickle.dumps(Evil()))
    else:
        torch.save({"head": Evil()}, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(DataError, match="model.safetensors is damaged"):
        glsim.load(bundle)
    assert not Path("/tmp/glsim_evil").exists()


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DataError, match="evil.pth was refused: it holds more than tensors and arguments"):
        glsim.load(tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(DataError, match=r"raw.pth"):
        glsim.load(tmp_path / "raw.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.pth"):
        glsim.load(tmp_path / "empty.pth")
    assert not Path("/tmp/glsim_evil").exists()
    torch.save({"weights": 1}, tmp_path / "other.pth")
    with pytest.raises(DataError, match='has no "model"|it has no "model"'):
        glsim.load(tmp_path / "other.pth")


@needs(SHARED / "golden")
def test_convert_reports_every_key(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join("abcdefg") + "\n")
    source = SHARED / "golden" / "glsim_cos.pth"
    arguments = {"checkpoint": str(source), "bundle": str(tmp_path / "b"), "labels": str(tmp_path / "names.txt")}
    result = convert_checkpoint(**arguments)
    assert "anchor_class_token" in result.ignored and result.missing == []
    assert result.used["head.weight"] == "head.linear.weight"
    model = glsim.load(tmp_path / "b")
    assert model.config.label_names == list("abcdefg")
    images = torch.randn(1, 3, 64, 64)
    assert_same_weights(model, glsim.load(source))
    torch.testing.assert_close(model(images).logits, glsim.load(source)(images).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="already holds a bundle"):
        convert_checkpoint(**arguments)
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError, match="2 labels for a model of 7 classes"):
        convert_checkpoint(**{**arguments, "bundle": str(tmp_path / "c")})


@needs(SHARED / "golden")
def test_a_checkpoint_of_another_design_is_refused(tmp_path):
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        file = torch.load(SHARED / "golden" / "glsim_cos.pth", weights_only=True)
    file["config"].aggregator_type = "conv"
    torch.save(file, tmp_path / "x.pth")
    with pytest.raises(DataError, match="trained with aggregator_type='conv', which has no equal here"):
        glsim.load(tmp_path / "x.pth")
    file["config"].aggregator_type = "transformer"
    del file["model"]["model.encoder_norm.bias"]
    torch.save(file, tmp_path / "y.pth")
    with pytest.raises(
        DataError,
        match=r"missing: backbone.net.norm.bias; of another shape: none; ignored: anchor_class_token; \d+ used",
    ):
        glsim.load(tmp_path / "y.pth")
    with pytest.raises(DataError, match="is no GLSim checkpoint"):
        glsim.load(SHARED / "golden" / "transfg.pth")


def as_npz(net, path):
    """The weights of a timm ViT in the layout of its authors' .npz files, the kernels input first."""
    dim, heads = net.embed_dim, net.blocks[0].attn.num_heads
    w = {
        "embedding/kernel": net.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": net.patch_embed.proj.bias,
        "cls": net.cls_token,
        "Transformer/posembed_input/pos_embedding": net.pos_embed,
        "Transformer/encoder_norm/scale": net.norm.weight,
        "Transformer/encoder_norm/bias": net.norm.bias,
    }
    for i, block in enumerate(net.blocks):
        root = f"Transformer/encoderblock_{i}/"
        for name, weight, bias in zip(
            ("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
        ):
            w[f"{root}MultiHeadDotProductAttention_1/{name}/kernel"] = weight.T.reshape(dim, heads, -1)
            w[f"{root}MultiHeadDotProductAttention_1/{name}/bias"] = bias.reshape(heads, -1)
        w[f"{root}MultiHeadDotProductAttention_1/out/kernel"] = block.attn.proj.weight.T.reshape(heads, -1, dim)
        w[f"{root}MultiHeadDotProductAttention_1/out/bias"] = block.attn.proj.bias
        for ours, theirs in ((block.norm1, "LayerNorm_0"), (block.norm2, "LayerNorm_2")):
            w[f"{root}{theirs}/scale"], w[f"{root}{theirs}/bias"] = ours.weight, ours.bias
        for j, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            w[f"{root}MlpBlock_3/Dense_{j}/kernel"] = layer.weight.T
            w[f"{root}MlpBlock_3/Dense_{j}/bias"] = layer.bias
    np.savez(path, **{k: v.detach().numpy() for k, v in w.items()})


def test_the_vit_authors_npz_is_a_start_for_every_grid(tmp_path):
    source = small_model("plain", seed=1)
    as_npz(source.backbone.net, tmp_path / "ViT.npz")
    same = small_model("glsim", seed=2)
    start = init_from(same, tmp_path / "ViT.npz")
    assert start.convention == "ViT authors (.npz)" and start.missing == []
    assert start.new and not any(k.startswith("backbone.") for k in start.new)
    images = torch.randn(2, 3, 64, 64)
    assert_same_weights(same.backbone, source.backbone)
    torch.testing.assert_close(same.features(images).patches, source.features(images).patches, atol=1e-5, rtol=1e-5)
    overlapping = small_model("transfg", size=(64, 96), seed=2)  # 5 x 7 places instead of 4 x 4
    init_from(overlapping, tmp_path / "ViT.npz")
    net = overlapping.backbone.net
    assert torch.equal(net.blocks[1].mlp.fc1.weight, source.backbone.net.blocks[1].mlp.fc1.weight)
    old, new = source.backbone.net.pos_embed[0, 1:].view(4, 4, -1), net.pos_embed[0, 1:].view(5, 7, -1)
    wanted = torch.nn.functional.interpolate(old.permute(2, 0, 1)[None], (5, 7), mode="bilinear")[0].permute(1, 2, 0)
    torch.testing.assert_close(new, wanted)


def test_a_wrong_npz_changes_nothing(tmp_path):
    model = small_model("plain")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (tmp_path / "damaged.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(DataError, match="damaged.npz cannot be read"):
        init_from(model, tmp_path / "damaged.npz")
    with pytest.raises(DataError, match="none.npz cannot be read"):
        init_from(model, tmp_path / "none.npz")
    with pytest.raises(ConfigError, match="other.npz does not fit 'vit_tiny_patch16_224': it holds nothing for"):
        init_from(model, tmp_path / "other.npz")
    wide = small_model("plain", backbone="vit_tiny_patch16_224")
    as_npz(wide.backbone.net, tmp_path / "wide.npz")
    narrow = glsim.create_model("plain", "vit_tiny_patch16_224", 5, 64, backbone_args={**SMALL, "embed_dim": 32})
    with pytest.raises(ConfigError, match="wide.npz does not fit 'vit_tiny_patch16_224'"):
        init_from(narrow, tmp_path / "wide.npz")
    with pytest.raises(ConfigError, match="wide.npz does not fit 'resnet18'"):
        init_from(glsim.create_model("plain", "resnet18", 5, 64), tmp_path / "wide.npz")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@needs(SHARED / "golden")
@pytest.mark.parametrize("method", ["transfg", "ffvt"])
def test_competitors_checkpoints_convert(method, tmp_path):
    options = {"num_heads": 2, **({"top_k": 3} if method == "ffvt" else {"stride": 12})}
    result = convert_checkpoint(
        checkpoint=str(SHARED / "golden" / f"{method}.pth"),
        bundle=str(tmp_path / "b"),
        method=method,
        options=options,
    )
    assert result.missing == [] and glsim.load(tmp_path / "b").config.method == method
