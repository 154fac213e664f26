"""Operations of whole models: the counter against closed forms."""

import json
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, SMALL
from test_docs import blocks
from torch.utils.flop_counter import FlopCounterMode

from glsim import cli
from glsim.evaluation import flops


def call(capsys, *words):
    assert cli.main(["flops", *words]) == 0
    return capsys.readouterr().out


def test_the_docs_show_what_the_commands_print(capsys):
    pages = blocks(ROOT / "docs" / "cost.md")
    shown = 0
    for command, answer in pairwise(pages):
        if command.text.startswith("glsim flops") and answer.language == "text":
            assert answer.text == call(capsys, *command.text.split()[2:])
            shown += 1
    assert shown == 1


# --- the counter, against closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "gflops"), [(224, 35.1), (448, 157.0)])
def test_vit_base_is_counted_as_its_closed_form(size, gflops):
    model = flops.build("plain", None, size)
    depth, d, patches = 12, 768, (size // 16) ** 2
    n = patches + 1
    blocks = depth * (24 * n * d**2 + 4 * n**2 * d)  # qkv 6, projection 2, MLP 16 n d^2; two products of n^2 d
    assert flops.count(model) == 2 * patches * 16 * 16 * 3 * d + blocks + 2 * 200 * d
    assert round(flops.count(model) / 1e9, 1) == gflops
    assert all(p.is_meta for p in model.parameters())


def test_fused_attention_is_off_while_counting():
    """The count on real tensors, attention spelt out by timm's own switch, is the same."""
    model = flops.build("plain", "vit_tiny_patch16_224", 64, backbone_args=SMALL)
    from glsim import create_model

    real = create_model("plain", "vit_tiny_patch16_224", 200, 64, backbone_args=SMALL).eval()
    for block in real.backbone.net.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        real(torch.zeros(1, 3, 64, 64))
    assert flops.count(model) == counter.get_total_flops() > 0


@pytest.mark.parametrize(("rule", "cosines"), [("published", 1), ("object", 2)])
def test_glsim_is_two_passes_and_an_aggregator(rule, cosines):
    plain, glsim = flops.build("plain", None, 224), flops.build("glsim", None, 224, rule=rule)
    d, others = 768, 196
    gls = cosines * 2 * others * d  # with the class token, and with the border
    last_mlp = 16 * others * d**2  # of the second pass, whose other tokens nobody reads
    aggregator = 24 * 2 * d**2 + 4 * 2**2 * d  # one block over two tokens
    backbone = flops.count(plain) - 2 * 200 * d
    assert flops.count(glsim) == 2 * backbone + gls - last_mlp + aggregator + 2 * 200 * d
    assert round(flops.count_parameters(glsim) / 1e6, 2) == 93.04  # as published, 200 classes


def test_a_whole_model_beside_plain(capsys):
    words = ["--backbone", "vit_tiny_patch16_224"]
    rows = json.loads(call(capsys, *words, "--json"))["rows"]
    assert [r["method"] for r in rows] == ["plain", "glsim"] and rows[0]["image_size"] == [224, 224]
    assert rows[0]["ratio"] == 1 and 1.94 < rows[1]["ratio"] < 1.96
    assert rows[1]["gflops"] / rows[0]["gflops"] == pytest.approx(rows[1]["ratio"], rel=1e-12)
    small = json.loads(call(capsys, *words, "--options.crop_size", "112", "--json"))["rows"][1]["ratio"]
    assert 1.2 < small < 1.25  # 50 tokens of 197, and less of them in n^2
    text = call(capsys, *words, "--method", "plain", "--image-size", "[64,96]")
    assert "2 per multiply-add" in text and "64 x 96 pixels" in text and "glsim" not in text


def test_every_method_can_be_counted(capsys):
    for method, network in (("cal", "resnet18"), ("dcal", "vit_tiny_patch16_224"), ("transfg", "vit_tiny_patch16_224")):
        rows = json.loads(call(capsys, "--method", method, "--backbone", network, "--image-size", "64", "--json"))[
            "rows"
        ]
        assert rows[1]["backbone"] == network and rows[1]["gflops"] > 0
