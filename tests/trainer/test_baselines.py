# SPDX-License-Identifier: Apache-2.0
"""SFT, Diffusion-KTO and MaPO as real training runs: their losses, their data, and what they have not."""

import dataclasses
import math
from unittest.mock import patch

import datasets
import pytest
import torch
from PIL import Image

from tests.adapters.backbone_cases import BACKBONES
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.cached import saved
from tests.trainer.runs import (
    DPO,
    Method,
    collate_first,
    largest_difference,
    logged,
    make_config,
    make_trainer,
    picture,
    preference_pairs,
    trained_weights,
)
from trl_sipo import (
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    DiffusionMaPOConfig,
    DiffusionMaPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
)
from trl_sipo.core.objectives.kto import kto_logit, kto_loss, reference_point
from trl_sipo.core.objectives.mapo import mapo_loss
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError
from trl_sipo.trainer.reproduction import load_reproduction, replay
from trl_sipo.trainer.statistics import PairErrors

SFT = Method("sft", DiffusionSFTTrainer, DiffusionSFTConfig)
KTO = Method("kto", DiffusionKTOTrainer, DiffusionKTOConfig)
MAPO = Method("mapo", DiffusionMaPOTrainer, DiffusionMaPOConfig)
BASELINES = (SFT, KTO, MAPO)
each_method = pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)


LABELS = (True, False, True, True, False, False, True, False)


def images(pictures=None):
    """Rows of prompt, image and label."""
    pictures = pictures or [picture(number) for number in range(len(LABELS))]
    columns = {"prompt": ["a red cat"] * len(LABELS), "image": pictures}
    features = {"prompt": datasets.Value("string"), "image": datasets.Image(), "label": datasets.Value("bool")}
    return datasets.Dataset.from_dict({**columns, "label": list(LABELS)}, features=datasets.Features(features))


