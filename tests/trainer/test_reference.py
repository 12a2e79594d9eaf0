# SPDX-License-Identifier: Apache-2.0
"""Every kind of reference: what it says at the start, that it stays, and that the policy moves away from it."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from peft import PeftModel, get_peft_model

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    DPO,
    changed,
    collate_first,
    lora,
    make_trainer,
    predict,
    snapshot,
    trained_weights,
)
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.encoding import pair_generators

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def _moved(pipeline, seed=7):
    """The pipeline with all weights of its denoiser shifted."""
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(0.02 * noise)
    return pipeline


def _with_peft_model(pipeline):
    """A pipeline whose denoiser is a PeftModel with a trained LoRA."""
    torch.manual_seed(5)
    pipeline.unet = get_peft_model(pipeline.unet, lora(target_modules=TARGETS, init_lora_weights=False))
    return pipeline


def _with_loaded_lora(pipeline, directory):
    """A pipeline with a LoRA loaded by diffusers, whose alpha is not its rank."""
    trained = make_trainer(DPO, directory / "first", max_steps=2, learning_rate=1e-2)
    trained.train()
    trained.save_model(str(directory / "lora"))
    pipeline.load_lora_weights(str(directory / "lora"))
    return pipeline


def _reference_prediction(trainer, seed=3):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    rows = trainer.adapter.collate(trainer.adapter.encode_prompts(["a red cat", "two dogs"]))
    with torch.no_grad(), trainer.reference.active(trainer.model, trainer.unwrapped_model) as denoiser:
        return denoiser(latents, torch.tensor([100, 700]), encoder_hidden_states=rows["prompt_embeds"]).sample


def _build(kind, tmp_path):
    """A trainer of this kind of reference, and what its reference must say."""
    pipeline, options = tiny_stable_diffusion(), {"is_lora": False}
    if kind == "new_lora":
        expected, options = predict(pipeline), {"is_lora": True}
    elif kind == "peft_model":
        pipeline = _with_peft_model(pipeline)
        expected = predict(pipeline)
    elif kind == "loaded_lora":
        pipeline = _with_loaded_lora(pipeline, tmp_path)
        expected = predict(pipeline)
    elif kind == "full":
        expected = predict(pipeline)
    else:
        other = _moved(tiny_stable_diffusion())
        expected = predict(other)
        if kind == "given_path":
            other.save_pretrained(tmp_path / "reference")
        given = {"given_module": other.unet, "given_pipeline": other, "given_path": tmp_path / "reference"}[kind]
        options["trainer_options"] = {"ref_model": given}
    return make_trainer(DPO, tmp_path / "run", model=pipeline, **options), expected


KINDS = ("new_lora", "peft_model", "loaded_lora", "full", "given_module", "given_pipeline", "given_path")


@pytest.mark.parametrize("kind", KINDS)
def test_reference_says_what_it_should_and_stays(kind, tmp_path):
    trainer, expected = _build(kind, tmp_path)
    start = _reference_prediction(trainer)
    torch.testing.assert_close(start, expected, rtol=1e-5, atol=1e-6)
    if not kind.startswith("given"):  # the policy starts at its reference, to the bit
        trainer.unwrapped_model.eval()
        assert torch.equal(predict(trainer.adapter.pipeline), start)
    policy = trained_weights(trainer)

    trainer.train()

    assert changed(policy, trained_weights(trainer))
    assert torch.equal(_reference_prediction(trainer), start)
    assert not torch.equal(predict(trainer.adapter.pipeline), start)


@pytest.mark.parametrize("kind", ["peft_model", "loaded_lora"])
def test_a_trained_lora_goes_on_as_the_policy(kind, tmp_path):
    """Only "default" is trained; "ref" is its frozen copy and the base below is not touched."""
    trainer, _ = _build(kind, tmp_path)
    assert isinstance(trainer.model, PeftModel) and set(trainer.model.peft_config) == {"default", "ref"}
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(before, snapshot(trainer.model))
    assert moved and all(".default." in name for name in moved)
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if ".default." not in name)


def test_a_trained_lora_is_compared_with_its_base_when_asked(tmp_path):
    """The reference is the adapter switched off: no second LoRA, and a policy that starts elsewhere."""
    expected = predict(tiny_stable_diffusion())
    pipeline = _with_loaded_lora(tiny_stable_diffusion(), tmp_path)
    trainer = make_trainer(DPO, tmp_path / "run", model=pipeline, is_lora=False, lora_reference="base", max_steps=2)
    assert set(trainer.model.peft_config) == {"default"}
    assert torch.equal(_reference_prediction(trainer), expected)
    assert not torch.allclose(predict(trainer.adapter.pipeline), expected, atol=1e-4)
    policy = trained_weights(trainer)
    trainer.train()
    assert changed(policy, trained_weights(trainer))
    assert torch.equal(_reference_prediction(trainer), expected)


def test_a_trained_lora_with_a_given_reference(tmp_path):
    pipeline, other = _with_peft_model(tiny_stable_diffusion()), _moved(tiny_stable_diffusion())
    expected = predict(other)
    trainer = make_trainer(
        DPO, tmp_path, model=pipeline, is_lora=False, trainer_options={"ref_model": other}, max_steps=1
    )
    assert set(trainer.model.peft_config) == {"default"}
    assert torch.equal(_reference_prediction(trainer), expected)
    trainer.train()
    assert torch.equal(_reference_prediction(trainer), expected)


def test_the_reference_is_not_trained_and_takes_no_memory_with_a_lora(tmp_path):
    assert make_trainer(DPO, tmp_path).ref_model is None
    full = make_trainer(DPO, tmp_path, is_lora=False)
    assert not any(p.requires_grad for p in full.ref_model.parameters()) and not full.ref_model.training


def test_the_reference_has_no_dropout(tmp_path):
    """Whatever dropout the policy has, its reference says the same each time."""
    pipeline = _with_peft_model(tiny_stable_diffusion())
    pipeline.unet.peft_config["default"].lora_dropout = 0.0
    for module in pipeline.unet.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    pipeline.unet.peft_config["default"].lora_dropout = 0.5
    trainer = make_trainer(DPO, tmp_path, model=pipeline, is_lora=False, disable_dropout=False)
    trainer.model.train()
    assert torch.equal(_reference_prediction(trainer), _reference_prediction(trainer))
    assert trainer.model.training  # as before


@pytest.mark.parametrize("steps", [1, 2])
def test_sync_ref_model_follows_trls_formula(steps, tmp_path):
    """ref <- mixup * policy + (1 - mixup) * ref, every `ref_model_sync_steps` steps."""
    trainer = make_trainer(
        DPO,
        tmp_path,
        is_lora=False,
        sync_ref_model=True,
        ref_model_mixup_alpha=0.3,
        ref_model_sync_steps=2,
        max_steps=steps,
    )
    start = snapshot(trainer.ref_model)
    trainer.train()
    policy, reference = snapshot(trainer.model), snapshot(trainer.ref_model)
    for name, value in reference.items():
        expected = start[name] if steps < 2 else 0.3 * policy[name] + 0.7 * start[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert (changed(start, reference) != set()) is (steps == 2)


def test_the_reference_of_the_loss_is_the_base_model(tmp_path):
    """The reference error of a training step, from the base model by hand."""
    pipeline = tiny_stable_diffusion()
    base = copy.deepcopy(pipeline.unet)
    trainer = make_trainer(DPO, tmp_path, model=pipeline, learning_rate=1e-2)
    trainer.train()
    batch = collate_first(trainer)
    pairs = trainer._encoder(batch, torch.device("cpu"), [], training=False)
    level = trainer.noise_schedule.level(torch.tensor([50, 300, 600, 900]))
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = trainer.pair_errors(trainer.model, pairs, level, noise.chunk(2))

    alpha_t = pipeline.scheduler.alphas_cumprod[[50, 300, 600, 900]].sqrt().repeat(2)[:, None, None, None]
    noisy = alpha_t * pairs.latents + (1 - alpha_t**2).sqrt() * noise
    embeddings = pairs.pair_conditioning["prompt_embeds"]
    with torch.no_grad():
        prediction = base(noisy, level.timestep.repeat(2), encoder_hidden_states=embeddings).sample
    expected = (prediction - noise).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(torch.cat([errors.ref_chosen, errors.ref_rejected]), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(errors.chosen, errors.ref_chosen, rtol=1e-4)


def test_generators_are_of_the_pair_alone():
    draws = [
        [float(torch.rand((), generator=generator)) for generator in pair_generators(torch.tensor(indices), 0, 42, 1)]
        for indices in ([3, 5, 3], [5])
    ]
    assert draws[0][0] == draws[0][2] and draws[0][1] == draws[1][0] != draws[0][0]


OTHER_PROCESSES = {
    "prediction_type": ({"prediction_type": "v_prediction"}, "v_prediction.*epsilon"),
    "schedule": ({"beta_end": 0.02}, "noise schedule"),
    "zero_terminal_snr": ({"rescale_betas_zero_snr": True}, "noise schedule"),
    "length": ({"num_train_timesteps": 500}, "noise schedule"),
}


@pytest.mark.parametrize("by_path", [False, True], ids=["pipeline", "path"])
@pytest.mark.parametrize("case", OTHER_PROCESSES)
def test_a_reference_of_another_diffusion_process_is_an_error(case, by_path, tmp_path):
    options, message = OTHER_PROCESSES[case]
    other = tiny_stable_diffusion()
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config, **options)
    other.save_pretrained(tmp_path / "other")
    given = tmp_path / "other" if by_path else other
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(DPO, tmp_path / "run", is_lora=False, trainer_options={"ref_model": given})


def test_a_reference_with_another_sampler_of_the_same_process_is_fine(tmp_path):
    other = tiny_stable_diffusion()
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config)
    trainer = make_trainer(DPO, tmp_path, is_lora=False, trainer_options={"ref_model": other})
    assert trainer.ref_model is other.unet
