# SPDX-License-Identifier: Apache-2.0
"""Held-out errors are those of the trainer's own evaluation."""

import dataclasses

import pytest
import torch

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import DPO, make_config, make_trainer, preference_pairs
from trl_sipo.adapters import adapter_for
from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError
from trl_sipo.evaluation.held_out import held_out_errors, implicit_preferences

BETA = 300.0


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A trained LoRA, the trainer's metrics on held-out pairs, and the pairs."""
    folder, held_out = tmp_path_factory.mktemp("run"), preference_pairs(5, seed=3)
    trainer = make_trainer(
        DPO, folder, beta=BETA, learning_rate=1e-2, max_steps=4, trainer_options={"eval_dataset": held_out}
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return folder, metrics, held_out


def errors_of(pairs, folder=None, **options):
    pipeline = tiny_stable_diffusion()
    if folder is not None:
        pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    return held_out_errors(adapter_for(pipeline), pairs, make_config(DPO, "unused", **options), show_progress=False)


def test_the_table_gives_what_the_trainer_evaluates(tuned):
    folder, metrics, pairs = tuned
    base, candidate = errors_of(pairs), errors_of(pairs, folder)
    *by_time, overall = implicit_preferences(base, candidate, beta=BETA)
    assert [row.time for row in by_time] == pytest.approx([1 / 6, 0.5, 5 / 6]) and overall.time is None
    for row in by_time:
        accuracy = metrics[f"eval_rewards/accuracies/time_{row.time:.2f}"]
        margin = metrics[f"eval_rewards/margins/time_{row.time:.2f}"]
        assert row.accuracy.estimate == pytest.approx(accuracy, abs=1e-6)
        assert row.margin.estimate == pytest.approx(margin, rel=1e-3, abs=1e-5)
    assert overall.margin.estimate == pytest.approx(metrics["eval_rewards/margins"], rel=1e-3, abs=1e-5)
    assert overall.chosen_drift.estimate == pytest.approx(metrics["eval_drift/chosen_error"], rel=1e-3, abs=1e-7)
    assert abs(overall.margin.estimate) > 1e-4, "the LoRA must have learned something"


def test_a_model_beside_itself_prefers_nothing():
    base = errors_of(preference_pairs(3))
    overall = implicit_preferences(base, base, beta=BETA)[-1]
    assert (overall.accuracy.estimate, overall.margin.estimate) == (0.5, 0.0)


def test_ties_of_soft_labels_prefer_nothing():
    pairs = preference_pairs(3)
    labelled = pairs.add_column("label", [1.0, 0.5, 0.7])
    soft = errors_of(labelled, soft_labels=True)
    assert soft.prompts == (pairs[0]["prompt"], pairs[2]["prompt"]) and soft.chosen.shape[1] == 2
    with pytest.raises(DatasetError, match="All held-out pairs are ties"):
        errors_of(preference_pairs(2).add_column("label", [0.5, 0.5]), soft_labels=True)


def test_tables_of_other_pairs_or_levels_are_refused():
    base = errors_of(preference_pairs(3))
    with pytest.raises(ConfigurationError, match="different pairs"):
        implicit_preferences(base, errors_of(preference_pairs(3), eval_noise_levels=2), beta=BETA)
    with pytest.raises(ConfigurationError, match="different pairs"):
        implicit_preferences(base, dataclasses.replace(base, prompts=("a", "b", "c")), beta=BETA)


def test_a_model_that_overflows_is_named():
    pipeline = tiny_stable_diffusion()
    with torch.no_grad():
        pipeline.unet.conv_out.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(NumericalError, match="held-out pair 0"):
        held_out_errors(adapter_for(pipeline), preference_pairs(2), make_config(DPO, "unused"), show_progress=False)
