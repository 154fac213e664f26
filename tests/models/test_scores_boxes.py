"""Metrics, boxes and crops against loops written from their equations."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import choices
from hypothesis import example, given
from hypothesis import strategies as st

from glsim import METRICS, ConfigError, Features
from glsim.models.boxes import (
    BOX_RULES,
    CONTROLS,
    ENDS,
    boxes_from_indices,
    boxes_from_mask,
    boxes_from_moments,
    check_box,
    crop_and_resize,
    select,
    select_component,
    select_these,
)
from glsim.models.scores import (
    NEEDS_ATTENTION,
    NEEDS_MAPS,
    above_mean,
    check_metric,
    find_metric,
    gather_tokens,
    largest_component,
    pick,
    score,
)

GRIDS = [(4, 5), (6, 7)]  # fewer and more patches than the 24 that a head may vote for


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def features(batch=3, grid=(4, 5), dim=16, prefix=1, heads=2, blocks=3, seed=0):
    g = generator(seed)
    n = grid[0] * grid[1]
    logits = tuple(2 * torch.randn(batch, heads, n + prefix, n + prefix, generator=g) for _ in range(blocks))
    return Features(torch.randn(batch, dim, generator=g), torch.randn(batch, n, dim, generator=g), grid, prefix, logits)


# --- The equations, one image at a time, in double precision and with whole matrices -------------------------------


def over_keys(logits):
    """Softmax of each row: (h, n, n) -> A, rows are queries."""
    e = logits.double().exp()
    return e / e.sum(dim=2, keepdim=True)


def over_queries(logits):
    e = logits.double().exp()
    return e / e.sum(dim=1, keepdim=True)


def class_row(matrix, prefix):
    """Row 0 of (n, n); where there is no class token, the mean over all rows."""
    return matrix[0] if prefix else matrix.mean(dim=0)


def class_column(matrix, prefix):
    return matrix[:, 0] if prefix else matrix.mean(dim=1)


def product(matrices):
    """A^last ... A^first of [A^first, ..., A^last], by full matrix products."""
    whole = torch.eye(len(matrices[0]), dtype=torch.float64)
    for matrix in matrices:
        whole = matrix @ whole
    return whole


def with_identity(attention):
    """A-hat of rollout: mean over heads plus identity, every row divided by its sum."""
    a = attention.mean(dim=0) + torch.eye(attention.shape[-1], dtype=torch.float64)
    return torch.stack([row / row.sum() for row in a])


def cos(c, p):
    return (c * p).sum() / ((c * c).sum().sqrt() * (p * p).sum().sqrt())


def similarity(f, b, measure):
    return torch.stack([measure(f.cls[b].double(), p.double()) for p in f.patches[b]])[None]


def naive_gls_border(f, b):
    rows, cols = f.grid
    border = [i for i in range(rows * cols) if i // cols in (0, rows - 1) or i % cols in (0, cols - 1)]
    mean = sum(f.patches[b, i].double() for i in border) / len(border)
    return similarity(f, b, cos) - similarity(f, b, lambda _, p: cos(mean, p))


def naive_rollout(f, b, first=0, last=None):
    blocks = f.attention_logits[first : None if last is None else last + 1]
    return product([with_identity(over_keys(a[b])) for a in blocks])


def naive_psm(f, b, first=0, last=None):
    blocks = f.attention_logits[first : None if last is None else last + 1]
    attention = [over_keys(a[b]) for a in blocks]
    heads = [product([a[h] for a in attention]) for h in range(len(attention[0]))]
    return torch.stack([class_row(p, f.num_prefix)[f.num_prefix :] for p in heads])


def naive_maws(f, b):
    maps = []
    for logits in f.attention_logits:
        given = torch.stack([class_row(a, f.num_prefix) for a in over_keys(logits[b])]).mean(dim=0)
        taken = torch.stack([class_column(a, f.num_prefix) for a in over_queries(logits[b])]).mean(dim=0)
        maps.append((given * taken)[f.num_prefix :])
    return torch.stack(maps)


def naive_rows(f, b):
    """The class token's attention to the patches, mean over heads, block by block: (L, N)"""
    rows = [class_row(over_keys(a[b]).mean(dim=0), f.num_prefix) for a in f.attention_logits]
    return torch.stack(rows)[:, f.num_prefix :]


def naive_sacm(f, b):
    rows = naive_rows(f, b)
    weights = [1.0] * len(rows) if f.layer_weights is None else f.layer_weights[b].double()
    return sum(w * row for w, row in zip(weights, rows, strict=True))[None]


