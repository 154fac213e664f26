"""One contract for every method x metric x backbone family, and what is particular to GLSim."""

import inspect
import pickle
import warnings

import pytest
import torch
from conftest import small_model

import glsim
from glsim import METHODS, METRICS, ConfigError
from glsim.heads import CLASSIFIERS, Aggregator, Classifier
from glsim.losses import objective

BACKBONES = {  # name -> image size
    "vit_tiny_patch16_224": (64, 96),
    "vit_small_patch8_224": 32,
    "vit_base_patch32_224": 128,
    "deit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "vit_small_patch14_dinov2": 56,
    "vit_small_patch14_reg4_dinov2": (56, 70),
    "vit_small_patch16_dinov3": 64,
    "vit_base_patch16_siglip_224": 64,
    "vit_base_patch16_siglip_gap_224": 64,
    "eva02_tiny_patch14_224": 56,
    "beit_base_patch16_224": 64,
    "beitv2_base_patch16_224": 64,
    "test_vit": None,
    "test_vit2": None,
}
CASES = [
    (method, metric, backbone)
    for method in METHODS
    for metric in (METRICS if method == "glsim" else [None])
    for backbone in BACKBONES
    if metric in (None, "gls_cos", "attention") or backbone in ("vit_tiny_patch16_224", "vit_base_patch16_siglip_224")
]


@pytest.mark.parametrize(("method", "metric", "backbone"), CASES)
def test_contract(method, metric, backbone, tmp_path):
    options = {"metric": metric} if metric else {}
    model = small_model(method, backbone, BACKBONES[backbone], **options)
    size = model.backbone.image_size
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(images)

    assert isinstance(output, glsim.Output)
    assert output.logits.shape == (3, 5) and output.logits.isfinite().all()
    if output.selection is not None:
        rows, cols = output.selection.grid
        assert output.selection.scores.shape == (3, rows * cols) and output.selection.scores.isfinite().all()
        assert output.selection.indices.shape == (3, 4)
        left, top, right, bottom = output.selection.boxes.unbind(1)
        assert (left >= 0).all() and (left < right).all() and (right <= size[1]).all()
        assert (top >= 0).all() and (top < bottom).all() and (bottom <= size[0]).all()
        assert output.crops.shape == (3, 3, *size)

    order = [2, 0, 1]  # each image's answer is its own
    with torch.inference_mode():
        torch.testing.assert_close(model(images[order]).logits, output.logits[order], atol=1e-4, rtol=1e-4)

    model.train()
    objective(model(images), torch.tensor([0, 1, 2])).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A pooled vector leaves a class token that nothing reads after the last block; a key's bias cancels in the softmax.
    assert not without, without

    model.eval()
    glsim.save(model, tmp_path / "bundle", labels=list("abcde"))
    with torch.inference_mode():
        again = glsim.load(tmp_path / "bundle")
        assert torch.equal(again(images).logits, model(images).logits)
    assert again.config["label_names"] == list("abcde")


@pytest.mark.parametrize("metric", ["gls_cos", "attention"])
@pytest.mark.parametrize(
    "backbone", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"]
)
def test_compile_and_export_take_the_whole_model(metric, backbone):
    model = small_model(backbone=backbone, metric=metric)
    images = torch.randn(3, 3, 64, 64)
    torch._dynamo.reset()
    with torch.inference_mode():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
    assert torch.equal(compiled.selection.boxes, expected.selection.boxes)
    torch.testing.assert_close(compiled.logits, expected.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own making, inside export
        batch = torch.export.Dim("batch", min=1, max=16)
        exported = torch.export.export(model, (images,), dynamic_shapes={"images": {0: batch}}).module()
    five = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(exported(five).logits, model(five).logits, atol=1e-4, rtol=1e-4)


def test_the_forward_reads_like_the_paper():
    from glsim.models.glsim import GLSim

    code = [ln for ln in inspect.getsource(GLSim.forward).splitlines() if ln.strip() and '"""' not in ln]
    assert len(code) <= 6


def test_models_can_be_pickled():
    model = small_model()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images).logits, model(images).logits)


def test_a_new_model_starts_from_even_odds():
    model = small_model(head=False)
    assert (model(torch.randn(2, 3, 64, 64)).logits == 0).all()


def test_no_class_token_means_the_pooled_vector():
    model = small_model(backbone="vit_base_patch16_siglip_gap_224")
    f = model.features(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(f.cls, f.patches.mean(dim=1))


def test_smaller_crops():
    model = small_model(crop_size=32)
    output = model(torch.randn(2, 3, 64, 64))
    assert output.crops.shape == (2, 3, 32, 32) and output.logits.isfinite().all()
    with pytest.raises(ConfigError, match="keeps relative positions for 64x64 pixels only"):
        small_model(backbone="beit_base_patch16_224", crop_size=32)
    with pytest.raises(ConfigError, match="30x30 is no multiple"):
        small_model(crop_size=30)


def test_classifiers_read_the_tokens_as_published():
    torch.manual_seed(0)
    tokens = torch.randn(2, 2, 8)
    logits = {}
    for kind in CLASSIFIERS:
        head = Classifier(8, 3, kind)
        torch.nn.init.constant_(head.linear.weight, 0.5)
        head.linear.weight.data[0] = -1
        logits[kind] = head(tokens)
        each = tokens @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(logits["cls"], each[:, 0])
    torch.testing.assert_close(logits["avg_cls"], (each[:, 0] + each[:, 1]) / 2)
    torch.testing.assert_close(logits["max_cls"], torch.maximum(each[:, 0], each[:, 1]))


def test_aggregator_has_the_published_shape():
    aggregator = Aggregator(768, drop_path=0.1, dropout=0.1, norm_eps=1e-12)
    block = aggregator.blocks[0]
    assert (block.attn.num_heads, block.mlp.fc1.out_features, block.drop_path1.drop_prob) == (12, 3072, 0.1)
    assert aggregator.norm.eps == 1e-12
    head = 200 * 768 + 200
    published = 93.04e6  # parameters of GLSim, ViT-B/16, CUB
    vit_b = 85_798_656
    ours = vit_b + sum(p.numel() for p in aggregator.parameters()) + head
    assert abs(ours - published) < 0.01e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("glsm", "test_vit", 3), "unknown method 'glsm'; choose from: glsim, plain"),
        (("glsim", "test_vit", 0), "num_classes=0; at least one"),
    ],
)
def test_wrong_names_list_the_choices(arguments, message):
    with pytest.raises(ConfigError, match=message):
        glsim.create_model(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topo": 8}, "'glsim' has no option topo; its options: .*top_o"),
        ({"metric": "gls"}, "unknown metric 'gls'; choose from: attention, gls_cos"),
        ({"box": "x"}, "unknown box rule 'x'; choose from: exclusive, inclusive"),
        ({"classifier": "x"}, "unknown classifier 'x'; choose from: avg_cls, cls, max_cls"),
        ({"top_o": 17}, "top_o=17, but the grid of 'vit_tiny_patch16_224' has 16 patches"),
        ({"top_o": 0}, "top_o=0"),
        ({"top_o": 4.0}, "top_o=4.0"),
    ],
)
def test_wrong_options_say_what_would_work(options, message):
    with pytest.raises(ConfigError, match=message):
        small_model(**options)
