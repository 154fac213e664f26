"""Every term of the objective against loops written from its equation."""

import math

import pytest
import torch
from conftest import choices

from glsim import ConfigError, Output
from glsim.models.losses import TERMS, find_pairs, objective

SMOOTHING = [0.0, 0.1, 0.4]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_cross_entropy(logits, labels, smoothing):
    """Mean over rows of -sum_c q_c log p_c; q is 1 - s on the label, and s spread over all classes."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels, strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        for c, x in enumerate(row):
            q = (1 - smoothing) * (c == label) + smoothing / len(row)
            total -= q * (x - log_sum)
    return total / len(labels)


def naive_cos(u, v):
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))


def test_every_term_has_a_test():
    assert set(TERMS) == {
        *("cross_entropy", "contrastive", "supervised_contrastive", "uncertainty", "centre"),
        *("background", "refinement", "exclusion", "pairs"),
    }


def test_pairs_agree_with_a_loop():
    """Image 4 is alone in its class; of two at one distance the first is taken."""
    x = torch.tensor([[0.0, 0], [1, 0], [3, 0], [4, 0], [0, 2]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    wanted = [(0, 1), (1, 0), (2, 3), (3, 2), (0, 4), (1, 2), (2, 1), (3, 1), (4, 0)]
    one, other, there = find_pairs(x, labels)
    assert list(zip(one[there].tolist(), other[there].tolist(), strict=True)) == wanted

    g = generator()
    w = torch.randn(4, 2, 3, generator=g)
    loss = TERMS["pairs"]((2.0, 0.05, x, lambda a, b: (a @ w[0], b @ w[1], a @ w[2], b @ w[3])), labels, 0.1)
    total = 0.0
    for i, j in wanted:
        for image, own, partner in ((i, w[0], w[2]), (j, w[1], w[3])):
            good, bad = (x[image, None] @ part for part in (own, partner))
            label = int(labels[image])
            ce = [naive_cross_entropy(y, [label], 0.1) for y in (good, bad)]
            p, q = (float(y.softmax(dim=1)[0, label]) for y in (good, bad))
            total += sum(ce) / 2 + 2 * max(q - p + 0.05, 0)
    assert loss.item() == pytest.approx(total / (2 * len(wanted)), rel=1e-4)


def test_exclusion_agrees_with_a_loop():
    tokens = torch.randn(2, 4, 5, generator=generator())  # B D L
    loss = TERMS["exclusion"]((0.5, 2.0, 2, tokens), torch.tensor([0, 1]), 0.1)
    total = 0.0
    for image in tokens.tolist():
        shares = [[math.exp(row[i] / 2) / sum(math.exp(r[i] / 2) for r in image) for row in image] for i in range(5)]
        for i in range(3):
            total += sum(a * math.log(a / b) for a, b in zip(shares[i + 2], shares[i], strict=True))
    assert loss.item() == pytest.approx(-0.5 * 4 * total / 2, rel=1e-4)


@pytest.mark.parametrize("labels", [torch.tensor([1, 0]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])])
def test_background_agrees_with_a_loop_whatever_the_labels(labels):
    g = generator()
    maps = [torch.randn(2, n, 2, generator=g) for n in (3, 5)]
    output = Output(maps[0], aux={"background": [(5.0, maps[0]), (0.5, maps[1])]})
    means = [sum((math.tanh(v) + 1) ** 2 for v in x.flatten().tolist()) / x.numel() for x in maps]
    assert objective(output, labels).item() == pytest.approx(5 * means[0] + 0.5 * means[1], rel=1e-5)


def test_refinement_agrees_with_a_loop_and_teaches_the_earlier_alone():
    g = generator()
    earlier, later = (torch.randn(2, 3, 4, generator=g, requires_grad=True) for _ in range(2))
    loss = TERMS["refinement"]([(2.0, 4.0, earlier, later)], torch.tensor([0, 1]), 0.1)
    total = 0.0
    for one, other in zip(earlier.flatten(0, 1).tolist(), later.flatten(0, 1).tolist(), strict=True):
        q, p = ([math.exp(v / 4) / sum(math.exp(w / 4) for w in x) for v in x] for x in (other, one))
        total += sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    assert loss.item() == pytest.approx(2 * total / earlier.numel(), rel=1e-4)
    loss.backward()
    assert earlier.grad.any() and later.grad is None


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_cross_entropy_agrees_with_a_loop(smoothing):
    g = generator()
    one, other = 3 * torch.randn(4, 6, generator=g), 3 * torch.randn(4, 6, generator=g)
    labels = [5, 0, 3, 3]
    loss = TERMS["cross_entropy"](((0.4, one), (2.0, other)), torch.tensor(labels), smoothing)
    expected = 0.4 * naive_cross_entropy(one, labels, smoothing) + 2 * naive_cross_entropy(other, labels, smoothing)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_cross_entropy_of_several_views_repeats_the_whole_batch(views):
    logits = 3 * torch.randn(views * 4, 6, generator=generator(views))
    labels = [1, 0, 3, 5]
    loss = TERMS["cross_entropy"](((1.0, logits),), torch.tensor(labels), 0.1)
    assert loss.item() == pytest.approx(naive_cross_entropy(logits, labels * views, 0.1), rel=1e-5)


def test_cross_entropy_is_computed_in_full_precision():
    logits = torch.tensor([[8.0, -8.0, 3.0]])
    half = TERMS["cross_entropy"](((1.0, logits.half()),), torch.tensor([1]), 0.1)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(naive_cross_entropy(logits, [1], 0.1), rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [2, 2, 2, 2, 2], [0, 1, 0, 1, 3]])
def test_contrastive_agrees_with_a_loop(labels):
    cls = torch.randn(5, 8, generator=generator()) + 0.8  # cosines on both sides of the margin
    cosines, expected = [], 0.0
    for i, u in enumerate(cls.tolist()):
        for j, v in enumerate(cls.tolist()):
            cos = naive_cos(u, v)
            cosines.append(cos)
            expected += 1 - cos if labels[i] == labels[j] else max(cos - 0.4, 0.0)
    assert min(cosines) < 0.4 < sorted(cosines)[-6]
    loss = TERMS["contrastive"](cls, torch.tensor(labels), 0.1)
    assert loss.item() == pytest.approx(expected / 25, rel=1e-5)
    assert TERMS["contrastive"](7 * cls, torch.tensor(labels), 0.0).item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 3], [2, 2, 2, 2, 2], [0, 1, 2, 3, 4]])
def test_supervised_contrastive_agrees_with_a_loop(labels):
    """-1/|P(i)| sum over p in P(i) of log exp(cos_ip / t) / sum over a != i of exp(cos_ia / t), mean over i with P(i)."""
    vectors, each = torch.randn(5, 8, generator=generator()), []
    for i, u in enumerate(vectors.tolist()):
        others = {j: math.exp(naive_cos(u, v) / 0.1) for j, v in enumerate(vectors.tolist()) if j != i}
        positive = [j for j in others if labels[j] == labels[i]]
        if positive:
            each.append(-sum(math.log(others[j] / sum(others.values())) for j in positive) / len(positive))
    expected = 0.5 * sum(each) / len(each) if each else 0.0
    vectors.requires_grad_()
    loss = TERMS["supervised_contrastive"]((0.5, vectors), torch.tensor(labels), 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    loss.backward()
    assert vectors.grad.isfinite().all()


def test_the_contrast_is_computed_in_full_precision():
    vectors, labels = torch.randn(6, 8, generator=generator()), torch.tensor([0, 0, 1, 1, 2, 2])
    whole = TERMS["supervised_contrastive"]((1.0, vectors), labels, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = TERMS["supervised_contrastive"]((1.0, vectors), labels, 0.1)
    assert mixed.item() == pytest.approx(whole.item(), rel=1e-6)  # bfloat16 has two or three digits


def test_a_single_image_has_nothing_to_contrast_with():
    vectors = torch.randn(1, 8, requires_grad=True)
    loss = TERMS["supervised_contrastive"]((1.0, vectors), torch.tensor([3]), 0.1)
    loss.backward()
    assert loss.item() == 0 and torch.equal(vectors.grad, torch.zeros(1, 8))


def naive_shares(logits, shares, smoothing, focal):
    """Mean over rows of -sum_c q_c (1 - p_c)^focal log p_c; q the smoothed shares."""
    total = 0.0
    for row, own in zip(logits.tolist(), shares, strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        for x, share in zip(row, own, strict=True):
            q = (1 - smoothing) * share + smoothing / len(row)
            total -= q * (1 - math.exp(x - log_sum)) ** focal * (x - log_sum)
    return total / len(shares)


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("focal", [0.0, 0.5, 2.0])
def test_shares_of_classes_and_the_focal_exponent_agree_with_a_loop(smoothing, focal):
    logits = 3 * torch.randn(8, 6, generator=generator())
    shares = torch.rand(4, 6, generator=generator()).softmax(dim=-1)
    twice = [*shares.tolist(), *shares.tolist()]  # two views of each image
    output = Output(torch.zeros(4, 6), aux={"cross_entropy": ((0.5, logits),)})
    expected = 0.5 * naive_shares(logits, twice, smoothing, focal)
    assert objective(output, shares, smoothing, focal).item() == pytest.approx(expected, rel=1e-4)
    labels = torch.tensor([5, 0, 3, 3])
    hard = [[float(c == label) for c in range(6)] for label in labels.tolist()]
    several = {"uncertainty": (logits[None, :4], torch.zeros(1))}
    expected = 0.5 * naive_shares(logits[:4], hard, smoothing, focal)
    assert objective(Output(logits, aux=several), labels, smoothing, focal).item() == pytest.approx(expected, rel=1e-4)


def test_the_focal_loss_is_the_papers():
    """-(1 - p)^2 log p of the true class (arXiv 1708.02002, eq. 4)."""
    logits = torch.tensor([[2.0, 0.0]])
    p = math.exp(2) / (math.exp(2) + 1)
    assert objective(Output(logits), torch.tensor([0]), 0.0, 2.0).item() == pytest.approx(
        -((1 - p) ** 2) * math.log(p), rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("contrastive", torch.ones(2, 4)),
        ("centre", (torch.ones(2, 4), torch.ones(3, 4))),
        ("supervised_contrastive", (1.0, torch.ones(2, 4))),
    ],
)
def test_terms_that_compare_images_refuse_shares_of_classes(name, given):
    shares = torch.full((2, 3), 1 / 3)
    with pytest.raises(ConfigError, match=f"loss term '{name}' needs one class an image; leave mixup and cutmix at 0"):
        objective(Output(torch.zeros(2, 3), aux={name: given}), shares)


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_uncertainty_agrees_with_a_loop(smoothing):
    logits, w = 2 * torch.randn(3, 4, 6, generator=generator()), [0.5, -1.0, 0.0]
    labels = [5, 0, 3, 3]
    expected = 0.0
    for one, weight in zip(logits, w, strict=True):
        expected += (math.exp(-weight) * naive_cross_entropy(one, labels, smoothing) + weight) / 2
    loss = TERMS["uncertainty"]((logits, torch.tensor(w)), torch.tensor(labels), smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_uncertainty_weights_settle_at_the_logarithm_of_their_loss():
    """The minimum over w of exp(-w) CE + w: what makes the weights learn anything."""
    logits, labels = 2 * torch.randn(2, 4, 6, generator=generator()), torch.tensor([5, 0, 3, 3])
    w = torch.tensor([naive_cross_entropy(x, labels.tolist(), 0.1) for x in logits]).log().requires_grad_()
    TERMS["uncertainty"]((logits, w), labels, 0.1).backward()
    torch.testing.assert_close(w.grad, torch.zeros(2), atol=1e-6, rtol=0)


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / max(length, 1e-12) for x in vector]


def test_centre_loss_agrees_with_a_loop():
    g = generator()
    features, centres = torch.randn(4, 6, generator=g), torch.randn(5, 6, generator=g)
    centres[3] = 0  # as all are before the first step
    labels = [4, 0, 3, 1]
    expected = 0.0
    for row, label in zip(features.tolist(), labels, strict=True):
        expected += sum((x - c) ** 2 for x, c in zip(row, unit(centres[label].tolist()), strict=True)) / 4
    loss = TERMS["centre"]((features, centres.clone()), torch.tensor(labels), 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_centre_moves_by_beta_as_the_published_code_does():
    """`feature_center[y] += beta * (feature_matrix.detach() - normalize(feature_center[y]))`, beta 0.05."""
    g = generator()
    features, centres = torch.randn(3, 6, generator=g, requires_grad=True), torch.randn(5, 6, generator=g)
    centres[3] = 0
    labels = [4, 0, 3]
    expected = centres.clone()
    for row, label in zip(features.detach(), labels, strict=True):
        expected[label] += 0.05 * (row - torch.tensor(unit(centres[label].tolist())))
    moved = centres.clone()
    TERMS["centre"]((features, moved), torch.tensor(labels), 0.1).backward()
    assert torch.equal(moved[[1, 2]], centres[[1, 2]])  # nobody's
    torch.testing.assert_close(moved[3], 0.05 * features[2].detach())  # from zero
    torch.testing.assert_close(moved, expected)


def test_centre_passes_its_gradient_to_the_features_only():
    features, centres = torch.randn(3, 6, requires_grad=True), torch.randn(5, 6)
    own = torch.nn.functional.normalize(centres[[2, 0, 1]], dim=-1)
    TERMS["centre"]((features, centres), torch.tensor([2, 0, 1]), 0.1).backward()
    torch.testing.assert_close(features.grad, 2 * (features.detach() - own) / 3)
    assert not centres.requires_grad


def test_centres_draw_the_features_of_a_class_together():
    """Twice the same batch: the loss falls, since the centres come nearer."""
    features, labels = torch.nn.functional.normalize(torch.randn(3, 6, generator=generator()), dim=-1), torch.arange(3)
    centres = torch.zeros(3, 6)
    first, second, third = (TERMS["centre"]((features, centres), labels, 0.0).item() for _ in range(3))
    assert first == pytest.approx(1) and second < 1e-6 and third < 1e-6


def test_a_centre_moves_by_the_mean_over_its_images():
    """The published code takes the last image of a class that stands in the batch more than once: a matter of order."""
    g = generator()
    features, centres = torch.randn(4, 6, generator=g), torch.randn(3, 6, generator=g)
    expected = centres.clone()
    for label, rows in {1: [0, 1, 3], 0: [2]}.items():
        own = torch.tensor(unit(centres[label].tolist()))
        expected[label] += 0.05 * sum(features[row] - own for row in rows) / len(rows)
    TERMS["centre"]((features, centres), torch.tensor([1, 1, 0, 1]), 0.1)
    torch.testing.assert_close(centres, expected)


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_the_objective_adds_the_terms(smoothing):
    g = generator()
    logits, cls, several = (torch.randn(*s, generator=g) for s in ((4, 6), (4, 8), (3, 4, 6)))
    labels = torch.tensor([5, 0, 3, 3])
    aux = {
        "cross_entropy": ((0.5, logits), (1.0, -logits)),
        "contrastive": cls,
        "uncertainty": (several, torch.tensor([0.1, 0.2, 0.3])),
        "centre": (cls, torch.zeros(6, 8)),
    }
    loss = objective(Output(torch.full((4, 6), torch.nan), aux=aux), labels, smoothing)
    each = [TERMS[name](given, labels, smoothing).item() for name, given in aux.items() if name != "centre"]
    each.append(TERMS["centre"]((cls, torch.zeros(6, 8)), labels, smoothing).item())
    assert loss.shape == () and loss.item() == pytest.approx(sum(each), rel=1e-5)


def test_without_terms_the_objective_is_the_cross_entropy_with_label_smoothing():
    logits, labels = torch.randn(4, 6, generator=generator()), [5, 0, 3, 3]
    output = Output(logits)
    assert objective(output, torch.tensor(labels), 0.0).item() == pytest.approx(
        naive_cross_entropy(logits, labels, 0.0)
    )
    assert objective(output, torch.tensor(labels)).item() == pytest.approx(naive_cross_entropy(logits, labels, 0.1))


def test_an_unknown_term_lists_the_names():
    with pytest.raises(ConfigError, match=f"unknown loss term 'center'; {choices(TERMS)}$"):
        objective(Output(torch.zeros(1, 2), aux={"center": None}), torch.tensor([0]))
