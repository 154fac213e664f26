"""The publishers' networks, number by number: checkpoints in their format, and what they compute.

A golden is `NAME.pth` and `NAME.safetensors`, NAME that of a method and what is particular: any file of that shape in the
folder is checked. `golden_call` makes the call that loads it from its metadata, `CHECKS` compare what it computes.
"""

import json
from argparse import Namespace
from contextlib import contextmanager

import pytest
import torch
from conftest import SHARED, choices, needs
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import DropPath

import glsim
from glsim.checkpoints.official import published_methods
from glsim.models import cal, losses, pyramid
from glsim.models.losses import objective
from glsim.models.scores import above_mean, find_metric, mutual_attention

GOLDEN = SHARED / "golden"
pytestmark = needs(GOLDEN)
GOLDENS = sorted(path.stem for path in GOLDEN.glob("*.pth")) if GOLDEN.exists() else []
# Metadata of a golden -> how a call names it, where the method says that its files do not hold it.
WORDS = {
    "heads": "num_heads",
    "image": "image_size",
    "image_size": "image_size",
    "patch": "patch_size",
    "slide_step": "stride",
    "step": "stride",
    "num_token": "top_k",
    "select_num": "tokens",
    "votes": "ballot",
    "votes_kept": "votes",
    "selects": "selects",
    "loss_weights": "loss_weights",
    "temperature": "temperature",
    "distance": "distance",
    "lambda": "threshold",
    "norm_eps": "norm_eps",
    "margin": "margin",
}
TENSORS = ("select_num",)  # sizes that stand among the tensors


def method_of(name):
    """The method of a golden: the longest name that its own begins with; None where there is none yet."""
    return max((m for m in published_methods() if f"{name}_".startswith(f"{m}_")), key=len, default=None)


