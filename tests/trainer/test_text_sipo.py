# SPDX-License-Identifier: Apache-2.0
"""SIPO for language models: its loss by hand, its identities with TRL's DPO, and real runs of a tiny model."""

import logging
import math
import os

import pytest
import torch
import trl
import trl.trainer.base_trainer
from transformers.utils import is_torch_bf16_gpu_available

from tests.tiny.language_model import tiny_language_model
from tests.trainer.processes import run_ranks
from tests.trainer.resuming import differences, untimed
from tests.trainer.runs import logged
from tests.trainer.text_runs import (
    CHOSEN,
    REJECTED,
    batch_of,
    disturb,
    loss_and_gradient,
    make_text_config,
    make_text_trainer,
    recorded_pairs,
    text_pairs,
    train_text,
)
from trl_sipo import SIPOConfig, SIPOTrainer
from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.trainer.text_sipo_config import REFUSED_SETTINGS

LN2 = math.log(2)
kinds = pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])


def completion_logps(model, batch):
    """Sum and number of the token log-probabilities of each completion, in float64, token by token."""
    sums, lengths = [], []
    for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True):
        logits = model(input_ids=ids[None]).logits[0].double()
        places = [place for place in range(1, len(ids)) if mask[place]]
        sums.append(sum(torch.log_softmax(logits[place - 1], -1)[ids[place]].item() for place in places))
        lengths.append(len(places))
    return sums, lengths


def sipo_by_hand(logps, reference, sampled, lengths, *, beta, low, high, threshold):
    """Loss, weights and kept ones of pairs, from sums of log-probabilities: chosen ones first."""
    count, losses, weights = len(logps) // 2, [], []
    for chosen in range(count):
        rejected = chosen + count
        ratios = [math.exp((logps[i] - sampled[i]) / lengths[i]) for i in (chosen, rejected)]
        inverse = max(1 / ratio for ratio in ratios)  # SIPO, Eq. 19
        logit = beta * (logps[chosen] - reference[chosen] - logps[rejected] + reference[rejected])
        scaled = min(max(inverse, low), high) * logit
        losses.append(math.log1p(math.exp(-scaled)) if 1 / inverse >= threshold else 0.0)
        weights.append(1 / inverse)
    return sum(losses) / count, weights


@pytest.mark.parametrize("sampling_policy", ["reference", "recorded"])
@pytest.mark.parametrize("mask_threshold", [None, 0.5])
@kinds
def test_the_loss_is_that_computed_by_hand(is_lora, mask_threshold, sampling_policy, tmp_path):
    trainer = make_text_trainer(
        tmp_path,
        is_lora=is_lora,
        pairs=recorded_pairs(),
        sampling_policy=sampling_policy,
        mask_threshold=mask_threshold,
        clip_range=0.3,
        beta=0.7,
    )
    disturb(trainer.model)
    batch = batch_of(trainer, range(4))
    logps, lengths = completion_logps(trainer.model, batch)
    reference, _ = completion_logps(tiny_language_model(), batch)
    sampled = CHOSEN + REJECTED if sampling_policy == "recorded" else reference
    threshold = 0.7 if mask_threshold is None else mask_threshold
    expected, weights = sipo_by_hand(
        logps, reference, sampled, lengths, beta=0.7, low=0.7, high=1.3, threshold=threshold
    )
    assert lengths == [5, 7, 5, 2, 5, 2, 8, 9]  # with the token that ends a completion
    loss, _ = loss_and_gradient(trainer, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert metrics["sipo/importance_weight"] == pytest.approx(sum(weights) / 4, rel=1e-5)
    assert metrics["sipo/masked_fraction"] == sum(weight < threshold for weight in weights) / 4
    if sampling_policy == "recorded":  # the case has what it is about: masked pairs, and weights far above 1
        assert metrics["sipo/masked_fraction"] == (0.5 if mask_threshold is None else 0.25) and max(weights) > 1.3


SAME_AS_DPO = {
    "neither mask nor weight": {"mask": False, "reweight": False},
    "fresh, so that weights are 1": {},
    "fresh, and no gradient through them": {"weight_grad": False, "mask_threshold": 0.999},
}


@pytest.mark.parametrize("case", SAME_AS_DPO)
@kinds
def test_to_the_bit_what_trls_dpo_is(is_lora, case, tmp_path):
    ours = make_text_trainer(tmp_path, is_lora=is_lora, beta=0.5, **SAME_AS_DPO[case])
    dpo = make_text_trainer(
        tmp_path, is_lora=is_lora, trainer_class=trl.DPOTrainer, config_class=trl.DPOConfig, beta=0.5
    )
    if not case.startswith("fresh"):
        disturb(ours.model)
        disturb(dpo.model)
    batch = batch_of(ours, range(4))
    loss, gradient = loss_and_gradient(ours, batch)
    expected_loss, expected_gradient = loss_and_gradient(dpo, batch_of(dpo, range(4)))
    assert torch.equal(loss, expected_loss)
    assert (loss.item() == pytest.approx(LN2)) == case.startswith("fresh")
    assert gradient.keys() == expected_gradient.keys() and any(value.any() for value in gradient.values())
    assert all(torch.equal(gradient[name], value) for name, value in expected_gradient.items())
    for name, values in dpo._metrics["train"].items():  # TRL's own metrics are TRL's
        assert ours._metrics["train"][name] == values, name


def test_a_policy_that_wrote_the_data_is_trained_by_dpo(tmp_path):
    """Weights of 1 at logits that are not 0."""
    ours = make_text_trainer(tmp_path, pairs=recorded_pairs(), weight_grad=False)
    dpo = make_text_trainer(tmp_path, trainer_class=trl.DPOTrainer, config_class=trl.DPOConfig)
    disturb(ours.model)
    disturb(dpo.model)
    batch = batch_of(ours, range(4))
    with torch.no_grad():
        outputs = ours.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
            fused_lm_head=True,
        )
    batch["chosen_logps"], batch["rejected_logps"] = outputs.log_probs.sum(1).chunk(2)
    loss, gradient = loss_and_gradient(ours, batch)
    expected_loss, expected_gradient = loss_and_gradient(dpo, batch_of(dpo, range(4)))
    assert torch.equal(loss, expected_loss) and abs(loss.item() - LN2) > 1e-3
    assert all(torch.equal(gradient[name], value) for name, value in expected_gradient.items())


