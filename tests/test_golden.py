"""The publishers' networks, number by number: checkpoints in their format, and what they compute."""

import pytest
import torch
from conftest import SHARED, needs
from safetensors import safe_open
from safetensors.torch import load_file

import glsim

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
        assert m.config["options"]["metric"] == f"gls_{about['sim_metric']}"
        assert m.config["options"]["top_o"] == int(about["top_o"])
        assert m.config["options"]["classifier"] == about["classifier"]
        with torch.inference_mode():
            output = m(truth["images"])
            f = m.features(truth["images"], attention=True)
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


def test_attention_map_agrees():
    truth = load_file(GOLDEN / "selection_maps.safetensors")
    logits = tuple(truth["attention_logits"])
    f = glsim.Features(torch.zeros(2, 8), torch.zeros(2, 16, 8), (4, 4), 1, logits)
    torch.testing.assert_close(glsim.METRICS["attention"](f)[:, 0], truth["attention_last"], atol=1e-5, rtol=0)


def test_options_can_be_overridden():
    truth = load_file(GOLDEN / "glsim_cos.safetensors")
    model = glsim.load(GOLDEN / "glsim_cos.pth", top_o=2, box="inclusive")
    assert model(truth["images"]).selection.indices.shape == (3, 2)
    larger = glsim.load(GOLDEN / "glsim_cos.pth", image_size=96)
    assert larger(torch.zeros(1, 3, 96, 96)).selection.grid == (6, 6)
