"""Weights of every convention start a model that answers as timm's network does; what does not fit is refused."""

import json
import os
import pickle
import re
import zipfile

import numpy as np
import publishers
import pytest
import timm
import torch
from conftest import SHARED, needs
from safetensors.torch import save_file

import glsim
from glsim import ConfigError, DataError, cli
from glsim.checkpoints.bundle import default_preprocessing
from glsim.checkpoints.conventions import read_weights
from glsim.checkpoints.examine import examine_weights
from glsim.checkpoints.fit import filtered
from glsim.checkpoints.init_from import init_from
from glsim.checkpoints.sizes import fitting_names, hollow, sizes_of, with_tag

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
STAGES = {"depths": (2, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}
MAPS = {"depths": (1, 2, 1, 1), "dims": (8, 16, 32, 64)}
SHARED_POSITIONS = "shared"  # mark of a network whose blocks share their relative positions

# what is written -> (timm's name, its arguments, how it is written, the convention that has to be told)
PUBLISHED = {
    "timm": ("vit_tiny_patch16_224", VIT, dict, "timm ViT"),
    "timm ConvNeXt": ("convnext_atto", MAPS, dict, "timm ConvNeXt"),
    "timm ResNet": ("resnet18", {}, lambda s: s | {"fc.weight": torch.ones(7, 512)}, "ResNet"),
    "timm SigLIP": ("vit_base_patch16_siglip_224", VIT, dict, "timm ViT"),
    "other network of timm": ("regnetx_002", {}, lambda s: {f"net.{k}": v for k, v in s.items()}, "timm"),
    "DINO": ("vit_tiny_patch16_224", VIT, publishers.dino, "DINO"),
    "DINOv2": ("vit_small_patch14_dinov2", VIT, publishers.dinov2, "DINOv2"),
    "DINOv2 SwiGLU": ("vit_giant_patch14_dinov2", VIT | {"mlp_ratio": 4}, publishers.dinov2_swiglu, "DINOv2"),
    "DINOv2 registers": (
        "vit_small_patch14_reg4_dinov2",
        VIT,
        publishers.dinov2_registers,
        "DINOv2 with registers",
    ),
    "DINOv3": ("vit_small_patch16_dinov3", VIT, publishers.dinov3, "DINOv3"),
    "DINOv3 with biases": ("vit_small_patch16_dinov3_qkvb", VIT, publishers.dinov3, "DINOv3"),
    "DINOv3 SwiGLU": ("vit_small_plus_patch16_dinov3", VIT, publishers.dinov3, "DINOv3"),
    "MAE": ("vit_tiny_patch16_224", VIT, publishers.mae, "MAE"),
    "MAE, patches pooled": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg"}, publishers.mae, "MAE"),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", VIT, publishers.deit_distilled, "DeiT distilled"),
    "DeiT III": ("deit3_small_patch16_224", VIT, publishers.deit3, "timm ViT"),
    "BEiT": ("beit_base_patch16_224", VIT, publishers.beit, "BEiT"),
    "BEiT pre-trained": ("beit_base_patch16_224", VIT, publishers.beit_pretrained, "BEiT"),
    "BEiT v2": ("beitv2_base_patch16_224", VIT, publishers.beit, "BEiT"),
    "EVA": ("eva_giant_patch14_224", VIT, publishers.eva, "EVA"),
    "EVA-02": ("eva02_base_patch16_clip_224", VIT, publishers.eva02, "EVA-02"),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", VIT, publishers.clip, "CLIP"),
    "open_clip with timm": ("vit_base_patch16_clip_224", VIT, publishers.open_clip_trunk, "timm ViT"),
    "Swin": ("swin_tiny_patch4_window7_224", STAGES, publishers.swin, "Swin"),
    "ConvNeXt": ("convnext_tiny", MAPS, publishers.convnext, "ConvNeXt"),
    "ConvNeXt V2": ("convnextv2_tiny", MAPS, publishers.convnext, "ConvNeXt"),
    "HF ViT": ("vit_tiny_patch16_224", VIT, publishers.hf_vit, "Hugging Face ViT"),
    "HF ViTModel": ("vit_tiny_patch16_224", VIT, publishers.hf_vit_model, "Hugging Face ViT"),
    "HF DeiT": ("deit_tiny_distilled_patch16_224", VIT, publishers.hf_deit, "Hugging Face DeiT"),
    "HF DINOv2": ("vit_small_patch14_dinov2", VIT, publishers.hf_dinov2, "Hugging Face DINOv2"),
    "HF DINOv2 SwiGLU": (
        "vit_giant_patch14_dinov2",
        VIT | {"mlp_ratio": 4},
        publishers.hf_dinov2_swiglu,
        "Hugging Face DINOv2",
    ),
    "HF DINOv2 registers": (
        "vit_small_patch14_reg4_dinov2",
        VIT,
        publishers.hf_dinov2_registers,
        "Hugging Face DINOv2 with registers",
    ),
    "HF DINOv3": ("vit_small_patch16_dinov3_qkvb", VIT, publishers.hf_dinov3, "Hugging Face DINOv3"),
    "HF DINOv3, zero biases": ("vit_small_patch16_dinov3", VIT, publishers.hf_dinov3_silent, "Hugging Face DINOv3"),
    "HF DINOv3 SwiGLU": ("vit_small_plus_patch16_dinov3", VIT, publishers.hf_dinov3, "Hugging Face DINOv3"),
    "HF BEiT": ("beit_base_patch16_224", VIT, publishers.hf_beit, "Hugging Face BEiT"),
    "HF Swin": ("swin_tiny_patch4_window7_224", STAGES, publishers.hf_swin, "Hugging Face Swin"),
    "HF ConvNeXt": ("convnext_tiny", MAPS, publishers.hf_convnext, "Hugging Face ConvNeXt"),
    "HF ConvNeXt V2": ("convnextv2_tiny", MAPS, publishers.hf_convnext, "Hugging Face ConvNeXt"),
    "HF CLIP": ("vit_base_patch16_clip_quickgelu_224", VIT, publishers.hf_clip, "Hugging Face CLIP"),
    "TransFG authors": ("vit_tiny_patch16_224", VIT, publishers.transfg, "TransFG and FFVT authors"),
}