def test_outputs_are_returned_where_they_are_asked_for(tmp_path):
    """For `compute_metrics`: the logits, beside the same loss."""
    trainer = make_text_trainer(tmp_path, pairs=recorded_pairs())
    batch = batch_of(trainer, range(2))
    with pytest.warns(FutureWarning, match="extra forward pass"):
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert torch.equal(loss, trainer.compute_loss(trainer.model, dict(batch)))
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


def test_masked_pairs_give_no_gradient_and_count_in_the_mean(tmp_path):
    trainer = make_text_trainer(tmp_path, pairs=recorded_pairs(chosen=[-1e3] * 4, rejected=[-1e3] * 4))
    disturb(trainer.model)
    batch = batch_of(trainer, range(2))
    kept_loss, _ = loss_and_gradient(trainer, batch)
    _, of_first = loss_and_gradient(trainer, batch_of(trainer, range(1)))
    batch["rejected_logps"][1] = 0.0  # the policy could never have written it
    loss, gradient = loss_and_gradient(trainer, batch)
    assert 0 < loss < kept_loss
    for name, value in of_first.items():
        torch.testing.assert_close(gradient[name], value / 2, rtol=1e-4, atol=1e-6)
    batch["chosen_logps"][0] = 0.0
    loss, gradient = loss_and_gradient(trainer, batch)
    assert loss == 0 and not any(value.any() for value in gradient.values())


def test_the_gradient_through_the_weight_is_a_switch(tmp_path):
    """d(v z) = v dz + z dv: with a logit of 0 nothing, else another direction."""
    gradients = []
    for weight_grad in (True, False):
        trainer = make_text_trainer(tmp_path, clip_range=0.9, weight_grad=weight_grad)
        disturb(trainer.model)
        gradients.append(loss_and_gradient(trainer, batch_of(trainer, range(4))))
    (loss, flowing), (same_loss, detached) = gradients
    assert torch.equal(loss, same_loss)
    assert any(not torch.allclose(flowing[name], detached[name], rtol=1e-3) for name in flowing)


@kinds
def test_training_raises_the_margin(is_lora, tmp_path):
    trainer = make_text_trainer(
        tmp_path, is_lora=is_lora, max_steps=8, trainer_options={"eval_dataset": text_pairs(4)}, mask_threshold=0.3
    )
    trainer.train()
    margins, losses = logged(trainer, "rewards/margins"), logged(trainer, "loss")
    assert losses[0] == pytest.approx(LN2, abs=1e-6) and margins[0] == 0
    assert losses[-1] < 0.9 * LN2 and margins[-1] > 0.2
    assert logged(trainer, "sipo/importance_weight")[0] == 1 > logged(trainer, "sipo/importance_weight")[-1]
    assert logged(trainer, "sipo/chosen_importance_weight")[-1] > 1  # which the weight of diffusion models never is
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/margins"] > 0.2 and 0 < metrics["eval_sipo/importance_weight"] < 1
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "SIPO" in card and "2505.21893" in card