def _errors(count=32, names=("chosen", "rejected", "ref_chosen", "ref_rejected")):
    values = torch.rand(len(names), count, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.2
    return PairErrors(**dict(zip(names, values.unbind(), strict=True)))


def _level(trainer, count=32):
    return trainer.noise_schedule.level(torch.full((count,), 500))


# ------------------------------------------------------------------------------------------------------- the losses


def test_the_loss_of_sft_is_the_error_of_the_prediction(tmp_path):
    """From the batch, by hand: noise, prediction, mean squared error."""
    trainer = make_trainer(SFT, tmp_path)
    seen = []
    pair_errors = trainer.pair_errors

    def spy(model, pairs, level, noise):
        with torch.no_grad():
            noisy = level.add_noise(pairs.chosen_latents, noise[0])
            prediction = trainer.adapter.forward(model, noisy, level, pairs.conditioning, {})
        seen.append((prediction - noise[0]).square().mean(dim=(1, 2, 3)))
        assert pairs.rejected_latents is None and len(noise) == 1
        return pair_errors(model, pairs, level, noise)

    trainer.pair_errors = spy
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([error.mean().item() for error in seen], rel=1e-4)
    assert logged(trainer, "logps/chosen") == pytest.approx([-error.mean().item() / 2 for error in seen], rel=1e-5)


def test_the_loss_of_kto_is_the_public_function(tmp_path):
    trainer = make_trainer(KTO, tmp_path, beta=300.0, desirable_weight=2.0, undesirable_weight=0.5)
    errors = _errors(names=("chosen", "ref_chosen"))
    label = (torch.arange(32) % 3 == 0).float()
    loss, statistics = trainer.pair_loss(errors, _level(trainer), label)
    ratio = (errors.ref_chosen - errors.chosen) / 2
    point = ratio.mean().clamp(min=0)
    logit = kto_logit(ratio, label > 0, reference_point(ratio), beta=300.0)
    torch.testing.assert_close(loss, kto_loss(logit, label > 0, desirable_weight=2.0, undesirable_weight=0.5))
    torch.testing.assert_close(statistics["kl"], point.expand(32))
    liked = statistics["rewards/chosen"][label > 0]
    torch.testing.assert_close(liked, 300 * ratio[label > 0])
    assert statistics["rewards/chosen"][label == 0].isnan().all() and not statistics["rewards/rejected"].isnan().all()


def test_the_loss_of_mapo_is_the_public_function(tmp_path):
    trainer = make_trainer(MAPO, tmp_path, beta=0.3, snr_value=0.7)
    errors = _errors(names=("chosen", "rejected"))
    loss, statistics = trainer.pair_loss(errors, _level(trainer))
    torch.testing.assert_close(loss, mapo_loss(errors.chosen, errors.rejected, beta=0.3, snr_value=0.7))
    margins = statistics["rewards/chosen"] - statistics["rewards/rejected"]
    torch.testing.assert_close(statistics["rewards/margins"], margins, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("method", "fresh"), [(KTO, 0.5), (MAPO, None), (SFT, None)], ids=["kto", "mapo", "sft"])
def test_runs_learn_evaluate_and_log(method, fresh, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 6, "learning_rate": 1e-2}
    trainer = make_trainer(method, tmp_path, trainer_options={"eval_dataset": preference_pairs(3, seed=7)}, **options)
    before = trained_weights(trainer)
    trainer.train()
    assert largest_difference(before, trained_weights(trainer)) > 1e-3
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 6 and all(math.isfinite(value) for row in rows for value in row.values())
    assert fresh is None or rows[0]["loss"] == pytest.approx(fresh, abs=1e-4)
    assert not any(name.startswith("sipo/") for row in rows for name in row)
    evaluation = trainer.evaluate()
    assert evaluation["eval_loss"] == pytest.approx(logged(trainer, "eval_loss")[-2])
    assert sum("time_" in name for name in evaluation) == 3 * len(method.trainer_class.metrics_by_level)
    predicted = trainer.predict(preference_pairs(3, seed=7)).predictions
    arms = 2 if method is KTO else 1
    assert predicted.shape == (3 * arms, len(method.trainer_class.predictions))


def test_kto_teaches_which_images_are_liked(tmp_path):
    """White images are liked and black ones are not: on the same noise, the reward of the white ones rises above."""
    colours = [Image.new("RGB", (32, 32), "white" if liked else "black") for liked in LABELS]
    data = images(colours)
    options = {"max_steps": 20, "learning_rate": 5e-3, "beta": 300.0, "timesteps": [700], "logging_steps": 20}
    trainer = make_trainer(KTO, tmp_path, pairs=data, **options)
    trainer.train()
    metrics = trainer.evaluate(data)
    assert metrics["eval_rewards/chosen"] > metrics["eval_rewards/rejected"] + 0.3
    assert metrics["eval_rewards/accuracies"] > 0.6 and metrics["eval_loss"] < 0.46


# --------------------------------------------------------------------------------------------------------- the data


def test_pairs_and_images_give_the_same_run(tmp_path):
    """The chosen arms of pairs, and these images by themselves, are the same data to SFT."""
    pairs = preference_pairs(8)
    alone = pairs.remove_columns("rejected").rename_column("chosen", "image")
    runs = [make_trainer(SFT, tmp_path / name, pairs=data) for name, data in (("pairs", pairs), ("images", alone))]
    for trainer in runs:
        trainer.train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    assert largest_difference(*(trained_weights(trainer) for trainer in runs)) == 0.0


@pytest.mark.parametrize("method", [SFT, KTO], ids=lambda method: method.name)
def test_latents_in_memory_streams_and_prepared_data(method, tmp_path):
    data = {"images": images(), "stream": images().to_iterable_dataset()}
    batches = {name: make_trainer(method, tmp_path / name, pairs=pairs) for name, pairs in data.items()}
    batches["latents"] = make_trainer(method, tmp_path / "latents", pairs=images(), precompute_latents=True)
    losses = {}
    for name, trainer in batches.items():
        assert len(collate_first(trainer)["prompt"]) == 4 if name != "stream" else True
        trainer.train()
        losses[name] = logged(trainer, "loss")
    assert losses["latents"] == pytest.approx(losses["images"], abs=1e-5) and len(losses["stream"]) == 3
    again = make_trainer(method, tmp_path / "again", pairs=batches["latents"].train_dataset)
    again.train()
    assert logged(again, "loss") == losses["latents"]


def test_latents_of_pairs_are_taken_apart(tmp_path):
    pairs = make_trainer(DPO, tmp_path / "dpo", precompute_latents=True).train_dataset
    each = make_trainer(KTO, tmp_path / "kto", pairs=pairs).train_dataset
    assert len(each) == 16 and [each[i]["label"] for i in range(4)] == [1.0, 0.0, 1.0, 0.0]
    assert torch.equal(each[3]["chosen_latents"], pairs[1]["rejected_latents"])
    chosen = make_trainer(SFT, tmp_path / "sft", pairs=pairs).train_dataset
    assert len(chosen) == 8 and chosen[3].keys() == {"prompt", "chosen_latents", "pair_index"}
    with pytest.raises(DatasetError, match="made for samples of 'chosen'"):
        make_trainer(KTO, tmp_path / "no", pairs=chosen)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    files = saved(BACKBONES[0], tmp_path_factory.mktemp("encoded"))
    files.encode()
    return files


@pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.name)
def test_a_cache_of_pairs_trains_as_the_pairs_do(method, encoded, tmp_path):
    losses = []
    for name, data in (("pairs", encoded.pairs), ("cache", encoded.cache)):
        trainer = encoded.trainer(tmp_path / name, data, method=method)
        trainer.train()
        losses.append(logged(trainer, "loss"))
        assert len(trainer.train_dataset) == (8 if method is KTO else 4)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)  # the cache is in bfloat16
    if method is KTO:
        pairs = load_preference_dataset(encoded.cache)
        assert torch.equal(trainer.train_dataset[5]["chosen_latents"], pairs[2]["rejected_latents"])
        assert trainer.train_dataset[5]["label"] == 0.0 and trainer.train_dataset[5]["pair_index"] == 5


