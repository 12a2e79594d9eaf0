# SPDX-License-Identifier: Apache-2.0
"""D3PO: recorded trajectories are those of the sampler, and their probabilities what is trained."""

import datasets
import pytest
import torch
from diffusers import DDIMScheduler

from tests.tiny.wan import tiny_wan
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    Method,
    collate_first,
    largest_difference,
    logged,
    make_config,
    make_trainer,
    preference_pairs,
    trained_weights,
)
from trl_sipo import DiffusionD3POConfig, DiffusionD3POTrainer
from trl_sipo.adapters import adapter_for
from trl_sipo.core.parameterization import predicted_clean
from trl_sipo.core.transition import posterior_mean_and_variance
from trl_sipo.errors import BackboneError, ConfigurationError, DatasetError
from trl_sipo.generation.trajectories import record_trajectory, trajectory_pair

STEPS = 4
D3PO = Method(
    "d3po", DiffusionD3POTrainer, DiffusionD3POConfig, options={"trajectory_steps": STEPS, "eval_noise_levels": 8}
)


def _record(adapter, seed, prompt="a red cat", **options):
    generator = torch.Generator().manual_seed(seed)
    return record_trajectory(adapter, prompt, num_steps=STEPS, size=(32, 32), generator=generator, **options)


def trajectories(count=4, **options):
    """Pairs of trajectories of the tiny Stable Diffusion."""
    adapter = adapter_for(tiny_stable_diffusion())
    prompts = ("a red cat", "two dogs")
    pairs = [[_record(adapter, 2 * i + arm, prompts[i % 2], **options) for arm in (0, 1)] for i in range(count)]
    return datasets.Dataset.from_list([trajectory_pair(*pair) for pair in pairs])


