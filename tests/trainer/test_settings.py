# SPDX-License-Identifier: Apache-2.0
"""Every setting does what its description says."""

import dataclasses
import itertools
import math

import datasets
import pytest
import torch

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    DPO,
    POLY_DPO,
    PROMPTS,
    SIPO,
    changed,
    largest_difference,
    logged,
    lora,
    make_config,
    make_trainer,
    preference_pairs,
    snapshot,
    trained_weights,
)
from trl_sipo.core.objectives import diffusion_dpo_loss
from trl_sipo.trainer.statistics import PairErrors


def _generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def _spy_on_steps(trainer):
    """The arguments of every `pair_errors` call: (pairs, level, noise)."""
    steps = []
    pair_errors = trainer.pair_errors

    def spy(model, pairs, level, noise):
        steps.append((pairs, level, noise))
        return pair_errors(model, pairs, level, noise)

    trainer.pair_errors = spy
    return steps


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_caption_dropout_replaces_prompts_by_the_empty_one(rate, tmp_path):
    trainer = make_trainer(DPO, tmp_path, caption_dropout=rate, max_steps=16)
    steps = _spy_on_steps(trainer)
    trainer.train()
    seen = torch.cat([pairs.conditioning["prompt_embeds"] for pairs, _, _ in steps])
    null = trainer.adapter.null_conditioning()["prompt_embeds"]
    prompts = [row["prompt_embeds"] for row in trainer.adapter.encode_prompts(PROMPTS)]
    dropped = [torch.allclose(row, null) for row in seen]
    kept = [any(torch.allclose(row, prompt) for prompt in prompts) for row in seen]
    assert all(a != b for a, b in zip(dropped, kept, strict=True))
    assert abs(sum(dropped) / len(dropped) - rate) < 0.2 and len(dropped) == 64

    trainer.evaluate(preference_pairs(8))  # never in evaluation
    assert not any(torch.allclose(row, null) for row in steps[-1][0].conditioning["prompt_embeds"])


@pytest.mark.parametrize("share", [True, False])
def test_share_noise(share, tmp_path):
    trainer = make_trainer(DPO, tmp_path, share_noise=share, max_steps=2)
    steps = _spy_on_steps(trainer)
    trainer.train()
    for _, _, noise in steps:
        chosen, rejected = noise
        noise = torch.cat(noise)
        assert torch.equal(chosen, rejected) is share
        assert len({float(row.sum()) for row in noise}) == (4 if share else 8)  # each pair has its own
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "stratified"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.06, 1.0), (0.5, 0.75)])
def test_timestep_range_and_sampling(sampling, low, high, tmp_path):
    trainer = make_trainer(DPO, tmp_path, timestep_sampling=sampling, timestep_range=[low, high])
    timesteps = trainer.sample_noise_levels(_generators(512)).timestep.double()
    assert 1000 * low <= timesteps.min() and timesteps.max() < 1000 * high
    time = (timesteps / 1000 - low) / (high - low)
    assert abs(time.mean() - 0.5) < 0.03
    spread = {"uniform": 12**-0.5, "stratified": 12**-0.5, "logit_normal": 0.2083}[sampling]
    assert abs(time.std() - spread) < 0.02
    counts = torch.histc(time.float(), bins=16, min=0, max=1)
    if sampling == "stratified":  # one in each of 512 strata, to the rounding of timesteps
        assert (counts - 32).abs().max() <= 2


@pytest.mark.parametrize(("mean", "std"), [(1.0, 1.0), (0.0, 0.3)])
def test_logit_normal_parameters(mean, std, tmp_path):
    options = {"timestep_sampling": "logit_normal", "logit_mean": mean, "logit_std": std}
    trainer = make_trainer(DPO, tmp_path, **options)
    time = (trainer.sample_noise_levels(_generators(1024)).timestep.double() + 0.5) / 1000
    logit = torch.logit(time)
    assert abs(logit.mean() - mean) < 0.1 and abs(logit.std() - std) < 0.1


def test_a_draw_does_not_depend_on_the_other_pairs(tmp_path):
    trainer = make_trainer(DPO, tmp_path)
    together = trainer.sample_noise_levels(_generators(5)).timestep
    alone = [trainer.sample_noise_levels([generator]).timestep for generator in _generators(5)]
    assert torch.equal(together, torch.cat(alone))