def test_accumulating_gives_the_gradient_of_the_whole_batch(tmp_path):
    """With masked pairs: the mean is over all pairs, wherever they are."""
    pairs, weights = recorded_pairs(), []
    for size, accumulated in ((4, 1), (1, 4)):
        trainer = make_text_trainer(
            tmp_path,
            pairs=pairs,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            optim="sgd",
            mask_threshold=0.5,
        )
        disturb(trainer.model)
        trainer.train()
        assert 0 < logged(trainer, "sipo/masked_fraction")[0] < 1
        weights.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


@kinds
def test_a_precomputed_reference_is_the_reference(is_lora, tmp_path):
    losses = []
    for options in ({}, {"precompute_ref_log_probs": True}):
        trainer = make_text_trainer(
            tmp_path, is_lora=is_lora, trainer_options={"eval_dataset": text_pairs(4)}, **options
        )
        trainer.train()
        losses.append([*logged(trainer, "loss"), trainer.evaluate(text_pairs(3))["eval_loss"]])
    assert ("ref_chosen_logps" in trainer.train_dataset.column_names) and losses[1] == pytest.approx(losses[0], 1e-5)


def test_recorded_log_probabilities_and_a_precomputed_reference(tmp_path):
    options = {"pairs": recorded_pairs(), "mask_threshold": 0.5}
    live = make_text_trainer(tmp_path, **options)
    stored = make_text_trainer(tmp_path, precompute_ref_log_probs=True, **options)
    for trainer in (live, stored):
        trainer.train()
    assert logged(stored, "loss") == pytest.approx(logged(live, "loss"), rel=1e-5)
    assert stored.evaluate(recorded_pairs())["eval_loss"] == pytest.approx(
        live.evaluate(recorded_pairs())["eval_loss"], rel=1e-4
    )


