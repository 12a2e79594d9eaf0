# SPDX-License-Identifier: Apache-2.0
"""`evaluate()`: the same numbers whenever it is called, whatever the batches, and without a trace in training."""

import math

import numpy as np
import pytest
import torch

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import DPO, SIPO, collate_first, lora, make_trainer, preference_pairs, trained_weights
from trl_sipo.trainer.encoding import draw_noise, pair_generators

TIMING = ("runtime", "per_second", "epoch", "preparation_time")


def _numbers(metrics):
    return {key: value for key, value in metrics.items() if not any(word in key for word in TIMING)}


@pytest.fixture
def held_out():
    return preference_pairs(7, seed=9)


def test_two_evaluations_are_identical(held_out, tmp_path):
    trainer = make_trainer(SIPO, tmp_path, trainer_options={"eval_dataset": held_out}, learning_rate=1e-2)
    trainer.train()
    torch.manual_seed(1)
    first = _numbers(trainer.evaluate())
    torch.manual_seed(2)
    assert _numbers(trainer.evaluate()) == first
    assert first["eval_loss"] > 0 and first["eval_rewards/margins"] != 0


def test_evaluation_does_not_depend_on_the_batch_size(held_out, tmp_path):
    results = []
    for batch_size in (1, 3, 8):
        trainer = make_trainer(
            SIPO,
            tmp_path,
            trainer_options={"eval_dataset": held_out},
            per_device_eval_batch_size=batch_size,
            learning_rate=1e-2,
        )
        trainer.train()
        results.append(_numbers(trainer.evaluate()))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4, abs=2e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
