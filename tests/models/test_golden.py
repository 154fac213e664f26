"""The publishers' networks, number by number: checkpoints in their format, and what they compute."""

import pytest
import torch
from conftest import SHARED, needs
from safetensors import safe_open
from safetensors.torch import load_file

import glsim
from glsim.models.scores import find_metric, mutual_attention

GOLDEN = SHARED / "golden"
pytestmark = needs(GOLDEN)
CASES = ["glsim_cos", "glsim_cos_grid12", "glsim_l1", "glsim_l2", "glsim_avg_cls"]


@pytest.mark.parametrize("name", CASES)
def test_glsim_agrees_with_the_published_network(name, tmp_path):
    truth = load_file(GOLDEN / f"{name}.safetensors")
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
        about = f.metadata()
    model = glsim.load(GOLDEN / f"{name}.pth")
    glsim.save(model, tmp_path / "bundle")
    for m in (model, glsim.load(tmp_path / "bundle")):
        assert m.config.options["metric"] == f"gls_{about['sim_metric']}"
        assert m.config.options["top_o"] == int(about["top_o"])
        assert m.config.options["classifier"] == about["classifier"]
        with torch.inference_mode():
            output = m(truth["images"])
            f = m.features(truth["images"], attention=True)
            maps = m.features(truth["images"], attention="maps").attention_maps
        torch.testing.assert_close(output.logits, truth["logits"], atol=1e-4, rtol=0)
        assert torch.equal(output.selection.indices, truth["top_indices"].long())
        assert torch.equal(output.selection.boxes, truth["boxes_ltrb"].long())
        torch.testing.assert_close(output.crops, truth["crops"], atol=1e-4, rtol=0)
        sign = 1 if about["sim_metric"] == "cos" else -1
        torch.testing.assert_close(sign * output.selection.scores, truth["similarity"], atol=1e-5, rtol=0)
        tokens = torch.cat((f.cls[:, None], f.patches), dim=1)
        torch.testing.assert_close(tokens, truth["tokens"], atol=1e-4, rtol=0)
        for i, logits in enumerate(f.attention_logits):
            torch.testing.assert_close(logits.softmax(dim=-1), truth[f"attention_{i}"], atol=1e-5, rtol=0)
            torch.testing.assert_close(maps[i], truth[f"attention_{i}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_accounted_for(name):
    model = glsim.load(GOLDEN / f"{name}.pth")
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        keys = {k.removeprefix("model.") for k in torch.load(GOLDEN / f"{name}.pth", weights_only=True)["model"]}
    used, ignored, missing = model.conversion
    assert set(used) | set(ignored) == keys
    assert not set(used) & set(ignored)
    assert set(used.values()) == set(model.state_dict())
    assert missing == []
    assert "anchor_class_token" in ignored


def maps():
    truth = load_file(GOLDEN / "selection_maps.safetensors")
    logits = tuple(truth["attention_logits"])
    return truth, glsim.Features(torch.zeros(2, 8), torch.zeros(2, 16, 8), (4, 4), 1, logits)


@pytest.mark.parametrize(
    ("metric", "name"),
    [("attention", "attention_last"), ("rollout", "rollout"), ("psm", "psm_sum"), ("maws:block=-1", "maws_last")],
)
def test_selection_maps_agree(metric, name):
    truth, f = maps()
    torch.testing.assert_close(find_metric(metric)(f).sum(dim=1), truth[name], atol=1e-5, rtol=0)


def test_selected_tokens_agree():
    truth, f = maps()
    assert torch.equal(glsim.METRICS["psm"](f).argmax(dim=-1), truth["psm_head_argmax"].long())
    order = mutual_attention(f, f.attention_logits[-1]).argsort(dim=-1, descending=True)
    assert torch.equal(order, truth["ffvt_maws_order"].long())


# What the files do not hold.
SIZES = {
    "transfg": {"num_heads": 2, "image_size": 64, "patch_size": 16, "stride": 12},
    "ffvt": {"num_heads": 2, "image_size": 64, "patch_size": 16, "top_k": 3},
}


@pytest.mark.parametrize("name", SIZES)
def test_competitors_agree_with_the_published_network(name, tmp_path):
    truth = load_file(GOLDEN / f"{name}.safetensors")
    model = glsim.load(GOLDEN / f"{name}.pth", method=name, **SIZES[name])
    assert model.conversion.missing == [] and model.conversion.ignored == {}
    glsim.save(model, tmp_path / "bundle")
    for m in (model, glsim.load(tmp_path / "bundle")):
        with torch.inference_mode():
            output = m(truth["images"])
        torch.testing.assert_close(output.logits, truth["logits"], atol=1e-4, rtol=0)
        selected = truth["selected"].long()
        if name == "ffvt":  # token indices, 0 the class token; ours are patches, -1 none
            selected = selected.flatten(1) - 1
        assert torch.equal(output.selection.indices, selected)


def test_the_class_token_of_transfg_agrees():
    truth = load_file(GOLDEN / "transfg.safetensors")
    model = glsim.load(GOLDEN / "transfg.pth", method="transfg", **SIZES["transfg"]).train()
    torch.testing.assert_close(model(truth["images"]).aux["contrastive"], truth["cls_token"], atol=1e-4, rtol=0)


def test_sizes_default_to_the_paper_s_and_positions_are_resampled():
    sizes = SIZES["transfg"]
    model = glsim.load(GOLDEN / "transfg.pth", method="transfg", num_heads=2)
    assert model.config.image_size == [64, 64] and model.backbone.grid == (5, 5)  # 25 positions, 12 of 16 pixels
    larger = glsim.load(GOLDEN / "transfg.pth", method="transfg", **{**sizes, "image_size": (64, 112)})
    assert larger(torch.zeros(1, 3, 64, 112)).selection.grid == (5, 9)
    assert glsim.load(GOLDEN / "ffvt.pth", method="ffvt").backbone.net.blocks[0].attn.num_heads == 1  # 64 wide


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("transfg", {"patch_size": 8}, "was made for patches of 16 pixels"),
        ("transfg", {"num_heads": 3}, "num_heads=3: the width of .* is 64"),
        ("ffvt", {"top_k": 17}, "top_k=17, but the grid of the backbone has 16 patches"),
        ("cal", {}, "unknown published method 'cal'; choose from: ffvt, glsim, transfg"),
    ],
)
def test_wrong_sizes_say_what_the_file_holds(method, words, message):
    with pytest.raises(glsim.ConfigError, match=message):
        glsim.load(GOLDEN / f"{method if method != 'cal' else 'ffvt'}.pth", method=method, **words)


def test_the_wrong_method_is_named():
    with pytest.raises(glsim.DataError, match="transfg.pth is no ffvt checkpoint: .* is missing"):
        glsim.load(GOLDEN / "transfg.pth", method="ffvt")


def test_options_can_be_overridden():
    truth = load_file(GOLDEN / "glsim_cos.safetensors")
    model = glsim.load(GOLDEN / "glsim_cos.pth", top_o=2, box="inclusive")
    assert model(truth["images"]).selection.indices.shape == (3, 2)
    larger = glsim.load(GOLDEN / "glsim_cos.pth", image_size=96)
    assert larger(torch.zeros(1, 3, 96, 96)).selection.grid == (6, 6)
