# SPDX-License-Identifier: Apache-2.0
"""Models beside their base, on scores and features that were made up."""

from pathlib import Path

import numpy as np
import torch

from trl_sipo.evaluation.comparison import StatisticsSettings, compare_models
from trl_sipo.generation.prompt_sets import PromptRecord
from trl_sipo.generation.sampling import Sample
from trl_sipo.generation.scoring import ScoredSamples
from trl_sipo.rewards.base import RewardInfo

FAST = StatisticsSettings(num_resamples=20)


class CountedList(list):
    """A list that counts how often it is gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def scored(num_prompts, seed):
    records = [PromptRecord(f"p{number}", f"prompt {number}", f"c{number % 2}") for number in range(num_prompts)]
    samples = CountedList(Sample(record, index, Path("unused.png")) for record in records for index in range(2))
    values = np.random.default_rng(seed).normal(size=2 * num_prompts)
    return ScoredSamples(samples, {"r": RewardInfo("r", "none", "none")}, {"r": values})


def test_the_work_grows_with_the_number_of_samples_alone():
    few, many = ({"base": scored(count, 0), "tuned": scored(count, 1)} for count in (4, 40))
    for models in (few, many):
        compare_models(models, {}, {}, base="base", beta=1.0, settings=FAST)
    assert many["base"].samples.passes == few["base"].samples.passes


def test_a_base_without_variety_leaves_it_out_and_keeps_the_rest(caplog):
    models = {"base": scored(4, 0), "tuned": scored(4, 1)}
    features = {"base": torch.ones(8, 3), "tuned": torch.randn(8, 3)}
    compared = compare_models(models, features, {}, base="base", beta=1.0, settings=FAST)
    assert compared.variety == {} and len(compared.metrics) == 2 and len(compared.categories) == 4
    assert "variety and drift have no scale" in caplog.text
