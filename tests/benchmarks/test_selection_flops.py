"""benchmarks/selection_flops.py: the published table to its digits, closed forms against the counter and loops."""

import json
import math
import shlex
import sys
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from test_docs import blocks
from torch.utils.flop_counter import FlopCounterMode

from glsim import METRICS, Features
from glsim.evaluation.flops import build
from glsim.models.heads import LayerWeights
from glsim.types import ConfigError

# arXiv 2407.12891, Table 1: MFLOPs, percent of the backbone; as printed.
PRINTED = {
    224: "psm 8.2e3 46.531  rollout 1.7e2 0.9833  maws 1.3e-1 0.0007  sacm 1.4e1 0.0795  gls 4.5e-1 0.0026",
    448: "psm 6.2e5 781.31  rollout 1.1e4 13.592  maws 5.3e-1 0.0007  sacm 2.5e2 0.3162  gls 1.8e0 0.0023",
    768: "psm 1.5e7 5065.4  rollout 2.7e5 91.152  maws 1.5e0 0.0005  sacm 2.1e3 0.7072  gls 5.3e0 0.0018",
    1024: "psm 9.1e7 13674  rollout 1.5e6 228.84  maws 2.7e0 0.0004  sacm 6.9e3 1.0487  gls 9.4e0 0.0014",
}


@pytest.fixture(scope="module")
def flops():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import selection_flops

        yield selection_flops
        sys.modules.pop("selection_flops", None)


def call(capsys, flops, *words):
    flops.main(words)
    return capsys.readouterr().out


def test_the_published_table_to_its_printed_digits(capsys, flops):
    rows = json.loads(call(capsys, flops, "--convention", "paper", "--sizes", "224", "448", "768", "1024", "--json"))[
        "rows"
    ]
    found = dict.fromkeys(PRINTED, "")
    for row in rows:
        assert set(row) == {"size", "mechanism", "mflops", "percent_of_backbone"}
        found[row["size"]] += f"  {row['mechanism']} {flops.short(row['mflops'])} {flops.share(row)}"
    assert {size: text.strip() for size, text in found.items()} == PRINTED


@pytest.mark.parametrize(
    ("number", "printed"), [(9.4495, "9.4e0"), (0.0996, "1.0e-1"), (8226.1, "8.2e3"), (99.6, "1.0e2")]
)
def test_two_digits(flops, number, printed):
    assert flops.short(number) == printed


@pytest.mark.slow
def test_the_docs_show_what_the_commands_print(capsys, flops):
    shown = 0
    for command, answer in pairwise(blocks(ROOT / "docs" / "results" / "choosing_patches.md")):
        program, *words = shlex.split(command.text.splitlines()[0]) if command.language == "bash" else [""]
        if program == "python" and words[0].endswith("selection_flops.py") and answer.language == "text":
            assert answer.text == call(capsys, flops, *words[1:])
            shown += 1
    assert shown == 2


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


class Shape(NamedTuple):
    """As the script's: what the closed forms read off a network."""

    depth: int
    heads: int
    dim: int
    patches: int
    tokens: int


SHAPE = Shape(depth=5, heads=3, dim=8, patches=6, tokens=7)


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


@pytest.mark.parametrize("name", ["psm", "rollout", "maws", "sacm", "gls"])
def test_honest_forms_are_what_a_loop_counts_and_the_counter_sees(flops, name):
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


def test_published_matrix_forms_cost_what_the_counter_sees(flops):
    """2 n^3 for a product of matrices where the paper has n^2 (2 n - 1): its first multiplication adds nothing."""
    s = SHAPE
    maps = torch.rand(s.depth - 1, s.heads, s.tokens, s.tokens)
    with FlopCounterMode(display=False) as counter:
        product = maps[0]
        for a in maps[1:]:
            product = a @ product
    n = s.tokens
    assert flops.paper_psm(s) == counter.get_total_flops() - (s.depth - 2) * s.heads * n**2


def test_honest_rows_charge_glsim_its_second_pass(flops):
    rows = flops.honest_rows(64, "vit_tiny_patch16_224")
    percent = {r["mechanism"]: r["percent_of_backbone"] for r in rows}
    assert list(percent) == ["psm", "rollout", "maws", "sacm", "gls", "glsim"]
    assert 93 < percent["glsim"] < 98 and max(v for k, v in percent.items() if k != "glsim") < 0.2
    maps = {r["mechanism"]: r["attention_mib"] for r in rows}
    assert maps["rollout"] == 12 * 3 * 17**2 * 4 / 2**20 and maps["gls"] == 0
    assert maps["psm"] == 11 / 12 * maps["rollout"]


def test_the_crop_is_counted_as_two_interpolations(flops):
    """A value is a + w (b - a): three operations; rows at the old width, then columns."""
    ops = sum(3 for _ in range(3) for _ in range(5) for _ in range(5))
    assert flops.crop_flops(5) == 2 * ops


def test_other_transformers_and_what_is_refused(flops):
    s = flops.shape_of(build("plain", "vit_small_patch14_reg4_dinov2", 224).backbone)
    assert s == (12, 6, 384, 256, 261)
    for rows in flops.TABLES.values():
        assert all(r["mflops"] > 0 for r in rows(224, "vit_small_patch14_reg4_dinov2"))
    with pytest.raises(ConfigError, match="'resnet18' has no attention over patches; choose a ViT"):
        flops.paper_rows(64, "resnet18")
    with pytest.raises(ConfigError, match="no multiple of the patch"):
        flops.paper_rows(100)
    assert flops.shape_of(build("plain", None, 448).backbone) == (12, 12, 768, 28**2, 28**2 + 1)
