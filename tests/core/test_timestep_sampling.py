# SPDX-License-Identifier: Apache-2.0
"""Random times: range, distribution, and one seed = one draw."""

import math

import pytest
import torch

from trl_sipo.core.noise_schedule import VPSchedule
from trl_sipo.core.timestep_sampling import (
    TIME_SAMPLERS,
    logit_normal_time,
    stratified_time,
    uniform_time,
)
from trl_sipo.errors import ConfigurationError


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TIME_SAMPLERS)
def test_times_are_float32_in_the_half_open_interval_and_repeatable(name):
    sample = TIME_SAMPLERS[name]
    times = sample(1000, generator=_generator())
    assert times.shape == (1000,) and times.dtype == torch.float32
    assert (times >= 0).all() and (times < 1).all()
    assert torch.equal(times, sample(1000, generator=_generator()))
    assert not torch.equal(times, sample(1000, generator=_generator(1)))


@pytest.mark.parametrize("name", TIME_SAMPLERS)
def test_the_global_generator_is_left_alone(name):
    before = torch.get_rng_state()
    TIME_SAMPLERS[name](10, generator=_generator())
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(TypeError):
        TIME_SAMPLERS[name](10)


@pytest.mark.parametrize("name", ["uniform", "stratified"])
def test_uniform_in_distribution(name):
    times = TIME_SAMPLERS[name](20_000, generator=_generator()).double()
    assert times.mean().item() == pytest.approx(0.5, abs=0.01)
    assert times.var().item() == pytest.approx(1 / 12, abs=0.003)


def test_stratified_puts_one_time_in_each_stratum_in_random_order():
    times = stratified_time(64, generator=_generator())
    strata = (times * 64).long()
    assert strata.sort().values.tolist() == list(range(64))
    assert strata.tolist() != list(range(64))
    assert (times * 64 - strata).std() > 0.1  # not the grid itself


def test_logit_normal_has_the_given_logit():
    times = logit_normal_time(50_000, generator=_generator(), mean=0.7, std=0.5).double()
    logit = (times / (1 - times)).log()
    assert logit.mean().item() == pytest.approx(0.7, abs=0.01)
    assert logit.std().item() == pytest.approx(0.5, abs=0.01)


def test_a_saturated_logit_stays_below_one():
    times = logit_normal_time(8, generator=_generator(), mean=100.0)
    assert (times < 1).all() and (times > 0.999999).all()
    schedule = VPSchedule(torch.linspace(0.999, 0.01, 1000))
    assert schedule.level_at(times).timestep.tolist() == [999] * 8


def test_device_of_the_result():
    assert uniform_time(3, generator=_generator(), device="meta").device.type == "meta"
    assert uniform_time(3, generator=_generator()).device.type == "cpu"


def test_bad_settings():
    for std in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigurationError, match="std="):
            logit_normal_time(3, generator=_generator(), std=std)