def test_methods_on_pairs_refuse_images_and_say_who_takes_them(tmp_path):
    for method in (DPO, MAPO):
        with pytest.raises(DatasetError, match="DiffusionKTOTrainer"):
            make_trainer(method, tmp_path, pairs=images())
    with pytest.raises(DatasetError, match="give the column `label`"):
        make_trainer(KTO, tmp_path, pairs=images().remove_columns("label"))


# ------------------------------------------------------------------------------------------------- what they have not


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("method", [SFT, MAPO], ids=lambda method: method.name)
def test_there_is_no_pass_of_a_reference_and_no_second_model(method, is_lora, tmp_path):
    """The denoiser is called once per step, and nothing in the trainer holds another one."""
    pipeline = tiny_stable_diffusion()
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    trainer = make_trainer(method, tmp_path, model=pipeline, is_lora=is_lora)
    with patch.object(type(trainer.reference), "active", side_effect=AssertionError):
        trainer.train()
    assert calls == [True] * 3 and trainer.ref_model is None and "reference: none" in trainer.describe_run()


def test_a_grid_shows_the_base_of_a_lora_and_nothing_else_can(tmp_path):
    samples = {"sample_prompts": ["a red cat"], "sample_every_steps": 2, "sample_num_inference_steps": 1}
    trainer = make_trainer(MAPO, tmp_path, **samples)
    trainer.train()
    assert (tmp_path / "samples/step-000002.png").is_file()
    with pytest.raises(ConfigurationError, match="DiffusionMaPO keeps no reference.*sample_every_steps=0"):
        make_trainer(MAPO, tmp_path, is_lora=False, **samples)
    with pytest.raises(ConfigurationError, match="DiffusionSFT compares with no reference: leave `ref_model` out"):
        make_trainer(SFT, tmp_path, is_lora=False, trainer_options={"ref_model": tiny_stable_diffusion().unet})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((SFT, {name: value}) for name, value in {
            "beta": 5.0, "beta_convention": "flow", "precompute_ref_log_probs": True, "sync_ref_model": True,
            "max_drift": 0.1, "max_margin_fall": 0.1, "check_reference": False,
        }.items()),
        *((method, {name: value}) for method in (SFT, KTO) for name, value in {
            "share_noise": False, "split_pair_backward": True, "soft_labels": True, "label_smoothing": 0.1,
            "sft_weight": 0.1, "importance_steps": 20, "loss_type": ["ipo"],
        }.items()),
        *((KTO, {name: value}) for name, value in {"precompute_ref_log_probs": True, "num_ref_draws": 2}.items()),
        *((MAPO, {name: value}) for name, value in {
            "beta_convention": "flow", "label_smoothing": 0.1, "soft_labels": True, "sft_weight": 0.1,
            "num_ref_draws": 2, "max_drift": 0.1,
        }.items()),
    ],
    ids=lambda value: getattr(value, "name", None) or next(iter(value)),
)  # fmt: skip
def test_settings_of_what_a_method_has_not_are_refused(method, options, tmp_path):
    (name,) = options
    with pytest.raises(ConfigurationError, match=f"`{name}=.*has no meaning in {method.config_class.__name__}"):
        make_config(method, tmp_path, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [(KTO, {"desirable_weight": 0.0}), (KTO, {"undesirable_weight": float("nan")}), (MAPO, {"snr_value": -1.0}),
     (MAPO, {"beta": 0.0}), (KTO, {"desirable_weight": "much"})],
    ids=lambda value: getattr(value, "name", str(value)),
)  # fmt: skip
def test_settings_out_of_range_are_refused(method, options, tmp_path):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        make_config(method, tmp_path, **options)