def read(name):
    """What a golden computed, and its metadata as values."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        about = {key: parse(value) for key, value in (file.metadata() or {}).items()}
    return load_file(GOLDEN / f"{name}.safetensors"), about


def parse(value):
    try:
        return json.loads(value)
    except ValueError:
        return value


def golden_call(name):
    """The words of `glsim.load(path, method=.., ..)` for a golden: its metadata that the file does not hold."""
    method = method_of(name)
    truth, about = read(name)
    asks = published_methods()[method].asks
    about |= {key: truth[key].tolist() for key in TENSORS if key in truth}
    words = {WORDS[key]: value for key, value in about.items() if WORDS.get(key) in asks}
    return {"method": method} | {k: list(v.values()) if isinstance(v, dict) else v for k, v in words.items()}


def load(name):
    model = glsim.load(GOLDEN / f"{name}.pth", **golden_call(name))
    CONVERSIONS[model.config.method] = model.conversion.used
    return model


CONVERSIONS = {}  # of the model that was loaded last, by method: a bundle no longer knows it


@torch.inference_mode()
def check_glsim(m, truth, about):
    assert m.config.options["metric"] == f"gls_{about['sim_metric']}"
    assert m.config.options["top_o"] == about["top_o"] and m.config.options["classifier"] == about["classifier"]
    output = m(truth["images"])
    f = m.features(truth["images"], attention=True)
    maps = m.features(truth["images"], attention="maps").attention_maps
    torch.testing.assert_close(output.logits, truth["logits"], atol=1e-4, rtol=0)
    assert torch.equal(output.selection.indices, truth["top_indices"].long())
    assert torch.equal(output.selection.boxes, truth["boxes_ltrb"].long())
    torch.testing.assert_close(output.crops, truth["crops"], atol=1e-4, rtol=0)
    sign = 1 if about["sim_metric"] == "cos" else -1
    torch.testing.assert_close(sign * output.selection.scores, truth["similarity"], atol=1e-5, rtol=0)
    tokens = torch.cat((f.cls[:, None], f.patches), dim=1)
    torch.testing.assert_close(tokens, truth["tokens"], atol=1e-4, rtol=0)
    for i, logits in enumerate(f.attention_logits):
        torch.testing.assert_close(logits.softmax(dim=-1), truth[f"attention_{i}"], atol=1e-5, rtol=0)
        torch.testing.assert_close(maps[i], truth[f"attention_{i}"], atol=1e-5, rtol=0)


@torch.inference_mode()
def check_transfg(m, truth, about):
    output = m(truth["images"])
    torch.testing.assert_close(output.logits, truth["logits"], atol=1e-4, rtol=0)
    assert torch.equal(output.selection.indices, truth["selected"].long())
    cls = m.train()(truth["images"]).aux["contrastive"]
    torch.testing.assert_close(cls, truth["cls_token"], atol=1e-4, rtol=0)


@torch.inference_mode()
def check_ffvt(m, truth, about):
    output = m(truth["images"])
    torch.testing.assert_close(output.logits, truth["logits"], atol=1e-4, rtol=0)
    selected = truth["selected"].long().flatten(1) - 1  # token indices, 0 the class token; ours are patches, -1 none
    assert torch.equal(output.selection.indices, selected)


def ltrb(yxyx):
    """Boxes as rows and columns in the order of ours."""
    return yxyx[:, [1, 0, 3, 2]].long()


@torch.inference_mode()
def check_cal(m, truth, about):
    images = truth["images"]
    for views, name in ((2, "theta01_pad005"), (8, "theta03_pad01")):  # the first crop that is encoded
        m.views = views
        output = m(images)
        assert torch.equal(output.selection.boxes, ltrb(truth[f"crop_box_{name}_yxyx"]))
        torch.testing.assert_close(output.crops, truth[f"crop_{name}"], atol=1e-4, rtol=0)
        f, maps, vector, logits = m.look(output.crops)
        torch.testing.assert_close(logits, truth[f"logits_crop_{name}"], atol=1e-4, rtol=0)
        torch.testing.assert_close(
            m.look_and_compare(output.crops)[2], truth[f"logits_crop_effect_{name}"], atol=1e-4, rtol=0
        )
        if views == 2:
            wanted = (truth["logits_raw"] + truth[f"logits_crop_{name}"]) / 2
            torch.testing.assert_close(output.logits, wanted, atol=1e-4, rtol=0)
    m.views = 8
    f, maps, vector, logits = m.look(images)
    torch.testing.assert_close(maps.transpose(1, 2).unflatten(2, f.grid), truth["attention_maps"], atol=1e-4, rtol=0)
    torch.testing.assert_close(f.patches.transpose(1, 2).unflatten(2, f.grid), truth["feature_map"], atol=1e-4, rtol=0)
    torch.testing.assert_close(vector, truth["feature_matrix"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, truth["logits_raw"], atol=1e-4, rtol=0)
    torch.testing.assert_close(m.look_and_compare(images)[2], truth["logits_effect"], atol=1e-4, rtol=0)
    torch.testing.assert_close(m.look(images.flip(-1))[3], truth["logits_raw_flipped"], atol=1e-4, rtol=0)
    fake = cal.pool(f.patches, torch.ones_like(maps))
    torch.testing.assert_close(fake, truth["feature_matrix_counterfactual"], atol=1e-4, rtol=0)


def check_ielt(m, truth, about):
    images, labels = truth["images"], truth["labels"]
    with torch.inference_mode():
        stages = [stage.features for stage in m.backbone.stages(images)]
        block, _ = m.allot()
        assert block.bincount().tolist() == truth["select_num"].tolist()
        for i, f in enumerate(stages):
            torch.testing.assert_close(f.attention_logits[-1].softmax(-1), truth[f"attention_{i}"], atol=1e-5, rtol=0)
            votes = find_metric(m.metric)(f)[:, 0]
            torch.testing.assert_close(votes, truth[f"votes_{i}"], atol=0, rtol=0)
            best = votes.argsort(dim=1, descending=True, stable=True)[:, : int((block == i).sum())]
            assert torch.equal(best.sort(dim=1).values, truth[f"selected_{i}"].long())
        output = m(images)
        kept = truth["kept_block_patch"][..., 1].long().sort(dim=1).values
        assert torch.equal(output.selection.indices.sort(dim=1).values, kept)
        torch.testing.assert_close(output.embeddings["fused"], truth["class_token"], atol=1e-4, rtol=0)
        torch.testing.assert_close(output.logits, truth["logits"], atol=1e-4, rtol=0)
        m.assisted = False
        torch.testing.assert_close(m(images).logits, truth["logits_without_assist"], atol=1e-4, rtol=0)
        m.assisted = True
        shares = m.shares.clone()
        output = m.train()(images)
        m.shares.copy_(shares)
        torch.testing.assert_close(output.aux["cross_entropy"][1][1], truth["logits_refined"], atol=1e-4, rtol=0)
        torch.testing.assert_close(objective(output, labels, 0.0), truth["loss"], atol=1e-4, rtol=0)
    m.eval()


@torch.inference_mode()
def check_rams(m, truth, about):
    output, f = m(truth["images"]), m.features(truth["images"], attention=True)
    for i, logits in enumerate(f.attention_logits):
        torch.testing.assert_close(logits.softmax(dim=-1), truth[f"attention_{i}"], atol=1e-5, rtol=0)
    scores = output.selection.scores
    torch.testing.assert_close(scores / scores.amax(dim=1, keepdim=True), truth["map"], atol=1e-5, rtol=0)
    assert torch.equal(above_mean(scores, about["alpha"]), truth["mask"].bool())
    boxes = ltrb(truth["boxes_first_axis_rows_rcrc_inclusive"]) + torch.tensor([0, 0, 1, 1])
    assert torch.equal(output.selection.boxes, boxes)
    torch.testing.assert_close(output.crops, truth["local_images"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits, truth["logits_full"], atol=1e-4, rtol=0)
    torch.testing.assert_close(m.head(output.embeddings["crop"]), truth["logits_local"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.embeddings["global"], truth["class_token_1"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.embeddings["crop"], truth["class_token_2_local"], atol=1e-4, rtol=0)
    loss = objective(m.train()(truth["images"]), truth["labels"], 0.0)
    torch.testing.assert_close(loss, truth["loss_full"], atol=1e-4, rtol=0)
    m.eval()


@contextmanager
def training(m):
    """Batch statistics without chance: no dropout, no drop path; the statistics are put back."""
    still = {k: v.clone() for k, v in m.state_dict().items()}
    for module in m.train().modules():
        if isinstance(module, (torch.nn.Dropout, DropPath)):
            module.eval()
    yield
    m.eval().load_state_dict(still)


def same_gradients(m, loss, truth):
    """Those of the published names that the golden holds, to 1e-4 of their largest entry."""
    m.zero_grad()
    loss.backward()
    ours = dict(m.named_parameters())
    wanted = {k.removeprefix("train_grad_"): v for k, v in truth.items() if k.startswith("train_grad_")}
    assert wanted
    for name, gradient in wanted.items():
        found = ours[CONVERSIONS[m.config.method][name]].grad.view_as(gradient)
        torch.testing.assert_close(found, gradient, atol=1e-4 * float(gradient.abs().max()), rtol=0)


def as_places(x):
    """A map (B, f, H, W) as places (B, S, f)."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def same(found, truth, name):
    torch.testing.assert_close(found, truth[name], atol=1e-4, rtol=0)


