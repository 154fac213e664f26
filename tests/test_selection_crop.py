"""Metrics, boxes and crops against loops written from their definitions."""

import pytest
import torch
import torch.nn.functional as F

from glsim import METRICS, ConfigError, Features
from glsim.crop import BOX_RULES, boxes_from_indices, crop_and_resize, select
from glsim.selection import pick


def features(batch=3, grid=(4, 5), dim=16, prefix=1, heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    logits = tuple(torch.randn(batch, heads, n + prefix, n + prefix, generator=g) for _ in range(3))
    return Features(torch.randn(batch, dim, generator=g), torch.randn(batch, n, dim, generator=g), grid, prefix, logits)


def naive_scores(name, f):
    scores = torch.zeros(f.patches.shape[:2])
    for b in range(f.patches.shape[0]):
        for i in range(f.patches.shape[1]):
            c, p = f.cls[b].double(), f.patches[b, i].double()
            if name == "gls_cos":
                scores[b, i] = (c * p).sum() / ((c * c).sum().sqrt() * (p * p).sum().sqrt())
            elif name == "gls_l1":
                scores[b, i] = -sum(abs(float(u - v)) for u, v in zip(c, p, strict=True)) / len(c)
            elif name == "gls_l2":
                scores[b, i] = -sum(float(u - v) ** 2 for u, v in zip(c, p, strict=True)) / len(c)
            elif name == "attention":
                last = f.attention_logits[-1][b]
                queries = [0] if f.num_prefix else range(last.shape[-1])
                for head in last:
                    for q in queries:
                        row = head[q].exp() / head[q].exp().sum()
                        scores[b, i] += row[f.num_prefix + i] / (len(last) * len(queries))
    return scores


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_metrics_agree_with_a_loop(name, prefix):
    f = features(prefix=prefix)
    scores = METRICS[name](f)
    assert scores.shape == (3, 1, 20)
    torch.testing.assert_close(scores[:, 0], naive_scores(name, f), atol=1e-5, rtol=1e-5)


def test_pick_takes_the_best_first_and_averages_groups():
    scores = torch.tensor([[[0.0, 4.0, 1.0], [0.0, 0.0, 5.0]]])
    mean, indices = pick(scores, 2)
    assert mean.tolist() == [[0.0, 2.0, 3.0]]
    assert indices.tolist() == [[2, 1]]
    with pytest.raises(ConfigError, match="cannot pick 4 patches of 3"):
        pick(scores, 4)


def naive_box(indices, grid, size, rule):
    patch_h, patch_w = size[0] // grid[0], size[1] // grid[1]
    rows, cols = [i // grid[1] for i in indices], [i % grid[1] for i in indices]
    if rule == "exclusive":
        bottom = min(max(max(rows) * patch_h, min(rows) * patch_h + patch_h), size[0])
        right = min(max(max(cols) * patch_w, min(cols) * patch_w + patch_w), size[1])
    else:
        bottom, right = (max(rows) + 1) * patch_h, (max(cols) + 1) * patch_w
    return [min(cols) * patch_w, min(rows) * patch_h, right, bottom]


@pytest.mark.parametrize("rule", sorted(BOX_RULES))
@pytest.mark.parametrize(("grid", "size"), [((4, 4), (64, 64)), ((3, 7), (48, 112)), ((14, 14), (196, 196))])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_boxes_agree_with_a_loop(rule, grid, size, k):
    g = torch.Generator().manual_seed(k)
    indices = torch.stack([torch.randperm(grid[0] * grid[1], generator=g)[:k] for _ in range(50)])
    boxes = boxes_from_indices(indices, grid, size, rule)
    assert boxes.tolist() == [naive_box(row, grid, size, rule) for row in indices.tolist()]
    assert (boxes[:, 2] > boxes[:, 0]).all() and (boxes[:, 3] > boxes[:, 1]).all()


def test_unknown_box_rule_lists_the_rules():
    with pytest.raises(ConfigError, match="unknown box rule 'round'; choose from: exclusive, inclusive"):
        boxes_from_indices(torch.zeros(1, 1, dtype=torch.long), (2, 2), (32, 32), "round")


@pytest.mark.parametrize("size", [None, (40, 24), (1, 1), (224, 224)])
def test_crops_agree_with_interpolate_image_by_image(size):
    g = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 96, 64, generator=g)
    boxes = torch.tensor(
        [[0, 0, 64, 96], [0, 0, 1, 1], [63, 95, 64, 96], [16, 0, 48, 96], [5, 7, 23, 81], [0, 90, 64, 96]]
    )
    crops = crop_and_resize(images, boxes, size)
    for image, (left, top, right, bottom), crop in zip(images, boxes.tolist(), crops, strict=True):
        expected = F.interpolate(
            image[None, :, top:bottom, left:right], size or (96, 64), mode="bilinear", align_corners=True
        )[0]
        torch.testing.assert_close(crop, expected, atol=2e-6, rtol=1e-5)


def test_crop_passes_no_gradient_and_keeps_dtype():
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    box = torch.tensor([[0, 0, 16, 16]])
    assert not crop_and_resize(images, box).requires_grad
    assert crop_and_resize(images.half(), box).dtype == torch.float16


def test_select_gathers_it_all():
    f = features()
    s = select(METRICS["gls_cos"](f), 3, f.grid, (64, 80), "inclusive")
    assert s.scores.shape == (3, 20) and s.indices.shape == (3, 3) and s.boxes.shape == (3, 4) and s.grid == (4, 5)
    assert (s.scores.gather(1, s.indices).diff(dim=1) <= 0).all()