def naive_mhv(f, b, votes=24):
    kernel = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    rows, cols = f.grid
    maps = []
    for logits in f.attention_logits:
        counts = [[0] * cols for _ in range(rows)]
        for head in over_keys(logits[b]):
            row = class_row(head, f.num_prefix)[f.num_prefix :].tolist()
            for i in sorted(range(len(row)), key=lambda i: -row[i])[:votes]:
                counts[i // cols][i % cols] += 1
        smooth = torch.zeros(rows, cols, dtype=torch.float64)
        for r in range(rows):
            for c in range(cols):
                for dr in (-1, 0, 1):
                    for dc in (-1, 0, 1):
                        if 0 <= r + dr < rows and 0 <= c + dc < cols:
                            smooth[r, c] += kernel[dr + 1][dc + 1] * counts[r + dr][c + dc]
        maps.append(smooth.flatten())
    return torch.stack(maps)


NAIVE = {  # metric -> (features, image) -> (g, N)
    "gls_cos": lambda f, b: similarity(f, b, cos),
    "gls_l1": lambda f, b: similarity(f, b, lambda c, p: -(c - p).abs().sum() / len(c)),
    "gls_border": naive_gls_border,
    "gls_l2": lambda f, b: similarity(f, b, lambda c, p: -((c - p) ** 2).sum() / len(c)),
    "attention": lambda f, b: naive_rows(f, b)[-1:],
    "rollout": lambda f, b: class_row(naive_rollout(f, b), f.num_prefix)[None, f.num_prefix :],
    "rams": lambda f, b: naive_rollout(f, b).mean(dim=0)[None, f.num_prefix :],
    "psm": naive_psm,
    "maws": naive_maws,
    "sacm": naive_sacm,
    "mhv": naive_mhv,
}
GROUPS = {"psm": 2, "maws": 3, "mhv": 3}  # heads, or blocks; one map elsewhere


def test_every_metric_has_its_naive_version():
    assert set(METRICS) == set(NAIVE) | {"random"}


@pytest.mark.parametrize("name", sorted(NAIVE))
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", GRIDS)
def test_metrics_agree_with_their_equations(name, prefix, grid):
    f = features(prefix=prefix, grid=grid)
    scores = METRICS[name](f)
    assert scores.shape == (3, GROUPS.get(name, 1), grid[0] * grid[1])
    expected = torch.stack([NAIVE[name](f, b) for b in range(3)]).float()
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores / expected.abs().amax(), expected / expected.abs().amax(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_maps_after_the_softmax_give_the_same_scores(prefix):
    f = features(prefix=prefix)
    maps = f._replace(attention_logits=None, attention_maps=tuple(a.softmax(dim=-1) for a in f.attention_logits))
    for name in NEEDS_MAPS:
        torch.testing.assert_close(METRICS[name](maps), METRICS[name](f), atol=1e-7, rtol=1e-6)
    of_logits = NEEDS_ATTENTION - NEEDS_MAPS
    assert "maws" in of_logits
    for name in of_logits:
        with pytest.raises(ConfigError, match="no attention logits"):
            METRICS[name](maps)
        torch.testing.assert_close(METRICS[name](f._replace(attention_maps=maps.attention_maps)), METRICS[name](f))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_sacm_takes_the_weights_that_a_model_learned(prefix):
    f = features(prefix=prefix)
    f = f._replace(layer_weights=torch.rand(3, 3, generator=generator(5)))
    expected = torch.stack([naive_sacm(f, b) for b in range(3)]).float()
    torch.testing.assert_close(METRICS["sacm"](f), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(METRICS["sacm"](f), METRICS["sacm"](f._replace(layer_weights=None)))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_parameters_are_set_where_a_metric_is_named(prefix):
    f = features(prefix=prefix, grid=(6, 7), blocks=4)
    images = range(len(f.cls))
    skip = f.num_prefix

    def check(spec, expected):
        torch.testing.assert_close(find_metric(spec)(f), torch.stack(expected).float(), atol=1e-5, rtol=1e-5)
        assert torch.equal(score(spec, f), find_metric(spec)(f))

    for block in range(4):
        check(f"attention:block={block}", [naive_rows(f, b)[block, None] for b in images])
        check(f"attention:block={block - 4}", [naive_rows(f, b)[block, None] for b in images])
        check(f"maws:block={block}", [naive_maws(f, b)[block, None] for b in images])
    check("rollout:first=1,last=2", [class_row(naive_rollout(f, b, 1, 2), skip)[None, skip:] for b in images])
    check("rollout: last=2, first=1", [class_row(naive_rollout(f, b, 1, 2), skip)[None, skip:] for b in images])
    check("rollout:last=-2", [class_row(naive_rollout(f, b, 0, 2), skip)[None, skip:] for b in images])
    check("rams:first=2", [naive_rollout(f, b, 2, 3).mean(dim=0)[None, skip:] for b in images])
    check("psm:first=1,last=1", [naive_psm(f, b, 1, 1) for b in images])
    check("mhv:votes=3", [naive_mhv(f, b, 3) for b in images])
    check("mhv:block=-1,votes=5", [naive_mhv(f, b, 5)[3, None] for b in images])
    assert torch.equal(score("attention:", f), score("attention", f))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gls", f"unknown metric 'gls'; {choices(METRICS)}$"),
        ("", f"unknown metric ''; {choices(METRICS)}$"),
        ("rollout:block=1", r"metric 'rollout' has no block; it has: first, last"),
        ("attention:blok=1,layer=2", r"metric 'attention' has no blok, layer; it has: block"),
        ("gls_cos:block=1", r"metric 'gls_cos' has no block; it has: no parameters"),
        ("attention:block=two", r"metric 'attention:block=two': write attention:name=number"),
        ("attention:block=1.5", r"metric 'attention:block=1.5': write attention:name=number"),
        ("attention:3", r"metric 'attention:3': write attention:name=number"),
    ],
)
def test_wrong_metrics_say_what_would_work(spec, message):
    with pytest.raises(ConfigError, match=message):
        find_metric(spec)
    with pytest.raises(ConfigError, match=message):
        check_metric(spec, True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("attention:block=3", r"there is no block 3: the features hold 3, 0 to 2"),
        ("attention:block=-4", r"there is no block -4: the features hold 3, 0 to 2"),
        ("maws:block=7", r"there is no block 7: the features hold 3"),
        ("mhv:block=3", r"there is no block 3"),
        ("rollout:first=1,last=3", r"there are no blocks 1 to 3: the features hold 3"),
        ("rollout:first=2,last=1", r"there are no blocks 2 to 1: the features hold 3"),
    ],
)
def test_blocks_that_are_not_there(spec, message):
    with pytest.raises(ConfigError, match=message):
        score(spec, features())


