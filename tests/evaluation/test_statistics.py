"""Bootstrap intervals against NumPy and theory, McNemar's test against the binomial one."""

import math

import numpy as np
import pytest
import torch
from largest import Largest
from scipy.stats import binomtest

from glsim.evaluation import statistics
from glsim.evaluation.statistics import as_numbers, bootstrap_ci, mcnemar, signed


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_interval_is_the_bootstraps():
    values = torch.rand(40, 3, generator=generator(), dtype=torch.double)
    values[::4, 1] = torch.nan
    values[:, 2] = torch.nan
    mean, low, high = bootstrap_ci(values, resamples=300, seed=5)
    draws = torch.randint(40, (300, 40), generator=generator(5))
    for column in (0, 1):
        means = sorted(float(np.nanmean(values[rows, column].numpy())) for rows in draws)
        assert mean[column].item() == pytest.approx(float(np.nanmean(values[:, column])))
        assert low[column].item() == pytest.approx(float(np.quantile(means, 0.025)))
        assert high[column].item() == pytest.approx(float(np.quantile(means, 0.975)))
    assert mean[2].isnan() and low[2].isnan()
    named = as_numbers({"a": values[:, 0], "c": values[:, 2]}, 300, 5)
    assert named["c"] is None and named["a"] == [mean[0].item(), low[0].item(), high[0].item()]
    assert as_numbers({}) == {}


def test_one_image_has_no_interval():
    columns = {"a": torch.tensor([0.25, torch.nan]), "b": torch.tensor([0.0, 1.0]), "c": torch.full((2,), torch.nan)}
    found = as_numbers(columns, 100)
    assert found["a"] == [0.25, None, None] and found["b"] == [0.5, 0.0, 1.0] and found["c"] is None
    assert as_numbers({"a": torch.tensor([0.25])}) == {"a": [0.25, None, None]}
    assert [signed(*found[name], digits=2) for name in "ab"] == ["+0.25", "+0.50 (+0.00 to +1.00)"]


def test_draws_in_parts_are_those_at_once(monkeypatch):
    """And many images take little memory: all counts at once are 10 million."""
    values = torch.rand(50_000, 2, generator=generator(), dtype=torch.double)
    with Largest() as largest:
        bootstrap_ci(values, resamples=200)
    assert largest.count <= statistics.AT_ONCE < 200 * 50_000
    few = values[:30]
    at_once = bootstrap_ci(few, resamples=101)
    monkeypatch.setattr(statistics, "AT_ONCE", 100)
    torch.testing.assert_close(bootstrap_ci(few, resamples=101), at_once, atol=1e-12, rtol=0)


def test_the_interval_is_as_wide_as_theory_says():
    values = torch.randn(400, 1, generator=generator(), dtype=torch.double)
    _, low, high = bootstrap_ci(values, resamples=4000)[:, 0].tolist()
    assert (high - low) / 2 == pytest.approx(1.96 * values.std().item() / math.sqrt(400), rel=0.08)


@pytest.mark.parametrize(
    ("b", "c"), [(0, 0), (0, 1), (0, 6), (5, 1), (1, 5), (10, 12), (7, 7), (121, 59), (3000, 3100)]
)
def test_mcnemar_is_the_exact_binomial_test(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)  # of 64 ways, 7 are as uneven on one side
