"""One contract for every method x metric x backbone family, and what is particular to each method."""

import inspect
import pickle
import warnings
from importlib import import_module
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, SMALL_MAPS, SMALL_OPTIONS, assert_same_weights, choices, small_model
from pairwise import pairwise_cover
from safetensors.torch import save_file

import glsim
from glsim import METHODS, METRICS, ConfigError
from glsim.checkpoints.init_from import init_from
from glsim.models import cal, find_method
from glsim.models.attention import explicit_attention, paired_attention
from glsim.models.backbone import build_backbone
from glsim.models.boxes import BOX_RULES, CONTROLS, crop_and_resize, select, select_component
from glsim.models.heads import CLASSIFIERS, Aggregator, Classifier
from glsim.models.losses import objective
from glsim.models.patch_embed import OverlappingPatches
from glsim.models.plain import Plain
from glsim.models.pyramid import Pyramid
from glsim.models.scores import NEEDS_ATTENTION
from glsim.types import EMBEDDINGS

DEEP = {"depth": 3}  # two blocks to choose from, and the last
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
MAPS = {"resnet18": (64, 96), "swin_tiny_patch4_window7_224": 64, "convnext_atto": (96, 64)}
SIZES = BACKBONES | MAPS
NO_CLASS_TOKEN = {"vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224", "test_vit2", *MAPS}
ROTARY = {"vit_small_patch16_dinov3", "eva02_tiny_patch14_224"}
RELATIVE = {"beit_base_patch16_224", "beitv2_base_patch16_224"}


def builder(method):
    return import_module(METHODS[method]).build


def default_metric(method):
    """The metric a method uses by itself, None where it has no such option: read off its builder."""
    option = inspect.signature(builder(method)).parameters.get("metric")
    return option and option.default


def options_for(method, backbone):
    options = {}
    if method == "transfg" and backbone in ROTARY:
        options["stride"] = None  # rotary positions cannot overlap
    if method == "glsim" and backbone in MAPS:
        options["top_o"] = 1
    return options


def refusal(method, backbone):
    """What a method says of a family it cannot take; None where it can."""
    if method == "transfg" and backbone in RELATIVE | ROTARY | set(MAPS):
        return r"stride=0.75: only the patches of ViT and DeiT can overlap, not those of '" + backbone
    if "class_token" in find_method(method).needs and backbone in NO_CLASS_TOKEN:
        return rf"'{method}' reads a class token, which this \w+ does not have; try ViT, DeiT, DINO or EVA"
    if method in ("ffvt", "ielt") and backbone in RELATIVE:
        return rf"'{method}' sends some of the tokens through the last block.* need them all; try ViT, DeiT"
    if "map" in find_method(method).needs and backbone == "vit_base_patch16_siglip_224":
        return r"'cal' pools by maps of its own; choose a backbone without attention pooling"
    return None


def metrics_for(method, backbone):
    default = default_metric(method)
    if default is None:
        return [None]
    every = dict.fromkeys([default, *METRICS])
    if backbone in MAPS:
        return [m for m in every if m not in NEEDS_ATTENTION]
    return list(every)


def takes(method, backbone):
    return refusal(method, backbone) is None or (method == "transfg" and backbone in ROTARY)


CASES = [
    (method, metric, backbone)
    for method in METHODS
    for backbone in SIZES
    if takes(method, backbone)
    for metric in metrics_for(method, backbone)
]
PAIRS = set(pairwise_cover(CASES))  # what `make test` runs; the whole product is slow
REFUSED = [(method, backbone) for method in METHODS for backbone in SIZES if refusal(method, backbone)]


def build(method, backbone="vit_tiny_patch16_224", size=64, **options):
    deep = {} if backbone in MAPS or backbone.startswith("test_") else DEEP
    return small_model(method, backbone, size, args=deep, **options)


def pictures(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected_patches(method, metric, backbone):
    """How many patches a small model names (K), from the definition of each method."""
    patches = backbone.grid[0] * backbone.grid[1]
    blocks = len(getattr(backbone.net, "blocks", ()))
    return {
        "glsim": 1 if not backbone.has_attention else 4,
        "transfg": {"psm": 2, "maws": blocks - 1, "mhv": blocks - 1}.get(metric, 1),  # one a head, or a block
        "ffvt": 3 * (blocks - 1),
        "rams": patches,
        "aftrans": patches,
        "dcal": max(1, round(0.1 * patches)),
        "ielt": 4,
        "cal": 32,
        "r2trans": patches,
        "pim": min(32, (patches + backbone.skip) // 2),  # of the last map
        "herbs": min(32, (patches + backbone.skip) // 2),
    }[method]


# By default methods that take any network and no metric are tried on one network of each kind: what else is new about
# them is the same on all of its kind. The others run with the slow tests.
ONE_OF_EACH = {
    "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "beit_base_patch16_224",
    "vit_base_patch16_siglip_224", "test_vit2", *MAPS,
}  # fmt: skip
NEW_ONES = {"pim", "herbs", "r2trans", "ifa", "apinet"}
SPARED = {case for case in PAIRS if case[0] in NEW_ONES and case[2] not in ONE_OF_EACH}
PAIRS -= SPARED


def test_the_cases_cover_what_there_is():
    assert {m for m in METHODS if default_metric(m)} == {m for m in METHODS if small_model(m).metric is not None}
    assert default_metric("glsim") == "gls_border" and default_metric("plain") is default_metric("cal") is None
    assert set(SMALL_MAPS) == set(MAPS)
    for method in METHODS:
        ours = {(metric, backbone) for m, metric, backbone in CASES if m == method}
        assert len({backbone for _, backbone in ours}) >= 11
        if default_metric(method):
            assert {metric for metric, _ in ours} >= set(METRICS)


def test_a_cover_is_small_and_holds_every_pair():
    cases = list(product(range(4), "wxyz", (None, True, 2.0)))
    few = pairwise_cover(cases)
    assert few == pairwise_cover(cases) and set(few) <= set(cases) and 16 <= len(few) <= 20  # 4 x 4 is the least
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(case[i], case[j]) for case in few} == {(case[i], case[j]) for case in cases}
    assert pairwise_cover([(1, 2), (1, 2)]) == [(1, 2)] and pairwise_cover([("a",), ("b",)]) == []


CONTRACT = [pytest.param(*case, marks=[] if case in PAIRS else pytest.mark.slow) for case in CASES]


def test_by_default_every_pair_meets_the_contract():
    """Each method on each backbone, each metric on each backbone, each method with each metric that go together."""
    run = [case.values for case in CONTRACT if not case.marks]
    assert [case.values for case in CONTRACT] == CASES and len(run) < len(CASES) / 4
    together = {(method, backbone) for method in METHODS for backbone in SIZES if takes(method, backbone)}
    spared = {(method, backbone) for method, _, backbone in SPARED}
    assert {(method, backbone) for method, _, backbone in run} == together - spared
    assert not {backbone for _, backbone in spared} & ONE_OF_EACH
    chosen = {(method, m) for method, backbone in together for m in metrics_for(method, backbone)}
    assert {(method, metric) for method, metric, _ in run} == chosen
    on = {(m, backbone) for method, backbone in together for m in metrics_for(method, backbone)}
    assert {(metric, backbone) for _, metric, backbone in run} == on


@pytest.mark.parametrize(("method", "metric", "backbone"), CONTRACT)
def test_contract(method, metric, backbone, tmp_path):
    options = options_for(method, backbone) | ({"metric": metric} if metric else {})
    model = build(method, backbone, SIZES[backbone], **options)
    height, width = model.backbone.image_size
    images = pictures(3, 3, height, width)
    with torch.inference_mode():
        output = model(images)

    assert isinstance(output, glsim.Output)
    assert output.logits.shape == (3, 5) and output.logits.isfinite().all()
    assert output.logits.std(dim=0).min() > 0  # the images are told apart
    assert not output.aux and set(output.embeddings) <= set(find_method(method).embeddings)
    chosen = output.selection
    assert (chosen is None) == (method in ("plain", "ifa", "apinet"))
    if chosen is not None:
        rows, cols = chosen.grid
        assert chosen.grid == model.backbone.grid
        assert chosen.scores.shape == (3, rows * cols) and chosen.scores.isfinite().all()
        assert chosen.indices.shape == (3, expected_patches(method, metric, model.backbone))
        assert chosen.indices.dtype == torch.int64 and chosen.indices.ndim == 2
        assert chosen.indices.min() >= -1 and chosen.indices.max() < rows * cols
        assert chosen.boxes.shape == (3, 4) and chosen.boxes.dtype == torch.int64
        left, top, right, bottom = chosen.boxes.unbind(1)
        assert (left >= 0).all() and (left < right).all() and (right <= width).all()
        assert (top >= 0).all() and (top < bottom).all() and (bottom <= height).all()
    assert (output.crops is not None) == find_method(method).crops
    if output.crops is not None:
        assert output.crops.shape == (3, 3, height, width) and output.crops.isfinite().all()

    order = [2, 0, 1]  # each image's answer is its own, in any order and company
    with torch.inference_mode():
        turned, alone = model(images[order]), model(images[:1])
    torch.testing.assert_close(turned.logits, output.logits[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.logits, output.logits[:1], atol=1e-4, rtol=1e-4)
    if chosen is not None:
        assert torch.equal(turned.selection.boxes, chosen.boxes[order])
        assert torch.equal(alone.selection.boxes, chosen.boxes[:1])

    model.train()
    trained = model(images)
    assert trained.logits.shape == (3, 5)
    loss = objective(trained, torch.tensor([0, 1, 2]))
    assert loss.shape == () and loss.isfinite()
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without, without
    broken = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.isfinite().all()]
    assert not broken, broken

    model.eval()
    glsim.save(model, tmp_path / "bundle", labels=list("abcde"))
    again = glsim.load(tmp_path / "bundle")
    assert_same_weights(again, model)
    with torch.inference_mode():
        torch.testing.assert_close(again(images).logits, model(images).logits, atol=1e-5, rtol=1e-5)
    assert again.config.label_names == list("abcde")


def test_a_need_that_does_not_exist_is_refused_by_name():
    with pytest.raises(
        ConfigError, match="unknown need 'grid'; choose from: class_token, last_block, map, places, scales"
    ):
        build_backbone("test_vit").check_needs("x", ["grid"])


@pytest.mark.parametrize(("method", "backbone"), REFUSED)
def test_families_that_a_method_cannot_take_are_refused(method, backbone):
    with pytest.raises(ConfigError, match=refusal(method, backbone)):
        build(method, backbone, SIZES[backbone])


@pytest.mark.parametrize("backbone", [*sorted(RELATIVE), *MAPS])
def test_without_overlapping_patches_transfg_still_needs_a_class_token_and_free_positions(backbone):
    message = "reads a class token" if backbone in MAPS else "sends some of the tokens through the last block"
    with pytest.raises(ConfigError, match=f"'transfg' {message}"):
        build("transfg", backbone, SIZES[backbone], stride=None)


@pytest.mark.parametrize(("metric", "backbone"), list(zip(sorted(NEEDS_ATTENTION), cycle(MAPS))))
def test_networks_without_attention_maps_refuse_metrics_that_read_them(metric, backbone):
    message = f"'{metric}' reads attention maps.*none of; {choices(set(METRICS) - NEEDS_ATTENTION)}$"
    with pytest.raises(ConfigError, match=message):
        build("glsim", backbone, SIZES[backbone], top_o=1, metric=metric)


@pytest.mark.parametrize("method", [m for m in METHODS if default_metric(m)])
def test_every_method_checks_its_metric(method):
    with pytest.raises(ConfigError, match=f"unknown metric 'gls'; {choices(METRICS)}$"):
        build(method, metric="gls")
    with pytest.raises(ConfigError, match="metric 'rollout' has no block; it has: first, last"):
        build(method, metric="rollout:block=1")


@pytest.mark.parametrize("method", [m for m in METHODS if default_metric(m)])
def test_the_answer_depends_on_what_is_selected(method):
    """Else a method is no test of its metric: the same weights, other patches, another answer."""
    images = pictures(4, 3, 96, 96)
    outputs = []
    for seed in (1, 2):
        model = spread(build(method, size=96, metric=f"random:seed={seed}"))
        with torch.no_grad():
            outputs.append(model(images))
    assert not torch.equal(outputs[0].selection.indices, outputs[1].selection.indices)
    assert not torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "seen"),
    [("glsim", 3), ("rams", 3), ("aftrans", 3), ("dcal", 3), ("transfg", 2), ("ffvt", 1), ("ielt", 1)],
)
def test_blocks_that_a_metric_will_not_see_are_refused_at_once(method, seen):
    """TransFG shows its metric all blocks but the last; FFVT and IELT score after the first block already."""
    for block in (-seen, seen - 1):
        model = build(method, metric=f"attention:block={block}")
        assert model(pictures(1, 3, 64, 64)).logits.isfinite().all()
    for block in (-seen - 1, seen):
        with pytest.raises(ConfigError, match=f"block must lie between {-seen} and {seen - 1} here"):
            build(method, metric=f"attention:block={block}")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lists_its_options(method):
    with pytest.raises(ConfigError, match=f"'{method}' has no option topo; its options: .*drop_path.*stride"):
        build(method, topo=8)


