"""What is counted: the published table to its digits, closed forms against the counter and against loops."""

import json
import math
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, SMALL
from test_docs import blocks
from torch.utils.flop_counter import FlopCounterMode

from glsim import METRICS, Features, cli
from glsim.config import Flops
from glsim.evaluation import flops
from glsim.models.heads import LayerWeights
from glsim.types import ConfigError

# arXiv 2407.12891, Table 1: MFLOPs, percent of the backbone; as printed.
PRINTED = {
    224: "psm 8.2e3 46.531  rollout 1.7e2 0.9833  maws 1.3e-1 0.0007  sacm 1.4e1 0.0795  gls 4.5e-1 0.0026",
    448: "psm 6.2e5 781.31  rollout 1.1e4 13.592  maws 5.3e-1 0.0007  sacm 2.5e2 0.3162  gls 1.8e0 0.0023",
    768: "psm 1.5e7 5065.4  rollout 2.7e5 91.152  maws 1.5e0 0.0005  sacm 2.1e3 0.7072  gls 5.3e0 0.0018",
    1024: "psm 9.1e7 13674  rollout 1.5e6 228.84  maws 2.7e0 0.0004  sacm 6.9e3 1.0487  gls 9.4e0 0.0014",
}


def call(capsys, *words):
    assert cli.main(["flops", *words]) == 0
    return capsys.readouterr().out


def test_the_published_table_to_its_printed_digits(capsys):
    rows = json.loads(call(capsys, "--convention", "paper", "--sizes", "224,448,768,1024", "--json"))["rows"]
    found = dict.fromkeys(PRINTED, "")
    for row in rows:
        assert set(row) == {"size", "mechanism", "mflops", "percent_of_backbone"}
        found[row["size"]] += f"  {row['mechanism']} {flops.short(row['mflops'])} {flops.share(row)}"
    assert {size: text.strip() for size, text in found.items()} == PRINTED


@pytest.mark.parametrize(
    ("number", "printed"), [(9.4495, "9.4e0"), (0.0996, "1.0e-1"), (8226.1, "8.2e3"), (99.6, "1.0e2")]
)
def test_two_digits(number, printed):
    assert flops.short(number) == printed


def test_the_docs_show_what_the_commands_print(capsys):
    pages = [block for name in ("cost.md", "results.md") for block in blocks(ROOT / "docs" / name)]
    shown = 0
    for command, answer in pairwise(pages):
        if command.text.startswith("glsim flops") and answer.language == "text":
            assert answer.text == call(capsys, *command.text.split()[2:])
            shown += 1
    assert shown == 3


