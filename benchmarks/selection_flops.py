"""Operations of choosing patches, in closed form: as GLSim's paper counts them, and all by one rule.

    python benchmarks/selection_flops.py --convention paper       # Table 1 of arXiv 2407.12891
    python benchmarks/selection_flops.py --convention honest      # 2 per multiply-add, the same tokens for all
    python benchmarks/selection_flops.py --convention paper --sizes 224 448 --json

`PAPER` and `HONEST` hold a closed form for each way to choose patches. `Shape` is what they are computed from; the
backbone itself is counted by `glsim.evaluation.flops`. docs/cost.md has the forms, docs/results/choosing_patches.md
both tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from glsim.evaluation.flops import build, count
from glsim.files import to_json
from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.types import ConfigError, GlsimError

SIZES = (224, 448, 768, 1024)  # sides of the images in the paper's table, pixels


class Shape(NamedTuple):
    """What the closed forms read off a vision transformer."""

    depth: int  # L
    heads: int  # h
    dim: int  # D
    patches: int  # N
    tokens: int  # n, patches and prefix


# --- choosing patches, as GLSim's paper counts it (arXiv 2407.12891, Table 1) -----------------------------------------


def paper_gls(s: Shape) -> int:
    """(n - 1)(D + 2 (D + 1) + 1)."""
    return s.patches * (s.dim + 2 * (s.dim + 1) + 1)


def paper_maws(s: Shape) -> int:
    """(L - 1)(5 n h + 2 h + n): FFVT reads all blocks but the last. 2 h is our reading of a 24 (ViT-B)."""
    return (s.depth - 1) * (5 * s.tokens * s.heads + 2 * s.heads + s.tokens)


def paper_rollout(s: Shape) -> int:
    """L (h n^2 + n^2 + n + 1) + (L - 1) n^2 (2 n - 1): products of whole matrices."""
    n = s.tokens
    return s.depth * (s.heads * n**2 + n**2 + n + 1) + (s.depth - 1) * n**2 * (2 * n - 1)


def paper_psm(s: Shape) -> int:
    """(L - 2) h n^2 (2 n - 1): products of whole matrices, of all blocks but the last."""
    return (s.depth - 2) * s.heads * s.tokens**2 * (2 * s.tokens - 1)


def paper_sacm(s: Shape) -> int:
    """L (h - 1) n^2 + n^2 + 1 + 6 L + L (n - 1)."""
    return s.depth * (s.heads - 1) * s.tokens**2 + s.tokens**2 + 1 + 6 * s.depth + s.depth * s.patches


def paper_backbone(s: Shape, pixels: int, num_classes: int) -> int:
    """2 N P^2 3 D + L (12 n D^2 + 2 n^2 D) + C D, P^2 = `pixels`: the embedding at 2, all else at 1 a multiply-add."""
    blocks = s.depth * (12 * s.tokens * s.dim**2 + 2 * s.tokens**2 * s.dim)
    return 2 * s.patches * pixels * 3 * s.dim + blocks + num_classes * s.dim


class Mechanism(NamedTuple):
    """A closed form, and whether the paper charges it for overlapping patches (a stride of 0.75 of the patch)."""

    form: Callable[[Shape], int]
    overlapping: bool = False


PAPER = {
    "psm": Mechanism(paper_psm, overlapping=True),
    "rollout": Mechanism(paper_rollout),
    "maws": Mechanism(paper_maws),
    "sacm": Mechanism(paper_sacm, overlapping=True),
    "gls": Mechanism(paper_gls),
}


def paper_rows(size: int, backbone: str | None = None, num_classes: int = 200) -> list[dict[str, Any]]:
    """The five entries of the paper's Table 1 for one image size."""
    net = transformer(size, backbone, num_classes).backbone
    shape = shape_of(net)
    height, width = patch = net.net.patch_embed.patch_size
    rows, cols = ((size - side) // max(1, int(0.75 * side)) + 1 for side in patch)
    longer = shape._replace(patches=rows * cols, tokens=rows * cols + shape.tokens - shape.patches)
    whole = paper_backbone(shape, height * width, num_classes)
    return [
        as_row(size, name, mechanism.form(longer if mechanism.overlapping else shape), whole)
        for name, mechanism in PAPER.items()
    ]


# --- choosing patches, all by one rule --------------------------------------------------------------------------------
#
# The tokens and attention maps (softmaxed) that the network has computed are given; every multiplication, addition,
# division, root, exponential and activation counts 1, so a multiply-add 2. Counted to the scores, as `METRICS` and the
# methods compute them; picking the best of N numbers is left out. test_flops.py counts the same in loops.


def honest_gls(s: Shape) -> int:
    """Length of the class token; for each patch a product, a length, and a quotient."""
    return 2 * s.dim + 1 + s.patches * (4 * s.dim + 3)


def honest_maws(s: Shape) -> int:
    """L - 1 blocks: mean over heads of a row and of the softmaxed column, and their product."""
    return (s.depth - 1) * (s.tokens * (5 * s.heads + 1) - s.heads)


def honest_rollout(s: Shape) -> int:
    """Row form: of every block a row for every head (the last one's is read, L - 1 are vector by matrix), their mean,
    and its mean with the vector."""
    return (s.depth - 1) * 2 * s.heads * s.tokens**2 + s.depth * s.tokens * (s.heads + 2)


def honest_psm(s: Shape) -> int:
    """Row form, of all blocks but the last: a row of the last of them is read, then L - 2 times vector by matrix."""
    return (s.depth - 2) * 2 * s.heads * s.tokens**2


def honest_sacm(s: Shape) -> int:
    """Rows averaged over heads, their sums, two small linear layers over the blocks, and the weighted sum."""
    hidden = max(1, s.depth // 2)
    rows = s.depth * s.patches * (s.heads + 3) - s.depth
    return rows + 4 * s.depth * hidden + hidden + s.depth


HONEST = {
    "psm": honest_psm,
    "rollout": honest_rollout,
    "maws": honest_maws,
    "sacm": honest_sacm,
    "gls": honest_gls,
}
# Whose attention maps are written down for a mechanism here: all blocks', or all but the last.
MAPS = {"psm": -1, "rollout": 0, "maws": -1, "sacm": 0}


def crop_flops(size: int) -> int:
    """Linear interpolation (3 operations a value) of the rows of an image, then of its columns (`models.boxes`)."""
    return 2 * 3 * 3 * size * size


def honest_rows(size: int, backbone: str | None = None, num_classes: int = 200) -> list[dict[str, Any]]:
    """The five mechanisms at one image size; and GLSim whole, with what choosing a region leads to: a second pass."""
    model = transformer(size, backbone, num_classes)
    shape = shape_of(model.backbone)
    whole = count(model)
    rows = []
    for name, form in HONEST.items():
        kept = 4 * (shape.depth + MAPS[name]) * shape.heads * shape.tokens**2 if name in MAPS else 0
        rows.append(as_row(size, name, form(shape), whole) | {"attention_mib": kept / 2**20})
    glsim = build("glsim", backbone, size, num_classes, rule="published")
    seen = 2 * shape.patches * shape.dim  # of gls: the counter has it in `glsim` already
    more = count(glsim) - whole + honest_gls(shape) - seen + crop_flops(size)
    return [*rows, as_row(size, "glsim", more, whole) | {"attention_mib": 0.0}]


TABLES = {"paper": paper_rows, "honest": honest_rows}


def transformer(size: int, backbone: str | None, num_classes: int) -> Model:
    """The plain model, without values; ConfigError for a network without attention over patches."""
    model = build("plain", backbone, size, num_classes)
    if not model.backbone.has_attention:
        raise ConfigError(f"{model.config.backbone!r} has no attention over patches; choose a ViT")
    return model


def shape_of(backbone: Backbone) -> Shape:
    """Depth, heads, width and tokens of a backbone at the size it was built for."""
    rows, cols = backbone.grid
    heads = backbone.net.blocks[0].attn.num_heads
    return Shape(backbone.depth, heads, backbone.dim, rows * cols, rows * cols + backbone.skip)


def as_row(size: int, mechanism: str, flops: int, backbone: int) -> dict[str, Any]:
    """A row of the table."""
    percent = 100 * flops / backbone
    return {"size": size, "mechanism": mechanism, "mflops": flops / 1e6, "percent_of_backbone": percent}


# --- for people -------------------------------------------------------------------------------------------------------

HEADS = {
    "paper": "Choosing patches, as the paper counts: 2 per multiply-add, 1 for most of the backbone's;\n"
    "psm and sacm on overlapping patches; the second pass is nobody's.",
    "honest": "Choosing patches: 2 per multiply-add, the same tokens for all, psm and rollout in row form.\n"
    "glsim: gls, crop, second pass, aggregator.",
}


def as_text(rows: list[dict[str, Any]], convention: str) -> str:
    """Rows of one of `TABLES` as a table under a head that says how it counts."""
    sizes = list(dict.fromkeys(r["size"] for r in rows))
    names = list(dict.fromkeys(r["mechanism"] for r in rows))
    found = {(r["size"], r["mechanism"]): r for r in rows}
    lines = [f"{'':8}" + "".join(f"{f'{size} pixels':>21}" for size in sizes)]
    lines += [f"{'':8}" + f"{'MFLOPs':>11}{'%':>10}" * len(sizes)]
    for name in names:
        cells = [found[size, name] for size in sizes]
        lines.append(f"{name:8}" + "".join(f"{short(c['mflops']):>11}{share(c):>10}" for c in cells))
    if convention == "honest":
        lines += ["", "attention maps written down for it, float32, MiB"]
        for name in names:
            lines.append(f"{name:8}" + "".join(f"{found[size, name]['attention_mib']:21,.1f}" for size in sizes))
    return "\n".join([HEADS[convention], "", *lines])


def short(number: float) -> str:
    """Two digits, as the paper prints them: 8.2e3."""
    digits, _, power = f"{number:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def share(row: dict[str, Any]) -> str:
    """Percent of the backbone, as the paper prints them: five digits, at most four behind the point."""
    percent = row["percent_of_backbone"]
    return f"{percent:#.5g}".rstrip(".") if percent >= 1 else f"{percent:.4f}"


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, or with --json its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convention", choices=TABLES, default="paper", help="as the paper counts, or all by one rule")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="sides of the images, pixels")
    parser.add_argument("--backbone", help="timm model name; default: vit_base_patch16_224")
    parser.add_argument("--num-classes", type=int, default=200, help="outputs of the last layer")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    a = parser.parse_args(words)
    rows = [row for size in a.sizes for row in TABLES[a.convention](size, a.backbone, a.num_classes)]
    print(to_json({"rows": rows}) if a.json else as_text(rows, a.convention))


if __name__ == "__main__":
    try:
        main()
    except GlsimError as error:
        sys.exit(f"selection_flops: {error}")