def export(module, *given):
    """`module`, exported with a free batch size: no loop over the batch, no wait for the device, nothing that fixes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own making, inside export
        sizes = tuple({0: torch.export.Dim("batch", min=1, max=16)} for _ in given)
        return torch.export.export(module, given, dynamic_shapes=sizes).module()


def assert_exports(model, images, five):
    with torch.no_grad():
        found, expected = export(model, images)(five), model(five)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


def also_slow(cases, default):
    """All `cases`, those beside `default` marked slow."""
    return [pytest.param(*case, marks=[] if case in default else pytest.mark.slow) for case in cases]


TRACED = list(
    product(["gls_cos", "attention"], ["vit_tiny_patch16_224", *sorted(ROTARY)[1:], "vit_base_patch16_siglip_224"])
)


@pytest.mark.parametrize(("metric", "backbone"), also_slow(TRACED, [TRACED[2], TRACED[4]]))
def test_compile_and_export_take_the_whole_model(metric, backbone):
    """A pooled vector, then rotary positions; GLSim with a class token is among all methods below."""
    model = small_model(backbone=backbone, metric=metric, args={"depth": 1})
    images = pictures(3, 3, 64, 64)
    torch._dynamo.reset()
    with torch.inference_mode():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
    assert torch.equal(compiled.selection.boxes, expected.selection.boxes)
    torch.testing.assert_close(compiled.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert_exports(model, images, pictures(5, 3, 64, 64, seed=2))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_exports_with_a_free_batch_size(method):
    """`len(tensor)`, for one, fixes the number of images."""
    model = small_model(method, "convnext_atto", maps=2) if method == "cal" else small_model(method)
    assert_exports(model, pictures(3, 3, 64, 64), pictures(5, 3, 64, 64, seed=2))


class Chooser(torch.nn.Module):
    """A box rule or control by itself."""

    def __init__(self, box):
        super().__init__()
        self.box = box

    def forward(self, scores):
        return select(scores, 4, (4, 4), (64, 64), self.box).boxes


@pytest.mark.parametrize("box", [*BOX_RULES, *CONTROLS, "random:inclusive"])
def test_every_box_exports_with_a_free_batch_size(box):
    scores, five = pictures(3, 1, 16), pictures(5, 1, 16, seed=2)
    assert torch.equal(export(Chooser(box), scores)(five), Chooser(box)(five))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("glsm", "test_vit", 3), f"unknown method 'glsm'; {choices(METHODS)}$"),
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
        ({"metric": "gls"}, f"unknown metric 'gls'; {choices(METRICS)}$"),
        ({"box": "x"}, f"unknown box rule 'x'; {choices(BOX_RULES | CONTROLS)}$"),
        ({"classifier": "x"}, f"unknown classifier 'x'; {choices(CLASSIFIERS)}$"),
        ({"top_o": 17}, "top_o=17, but the grid of the backbone has 16 patches; choose 1 to 16"),
        ({"top_o": 0}, "top_o=0"),
        ({"top_o": 4.0}, "top_o=4.0"),
        ({"method": "ffvt", "top_k": 17}, "top_k=17, but the grid of the backbone has 16 patches; choose 1 to 16"),
        ({"method": "rams", "threshold": 0.9}, "threshold=0.9: at least 1"),
        ({"method": "aftrans", "threshold": 0.9}, "threshold=0.9: at least 1"),
        ({"method": "dcal", "share": 0}, "share=0: above 0, at most 1"),
        ({"method": "dcal", "share": 1.1}, "share=1.1: above 0, at most 1"),
        ({"method": "ielt", "tokens": 126}, "tokens=126, votes=4: 1 <= votes <= tokens <= 16 patches is needed"),
        ({"method": "ielt", "votes": 13}, "tokens=12, votes=13"),
        ({"method": "ielt", "votes": 0}, "tokens=12, votes=0"),
        ({"method": "cal", "views": 3}, "unknown number of views 3; choose from: 1, 2, 8"),
        ({"method": "cal", "maps": 1}, "maps=1: two or more"),
        ({"method": "cal", "box": "moments"}, "unknown box rule 'moments'; choose from: exclusive, inclusive"),
        ({"method": "ielt", "tokens": [4, 4]}, r"tokens=\[4, 4\]: a whole number is needed, or a list of 1"),
        ({"method": "ielt", "ballot": 13}, r"and a ballot \(13\) of 1 to 12"),
        ({"method": "rams", "released": True}, "released=True: a second class token is needed"),
        ({"last_stride": 1}, "last_stride=1: 1 or 2, of a ResNet of timm; leave it at null for 'vit_tiny"),
        ({"backbone": "resnet18", "last_stride": 3, "top_o": 1}, "last_stride=3: 1 or 2"),
        ({"method": "ffvt", "args": {"depth": 1}}, "'ffvt' needs two blocks or more"),
        ({"method": "pim", "args": {"depth": 1}}, "'pim' reads the maps of several stages or blocks; try Swin"),
        ({"method": "pim", "selects": [5, 18]}, r"selects=\[5, 18\]: one number above 0, .* at most \[17, 17\]"),
        ({"method": "pim", "selects": 0}, "selects=0: one number above 0"),
        ({"method": "pim", "width": 0}, "width=0: 1 or more"),
        (
            {"method": "pim", "loss_weights": [1, 0]},
            r"loss_weights=\[1, 0\]: numbers from 0 on are needed, of mean logits",
        ),
        ({"method": "pim", "answer": "x"}, "unknown answer 'x'; choose from: combined, mean"),
        (
            {"method": "ifa", "exclusion": 0.1, "distance": 2},
            "exclusion=0.1, distance=2, temperature=1.0: from 0, 1 to 1, above 0",
        ),
        ({"method": "apinet", "hidden": 0}, "hidden=0, margin=0.05, ranking=1.0: 1 or more"),
        ({"method": "r2trans", "answer": "both"}, "answer='both', threshold=1.0: first or sum is needed"),
        ({"method": "herbs", "halve_every": 0}, "width=512, temperature=64.0, halve_every=0: above 0 is needed"),
        ({"method": "transfg", "stride": 17}, "stride=17 and patches of 16x16 pixels; give 1 to 16"),
        ({"method": "transfg", "stride": 0}, "stride=0 and patches of 16x16 pixels; give 1 to 16"),
    ],
)
def test_wrong_options_say_what_would_work(options, message):
    with pytest.raises(ConfigError, match=message):
        small_model(**options)


def test_models_can_be_pickled():
    model = small_model()
    again, images = pickle.loads(pickle.dumps(model)), torch.randn(1, 3, 64, 64)
    assert_same_weights(again, model)
    torch.testing.assert_close(again(images).logits, model(images).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("cal", "dcal")])
def test_a_new_model_starts_from_even_odds(method):
    model = small_model(method, head=False)
    assert (model(torch.randn(2, 3, 64, 64)).logits == 0).all()


def test_a_new_dcal_starts_from_even_odds():
    """Its logits are those of summed probabilities: all alike."""
    logits = small_model("dcal", head=False)(torch.randn(2, 3, 64, 64)).logits
    torch.testing.assert_close(logits.softmax(dim=1), torch.full((2, 5), 0.2))


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_are_what_the_answer_was_read_from(method):
    """The head, applied by hand to the embedding, gives the answer; the first pass gives the global one."""
    model = build(method, "resnet18", maps=2) if method == "cal" else build(method)
    images = pictures(3, 3, 64, 64)
    read = {
        "plain": lambda v: model.head(v["global"]),
        "r2trans": lambda v: model.head(v["global"]),
        "apinet": lambda v: model.head(v["global"]),
        "glsim": lambda v: model.head.linear(v["fused"]),
        "cal": lambda v: model.head(100 * v["fused"]),
        "dcal": lambda v: torch.logaddexp(
            *(head(part).log_softmax(-1) for head, part in zip(model.heads, v["fused"].chunk(2, 1), strict=True))
        ),
    }.get(method, lambda v: model.head(v["fused"]))
    with torch.inference_mode():
        output = model(images)
        assert set(output.embeddings) == set(find_method(method).embeddings)
        torch.testing.assert_close(read(output.embeddings), output.logits, atol=1e-4, rtol=1e-4)
        if "global" in output.embeddings:
            torch.testing.assert_close(output.embeddings["global"], model.features(images).cls)
        if "crop" in output.embeddings and method != "rams":  # rams has another class token there
            torch.testing.assert_close(output.embeddings["crop"], model.backbone(output.crops).cls)


def test_only_embeddings_that_are_described_exist():
    assert set().union(*(find_method(method).embeddings for method in METHODS)) == set(EMBEDDINGS)


# --- GLSim ----------------------------------------------------------------------------------------------------------


def test_the_forward_reads_like_the_paper():
    from glsim.models.glsim import GLSim

    code = [ln for ln in inspect.getsource(GLSim.forward).splitlines() if ln.strip() and '"""' not in ln]
    assert len(code) <= 6