def test_evaluation_leaves_no_trace_in_training(dropout, held_out, tmp_path):
    """With dropout, training draws from the global random state, which evaluation must restore."""
    weights = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            DPO,
            tmp_path,
            eval_strategy=strategy,
            eval_steps=1,
            max_steps=4,
            disable_dropout=False,
            trainer_options={"eval_dataset": held_out, "peft_config": lora(lora_dropout=dropout)},
        )
        trainer.train()
        weights.append(trained_weights(trainer))
        assert any("eval_loss" in row for row in trainer.state.log_history) is (strategy == "steps")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_metrics_by_hand(held_out, tmp_path):
    """Loss, rewards and accuracy of each noise level of the grid, from `pair_loss` on the same draws."""
    trainer = make_trainer(DPO, tmp_path, trainer_options={"eval_dataset": held_out}, learning_rate=1e-2, beta=200.0)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.model.eval()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(7)])
    pairs = trainer._encoder(batch, torch.device("cpu"), [], training=False)
    losses, rewards = [], []
    for position, (time, timestep) in enumerate(((1 / 6, 166), (0.5, 500), (5 / 6, 833))):
        level = trainer.noise_schedule.level(torch.full((7,), timestep))
        noise = draw_noise(pairs.chosen_latents, pair_generators(torch.arange(7), 1, 0, position))
        with torch.no_grad():
            errors = trainer.pair_errors(trainer.model, pairs, level, (noise, noise))
        logit = 200 * (errors.chosen_logratio - errors.rejected_logratio)
        losses.append(-torch.nn.functional.logsigmoid(logit))
        rewards.append(200 * errors.chosen_logratio)
        assert metrics[f"eval_rewards/margins/time_{time:.2f}"] == pytest.approx(float(logit.mean()), abs=1e-4)
        assert metrics[f"eval_rewards/accuracies/time_{time:.2f}"] == pytest.approx(float((logit > 0).float().mean()))
    assert metrics["eval_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert metrics["eval_rewards/chosen"] == pytest.approx(float(torch.cat(rewards).mean()), abs=1e-4)


def test_each_evaluation_dataset_has_its_own_metrics(held_out, tmp_path):
    splits = {"near": held_out, "train": preference_pairs(4, seed=2)}
    trainer = make_trainer(
        DPO,
        tmp_path,
        trainer_options={"eval_dataset": splits},
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train()
    metrics = _numbers(trainer.evaluate())
    alone = {name: _numbers(trainer.evaluate(split)) for name, split in splits.items()}
    for name, numbers in alone.items():
        for key, value in numbers.items():
            assert metrics[key.replace("eval_", f"eval_{name}_", 1)] == value
    assert metrics["eval_near_rewards/chosen"] != metrics["eval_train_rewards/chosen"]
    assert _numbers(trainer.evaluate(splits)) == metrics
    rows = [row for row in trainer.state.log_history if "eval_near_rewards/chosen" in row]
    assert rows and not any("eval_rewards/chosen" in row for row in rows)


def test_held_out_images_are_never_cropped_at_random(held_out, tmp_path):
    """Not even when the user calls a held-out dataset "train"."""
    wide = preference_pairs(3, width=64)
    trainer = make_trainer(
        DPO,
        tmp_path,
        pairs=wide,
        trainer_options={"eval_dataset": {"train": wide}},
        random_flip=True,
        center_crop=False,
        max_steps=1,
    )
    assert trainer.train_dataset.transform.is_random and not trainer.eval_dataset["train"].transform.is_random
    assert _numbers(trainer.evaluate({"train": wide})) == _numbers(trainer.evaluate())


def test_compute_metrics_gets_rewards_and_labels(held_out, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        chosen, rejected = prediction.predictions.T
        return {"wins": float(np.mean(chosen > rejected))}

    options = {"eval_dataset": held_out, "compute_metrics": compute_metrics}
    trainer = make_trainer(DPO, tmp_path, trainer_options=options, learning_rate=1e-2)
    trainer.train()
    metrics = trainer.evaluate()
    (prediction,) = seen
    assert prediction.predictions.shape == (7, 2) and prediction.label_ids.tolist() == [0] * 7
    assert metrics["eval_wins"] == np.mean(prediction.predictions[:, 0] > prediction.predictions[:, 1])
    assert metrics["eval_rewards/chosen"] == pytest.approx(prediction.predictions[:, 0].mean(), rel=1e-5)


def test_rows_can_be_given_to_evaluate_and_predict(held_out, tmp_path):
    trainer = make_trainer(DPO, tmp_path, trainer_options={"eval_dataset": preference_pairs(4)}, learning_rate=1e-2)
    trainer.train()
    given = _numbers(trainer.evaluate(held_out))
    prediction = trainer.predict(held_out)
    assert prediction.predictions.shape == (7, 2)
    assert _numbers(prediction.metrics) == {key.replace("eval_", "test_", 1): given[key] for key in given}
    # Nothing of the prediction is left over for the next evaluation.
    assert _numbers(trainer.evaluate(held_out)) == given


def test_no_pair_is_dropped_where_training_drops_incomplete_batches(held_out, tmp_path):
    results = []
    for is_dropped in (False, True):
        options = {"eval_dataset": held_out}
        trainer = make_trainer(DPO, tmp_path, trainer_options=options, dataloader_drop_last=is_dropped, max_steps=1)
        trainer.train()
        results.append(_numbers(trainer.evaluate()))
        assert trainer.predict(held_out).predictions.shape == (7, 2)
        assert trainer.args.dataloader_drop_last == is_dropped
    assert results[0] == results[1]


def test_a_stream_can_be_evaluated(held_out, tmp_path):
    stream = held_out.to_iterable_dataset()
    trainer = make_trainer(DPO, tmp_path, trainer_options={"eval_dataset": stream}, max_steps=1)
    trainer.train()
    first = _numbers(trainer.evaluate())
    assert _numbers(trainer.evaluate()) == first and first["eval_logps/chosen"] < 0


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "full", "given"])
def test_evaluation_before_training(kind, bf16, held_out, tmp_path):
    """An untrained policy is its reference, to the bit, whatever the precision; and training may follow."""
    options = {"eval_dataset": held_out}
    if kind == "given":
        options["ref_model"] = tiny_stable_diffusion()
    trainer = make_trainer(DPO, tmp_path, is_lora=kind == "lora", bf16=bf16, trainer_options=options, max_steps=1)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] == 0.5 and metrics["eval_rewards/margins"] == 0.0
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6) and metrics["eval_drift/chosen_error"] == 0.0
    assert not hasattr(trainer.model, "_is_accelerate_prepared") and "forward" not in vars(trainer.model)
    trainer.train()
    assert hasattr(trainer.model, "_is_accelerate_prepared")  # the flag by which accelerate would leave it unwrapped
    assert trainer.state.global_step == 1 and trainer.evaluate()["eval_rewards/margins"] != 0.0


def test_training_and_evaluation_never_share_noise(tmp_path):
    trainer = make_trainer(DPO, tmp_path, max_steps=1)
    batch = collate_first(trainer)
    train = draw_noise(torch.empty(4, 2), pair_generators(batch["pair_index"], 0, 0, 0))
    held_out = draw_noise(torch.empty(4, 2), pair_generators(batch["pair_index"], 1, 0, 0))
    assert not torch.equal(train, held_out)