@pytest.fixture(scope="module")
def pairs():
    return trajectories()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_trajectory_is_what_ddim_with_eta_1_does(guidance_scale):
    """diffusers' own step, given the same noise, goes through the same states."""
    pipeline = tiny_stable_diffusion()
    adapter = adapter_for(pipeline)
    trajectory = _record(adapter, seed=3, guidance_scale=guidance_scale)
    assert trajectory.latents.shape == (STEPS + 1, 4, 8, 8) and trajectory.timesteps.tolist() == [999, 749, 499, 249]

    scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == trajectory.timesteps.tolist()
    generator = torch.Generator().manual_seed(3)
    state = torch.randn(1, 4, 8, 8, generator=generator)
    embeddings = [pipeline.encode_prompt([prompt], "cpu", 1, False)[0] for prompt in ("", "a red cat")]
    pipeline.unet.eval()
    for number, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(state[0], trajectory.latents[number], rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            null, conditional = (pipeline.unet(state, timestep, encoder_hidden_states=e).sample for e in embeddings)
        prediction = null + guidance_scale * (conditional - null)
        noise = torch.randn(1, 4, 8, 8, generator=generator) if number < STEPS - 1 else torch.zeros_like(state)
        state = scheduler.step(prediction, timestep, state, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(state[0], trajectory.latents[-1], rtol=1e-3, atol=1e-4)


def test_the_loss_is_that_of_the_transition_probabilities(pairs, tmp_path):
    """The log of the ratio of two Gaussian densities, per dimension, and DPO of the difference of both arms."""
    trainer = make_trainer(D3PO, tmp_path, pairs=pairs, beta=50.0, learning_rate=1e-2, guidance_scale=3.0)
    pair_errors, seen = trainer.pair_errors, []
    trainer.pair_errors = lambda *args, **kwargs: seen.append(args) or pair_errors(*args, **kwargs)
    trainer.train()
    # Of the last batch, with the trained weights, and with the adapter off.
    model, batch, level, noise = seen[-1]
    errors = pair_errors(model, batch, level, noise)
    steps = [trainer.args.timesteps.index(int(timestep)) for timestep in level.timestep]
    assert batch.chosen_latents.shape == (4, STEPS + 1, 4, 8, 8) and max(steps) < STEPS - 1
    rows = torch.arange(len(steps))
    noisy, following = batch.chosen_latents[rows, steps], batch.chosen_latents[rows, [step + 1 for step in steps]]

    def log_probability():
        with torch.no_grad():
            prediction = trainer.predictor.forward(trainer.model, noisy, level, batch.conditioning)
        clean = predicted_clean(prediction, noisy, level, "epsilon")
        next_level = trainer.noise_schedule.previous_level(level, STEPS)
        mean, variance = posterior_mean_and_variance(noisy, clean, level, next_level)
        density = torch.distributions.Normal(mean, variance.sqrt().view(-1, 1, 1, 1)).log_prob(following)
        return density.mean(dim=(1, 2, 3))

    policy = log_probability()
    with trainer.model.disable_adapter():
        reference = log_probability()
    torch.testing.assert_close(errors.chosen_logratio, policy - reference, rtol=1e-3, atol=1e-4)
    assert errors.chosen_logratio.abs().max() > 1e-3
    loss, statistics = trainer.pair_loss(errors, level)
    margin = 50 * (errors.chosen_logratio - errors.rejected_logratio)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(margin))
    torch.testing.assert_close(statistics["rewards/margins"], margin)


def test_a_run_starts_at_ln_2_learns_and_evaluates(pairs, tmp_path):
    trainer = make_trainer(D3PO, tmp_path, pairs=pairs, max_steps=10, learning_rate=2e-2, beta=20.0)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    # Under the model that drew them, steps lie one variance from their mean.
    assert logged(trainer, "logps/chosen")[0] == pytest.approx(-0.5, abs=0.1)
    metrics = trainer.evaluate(pairs)
    assert metrics["eval_rewards/accuracies"] > 0.7 and metrics["eval_rewards/margins"] > 0.1
    levels = [name for name in metrics if name.startswith("eval_rewards/margins/time_")]
    assert levels == [f"eval_rewards/margins/time_{time}" for time in ("0.50", "0.75", "1.00")]
    assert not any(name.startswith("sipo/") for name in trainer.state.log_history[0])


def test_a_resumed_run_is_one_that_was_not_interrupted(pairs, tmp_path):
    options = {"pairs": pairs, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "caption_dropout": 0.3}
    whole, resumed = (make_trainer(D3PO, tmp_path, **options) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(trained_weights(whole), trained_weights(resumed)) == 0.0
    assert logged(whole, "loss") == logged(resumed, "loss")


def test_what_is_no_trajectory_is_refused(pairs, tmp_path):
    with pytest.raises(DatasetError, match="holds no trajectories, but .*'chosen'.* record|Record"):
        make_trainer(D3PO, tmp_path, pairs=preference_pairs(4))
    with pytest.raises(DatasetError, match="`trajectory_steps=5` are"):
        make_trainer(D3PO, tmp_path, pairs=pairs, trajectory_steps=5)
    with pytest.raises(DatasetError, match="holds no trajectories"):
        make_trainer(D3PO, tmp_path, pairs=pairs.to_iterable_dataset())
    short = pairs.map(lambda row: {name: row[name][1:] for name in ("chosen_latents", "rejected_latents")})
    with pytest.raises((ConfigurationError, DatasetError), match=r"shape \(4, 4, 8, 8\)"):
        make_trainer(D3PO, tmp_path, pairs=short)
    assert len(collate_first(make_trainer(D3PO, tmp_path, pairs=pairs))["prompt"]) == 4


def test_two_trajectories_of_other_prompts_are_no_pair():
    adapter = adapter_for(tiny_stable_diffusion())
    with pytest.raises(ConfigurationError, match="'a red cat' and 'two dogs'"):
        trajectory_pair(_record(adapter, 0), _record(adapter, 1, "two dogs"))


def test_flow_models_have_no_transition_probabilities(tmp_path):
    with pytest.raises(BackboneError, match="is a flow model"):
        _record(adapter_for(tiny_wan()), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": [999]}, "set `trajectory_steps`"),
        ({"timestep_sampling": "stratified"}, "`timestep_sampling="),
        ({"share_noise": False}, "`share_noise="),
        ({"precompute_ref_log_probs": True}, "`precompute_ref_log_probs="),
        ({"sft_weight": 0.1}, "`sft_weight="),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"trajectory_steps": 1}, "1 steps"),
    ],
    ids=str,
)
def test_settings_of_what_it_has_not_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        make_config(D3PO, tmp_path, **options)
