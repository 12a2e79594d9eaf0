# SPDX-License-Identifier: Apache-2.0
"""Noise levels and schedules: coefficients, neighbours, dtypes, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import sd15_profile
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
from trl_sipo.errors import ConfigurationError

SD15 = VPSchedule(sd15_profile.alphas_cumprod())


def test_vp_level_reads_the_table_in_float64():
    table = sd15_profile.alphas_cumprod()
    level = SD15.level(torch.tensor([0, 63, 999]))
    for i, t in enumerate((0, 63, 999)):
        assert level.alpha_t[i].item() == pytest.approx(math.sqrt(table[t]), rel=1e-7)
        # A float32 `1 - alphas_cumprod` would be off by 3e-5 at t = 0.
        assert level.sigma_t[i].item() == pytest.approx(math.sqrt(1 - table[t]), rel=1e-7)
    assert level.alpha_t.dtype == torch.float32 and level.timestep.tolist() == [0, 63, 999]


def test_vp_level_at_floors_the_time():
    time = torch.tensor([0.0, 0.0009, 0.5, 0.63451, 1 - 2.0**-24])
    assert SD15.level_at(time).timestep.tolist() == [0, 0, 500, 634, 999]
    assert SD15.level_at(torch.tensor([1.0])).timestep.tolist() == [999]


def test_vp_level_at_does_not_round_up_just_below_a_step():
    steps = torch.arange(1, 1000, dtype=torch.float64)
    below = (steps / 1000).float()
    below = torch.where(below.double() * 1000 < steps, below, torch.nextafter(below, torch.zeros(())))
    assert SD15.level_at(below).timestep.tolist() == list(range(999))


def test_vp_previous_level_steps_back_one_stride():
    previous = SD15.previous_level(SD15.level(torch.tensor([20, 63, 999])))
    expected = SD15.level(torch.tensor([0, 43, 979]))
    assert previous.timestep.tolist() == [0, 43, 979]
    assert torch.equal(previous.alpha_t, expected.alpha_t) and torch.equal(previous.sigma_t, expected.sigma_t)
    assert SD15.previous_level(SD15.level(torch.tensor([999])), 1000).timestep.tolist() == [998]
    assert SD15.previous_level(SD15.level(torch.tensor([999])), 40).timestep.tolist() == [974]


def test_vp_previous_level_below_one_stride_is_the_clean_end():
    previous = SD15.previous_level(SD15.level(torch.tensor([0, 7, 19])))
    assert previous.timestep.tolist() == [-1, -1, -1]
    assert previous.alpha_t.tolist() == [1, 1, 1] and previous.sigma_t.tolist() == [0, 0, 0]
    assert SD15.previous_level(previous).timestep.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("timesteps", [[-1], [0, 1000]])
def test_vp_level_refuses_timesteps_outside_the_table(timesteps):
    with pytest.raises(ConfigurationError, match=r"0\.\.999"):
        SD15.level(torch.tensor(timesteps))


@pytest.mark.parametrize(
    "table", [torch.ones(2, 2), torch.ones(0), torch.tensor([1.2, 0.5]), torch.tensor([math.nan])]
)
def test_vp_schedule_refuses_a_table_that_is_none(table):
    with pytest.raises(ConfigurationError, match="alphas_cumprod"):
        VPSchedule(table)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_vp_previous_level_refuses_an_impossible_grid(num_steps):
    with pytest.raises(ConfigurationError, match=f"num_steps={num_steps}"):
        SD15.previous_level(SD15.level(torch.tensor([5])), num_steps)


def test_flow_level_is_analytic():
    level = FlowSchedule().level(torch.tensor([0.0, 0.25, 1.0]))
    assert level.alpha_t.tolist() == [1.0, 0.75, 0.0]
    assert level.sigma_t.tolist() == [0.0, 0.25, 1.0]
    assert level.timestep.tolist() == [0.0, 250.0, 1000.0]
    assert FlowSchedule(timestep_scale=1.0).level(torch.tensor([0.25])).timestep.tolist() == [0.25]


def test_flow_level_at_shifts_the_time_as_diffusers_does():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    time = torch.arange(1000, 0, -1) / 1000
    level = FlowSchedule(shift=3.0).level_at(time)
    torch.testing.assert_close(level.sigma_t, scheduler.sigmas.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(level.timestep, scheduler.timesteps.float(), rtol=1e-6, atol=1e-4)


def test_flow_dynamic_shift_is_exp_mu():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(10, mu=1.15)
    grid = torch.linspace(1, 1 / 1000, 10)
    torch.testing.assert_close(
        FlowSchedule(shift=math.exp(1.15)).level_at(grid).sigma_t, scheduler.sigmas[:-1].float(), rtol=1e-5, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.1, 20.0), st.integers(1, 1000))
def test_flow_previous_level_is_one_grid_step_before_the_shift(time, shift, num_steps):
    schedule = FlowSchedule(shift, dtype=torch.float64)
    level = schedule.level_at(torch.tensor([time], dtype=torch.float64))
    previous = schedule.previous_level(level, num_steps)
    earlier = max(time - 1 / num_steps, 0.0)
    expected = shift * earlier / (1 + (shift - 1) * earlier)
    assert previous.sigma_t.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert 0 <= previous.sigma_t.item() <= level.sigma_t.item()
    assert previous.alpha_t.item() == 1 - previous.sigma_t.item()
    assert previous.timestep.item() == pytest.approx(1000 * expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_flow_schedule_refuses_an_impossible_shift(shift):
    with pytest.raises(ConfigurationError, match="shift="):
        FlowSchedule(shift)


def test_flow_previous_level_refuses_no_steps():
    schedule = FlowSchedule()
    with pytest.raises(ConfigurationError, match="num_steps=0"):
        schedule.previous_level(schedule.level(torch.tensor([0.5])), 0)


@pytest.mark.parametrize(
    "make", [lambda dtype: VPSchedule(torch.tensor([0.9, 0.5]), dtype), lambda d: FlowSchedule(dtype=d)]
)
def test_schedules_refuse_half_precision(make):
    with pytest.raises(ConfigurationError, match="bfloat16"):
        make(torch.bfloat16)
    assert make(torch.float64).level(torch.tensor([1, 0])).alpha_t.dtype == torch.float64


@pytest.mark.parametrize("schedule", [SD15, FlowSchedule(3.0)])
def test_previous_level_keeps_the_dtype_of_the_level(schedule):
    level = schedule.level_at(torch.tensor([0.5])).to(dtype=torch.float64)
    assert schedule.previous_level(level).sigma_t.dtype == torch.float64


@pytest.mark.parametrize("schedule", [SD15, FlowSchedule(1.0), FlowSchedule(5.0)])
def test_time_runs_from_clean_to_noise(schedule):
    level = schedule.level_at(torch.linspace(0, 0.999, 50))
    assert (level.snr.diff() < 0).all() and (level.sigma_t.diff() > 0).all()
    torch.testing.assert_close(level.log_snr[1:], level.snr[1:].log(), rtol=1e-4, atol=1e-5)


def test_snr_at_both_ends():
    level = NoiseLevel(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0, 999]))
    assert level.snr.tolist() == [math.inf, 0.0]
    assert level.log_snr.tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 5, 6), (2, 4, 3, 5, 6)])
def test_add_noise_broadcasts_over_images_and_videos(shape):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *shape, generator=generator)
    level = SD15.level(torch.tensor([10, 700]))
    noisy = level.add_noise(clean, noise)
    for i in range(2):
        torch.testing.assert_close(noisy[i], level.alpha_t[i] * clean[i] + level.sigma_t[i] * noise[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_noise_computes_in_float32_for_half_precision_inputs(dtype):
    clean, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype).expand(2, 2, 3, 4)
    level = SD15.level(torch.tensor([10, 700]))
    noisy = level.add_noise(clean, noise)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy, level.add_noise(clean.float(), noise.float()))
    assert level.add_noise(clean.double(), noise).dtype == torch.float64


def test_repeat_pair_is_chosen_then_rejected():
    pair = SD15.level(torch.tensor([10, 700])).repeat_pair()
    assert pair.timestep.tolist() == [10, 700, 10, 700]
    assert torch.equal(pair.alpha_t[:2], pair.alpha_t[2:]) and torch.equal(pair.sigma_t[:2], pair.sigma_t[2:])


def test_to_moves_coefficients_and_refuses_to_narrow_them():
    level = FlowSchedule().level(torch.tensor([0.5]))
    wide = level.to(dtype=torch.float64)
    assert wide.alpha_t.dtype == wide.sigma_t.dtype == torch.float64 and wide.timestep.dtype == torch.float32
    assert level.to("meta").alpha_t.device.type == level.to("meta").timestep.device.type == "meta"
    with pytest.raises(ConfigurationError, match="float16"):
        level.to(dtype=torch.float16)


def test_a_level_cannot_be_changed():
    with pytest.raises(AttributeError):
        SD15.level(torch.tensor([1])).timestep = torch.tensor([2])


def test_vp_previous_level_never_asks_the_device():
    """On the meta device nothing can be read back: the level before is looked up where the level is."""
    level = SD15.level(torch.tensor([5, 999])).to("meta")
    previous = SD15.previous_level(level)
    assert {previous.alpha_t.device.type, previous.timestep.device.type} == {"meta"}
    assert previous.alpha_t.shape == (2,) and previous.alpha_t.dtype == torch.float32