def check_pim(m, truth, about):
    images = truth["images"]
    with torch.inference_mode():
        scales = m.backbone.scales(images)
        maps = m.fpn([scale.tokens for scale in scales])
        logits = [classify(x) for classify, x in zip(m.classify, maps, strict=True)]
        scores = [x.softmax(dim=-1).amax(dim=-1) for x in logits]
        ranks = [pyramid.rank(s) for s in scores]
        kept, left = (f(logits, ranks, m.counts) for f in (pyramid.take, pyramid.leave))
        for i, layer in enumerate(f"layer{n}" for n in (1, 2, 3, 4)):
            torch.testing.assert_close(scales[i].tokens, as_places(truth[f"backbone_{layer}"]), atol=1e-4, rtol=0)
            torch.testing.assert_close(maps[i], as_places(truth[f"fpn_{layer}"]), atol=1e-4, rtol=0)
            same(logits[i], truth, f"logits_{layer}")
            same(scores[i].sort(dim=1, descending=True).values, truth, f"confidence_{layer}")
            assert torch.equal(ranks[i][:, : m.counts[i]], truth[f"selected_{layer}"])
            same(kept[i], truth, f"logits_select_{layer}")
            if about["smallest_gap_all_ranks"] > 1e-5:
                assert torch.equal(ranks[i], truth[f"ranks_{layer}"])
                same(left[i], truth, f"logits_drop_{layer}")
        output = m(images)
        same(output.logits, truth, "logits_comb_outs")
        answers = torch.stack([*(x.mean(dim=1) for x in logits), output.logits], dim=1).softmax(dim=-1)
        same(answers, truth, "eval_scores")
    check_training(m, truth, "bsnc")