def _errors(count=32):
    values = torch.rand(4, count, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.2
    return PairErrors(*values.unbind())


def _pair_loss(trainer, errors):
    return trainer.pair_loss(errors, trainer.sample_noise_levels(_generators(len(errors.chosen))))[0]


def test_sft_weight_adds_the_chosen_error(tmp_path):
    errors = _errors()
    plain, added = (_pair_loss(make_trainer(SIPO, tmp_path, sft_weight=weight), errors) for weight in (0.0, 2.5))
    torch.testing.assert_close(added - plain, 2.5 * errors.chosen)


@pytest.mark.parametrize("method", [DPO, SIPO, POLY_DPO], ids=lambda method: method.name)
def test_label_smoothing(method, tmp_path):
    """(1 - e) L(z) + e L(-z); for SIPO with mask and weight off."""
    options = {"mask": False, "reweight": False} if method is SIPO else {}
    errors, flipped = _errors(), None
    plain = make_trainer(method, tmp_path, **options)
    flipped = PairErrors(errors.rejected, errors.chosen, errors.ref_rejected, errors.ref_chosen)
    expected = 0.9 * _pair_loss(plain, errors) + 0.1 * _pair_loss(plain, flipped)
    smoothed = make_trainer(method, tmp_path, label_smoothing=0.1, **options)
    torch.testing.assert_close(_pair_loss(smoothed, errors), expected)


@pytest.mark.parametrize(
    ("beta", "convention", "expected"),
    [
        (5000, "diffusion_dpo", 5000),
        (2, "sipo_paper", 2000),
        (2500, "diffusers_sd15", 5000),
        (500, "flow", 500),
        (20, "summed", 20 * 4 * 8 * 8),
    ],
)
def test_beta_conventions(beta, convention, expected, tmp_path, capsys):
    trainer = make_trainer(DPO, tmp_path, beta=beta, beta_convention=convention)
    assert trainer.beta == expected
    errors = _errors()
    loss = diffusion_dpo_loss(errors.chosen_logratio, errors.rejected_logratio, beta=expected)
    assert torch.equal(_pair_loss(trainer, errors), loss)
    printed = capsys.readouterr().out
    # The strength, the half and the reduction, before the first step.
    assert f"beta = {expected:g} " in printed and "/ 2" in printed and "averaged" in printed


def test_the_summed_convention_knows_the_resolution(tmp_path):
    assert make_trainer(DPO, tmp_path, beta=1, beta_convention="summed", resolution=64).beta == 4 * 16 * 16


def test_the_run_is_described_at_the_start(tmp_path, capsys):
    make_trainer(SIPO, tmp_path, objective="dpo_cm", timestep_range=[0.06, 1.0], share_noise=False)
    printed = capsys.readouterr().out
    for part in ("DPO-C&M", "StableDiffusionPipeline", "32 px", "epsilon", "adapter switched off", "0.06", "separate"):
        assert part in printed


@pytest.mark.parametrize(("resolution", "side"), [(None, 8), (64, 16)])
def test_resolution(resolution, side, tmp_path):
    """The model's own when none is given."""
    trainer = make_trainer(DPO, tmp_path, resolution=resolution, max_steps=1)
    steps = _spy_on_steps(trainer)
    trainer.train()
    assert steps[0][0].latents.shape == (8, 4, side, side)


def test_sample_posterior(tmp_path):
    """The mean by default; a sample, other in each epoch, when asked; the mean in evaluation."""
    latents = {}
    for sample in (False, True):
        batches = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
        trainer = make_trainer(DPO, tmp_path, sample_posterior=sample, max_steps=4, **batches)
        steps = _spy_on_steps(trainer)
        trainer.train()
        trainer.evaluate(preference_pairs(8))
        latents[sample] = [pairs.latents for pairs, _, _ in steps]
    mean = latents[False][-1]
    assert torch.equal(latents[True][-1], mean)
    means, samples = ([_in_order(part) for part in latents[sample][:4]] for sample in (False, True))
    for part in means:
        torch.testing.assert_close(part, _in_order(mean))
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(samples, 2))


def _in_order(latents):
    """The rows of a batch, whatever their order was."""
    return latents[latents.flatten(1).norm(dim=1).argsort()]


def test_precomputed_latents_are_those_of_the_fly(tmp_path):
    live, ahead = (
        make_trainer(SIPO, tmp_path, precompute_latents=switch, learning_rate=1e-2) for switch in (False, True)
    )
    calls = []
    encode = ahead.adapter.encode_media
    ahead.adapter.encode_media = lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs)
    for trainer in (live, ahead):
        trainer.train()
    assert not calls  # encoded before training
    # Encoded in other batches, and so to rounding.
    assert largest_difference(trained_weights(live), trained_weights(ahead)) < 1e-4
    held_out = preference_pairs(3, seed=4)
    assert live.evaluate(held_out)["eval_loss"] == pytest.approx(ahead.evaluate(held_out)["eval_loss"], rel=1e-3)


