"""benchmarks/rules.py: every rule trains, and one image's answer is its own; the boxes against naive ones."""

import sys

import pytest
import torch
from conftest import ROOT, small_model

from glsim import models
from glsim.models.boxes import crop_and_resize
from glsim.models.losses import objective
from glsim.types import ConfigError

POOLED = {"class_token": False, "global_pool": "avg"}


@pytest.fixture(scope="module")
def rules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setitem(models.METHODS, "ruled", "rules")  # as the script does, and undone
        import rules

        yield rules
        sys.modules.pop("rules", None)


def images(count=4, seed=1):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


NAMES = "published mirrored detail inclusive component spread quantile window two_boxes soft far far_window centred"
NAMES = [*NAMES.split(), "early", "evidence", "evidence_window", "norm"]


def test_all_rules_are_tested(rules):
    assert list(rules.RULES) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("args", [{}, POOLED], ids=["class token", "pooled"])
def test_contract(rules, name, args):
    if name == "centred" and args:
        with pytest.raises(ConfigError, match="class_token: true"):
            small_model("ruled", args=args, rule=name)
        return
    model, x = small_model("ruled", args=args, top_o=4, rule=name), images()
    with torch.inference_mode():
        out, turned = model(x), model(x.flip(0))
    assert out.logits.isfinite().all() and out.crops.shape[0] == 4
    torch.testing.assert_close(out.logits, turned.logits.flip(0), atol=1e-5, rtol=1e-4)
    assert torch.equal(out.selection.boxes, turned.selection.boxes.flip(0))
    left, top, right, bottom = out.selection.boxes.unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (right <= 64).all() and (bottom <= 64).all()
    assert (right - left >= 16).all() and (bottom - top >= 16).all()
    model.train()
    objective(model(x), torch.arange(4)).backward()
    lacking = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lacking and all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("args", [{}, POOLED], ids=["class token", "pooled"])
def test_published_is_glsim(rules, args):
    """So is a rule that looks into the blocks, once it scores as published: both ways to encode agree."""
    ruled, glsim = small_model("ruled", args=args, top_o=4), small_model("glsim", args=args, rule="published")
    glsim.load_state_dict(ruled.state_dict())
    with torch.inference_mode():
        one, other = ruled(images()), glsim(images())
        f, _ = rules.in_layers(ruled.backbone, images())
        told = ruled.backbone(images())
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(one.selection.boxes, other.selection.boxes)
    torch.testing.assert_close(f.cls, told.cls)
    torch.testing.assert_close(f.patches, told.patches)
    assert f.grid == told.grid


