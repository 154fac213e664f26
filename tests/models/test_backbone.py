import pytest
import timm
import torch
from conftest import SMALL, SMALL_MAPS, small_model

from glsim import METRICS, ConfigError
from glsim.models.attention import explicit_attention
from glsim.models.backbone import MapBackbone, build_backbone

# name, shrunken, image size, prefix tokens, pooled vector instead of a class token, takes any size
FAMILIES = [
    ("vit_tiny_patch16_224", True, (64, 96), 1, False, True),
    ("vit_small_patch8_224", True, (32, 32), 1, False, True),
    ("deit_tiny_distilled_patch16_224", True, (64, 64), 2, False, True),
    ("deit3_small_patch16_224", True, (64, 64), 1, False, True),
    ("vit_small_patch14_reg4_dinov2", True, (56, 56), 5, False, True),
    ("vit_small_patch14_dinov2", True, (56, 70), 1, False, True),
    ("vit_small_patch16_dinov3", True, (64, 96), 5, False, True),
    ("vit_base_patch16_siglip_224", True, (64, 64), 0, True, True),
    ("vit_base_patch16_siglip_gap_224", True, (64, 64), 0, True, True),
    ("eva02_tiny_patch14_224", True, (56, 70), 1, False, True),
    ("beit_base_patch16_224", True, (64, 96), 1, False, False),
    ("beitv2_base_patch16_224", True, (64, 64), 1, False, False),
    ("vit_tiny_r_s16_p8_224", True, (128, 128), 1, False, True),
    ("test_vit", False, None, 1, False, True),
    ("test_vit2", False, None, 0, True, True),  # one register, no class token
]
IDS = [f[0] for f in FAMILIES]