# --- the counter, against closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "gflops"), [(224, 35.1), (448, 157.0)])
def test_vit_base_is_counted_as_its_closed_form(size, gflops):
    model = flops.build("plain", None, size)
    s = flops.shape_of(model.backbone)
    assert s == (12, 12, 768, (size // 16) ** 2, (size // 16) ** 2 + 1)
    d, n = s.dim, s.tokens
    blocks = s.depth * (24 * n * d**2 + 4 * n**2 * d)  # qkv 6, projection 2, MLP 16 n d^2; two products of n^2 d
    assert flops.count(model) == 2 * s.patches * 16 * 16 * 3 * d + blocks + 2 * 200 * d
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


def test_glsim_is_two_passes_and_an_aggregator():
    plain, glsim = (flops.build(method, None, 224) for method in ("plain", "glsim"))
    d, others = 768, 196
    gls = 2 * others * d
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


# --- mechanisms, against the counter and loops ------------------------------------------------------------------------


class Counted:
    """A number that counts what is done with it."""

    done = 0

    def __init__(self, value):
        self.value = float(value)

    def _do(self, value):
        Counted.done += 1
        return Counted(value)

    def __add__(self, other):
        return self._do(self.value + other.value)

    def __mul__(self, other):
        return self._do(self.value * other.value)

    def __truediv__(self, other):
        return self._do(self.value / (other.value if isinstance(other, Counted) else other))

    def by(self, function):
        return self._do(function(self.value))


def add(numbers):
    first, *rest = numbers
    for number in rest:
        first = first + number
    return first


def mean(numbers):
    return add(numbers) / len(numbers)


def dot(a, b, start=None):
    """A multiply-add for each pair, from `start` or zero."""
    total = start or Counted(0)
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def counted(tensor):
    return [counted(t) for t in tensor.detach()] if tensor.ndim else Counted(tensor)


def column(matrix, j):
    return [row[j] for row in matrix]


SHAPE = flops.Shape(depth=5, heads=3, dim=8, patches=6, tokens=7)


def gls_loop(f, _):
    c, lengths = counted(f.cls[0]), []
    length = dot(c, c).by(math.sqrt)
    for z in counted(f.patches[0]):
        lengths.append(dot(c, z) / (length * dot(z, z).by(math.sqrt)))
    return [lengths]


def psm_loop(f, _):
    maps = []
    for head in range(SHAPE.heads):
        *before, last = [counted(s.softmax(-1)[0, head]) for s in f.attention_logits]
        v = last[0]
        for a in reversed(before):
            v = [dot(v, column(a, j)) for j in range(SHAPE.tokens)]
        maps.append(v[1:])
    return maps


def rollout_loop(f, _):
    v = [Counted(j == 0) for j in range(SHAPE.tokens)]
    for i, s in enumerate(reversed(f.attention_logits)):
        a = counted(s.softmax(-1)[0])
        heads = [one[0] if i == 0 else [dot(v, column(one, j)) for j in range(SHAPE.tokens)] for one in a]
        v = [(x + mean([head[j] for head in heads])) / 2 for j, x in enumerate(v)]
    return [v[1:]]


def maws_loop(f, _):
    maps = []
    for s in f.attention_logits:
        given, taken = counted(s.softmax(-1)[0, :, 0]), []
        for head in counted(s[0, :, :, 0]):
            powers = [x.by(math.exp) for x in head]
            total = add(powers)
            taken.append([x / total for x in powers])
        maps.append([mean(column(given, j)) * mean(column(taken, j)) for j in range(SHAPE.tokens)][1:])
    return maps


def sacm_loop(f, excite):
    rows = []
    for s in f.attention_logits:
        given = counted(s.softmax(-1)[0, :, 0, 1:])
        rows.append([mean(column(given, j)) for j in range(SHAPE.patches)])
    x = [add(row) for row in rows]
    first, second = excite.excite[0], excite.excite[2]
    x = [dot(w, x, b) for w, b in zip(counted(first.weight), counted(first.bias), strict=True)]
    x = [v.by(lambda t: float(torch.nn.functional.gelu(torch.tensor(t, dtype=torch.float64)))) for v in x]
    x = [dot(w, x, b) for w, b in zip(counted(second.weight), counted(second.bias), strict=True)]
    x = [v.by(lambda t: 1 / (1 + math.exp(-t))) for v in x]
    return [[dot(x, column(rows, j)) for j in range(SHAPE.patches)]]


@pytest.mark.parametrize("name", flops.HONEST)
def test_honest_forms_are_what_a_loop_counts_and_the_counter_sees(name):
    """The loop gives the scores of the package's own function, so that it counts the same mechanism.

    The counter sees matrix products only: of psm all, of rollout all but the means, of sacm the linear layers, of gls
    the products of class token and patches.
    """
    torch.manual_seed(0)
    s, n, h = SHAPE, SHAPE.tokens, SHAPE.heads
    depth = s.depth + flops.MAPS.get(name, 0)  # psm and maws read all blocks but the last
    logits = tuple(torch.randn(depth, 1, h, n, n, dtype=torch.float64))
    f = Features(torch.randn(1, s.dim).double(), torch.randn(1, s.patches, s.dim).double(), (2, 3), 1, logits)
    excite = LayerWeights(s.depth).double()

    def metric():
        weights = (
            excite(torch.stack([a.softmax(-1)[:, :, 0, 1:].mean(1) for a in logits], 1)) if name == "sacm" else None
        )
        return METRICS["gls_cos" if name == "gls" else name](f._replace(layer_weights=weights))

    with FlopCounterMode(display=False) as counter:
        scores = metric()
    Counted.done = 0
    looped = globals()[f"{name}_loop"](f, excite)
    torch.testing.assert_close(
        torch.tensor([[x.value for x in row] for row in looped], dtype=torch.float64), scores[0], atol=1e-12, rtol=0
    )
    assert Counted.done == flops.HONEST[name](s)
    products = {
        "psm": flops.honest_psm(s),
        "rollout": flops.honest_rollout(s) - s.depth * n * (h + 2),
        "sacm": 2 * 2 * s.depth * (s.depth // 2),
        "gls": 2 * s.dim * s.patches,
    }
    assert counter.get_total_flops() == products.get(name, 0)


def test_published_matrix_forms_cost_what_the_counter_sees():
    """2 n^3 for a product of matrices where the paper has n^2 (2 n - 1): its first multiplication adds nothing."""
    s = SHAPE
    maps = torch.rand(s.depth - 1, s.heads, s.tokens, s.tokens)
    with FlopCounterMode(display=False) as counter:
        product = maps[0]
        for a in maps[1:]:
            product = a @ product
    n = s.tokens
    assert flops.paper_psm(s) == counter.get_total_flops() - (s.depth - 2) * s.heads * n**2


def test_honest_rows_charge_glsim_its_second_pass():
    rows = flops.run(Flops(convention="honest", sizes=[64], backbone="vit_tiny_patch16_224"))["rows"]
    percent = {r["mechanism"]: r["percent_of_backbone"] for r in rows}
    assert list(percent) == ["psm", "rollout", "maws", "sacm", "gls", "glsim"]
    assert 93 < percent["glsim"] < 98 and max(v for k, v in percent.items() if k != "glsim") < 0.2
    maps = {r["mechanism"]: r["attention_mib"] for r in rows}
    assert maps["rollout"] == 12 * 3 * 17**2 * 4 / 2**20 and maps["gls"] == 0
    assert maps["psm"] == 11 / 12 * maps["rollout"]


def test_the_crop_is_counted_as_two_interpolations():
    """A value is a + w (b - a): three operations; rows at the old width, then columns."""
    ops = sum(3 for _ in range(3) for _ in range(5) for _ in range(5))
    assert flops.crop_flops(5) == 2 * ops


def test_other_transformers_and_what_is_refused():
    s = flops.shape_of(flops.build("plain", "vit_small_patch14_reg4_dinov2", 224).backbone)
    assert s == (12, 6, 384, 256, 261)
    for convention in ("paper", "honest"):
        rows = flops.run(Flops(convention=convention, sizes=[224], backbone="vit_small_patch14_reg4_dinov2"))["rows"]
        assert all(r["mflops"] > 0 for r in rows)
    with pytest.raises(ConfigError, match="'resnet18' has no attention over patches; choose a ViT"):
        flops.run(Flops(convention="paper", sizes=[64], backbone="resnet18"))
    with pytest.raises(ConfigError, match="no multiple of the patch"):
        flops.run(Flops(convention="paper", sizes=[100]))
    with pytest.raises(ConfigError, match="use --sizes"):
        Flops(convention="paper", image_size=224)
    with pytest.raises(ConfigError, match="counts every way"):
        Flops(convention="honest", method="rams")
    with pytest.raises(ConfigError, match="one or more"):
        Flops(sizes=[])