def test_stored_latents_train_as_the_images_do(tmp_path):
    live = make_trainer(DPO, tmp_path)
    rows = []
    for i in range(8):
        item = live.train_dataset[i]
        latents = live.adapter.encode_media(torch.stack([item["chosen_pixels"], item["rejected_pixels"]]))
        rows.append(
            {"prompt": item["prompt"], "chosen_latents": latents[0].tolist(), "rejected_latents": latents[1].tolist()}
        )
    stored = make_trainer(DPO, tmp_path, pairs=datasets.Dataset.from_list(rows))
    for trainer in (live, stored):
        trainer.train()
    assert largest_difference(trained_weights(live), trained_weights(stored)) < 1e-4


@pytest.mark.parametrize(("steps", "stride"), [(50, 20), (100, 10), (1000, 1)])
def test_importance_steps(steps, stride, tmp_path):
    """The weight on the sampler's grid: -(SNR_s / SNR_t - 1) / 2 times the error, for epsilon."""
    trainer = make_trainer(SIPO, tmp_path, importance_steps=steps)
    level = trainer.noise_schedule.level(torch.tensor([300]))
    chosen, rejected = trainer.compute_importance_weights(torch.tensor([0.2]), torch.tensor([0.3]), level)
    table = tiny_stable_diffusion().scheduler.alphas_cumprod.double()
    snr = table / (1 - table)
    rho_squared = snr[300 - stride] / snr[300] - 1
    assert chosen.item() == pytest.approx(float(-rho_squared / 2 * 0.2), rel=1e-4)
    assert rejected.item() == pytest.approx(float(-rho_squared / 2 * 0.3), rel=1e-4)


@pytest.mark.parametrize(("threshold", "kept"), [(None, 1), (0.5, 2), (0.97, 0)])
def test_mask_threshold(threshold, kept, tmp_path):
    """Pairs by their smaller weight; 1 - clip_range unless given."""
    trainer = make_trainer(SIPO, tmp_path, mask_threshold=threshold, clip_range=0.1)
    mask = trainer.mask_timesteps(torch.tensor([0.4, 0.7, 0.95]).log())
    assert mask.sum() == kept


@pytest.mark.parametrize("objective", ["sipo", "dpo_cm"])
def test_the_weight_is_inverse_for_sipo(objective, tmp_path):
    trainer = make_trainer(SIPO, tmp_path, objective=objective, clip_range=0.2)
    weight = trainer.clip_importance_weights(torch.tensor([0.1, 0.9, 5.0]).log())
    expected = [1.2, 1 / 0.9, 0.8] if objective == "sipo" else [0.8, 0.9, 1.2]
    assert weight.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("settings", [{"mask": False}, {"reweight": False}, {"beta": 10.0}, {"weight_grad": False}])
def test_each_switch_acts_alone(settings, tmp_path):
    rows = []
    for options in ({}, settings):
        trainer = make_trainer(SIPO, tmp_path, max_steps=3, learning_rate=1e-2, **options)
        trainer.train()
        rows.append((trained_weights(trainer), trainer))
    (weights, _), (others, trainer) = rows
    assert changed(weights, others)
    assert (set(logged(trainer, "sipo/masked_fraction")) == {0.0}) is (settings == {"mask": False})
    assert (set(logged(trainer, "sipo/weight")) == {1.0}) is (settings == {"reweight": False})


def test_a_lora_takes_the_conventional_targets(tmp_path):
    trainer = make_trainer(DPO, tmp_path)
    found = {name.split(".lora_A")[0].split("attn")[-1][2:] for name in trained_weights(trainer) if "lora_A" in name}
    assert found == {"to_q", "to_k", "to_v", "to_out.0"}
    other = make_trainer(DPO, tmp_path, trainer_options={"peft_config": lora(target_modules=["to_q"])})
    assert all(".to_q." in name for name in trained_weights(other))