def network(name, args, size, seed=0):
    """A network of timm in which every tensor says something."""
    torch.manual_seed(seed)
    sized = {} if name.startswith(("convnext", "resnet", "regnet")) else {"img_size": size}
    net = timm.create_model(name, num_classes=0, **sized, **args).eval()
    for key, p in net.state_dict().items():
        if p.is_floating_point() and "running" not in key:
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.ndim == 1 and key.endswith("weight") else 0.0))
    return net


def side(name):
    return 28 if "patch14" in name else 32


def model_of(name, args, size, classes=5, **more):
    torch.manual_seed(1)
    model = glsim.create_model("plain", name, classes, size, backbone_args=args, **more).eval()
    torch.manual_seed(2)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("kind", PUBLISHED)
def test_every_convention_answers_as_timms_network_at_every_size(kind, tmp_path):
    name, args, write, told = PUBLISHED[kind]
    small = side(name) * 2
    source = network(name, args, small)
    state = source.state_dict()
    if kind == "BEiT pre-trained":
        tables = [k for k in state if k.endswith("relative_position_bias_table")]
        for key in tables[1:]:
            state[key].copy_(state[tables[0]])
    torch.save(write(state), tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").convention.name == told
    for size in (small, small + side(name)):
        if size != small and "window7" in name:
            size = small * 2
        wanted, model = model_of(name, args, size), model_of(name, args, size, weights=tmp_path / "w.pth")
        wanted.backbone.net.load_state_dict(filtered(state, wanted.backbone.net))
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert wanted(images).logits.std() > 1e-3
            torch.testing.assert_close(model(images).logits, wanted(images).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_every_tensor_of_a_file_is_used_or_ignored_for_a_reason(kind, tmp_path):
    name, args, write, _ = PUBLISHED[kind]
    size = side(name) * 2
    torch.save(write(network(name, args, size).state_dict()), tmp_path / "w.pth")
    weights = read_weights(tmp_path / "w.pth")
    model = model_of(name, args, size)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = init_from(model, tmp_path / "w.pth")
    assert set(start.used).isdisjoint(start.ignored)
    assert set(start.used) | set(start.ignored) == set(weights.stored)
    assert start.missing == [] and not start.resampled
    assert all(start.ignored.values())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    given = {n for names in start.used.values() for n in names.replace("backbone.net.", "").split(", ")}
    assert {k.removeprefix("backbone.net.") for k in changed} <= given | {"head.weight"}
    assert set(start.new) <= {"head.weight", "head.bias"}


# --- formats and wrappers ---------------------------------------------------------------------------------------------


def below(prefix):
    return lambda state: {f"{prefix}{k}": v for k, v in state.items()}


WRAPPED = {
    "bare": dict,
    "state_dict": lambda s: {"state_dict": s, "epoch": 7},
    "model": lambda s: {"model": s, "optimizer": {"param_groups": [{"lr": 0.1}]}},
    "module.": below("module."),
    "compiled, of several processes": below("module._orig_mod."),
    "backbone.": below("backbone."),
    "Lightning": lambda s: {"state_dict": below("model.")(s), "hyper_parameters": {"lr": 0.1}, "global_step": 3},
    "Lightning, net.": lambda s: {"state_dict": below("net.")(s)},
    "encoder.": below("encoder."),
    "averaged weights first": lambda s: {"state_dict": below("x.")({}), "model_ema": s, "model": below("module.")(s)},
    "state_dict_ema": lambda s: {"state_dict_ema": s, "state_dict": {k: torch.zeros_like(v) for k, v in s.items()}},
    "teacher before student": lambda s: {f"student.{k}": v * 0 for k, v in s.items()} | below("teacher.backbone.")(s),
    "wrappers in wrappers": lambda s: {"model": {"state_dict": {"module": below("module.backbone.")(s)}}},
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.fixture(scope="module")
def vit():
    return network("vit_tiny_patch16_224", VIT, 32)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_whatever_stands_around_the_names_is_taken_off(wrapped, vit, tmp_path):
    torch.save(WRAPPED[wrapped](vit.state_dict()), tmp_path / "w.ckpt")
    model = model_of("vit_tiny_patch16_224", VIT, 32, weights=tmp_path / "w.ckpt")
    rounding = 1e-3 if wrapped == "half precision" else 0
    for key, tensor in vit.state_dict().items():
        torch.testing.assert_close(model.backbone.net.state_dict()[key], tensor, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("ending", ["safetensors", "pth", "pt", "bin", "ckpt"])
def test_every_kind_of_file_is_read(ending, vit, tmp_path):
    file = tmp_path / f"w.{ending}"
    (save_file if ending == "safetensors" else torch.save)(vit.state_dict(), file)
    model = model_of("vit_tiny_patch16_224", VIT, 32, weights=str(file))
    assert all(torch.equal(model.backbone.net.state_dict()[k], v) for k, v in vit.state_dict().items())


def test_kernels_of_another_patch_are_resampled_and_told(vit, tmp_path):
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    model = glsim.create_model("plain", "vit_tiny_patch16_224", 5, 56, backbone_args=VIT | {"patch_size": 14})
    start = init_from(model, tmp_path / "w.safetensors")
    assert start.resampled == {
        "backbone.net.patch_embed.proj.weight": "[32, 3, 16, 16] to [32, 3, 14, 14]",
        "backbone.net.pos_embed": "[1, 5, 32] to [1, 17, 32]",
    }
    assert "pos_embed resampled from [1, 5, 32] to [1, 17, 32]" in str(start)


def test_parts_of_a_method_are_new_and_named(vit, tmp_path):
    save_file(vit.state_dict() | {"head.weight": torch.ones(7, 32)}, tmp_path / "w.safetensors")
    model = glsim.create_model("glsim", "vit_tiny_patch16_224", 5, 32, backbone_args=VIT, top_o=2)
    start = init_from(model, tmp_path / "w.safetensors")
    own = {k for k in model.state_dict() if not k.startswith("backbone.")}
    assert set(start.new) == own and start.ignored == {"head.weight": "head"} and start.missing == []
    assert re.fullmatch(
        r"w.safetensors \(timm ViT\): \d+ tensors used, 1 ignored \(head\); new: aggregator, head", str(start)
    )


def test_a_bundle_gives_the_parts_of_its_method_and_needs_no_file_of_its_own(vit, tmp_path):
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    options = {"backbone_args": VIT, "top_o": 2}
    first = glsim.create_model("glsim", "vit_tiny_patch16_224", 5, 32, weights=tmp_path / "w.safetensors", **options)
    glsim.save(first, tmp_path / "b")
    assert "w.safetensors" not in (tmp_path / "b" / "config.json").read_text()
    (tmp_path / "w.safetensors").unlink()
    assert glsim.load(tmp_path / "b").config.options == first.config.options
    again = glsim.create_model("glsim", "vit_tiny_patch16_224", 5, 48, weights=tmp_path / "b", **options)
    for key, tensor in first.state_dict().items():
        assert key.endswith("pos_embed") or torch.equal(again.state_dict()[key], tensor), key
    other = glsim.create_model("glsim", "vit_tiny_patch16_224", 7, 32, **options)
    start = init_from(other, tmp_path / "b")
    assert start.ignored["head.linear.weight"] == "another part of a method" and "head.linear.weight" in start.new
    assert start.convention == "glsim bundle (timm ViT)"


def test_a_bundle_cannot_name_a_file_of_weights(vit, tmp_path):
    glsim.save(glsim.create_model("plain", "vit_tiny_patch16_224", 5, 32, backbone_args=VIT), tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["options"]["weights"] = str(tmp_path / "w.safetensors")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="has no option weights"):
        glsim.load(tmp_path / "b")


@needs(SHARED / "golden")
@pytest.mark.parametrize("name", ["glsim_cos", "glsim_avg_cls", "glsim_l1", "glsim_cos_grid12", "transfg", "ffvt"])
def test_checkpoints_of_the_methods_authors_start_any_method(name):
    source, method = SHARED / "golden" / f"{name}.pth", name.partition("_")[0]
    options = {} if method == "glsim" else {"num_heads": 2, **({"stride": 12} if method == "transfg" else {"top_k": 3})}
    wanted = glsim.load(source, method=method, **options)
    config = wanted.config
    model = glsim.create_model(
        method,
        config.backbone,
        config.num_classes,
        config.image_size,
        backbone_args=config.backbone_args,
        weights=source,
        **config.options,
    )
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in wanted.state_dict().items())
    plain = glsim.create_model(
        "plain", config.backbone, 3, config.image_size, backbone_args=config.backbone_args, weights=source
    )
    assert torch.equal(plain.backbone.net.norm.weight, wanted.backbone.net.norm.weight)


def test_preprocessing_is_that_of_the_name():
    """As with pretrained weights: a tag of timm's brings its own mean and deviation."""
    clip = default_preprocessing("vit_base_patch16_clip_quickgelu_224", (224, 224))
    assert clip.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert default_preprocessing("vit_small_patch14_dinov2", (168, 168)).mean == (0.485, 0.456, 0.406)
    assert default_preprocessing("vit_base_patch16_224", (224, 224)).mean == (0.5, 0.5, 0.5)
    assert with_tag("vit_base_patch16_224", ("mae",)) == "vit_base_patch16_224.mae"
    assert default_preprocessing("vit_base_patch16_224.mae", (224, 224)).mean == (0.485, 0.456, 0.406)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_dinov2(tmp_path_factory):
    """A file of the shapes of DINOv2-S/14 with one block, which no network of timm has."""
    net = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=1, img_size=56)
    file = tmp_path_factory.mktemp("w") / "dinov2.safetensors"
    save_file(net.state_dict(), file)
    return file


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [
        ("vit_small_patch14_dinov2", {"depth": 2}, "it holds nothing for blocks.1.attn.proj.bias"),
        ("vit_tiny_patch16_224", VIT, r"blocks.0.attn.proj.bias is \[384\], \[32\] is needed"),
        ("vit_small_patch16_224", {"depth": 1}, "the network has no blocks.0.ls1.gamma"),
        ("vit_small_patch14_reg4_dinov2", {"depth": 1}, "nothing for reg_token"),
        ("resnet18", {}, "the network has no"),
        ("convnext_atto", {}, "its tensors are not those of ConvNeXt"),
        ("swin_tiny_patch4_window7_224", {}, "it holds nothing for"),
        ("vit_small_patch16_dinov3", {"depth": 1}, "it holds nothing for blocks.0.gamma_1"),
        ("beit_base_patch16_224", {"depth": 1}, "its tensors are not those of Beit"),
    ],
)
def test_another_size_or_family_is_refused_with_the_sizes_it_has(name, args, why, small_dinov2, monkeypatch):
    monkeypatch.setattr("glsim.checkpoints.init_from.fitting_names", lambda _: ["vit_a", "vit_b"])
    size = 64 if "patch14" not in name else 56
    model = glsim.create_model("plain", name, 5, size, backbone_args=args)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"dinov2.safetensors does not fit '{name}'.*{why}") as error:
        init_from(model, small_dinov2)
    assert "width 384, depth 1, patch 14, MLP 1536, layer scale, 16 positions (4x4)" in str(error.value)
    assert str(error.value).endswith("timm's networks that take it: vit_a, vit_b")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_deeper_file_is_not_cut_without_a_word(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("glsim.checkpoints.init_from.fitting_names", lambda _: [])
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="the network has no blocks.1.attn.proj.bias.*no network of timm is known"):
        glsim.create_model(
            "plain", "vit_tiny_patch16_224", 5, 32, backbone_args=VIT | {"depth": 1}, weights=tmp_path / "w.safetensors"
        )


