"""Token representations from block to block: similarity, norms, distances of attention.

CKA: Kornblith et al., Similarity of Neural Network Representations Revisited, arXiv 1905.00414; from few images its
first estimate is biased towards 1, so HSIC is estimated without bias (Nguyen et al., arXiv 2010.15327, equation 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from glsim.data.transforms import eval_transform
from glsim.files import document, write_json
from glsim.interpret.drawing import save_figure
from glsim.interpret.pictures import Gallery, Looking
from glsim.models.backbone import Backbone
from glsim.models.base import Model
from glsim.types import ConfigError, DataError

LEAST = 4  # images, for the estimate of HSIC
ROUNDING = 1e-10  # relative, of a square: tokens are float32
PICTURE, TABLE = "layers.png", "layers.json"
KINDS = {"whole": "all tokens of an image", "pooled": "mean of its tokens"}
PANELS = {  # of the picture: the measures of `Layers`, and what they are called
    "Length of tokens": {"norm_cls": "class token", "norm_patch": "patches, mean", "norm_patch_max": "longest patch"},
    "Distance": {"distance": "two patches", "cls_distance": "class token and patch"},
    "Cosine of two patches": {"similarity": "mean over pairs"},
    "Cosine of class token and patch": {"cls_similarity": "mean patch", "cls_similarity_max": "most similar patch"},
}
MEASURES = [name for lines in PANELS.values() for name in lines]


@dataclass(frozen=True)
class Similarities:
    """Linear CKA between all layers, (layers, layers): of all tokens of an image, and of their mean."""

    whole: list[list[float]]
    pooled: list[list[float]]


@dataclass(frozen=True)
class Layers:
    """Tokens after every block and after the final norm: numbers for each layer, means over the images.

    Where there is no class token, the mean patch stands in its place.
    """

    images: int
    layers: list[str]  # numbers of the blocks, and norm
    norm_cls: list[float]  # length of the class token
    norm_patch: list[float]  # mean length of the patches
    norm_patch_max: list[float]  # length of the longest patch
    distance: list[float]  # Euclidean, between two patches of an image
    similarity: list[float]  # cosine of two patches of an image
    cls_distance: list[float]  # Euclidean, between class token and patch
    cls_similarity: list[float]  # cosine of class token and patch
    cls_similarity_max: list[float]  # the same of the most similar patch
    cka: Similarities


@dataclass(frozen=True, kw_only=True)
class DrawnLayers(Layers):
    """`Layers`, drawn and written down."""

    picture: str
    table: str


@dataclass(frozen=True)
class LayerTrace:
    """What `trace_representations` measured."""

    source: str
    out: str
    layers: DrawnLayers
    pictures: list[str]  # none: of the images themselves nothing is drawn
    skipped: list[str]  # files that cannot be read, and why


def hsic(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased estimate of HSIC from Gram matrices `a` and `b` (.., M, M) over the same M images, 4 or more: (..)."""
    count = a.shape[-1]
    a, b = (g - torch.diag_embed(g.diagonal(dim1=-2, dim2=-1)) for g in (a, b))
    rows = a.sum(dim=-1), b.sum(dim=-1)
    totals = rows[0].sum(dim=-1) * rows[1].sum(dim=-1)
    both = (a * b).sum(dim=(-2, -1))
    mixed = (rows[0] * rows[1]).sum(dim=-1)
    found = both + totals / ((count - 1) * (count - 2)) - 2 * mixed / (count - 2)
    return found / (count * (count - 3))


def cka(grams: Tensor) -> Tensor:
    """Linear CKA between all of `grams` (L, M, M): (L, L), 1 where two layers arrange the images alike.

    Raises DataError where a layer has no arrangement beyond rounding: images that are all the same, or all but one.
    """
    found = hsic(grams[:, None], grams[None])
    own = found.diagonal()
    if (own <= ROUNDING * grams.square().mean(dim=(1, 2))).any():
        raise DataError("layers: the images are all alike, or all but one: nothing to compare layers by; take others")
    return found / (own[:, None] * own[None]).sqrt()


def gram(vectors: Tensor) -> Tensor:
    """Inner products of `vectors` (M, ..) less their mean: (M, M) in double precision, 0 if they differ by rounding."""
    vectors = vectors.flatten(1).double()
    apart = vectors - vectors.mean(dim=0)
    return apart @ apart.T * (apart.square().sum() > ROUNDING * vectors.square().sum())


def check_layers(model: Model) -> None:
    """Raise ConfigError for a network whose blocks do not keep one grid of tokens."""
    if not model.backbone.has_attention:
        name = model.config.backbone
        raise ConfigError(f"layers: {name!r} does not keep one grid of tokens from block to block; choose a ViT")


