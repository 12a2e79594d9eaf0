# SPDX-License-Identifier: Apache-2.0
"""Agreement against published and hand-computed values."""

import pytest
from scipy.stats import binom, binomtest

from trl_sipo.annotation.agreement import (
    FleissKappa,
    agreement_with,
    binomial_p_value,
    binomial_tail,
    fleiss_kappa,
    krippendorff_alpha,
)


def test_alpha_of_krippendorffs_own_example():
    """Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", section D: four observers, twelve units,
    nominal data with gaps; he gives 0.743."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    items = [[label for label in unit if label is not None] for unit in zip(*observers, strict=True)]
    assert krippendorff_alpha(items) == pytest.approx(0.743, abs=5e-4)


def test_alpha_by_hand():
    """Labels aab, bb, a (one label: passed over). n = 5, a twice, b three times.

    Observed: of aab, 4 of the ordered pairs differ, each weighs 1/2: 2. Expected: 5^2 - 2^2 - 3^2 = 12 ordered pairs.
    alpha = 1 - (5 - 1) * 2 / 12 = 1/3.
    """
    assert krippendorff_alpha(["aab", "bb", "a"]) == pytest.approx(1 / 3)
    assert krippendorff_alpha(["ab", "ab"]) == pytest.approx(-0.5)
    assert krippendorff_alpha(["aa", "bb"]) == 1.0


@pytest.mark.parametrize("items", [[], ["a", "b"], ["aa", "aaa"]], ids=["nothing", "single", "all alike"])
def test_alpha_is_not_defined_where_nothing_can_disagree(items):
    assert krippendorff_alpha(items) is None


def test_kappa_of_fleiss_s_table():
    """The example of fourteen raters, ten subjects and five categories that Wikipedia's "Fleiss' kappa" works out:
    0.210."""
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    items = [[category for category, number in enumerate(row) for _ in range(number)] for row in table]
    kappa = fleiss_kappa(items)
    assert kappa.value == pytest.approx(0.210, abs=5e-4) and (kappa.num_items, kappa.num_labels) == (10, 14)


def test_kappa_takes_the_items_of_the_most_frequent_number_of_labels():
    """ab and aa have two: agreement (0 + 1) / 2, by chance (3/4)^2 + (1/4)^2 = 5/8: (1/2 - 5/8) / (3/8) = -1/3."""
    assert fleiss_kappa(["ab", "aa", "abb", "b"]) == FleissKappa(pytest.approx(-1 / 3), 2, 2)
    assert fleiss_kappa(["aa", "aa"]) == FleissKappa(None, 2, 2)
    assert fleiss_kappa(["a"]) == FleissKappa(None, 0, 0)


def test_agreement_with_others():
    assert agreement_with({"p": "first", "q": "tie", "r": "tie"}, {"p": "first", "q": "second"}) == 0.5
    assert agreement_with({"p": "first"}, {}) is None


def test_binomial_p_values_are_exact():
    for total in (1, 2, 7, 20, 400):
        for hits in {0, 1, total // 3, total // 2, total}:
            assert binomial_p_value(hits, total) == pytest.approx(min(1.0, binomtest(hits, total).pvalue), rel=1e-9)
    assert binomial_p_value(0, 0) == 1.0


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_binomial_tails_are_those_of_the_distribution(rate):
    for total in (0, 1, 5, 40, 3000):
        for hits in {0, 1, total // 3, total // 2, total}:
            expected = binom.sf(hits - 1, total, rate)
            assert binomial_tail(hits, total, rate) == pytest.approx(expected, rel=1e-6, abs=1e-300)