def test_a_bias_that_says_something_is_not_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("glsim.checkpoints.init_from.fitting_names", lambda _: [])
    torch.save(publishers.dinov3(network("vit_small_patch16_dinov3_qkvb", VIT, 32).state_dict()), tmp_path / "w.pth")
    model = glsim.create_model("plain", "vit_small_patch16_dinov3", 5, 32, backbone_args=VIT)
    with pytest.raises(ConfigError, match=r"the network has no blocks.0.attn.qkv.bias"):
        init_from(model, tmp_path / "w.pth")


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (eval, (f"__import__('pathlib').Path({str(self.mark)!r}).touch()",))


def quantized():
    return torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)


HOSTILE = {
    "NaN": (
        lambda s: s | {"norm.weight": s["norm.weight"] * float("nan")},
        "not every number is finite in norm.weight",
    ),
    "infinite head": (lambda s: s | {"head.bias": torch.tensor([float("inf")])}, "not every number is finite"),
    "complex": (
        lambda s: s | {"cls_token": torch.ones(1, 1, 32, dtype=torch.complex64)},
        "no numbers of type complex64",
    ),
    "sparse": (lambda s: s | {"cls_token": torch.eye(3).to_sparse()}, "no weights under cls_token"),
    "one number repeated": (lambda s: s | {"pos_embed": torch.ones(1).expand(1, 10**12, 32)}, "under pos_embed"),
    "bytes": (lambda s: s | {"cls_token": torch.ones(1, 1, 32, dtype=torch.uint8)}, "no numbers of type uint8"),
    "eight bits": (lambda s: s | {"cls_token": torch.ones(1, 1, 32).to(torch.float8_e5m2)}, "of type float8_e5m2"),
    "names that are none": (lambda s: s | {5: torch.ones(1)}, "no weights under 5"),
    "no tensors": (lambda _: {"epoch": 3, "lr": 0.1}, "holds no tensors by name, but epoch, lr"),
    "a list": (lambda s: list(s.values()), "holds no tensors by name, but list"),
    "a tensor": (lambda s: s["cls_token"], "holds no tensors by name, but Tensor"),
    "nothing": (lambda _: {}, "holds no tensors by name, but nothing"),
    "wrappers without end": (lambda s: nested(s, 30), "holds no tensors by name, but model"),
    "itself": (lambda _: endless(), "holds no tensors by name, but model"),
}


