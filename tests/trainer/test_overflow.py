# SPDX-License-Identifier: Apache-2.0
"""Half precision that overflows, and noise levels at the ends of a schedule: finite, or said where it is not."""

import copy
import math

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from tests.tiny.stable_diffusion_3 import tiny_stable_diffusion_3
from tests.tiny.stable_diffusion_xl import tiny_stable_diffusion_xl
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import DPO, METHODS, SIPO, changed, logged, lora, make_config, make_trainer, trained_weights
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.errors import NumericalError
from trl_sipo.trainer.model_preparation import load_policy


@pytest.fixture(autouse=True)
def _accelerate_as_it_was():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _is_finite(trainer):
    """Whether all that a run logged and trained is finite."""
    rows = [value for row in trainer.state.log_history for value in row.values()]
    return all(map(math.isfinite, rows)) and all(value.isfinite().all() for value in trained_weights(trainer).values())


def _in_float16(trainer, init_scale=2.0**16):
    """float16 as on a GPU: accelerate refuses it on a CPU, where PyTorch has both autocast and scaler."""
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return trainer


# ---------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("method", [DPO, SIPO], ids=lambda method: method.name)
def test_float16_trains(method, is_lora, tmp_path):
    """The scaler finds its scale; errors are float32, and start equal."""
    trainer = _in_float16(make_trainer(method, tmp_path, is_lora=is_lora, max_steps=16))
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    assert changed(before, after) and all(value.isfinite().all() for value in after.values())
    assert logged(trainer, "rewards/margins")[0] == 0 and math.isfinite(logged(trainer, "grad_norm")[-1])


def test_activations_that_overflow_in_float16_are_named(tmp_path):
    """Latents far beyond the usual size: infinite as float16, in the reference first."""
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 8, 8)).astype("float32")
    latents[0, 2] *= 1e6
    pairs = datasets.Dataset.from_dict(
        {"prompt": ["a cat"] * 4, "chosen_latents": latents[0].tolist(), "rejected_latents": latents[1].tolist()}
    )
    trainer = _in_float16(make_trainer(DPO, tmp_path, pairs=pairs))
    with pytest.raises(NumericalError, match=r"error of the reference .* for 1 of 4 pairs: pair_index 2 .*bf16"):
        trainer.train()
    trainer = make_trainer(DPO, tmp_path, pairs=pairs, bf16=True, max_steps=1)
    trainer.train()
    assert _is_finite(trainer)  # bfloat16 has the range of float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_reference_in_half_precision(dtype, tmp_path):
    """Given as a module, in a full fine-tuning in float32: its errors are float32, and close to the policy's."""
    other = copy.deepcopy(tiny_stable_diffusion().unet).to(dtype)
    options = {"is_lora": False, "trainer_options": {"ref_model": other}, "max_steps": 2}
    trainer = make_trainer(SIPO, tmp_path, **options)
    trainer.train()
    assert _is_finite(trainer) and other.conv_in.weight.dtype == dtype
    assert 0 < abs(logged(trainer, "drift/chosen_error")[0]) < 1e-2


def test_a_vae_in_float16_that_overflows(tmp_path):
    """Stable Diffusion XL's runs in float32; another one that was loaded so is named."""
    for build, is_finite in ((tiny_stable_diffusion_xl, True), (tiny_stable_diffusion, False)):
        pipeline = build()
        with torch.no_grad():
            pipeline.vae.encoder.conv_in.weight.mul_(1e5)
        pipeline.vae.to(torch.float16)
        trainer = make_trainer(DPO, tmp_path, model=pipeline, max_steps=1, resolution=32)
        if is_finite:
            trainer.train()
            assert _is_finite(trainer)
        else:
            with pytest.raises(NumericalError, match=r"the latents are not finite for 4 of 4 pairs.*VAE in float16"):
                trainer.train()


def test_t5_in_float16_keeps_the_layer_that_overflows_in_float32(tmp_path):
    """Loaded by name for `fp16=True`; a whole encoder in float16 gives NaN, which is named."""
    pipeline = tiny_stable_diffusion_3()
    with torch.no_grad():
        pipeline.text_encoder_3.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1e7)
    expected = pipeline.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)[0][0]
    pipeline.save_pretrained(tmp_path / "base")
    config = make_config(DPO, tmp_path, fp16=True)
    adapter, *_ = load_policy(str(tmp_path / "base"), config, lora(), None, None)
    encoder = adapter.pipeline.text_encoder_3
    assert encoder.dtype == torch.float16 and adapter.pipeline.vae.dtype == torch.float32
    embeds = adapter.encode_prompts(["a cat"])[0]["prompt_embeds"]
    torch.testing.assert_close(embeds.float(), expected, rtol=2e-2, atol=2e-2)

    pipeline.text_encoder_3.half()
    trainer = make_trainer(DPO, tmp_path / "run", model=pipeline, resolution=32)
    with pytest.raises(NumericalError, match=r"Step 1: the embeddings of the prompt are not finite for 4 of 4.*T5"):
        trainer.train()


# ------------------------------------------------------------------------------------- the ends of the schedules


def _epsilon_without_signal():
    return tiny_stable_diffusion("epsilon", rescale_betas_zero_snr=True)


def _velocity_without_signal():
    return tiny_stable_diffusion("v_prediction", rescale_betas_zero_snr=True)


def _flow(sigma):
    return lambda count: NoiseLevel(*(torch.full((count,), value) for value in (1 - sigma, sigma, 1000 * sigma)))


# Name -> (pipeline, its end, as timestep or level): alpha = 0 with zero terminal SNR, sigma = 0 and 1 of a flow.
ENDS = {
    "no_signal_epsilon": (_epsilon_without_signal, 999),
    "no_signal_velocity": (_velocity_without_signal, 999),
    "least_noise": (tiny_stable_diffusion, 0),
    "flow_clean": (tiny_stable_diffusion_3, _flow(0.0)),
    "flow_noise": (tiny_stable_diffusion_3, _flow(1.0)),
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("end", ENDS)
def test_levels_without_noise_or_signal(method, end, tmp_path):
    """rho^2 and the signal-to-noise ratio are infinite there; losses, gradients and statistics are not."""
    build, level = ENDS[end]
    options = {"timesteps": [level]} if isinstance(level, int) else {"resolution": 32}
    trainer = make_trainer(method, tmp_path, model=build(), max_steps=2, **options)
    if callable(level):
        trainer.sample_noise_levels = lambda generators: level(len(generators))
    trainer.train()
    assert _is_finite(trainer)
    if method.is_weighted:  # what has no predecessor, or says nothing about the image, is masked
        masks = end in ("no_signal_epsilon", "least_noise", "flow_clean")
        assert logged(trainer, "sipo/masked_fraction") == [1.0 if masks else pytest.approx(0.0)] * 2


def test_evaluation_levels_of_a_schedule_without_signal(tmp_path):
    trainer = make_trainer(SIPO, tmp_path, model=_velocity_without_signal(), eval_noise_levels=4)
    metrics = trainer.evaluate(trainer.train_dataset)
    assert all(math.isfinite(value) for value in metrics.values())
