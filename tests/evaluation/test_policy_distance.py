# SPDX-License-Identifier: Apache-2.0
"""Errors beside those on own samples, and what clip ranges do to weights, by hand."""

import math

import pytest
import torch

from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.policy_distance import as_numbers, clip_ranges, distance_words, error_excess, share_interval
from trl_sipo.evaluation.statistics import Interval

PROMPTS = [f"prompt {number}" for number in range(12)]


def _errors(seed=0):
    """Of twelve samples at six levels that differ by a factor of a hundred."""
    scale = torch.logspace(0, -2, 6, dtype=torch.float64)[:, None]
    return scale * (1 + torch.rand(6, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_the_excess_is_that_of_every_level_alike():
    own = _errors()
    found = error_excess(1.3 * own, own, PROMPTS)
    assert found.overall.estimate == pytest.approx(0.3) and found.by_level == pytest.approx([0.3] * 6)
    one_level = own.clone()
    one_level[5] *= 2**6  # the noisiest level counts as much as the cleanest
    assert error_excess(one_level, own, PROMPTS).overall.estimate == pytest.approx(1.0)


def test_the_interval_holds_the_truth_and_shrinks():
    """Of ratios that scatter around 1.5: by prompts, not by levels."""
    generator = torch.Generator().manual_seed(1)
    own = torch.ones(6, 400, dtype=torch.float64)
    ratio = 1.5 * torch.randn(400, generator=generator, dtype=torch.float64).mul(0.2).exp().expand(6, -1)
    few, many = (error_excess(ratio[:, :n], own[:, :n], list(range(n))).overall for n in (40, 400))
    assert few.low < 0.5 < few.high and many.low < 0.5 < many.high
    assert (many.high - many.low) < 0.5 * (few.high - few.low)


def test_tables_that_do_not_compare_are_refused():
    own = _errors()
    with pytest.raises(ConfigurationError, match="do not go together"):
        error_excess(own[:, :3], own, PROMPTS)
    with pytest.raises(ConfigurationError, match="has no ratio"):
        error_excess(own, torch.zeros_like(own), PROMPTS)


def test_clip_ranges_by_hand():
    """Weights of 0.96, 0.905, 0.85 and 0.5 at one level."""
    log_weights = torch.tensor([[0.96, 0.905, 0.85, 0.5]], dtype=torch.float64).log()
    tight, loose = clip_ranges(log_weights, list("abcd"), [(0.1, 0.9), (0.1, 0.8)])
    assert tight.masked.estimate == 0.5 and loose.masked.estimate == 0.25
    assert tight.clipped == (0.5, 0.0)  # 1 / 0.905 is above 1.1
    assert tight.sipo_factor == pytest.approx((1 / 0.96 + 1.1) / 2)
    assert tight.dpo_cm_factor == pytest.approx((0.96 + 0.905) / 2)
    assert loose.clipped == pytest.approx((2 / 3, 1 / 3))  # 0.85 is kept, and raised to 0.9
    assert loose.dpo_cm_factor == pytest.approx((0.96 + 0.905 + 0.9) / 3)


def test_factors_of_nothing_are_none():
    (row,) = clip_ranges(torch.full((2, 3), -5.0), list("abc"), [(0.1, 0.9)])
    assert row.masked.estimate == 1 and math.isnan(row.sipo_factor) and math.isnan(row.clipped[0])


def test_shares_are_clustered_by_prompt():
    is_so = torch.tensor([[True, True, False, False]])
    apart, together = share_interval(is_so, list("abcd")), share_interval(is_so, list("aabb"))
    assert apart.estimate == together.estimate == 0.5
    assert together.high - together.low >= apart.high - apart.low


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.1, 0.2, "cannot be told apart"), (0.1, 0.4, "off-policy"), (-0.4, -0.1, "easier to it")],
)
def test_words_of_a_distance(low, high, words):
    sentence = distance_words("chosen samples", Interval((low + high) / 2, low, high))
    assert words in sentence and f"[{low:+.0%}, {high:+.0%}]" in sentence


def test_an_infinite_interval_is_null_in_json():
    assert as_numbers(Interval(0.1, -math.inf, math.inf)) == {"estimate": 0.1, "low": None, "high": None}