def nested(state, times):
    for _ in range(times):
        state = {"model": state}
    return state


def endless():
    held = {}
    held["model"] = held
    return held


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_weights_are_is_refused(kind, vit, tmp_path):
    make, said = HOSTILE[kind]
    torch.save(make(vit.state_dict()), tmp_path / "w.pth")
    with pytest.raises(DataError, match=rf"w\.pth .*{re.escape(said)}"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("whole numbers", lambda t: t.to(torch.int64), "blocks.0.norm1.weight is of int64"),
        ("flat", lambda t: t[:0], r"blocks.0.norm1.weight is \[0\], \[32\] is needed"),
        ("of many axes", lambda t: t.reshape(1, 1, 1, 1, 32), r"is \[1, 1, 1, 1, 32\]"),
    ],
)
@pytest.mark.parametrize("key", ["blocks.0.norm1.weight"])
def test_tensors_of_another_kind_are_refused(name, tensor, said, key, vit, tmp_path, monkeypatch):
    monkeypatch.setattr("glsim.checkpoints.init_from.fitting_names", lambda _: [])
    state = vit.state_dict()
    torch.save(state | {key: tensor(state[key])}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=said):
        model_of("vit_tiny_patch16_224", VIT, 32, weights=tmp_path / "w.pth")


ABSURD = {
    "patch of nothing": ("patch_embed.proj.weight", lambda: torch.ones(32, 3, 0, 0)),
    "flat patch": ("patch_embed.proj.weight", lambda: torch.ones(32)),
    "number for a patch": ("patch_embed.proj.weight", lambda: torch.ones(())),
    "positions of one axis": ("pos_embed", lambda: torch.ones(7)),
    "no positions": ("pos_embed", lambda: torch.ones(1, 0, 32)),
    "long positions": ("pos_embed", lambda: torch.ones(1, 100_003, 1)),
    "block without a number": ("blocks.x.norm1.weight", lambda: torch.ones(32)),
    "block of a large number": (f"blocks.{10**30}.norm1.weight", lambda: torch.ones(32)),
    "registers of no axis": ("reg_token", lambda: torch.ones(())),
    "table of no axis": ("blocks.0.attn.relative_position_bias_table", lambda: torch.ones(())),
    "gate of no axis": ("blocks.0.mlp.w12.weight", lambda: torch.ones(())),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_shapes_are_told_of_and_refused(kind, vit, tmp_path, monkeypatch):
    monkeypatch.setattr("glsim.checkpoints.init_from.fitting_names", lambda _: [])
    key, make = ABSURD[kind]
    torch.save(vit.state_dict() | {key: make()}, tmp_path / "w.pth")
    str(sizes_of(read_weights(tmp_path / "w.pth")))
    with pytest.raises(ConfigError, match="does not fit"):
        model_of("vit_tiny_patch16_224", VIT, 32, weights=tmp_path / "w.pth")


@pytest.mark.parametrize("ending", ["safetensors", "pth", "pt", "bin", "ckpt", "npz"])
def test_pickles_with_code_pipes_and_broken_files_are_refused(ending, tmp_path):
    mark, file = tmp_path / "ran", tmp_path / f"w.{ending}"
    torch.save({"model": {"cls_token": torch.ones(1)}, "args": Evil(mark)}, file)
    with pytest.raises(DataError, match=rf"w\.{ending} "):
        read_weights(file)
    file.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(DataError, match=rf"w\.{ending} "):
        read_weights(file)
    assert not mark.exists()
    for broken in (b"", b"PK\x03\x04", b"\x80\x02}", b"\xff" * 8 + b"{", b"\x02" + bytes(7) + b"{}"):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=rf"w\.{ending} "):
            read_weights(file)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_weights(file)
    os.mkfifo(file)
    with pytest.raises(DataError, match="cannot be read: .*not a regular file"):
        read_weights(file)


