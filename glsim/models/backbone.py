"""Backbones: any timm network behind one interface, above all vision transformers with one token grid.

timm does the work; these adapters give the tokens names (`Features`) and, on request, the attention logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.layers import DropPath
from timm.models._manipulate import checkpoint_seq
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from glsim.models.attention import explicit_attention
from glsim.models.patch_embed import OverlappingPatches, by, to_pair
from glsim.types import ConfigError, Features, choose

FAMILIES = (
    "ViT and DeiT (vit_base_patch16_224, deit_small_patch16_224), DINOv2 (vit_small_patch14_reg4_dinov2), "
    "DINOv3 (vit_small_patch16_dinov3), SigLIP (vit_base_patch16_siglip_224), "
    "EVA-02 (eva02_base_patch14_224), BEiT (beit_base_patch16_224)"
)

Attention = bool | Literal["maps"]  # whether attention is written down: True the logits, "maps" after the softmax


class Stage(NamedTuple):
    """What a transformer holds after one of its blocks, before the final norm."""

    tokens: Tensor  # (B, n, D)
    features: Features  # the same with names; attention is that of the blocks so far


class Scale(NamedTuple):
    """One of the maps of a network: those of a stage, or all tokens after a block, before the final norm."""

    tokens: Tensor  # (B, S, d): prefix, and patches row by row
    grid: tuple[int, int]  # of its patches
    prefix: int  # tokens before the first patch


MOST_SCALES = 4
END = ("norm", "fc_norm", "attn_pool", "head", "conv_head", "bn2")  # timm's names of what comes after the last block


class Backbone(nn.Module):
    """Adapter over a timm `VisionTransformer`, `Eva` or `Beit` built with `num_classes=0`.

    `image_size` (H, W) is the size it was built for; `patch_size` the pixels from one patch to the next.
    """

    has_attention = True  # of a kind that metrics can read
    of_tokens = True  # whether its maps are tokens, and not channels of a convolution
    frozen: Sequence[nn.Module] = ()  # parts that stay in evaluation while the others are trained

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net: Any = net
        # timm moves the final norm behind the pooling in some families: patches and class token need it all the same.
        self.late_norm = isinstance(net.norm, nn.Identity)
        self.attention_pool = getattr(net, "attn_pool", None) is not None  # its pooled vector is no mean of patches
        self.pooled = net.cls_token is None or self.attention_pool
        self.dim: int = net.embed_dim
        self.depth = len(net.blocks)
        self.skip: int = net.num_prefix_tokens  # tokens before the first patch
        self.num_prefix = self.skip if net.cls_token is not None else 0  # the same, where the first is a class token
        self.image_size: tuple[int, int] = to_pair(net.patch_embed.img_size)
        self.grid: tuple[int, int] = to_pair(net.patch_embed.grid_size)
        self.patch_size = to_pair(net.patch_embed.feat_ratio(as_scalar=False))
        self.any_size: bool = getattr(net, "dynamic_img_size", False)
        self.overlapping = isinstance(net.patch_embed, OverlappingPatches)

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode, but for `frozen` parts: no dropout acts there, and no mean of batch norm moves."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, images: Tensor, attention: Attention = False) -> Features:
        """Encode images.

        Args:
            images: (B, 3, H, W), normalised as the backbone expects.
            attention: True: the blocks spell their attention out, and `attention_logits` holds one (B, h, n, n) tensor
                a block; "maps": so does `attention_maps`, after the softmax; False: they stay on the fused kernels.

        Returns:
            Class token and patches after the final norm.
        """
        with self._collect(attention) as held:
            raw = self.net.forward_features(images)
        tokens = self.norm(raw)
        cls = self.net.forward_head(raw, pre_logits=True) if self.pooled else tokens[:, 0]
        maps: dict[str, Any] = {name: tuple(blocks) for name, blocks in held.items()}
        return Features(cls, tokens[:, self.skip :], self.grid_of(images), self.num_prefix, **maps)

    def class_token(self, images: Tensor) -> Tensor:
        """What `forward` gives as `cls` (B, D), for less: the MLP of a ViT's last block sees no other token."""
        block = self.net.blocks[-1]
        if type(block) is not Block or not self.num_prefix or self.pooled or self.depth < 2:
            return self(images).cls
        ((patches, prefix),) = self.net.forward_intermediates(
            images,
            indices=[self.depth - 2],
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        x = torch.cat((prefix, patches), dim=1)
        x = (x + block.drop_path1(block.ls1(block.attn(block.norm1(x)))))[:, :1]
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return self.norm(self.net.norm(x))[:, 0]

    def norm(self, raw: Tensor) -> Tensor:
        """What timm still leaves to do on the tokens `forward_features` returns (B, n, D)."""
        return self.net.fc_norm(raw) if self.late_norm else raw

    def stages(self, images: Tensor, attention: Attention = True) -> list[Stage]:
        """The tokens after every block but the last, for methods that choose tokens inside the network."""
        with self._collect(attention) as held:
            between = self.net.forward_intermediates(
                images,
                indices=list(range(self.depth - 1)),
                return_prefix_tokens=True,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        grid = self.grid_of(images)
        stages = []
        for i, (patches, prefix) in enumerate(between):
            maps: dict[str, Any] = {name: tuple(blocks[: i + 1]) for name, blocks in held.items()}
            f = Features(prefix[:, 0], patches, grid, self.num_prefix, **maps)
            stages.append(Stage(torch.cat((prefix, patches), dim=1), f))
        return stages

    def layers(self, images: Tensor) -> list[Tensor]:
        """All tokens (B, n, D) after every block, and at last after the final norm."""
        between = self.net.forward_intermediates(
            images, indices=None, return_prefix_tokens=self.skip > 0, output_fmt="NLC", intermediates_only=True
        )
        raw = [torch.cat((prefix, patches), dim=1) for patches, prefix in between] if self.skip else list(between)
        return [*raw, self.norm(self.net.norm(raw[-1]))]

    def scales(self, images: Tensor) -> list[Scale]:
        """The tokens after each of the last four blocks, or of as many as there are."""
        between = self.net.forward_intermediates(
            images,
            indices=min(MOST_SCALES, self.depth),
            return_prefix_tokens=self.skip > 0,
            output_fmt="NLC",
            intermediates_only=True,
        )
        raw = [torch.cat((prefix, patches), dim=1) for patches, prefix in between] if self.skip else between
        return [Scale(tokens, self.grid_of(images), self.skip) for tokens in raw]

    def scale_shapes(self) -> list[tuple[int, int]]:
        """Places and width of each of `scales`, for images of the usual size."""
        return [(self.skip + self.grid[0] * self.grid[1], self.dim)] * min(MOST_SCALES, self.depth)

    def scale_grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each of them."""
        return [self.grid] * min(MOST_SCALES, self.depth)

    def leave_end_frozen(self) -> None:
        """Have what comes after the last block not trained: methods that read `scales` alone have no loss on it."""
        for name in END:
            if isinstance(part := getattr(self.net, name, None), nn.Module):
                part.requires_grad_(False)

    def last_block(self, tokens: Tensor, chosen: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
        """The last block over some of the tokens.

        Args:
            tokens: (B, n, D) before it; of these its prefix is taken.
            chosen: (B, K, D), which follow the prefix.
            index: (B, K), which of the n tokens the chosen ones were: rotary positions (EVA-02, DINOv3) follow them.
            grid: rows and columns of the patches.

        Returns:
            (B, prefix + K, D), normalised.
        """
        tokens = torch.cat((tokens[:, : self.skip], chosen), dim=1)
        rope = getattr(self.net, "rope", None)
        if rope is None:
            tokens = self.net.blocks[-1](tokens)
        else:
            places = rope.get_embed(shape=list(grid))  # N, sines and cosines
            still = places.new_zeros(self.skip, places.shape[-1])
            still[:, places.shape[-1] // 2 :] = 1  # a prefix token has no place: it is not turned
            tokens = self.net.blocks[-1](tokens, rope=torch.cat((still, places))[index][:, None])
        return self.norm(self.net.norm(tokens))

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ConfigError unless images of `size` (H, W) can be encoded."""
        patch = self.net.patch_embed.patch_size if self.overlapping else self.patch_size
        if any(side < p or (side % p and not self.overlapping) for side, p in zip(size, patch, strict=True)):
            raise ConfigError(f"image size {by(size)} is no multiple of the patch, {by(patch)} pixels")
        if size != self.image_size and not self.any_size:
            raise ConfigError(
                f"{type(self.net).__name__} keeps relative positions for {by(self.image_size)} pixels only; "
                f"crops of {by(size)} need a ViT, DINO, SigLIP or EVA backbone"
            )

    def check_needs(self, method: str, needs: Sequence[str]) -> None:
        """Raise ConfigError for the first of `needs`, names of `NEEDS`, that this network does not have."""
        for need in needs:
            if lacks := choose(need, NEEDS, "need")(self):
                raise ConfigError(f"{method!r} {lacks}")

    @contextmanager
    def _collect(self, attention: Attention) -> Iterator[dict[str, list[Tensor]]]:
        """What the blocks that run inside write down of their attention, by the field of `Features` it belongs in."""
        if not attention:
            yield {}
            return
        alone = self.skip > self.num_prefix  # registers, no class token: their rows and columns say nothing of places
        maps = attention == "maps" and not alone
        with explicit_attention(self.net, maps) as collected:
            yield {"attention_maps" if maps else "attention_logits": collected}
        if alone:
            collected[:] = [a[..., self.skip :, self.skip :] for a in collected]

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of `images` (B, 3, H, W)."""
        rows, cols = self.net.patch_embed.dynamic_feat_size(images.shape[-2:])
        return rows, cols


class MapBackbone(Backbone):
    """Adapter over any other timm network: its last feature map is the grid, a place on it a patch.

    A place goes through the network's own head (pooling, norm, ..) like the whole map does, so that patches and the
    pooled vector live in one space. A network without a map has a single patch, its pooled vector.
    """

    has_attention = False

    def __init__(self, net: Any, image_size: tuple[int, int], any_size: bool) -> None:
        nn.Module.__init__(self)
        self.net = net
        self.skip = self.num_prefix = self.depth = 0
        self.attention_pool = getattr(net, "attn_pool", None) is not None
        self.pooled, self.image_size, self.any_size = True, image_size, any_size
        self.of_tokens = str(getattr(net, "output_fmt", "NCHW")) == "NHWC"
        f = self._look(torch.zeros(1, 3, *image_size))
        self.dim, self.grid = f.cls.shape[1], f.grid
        self.patch_size = (image_size[0] // f.grid[0], image_size[1] // f.grid[1])

    def forward(self, images: Tensor, attention: Attention = False) -> Features:
        """Encode images.

        Args:
            images: (B, 3, H, W), normalised as the network expects.
            attention: must be False.

        Raises:
            ConfigError: where attention is asked for.
        """
        if attention:
            raise ConfigError(f"{type(self.net).__name__} has no attention maps over its patches; choose a gls metric")
        raw = self.net.forward_features(images)
        cls = self.net.forward_head(raw, pre_logits=True)
        if raw.ndim != 4:
            return Features(cls, cls[:, None], (1, 1), 0)
        rows, cols, width = raw.shape[1:] if self.of_tokens else (*raw.shape[2:], raw.shape[1])
        places = (raw if self.of_tokens else raw.permute(0, 2, 3, 1)).reshape(
            -1, *((1, 1, width) if self.of_tokens else (width, 1, 1))
        )
        patches = self.net.forward_head(places, pre_logits=True).unflatten(0, (images.shape[0], rows * cols))
        return Features(cls, patches, (rows, cols), 0)

    def scales(self, images: Tensor) -> list[Scale]:
        """The maps of the last four stages; of Swin as PIM's authors take them, after the merging that ends a stage."""
        if isinstance(self.net, SwinTransformer):
            maps = self._merged(images)
        else:
            count = min(MOST_SCALES, len(self.net.feature_info))
            maps = self.net.forward_intermediates(images, indices=count, intermediates_only=True, output_fmt="NCHW")
            maps = [x.permute(0, 2, 3, 1) for x in maps]
        return [Scale(x.flatten(1, 2), (x.shape[1], x.shape[2]), 0) for x in maps]

    def _merged(self, images: Tensor) -> list[Tensor]:
        """Of a Swin what the second stage and all after it begin with, and what the last one ends with (B, h, w, d)."""
        x, maps = self.net.patch_embed(images), []
        for i, stage in enumerate(self.net.layers):
            x = stage.downsample(x)
            maps += [x] if i else []
            x = checkpoint_seq(stage.blocks, x) if stage.grad_checkpointing else stage.blocks(x)
        return [*maps, x][-MOST_SCALES:]

    def scale_shapes(self) -> list[tuple[int, int]]:
        """Places and width of each of `scales`, for images of the usual size."""
        return [(rows * cols, width) for rows, cols, width in self._sizes]

    def scale_grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each of them."""
        return [(rows, cols) for rows, cols, _ in self._sizes]

    @cached_property
    @torch.no_grad()
    def _sizes(self) -> list[tuple[int, int, int]]:
        was_training = self.net.training
        scales = self.eval().scales(torch.zeros(1, 3, *self.image_size))
        self.train(was_training)
        return [(*scale.grid, scale.tokens.shape[2]) for scale in scales]

    def class_token(self, images: Tensor) -> Tensor:
        """The pooled vector (B, D) alone."""
        return self(images).cls

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the map of `images` (B, 3, H, W); of another size than usual, one is encoded to see."""
        return self.grid if tuple(images.shape[-2:]) == self.image_size else self._look(images[:1]).grid

    @torch.no_grad()
    def _look(self, images: Tensor) -> Features:
        """What `forward` gives, leaving no trace in the statistics of the network's norms."""
        was_training = self.net.training
        f = self.eval()(images)
        self.train(was_training)
        return f

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ConfigError unless images of `size` (H, W) can be encoded."""
        if size != self.image_size and not self.any_size:
            raise ConfigError(f"{type(self.net).__name__} was built for {by(self.image_size)} pixels only")


def lacks_class_token(backbone: Backbone) -> str:
    """What to say where no class token is read at the end; "" where one is."""
    if backbone.num_prefix and not backbone.pooled:
        return ""
    return (
        f"reads a class token, which this {type(backbone.net).__name__} does not have; "
        "try ViT, DeiT, DINO or EVA backbones (with global_pool: token)"
    )


def lacks_last_block(backbone: Backbone) -> str:
    """What to say where the last block cannot take some of the tokens only; "" where it can."""
    net = backbone.net
    if isinstance(net, Beit) or getattr(net, "rope_mixed", False):
        return (
            f"sends some of the tokens through the last block, and the positions of this {type(net).__name__} need "
            "them all; try ViT, DeiT, DINO or EVA backbones"
        )
    return "needs two blocks or more" if backbone.depth < 2 else ""


def lacks_map(backbone: Backbone) -> str:
    """What to say where no maps of a method's own can pool several places; "" where they can."""
    return "pools by maps of its own; choose a backbone without attention pooling" if backbone.attention_pool else ""


def lacks_places(backbone: Backbone) -> str:
    """What to say where there is nothing to choose from; "" where there is."""
    one = backbone.grid == (1, 1)
    return "needs a feature map of several places; choose another backbone or larger images" if one else ""


def lacks_scales(backbone: Backbone) -> str:
    """What to say where there are no several maps; "" where there are."""
    if isinstance(backbone, MapBackbone):
        info = getattr(backbone.net, "feature_info", ())
        several = hasattr(backbone.net, "forward_intermediates") and len(info) > 1 and backbone.grid != (1, 1)
    else:
        several = backbone.depth > 1
    return "" if several else "reads the maps of several stages or blocks; try Swin, ViT, ResNet or ConvNeXt"


# What a method may need of a backbone (`NEEDS` in its file): a function that says what a network lacks.
NEEDS: dict[str, Callable[[Backbone], str]] = {
    "class_token": lacks_class_token,
    "last_block": lacks_last_block,
    "map": lacks_map,
    "places": lacks_places,
    "scales": lacks_scales,
}


def build_backbone(
    name: str,
    image_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    backbone_args: dict[str, Any] | None = None,
    *,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    norm_eps: float | None = None,
    stride: int | float | None = None,
    last_stride: int | None = None,
) -> Backbone:
    """Build a network of timm and wrap it.

    Args:
        name: of timm.
        image_size: pixels, one side or (height, width); None: the size timm lists for the weights.
        pretrained: start from timm's weights.
        backbone_args: handed to timm untouched (`depth=2`, `embed_dim=64`, ..).
        dropout: after the attention projection and in the MLP.
        drop_path: the same in every block (timm's own rises with depth; the paper's does not).
        norm_eps: epsilon of every LayerNorm; None: timm's.
        stride: from one patch of a ViT to the next, in pixels or as a share of the patch; None: patches do not overlap.
        last_stride: of the last stage of a ResNet; 1 keeps the places of the one before it, without dilation (timm's
            `output_stride` dilates); None: timm's.

    Raises:
        ConfigError: for an unknown name, a size the backbone cannot take, an argument timm does not know, and for
            pre-trained weights that cannot be had.
    """
    args = dict(backbone_args or {})
    if norm_eps is not None and not (isinstance(norm_eps, int | float) and norm_eps > 0):
        raise ConfigError(f"norm_eps={norm_eps!r}: a number above 0 is needed")
    if not timm.is_model(name):
        close = ", ".join(get_close_matches(name.partition(".")[0], timm.list_models(), n=5))
        raise ConfigError(f"timm has no model {name!r}" + (f"; close to it: {close}" if close else f"; try {FAMILIES}"))
    if image_size is not None:
        args["img_size"] = to_pair(image_size)
    for name_of, share in {"dropout": dropout, "drop_path": drop_path}.items():
        if not 0 <= share < 1:
            raise ConfigError(f"{name_of}={share}: from 0 to below 1")
    if dropout:
        args["proj_drop_rate"] = dropout
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    if family in ("vision_transformer", "vision_transformer_hybrid", "deit", "eva"):
        args.setdefault("dynamic_img_size", True)
    if stride is not None:
        if family not in ("vision_transformer", "deit"):
            raise ConfigError(
                f"stride={stride}: only the patches of ViT and DeiT can overlap, not those of {name!r}; "
                "without overlap: stride=None (--options.stride null)"
            )
        args["embed_layer"] = partial(OverlappingPatches, stride=stride)
    net, sized = _create(name, pretrained, args)
    if last_stride is not None:
        _set_last_stride(name, net, last_stride)
    for module in net.modules():
        if drop_path and hasattr(module, "drop_path1"):
            module.drop_path1, module.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        elif drop_path and hasattr(module, "drop_path"):
            module.drop_path = DropPath(drop_path)
        if norm_eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = norm_eps
    if isinstance(net, VisionTransformer | Eva | Beit):
        backbone = Backbone(net)
        backbone.check_size(backbone.image_size)
        return backbone
    size = to_pair(image_size if image_size is not None else list(net.pretrained_cfg["input_size"][-2:]))
    try:
        return MapBackbone(net, size, any_size=not sized)
    except Exception as error:
        raise ConfigError(f"{name!r} cannot encode images of {by(size)} pixels: {_first_line(error)}") from error


def _create(name: str, pretrained: bool, args: dict[str, Any]) -> tuple[Any, bool]:
    """timm's network, and whether it is made for one image size (a convolutional one takes any, and is not told)."""
    for key in {"depth", "embed_dim", "num_heads", "patch_size"} & set(args):  # which timm takes, and fails at later
        if isinstance(args[key], float):
            raise ConfigError(f"backbone_args: {key}={args[key]} is no whole number")
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=0, **args)
        fixed = getattr(getattr(net, "patch_embed", None), "img_size", None) is not None
        return net, "img_size" in args or fixed
    except Exception as error:  # timm and its networks check little, so that anything may come of odd arguments
        if isinstance(error, TypeError) and "'img_size'" in str(error):
            return _create(name, pretrained, {k: v for k, v in args.items() if k != "img_size"})
        if not isinstance(error, TypeError) and pretrained and _is_download_error(error):
            raise ConfigError(
                f"no pre-trained weights for {name!r}: {_first_line(error)}. Connect to the network once (they are "
                "kept in the cache), start from a file that you have: --init-from FILE (in Python weights=FILE; "
                "glsim weights FILE says whether it fits), or from nothing: --no-pretrained (pretrained=False)"
            ) from error
        if "proj_drop_rate" in str(error):
            raise ConfigError(f"dropout={args['proj_drop_rate']}: {name!r} has none; leave it at 0") from error
        shown = {k: v for k, v in args.items() if k != "embed_layer"}
        raise ConfigError(f"timm cannot build {name!r} with {shown}: {_first_line(error)}") from error


def _set_last_stride(name: str, net: Any, stride: int) -> None:
    """Have the last stage of a ResNet go by `stride`; ConfigError for another network."""
    if not hasattr(net, "layer4") or type(stride) is not int or stride not in (1, 2):
        raise ConfigError(f"last_stride={stride!r}: 1 or 2, of a ResNet of timm; leave it at null for {name!r}")
    for module in net.layer4[0].modules():
        if getattr(module, "stride", 1) in (2, (2, 2)):
            module.stride = (stride, stride)
            if isinstance(module, nn.AvgPool2d):  # of the shortcut, where it halves the map before its convolution
                module.kernel_size = module.stride


def _is_download_error(error: Exception) -> bool:
    text = f"{type(error).__module__} {type(error).__name__} {error}".lower()
    return isinstance(error, OSError) or any(w in text for w in ("huggingface", "connect", "pretrained", "http"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
