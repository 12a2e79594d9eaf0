# SPDX-License-Identifier: Apache-2.0
"""Conversions of published betas."""

import math

import pytest
import torch

from trl_sipo.core.beta import BETA_CONVENTIONS, describe_beta, to_diffusion_dpo_beta
from trl_sipo.core.objectives import diffusion_dpo_loss
from trl_sipo.errors import ConfigurationError


@pytest.mark.parametrize(
    ("beta", "convention", "expected"),
    [
        (5000, "diffusion_dpo", 5000),
        (5, "sipo_paper", 5000),
        (2, "sipo_paper", 2000),
        (1, "sipo_paper", 1000),
        (0.02, "sipo_paper", 20),
        (10, "sipo_paper", 10000),
        (2500, "diffusers_sd15", 5000),
        (100, "flow", 100),
    ],
)
def test_published_values(beta, convention, expected):
    assert to_diffusion_dpo_beta(beta, convention) == pytest.approx(expected, rel=1e-12)


def _errors():
    """Squared errors `(4, 1, 16)`: policy chosen, policy rejected, reference chosen, reference rejected."""
    return torch.rand(4, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _library_loss(squared, beta):
    chosen, rejected, ref_chosen, ref_rejected = squared.mean(-1)
    return diffusion_dpo_loss((ref_chosen - chosen) / 2, (ref_rejected - rejected) / 2, beta=beta).item()


def test_the_half_is_that_of_diffusion_dpo():
    """Diffusion-DPO: -logsigmoid(-beta / 2 * [(m_w - m_l) - (r_w - r_l)]) with means over dims."""
    squared = _errors()
    m_w, m_l, r_w, r_l = (errors.mean().item() for errors in squared)
    expected = math.log1p(math.exp(0.5 * 30.0 * ((m_w - m_l) - (r_w - r_l))))
    assert _library_loss(squared, 30.0) == pytest.approx(expected, rel=1e-12)


def test_the_diffusers_script_has_no_half():
    squared = _errors()
    m_w, m_l, r_w, r_l = (errors.mean().item() for errors in squared)
    expected = math.log1p(math.exp(30.0 * ((m_w - m_l) - (r_w - r_l))))
    assert _library_loss(squared, to_diffusion_dpo_beta(30.0, "diffusers_sd15")) == pytest.approx(expected, rel=1e-12)


def test_summed_errors_need_the_number_of_dims():
    squared = _errors()
    m_w, m_l, r_w, r_l = (errors.sum().item() for errors in squared)
    expected = math.log1p(math.exp(0.5 * 2.0 * ((m_w - m_l) - (r_w - r_l))))
    beta = to_diffusion_dpo_beta(2.0, "summed", latent_dims=16)
    assert beta == 32.0
    assert _library_loss(squared, beta) == pytest.approx(expected, rel=1e-12)
    for dims in (None, 0):
        with pytest.raises(ConfigurationError, match="latent_dims"):
            to_diffusion_dpo_beta(2.0, "summed", latent_dims=dims)


def test_unknown_convention_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match="'paper'.*" + ", ".join(BETA_CONVENTIONS)):
        to_diffusion_dpo_beta(5.0, "paper")


@pytest.mark.parametrize("beta", [0, -1, math.inf, math.nan])
def test_impossible_betas(beta):
    for call in (describe_beta, lambda beta: to_diffusion_dpo_beta(beta, "flow")):
        with pytest.raises(ConfigurationError, match="beta="):
            call(beta)


def test_description_names_the_half_the_reduction_and_the_equivalents():
    text = describe_beta(5000)
    assert "beta = 5000 " in text and "/ 2" in text and "averaged" in text
    assert "5 in the SIPO paper" in text and "2500 in the diffusers" in text