@kinds
def test_a_resumed_run_is_the_run_that_was_not_interrupted(is_lora, tmp_path):
    def trained(name, checkpoint=None):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = make_text_trainer(tmp_path / name, is_lora=is_lora, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        # TRL counts tokens from 0 again, and transformers averages the loss over the steps since.
        rows = [{**row, "num_tokens": None} for row in untimed(trainer.state.log_history[:-1])]
        return {
            "weights": dict(trainer.model.named_parameters()),
            "optimizer": trainer.optimizer.state_dict(),
            "log": rows,
        }

    whole = trained("whole")
    resumed = trained("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert len(whole["log"]) == 4
    found = differences(whole, resumed)
    assert not found, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full", "recorded"])
def test_two_processes_are_one(kind, tmp_path):
    (tmp_path / "one").mkdir()
    train_text(tmp_path / "one", kind, 4)
    run_ranks(train_text, tmp_path / "two", kind, 2, directory=tmp_path / "two")
    one, two = (torch.load(tmp_path / name / "result.pt", weights_only=False) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-4, atol=1e-6)
    assert len(one["log"]) == 3
    for rows in zip(one["log"], two["log"], strict=True):
        for name in ("loss", "rewards/margins", "sipo/importance_weight", "sipo/masked_fraction"):
            assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-4, abs=1e-6), name
    for name in ("eval_loss", "eval_sipo/importance_weight"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5)
    assert (0 < one["log"][0]["sipo/masked_fraction"] < 1) == (kind == "recorded")


def test_it_says_what_it_does_and_warns_when_all_is_masked(tmp_path, capsys, caplog):
    pairs = recorded_pairs(chosen=[-0.1] * 4, rejected=[-0.1] * 4)
    trainer = make_text_trainer(tmp_path, pairs=pairs, max_steps=5)
    assert (
        "weights per token, against those recorded in the data, masked below 0.9; 1 / w within [0.9, 1.1]"
        in capsys.readouterr().out
    )
    with caplog.at_level(logging.WARNING, "trl_sipo"):
        trainer.train()
    assert logged(trainer, "loss") == [0.0] * 5 and logged(trainer, "sipo/masked_fraction") == [1.0] * 5
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["Step 3"]


REFUSED = {
    "loss_type": ["ipo"],
    "loss_weights": [2.0],
    "label_smoothing": 0.1,
    "discopop_tau": 0.1,
    "ld_alpha": 0.5,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.4,
    "use_weighting": True,
    "padding_free": True,
    "use_liger_kernel": True,
}
MISTAKES = {
    "beta": ({"beta": 0.0}, "TRL's default is 0.1"),
    "beta of another type": ({"clip_range": "wide"}, "must be a number"),
    "clip range": ({"clip_range": 1.0}, "clip_range=1.0"),
    "threshold": ({"mask_threshold": 1.5}, "mask_threshold=1.5"),
    "no mask": ({"mask": False, "mask_threshold": 0.5}, "contradicts"),
    "no weight": ({"reweight": False, "weight_grad": False}, "no effect"),
    "policy": ({"sampling_policy": "someone"}, "'auto', 'recorded', 'reference'"),
    "moving reference": ({"sync_ref_model": True}, "sampling_policy='recorded'"),
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_of_dpo_that_are_refused(name, tmp_path):
    with pytest.raises(ConfigurationError, match=f"`{name}="):
        make_text_config(tmp_path, **{name: REFUSED[name]})


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_settings(case, tmp_path):
    options, message = MISTAKES[case]
    with pytest.raises(ConfigurationError, match=message):
        make_text_config(tmp_path, **options)


def test_half_precision_is_the_default_where_a_gpu_has_it(tmp_path):
    assert SIPOConfig(str(tmp_path)).bf16 == is_torch_bf16_gpu_available()
    assert not SIPOConfig(str(tmp_path), use_cpu=True).bf16
    assert SIPOConfig(str(tmp_path), use_cpu=True, bf16=True).bf16


def test_a_configuration_of_another_trainer(tmp_path):
    with pytest.raises(ConfigurationError, match="takes a SIPOConfig, got DPOConfig"):
        make_text_trainer(tmp_path, config_class=trl.DPOConfig)
    assert isinstance(make_text_config(tmp_path, sync_ref_model=True, sampling_policy="recorded"), SIPOConfig)


BROKEN_DATA = {
    "one column": (text_pairs(4, chosen_logps=CHOSEN), {}, "without its counterpart"),
    "no columns": (text_pairs(4), {"sampling_policy": "recorded"}, "needs the columns"),
    "positive": (recorded_pairs(chosen=[-1.0, -1.0, 0.5, -1.0]), {}, r"Row 2 of the train data has chosen_logps=0.5"),
    "not finite": (recorded_pairs(rejected=[-1.0, -math.inf, -1.0, -1.0]), {}, "Row 1 .* rejected_logps=-inf"),
    "missing": (recorded_pairs(rejected=[-1.0, -1.0, -1.0, None]), {}, "Row 3 .* rejected_logps=None"),
    "per token": (recorded_pairs(chosen=[[-1.0, -1.0]] * 4), {}, "must be a finite number"),
    "truncated": (recorded_pairs(), {"max_length": 8}, r"Row 1 .*`max_length=8` truncates"),
}


@pytest.mark.parametrize("case", BROKEN_DATA)
@pytest.mark.parametrize("is_stream", [False, True], ids=["rows", "stream"])
def test_recorded_log_probabilities_that_cannot_be_used(is_stream, case, tmp_path):
    """Before training; of a stream when it is read."""
    pairs, options, message = BROKEN_DATA[case]
    with pytest.raises(DatasetError, match=message):
        trainer = make_text_trainer(tmp_path, pairs=pairs.to_iterable_dataset() if is_stream else pairs, **options)
        assert is_stream
        trainer.train()


def test_held_out_data_has_the_columns_of_the_training_data(tmp_path):
    with pytest.raises(DatasetError, match="The eval data lacks"):
        make_text_trainer(tmp_path, pairs=recorded_pairs(), trainer_options={"eval_dataset": text_pairs(4)})


def test_columns_may_be_left_unused(tmp_path):
    for pairs in (recorded_pairs(), text_pairs(4, chosen_logps=CHOSEN)):
        trainer = make_text_trainer(tmp_path, pairs=pairs, sampling_policy="reference")
        trainer.train()
        assert logged(trainer, "loss")[0] == pytest.approx(LN2, abs=1e-6)


def test_nothing_is_sent(tmp_path, monkeypatch):
    """TRL sends when the variable CI is not set, and the network is not switched off."""
    sent = []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda *args, **kwargs: sent.append(kwargs))
    assert "CI" not in os.environ
    make_text_trainer(tmp_path).train()
    assert not sent and "send_telemetry" not in SIPOTrainer._send_telemetry.__code__.co_names