def check_herbs(m, truth, about):
    images, labels = truth["images"], truth["labels"]
    with torch.inference_mode():
        scales = m.backbone.scales(images)
        first = m.down([scale.tokens for scale in scales])
        second = m.up(first)
        earlier = [classify(x) for classify, x in zip(m.classify_down, first, strict=True)]
        logits = [classify(x) for classify, x in zip(m.classify, second, strict=True)]
        scores = [pyramid.of_class(x) for x in logits]
        ranks = [pyramid.rank(s) for s in scores]
        for i, layer in enumerate(f"layer{n}" for n in (1, 2, 3, 4)):
            same(scales[i].tokens, truth, f"backbone_{layer}")
            same(first[i], truth, f"fpn_down_{layer}")
            same(second[i], truth, f"fpn_up_{layer}")
            same(earlier[i], truth, f"logits_FPN1_{layer}")
            same(logits[i], truth, f"logits_{layer}")
            same(scores[i].sort(dim=1, descending=True).values, truth, f"confidence_{layer}")
            assert torch.equal(ranks[i][:, : m.counts[i]], truth[f"selected_{layer}"])
            same(pyramid.take(logits, ranks, m.counts)[i], truth, f"logits_select_{layer}")
        output = m(images)
        same(output.logits, truth, "logits_comb_outs")
        answers = [x.mean(dim=1) for pair in zip(logits, earlier, strict=True) for x in pair]
        same(torch.stack([*answers, output.logits], dim=1).softmax(dim=-1), truth, "eval_scores")
    own = m.weights
    with training(m), torch.no_grad():
        m.weights = (1.0, 0.0, 0.0, 0.0, 0.0)
        for epoch in (10, 35):
            m.start_epoch(epoch)
            same(objective(m(images), labels, 0.0), truth, f"train_loss_b0_epoch{epoch}")
        m.start_epoch(0)
        m.weights = own
        for i, (_, _, x, _) in enumerate(m(images).aux["refinement"]):
            same(x, truth, f"train_logits_FPN1_layer{i + 1}")
    check_training(m, truth, ("b0", "b", "s", "n", "c"))


def check_training(m, truth, terms):
    """The training step: each term alone at weight 1, then their sum and its gradients."""
    images, labels, own = truth["images"], truth["labels"], m.weights
    with training(m):
        for i, term in enumerate(terms):
            m.weights = tuple(float(j == i) for j in range(len(terms)))
            with torch.no_grad():
                same(objective(m(images), labels, 0.0), truth, f"train_loss_{term}")
        m.weights = own
        output = m(images)
        same(output.logits, truth, "train_logits_comb_outs")
        whole = [x for _, x in output.aux["cross_entropy"]][:4]
        for i, x in enumerate(whole):
            same(x, {"": truth[f"train_logits_layer{i + 1}"].mean(dim=1)}, "")
        loss = objective(output, labels, 0.0)
        same(loss, truth, "train_loss")
        same_gradients(m, loss, truth)


@torch.inference_mode()
def check_ifa(m, truth, about):
    images, labels = truth["images"], truth["labels"]
    layers = m.backbone.layers(images)[:-1]
    same(torch.stack([x[:, 0] for x in layers], dim=1), truth, "class_tokens")
    same(layers[-1], truth, "tokens_last")
    same(m(images).logits, truth, "logits")
    same(objective(m.train()(images), labels, 0.0), truth, "loss_classification")
    m.exclusion = 1.0
    aux = m(images).aux
    m.exclusion = 0.0
    m.eval()
    same(-objective(glsim.Output(None, aux={"exclusion": aux["exclusion"]}), labels), truth, "loss_exclusion")


