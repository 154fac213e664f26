"""GLSim (Rios, Hu and Lai: Global-Local Similarity for Efficient Fine-Grained Image Recognition, arXiv 2407.12891)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glsim.models.backbone import Attention, Backbone
from glsim.models.base import EarlyExitModel, Model
from glsim.models.boxes import check_box, crop_and_resize, select
from glsim.models.heads import Aggregator, Classifier, top2_margin
from glsim.models.patch_embed import to_pair
from glsim.models.published import GLSIM_AUTHORS, File, Published, Table, refuse
from glsim.models.scores import check_metric, check_top, needs_attention, score
from glsim.types import ConfigError, Features, Output, Selection

TITLE = "GLSim"
NEEDS = ("places",)
CROPS = True
EMBEDDINGS = ("global", "crop", "fused")
# What the option `rule` stands for: how the place is found. "object" won on photographs with pre-trained weights
# (docs/results/study.md); "published" is the paper's.
OBJECT: dict[str, Any] = {"metric": "gls_border", "top_o": 0.1, "box": "moments"}
RULES: dict[str, dict[str, Any]] = {
    "object": OBJECT,
    "published": {"metric": "gls_cos", "top_o": 8, "box": "exclusive"},
}
WORDS = {"rule": RULES}


class AggregatingModel(Model):
    """A backbone, an aggregator of its class tokens and a head that reads what comes of them."""

    def __init__(self, backbone: Backbone, aggregator: Aggregator, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.aggregator, self.head = backbone, aggregator, head

    def initialised(self, kept: list[str]) -> None:
        """Over features learnt elsewhere a new aggregator starts as the identity unless `aggregator_start` is given."""
        if self.aggregator.start is None and "aggregator.norm.weight" in kept:
            self.aggregator.become_identity({name.removeprefix("aggregator.") for name in kept})
            self.config.options["aggregator_start"] = self.aggregator.start


class GLSim(AggregatingModel):
    """Encode the image, crop where class token and patches agree most, encode the crop, refine both, classify."""

    def __init__(
        self,
        backbone: Backbone,
        aggregator: Aggregator,
        head: nn.Module,
        metric: str = "gls_cos",
        top_o: int | float = 8,
        box: str = "exclusive",
        crop_size: tuple[int, int] | None = None,
        first_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(backbone, aggregator, head)
        self.metric, self.top_o, self.box = metric, top_o, box
        self.crop_size, self.first_size = crop_size, first_size

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. The crop is taken from these very pixels, augmentation included."""
        f = self.features(images, attention=needs_attention(self.metric))
        selection = self.select(score(self.metric, f), images)
        crops = crop_and_resize(images, selection.boxes, self.crop_size)
        tokens = torch.stack((f.cls, self.backbone.class_token(crops)), dim=1)  # B 2 D
        return self.refine(tokens, selection, crops)

    def features(self, images: Tensor, attention: Attention = False) -> Features:
        """Tokens of the first pass, which sees `images` (B, 3, H, W) at `first_size`."""
        if self.first_size is not None:
            images = F.interpolate(images, self.first_size, mode="bilinear", antialias=True)
        return self.backbone(images, attention=attention)

    def select(self, scores: Tensor, images: Tensor) -> Selection:
        """The `top_o` best patches by `scores` (B, g, N), and the box around them or its control, in `images`."""
        grid = self.backbone.grid if self.first_size is not None else self.backbone.grid_of(images)
        return select(scores, self.top_o, grid, images.shape[-2:], self.box, self.training)

    def refine(self, tokens: Tensor, selection: Selection | None, crops: Tensor) -> Output:
        """Refine both tokens and classify.

        Args:
            tokens: (B, 2, D), of image and crop.
            selection: what was chosen, handed on.
            crops: (B, 3, h, w), handed on.
        """
        fused = self.aggregator(tokens)
        embeddings = {"global": tokens[:, 0], "crop": tokens[:, 1], "fused": fused[:, 0]}
        return Output(self.head(fused), selection, crops, embeddings=embeddings)