def test_a_batch_without_labels_is_refused(tmp_path):
    trainer = make_trainer(KTO, tmp_path)
    batch = {name: value for name, value in collate_first(trainer).items() if name != "label"}
    with pytest.raises(ConfigurationError, match="needs .*'label'.*chosen_pixels"):
        trainer.compute_loss(trainer.model, batch)


# ----------------------------------------------------------------------------------------------- resuming and faults


@each_method
def test_a_resumed_run_is_one_that_was_not_interrupted(method, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "caption_dropout": 0.3, "random_flip": True}
    whole = make_trainer(method, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(method, tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert largest_difference(trained_weights(whole), trained_weights(resumed)) == 0.0
    assert logged(whole, "loss") == logged(resumed, "loss")


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@each_method
def test_a_step_that_is_not_finite_is_told_and_kept(method, on_nonfinite, tmp_path):
    trainer = make_trainer(method, tmp_path, on_nonfinite=on_nonfinite, max_steps=3)
    pair_errors, calls = trainer.pair_errors, []

    def overflowing(*args, **kwargs):
        calls.append(pair_errors(*args, **kwargs))
        factor = float("inf") if len(calls) == 2 else 1.0
        return dataclasses.replace(calls[-1], chosen=calls[-1].chosen * factor)

    trainer.pair_errors = overflowing
    if on_nonfinite == "raise":
        with pytest.raises(NumericalError, match="Step 2: the prediction error of the policy is not finite"):
            trainer.train()
    else:
        trainer.train()
        assert logged(trainer, "sipo/skipped_steps")[-1] == 1
    (file,) = (tmp_path / "_nonfinite").glob("*.safetensors")
    batch, description = load_reproduction(file)
    assert (batch.pairs.rejected_latents is None) == (method is not MAPO) and description["link"] == "policy"
    trainer.pair_errors = pair_errors
    assert replay(file, trainer).is_finite
