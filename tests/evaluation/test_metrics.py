# SPDX-License-Identifier: Apache-2.0
"""Closed forms and independent computations of the evaluation metrics."""

import numpy as np
import pytest
import scipy.linalg
import torch

from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.metrics import (
    frechet_distance,
    gaussian_frechet_distance,
    wilson_interval,
    within_group_diversity,
)


def correlated(num_rows: int, num_features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    rows = torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64)
    return rows @ mixing + torch.randn(num_features, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("num_rows", "num_features"), [(200, 7), (50, 1), (300, 80), (20, 40)])
def test_frechet_distance_agrees_with_scipy_sqrtm(num_rows, num_features):
    a, b = correlated(num_rows, num_features, 0), correlated(num_rows + 10, num_features, 1)
    cov_a, cov_b = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    # Where there are fewer rows than features the product is singular, and scipy needs a nudge; torch does not.
    nudge = 1e-9 * np.eye(num_features)
    root = scipy.linalg.sqrtm((cov_a + nudge) @ (cov_b + nudge)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4 if num_rows < num_features else 1e-8)


def test_frechet_distance_of_axis_aligned_gaussians_is_the_sum_of_squared_differences():
    mean_a, mean_b = torch.tensor([1.0, 2.0]), torch.tensor([4.0, -2.0])
    std_a, std_b = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.5])
    distance = gaussian_frechet_distance(mean_a, torch.diag(std_a**2), mean_b, torch.diag(std_b**2))
    assert distance == pytest.approx(25.0 + 1.0 + 6.25, rel=1e-12)


def test_frechet_distance_is_zero_for_itself_symmetric_and_shifts_by_the_squared_norm():
    a, b = correlated(100, 5, 2), correlated(100, 5, 3)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 4.0, 0, 0])) == pytest.approx(25.0, rel=1e-9)


def test_frechet_distance_takes_float32_features_in_float64():
    offset = 1e4
    a, b = correlated(500, 3, 4), correlated(500, 3, 5)
    assert frechet_distance((a + offset).float(), (b + offset).float()) == pytest.approx(
        frechet_distance(a, b), rel=1e-2
    )


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), "3 features"),
        (torch.zeros(1, 3), torch.zeros(5, 3), "N >= 2"),
        (torch.full((5, 3), torch.nan), torch.zeros(5, 3), "not finite"),
    ],
)
def test_frechet_distance_refuses_what_it_cannot_compare(a, b, message):
    with pytest.raises(ConfigurationError, match=message):
        frechet_distance(a, b)


def test_diversity_is_the_mean_of_group_standard_deviations():
    # Group 7: (0, 2) deviates by sqrt(2), (5, 5) by 0. Group 3: (1, 1, 4) deviates by sqrt(3), (0, 3, 6) by 3.
    features = torch.tensor([[0.0, 5.0], [1.0, 0.0], [2.0, 5.0], [1.0, 3.0], [4.0, 6.0], [100.0, 100.0]])
    group_ids = torch.tensor([7, 3, 7, 3, 3, 9])
    expected = ((2**0.5 + 0) / 2 + (3**0.5 + 3) / 2) / 2
    assert within_group_diversity(features, group_ids) == pytest.approx(expected, rel=1e-12)


def test_diversity_ignores_differences_between_groups_and_scales_with_the_features():
    features, group_ids = correlated(60, 4, 6), torch.arange(60) % 6
    base = within_group_diversity(features, group_ids)
    shifted = features + 100 * group_ids[:, None]
    assert within_group_diversity(shifted, group_ids) == pytest.approx(base, rel=1e-9)
    assert within_group_diversity(-3 * features, group_ids) == pytest.approx(3 * base, rel=1e-9)
    assert within_group_diversity(features[group_ids], group_ids) == pytest.approx(0.0, abs=1e-12)


def test_diversity_needs_a_group_of_two():
    with pytest.raises(ConfigurationError, match="two images"):
        within_group_diversity(torch.randn(3, 2), torch.arange(3))
    with pytest.raises(ConfigurationError, match="group_ids"):
        within_group_diversity(torch.randn(3, 2), torch.arange(2))


@pytest.mark.parametrize("z", [1.0, 1.959964, 2.576])
@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (7, 10), (950, 1000), (1, 1)])
def test_wilson_bounds_are_where_the_score_test_just_rejects(correct, total, z):
    # A bound p solves (share - p)^2 = z^2 p (1 - p) / n, which defines the interval.
    share = correct / total
    for bound in wilson_interval(correct, total, z=z):
        assert 0 <= bound <= 1
        assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / total, abs=1e-12)


def test_wilson_refuses_impossible_counts():
    for correct, total in ((3, 2), (-1, 5), (0, 0)):
        with pytest.raises(ConfigurationError, match="proportion"):
            wilson_interval(correct, total)