@torch.inference_mode()
def check_r2trans(m, truth, about):
    images, labels = truth["images"], truth["labels"]
    output, f = m(images), m.features(images, attention="maps")
    for i, attention in enumerate(f.attention_maps):
        torch.testing.assert_close(attention, truth[f"attention_{i}"], atol=1e-5, rtol=0)
    scores, keep = m.judge(f)
    same(scores, truth, "map")
    below = (scores < about["lambda"] * scores.mean(dim=1, keepdim=True)).sum(dim=1)
    assert torch.equal(below, truth["below_mean"]) and keep.shape[1] - keep.sum(dim=1).unique() == truth["num_mask"]
    kept = torch.stack([row.nonzero()[:, 0] + 1 for row in keep])
    assert torch.equal(kept, truth["kept_tokens"].long())
    assert torch.equal(output.selection.indices[:, : kept.shape[1]].sort(dim=1).values + 1, kept)
    same(output.logits, truth, "logits")
    same(f.cls, truth, "class_token")
    same(m.encode_kept(images, keep), truth, "class_token_masked")
    m.answer = "sum"
    same(m(images).logits, truth, "logits_sum")
    m.answer = "first"
    three = m.train()(images).aux["cross_entropy"]
    m.eval()
    for (_, logits), name in zip(three, ("", "_masked", "_concat"), strict=True):
        same(logits, truth, f"logits{name}")
        same(torch.nn.functional.cross_entropy(logits, labels), truth, f"loss{name}")


def check_apinet(m, truth, about):
    images, labels = truth["images"], truth["labels"]
    output = m(images)  # at evaluation statistics, dropout off, the pairs too
    x = output.embeddings["global"]
    with torch.inference_mode():
        same(x, truth, "features")
        same(output.logits, truth, "logits")
        one, other, there = losses.find_pairs(x, labels)
        assert torch.equal(torch.stack((one, other), dim=1), torch.cat((truth["intra_pairs"], truth["inter_pairs"])))
        assert there.all()
        found = dict(zip(("1_self", "2_self", "1_other", "2_other"), m.compare(x[one], x[other]), strict=True))
        for name, logits in found.items():
            same(logits, truth, f"logit{name}")
        term = losses.pairs((0.0, m.margin, x, m.compare), labels, 0.0)
        same(term, truth, "loss_classification")
    loss = losses.pairs((m.ranking, m.margin, x, m.compare), labels, 0.0)
    same(loss - term, truth, "loss_ranking")
    same(loss, truth, "loss")
    same_gradients(m, loss, {f"train_{k}": v for k, v in truth.items() if k.startswith("grad_")})


CHECKS = {
    "apinet": check_apinet,
    "ifa": check_ifa,
    "r2trans": check_r2trans,
    "pim": check_pim,
    "herbs": check_herbs,
    "glsim": check_glsim,
    "transfg": check_transfg,
    "ffvt": check_ffvt,
    "cal": check_cal,
    "ielt": check_ielt,
    "rams": check_rams,
}


def test_every_method_that_reads_checkpoints_is_compared_with_one():
    assert {method_of(name) for name in GOLDENS} - {None} == set(CHECKS) == set(published_methods())


@pytest.mark.parametrize("name", [name for name in GOLDENS if method_of(name)])
def test_a_published_network_computes_the_same_here(name, tmp_path):
    """As it is read, and from the bundle that it is saved as."""
    (truth, about), model = read(name), load(name)
    glsim.save(model, tmp_path / "bundle")
    for m in (model, glsim.load(tmp_path / "bundle")):
        CHECKS[method_of(name)](m, truth, about)