def test_the_lora_of_a_script_for_language_models(tmp_path):
    """With a task type, under which peft would look for a language model's methods."""
    trainer = make_trainer(DPO, tmp_path, trainer_options={"peft_config": lora(task_type="CAUSAL_LM")}, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_the_users_lora_config_is_left_alone(tmp_path):
    config = lora()
    make_trainer(DPO, tmp_path, trainer_options={"peft_config": config})
    assert config.target_modules is None


def test_a_tokenizer_of_ones_own(tmp_path):
    tokenizer = tiny_stable_diffusion().tokenizer
    trainer = make_trainer(DPO, tmp_path, trainer_options={"processing_class": tokenizer})
    assert trainer.adapter.pipeline.tokenizer is tokenizer


def test_a_custom_optimiser(tmp_path):
    pipeline = tiny_stable_diffusion()
    before = snapshot(pipeline.unet)
    optimizer = torch.optim.SGD([pipeline.unet.conv_out.bias], lr=0.1)
    trainer = make_trainer(
        DPO, tmp_path, model=pipeline, is_lora=False, trainer_options={"optimizers": (optimizer, None)}
    )
    trainer.train()
    assert changed(before, snapshot(pipeline.unet)) == {"conv_out.bias"}


def test_a_custom_collator(tmp_path):
    """What it returns is what is trained on."""
    standard = make_trainer(DPO, tmp_path).data_collator

    def swap(items):
        batch = standard(items)
        batch["chosen_pixels"], batch["rejected_pixels"] = batch["rejected_pixels"], batch["chosen_pixels"]
        return batch

    plain, swapped = (
        make_trainer(DPO, tmp_path, trainer_options={"data_collator": collator}, max_steps=1, beta=100.0)
        for collator in (None, swap)
    )
    steps = [_spy_on_steps(trainer) for trainer in (plain, swapped)]
    for trainer in (plain, swapped):
        trainer.train()
    assert torch.equal(steps[0][0][0].chosen_latents, steps[1][0][0].rejected_latents)


def test_frozen_prompts_are_encoded_once(tmp_path):
    trainer = make_trainer(DPO, tmp_path, max_steps=6)
    encoded = []
    encode = trainer.adapter.encode_prompts
    trainer.adapter.encode_prompts = lambda prompts: encoded.extend(prompts) or encode(prompts)
    trainer.train()
    assert len(encoded) == len(set(encoded)) == 4


def test_the_prompt_cache_is_bounded(tmp_path, monkeypatch):
    one_prompt = 16 * 16 * 4  # tokens, dimensions, float32
    monkeypatch.setattr("trl_sipo.trainer.encoding.PROMPT_CACHE_BYTES", 2 * one_prompt)
    trainer = make_trainer(DPO, tmp_path, per_device_train_batch_size=8)
    steps = _spy_on_steps(trainer)
    trainer.train()
    assert len(trainer._encoder._prompt_cache) == 2
    assert len(steps[0][0].conditioning["prompt_embeds"].unique(dim=0)) == 4


@pytest.mark.parametrize("method", [DPO, SIPO, POLY_DPO], ids=lambda method: method.name)
def test_a_configuration_can_be_changed_and_copied(method, tmp_path):
    """`dataclasses.replace` runs all checks again, on values that TRL has rewritten."""
    config = make_config(method, tmp_path, eval_strategy="steps", eval_steps=5)
    other = dataclasses.replace(config, beta=123.0)
    assert other.beta == 123.0 and other.loss_type == config.loss_type and config.beta != 123.0
    assert method.config_class(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init})


def test_one_prompt_may_be_given_as_a_string(tmp_path):
    assert make_config(DPO, tmp_path, sample_prompts="a red cat", sample_every_steps=1).sample_prompts == ["a red cat"]


def test_beta_survives_a_copy(tmp_path):
    """With its convention, and where it was not given."""
    config = make_config(SIPO, tmp_path, beta=2.0, beta_convention="sipo_paper")
    copy = dataclasses.replace(config, seed=3)
    assert (copy.beta, copy.beta_convention) == (2.0, "sipo_paper")
    assert dataclasses.replace(make_config(SIPO, tmp_path), seed=3).beta == 1000.0


def test_published_defaults(tmp_path):
    assert DPO.config_class(str(tmp_path), use_cpu=True).beta == 5000.0
    config = SIPO.config_class(str(tmp_path), use_cpu=True)
    assert (config.beta, config.clip_range, config.mask_threshold, config.importance_steps) == (1000.0, 0.1, None, 50)
    assert config.mask and config.reweight and config.weight_grad and config.objective == "sipo"
    assert math.isclose(POLY_DPO.config_class(str(tmp_path), use_cpu=True).poly_alpha, 8.0)