def test_code_in_a_checkpoint_is_told_with_the_way_out(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": Evil(tmp_path / "ran")}, tmp_path / "w.ckpt")
    with pytest.raises(DataError, match=r"holds more than tensors and arguments .*torch.save\(network.state_dict\(\)"):
        read_weights(tmp_path / "w.ckpt")
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("ViT-B-32/data.pkl", pickle.dumps(Evil(tmp_path / "ran")))
        archive.writestr("ViT-B-32/constants.pkl", pickle.dumps(()))
    with pytest.raises(DataError, match=r"TorchScript archive, which holds code; .*torch.jit.load\('ViT-B-32.pt'"):
        read_weights(tmp_path / "ViT-B-32.pt")


def test_arrays_that_would_fill_the_memory_are_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", **{"embedding/kernel": np.zeros((16, 16, 3, 10_000), np.float32)})
    with pytest.raises(DataError, match="w.npz was refused: it is smaller than its tensors"):
        read_weights(tmp_path / "w.npz")


# --- what a file is ---------------------------------------------------------------------------------------------------


def test_sizes_are_read_off_the_shapes(tmp_path):
    told = {}
    for kind in ("DINOv2 registers", "DINOv3 SwiGLU", "CLIP", "BEiT", "DeiT distilled", "Swin", "ConvNeXt", "HF ViT"):
        name, args, write, _ = PUBLISHED[kind]
        torch.save(write(network(name, args, side(name) * 2).state_dict()), tmp_path / "w.pth")
        told[kind] = str(sizes_of(read_weights(tmp_path / "w.pth")))
    assert told == {
        "DINOv2 registers": "width 32, depth 2, patch 14, MLP 128, layer scale, 4 registers, 16 positions (4x4)",
        "DINOv3 SwiGLU": "width 32, depth 2, patch 16, 2 heads, MLP 128, SwiGLU, layer scale, 4 registers",
        "CLIP": "width 32, depth 2, patch 16, MLP 128, 16 positions (4x4)",
        "BEiT": "width 32, depth 2, patch 16, 2 heads, MLP 128, layer scale",
        "DeiT distilled": "width 32, depth 2, patch 16, MLP 128, distillation token, 16 positions (4x4)",
        "Swin": "width 24-48-96-192, depth 2-1-1-1, patch 4, 1-2-2-2 heads",
        "ConvNeXt": "width 8-16-32-64, depth 1-2-1-1, patch 4, layer scale",
        "HF ViT": "width 32, depth 2, patch 16, MLP 128, 16 positions (4x4)",
    }


def test_names_that_fit_come_from_timms_networks(tmp_path, monkeypatch):
    """Of a few names, so that the test is fast; the right ones for the file, the likeliest first."""
    names = ["vit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_small_patch16_224", "vit_tiny_r_s16_p8_224"]
    monkeypatch.setattr(
        "timm.list_models", lambda *_, module=None: names if module in (None, "vision_transformer") else []
    )
    net = timm.create_model("vit_tiny_patch16_384", num_classes=0)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    assert fitting_names(read_weights(tmp_path / "w.safetensors")) == ["vit_tiny_patch16_384", "vit_tiny_patch16_224"]
    mae = publishers.mae(net.state_dict())
    torch.save(mae, tmp_path / "w.pth")
    assert set(fitting_names(read_weights(tmp_path / "w.pth"))) == set(names[:2])


def test_networks_without_numbers_have_the_shapes_of_those_with():
    for name in ("vit_tiny_patch16_224", "convnext_atto", "eva02_tiny_patch14_224"):
        wanted = timm.create_model(name, num_classes=0).state_dict()
        found = hollow(name)
        assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in wanted.items()}
        assert all(p.is_meta for p in found.parameters())
    assert hollow("vit_tiny_patch16_224", dept=1) is None
    assert torch.nn.Linear(2, 2).weight.any()  # outside, networks have numbers