@pytest.mark.parametrize("name", [name for name in GOLDENS if method_of(name)])
def test_every_key_is_accounted_for(name):
    model, file = load(name), None
    with torch.serialization.safe_globals([Namespace]):
        file = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    inner = next((file[k] for k in ("model", "state_dict", "net_state_dict") if k in file), file)
    keys = set(inner) | {k for k, v in file.items() if isinstance(v, torch.Tensor)}
    used, ignored, missing = model.conversion
    plain = [{k.removeprefix("module.").removeprefix("model.") for k in names} for names in (keys, {*used, *ignored})]
    assert plain[0] == plain[1] and len(keys) == len(used) + len(ignored)
    assert not set(used) & set(ignored) and missing == []
    made = published_methods()[method_of(name)].made
    assert set(used.values()) <= set(model.state_dict()) and set(model.state_dict()) - set(used.values()) <= set(made)
    assert "not part of this model" not in ignored.values()
    assert method_of(name) != "glsim" or "anchor_class_token" in ignored


def maps():
    truth = load_file(GOLDEN / "selection_maps.safetensors")
    logits = tuple(truth["attention_logits"])
    return truth, glsim.Features(torch.zeros(2, 8), torch.zeros(2, 16, 8), (4, 4), 1, logits)


@pytest.mark.parametrize(
    ("metric", "name"),
    [("attention", "attention_last"), ("rollout", "rollout"), ("psm", "psm_sum"), ("maws:block=-1", "maws_last")],
)
def test_selection_maps_agree(metric, name):
    truth, f = maps()
    torch.testing.assert_close(find_metric(metric)(f).sum(dim=1), truth[name], atol=1e-5, rtol=0)


def test_selected_tokens_agree():
    truth, f = maps()
    assert torch.equal(glsim.METRICS["psm"](f).argmax(dim=-1), truth["psm_head_argmax"].long())
    order = mutual_attention(f, f.attention_logits[-1]).argsort(dim=-1, descending=True)
    assert torch.equal(order, truth["ffvt_maws_order"].long())


def test_sizes_default_to_the_paper_s_and_positions_are_resampled():
    model = glsim.load(GOLDEN / "transfg.pth", method="transfg", num_heads=2)
    assert model.config.image_size == [64, 64] and model.backbone.grid == (5, 5)  # 25 positions, 12 of 16 pixels
    larger = glsim.load(GOLDEN / "transfg.pth", **golden_call("transfg") | {"image_size": (64, 112)})
    assert larger(torch.zeros(1, 3, 64, 112)).selection.grid == (5, 9)
    assert glsim.load(GOLDEN / "ffvt.pth", method="ffvt").backbone.net.blocks[0].attn.num_heads == 1  # 64 wide


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("transfg", {"patch_size": 8}, "was made for patches of 16 pixels"),
        ("transfg", {"num_heads": 3}, "num_heads=3: the width of .* is 64"),
        ("ffvt", {"top_k": 17}, "top_k=17, but the grid of the backbone has 16 patches"),
        (
            "ielt",
            {},
            r"ielt.pth does not hold num_heads, how many .*: give it \(num_heads=.. in Python, --options.num_heads",
        ),
        ("cal", {"views": 3}, "unknown number of views 3"),
        ("plain", {}, f"unknown published method 'plain'; {choices(published_methods())}$"),
    ],
)
def test_wrong_sizes_say_what_the_file_holds(method, words, message):
    with pytest.raises(glsim.ConfigError, match=message):
        glsim.load(GOLDEN / f"{method if method != 'plain' else 'ffvt'}.pth", method=method, **words)


def test_the_wrong_method_is_named():
    with pytest.raises(glsim.DataError, match="transfg.pth is no ffvt checkpoint: .* is missing"):
        glsim.load(GOLDEN / "transfg.pth", method="ffvt")


def test_options_can_be_overridden():
    truth = load_file(GOLDEN / "glsim_cos.safetensors")
    model = glsim.load(GOLDEN / "glsim_cos.pth", top_o=2, box="inclusive")
    assert model(truth["images"]).selection.indices.shape == (3, 2)
    larger = glsim.load(GOLDEN / "glsim_cos.pth", image_size=96)
    assert larger(torch.zeros(1, 3, 96, 96)).selection.grid == (6, 6)