def test_mirrored_shows_the_published_crop_from_the_other_side(rules):
    rule, published = (small_model("ruled", top_o=4, rule=name) for name in ("mirrored", "published"))
    rule.load_state_dict(published.state_dict())
    with torch.inference_mode():
        one, other = rule(images()), published(images())
    assert torch.equal(one.selection.boxes, other.selection.boxes)
    torch.testing.assert_close(one.crops, other.crops.flip(-1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one.crops, other.crops, atol=1e-2) and not torch.allclose(
        one.logits, other.logits, atol=1e-4
    )


def test_detail_is_seen_in_the_crop_alone(rules):
    """What half of the pixels cannot show changes the crop, and neither scores nor box; both passes are of that size."""
    model = small_model("ruled", top_o=4, rule="detail")
    board = torch.ones(64, 64)
    board[::2, 1::2] = board[1::2, ::2] = -1  # a chessboard of pixels: gone at half of them, but for the borders
    with torch.inference_mode():
        out, fine = model(images()), model(images() + 0.01 * board)
        seen = torch.nn.functional.interpolate(images(), (48, 48), mode="bilinear", antialias=True)
        f = model.features(seen)
    assert out.selection.grid == f.grid == (3, 3) and out.crops.shape[-2:] == (48, 48)
    torch.testing.assert_close(out.selection.scores, rules.score("gls_cos", f)[:, 0])
    torch.testing.assert_close(out.crops, crop_and_resize(images(), out.selection.boxes, (48, 48)))
    assert torch.equal(out.selection.boxes, fine.selection.boxes)
    assert out.selection.boxes.max() == 42  # two of three patches, in pixels of the whole image
    torch.testing.assert_close(out.selection.scores, fine.selection.scores, atol=2e-3, rtol=0)
    assert (out.crops - fine.crops).abs().max() > 2e-3


def test_losses_of_one_token(rules):
    model = small_model("ruled", top_o=4, early_loss=0.5, crop_loss=2.0).train()
    out = model(images())
    (one, logits), (half, first), (two, crop) = out.aux["cross_entropy"]
    assert (one, half, two) == (1.0, 0.5, 2.0) and torch.equal(logits, out.logits)
    torch.testing.assert_close(first, model.says(model.backbone(images()).cls))
    torch.testing.assert_close(crop, model.says(model.backbone(out.crops).cls))


def given(rules, name, scores, grid=(8, 8), side=64):
    """Boxes that the rule draws by these scores (B, N), and the crops."""
    model = small_model("ruled", top_o=4, rule=name)
    pixels = torch.rand(len(scores), 3, side, side)
    selection, crops = rules.RULES[name].cut(model, pixels, grid, scores[:, None])
    return selection.boxes, crops, pixels


def test_component_leaves_the_outlier_out(rules):
    scores = torch.zeros(1, 8, 8)
    scores[0, 2:4, 1:4], scores[0, 7, 7] = 1.0, 2.0  # 6 patches together, the best one far away
    scores[0, 0, 6] = 0.5
    assert given(rules, "component", scores.flatten(1))[0].tolist() == [[8, 16, 32, 32]]


def test_quantiles_leave_the_outlier_out(rules):
    scores = torch.zeros(1, 8, 8)
    scores[0, 3:5, 3:5] = 1.0
    scores[0, 2, 3:6], scores[0, 7, 7] = 0.9, 2.0  # 8 patches
    boxes = given(rules, "quantile", scores.flatten(1))[0]
    # Rows 2 2 2 3 3 4 4 7: 10 % at 2, 90 % at 4.9; columns 3 3 3 4 4 4 5 7: 3 and 5.6. To lines 5 and 6.
    assert boxes.tolist() == [[24, 16, 48, 40]]


def test_spread_is_a_naive_weighted_spread(rules):
    scores = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    boxes, crops, _ = given(rules, "spread", scores)
    for box, row in zip(boxes.tolist(), scores.double(), strict=True):
        weights = (1.5 * (row - row.mean()) / row.std(correction=0)).softmax(0)
        for low, high, places in ((0, 2, torch.arange(64) % 8), (1, 3, torch.arange(64) // 8)):
            places = places * 8.0 + 4
            middle = float((weights * places).sum())
            spread = 1.2 * float((weights * (places - middle) ** 2).sum().sqrt())
            assert abs(box[low] - (middle - spread)) <= 1.1 and abs(box[high] - (middle + spread)) <= 1.1
    assert crops.shape == (3, 3, 64, 64)


def test_soft_crop_is_the_crop_of_its_box(rules, monkeypatch):
    """At whole pixels; and its gradient reaches the scores, which the published rule's does not."""
    pixels, edges = torch.rand(2, 3, 64, 64), torch.tensor([[8.0, 16, 40, 64], [0, 3, 31, 50]])
    selection = rules.Selection(None, None, edges.long(), (8, 8))
    monkeypatch.setattr(rules, "by_spread", lambda *_: (selection, edges.unbind(1)))
    model = small_model("ruled", top_o=4, rule="soft")
    crops = rules.sampled(model, pixels, (8, 8), torch.zeros(2, 1, 64))[1]
    torch.testing.assert_close(crops, crop_and_resize(pixels, edges.long()), atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    scores = torch.randn(2, 1, 64, requires_grad=True)
    rules.sampled(model, pixels, (8, 8), scores)[1].square().sum().backward()
    assert scores.grad.abs().sum() > 0


def test_windows_are_the_best_two(rules):
    scores = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    model = small_model("ruled", top_o=4, rule="two_boxes")
    first, second = rules.by_window(model, torch.zeros(5, 3, 64, 64), (8, 8), scores[:, None], 0.5)
    for i, row in enumerate(scores.view(5, 8, 8)):
        means = {(r, c): float(row[r : r + 4, c : c + 4].mean()) for r in range(5) for c in range(5)}
        r, c = max(means, key=means.get)
        away = {p: v for p, v in means.items() if abs(p[0] - r) >= 2 or abs(p[1] - c) >= 2}
        assert first.boxes[i].tolist() == [8 * c, 8 * r, 8 * c + 32, 8 * r + 32]
        r, c = max(away, key=away.get)
        assert second.boxes[i].tolist() == [8 * c, 8 * r, 8 * c + 32, 8 * r + 32]
    with torch.inference_mode():
        out = model(images())
    assert out.crops.shape == (4, 3, 48, 48)  # 64 / sqrt(2) = 45, in patches of 16: two of 9 patches for one of 16


def test_evidence_is_what_a_patch_says(rules):
    model = small_model("ruled", top_o=4, rule="evidence")
    with torch.inference_mode():
        f, scores = rules.evidence(model, images(2))
        for i in range(2):
            best = int(model.says(f.cls[i : i + 1]).argmax())
            naive = [float(model.says(patch[None])[0, best]) for patch in f.patches[i]]
            torch.testing.assert_close(scores[i, 0], torch.tensor(naive), atol=1e-5, rtol=1e-4)


def test_unknown_rule(rules):
    with pytest.raises(ConfigError, match="choose from: centred, component"):
        small_model("ruled", rule="nearest")
