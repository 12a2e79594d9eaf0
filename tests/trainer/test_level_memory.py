# SPDX-License-Identifier: Apache-2.0
"""Masked noise levels are drawn anew: how often, with which bias, and the same in every run."""

import json
import logging
import math

import pytest
import torch

from tests.trainer.runs import (
    DPO,
    SIPO,
    changed,
    largest_difference,
    logged,
    make_config,
    make_trainer,
    preference_pairs,
    trained_weights,
)
from trl_sipo.core.noise_schedule import FlowSchedule, VPSchedule
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.level_memory import LEVEL_MEMORY_FILE, NUM_PARTS, LevelMemory, latest_weights, part_of

THRESHOLD = 0.9
SCHEDULES = {"vp": VPSchedule(torch.linspace(0.999, 0.005, 1000)), "flow": FlowSchedule(3.0)}
# Masks part of the levels of the tiny model, whose error is near 1 everywhere.
MASKING = {"mask_threshold": 0.9}


def _memory(schedule, num_redraws):
    return LevelMemory(
        schedule,
        mask=lambda log_weight: log_weight >= math.log(THRESHOLD),
        num_redraws=num_redraws,
        gather=lambda tensor: tensor,
        device=torch.device("cpu"),
    )


def _sampler(schedule):
    def sample(generators):
        return schedule.level_at(torch.cat([torch.rand(1, generator=generator) for generator in generators]))

    return sample


@pytest.mark.parametrize("kind", SCHEDULES)
def test_parts_cover_the_schedule_evenly(kind):
    schedule = SCHEDULES[kind]
    if kind == "vp":
        level = schedule.level(torch.arange(1000))
    else:
        level = schedule.level((torch.arange(1000) + 0.5) / 1000)
    assert part_of(level, schedule).bincount().tolist() == [1000 // NUM_PARTS] * NUM_PARTS
    noisiest = schedule.level_at(torch.tensor([1.0]))
    assert part_of(noisiest, schedule).tolist() == [NUM_PARTS - 1]


@pytest.mark.parametrize("num_redraws", [1, 3])
def test_the_bias_is_the_one_that_is_written_down(num_redraws):
    """Kept levels come (1 - m^(R+1)) / (1 - m) times as often, masked ones m^R times; evenly among themselves."""
    schedule, count = SCHEDULES["vp"], 40_000
    memory = _memory(schedule, num_redraws)
    memory.weight[:20] = 0.5
    masked_share = 20 / NUM_PARTS
    generator = torch.Generator().manual_seed(0)
    level = memory.draw(lambda _: schedule.level_at(torch.rand(count, generator=generator)), [])
    frequency = part_of(level, schedule).bincount(minlength=NUM_PARTS) * NUM_PARTS / count
    expected = torch.full((NUM_PARTS,), (1 - masked_share ** (num_redraws + 1)) / (1 - masked_share))
    expected[:20] = masked_share**num_redraws
    noise = (expected * NUM_PARTS / count).sqrt()
    assert ((frequency - expected).abs() < 4.5 * noise).all()


def test_without_redraws_the_memory_draws_once_and_keeps_nothing():
    schedule = SCHEDULES["vp"]
    memory = _memory(schedule, 0)
    memory.weight[:] = 0.0
    seeds = [torch.Generator().manual_seed(i) for i in range(8)]
    again = [torch.Generator().manual_seed(i) for i in range(8)]
    level = memory.draw(_sampler(schedule), seeds)
    assert torch.equal(level.timestep, _sampler(schedule)(again).timestep)
    assert memory.record(level, torch.ones(8), ends_step=True) == {}
    assert (memory.weight == 0).all()


def test_what_follows_from_a_pairs_generator_does_not_hang_on_the_memory():
    """Its noise, above all: every pair makes all of its draws, whether it needs them or not."""
    schedule, left = SCHEDULES["flow"], []
    for weight in (1.0, 0.0):
        memory = _memory(schedule, 2)
        memory.weight[:] = weight
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        memory.draw(_sampler(schedule), generators)
        left.append([torch.randn(3, generator=generator) for generator in generators])
    assert all(torch.equal(one, other) for one, other in zip(*left, strict=True))


def test_the_latest_weights_are_means_of_what_was_there():
    known = torch.full((NUM_PARTS,), 0.25)
    latest = latest_weights(known, torch.tensor([3, 3, 7]), torch.tensor([0.5, 1.0, 0.0]))
    assert latest[3] == 0.75 and latest[7] == 0.0
    assert set(latest[[part for part in range(NUM_PARTS) if part not in (3, 7)]].tolist()) == {0.25}


def test_a_visit_is_a_whole_step_of_the_optimiser():
    schedule = SCHEDULES["vp"]
    memory = _memory(schedule, 1)
    level = schedule.level(torch.tensor([40, 900]))
    memory.record(level, torch.tensor([0.5, 1.0]), ends_step=False)
    assert not memory.is_masked.any()
    logged_share = memory.record(level, torch.tensor([0.7, 1.0]), ends_step=True)
    assert logged_share["sipo/masked_levels"].tolist() == [0.0, 0.0]  # what the draws of this step were made with
    assert memory.is_masked.nonzero().flatten().tolist() == [2] and memory.weight[2] == pytest.approx(0.6)
    memory.record(level, torch.tensor([0.95, 1.0]), ends_step=True)
    assert not memory.is_masked.any()  # it has come back


def test_training_masks_less_and_says_how_much_is_set_aside(tmp_path):
    shares = {}
    for redraws in (0, 3):
        options = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-6, **MASKING}
        trainer = make_trainer(SIPO, tmp_path, mask_redraws=redraws, **options)
        trainer.train()
        masked = logged(trainer, "sipo/masked_fraction")[10:]
        shares[redraws] = sum(masked) / len(masked)
        set_aside = logged(trainer, "sipo/masked_levels")
        assert bool(set_aside) is bool(redraws)
    assert shares[3] < shares[0] / 2
    assert set_aside[0] == 0 and 0 < set_aside[-1] < 1