@pytest.mark.parametrize("name", sorted(METRICS))
def test_who_needs_attention(name):
    f = features()._replace(attention_logits=None)
    if name in NEEDS_ATTENTION:
        with pytest.raises(ConfigError, match="no attention logits; encode with attention=True"):
            METRICS[name](f)
        with pytest.raises(ConfigError, match=f"reads attention maps.*{choices(set(METRICS) - NEEDS_ATTENTION)}$"):
            check_metric(name, False)
    else:
        check_metric(name, False)
        assert METRICS[name](f).shape == (3, 1, 20)
        assert torch.equal(METRICS[name](f), METRICS[name](features()))


# --- The random control ---------------------------------------------------------------------------------------------


def test_random_is_uniform_over_the_whole_grid():
    images, grid, k = 3000, (14, 14), 8
    f = features(images, grid, blocks=0)
    scores = METRICS["random"](f)
    assert scores.shape == (images, 1, 196) and scores.min() >= 0 and scores.max() < 1
    assert scores.flatten().histc(10, 0, 1).div(scores.numel()).sub(0.1).abs().max() < 0.002
    mean, indices = pick(scores, k)
    counts = indices.flatten().bincount(minlength=196).double()
    expected = images * k / 196
    spread = (expected * (1 - k / 196)) ** 0.5
    assert (counts - expected).abs().max() < 5 * spread  # the published code takes patches 0 to 7 only
    assert ((counts - expected) / spread).square().mean() < 1.5
    # neither patches nor images go together: every pair of patches is as likely as any other
    wanted = {"exclusive": 0.60, "inclusive": 0.72}  # share of the grid that eight random patches span
    for rule, share in wanted.items():
        left, top, right, bottom = boxes_from_indices(indices, grid, (224, 224), rule).unbind(1)
        assert abs(((right - left) * (bottom - top) / 224**2).mean() - share) < 0.015
    centred = mean[:200] - 0.5
    near = (centred @ centred.T / 196 * 12).fill_diagonal_(0)
    assert near.abs().max() < 6 / 196**0.5


def test_random_is_an_images_own():
    f = features(6, (5, 7), blocks=0)
    order = [4, 0, 3]
    part = f._replace(cls=f.cls[order], patches=f.patches[order])
    alone = f._replace(cls=f.cls[2:3], patches=f.patches[2:3])
    whole = METRICS["random"](f)
    assert torch.equal(METRICS["random"](part), whole[order])
    assert torch.equal(METRICS["random"](alone), whole[2:3])
    assert len({tuple(row) for row in whole[:, 0].tolist()}) == 6