class SinglePass(AggregatingModel):
    """GLSim without its crop (`box="none"`), a control: the aggregator refines the image's token alone."""

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised."""
        token = self.backbone.class_token(images)
        fused = self.aggregator(token[:, None])  # B 1 D
        return Output(self.head(fused), embeddings={"global": token, "fused": fused[:, 0]})


class AdaptiveGLSim(GLSim, EarlyExitModel):
    """GLSim that also learns to answer from the image's token alone, and then crops only where it is unsure.

    Training adds `early_loss` times the cross-entropy of the first pass's own answer. When answering, an image whose
    two best classes are `margin` or more apart in probability after the first pass gets no second one (no `margin`:
    every image gets both).
    """

    def __init__(self, *parts: Any, early_loss: float, margin: float | None) -> None:
        super().__init__(*parts)
        self.early_loss, self.margin = early_loss, margin

    def forward(self, images: Tensor) -> Output:
        """`images` (B, 3, H, W), normalised. With a margin there are no crops, and one wait for the device."""
        given, first, selection = self.first_pass(images)
        if self.training or self.margin is None:
            output = self.second_pass(images, given, selection.boxes)._replace(selection=selection)
            both = {"cross_entropy": ((1.0, output.logits), (self.early_loss, first))}
            return output._replace(aux=both) if self.training else output
        unsure = top2_margin(first) < self.margin
        if unsure.any():
            second = self.second_pass(images[unsure], given[unsure], selection.boxes[unsure])
            first = first.masked_scatter(unsure[:, None], second.logits)
        return Output(first, selection, embeddings={"global": given}, needs_second_pass=unsure)

    def first_pass(self, images: Tensor) -> tuple[Tensor, Tensor, Selection]:
        """One pass over `images` (B, 3, H, W): its tokens (B, D), the logits they give (B, C), and what to crop."""
        f = self.features(images, attention=needs_attention(self.metric))
        return f.cls, self.head(self.aggregator(f.cls[:, None])), self.select(score(self.metric, f), images)

    def second_pass(self, images: Tensor, given: Tensor, boxes: Tensor) -> Output:
        """The refined answer, and the crops it was read from.

        Args:
            images: (B, 3, H, W).
            given: (B, D), their tokens of the first pass.
            boxes: (B, 4), what to crop, int pixels.
        """
        crops = crop_and_resize(images, boxes, self.crop_size)
        return self.refine(torch.stack((given, self.backbone.class_token(crops)), dim=1), None, crops)


def build(
    encoder: Backbone,
    num_classes: int,
    *,
    metric: str = OBJECT["metric"],
    top_o: int | float = OBJECT["top_o"],
    box: str = OBJECT["box"],
    crop_size: int | Sequence[int] | None = None,
    first_size: int | Sequence[int] | None = None,
    classifier: str = "cls",
    aggregator_depth: int = 1,
    aggregator_start: str | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    norm_eps: float | None = None,
    early_loss: float = 0.0,
    margin: float | None = None,
) -> Model:
    """GLSim (arXiv 2407.12891) on `encoder`, or the variant of it that the options name.

    Args:
        encoder: any backbone.
        num_classes: C.
        metric: what scores the patches.
        top_o: best patches (the paper: 8, Stanford Dogs 16, at every image size), which span the box unless it follows
            all scores; below 1, their share of the grid, which means the same at every size.
        box: a rule, a control in its place (`glsim.models.boxes:CONTROLS`), or "none" (`SinglePass`).
        crop_size: pixels, one side or (height, width); None: those of the first pass.
        first_size: pixels that the first pass sees, the image shrunk to them: crops, cut out of all pixels that the
            model is given, show what it could not see. None: the image's.
        classifier: how the head reads the two tokens (`glsim.models.heads:CLASSIFIERS`).
        aggregator_depth: blocks that refine them; 0 takes their mean.
        aggregator_start: "published" or "identity" (`Aggregator`); None: the latter over pre-trained weights that know
            no aggregator.
        dropout, drop_path, norm_eps: of the aggregator, as of the encoder.
        early_loss: weight of the first pass's own answer; above 0 it can answer alone (`AdaptiveGLSim`).
        margin: lead of the best class in probability from which it does; None: never.

    Raises:
        ConfigError: for options that do not fit each other or the encoder.
    """
    check_metric(metric, encoder.has_attention, encoder.depth)
    if box != "none":
        check_box(box)
    check_top(top_o, encoder.grid, "top_o", shares=True)
    first_size = None if first_size is None else to_pair(first_size)
    crop_size = first_size if crop_size is None else to_pair(crop_size)
    if crop_size is not None:
        encoder.check_size(crop_size)
    if box == "none" and first_size is not None:
        raise ConfigError("first_size: box=none has one pass alone; give it that image_size")
    if box == "none" and early_loss:
        raise ConfigError(f"early_loss={early_loss}: box=none answers after the first pass anyway")
    if early_loss < 0:
        raise ConfigError(f"early_loss={early_loss}: at least 0 is needed")
    if margin is not None and (not isinstance(margin, int | float) or margin < 0):
        raise ConfigError(f"margin={margin!r}: a difference of probabilities is needed, from 0 to 1, or null")
    if margin is not None and not early_loss:
        raise ConfigError(f"margin={margin}: the first pass answers only where it was trained to, with early_loss")
    aggregator = Aggregator(encoder.dim, aggregator_depth, dropout, drop_path, norm_eps or 1e-6, aggregator_start)
    head = Classifier(encoder.dim, num_classes, classifier)
    if box == "none":
        return SinglePass(encoder, aggregator, head)
    parts = (encoder, aggregator, head, metric, top_o, box, crop_size, first_size)
    return AdaptiveGLSim(*parts, early_loss=early_loss, margin=margin) if early_loss else GLSim(*parts)


# Published argument -> the only value this package computes the same way. A file with another is refused, not guessed.
FIXED = {
    "dynamic_anchor": True,
    "anchor_random": False,
    "anchor_conv_stem": False,
    "anchor_resize_size": False,
    "select_top_k": False,
    "aggregator": True,
    "aggregator_norm": True,
    "aggregator_type": "transformer",
    "inference_crops": True,
    "encoder_norm": True,
    "pos_embedding_type": "learned",
    "hidden_act": "gelu",
    "head_norm": False,
    "head_act": False,
    "classifier_aux": None,
    "adapter": None,
    "deit_recipe": False,
}


def published_names(names: Collection[str]) -> Table:
    """The authors' names; with a classifier of both tokens theirs is `head_reducer`, and `head` stays unread."""
    both = ((r"^head\.", "unread_head."), (r"^head_reducer\.0\.", "head.linear."))
    return GLSIM_AUTHORS + (both if "head_reducer.0.weight" in names else ((r"^head\.", "head.linear."),))


def published_sizes(file: File) -> dict[str, Any]:
    """Sizes and options that the authors' arguments and the shapes tell."""
    refuse(file, FIXED)
    dim, _, *patch = file.shape("patch_embed.proj.weight")
    return {
        "backbone": "vit_base_patch16_224",
        "num_classes": file.shape("head.linear.weight")[0],
        "image_size": file.arguments["image_size"],
        "backbone_args": {
            "embed_dim": dim,
            "depth": file.count("blocks."),
            "num_heads": file.arguments["num_attention_heads"],
            "mlp_ratio": file.shape("blocks.0.mlp.fc1.weight")[0] / dim,
            "patch_size": patch[0],
        },
        **RULES["published"],
        "top_o": file.arguments["dynamic_top"],
        "metric": f"gls_{file.arguments['sim_metric']}",
        "classifier": file.arguments["classifier"],
        "norm_eps": file.arguments["layer_norm_eps"],
        "aggregator_depth": file.count("aggregator.blocks."),
    }


PUBLISHED = Published(
    "GLSim",
    published_names,
    published_sizes,
    ignored=(
        ("^anchor_class_token$", "created by the authors' code and never used"),
        ("^unread_head", "the classifier reads head_reducer.0"),
    ),
)