@pytest.mark.parametrize(("name", "shrunk", "size", "prefix", "pooled", "any_size"), FAMILIES, ids=IDS)
def test_features_have_names_and_shapes(name, shrunk, size, prefix, pooled, any_size):
    torch.manual_seed(0)
    backbone = build_backbone(name, size, backbone_args=SMALL if shrunk else None).eval()
    images = torch.randn(2, 3, *backbone.image_size)
    with torch.inference_mode():
        f = backbone(images)
        g = backbone(images, attention=True)
        raw = backbone.net.forward_features(images)
        normed = raw if isinstance(backbone.net.norm, torch.nn.LayerNorm) else backbone.net.fc_norm(raw)
        classified = backbone.net(images)
    rows, cols = f.grid
    assert (rows * backbone.patch_size[0], cols * backbone.patch_size[1]) == backbone.image_size
    assert f.cls.shape == (2, backbone.dim)
    assert f.patches.shape == (2, rows * cols, backbone.dim)
    assert (f.num_prefix, backbone.pooled, backbone.any_size) == (prefix, pooled, any_size)
    assert f.attention_logits is None
    # the tokens are timm's own
    torch.testing.assert_close(f.patches, normed[:, backbone.skip :])
    if pooled:
        torch.testing.assert_close(f.cls, classified)
    # spelled-out attention gives the same, and its logits
    torch.testing.assert_close(g.cls, f.cls, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(g.patches, f.patches, atol=1e-5, rtol=1e-4)
    tokens = rows * cols + prefix
    assert len(g.attention_logits) == len(backbone.net.blocks)
    assert all(a.shape[0] == 2 and a.shape[2:] == (tokens, tokens) for a in g.attention_logits)
    if any_size:
        other = (backbone.patch_size[0] * 3, backbone.patch_size[1] * 5)
        assert backbone(torch.randn(1, 3, *other)).grid == (3, 5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_logits_are_those_of_the_unfused_path(name):
    """The independent truth: timm's own slow attention, watched through its dropout."""
    size = 56 if "eva" in name else 64
    backbone = build_backbone(name, size, backbone_args=SMALL).eval()
    for p in backbone.parameters():  # BEiT's position bias starts at zero
        torch.nn.init.normal_(p, std=0.3)
    images = torch.randn(2, 3, size, size)
    seen = []
    for block in backbone.net.blocks:
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: seen.append(out))
        block.attn.fused_attn = False
    with torch.inference_mode():
        slow = backbone(images)
        probabilities, seen[:] = list(seen), []
        f = backbone(images, attention=True)
    assert not seen  # the fused switch was on inside
    assert all(block.attn.fused_attn is False for block in backbone.net.blocks)  # and put back
    torch.testing.assert_close(f.patches, slow.patches, atol=1e-4, rtol=1e-4)
    for logits, p in zip(f.attention_logits, probabilities, strict=True):
        torch.testing.assert_close(logits.softmax(dim=-1), p, atol=1e-5, rtol=1e-4)


def test_explicit_attention_is_undone_after_an_exception():
    backbone = build_backbone("vit_tiny_patch16_224", 64, backbone_args=SMALL).eval()
    images = torch.randn(1, 3, 64, 64)
    before = backbone(images).cls
    switches = [m.fused_attn for m in backbone.modules() if hasattr(m, "fused_attn")]
    with pytest.raises(RuntimeError, match="on purpose"), explicit_attention(backbone.net) as logits:
        backbone.net.blocks[0](torch.randn(1, 17, 64))
        raise RuntimeError("on purpose")
    assert len(logits) == 1
    backbone(images)
    assert len(logits) == 1  # nothing listens any more
    assert [m.fused_attn for m in backbone.modules() if hasattr(m, "fused_attn")] == switches
    torch.testing.assert_close(backbone(images).cls, before)


@pytest.mark.parametrize(
    ("name", "size", "args", "grid"),
    [
        ("swin_tiny_patch4_window7_224", 64, SMALL_MAPS["swin_tiny_patch4_window7_224"], (2, 2)),
        ("convnext_atto", (64, 96), SMALL_MAPS["convnext_atto"], (2, 3)),
        ("resnet18", (96, 64), None, (3, 2)),
        ("hiera_tiny_224", 64, None, (1, 1)),  # its tokens are no map: one patch, the pooled vector
    ],
)
def test_families_without_one_grid_of_tokens_work_too(name, size, args, grid):
    torch.manual_seed(0)
    backbone = build_backbone(name, size, backbone_args=args).eval()
    assert isinstance(backbone, MapBackbone) and not backbone.has_attention
    images = torch.randn(2, 3, *backbone.image_size)
    with torch.inference_mode():
        f = backbone(images)
        torch.testing.assert_close(f.cls, backbone.net(images))  # what timm hands to its classifier
    assert f.grid == backbone.grid == grid and f.num_prefix == 0 and f.attention_logits is None
    assert f.patches.shape == (2, grid[0] * grid[1], backbone.dim) and f.patches.isfinite().all()
    assert METRICS["gls_cos"](f).shape == (2, 1, grid[0] * grid[1])
    with pytest.raises(ConfigError, match=r"has no attention maps over its patches; choose a gls metric"):
        backbone(images, attention=True)


def test_errors_say_what_would_work():
    with pytest.raises(
        ConfigError, match=r"timm has no model 'vit_bse_patch16_224'; close to it: .*vit_base_patch16_224"
    ):
        build_backbone("vit_bse_patch16_224")
    with pytest.raises(ConfigError, match=r"image size 225x225 is no multiple of the patch, 16x16"):
        build_backbone("vit_tiny_patch16_224", 225, backbone_args=SMALL)
    for size in (238, 63, (64, 63)):
        with pytest.raises(ConfigError, match=r"is no multiple of the patch, 16x16"):
            build_backbone("vit_tiny_patch16_224", size, backbone_args=SMALL)
    with pytest.raises(ConfigError, match=r"size \[64, 96, 3\]: give one side or \[height, width\]"):
        build_backbone("vit_tiny_patch16_224", [64, 96, 3], backbone_args=SMALL)
    with pytest.raises(ConfigError, match=r"cannot build.*dept"):
        build_backbone("vit_tiny_patch16_224", 64, backbone_args={"dept": 2})
    with pytest.raises(
        ConfigError, match=r"no pre-trained weights.*--init-from FILE \(in Python weights=FILE.*pretrained=False"
    ):
        build_backbone("vit_tiny_patch16_224", pretrained=True)


def test_pretrained_weights_from_a_local_file(tmp_path):
    """The path a user without a network takes; positions are resampled to the image size."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors"), "custom_load": False}}
    backbone = build_backbone("vit_tiny_patch16_224", 96, pretrained=True, backbone_args={**SMALL, **overlay})
    assert backbone.grid == (6, 6)
    torch.testing.assert_close(backbone.net.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_registers_without_a_class_token_are_no_place_and_no_class():
    backbone = build_backbone("vit_medium_patch16_reg4_gap_256", 64, backbone_args=SMALL).eval()
    f = backbone(torch.randn(2, 3, 64, 64), attention=True)
    assert (backbone.skip, f.num_prefix, f.patches.shape) == (4, 0, (2, 16, 64))
    assert all(a.shape == (2, 2, 16, 16) for a in f.attention_logits)
    assert METRICS["attention"](f).shape == (2, 1, 16)


def test_dropout_and_constant_drop_path():
    backbone = build_backbone(
        "vit_tiny_patch16_224", 64, backbone_args=SMALL, dropout=0.1, drop_path=0.2, norm_eps=1e-12
    )
    assert {b.drop_path1.drop_prob for b in backbone.net.blocks} == {0.2}  # the same in every block
    assert {b.attn.proj_drop.p for b in backbone.net.blocks} == {0.1}
    assert {m.eps for m in backbone.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}


@pytest.mark.parametrize(
    "options", [{"drop_path": -1.0}, {"drop_path": 2.0}, {"dropout": 1.0}, {"dropout": -0.1}], ids=str
)
def test_shares_that_are_none_are_refused(options):
    with pytest.raises(ConfigError, match=r"from 0 to below 1"):
        small_model("plain", **options)