def test_it_does_not_hang_on_how_a_batch_is_divided(tmp_path):
    runs = []
    for batch in (8, 2):
        trainer = make_trainer(
            SIPO,
            tmp_path,
            pairs=preference_pairs(16),
            mask_redraws=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            max_steps=8,
            optim="sgd",
            learning_rate=1e-2,
            **MASKING,
        )
        trainer.train()
        runs.append((trained_weights(trainer), trainer.level_memory))
    assert runs[0][1].is_masked.any() and torch.allclose(runs[0][1].weight, runs[1][1].weight, atol=1e-5)
    assert largest_difference(runs[0][0], runs[1][0]) < 1e-6


def test_a_resumed_run_remembers(tmp_path):
    options = {"mask_redraws": 2, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, **MASKING}
    whole = make_trainer(SIPO, tmp_path / "whole", **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert len(json.loads((checkpoint / LEVEL_MEMORY_FILE).read_text())) == NUM_PARTS
    resumed = make_trainer(SIPO, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(whole.level_memory.weight, resumed.level_memory.weight)
    assert logged(whole, "sipo/masked_levels") == logged(resumed, "sipo/masked_levels")
    assert not changed(trained_weights(whole), trained_weights(resumed))


def test_a_checkpoint_without_memory_is_resumed_with_a_warning(tmp_path, caplog):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(SIPO, tmp_path, **options).train()
    resumed = make_trainer(SIPO, tmp_path, mask_redraws=1, **options)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "learned anew" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_redraws": -1}, "mask_redraws=-1"),
        ({"mask_redraws": 1.5}, "`mask_redraws` must be a whole number, got 1.5"),
        ({"mask_redraws": True}, "`mask_redraws` must be a whole number, got True"),
        ({"mask_redraws": 1, "mask": False}, "mask=False"),
        ({"mask_redraws": 1, "precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
    ],
)
def test_settings_that_make_no_sense(options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        make_config(SIPO, tmp_path, **options)


def test_other_methods_do_not_have_it(tmp_path):
    with pytest.raises(TypeError, match="mask_redraws"):
        make_config(DPO, tmp_path, mask_redraws=1)