def test_random_is_an_images_own_where_every_feature_is_positive():
    """Networks that end in a ReLU: all 512 or 2048 means of a ResNet lie above zero."""
    f = features(6, (7, 7), dim=512, blocks=0)
    f = f._replace(patches=f.patches.relu())
    assert len({tuple(row) for row in METRICS["random"](f)[:, 0].tolist()}) == 6


def test_random_follows_its_seed_and_touches_no_generator():
    f = features(4, (5, 7), blocks=0)
    before = torch.get_rng_state()
    draws = [score(f"random:seed={seed}", f) for seed in (0, 1, 7, 8, 123456789)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(score("random", f), draws[0])
    assert torch.equal(score("random:seed=7", f), draws[2])
    for i, first in enumerate(draws):
        assert first.min() >= 0 and first.max() < 1
        for second in draws[i + 1 :]:
            assert (first - second).abs().mean() > 0.25  # 1/3 for independent draws
    assert torch.equal(METRICS["random"](f._replace(cls=-f.cls)), draws[0])


# --- From scores to patches -----------------------------------------------------------------------------------------


def test_pick_takes_the_best_first_and_averages_groups():
    scores = torch.tensor([[[0.0, 4.0, 1.0], [0.0, 0.0, 5.0]]])
    mean, indices = pick(scores, 2)
    assert mean.tolist() == [[0.0, 2.0, 3.0]]
    assert indices.tolist() == [[2, 1]]
    for k in (0, 4):
        with pytest.raises(ConfigError, match=f"cannot pick {k} patches of 3"):
            pick(scores, k)


def test_gather_tokens_agrees_with_indexing():
    tokens = torch.randn(3, 7, 4, generator=generator())
    index = torch.randint(0, 7, (3, 5), generator=generator(1))
    taken = gather_tokens(tokens, index)
    assert taken.shape == (3, 5, 4)
    for b in range(3):
        for k in range(5):
            assert torch.equal(taken[b, k], tokens[b, int(index[b, k])])


@pytest.mark.parametrize("factor", [1.0, 1.2, 2.0])
@pytest.mark.parametrize("shift", [0.0, 0.7, -0.6, -5.0])
def test_above_mean_agrees_with_a_loop(factor, shift):
    scores = torch.rand(20, 30, generator=generator()) + shift
    for row, mask in zip(scores, above_mean(scores, factor), strict=True):
        mean = sum(row.tolist()) / 30
        bar = mean + (factor - 1) * abs(mean)
        expected = [value > bar for value in row.tolist()]
        assert mask.tolist() == (expected if any(expected) else [True] * 30)


def test_above_mean_is_the_published_rule_and_keeps_all_where_nothing_does():
    scores = torch.tensor([[1.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert above_mean(scores, 1.2).tolist() == [[False, False, False, True], [True] * 4, [True] * 4]


def flood(mask, grid):
    """Largest 8-connected group in a flat list of booleans, as a set; of equal ones the one that reaches furthest down."""
    cols = grid[1]
    left, groups = {i for i, value in enumerate(mask) if value}, []
    while left:
        group, todo = set(), [left.pop()]
        while todo:
            i = todo.pop()
            group.add(i)
            for j in list(left):
                if max(abs(i // cols - j // cols), abs(i % cols - j % cols)) == 1:
                    left.remove(j)
                    todo.append(j)
        groups.append(group)
    return max(groups, key=lambda g: (len(g), max(g)), default=set())


def chosen(mask):
    return {i for i, value in enumerate(mask.tolist()) if value}


@st.composite
def masks(draw, most=9):
    """(rows, cols) of bool, any share of it True."""
    rows, cols = draw(st.integers(1, most)), draw(st.integers(1, most))
    places = draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols))
    return torch.tensor(places).view(rows, cols)


@given(st.lists(masks(), min_size=1, max_size=3))
def test_largest_component_agrees_with_a_flood_fill(given_masks):
    for mask in given_masks:
        grid = tuple(mask.shape)
        both = torch.stack((mask, mask.flip(0, 1))).flatten(1)  # no image sees the other
        found = largest_component(both, grid)
        assert found.dtype == torch.bool and found.shape == both.shape
        for one, component in zip(both, found, strict=True):
            assert chosen(component) == flood(one.tolist(), grid)


@pytest.mark.parametrize("grid", [(14, 14), (3, 20)])
def test_largest_component_of_larger_grids(grid):
    g = generator(grid[0])
    several = torch.rand(40, grid[0] * grid[1], generator=g) < torch.rand(40, 1, generator=g)
    several[0], several[1] = True, False
    for mask, component in zip(several, largest_component(several, grid), strict=True):
        assert chosen(component) == flood(mask.tolist(), grid)


def snakes(grid):
    """Masks that take as many steps as there are: a serpent of full lines from corner to corner, and a spiral."""
    rows, cols = grid
    serpent = torch.zeros(rows, cols, dtype=torch.bool)
    for k, row in enumerate(range(rows - 1, -1, -2)):  # upwards, so that the last patch is the tip of the tail
        serpent[row] = True
        if row:
            serpent[row - 1, 0 if k % 2 == 0 else cols - 1] = True
    spiral = torch.zeros(rows, cols, dtype=torch.bool)
    r, c, dr, dc = rows - 1, cols - 1, 0, -1
    spiral[r, c] = True
    while True:
        for _ in range(2):
            far = (r + 2 * dr, c + 2 * dc)
            near = (r + dr, c + dc)
            free = 0 <= near[0] < rows and 0 <= near[1] < cols and not spiral[near]
            touching = 0 <= far[0] < rows and 0 <= far[1] < cols and spiral[far]
            if free and not touching:
                break
            dr, dc = dc, -dr  # turn: left, up, right, down
        else:
            return [serpent, spiral]
        r, c = near
        spiral[r, c] = True


@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (5, 11), (11, 5), (3, 21), (21, 3), (15, 15)])
@pytest.mark.parametrize("turned", [False, True])
def test_largest_component_follows_the_longest_way(grid, turned):
    for snake in snakes(grid):
        assert len(flood(snake.flatten().tolist(), grid)) == snake.sum() > sum(grid)  # in one piece, and long
        mask = (snake.flip(0, 1) if turned else snake).flatten()[None]
        assert torch.equal(largest_component(mask, grid), mask)


@pytest.mark.parametrize("grid", [(14, 14), (28, 28), (37, 37), (64, 64)])
def test_of_two_equal_components_the_one_further_down(grid):
    """Documented, and what makes the answer the same on every device: a float has few digits left beside a large size."""
    rows, cols = grid
    masks = torch.zeros(cols - 3, rows, cols, dtype=torch.bool)
    for i in range(cols - 3):  # two bars of equal size side by side; the left one, or the right one, a little shorter
        width = min(i + 1, cols - i - 2)
        masks[i, :, i + 1 - width : i + 1] = True
        masks[i, :, i + 2 : i + 2 + width] = True
    masks = masks[:: max(1, len(masks) // 4)]
    for mask, found in zip(masks, largest_component(masks.flatten(1), grid).unflatten(1, grid), strict=True):
        columns = mask[0].nonzero().flatten().tolist()
        gap = next(c for c in range(columns[0], columns[-1]) if not mask[0, c])
        expected = mask.clone()
        expected[:, :gap] = False
        assert torch.equal(found, expected)


# --- Boxes ----------------------------------------------------------------------------------------------------------


def naive_box(indices, grid, size, rule):
    patch_h, patch_w = size[0] // grid[0], size[1] // grid[1]
    rows, cols = [i // grid[1] for i in indices], [i % grid[1] for i in indices]
    if rule == "exclusive":
        bottom = min(max(max(rows) * patch_h, min(rows) * patch_h + patch_h), size[0])
        right = min(max(max(cols) * patch_w, min(cols) * patch_w + patch_w), size[1])
    else:
        bottom, right = (max(rows) + 1) * patch_h, (max(cols) + 1) * patch_w
    return [min(cols) * patch_w, min(rows) * patch_h, right, bottom]


@st.composite
def chosen_patches(draw):
    """Some patches of a grid, and the image (H, W) that it lies over."""
    grid = draw(st.tuples(st.integers(1, 14), st.integers(1, 14)))
    patch = draw(st.tuples(st.integers(1, 16), st.integers(1, 16)))
    indices = draw(st.lists(st.integers(0, grid[0] * grid[1] - 1), min_size=1, max_size=8, unique=True))
    return indices, grid, (grid[0] * patch[0], grid[1] * patch[1])


@pytest.mark.parametrize("rule", sorted(ENDS))
@given(chosen_patches())
@example(([15, 10], (4, 4), (64, 64)))
@example(([20], (3, 7), (48, 112)))
def test_boxes_agree_with_a_loop(rule, patches):
    indices, grid, size = patches
    boxes = boxes_from_indices(torch.tensor([indices, indices[:1] * len(indices)]), grid, size, rule)
    assert boxes.dtype == torch.int64
    assert boxes.tolist() == [naive_box(row, grid, size, rule) for row in (indices, indices[:1])]
    assert (boxes[:, 2] > boxes[:, 0]).all() and (boxes[:, 3] > boxes[:, 1]).all()


def test_unknown_box_rule_lists_the_rules():
    with pytest.raises(ConfigError, match=f"unknown box rule 'round'; {choices(ENDS)}$"):
        boxes_from_indices(torch.zeros(1, 1, dtype=torch.long), (2, 2), (32, 32), "round")


def naive_moments(scores, grid, size):
    """The box of one image by plain sums, pixels as floats."""
    mean = sum(scores) / len(scores)
    deviation = (sum((v - mean) ** 2 for v in scores) / len(scores) + 1e-12) ** 0.5
    weights = [math.exp(1.5 * (v - mean) / deviation) for v in scores]
    box = []
    for axis in (1, 0):
        places = [(divmod(i, grid[1])[axis] + 0.5) / grid[axis] for i in range(len(scores))]
        middle = sum(w * p for w, p in zip(weights, places, strict=True)) / sum(weights)
        var = sum(w * (p - middle) ** 2 for w, p in zip(weights, places, strict=True)) / sum(weights)
        half = max(1.75 * var**0.5, 0.5 / grid[axis])
        box.append((max(middle - half, 0) * size[axis], min(middle + half, 1) * size[axis]))
    return [box[0][0], box[1][0], box[0][1], box[1][1]]


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 2**31), st.sampled_from([0.0, 0.01, 1.0, 50.0]))
@example((4, 4), 0, 0.0)
def test_moments_agree_with_a_loop(grid, seed, scale):
    scores, size = scale * torch.randn(2, grid[0] * grid[1], generator=generator(seed)), (60, 84)
    boxes = boxes_from_moments(scores, grid, size)
    assert boxes.dtype == torch.int64 and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes[:, 2] <= 84).all() and (boxes[:, 3] <= 60).all()
    for row, box in zip(scores.double().tolist(), boxes.tolist(), strict=True):
        left, top, right, bottom = naive_moments(row, grid, size)
        assert all(0 <= end <= 1 + 1e-6 for end in (left - box[0] + 1e-9, top - box[1] + 1e-9))  # rounded outwards
        assert all(0 <= end <= 1 + 1e-6 for end in (box[2] - right + 1e-9, box[3] - bottom + 1e-9))


def test_a_stray_patch_moves_the_box_of_moments_little():
    def boxes(scores):
        return [select(scores, 17, (12, 12), (120, 120), rule).boxes for rule in ("moments", "inclusive")]

    scores = torch.zeros(1, 12, 12)
    scores[:, 4:8, 3:7] = 1.0
    moments, _ = boxes(scores.flatten(1)[:, None])
    scores[:, 0, 11] = 0.9
    strayed, spanning = boxes(scores.flatten(1)[:, None])
    assert 4 * (strayed - moments).abs().max() < 120 - 70 <= (spanning[0, 2] - 70)  # the right side, of 120 pixels
    assert moments[0, 0] <= 30 and moments[0, 2] >= 70 and moments[0, 1] <= 40 and moments[0, 3] >= 80


def naive_mask_box(mask, size, padding):
    """Walk over all places; `mask` (rows, cols) as nested lists."""
    rows, cols = len(mask), len(mask[0])
    places = [(r, c) for r in range(rows) for c in range(cols) if mask[r][c]]
    if not places:
        return [0, 0, size[1], size[0]]
    high, wide = size[0] // rows, size[1] // cols
    pad_h, pad_w = int(padding * size[0]), int(padding * size[1])
    return [
        max(0, min(c for _, c in places) * wide - pad_w),
        max(0, min(r for r, _ in places) * high - pad_h),
        min(size[1], (max(c for _, c in places) + 1) * wide + pad_w),
        min(size[0], (max(r for r, _ in places) + 1) * high + pad_h),
    ]


@given(masks(), st.integers(1, 16), st.integers(1, 16), st.sampled_from([0.0, 0.05, 0.1, 0.9]))
def test_boxes_around_masks_agree_with_a_loop(mask, high, wide, padding):
    size = (mask.shape[0] * high, mask.shape[1] * wide)
    several = torch.stack((mask, torch.zeros_like(mask), mask.flip(0, 1)))
    boxes = boxes_from_mask(several, size, padding)
    assert boxes.dtype == torch.int64
    assert boxes.tolist() == [naive_mask_box(rows, size, padding) for rows in several.tolist()]


def test_select_gathers_it_all():
    f = features()
    s = select(METRICS["psm"](f), 3, f.grid, (64, 80), "inclusive")
    torch.testing.assert_close(s.scores, METRICS["psm"](f).mean(dim=1))
    assert s.indices.shape == (3, 3) and s.grid == (4, 5)
    for row, indices, box in zip(s.scores.tolist(), s.indices.tolist(), s.boxes.tolist(), strict=True):
        assert indices == sorted(range(20), key=lambda i: -row[i])[:3]
        assert box == naive_box(indices, (4, 5), (64, 80), "inclusive")


@pytest.mark.parametrize(("grid", "size"), [((4, 5), (64, 80)), ((9, 6), (144, 96))])
@pytest.mark.parametrize("factor", [1.0, 1.2, 1.7])
def test_select_component_agrees_with_a_loop(grid, size, factor):
    n = grid[0] * grid[1]
    scores = torch.rand(25, 2, n, generator=generator(3)) ** 2
    scores[0] = 0.5  # nothing stands out: everything is kept
    s = select_component(scores, factor, grid, size, padding=0.02)
    assert s.indices.shape == (25, n) and s.grid == grid
    for b in range(25):
        row = ((scores[b, 0] + scores[b, 1]) / 2).tolist()
        torch.testing.assert_close(s.scores[b], torch.tensor(row))
        bar = factor * sum(row) / n
        mask = [value > bar for value in row]
        group = flood(mask if any(mask) else [True] * n, grid)
        indices = s.indices[b].tolist()
        assert set(indices[: len(group)]) == group and indices[len(group) :] == [-1] * (n - len(group))
        taken = [row[i] for i in indices[: len(group)]]
        assert all(a >= b - 1e-6 for a, b in pairwise(taken))  # best first
        lines = [[i in group for i in range(r * grid[1], (r + 1) * grid[1])] for r in range(grid[0])]
        assert s.boxes[b].tolist() == naive_mask_box(lines, size, 0.02)


def test_select_these_names_patches_and_draws_their_box():
    grid, size = (4, 5), (64, 80)
    scores = torch.rand(4, 20, generator=generator())
    indices = torch.tensor([[6, 13, 6], [19, -1, -1], [-1, -1, -1], [0, -1, 0]])
    s = select_these(scores, indices, grid, size)
    assert torch.equal(s.scores, scores) and torch.equal(s.indices, indices) and s.grid == grid
    assert s.boxes.tolist() == [[16, 16, 64, 48], [64, 48, 80, 64], [0, 0, 80, 64], [0, 0, 16, 16]]


# --- Crops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, (40, 24), (1, 1), (224, 224)])
def test_crops_agree_with_interpolate_image_by_image(size):
    images = torch.randn(6, 3, 96, 64, generator=generator())
    boxes = torch.tensor(
        [[0, 0, 64, 96], [0, 0, 1, 1], [63, 95, 64, 96], [16, 0, 48, 96], [5, 7, 23, 81], [0, 90, 64, 96]]
    )
    crops = crop_and_resize(images, boxes, size)
    for image, (left, top, right, bottom), crop in zip(images, boxes.tolist(), crops, strict=True):
        expected = F.interpolate(
            image[None, :, top:bottom, left:right], size or (96, 64), mode="bilinear", align_corners=True
        )[0]
        torch.testing.assert_close(crop, expected, atol=2e-6, rtol=1e-5)


def test_the_gradient_of_a_crop_is_that_of_interpolation():
    images = torch.randn(2, 3, 32, 24, requires_grad=True)
    boxes, weights = torch.tensor([[3, 1, 17, 30], [0, 8, 5, 9]]), torch.randn(2, 3, 20, 28)
    (found,) = torch.autograd.grad((crop_and_resize(images, boxes, (20, 28)) * weights).sum(), images)
    crops = [
        F.interpolate(image[None, :, top:bottom, left:right], (20, 28), mode="bilinear", align_corners=True)
        for image, (left, top, right, bottom) in zip(images, boxes.tolist(), strict=True)
    ]
    (expected,) = torch.autograd.grad((torch.cat(crops) * weights).sum(), images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_crop_keeps_dtype():
    images, box = torch.randn(1, 3, 32, 32), torch.tensor([[0, 0, 16, 16]])
    assert crop_and_resize(images.half(), box).dtype == torch.float16


# --- Controls ---------------------------------------------------------------------------------------------------------


def patches(count=40, k=4, grid=(5, 6), seed=0):
    g = generator(seed)
    return torch.stack([torch.randperm(grid[0] * grid[1], generator=g)[:k] for _ in range(count)])


@pytest.mark.parametrize("rule", sorted(ENDS))
@pytest.mark.parametrize("training", [False, True])
def test_controls_have_the_boxes_area(rule, training):
    grid, size, indices = (5, 6), (80, 96), patches()
    draw = partial(boxes_from_indices, grid=grid, image_size=size, rule=rule)
    own = draw(indices)
    for name in ("random", "centre"):
        boxes = CONTROLS[name](draw, indices, size, training)
        assert boxes.dtype == torch.int64 and torch.equal(boxes[:, 2:] - boxes[:, :2], own[:, 2:] - own[:, :2])
        assert (boxes >= 0).all() and (boxes[:, 2] <= 96).all() and (boxes[:, 3] <= 80).all()
    for (left, top, right, bottom), box in zip(own.tolist(), boxes.tolist(), strict=True):
        assert box[:2] == [(96 - (right - left)) // 2, (80 - (bottom - top)) // 2]
    assert CONTROLS["whole"](draw, indices, size, training).tolist() == [[0, 0, 96, 80]] * 40
    strip = boxes_from_indices(torch.arange(4)[None], grid, size, rule)
    assert torch.equal(CONTROLS["corner"](draw, indices, size, training), strip.expand(40, -1))


def test_the_random_box_is_an_images_own_and_uniform():
    grid, size, indices = (5, 6), (80, 96), patches(4000)
    before = torch.get_rng_state()
    draw = partial(boxes_from_indices, grid=grid, image_size=size)
    boxes = CONTROLS["random"](draw, indices, size, False)
    assert torch.equal(torch.get_rng_state(), before)
    order = torch.randperm(4000, generator=generator())
    assert torch.equal(CONTROLS["random"](draw, indices[order], size, False), boxes[order])
    assert torch.equal(CONTROLS["random"](draw, indices.flip(1), size, False), boxes)  # a set
    for axis, side in ((0, 96), (1, 80)):
        room = side - (boxes[:, axis + 2] - boxes[:, axis])
        share = (boxes[:, axis] / room)[room >= 16].double()
        assert abs(share.mean() - 0.5) < 0.02 and abs(share.std() - 12**-0.5) < 0.03
        own = boxes_from_indices(indices, grid, size)[:, axis] / room
        pair = torch.stack((share, own[room >= 16].double()))
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.06  # it tells nothing of where the patches were


def test_the_random_box_follows_torchs_generator_in_training():
    def draw(seed, training):
        torch.manual_seed(seed)
        around = partial(boxes_from_indices, grid=(5, 6), image_size=(80, 96), rule="inclusive")
        return CONTROLS["random"](around, patches(), (80, 96), training)

    assert torch.equal(draw(0, True), draw(0, True)) and not torch.equal(draw(0, True), draw(1, True))
    assert torch.equal(draw(0, False), draw(1, False))


@pytest.mark.parametrize(
    ("box", "taken"),
    [
        ("exclusive", (None, "exclusive")),
        ("inclusive", (None, "inclusive")),
        ("random:exclusive", ("random", "exclusive")),
        ("centre:inclusive", ("centre", "inclusive")),
    ],
)
def test_a_box_names_a_rule_or_a_control(box, taken):
    assert check_box(taken[0] or "random") == (taken[0] or "random", "moments")
    assert check_box(box) == taken
    f = features()
    selection = select(METRICS["gls_cos"](f), 4, f.grid, (64, 80), box)
    control, rule = taken
    around = partial(boxes_from_indices, grid=f.grid, image_size=(64, 80), rule=rule)
    own = around(selection.indices)
    expected = CONTROLS[control](around, selection.indices, (64, 80), False) if control else own
    assert torch.equal(selection.boxes, expected)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("round", f"unknown box rule 'round'; {choices(BOX_RULES | CONTROLS)}$"),
        ("random:round", f"unknown box rule 'round'; {choices(BOX_RULES)}$"),
        ("corner:moments", f"unknown box rule 'moments'; {choices(ENDS)}$"),
        ("inclusive:random", f"unknown control 'inclusive'; {choices(CONTROLS)}$"),
        ("random:", f"unknown box rule ''; {choices(BOX_RULES)}$"),
    ],
)
def test_unknown_boxes_list_the_choices(box, message):
    with pytest.raises(ConfigError, match=message):
        check_box(box)