@needs(SHARED / "pretrained" / "dinov2_small.safetensors")
def test_the_published_file_gives_timms_features():
    source = SHARED / "pretrained" / "dinov2_small.safetensors"
    model = glsim.create_model("plain", "vit_small_patch14_dinov2", 5, 168, weights=source).eval()
    net = timm.create_model(
        "vit_small_patch14_dinov2",
        pretrained=True,
        num_classes=0,
        img_size=168,
        pretrained_cfg_overlay={"file": str(source), "custom_load": False},
    ).eval()
    images = torch.randn(1, 3, 168, 168)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(images).cls, net(images), atol=1e-5, rtol=1e-5)


@pytest.fixture
def few_names(monkeypatch):
    names = ["vit_tiny_patch16_224", "vit_small_patch16_224"]
    monkeypatch.setattr(
        "timm.list_models", lambda *_, module=None: names if module in (None, "vision_transformer") else []
    )


def test_the_verb_says_what_a_file_is(capsys, tmp_path, few_names):
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save({"model": net.state_dict() | {"head.weight": torch.ones(7, 192)}}, tmp_path / "w.pth")
    assert cli.main(["weights", str(tmp_path / "w.pth")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{tmp_path}/w.pth: timm ViT, wrapped in model",
        "  network     width 192, depth 12, patch 16, MLP 768, 196 positions (14x14)",
        "  parameters  5,524,416 in 150 tensors (float32)",
        "  heads       head.weight [7, 192]",
        "  backbones   vit_tiny_patch16_224",
        f"  train       glsim train --data DATA --out RUN --backbone vit_tiny_patch16_224 --init-from {tmp_path}/w.pth",
    ]
    assert sum(p.numel() for p in net.parameters()) == 5_524_416


def test_the_verb_checks_a_backbone(capsys, tmp_path, few_names):
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    words = ["weights", str(tmp_path / "w.safetensors"), "--backbone"]
    assert cli.main([*words, "vit_tiny_patch16_224", "--image-size", "96", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["checked"]["fits"] and told["checked"]["fit"]["missing"] == []
    assert told["checked"]["fit"]["resampled"] == {"pos_embed": "[1, 197, 192] to [1, 37, 192]"}
    assert len(told["checked"]["fit"]["used"]) == told["tensors"] == 150
    assert cli.main([*words, "vit_small_patch16_224"]) == 4
    out = capsys.readouterr().out
    assert "vit_small_patch16_224: does not fit\n  why         " in out
    assert "--backbone vit_tiny_patch16_224 --init-from" in out
    assert cli.main([*words, "vit_smal_patch16_224"]) == 2
    assert cli.main(["weights", str(tmp_path / "none.pth"), "--json"]) == 3
    capsys.readouterr()
    assert cli.main(["weights", str(tmp_path / "w.safetensors"), "--image-size", "96"]) == 2
    assert "name the --backbone that it is for" in capsys.readouterr().err


def test_training_starts_from_a_file_without_a_network(birds, capsys, tmp_path, vit):
    """`pretrained` stays at its default: the file takes the place of timm's weights."""
    torch.save(publishers.hf_vit(vit.state_dict()), tmp_path / "vit.bin")
    words = ["train", "--data", birds, "--out", tmp_path / "r"]
    words += ["--method", "plain", "--init-from", tmp_path / "vit.bin"]
    words += ["--backbone", "vit_tiny_patch16_224", "--image-size", 32, "--epochs", 1, "--workers", 0, "--lr", 0]
    words += [w for k, v in VIT.items() for w in (f"--backbone-args.{k}", v)]
    assert cli.main([*map(str, words), "--warmup-lr", "0", "--min-lr", "0"]) == 0
    assert "started from vit.bin (Hugging Face ViT): " in capsys.readouterr().out
    state = glsim.load(tmp_path / "r").state_dict()
    assert torch.equal(state["backbone.net.blocks.1.norm2.weight"], vit.blocks[1].norm2.weight)
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["training"]["start"] == "vit.bin" and str(tmp_path) not in json.dumps(config["training"])


def test_examining_changes_nothing(vit, tmp_path, few_names):
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    report = examine_weights(tmp_path / "w.safetensors")
    assert report.backbones == [] and "--backbone NAME --init-from" in report.command
    assert (tmp_path / "w.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