CONTROLLED = [{"box": box} for box in (*CONTROLS, "none")] + [{"aggregator_depth": 0}]


@pytest.mark.parametrize("change", CONTROLLED, ids=lambda c: "-".join(map(str, c.values())))
def test_a_control_is_one_option_away(change, tmp_path):
    model, images = small_model(**change), pictures(3, 3, 64, 64)
    with torch.no_grad():
        output, turned = model(images), model(images[[2, 0, 1]])
    torch.testing.assert_close(turned.logits, output.logits[[2, 0, 1]], atol=1e-4, rtol=1e-4)
    if change == {"box": "whole"}:
        torch.testing.assert_close(output.crops, images)
    if change == {"box": "none"}:
        assert output.selection is None and output.crops is None
        torch.testing.assert_close(output.logits, model.head(model.aggregator(model.features(images).cls[:, None])))
    if "aggregator_depth" in change:
        tokens = torch.stack((model.features(images).cls, model.features(output.crops).cls))
        wanted = model.head.linear(model.aggregator.norm(tokens.mean(dim=0)))
        torch.testing.assert_close(output.logits, wanted, atol=1e-4, rtol=1e-4)
    glsim.save(model, tmp_path / "bundle")
    with torch.no_grad():
        again = glsim.load(tmp_path / "bundle")
        torch.testing.assert_close(again(images).logits, output.logits, atol=1e-5, rtol=1e-5)
    assert_same_weights(again, model)
    if change not in [{"box": box} for box in CONTROLS]:  # of those the boxes are exported above
        assert_exports(model, images, pictures(5, 3, 64, 64, seed=2))
    objective(model.train()(images), torch.tensor([0, 1, 2])).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_no_crop_answers_once():
    with pytest.raises(glsim.ConfigError, match="early_loss=0.5: box=none answers after the first pass anyway"):
        small_model(box="none", early_loss=0.5)


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


FIRST = [
    ("vit_tiny_patch16_224", 64),
    ("resnet18", 64),
    ("swin_tiny_patch4_window7_224", 64),
    ("beit_base_patch16_224", 64),
]


@pytest.mark.parametrize(("backbone", "first"), FIRST)
def test_a_first_pass_at_a_size_of_its_own(backbone, first):
    """The same answer as by hand: the image shrunk for the first pass, its box in all pixels, the crop out of them."""
    model = small_model(backbone=backbone, size=160, first_size=first, top_o=2, metric="gls_border", box="moments")
    images = torch.randn(2, 3, 160, 160)
    assert model.config.image_size == [160, 160] and model.backbone.image_size == (first, first)
    with torch.no_grad():
        output = model(images)
        f = model.backbone(F.interpolate(images, (first, first), mode="bilinear", antialias=True))
        chosen = select(glsim.METRICS["gls_border"](f), 2, f.grid, (160, 160), "moments")
        crops = crop_and_resize(images, chosen.boxes, (first, first))
        fused = model.aggregator(torch.stack((f.cls, model.backbone(crops).cls), dim=1))
    assert torch.equal(output.selection.boxes, chosen.boxes) and output.selection.grid == f.grid
    torch.testing.assert_close(output.crops, crops)
    torch.testing.assert_close(output.logits, model.head(fused), atol=1e-5, rtol=1e-5)


def test_a_first_pass_of_an_early_answer_at_a_size_of_its_own():
    model = small_model(size=128, first_size=64, crop_size=96, early_loss=1.0, margin=0.5)
    images = torch.randn(2, 3, 128, 128)
    given, early, selection = model.first_pass(images)
    torch.testing.assert_close(given, model.features(images).cls)
    assert early.shape == (2, 5) and selection.grid == (4, 4)
    assert model.second_pass(images, given, selection.boxes).crops.shape == (2, 3, 96, 96)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (None, {"first_size": 64}, "first_size=64: image_size is needed too"),
        (128, {"first_size": 60}, "60x60 is no multiple"),
        (128, {"first_size": 144}, "first_size=144: more than image_size=128"),
        (128, {"first_size": 64.0}, "size 64.0: give one side or"),
        (128, {"crop_size": True}, "size True: give one side or"),
        (128, {"first_size": -64}, "size -64: give one side or"),
        (128, {"first_size": 64, "box": "none"}, "first_size: box=none"),
        (64, {"top_o": 1.5}, "choose 1 to 16, or a share of them below 1"),
        (64, {"top_o": 0.0}, "choose 1 to 16, or a share of them below 1"),
        (64, {"top_o": "8"}, "top_o='8': a number is needed"),
    ],
)
def test_sizes_and_shares_that_cannot_be(size, options, message):
    with pytest.raises(ConfigError, match=message):
        small_model(size=size, **options)


def test_a_share_of_the_grid_means_the_same_at_every_size():
    for size, patches in ((64, 4), (128, 16)):  # a quarter
        output = small_model(size=size, top_o=0.25)(torch.randn(2, 3, size, size))
        assert output.selection.indices.shape == (2, patches)


@pytest.mark.parametrize("size", [64, None])
def test_smaller_crops_of_a_network_that_was_built_for_one_size(size):
    """Also where the size is timm's own default."""
    with pytest.raises(ConfigError, match=f"was built for {size or 224}x{size or 224} pixels only"):
        small_model(backbone="swin_tiny_patch4_window7_224", size=size, top_o=1, crop_size=32)


def test_smaller_crops_of_a_convolutional_network():
    output = small_model(backbone="resnet18", top_o=1, crop_size=32)(torch.randn(2, 3, 64, 64))
    assert output.crops.shape == (2, 3, 32, 32) and output.logits.isfinite().all()


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


# --- TransFG and FFVT: tokens of inner blocks, written out for a plain ViT ------------------------------------------