@torch.inference_mode()
def analyse(model: Model, batches: Iterable[Tensor]) -> Layers:
    """Measure the tokens after every block, and after the final norm.

    Args:
        batches: normalised images (B, 3, H, W), four or more in all. All their tokens are held in memory.

    Raises:
        ConfigError: for a network without blocks over one grid of tokens.
        DataError: for fewer than four images, or where all, or all but one, are the same.
    """
    check_layers(model)
    device = next(model.parameters()).device
    rows: list[Tensor] = []  # a batch: (B, layers, measures)
    held: dict[str, list[list[Tensor]]] = {kind: [] for kind in KINDS}  # a batch, a layer: (B, n D) and (B, D)
    for images in batches:
        layers = model.backbone.layers(images.to(device))
        held["whole"].append([tokens.flatten(1).cpu() for tokens in layers])
        held["pooled"].append([tokens.mean(dim=1).cpu() for tokens in layers])
        rows.append(torch.stack([measures(model.backbone, tokens).cpu() for tokens in layers], dim=1))
    count = sum(len(row) for row in rows)
    if count < LEAST:
        raise DataError(f"layers: {count} images; {LEAST} or more are needed to compare layers")
    means = torch.cat(rows).double().mean(dim=0)
    grams = {
        kind: torch.stack([gram(torch.cat(layer)) for layer in zip(*parts, strict=True)])
        for kind, parts in held.items()
    }
    return Layers(
        images=count,
        layers=[*(str(i + 1) for i in range(model.backbone.depth)), "norm"],
        **{name: means[:, i].tolist() for i, name in enumerate(MEASURES)},
        cka=Similarities(**{kind: cka(g).tolist() for kind, g in grams.items()}),
    )


def measures(backbone: Backbone, tokens: Tensor) -> Tensor:
    """`MEASURES` of the tokens of one layer (B, n, D), image by image: (B, 8)."""
    patches = tokens[:, backbone.skip :].float()
    cls = tokens[:, 0].float() if backbone.num_prefix else patches.mean(dim=1)
    lengths = patches.norm(dim=2)
    count = patches.shape[1]
    pairs = max(1, count * (count - 1))
    unit = F.normalize(patches, dim=2)
    alike = (unit.sum(dim=1).square().sum(dim=1) - unit.square().sum(dim=(1, 2))) / pairs
    to_cls = F.cosine_similarity(patches, cls[:, None], dim=2)
    return torch.stack(
        (
            cls.norm(dim=1),
            lengths.mean(dim=1),
            lengths.amax(dim=1),
            torch.cdist(patches, patches, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=(1, 2)) / pairs,
            (patches - cls[:, None]).norm(dim=2).mean(dim=1),
            alike,
            to_cls.mean(dim=1),
            to_cls.amax(dim=1),
        ),
        dim=1,
    )


def trace_representations(
    source: str | Path, images: Sequence[str | Path], out: str | Path, **looking: Unpack[Looking]
) -> LayerTrace:
    """Measure what becomes of the tokens from block to block, and write layers.png and layers.json.

    Args:
        source: what `glsim.load` takes.
        images: files, folders or globs; four images or more in all.
        out: folder for both files.
        looking: see `glsim.interpret.pictures:Looking`.

    Returns:
        The measurements, and the paths of both files.

    Raises:
        ConfigError: for a network without blocks over one grid of tokens.
        DataError: for images that are not there or cannot be read, fewer than four, or all the same.
    """
    gallery, folder = Gallery(source, images, **looking), Path(out)
    check_layers(gallery.model)
    views = gallery.show(out, eval_transform(gallery.preprocessing))
    found = analyse(gallery.model, (view[None] for _, view, _ in views))
    write_json(folder / TABLE, document(found))
    draw(found, folder / PICTURE)
    drawn = DrawnLayers(**vars(found), picture=str(folder / PICTURE), table=str(folder / TABLE))
    return LayerTrace(str(source), str(out), drawn, [], gallery.skipped)


def draw(found: Layers, path: Path) -> None:
    """Both CKA matrices, and the other measures over the layers, as PNG."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    places = range(len(found.layers))
    for place in axes.flat:
        place.set_xticks(places, found.layers, fontsize=7)
        place.set_xlabel("block")
    for place, kind in zip(axes[:, 0], KINDS, strict=True):
        image = place.imshow(getattr(found.cka, kind), vmin=0, vmax=1, cmap="magma", origin="lower")
        place.set(title=f"CKA, {KINDS[kind]}", ylabel="block")
        place.set_yticks(places, found.layers, fontsize=7)
        figure.colorbar(image, ax=place, shrink=0.8)
    for place, (title, lines) in zip(axes[:, 1:].flat, PANELS.items(), strict=True):
        for name, label in lines.items():
            place.plot(places, getattr(found, name), marker=".", label=label)
        place.set_title(title)
        place.grid(alpha=0.3)
        place.legend()
    save_figure(figure, path)
