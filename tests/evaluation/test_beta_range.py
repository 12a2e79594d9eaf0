# SPDX-License-Identifier: Apache-2.0
"""The range of betas by hand, on published errors, and what is said of a beta."""

import math

import pytest
import torch

from tests.oracles import sd15_profile
from trl_sipo.core.objectives import diffusion_dpo_loss
from trl_sipo.errors import ConfigurationError
from trl_sipo.evaluation.beta_range import (
    DRIFTS,
    beta_grid,
    beta_range,
    conversions,
    drift_words,
    margin_scale,
    mixed_up_conventions,
    opposed_scale,
    real_margins,
    rounded,
    saturated_share,
    saturating_drift,
    verdict,
)
from trl_sipo.trainer.statistics import SATURATED_LOGIT, PairErrors


def _errors(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.05


@pytest.mark.parametrize("drift", DRIFTS)
def test_the_scale_gives_the_logit_of_the_objective(drift):
    """Of a policy that has drifted so, by the trainer's own log-ratios."""
    chosen, rejected, beta = _errors(3, 5), _errors(3, 5, seed=1), 700.0
    errors = PairErrors((1 - drift) * chosen, (1 + drift) * rejected, chosen, rejected)
    logit = beta * (errors.chosen_logratio - errors.rejected_logratio)
    assert torch.allclose(logit.double(), beta * drift * opposed_scale(chosen, rejected), rtol=1e-4)
    loss = diffusion_dpo_loss(errors.chosen_logratio[0], errors.rejected_logratio[0], beta=beta)
    values = loss[0] if isinstance(loss, tuple) else getattr(loss, "loss", loss)
    assert torch.allclose(values, torch.nn.functional.softplus(-logit[0]), rtol=1e-4)


def test_the_gradient_is_a_hundredth_where_a_draw_is_let_go():
    beta, scale = 1234.0, 0.07
    logit = torch.tensor(beta * scale * saturating_drift(scale, beta), requires_grad=True)
    torch.nn.functional.softplus(-logit).backward()
    assert abs(logit.grad.item()) == pytest.approx(0.01, rel=1e-4)


def test_the_typical_scale_is_the_geometric_mean():
    chosen, rejected = torch.tensor([[0.1, 0.3], [0.01, 0.03]]), torch.tensor([[0.3, 0.5], [0.03, 0.05]])
    scale = margin_scale(chosen, rejected, ["a", "b"])
    assert scale.typical.estimate == pytest.approx((0.2 * 0.4 * 0.02 * 0.04) ** 0.25)
    assert scale.by_level == pytest.approx((math.sqrt(0.08), math.sqrt(0.0008)))
    assert scale.common_by_level == pytest.approx(((0.5 + 0.25) / 2,) * 2)
    found = beta_range(scale)
    assert found.high / found.low == pytest.approx(20) and found.holds(found.middle)
    assert saturating_drift(scale.typical.estimate, found.low) == pytest.approx(0.2)
    assert saturating_drift(scale.typical.estimate, found.high) == pytest.approx(0.01)


def test_half_of_the_draws_are_let_go_at_the_typical_drift():
    """Of scales that are symmetric in their logarithm, so that the geometric mean is the median."""
    exponents = torch.linspace(-2, 2, 100, dtype=torch.float64)
    scale = (10**exponents).expand(3, 100) * 0.05
    beta = 800.0
    drift = saturating_drift(0.05, beta)
    assert saturated_share(scale, beta, drift) == pytest.approx(0.5)
    assert saturated_share(scale, beta, drift / 200) == 0 and saturated_share(scale, beta, drift * 200) == 1


def test_published_values_for_stable_diffusion_are_in_the_range_of_its_published_errors():
    """5000 and 2000 of Diffusion-DPO, 1000 of the SIPO paper; neither end of that paper's sweep, 20 .. 10000."""
    timesteps = torch.arange(5, 1000, 10)
    errors = sd15_profile.epsilon_error(timesteps)[:, None].expand(-1, 4)
    found = beta_range(margin_scale(errors, errors, list("abcd")))
    words = {beta: verdict(beta, found)[0] for beta in (2, 20, 1000, 2000, 5000, 10000, 1e6)}
    assert words[1000] == words[2000] == words[5000] == "good"
    assert words[2] == words[20] == "far_too_small"
    assert words[10000] == "rather_large" and words[1e6] == "far_too_large"


def test_what_is_said_of_a_beta():
    errors = torch.full((4, 6), 0.05)
    found = beta_range(margin_scale(errors, errors, list("abcdef")))
    assert found.low == pytest.approx(SATURATED_LOGIT / 0.01) and rounded(found.low) == "460"
    cases = {4: "far_too_small", 200: "rather_small", 2000: "good", 20_000: "rather_large", 200_000: "far_too_large"}
    for beta, word in cases.items():
        found_word, sentence = verdict(beta, found)
        assert found_word == word and f"beta = {beta:g}" in sentence and "460 to 9200" in sentence
        assert ("FAR TOO" in sentence) == word.startswith("far")
        assert drift_words(saturating_drift(0.05, beta)) in sentence


@pytest.mark.parametrize(
    ("given", "convention", "names"),
    [
        (2.0, "diffusion_dpo", ["sipo_paper"]),
        (0.2, "diffusion_dpo", ["summed"]),
        (5000.0, "sipo_paper", ["diffusion_dpo"]),  # converted twice
        (300.0, "diffusion_dpo", ["diffusers_sd15"]),
        (2000.0, "diffusion_dpo", ["diffusers_sd15"]),  # both are in the range
        (1e-9, "diffusion_dpo", []),
    ],
)
def test_a_number_of_another_convention_is_recognised(given, convention, names):
    errors = torch.full((4, 6), 0.05)
    found = beta_range(margin_scale(errors, errors, list("abcdef")))  # 460 to 9190
    assert mixed_up_conventions(given, convention, found, latent_dims=16384) == names


def test_conversions_are_those_of_core():
    converted = conversions(5000, 16384)
    assert converted["sipo_paper"] == 5 and converted["diffusers_sd15"] == 2500 and converted["diffusion_dpo"] == 5000
    assert converted["summed"] == pytest.approx(5000 / 16384)


@pytest.mark.parametrize("middle", [0.3, 45.0, 1350.0, 99999.0])
def test_the_grid_spans_three_decades(middle):
    grid = beta_grid(middle)
    assert grid == sorted(grid) and 8 <= len(grid) <= 10
    assert middle / 32 <= grid[0] < middle / 10 and 10 * middle < grid[-1] <= 32 * middle


def test_real_margins_by_hand():
    base = torch.tensor([[0.4, 0.4]]), torch.tensor([[0.4, 0.4]])
    tuned = torch.tensor([[0.3, 0.5]]), torch.tensor([[0.5, 0.5]])
    real = real_margins(base, tuned, ["a", "b"])
    assert real.margin.tolist()[0] == pytest.approx([0.1, 0.0], abs=1e-7)
    assert real.accuracy.estimate in (0.75, 0.5, 1.0)  # the tie counts one half, if rounding leaves it one
    assert real.chosen_drift.estimate == pytest.approx(0.0, abs=1e-6)
    assert real.rejected_drift.estimate == pytest.approx(0.25, abs=1e-6)
    assert real.saturated(1.0) == 0 and real.saturated(50.0) == 0.5


def test_tables_that_tell_nothing_are_refused():
    zeros = torch.zeros(2, 3)
    with pytest.raises(ConfigurationError, match="no error at all"):
        margin_scale(zeros, zeros, list("abc"))
    with pytest.raises(ConfigurationError, match="do not go together"):
        margin_scale(_errors(2, 3), _errors(2, 3), list("ab"))