def spread(model, std=0.2):
    """Larger weights: attention that points somewhere, and answers that differ."""
    torch.manual_seed(3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


@torch.no_grad()
def walk(net, images, patches):
    """The tokens after every block of a timm ViT, and the attention logits inside, by plain matrix algebra.

    `patches` (B, N, D) come from the patch embedding.
    """
    tokens = torch.cat((net.cls_token.expand(len(images), -1, -1), patches), dim=1) + net.pos_embed
    states, logits = [], []
    for block in net.blocks:
        x = block.norm1(tokens)
        heads, width = block.attn.num_heads, x.shape[-1] // block.attn.num_heads
        qkv = (x @ block.attn.qkv.weight.T + block.attn.qkv.bias).split(x.shape[-1], dim=-1)
        q, k, v = (y.unflatten(-1, (heads, width)).transpose(1, 2) for y in qkv)
        s = q @ k.transpose(-1, -2) / width**0.5
        tokens = tokens + block.attn.proj((s.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
        states.append(tokens)
        logits.append(s)
    return states, logits


def unfolded(net, images):
    """Patches cut out by F.unfold, and the embedding as a matrix product."""
    embed = net.patch_embed
    columns = F.unfold(images, embed.patch_size, stride=embed.proj.stride)  # B 3PP N
    return columns.transpose(1, 2) @ embed.proj.weight.flatten(1).T + embed.proj.bias


@pytest.mark.parametrize("stride", [12, 0.75, 8, 16, 5])
@pytest.mark.parametrize("size", [(64, 64), (64, 100), (48, 33)])
def test_overlapping_patches_agree_with_unfold(stride, size):
    torch.manual_seed(0)
    embed = OverlappingPatches(img_size=size, patch_size=16, embed_dim=24, stride=stride)
    step = 12 if stride == 0.75 else stride
    rows, cols = (size[0] - 16) // step + 1, (size[1] - 16) // step + 1
    assert embed.grid_size == (rows, cols) and embed.num_patches == rows * cols and embed.feat_ratio() == step
    images = pictures(2, 3, *size)
    expected = F.unfold(images, 16, stride=step).transpose(1, 2) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(embed(images), expected, atol=1e-5, rtol=1e-4)
    corner = images[:, :, step : step + 16, :16].flatten(1) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    if rows > 1:
        torch.testing.assert_close(embed(images)[:, cols], corner, atol=1e-5, rtol=1e-4)  # row by row


@pytest.mark.parametrize("size", [64, (64, 96), 448])
def test_transfg_splits_images_as_published(size):
    model = build("transfg", size=size)
    height, width = model.backbone.image_size
    assert model.backbone.grid == ((height - 16) // 12 + 1, (width - 16) // 12 + 1)
    assert model.config.options["stride"] == 0.75
    assert build("transfg", size=64, stride=None).backbone.grid == (4, 4)
    assert build("transfg", size=64, stride=8).backbone.grid == (7, 7)


@pytest.mark.parametrize("stride", [0.75, None])
def test_transfg_agrees_with_a_loop(stride):
    model = spread(build("transfg", size=(64, 96), stride=stride))
    net, images = model.backbone.net, pictures(3, 3, 64, 96)
    states, logits = walk(net, images, unfolded(net, images))
    with torch.no_grad():
        output = model(images)
        for b in range(3):
            parts = []
            for h in range(2):
                a = [s[b, h].softmax(dim=-1) for s in logits[:-1]]
                parts.append(int((a[1] @ a[0])[0, 1:].argmax()))
            assert output.selection.indices[b].tolist() == parts
            before = states[-2][b]
            x = net.norm(net.blocks[-1](torch.stack([before[0], *(before[1 + i] for i in parts)])[None]))[0, 0]
            torch.testing.assert_close(output.logits[b], model.head(x), atol=1e-4, rtol=1e-4)


def test_transfg_is_trained_by_what_its_head_reads():
    model = spread(build("transfg")).train()
    output = model(pictures(3, 3, 64, 64))
    assert set(output.aux) == {"cross_entropy", "contrastive"}
    ((weight, logits),) = output.aux["cross_entropy"]
    assert weight == 1 and torch.equal(logits, output.logits)
    torch.testing.assert_close(model.head(output.aux["contrastive"]), output.logits)


@pytest.mark.parametrize("size", [64, 96, 120])
def test_the_box_of_overlapping_patches_lies_around_them(size):
    """Patches share the side evenly: the box holds the centre of each, 12 i + 8, and is no wider than the grid says."""
    model = spread(build("transfg", size=size))
    with torch.no_grad():
        chosen = model(pictures(6, 3, size, size)).selection
    cols = chosen.grid[1]
    for indices, (left, top, right, bottom) in zip(chosen.indices.tolist(), chosen.boxes.tolist(), strict=True):
        rows, columns = [i // cols for i in indices], [i % cols for i in indices]
        for first, last, lines in ((top, bottom, rows), (left, right, columns)):
            assert first <= 12 * min(lines) + 8 and 12 * max(lines) + 8 < last
            assert (first, last) == (min(lines) * size // cols, (max(lines) + 1) * size // cols)


@pytest.mark.parametrize("metric", ["maws", "attention", "gls_cos"])
def test_ffvt_agrees_with_a_loop(metric):
    model = spread(build("ffvt", metric=metric))
    net, images = model.backbone.net, pictures(3, 3, 64, 64)
    states, logits = walk(net, images, unfolded(net, images))
    with torch.no_grad():
        output = model(images)
        assert output.selection.indices.shape == (3, 6)
        for b in range(3):
            chosen, places, maps = [], [], []
            for block in range(2):
                s, tokens = logits[block][b], states[block][b]
                given = s.softmax(dim=2)[:, 0].mean(dim=0)
                if metric == "maws":
                    weights = given * s.softmax(dim=1)[:, :, 0].mean(dim=0)
                elif metric == "attention":
                    weights = given
                else:
                    weights = torch.stack([F.cosine_similarity(tokens[0], token, dim=0) for token in tokens])
                start = 0 if metric == "maws" else 1  # only the paper's own ranks the class token too
                best = sorted(range(start, len(weights)), key=lambda i, w=weights: -float(w[i]))[:3]
                chosen += [tokens[i] for i in best]
                places += [max(i - 1, -1) for i in best]
                maps.append(weights[1:])
            assert output.selection.indices[b].tolist() == places
            torch.testing.assert_close(output.selection.scores[b], sum(maps) / 2, atol=1e-5, rtol=1e-4)
            x = net.norm(net.blocks[-1](torch.stack([states[1][b][0], *chosen])[None]))[0, 0]
            torch.testing.assert_close(output.logits[b], model.head(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", sorted(ROTARY))
def test_rotary_positions_follow_the_tokens_into_the_last_block(backbone):
    """All patches, in any order: the class token must come out as it does from the whole network."""
    model = spread(build("transfg", backbone, SIZES[backbone], stride=None), 0.3).backbone
    images = pictures(2, 3, *model.image_size)
    with torch.no_grad():
        f, stage = model(images), model.stages(images)[-1]
        order = torch.randperm(f.patches.shape[1], generator=torch.Generator().manual_seed(0)).expand(2, -1)
        patches = stage.tokens[:, model.skip :][:, order[0]]
        last = model.last_block(stage.tokens, patches, order + model.skip, f.grid)
        misplaced = model.last_block(stage.tokens, patches, order.flip(1) + model.skip, f.grid)
    torch.testing.assert_close(last[:, 0], f.cls, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(last[:, model.skip :], f.patches[:, order[0]], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(misplaced[:, 0], f.cls, atol=1e-2)


@pytest.mark.parametrize("backbone", sorted(SIZES))
def test_the_class_token_alone_is_that_of_the_whole_pass(backbone):
    model = spread(build("plain", backbone, SIZES[backbone]), 0.3).backbone
    images, gradients = pictures(2, 3, *model.image_size), []
    for encode in (lambda: model(images).cls, lambda: model.class_token(images)):
        cls = encode()
        model.zero_grad()
        cls.square().sum().backward()
        gradients.append((cls, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


def test_the_last_mlp_of_a_second_pass_sees_one_token():
    model, seen = build("glsim"), []
    model.backbone.net.blocks[-1].mlp.register_forward_hook(lambda module, given, _: seen.append(given[0].shape[1]))
    model(pictures(2, 3, 64, 64))
    assert seen == [17, 1]


# --- RAMS-Trans and AF-Trans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_rams_encodes_the_crop_with_a_class_token_of_its_own(backbone):
    model = spread(build("rams", backbone))
    net, images = model.backbone.net, pictures(2, 3, 64, 64)
    with torch.no_grad():
        one, other, third = (pictures(1, 1, 64, seed=seed) for seed in (1, 2, 3))
        net.cls_token.copy_(one)
        model.crop_token.copy_(other)
        output = model(images)
        assert torch.equal(net.cls_token, one)
        whole = model.head(model.backbone(images).cls)
        net.cls_token.copy_(other)
        local = model.head(model.backbone(output.crops).cls)
        net.cls_token.copy_(one)
        torch.testing.assert_close(output.logits, (whole + local) / 2, atol=1e-4, rtol=1e-4)
        model.crop_token.copy_(third)
        changed = model(images)
    assert not torch.allclose(changed.logits, output.logits, atol=1e-3)
    assert torch.equal(changed.selection.boxes, output.selection.boxes)
    assert model.no_weight_decay() >= {"crop_token", "backbone.net.cls_token"}


def test_rams_as_released_answers_by_its_first_token_and_begins_its_box_a_pixel_earlier():
    model = spread(small_model("rams", args=DEEP | {"reg_tokens": 1}, released=True))
    images = pictures(3, 3, 64, 64)
    with torch.no_grad():
        output, f = model(images), model.features(images, attention=True)
        expected = select_component(glsim.METRICS["rams"](f), 1.2, (4, 4), (64, 64))
        torch.testing.assert_close(output.logits, model.head(f.cls))
        torch.testing.assert_close(output.embeddings["crop"], model.backbone.layers(output.crops)[-1][:, 1])
    assert torch.equal(output.selection.boxes, (expected.boxes - torch.tensor([1, 1, 0, 0])).clamp(min=0))
    objective(model.train()(images), torch.tensor([0, 1, 2])).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_rams_trains_both_class_tokens():
    model = build("rams").train()
    output = model(pictures(3, 3, 64, 64))
    (one, first), (other, second) = output.aux["cross_entropy"]
    assert one == other == 1
    torch.testing.assert_close((first + second) / 2, output.logits)
    before = model.crop_token.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    objective(output, torch.tensor([0, 1, 2])).backward()
    assert model.crop_token.grad.any() and model.backbone.net.cls_token.grad.any()
    optimizer.step()
    assert not torch.equal(model.crop_token, before)
    assert not torch.equal(model.crop_token, model.backbone.net.cls_token)


@pytest.mark.parametrize("method", ["rams", "aftrans"])
@pytest.mark.parametrize("threshold", [1.0, 1.3, 1.6])
def test_the_region_is_the_largest_component_above_the_threshold(method, threshold):
    model = build(method, size=96, threshold=threshold, metric="random")
    with torch.no_grad():
        chosen = model(pictures(6, 3, 96, 96)).selection
    expected = select_component(chosen.scores[:, None], threshold, (6, 6), (96, 96))  # tested against a flood fill
    assert torch.equal(chosen.boxes, expected.boxes) and torch.equal(chosen.indices, expected.indices)
    kept = (chosen.indices >= 0).sum() / chosen.indices.numel()
    assert 0 < kept < 1 - threshold / 2 + 0.1  # scores are uniform


def test_aftrans_weighs_the_blocks_by_squeeze_and_excitation():
    model = spread(build("aftrans"))
    images = pictures(2, 3, 64, 64)
    with torch.no_grad():
        f = model.features(images, attention=True)
        rows = torch.stack([a.softmax(dim=-1).mean(dim=1)[:, 0, 1:] for a in f.attention_logits], dim=1)
        first, _, second, _ = model.excite.excite
        hidden = F.gelu(rows.sum(dim=-1) @ first.weight.T + first.bias)
        weights = (hidden @ second.weight.T + second.bias).sigmoid()
        torch.testing.assert_close(f.layer_weights, weights)
        assert f.layer_weights.shape == (2, 3) and f.layer_weights.std() > 0
        expected = sum(weights[:, i, None] * rows[:, i] for i in range(3))
        output = model(images)
        torch.testing.assert_close(output.selection.scores, expected)
        both = model.backbone(images).cls, model.backbone(output.crops).cls
        torch.testing.assert_close(output.logits, (model.head(both[0]) + model.head(both[1])) / 2)


# --- DCAL -----------------------------------------------------------------------------------------------------------


def test_dcal_adds_the_probabilities_of_both_heads():
    model = spread(build("dcal", size=96))
    images = pictures(3, 3, 96, 96)
    with torch.no_grad():
        output, f = model(images), model.features(images)
        for b in range(3):
            patches = f.patches[b, output.selection.indices[b]]
            assert len(patches) == 4  # a tenth of 36
            queries = torch.cat((f.cls[b, None], patches))
            tokens = torch.cat((f.cls[b, None], f.patches[b]))
            x = naive_cross(model.cross, queries, tokens)
            both = model.heads[0](f.cls[b]).softmax(-1), model.heads[1](x.mean(dim=0)).softmax(-1)
            torch.testing.assert_close(output.logits[b].softmax(-1), (both[0] + both[1]) / 2, atol=1e-5, rtol=1e-4)


def naive_cross(block, queries, tokens):
    """Pre-norm cross attention and MLP, head by head; the query stream carries the residual."""
    q, x = block.norm1(queries), block.norm1(tokens)
    wq, wk, wv = block.attn.in_proj_weight.chunk(3)
    bq, bk, bv = block.attn.in_proj_bias.chunk(3)
    q, k, v = q @ wq.T + bq, x @ wk.T + bk, x @ wv.T + bv
    width = q.shape[1] // block.attn.num_heads
    out = []
    for h in range(block.attn.num_heads):
        part = slice(h * width, (h + 1) * width)
        out.append((q[:, part] @ k[:, part].T / width**0.5).softmax(dim=1) @ v[:, part])
    y = queries + block.attn.out_proj(torch.cat(out, dim=1))
    return block.norm(y + block.mlp(block.norm2(y)))


def test_dcal_is_distracted_by_another_image_in_training_only():
    model = spread(build("dcal"))
    one, two, three = pictures(3, 1, 3, 64, 64)
    with torch.no_grad():
        assert not model(torch.cat((one, two))).aux
        model.train()
        beside_two, beside_three = model(torch.cat((two, one))), model(torch.cat((three, one)))
        (a, w), (b, _) = beside_two.aux["uncertainty"], beside_three.aux["uncertainty"]
        assert a.shape == (3, 2, 5) and w is model.uncertainty
        torch.testing.assert_close(a[:2, 1], b[:2, 1])  # image alone, and its own patches
        assert not torch.allclose(a[2, 1], b[2, 1], atol=1e-3)  # attends to the partner too
        torch.testing.assert_close(beside_two.logits[1], beside_three.logits[1])
        model.eval()
        torch.testing.assert_close(model(torch.cat((two, one))).logits[1:], model(one).logits)
        torch.testing.assert_close(model(torch.cat((two, one))).logits, beside_two.logits)


@pytest.mark.parametrize("fused", [True, False])
def test_paired_attention_agrees_with_a_loop(fused):
    torch.manual_seed(0)
    net = build_backbone("vit_tiny_patch16_224", 64, backbone_args={"depth": 1, "embed_dim": 64, "num_heads": 2}).net
    attn, x = net.blocks[0].eval().attn, pictures(3, 7, 64)
    attn.fused_attn = fused
    with torch.no_grad():
        before = attn(x)
        with paired_attention(net):
            paired = attn(x)
        assert torch.equal(attn(x), before) and attn.fused_attn is fused  # undone
        expected = torch.zeros_like(x)
        for b in range(3):
            partner = (b - 1) % 3
            heads = []
            for h in range(2):
                part = slice(32 * h, 32 * h + 32)
                q, k, v = (attn.qkv.weight[64 * i : 64 * i + 64][part] for i in range(3))
                bq, bk, bv = (attn.qkv.bias[64 * i : 64 * i + 64][part] for i in range(3))
                both = torch.cat((x[b], x[partner]))
                logits = (x[b] @ q.T + bq) @ (both @ k.T + bk).T / 32**0.5
                heads.append(logits.softmax(dim=1) @ (both @ v.T + bv))
            expected[b] = attn.proj(torch.cat(heads, dim=1))
    torch.testing.assert_close(paired, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(paired, before, atol=1e-3)


@pytest.mark.parametrize("change", [paired_attention, explicit_attention])
def test_attention_is_put_back_after_an_exception(change):
    net = build_backbone("vit_tiny_patch16_224", 64, backbone_args={"depth": 2, "embed_dim": 64, "num_heads": 2}).net
    net.eval().blocks[0].attn.fused_attn = False
    net.blocks[1].attn.fused_attn = True
    images = pictures(2, 3, 64, 64)
    with torch.no_grad():
        before = net(images)
        with pytest.raises(RuntimeError, match="on purpose"), change(net):
            assert all(block.attn.fused_attn for block in net.blocks)
            raise RuntimeError("on purpose")
        assert [block.attn.fused_attn for block in net.blocks] == [False, True]
        assert torch.equal(net(images), before)


# --- IELT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "patches"), [(12, 16), (16, 16), (126, 784), (126, 196)])
def test_ielt_hands_out_exactly_its_tokens(tokens, patches):
    model = build("ielt")
    model.tokens = tokens
    g = torch.Generator().manual_seed(0)
    for blocks in (2, 11):
        for trial in range(40):
            shares = torch.rand(blocks, generator=g) ** (trial % 4) + (trial % 2 == 0) * 1e-3
            shares[trial % blocks] *= 0 if trial == 7 else 1
            model.shares = shares / shares.sum()
            block, rank = model.allot()
            assert block.shape == rank.shape == (tokens,)
            pairs = set(zip(block.tolist(), rank.tolist(), strict=True))
            assert len(pairs) == tokens  # no token twice
            counts = block.bincount(minlength=blocks).tolist()
            for i, count in enumerate(counts):
                assert sorted(r for b, r in pairs if b == i) == list(range(count))  # the best ones of each block
                share = float(model.shares[i]) * tokens
                assert count <= patches and abs(count - share) <= 1


def test_ielt_shares_move_in_training_only():
    model = spread(build("ielt"))
    images = pictures(3, 3, 64, 64)
    start = model.shares.clone()
    torch.testing.assert_close(start, torch.tensor([0.5, 0.5]))
    with torch.no_grad():
        model(images)
        assert torch.equal(model.shares, start)
        model.train()
        for _ in range(20):
            model(images)
            assert model.shares.sum().item() == pytest.approx(1, abs=1e-5) and (model.shares >= 0).all()
    assert not torch.equal(model.shares, start)
    assert "shares" in model.state_dict()
    assert not model.shares.requires_grad


def test_ielt_moves_the_shares_towards_what_the_refinement_keeps(monkeypatch):
    model = build("ielt").train()
    monkeypatch.setattr(model, "vote", lambda rows: torch.tensor([[0, 1, 2, 11]]).expand(len(rows), -1))
    output = model(pictures(3, 3, 64, 64))
    torch.testing.assert_close(model.shares, torch.tensor([0.5, 0.5]).lerp(torch.tensor([0.75, 0.25]), 0.001))
    (main, answer), (assisting, other) = output.aux["cross_entropy"]
    assert (main, assisting) == (0.6, 0.4)  # the published weights
    assert torch.equal(answer, output.logits) and other.shape == answer.shape


def test_ielt_takes_its_tokens_of_each_block_as_told():
    model = spread(build("ielt", tokens=[2, 10], ballot=6, assisted=True))
    block, _ = model.allot()
    assert block.bincount().tolist() == [2, 10] and (model.tokens, model.votes, model.ballot) == (12, 4, 6)
    (_, answer), (_, assist) = model.train()(pictures(2, 3, 64, 64)).aux["cross_entropy"]
    model.assisted = False
    model.shares.copy_(torch.tensor([2, 10]) / 12)
    plain = model(pictures(2, 3, 64, 64)).logits
    torch.testing.assert_close(answer, plain + assist.softmax(dim=1) * model.head.weight.sum(dim=1))


def test_ielt_starts_from_the_published_shares():
    model = small_model("ielt", args={"depth": 12})
    published = torch.tensor([16, 14, 12, 10, 8, 6, 8, 10, 12, 14, 16.0])
    torch.testing.assert_close(model.shares, published / 126)
    model.tokens = 126
    block, _ = model.allot()
    assert block.bincount().tolist() == published.tolist()


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.3, 0.7]])
def test_ielt_agrees_with_a_loop(shares):
    model = spread(build("ielt", metric="gls_cos"))  # a metric without ties
    model.shares.copy_(torch.tensor(shares))
    net, images = model.backbone.net, pictures(3, 3, 64, 64)
    states, _ = walk(net, images, unfolded(net, images))
    counts = [round(12 * shares[0]), 12 - round(12 * shares[0])]
    with torch.no_grad():
        output = model(images)
        for b in range(3):
            chosen, places = [], []
            for block, count in enumerate(counts):
                tokens = states[block][b]
                row = [float(F.cosine_similarity(tokens[0], token, dim=0)) for token in tokens[1:]]
                best = sorted(range(16), key=lambda i, row=row: -row[i])[:count]
                chosen += [tokens[1 + i] for i in best]
                places += best
            x = torch.stack([states[1][b][0], *chosen])[None]
            with explicit_attention(model.refine) as logits:
                refined = model.norm(model.refine(x)[0])
            votes = [0.0] * 12
            for head in logits[0][0]:
                row = head[0, 1:].tolist()
                for i in sorted(range(12), key=lambda i, row=row: -row[i])[:4]:
                    votes[i] += 1
            mean = logits[0][0][:, 0, 1:].softmax(dim=-1).mean(dim=0).tolist()
            kept = sorted(range(12), key=lambda i: (-votes[i], -mean[i]))[:4]
            assert output.selection.indices[b].tolist() == [places[i] for i in kept]
            last = net.norm(net.blocks[-1](torch.stack([x[0, 0], *(refined[1 + i] for i in kept)])[None]))
            torch.testing.assert_close(output.logits[b], model.head(last[0, 0]), atol=1e-4, rtol=1e-4)


# --- R2-Trans and IFA -----------------------------------------------------------------------------------------------


def test_what_no_query_sees_is_as_if_it_were_not_there():
    """The patches that stay, walked through a plain ViT alone, each with its own position."""
    model = spread(build("r2trans", answer="sum"))
    net, images = model.backbone.net, pictures(3, 3, 64, 64)
    with torch.no_grad():
        f = model.features(images, attention="maps")
        scores, keep = model.judge(f)
        received = sum(a.mean(dim=1)[:, 1:, 1:].sum(dim=1) for a in f.attention_maps) / 3
        torch.testing.assert_close(scores, F.layer_norm(received, (16,), model.norm.weight, model.norm.bias).sigmoid())
        assert keep.sum(dim=1).tolist() == [16 - sum(row < row.mean()) for row in scores]
        output = model(images)
        for b in range(3):
            kept = keep[b].nonzero()[:, 0]
            assert sorted(i for i in output.selection.indices[b].tolist() if i >= 0) == kept.tolist()
            x = unfolded(net, images[b, None])[:, kept] + net.pos_embed[:, 1 + kept]
            x = torch.cat((net.cls_token + net.pos_embed[:, :1], x), dim=1)
            second = net.norm(net.blocks(x))[0, 0]
            both = model.both(torch.cat((f.cls[b], second)))
            wanted = 4 * model.head(f.cls[b]) + 4 * model.head(second) + 2 * both
            torch.testing.assert_close(output.logits[b], wanted, atol=1e-3, rtol=1e-3)
        model.batch_share = True
        counts = model.judge(f)[1].sum(dim=1)
    assert counts.unique().tolist() == [16 - int((~keep).sum() / 3)]


def test_ifa_reads_the_class_tokens_of_all_blocks():
    model = spread(build("ifa", exclusion=0.01, distance=1))
    net, images = model.backbone.net, pictures(2, 3, 64, 64)
    states, _ = walk(net, images, unfolded(net, images))
    tokens = torch.stack([x[:, 0] for x in states], dim=2)
    vector = F.relu(tokens @ model.mix.weight[0] + model.mix.bias)
    vector = F.layer_norm(vector, (64,), model.norm.weight, model.norm.bias, 1e-12)
    output = model.train()(images)
    torch.testing.assert_close(output.logits, model.head(vector), atol=1e-4, rtol=1e-4)
    weight, t, d, given = output.aux["exclusion"]
    assert (weight, t, d) == (0.01, 1.0, 1)
    torch.testing.assert_close(given, tokens, atol=1e-4, rtol=1e-4)


# --- PIM and HERBS --------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive_combine(model, chosen):
    """The combiner's graph over joints of one image's chosen places (T, f), joint by joint: logits (C,)."""
    c = model.combiner
    h = c.pool.weight @ chosen + c.pool.bias[:, None]  # J f
    q, k = ((h @ x.weight[..., 0].T + x.bias).mean(dim=1) for x in (c.query, c.key))
    mixed = h @ c.mix.weight[..., 0].T + c.mix.bias
    out = torch.zeros_like(mixed)
    for i in range(len(h)):
        for j in range(len(h)):
            out[j] += mixed[i] * (c.adjacency[i, j] + c.alpha * torch.tanh(q[i] - k[j]))
    norm = c.norm
    out = (out - norm.running_mean) / (norm.running_var + norm.eps) ** 0.5 * norm.weight + norm.bias
    return model.head(c.read.weight[0] @ out + c.read.bias)


@pytest.mark.parametrize("method", ["pim", "herbs"])
@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "resnet18"])
def test_places_are_chosen_in_order_and_combined_as_a_loop_does(method, backbone):
    model = small_model(method, backbone, width=8, selects=[9, 7] if "vit" in backbone else [36, 20, 8, 3])
    model.combiner = type(model.combiner)(8, sum(model.counts), 2).eval()
    torch.nn.init.constant_(model.combiner.alpha, 0.5)
    images = pictures(2, 3, 64, 64)
    with torch.no_grad():
        output, scales = model(images), model.backbone.scales(images)
        tokens = [scale.tokens for scale in scales]
        maps = model.fpn(tokens) if method == "pim" else model.up(model.down(tokens))
        for b in range(2):
            chosen = []
            for x, classify, k in zip(maps, model.classify, model.counts, strict=True):
                p = classify(x)[b].softmax(dim=-1)
                mean = int(classify(x)[b].mean(dim=0).argmax())
                score = [float(row.max() if method == "pim" else row[mean]) for row in p]
                best = sorted(range(len(score)), key=lambda i, score=score: -score[i])[:k]
                chosen += [x[b, i] for i in best]
            assert output.selection.indices[b].tolist() == [max(i - model.backbone.skip, -1) for i in best]
            torch.testing.assert_close(
                output.logits[b], naive_combine(model, torch.stack(chosen)), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("upwards", [False, True])
def test_a_pyramid_adds_what_it_has_summed(upwards):
    torch.manual_seed(0)
    shapes, grids = [(16, 6), (4, 8), (4, 10)], [(4, 4), (2, 2), (2, 2)]
    maps = [torch.randn(2, *shape) for shape in shapes]
    with torch.no_grad():
        for learned, always in ((True, False), (True, True), (False, False)):
            pyramid = Pyramid(shapes, grids, 5, learned=learned, always=always, upwards=upwards)
            assert isinstance(pyramid.resample[1], torch.nn.Identity) != (learned and always)
            x = [project(m) for project, m in zip(pyramid.project, maps, strict=True)]

            def move(i, step, there, pyramid=pyramid, x=x, learned=learned):
                if learned and not isinstance(pyramid.resample[step], torch.nn.Identity):
                    layer = pyramid.resample[step]
                    return torch.einsum("ts,bsf->btf", layer.weight[..., 0], x[i]) + layer.bias[:, None]
                if learned or grids[i] == grids[there]:
                    return x[i]
                rows = x[i].unflatten(1, grids[i]).permute(0, 3, 1, 2)
                return F.interpolate(rows, grids[there], mode="bilinear").flatten(2).transpose(1, 2)

            if upwards:
                x[1] = x[1] + move(0, 0, 1)
                x[2] = x[2] + move(1, 1, 2)
            else:
                x[1] = x[1] + move(2, 1, 1)
                x[0] = x[0] + move(1, 0, 0)
            for found, wanted in zip(pyramid(maps), x, strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_maps_of_a_swin_are_taken_after_the_merging_that_ends_a_stage():
    backbone = build_backbone(
        "swin_tiny_patch4_window7_224", 64, backbone_args=SMALL_MAPS["swin_tiny_patch4_window7_224"]
    )
    images = pictures(2, 3, 64, 64)
    with torch.no_grad():
        between = backbone.eval().net.forward_intermediates(images, intermediates_only=True)
        scales = backbone.scales(images)
        for i, scale in enumerate(scales):
            wanted = between[i].permute(0, 2, 3, 1)
            wanted = backbone.net.layers[i + 1].downsample(wanted) if i < 3 else wanted
            torch.testing.assert_close(scale.tokens, wanted.flatten(1, 2), atol=1e-5, rtol=1e-4)
    assert [s.grid for s in scales] == backbone.scale_grids() == [(8, 8), (4, 4), (2, 2), (2, 2)]
    assert [tuple(s.tokens.shape[1:]) for s in scales] == backbone.scale_shapes()


def test_the_losses_of_pim_read_every_place():
    model = small_model("pim", width=8, selects=[5, 17], loss_weights=[0.5, 0.25, 5, 2], answer="mean").train()
    output = model(pictures(3, 3, 64, 64))
    (w1, whole), (w2, last), (wc, combined), (ws, few), (_, many) = output.aux["cross_entropy"]
    assert (w1, w2, wc, ws) == (0.5, 0.5, 2, 0.25) and few.shape == (5 * 3, 5) and many.shape == (17 * 3, 5)
    ((weight, dropped),) = output.aux["background"]  # nothing is left of the other map
    assert weight == 5 and dropped.shape == (3, 12, 5)
    torch.testing.assert_close((few.view(5, 3, 5).sum(0) + dropped.sum(1)) / 17, whole, atol=1e-5, rtol=1e-4)
    mean = (whole.softmax(-1) + last.softmax(-1) + combined.softmax(-1)) / 3
    torch.testing.assert_close(output.logits, mean.log())
    assert objective(output, torch.tensor([0, 1, 2])).isfinite()


def test_the_temperature_of_herbs_halves_with_the_epochs():
    model = small_model("herbs", temperature=16.0, halve_every=2).train()
    seen = []
    for epoch in range(5):
        model.start_epoch(epoch)
        seen.append(model(pictures(2, 3, 64, 64)).aux["refinement"][0][1])
    assert seen == [16, 16, 8, 8, 4]


# --- CAL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("views", "passes", "images_seen"), [(1, 1, 2), (2, 2, 4), (8, 8, 16)])
def test_cal_counts_its_views(views, passes, images_seen):
    model = build("cal", "resnet18", views=views, maps=4)
    seen = []
    model.backbone.register_forward_hook(lambda _m, given, _o: seen.append(len(given[0])))
    with torch.no_grad():
        model(pictures(2, 3, 64, 64))
        assert (len(seen), sum(seen)) == (passes, images_seen)
        seen.clear()
        model.train()(pictures(2, 3, 64, 64))
    assert sum(seen) == 6  # image, crop and masked copy


@pytest.mark.parametrize("views", [1, 2, 8])
def test_cal_averages_the_logits_of_its_views(views):
    model = build("cal", "resnet18", 160, views=views, maps=4)
    images = pictures(2, 3, 160, 160)
    with torch.no_grad():  # maps that say something in few places, so that crops at every threshold are crops
        x = model.backbone(images).patches @ model.attend.weight.T
        model.norm.bias.copy_(-(x / 1.001**0.5).flatten(0, 1).quantile(0.9, dim=0))

    def look(view):
        f = model.backbone(view)
        maps = naive_maps(model, f.patches)
        return naive_head(model, naive_pool(f.patches, maps)), maps, f.grid

    crops = {1: [], 2: [(0.1, 0.05)], 8: [(0.3, 0.1), (0.2, 0.1), (0.1, 0.05)]}[views]
    with torch.no_grad():
        logits, boxes = [], []
        for view in (images, images.flip(3)) if views == 8 else (images,):
            whole, maps, grid = look(view)
            logits.append(whole)
            raw = maps.mean(2)
            mean = raw.unflatten(1, grid)[:, None]
            mean = F.interpolate(mean, (160, 160), mode="bilinear", align_corners=True)[:, 0]
            for threshold, padding in crops:
                cut = []
                for image, places, peak in zip(view, mean, raw.amax(1), strict=True):
                    ys, xs = (places >= threshold * peak).nonzero().T
                    pad = int(160 * padding)
                    top, bottom = max(0, int(ys.min()) - pad), min(160, int(ys.max()) + 1 + pad)
                    left, right = max(0, int(xs.min()) - pad), min(160, int(xs.max()) + 1 + pad)
                    box = image[None, :, top:bottom, left:right]
                    cut.append(F.interpolate(box, (160, 160), mode="bilinear", align_corners=True)[0])
                    boxes.append((left, top, right, bottom))
                logits.append(look(torch.stack(cut))[0])
        assert len(logits) == views and (views == 1 or set(boxes) != {(0, 0, 160, 160)})
        torch.testing.assert_close(model(images).logits, sum(logits) / views, atol=1e-3, rtol=1e-3)


def naive_maps(model, patches):
    """1x1 convolution, batch norm with its running statistics, ReLU: (B, N, M)"""
    norm = model.norm
    x = patches @ model.attend.weight.T
    x = (x - norm.running_mean) / (norm.running_var + norm.eps) ** 0.5 * norm.weight + norm.bias
    return x.clamp(min=0)


def naive_pool(patches, maps):
    """Bilinear attention pooling, image by image and map by map."""
    vectors = []
    for features, attention in zip(patches, maps, strict=True):
        parts = []
        for m in range(attention.shape[1]):
            part = sum(attention[i, m] * features[i] for i in range(len(features))) / len(features)
            parts.append(part.sign() * (part.abs() + 1e-6).sqrt())
        vector = torch.cat(parts)
        vectors.append(vector / vector.square().sum().sqrt().clamp(min=1e-12))  # no map lit up: zero
    return torch.stack(vectors)


def naive_head(model, vector):
    return 100 * vector @ model.head.weight.T


def test_cal_pools_as_published():
    patches, maps = pictures(3, 6, 5), pictures(3, 6, 4, seed=2).relu()
    pooled = cal.pool(patches, maps)
    assert pooled.shape == (3, 20)
    torch.testing.assert_close(pooled, naive_pool(patches, maps), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(3))
    assert cal.pool(patches, 0 * maps).isfinite().all()


def test_cal_trains_what_its_maps_gain_over_random_ones(monkeypatch):
    model = build("cal", "resnet18", maps=4).train()
    images, drawn = pictures(3, 3, 64, 64), []
    rand_like = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda x: drawn.append(rand_like(x)) or drawn[-1])
    seen = []
    model.backbone.register_forward_hook(lambda _m, given, out: seen.append((given[0], out.patches)))
    real = []
    model.norm.register_forward_hook(lambda _m, _i, out: real.append(out.transpose(1, 2).relu()))
    output = model(images)
    assert set(output.aux) == {"cross_entropy", "centre"}
    (a, raw), (b, effect), (c, more) = output.aux["cross_entropy"]
    assert (a, b, c) == (pytest.approx(1 / 3), 1.0, pytest.approx(2 / 3))
    assert (len(raw), len(effect), len(more)) == (3, 9, 6)  # image; image, crop and masked copy; crop and masked copy
    patches, maps = torch.cat([p for _, p in seen]), torch.cat(real)
    fake = torch.cat([2 * d for d in drawn])  # uniform between 0 and 2
    logits = naive_head(model, naive_pool(patches, maps))
    torch.testing.assert_close(torch.cat((raw, more)), logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(effect, logits - naive_head(model, naive_pool(patches, fake)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(output.logits, raw)
    vector, centres = output.aux["centre"]
    assert centres is model.centres
    torch.testing.assert_close(vector, naive_pool(patches[:3], maps[:3]), atol=1e-5, rtol=1e-4)
    assert torch.equal(seen[1][0][:3], output.crops)
    hidden = seen[1][0][3:]
    assert ((hidden == images) | (hidden == 0)).all() and (hidden == 0).any(dim=(1, 2, 3)).all()
    assert (hidden == images).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("draw", [0.0, 0.5, 1.0])
def test_cal_draws_thresholds_from_the_published_ranges(draw, monkeypatch):
    model = build("cal", "resnet18", maps=4).train()
    over, thresholds = cal.over, []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full_like(rand(*a, **k), draw))
    monkeypatch.setattr(
        cal, "over", lambda s, grid, size, theta: thresholds.append(theta) or over(s, grid, size, theta)
    )
    with torch.no_grad():
        model(pictures(3, 3, 64, 64))
    crop, hide = thresholds
    assert crop.numel() == hide.numel() == 3  # one an image
    torch.testing.assert_close(crop.flatten(), torch.full((3,), 0.4 + 0.2 * draw))
    torch.testing.assert_close(hide.flatten(), torch.full((3,), 0.2 + 0.3 * draw))


def test_cal_crops_hold_the_strongest_place_of_a_map(monkeypatch):
    model = build("cal", "resnet18", size=(96, 128), maps=4, views=2)
    images = pictures(6, 3, 96, 128)
    over, given = cal.over, []
    monkeypatch.setattr(cal, "over", lambda s, grid, *rest: given.append((s, grid)) or over(s, grid, *rest))

    def check(boxes):
        scores, grid = given[0]
        maps = F.interpolate(scores.unflatten(1, grid)[:, None], (96, 128), mode="bilinear")[:, 0]
        assert grid == (3, 4) and maps.amax(dim=(1, 2)).min() > 0
        for place, (left, top, right, bottom) in zip(
            maps.flatten(1).argmax(dim=1).tolist(), boxes.tolist(), strict=True
        ):
            assert top <= place // 128 < bottom and left <= place % 128 < right
        given.clear()

    with torch.no_grad():
        check(model(images).selection.boxes)
        check(model.train()(images).selection.boxes)


def test_cal_hides_what_one_map_marks_and_crops_what_another_does(monkeypatch):
    """Two maps are drawn for each image, never the same one twice."""
    model = build("cal", "resnet18", maps=2).train()
    over, given, maps = cal.over, [], []
    monkeypatch.setattr(cal, "over", lambda s, *rest: given.append(s) or over(s, *rest))
    model.norm.register_forward_hook(lambda _m, _i, out: maps.append(out.relu()))
    with torch.no_grad():
        for seed in range(4):
            given.clear(), maps.clear()
            model(pictures(3, 3, 64, 96, seed=seed))
            for b in range(3):
                both = {tuple(s[b].tolist()) for s in given}
                assert both == {tuple(m.tolist()) for m in maps[0][b]}


def test_cal_keeps_the_whole_image_where_no_map_says_anything():
    model = build("cal", "resnet18", maps=4)
    torch.nn.init.constant_(model.norm.bias, -1e3)
    images = pictures(2, 3, 64, 64)
    with torch.no_grad():
        output = model(images)
        assert output.selection.boxes.tolist() == [[0, 0, 64, 64]] * 2 and output.logits.isfinite().all()
        torch.testing.assert_close(output.crops, images)
        trained = model.train()(images)
    assert objective(trained, torch.tensor([0, 1])).isfinite()


def test_the_default_backbone_is_the_papers():
    model = glsim.create_model("cal", num_classes=2)
    assert model.config.backbone == "resnet101" and model.backbone.dim == 2048 and model.backbone.grid == (7, 7)
    assert model.head.weight.shape == (2, 32 * 2048)
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2}
    for method in METHODS:
        if method != "cal":
            options = SMALL_OPTIONS.get(method, {})
            assert glsim.create_model(method, num_classes=2, backbone_args=small, **options).config.backbone == (
                "vit_base_patch16_224"
            )


# --- Networks that are no transformer on one grid -------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_a_feature_map_is_a_grid_of_patches(name):
    torch.manual_seed(0)
    size = MAPS[name]
    backbone = build_backbone(name, size, backbone_args=SMALL_MAPS[name]).eval()
    height, width = backbone.image_size
    images = pictures(2, 3, height, width)
    with torch.no_grad():
        f = backbone(images)
        raw = backbone.net.forward_features(images)
        pooled = backbone.net.forward_head(raw, pre_logits=True)
    assert f.grid == backbone.grid == (height // 32, width // 32) and backbone.patch_size == (32, 32)
    assert (f.num_prefix, f.attention_logits, backbone.has_attention) == (0, None, False)
    assert f.cls.shape == (2, backbone.dim) and f.patches.shape == (2, f.grid[0] * f.grid[1], backbone.dim)
    torch.testing.assert_close(f.cls, pooled)
    places = raw if name.startswith("swin") else raw.permute(0, 2, 3, 1)
    for b in range(2):
        for r in range(f.grid[0]):
            for c in range(f.grid[1]):
                x = places[b, r, c]
                x = backbone.net.head.norm(x[None, :, None, None]).flatten() if name == "convnext_atto" else x
                torch.testing.assert_close(f.patches[b, r * f.grid[1] + c], x, atol=1e-5, rtol=1e-4)
    if name != "convnext_atto":  # which norms after pooling
        torch.testing.assert_close(f.patches.mean(dim=1), f.cls, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="has no attention maps over its patches; choose a gls metric"):
        backbone(images, attention=True)
    assert backbone.any_size == (name != "swin_tiny_patch4_window7_224")


def test_building_changes_nothing_in_a_network_with_batch_norm():
    """A trial run finds the grid: in eval mode, and the mode is put back."""
    backbone = build_backbone("resnet18", 64, backbone_args=SMALL_MAPS["resnet18"])
    assert backbone.training and all(m.training for m in backbone.modules())
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 20 and all(not m.running_mean.any() and m.num_batches_tracked == 0 for m in norms)


@pytest.mark.parametrize("name", ["resnet18", "resnet50d"])
def test_the_last_stage_of_a_resnet_may_keep_its_places(name):
    small = {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)}
    usual, kept = (build_backbone(name, 64, backbone_args=small, last_stride=stride) for stride in (None, 1))
    assert usual.grid == (2, 2) and kept.grid == (4, 4) and kept.patch_size == (16, 16)
    assert all(m.dilation == (1, 1) for m in kept.modules() if isinstance(m, torch.nn.Conv2d))
    assert usual.state_dict().keys() == kept.state_dict().keys()


def test_a_network_without_a_map_has_a_single_patch():
    backbone = build_backbone("mixer_s32_224").eval()
    images = pictures(2, 3, 224, 224)
    with torch.no_grad():
        f = backbone(images)
        expected = backbone.net(images)
    assert f.grid == backbone.grid == (1, 1) and f.patches.shape == (2, 1, 512) and backbone.patch_size == (224, 224)
    torch.testing.assert_close(f.cls, expected)
    torch.testing.assert_close(f.patches[:, 0], f.cls)


def test_images_that_a_network_cannot_take():
    with pytest.raises(ConfigError, match="'convnext_atto' cannot encode images of 20x20 pixels: "):
        build_backbone("convnext_atto", 20, backbone_args=SMALL_MAPS["convnext_atto"])
    with pytest.raises(ConfigError, match="has none; leave it at 0"):
        build_backbone("resnet18", 64, dropout=0.1)
    assert build_backbone("resnet18", (70, 50)).grid == (3, 2)


# --- What weights from elsewhere start --------------------------------------------------------------------------------


def test_another_methods_bundle_starts_every_grid_and_the_crops_token(tmp_path):
    plain = spread(build("plain", size=96))
    glsim.save(plain, tmp_path / "plain")
    rams = build("rams", size=96)
    assert init_from(rams, tmp_path / "plain").new == ["crop_token"]
    assert torch.equal(rams.crop_token, rams.backbone.net.cls_token)
    transfg = build("transfg", size=70)  # overlapping places, and no multiple of the patch
    assert init_from(transfg, tmp_path / "plain").new == []
    assert torch.equal(transfg.backbone.net.blocks[0].mlp.fc1.weight, plain.backbone.net.blocks[0].mlp.fc1.weight)
    glsim.save(transfg, tmp_path / "transfg")
    assert all(not k.startswith("backbone.") for k in init_from(build("glsim", size=64), tmp_path / "transfg").new)
    deeper = small_model("glsim", args={"depth": 4})
    with pytest.raises(ConfigError, match=r"does not fit 'vit_tiny_patch16_224': it holds nothing for blocks\.3"):
        init_from(deeper, tmp_path / "plain")


def enlarge_norms(model):
    """Give the norms of a backbone what training may give them: DINOv2's final one has weights of 3 on average."""
    with torch.no_grad():
        for name, p in model.backbone.named_parameters():
            if "norm" in name:
                p.copy_(3 + torch.rand_like(p) if name.endswith("weight") else torch.randn_like(p))


@pytest.mark.parametrize("large", [False, True], ids=["unit norm", "large norm"])
@pytest.mark.parametrize("backbone", sorted(SIZES))
def test_the_head_first_reads_the_backbones_own_class_token(backbone, large):
    """Exactly, so that GLSim starts where plain starts; published, it reads features of another scale."""
    size = SIZES[backbone]
    identity, published = (
        small_model("glsim", backbone, size, head=False, aggregator_start=start) for start in ("identity", "published")
    )
    for model in (identity, published):
        torch.manual_seed(0)
        torch.nn.init.normal_(model.head.linear.weight)
        if large:
            enlarge_norms(model)
    images = pictures(2, 3, *identity.backbone.image_size)
    with torch.no_grad():
        own = identity.backbone(images).cls
        output = identity(images)
        torch.testing.assert_close(output.embeddings["fused"], own)
        torch.testing.assert_close(output.logits, Plain(identity.backbone, identity.head.linear)(images).logits)
        read = published(images).embeddings["fused"]
    assert (read - own).pow(2).mean() > 0.01 * own.pow(2).mean()
    assert read.pow(2).mean() == pytest.approx(1, rel=0.05)  # whatever the backbone's scale


@pytest.mark.parametrize("options", [{}, {"early_loss": 1.0}, {"box": "none"}, {"classifier": "avg_cls"}], ids=str)
def test_an_aggregator_that_starts_as_the_identity_learns(options, tmp_path):
    """After one step every parameter has a gradient, as after the head's own start at zero; and the bundle loads."""
    model = small_model("glsim", head=False, aggregator_start="identity", **options).train()
    names = {n for n, _ in model.named_parameters()}
    assert "aggregator.blocks.0.attn.proj.weight" in names and "aggregator.norm.weight" not in names
    images, labels = pictures(3, 3, 64, 64), torch.tensor([0, 1, 2])
    for step in range(3):
        output = model(images)
        if step == 0 and "early_loss" in options:
            torch.testing.assert_close(output.embeddings["fused"], output.embeddings["global"])
        model.zero_grad()
        objective(output, labels).backward()
        without = {n for n, p in model.named_parameters() if not p.grad.any()}
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert not without
    glsim.save(model.eval(), tmp_path / "bundle")
    again = glsim.load(tmp_path / "bundle")
    assert_same_weights(again, model)
    torch.testing.assert_close(again(images).logits, model(images).logits)


def test_weights_that_know_no_aggregator_have_it_start_as_the_identity(tmp_path):
    def start_of(model):
        return model.config.options["aggregator_start"], isinstance(model.aggregator.norm, torch.nn.Identity)

    plain = spread(build("plain"))
    glsim.save(plain, tmp_path / "plain")
    save_file(plain.backbone.net.state_dict(), tmp_path / "w.safetensors")
    file = {"pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors"), "custom_load": False}}
    pretrained = glsim.create_model("glsim", "vit_tiny_patch16_224", 5, 64, True, SMALL | DEEP | file, top_o=4)
    assert start_of(pretrained) == ("identity", True)
    scratch, chosen = build("glsim"), build("glsim", aggregator_start="published")
    assert start_of(scratch) == (None, False)
    init_from(chosen, tmp_path / "plain")
    assert start_of(chosen) == ("published", False) and chosen.aggregator.blocks[0].mlp.fc2.weight.any()
    glsim.save(spread(scratch), tmp_path / "scratch")
    trained = build("glsim", seed=1)
    init_from(trained, tmp_path / "scratch")  # its aggregator has learnt behind a norm
    assert start_of(trained) == (None, False)
    assert_same_weights(trained, scratch)
    fresh = build("glsim", seed=1)
    init_from(fresh, tmp_path / "plain")
    assert start_of(fresh) == ("identity", True) and not fresh.aggregator.blocks[0].mlp.fc2.weight.any()
    read = fresh(pictures(2, 3, 64, 64)).embeddings["fused"]
    torch.testing.assert_close(read, plain(pictures(2, 3, 64, 64)).embeddings["global"])
    glsim.save(spread(fresh), tmp_path / "identity")
    later = build("glsim", seed=2)
    init_from(later, tmp_path / "identity")  # and this one has learnt without
    assert start_of(later) == ("identity", True)
    assert_same_weights(later, fresh)
    with pytest.raises(ConfigError, match="aggregator_start='random': published or identity is needed, or null"):
        build("glsim", aggregator_start="random")


@pytest.mark.parametrize("method", ["glsim", "transfg", "ffvt", "rams", "dcal", "ielt"])
def test_scores_that_only_choose_keep_no_attention_maps(method):
    model = spread(build(method)).train()
    with torch.enable_grad():
        output = model(pictures(2, 3, 64, 64))
    assert not output.selection.scores.requires_grad and output.logits.requires_grad


@pytest.mark.parametrize("method", ["transfg", "ffvt", "ielt"])
def test_pictures_read_what_the_tokens_are_chosen_from(method):
    """The last block never sees all patches in training: its attention to them means nothing."""
    model = spread(build(method))
    f = model.features(pictures(2, 3, 64, 64), attention=True)
    assert len(f.attention_logits) == model.backbone.depth - 1


def test_cal_meets_numbers_that_are_none_without_a_traceback():
    model = build("cal", "resnet18", maps=4).train()
    model.attend.weight.data.fill_(torch.nan)
    assert not model(pictures(4, 3, 64, 64)).logits.isfinite().any()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rams", {"threshold": "abc"}, "threshold='abc': a number is needed"),
        ("cal", {"maps": "4"}, "maps='4': a whole number is needed"),
        ("glsim", {"metric": 3}, "metric=3: a name is needed"),
        ("ielt", {"tokens": 12.5}, "tokens=12.5: a whole number is needed"),
        ("ielt", {"metric": "mhv:votes=0"}, "votes must be 1 or more"),
    ],
)
def test_options_of_the_wrong_kind_say_so(method, options, message):
    with pytest.raises(ConfigError, match=message):
        glsim.create_model(method, "vit_tiny_patch16_224", 3, 64, **options)
