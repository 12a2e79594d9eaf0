# SPDX-License-Identifier: Apache-2.0
"""A LoRA on a base in 4 bits (QLoRA), with bitsandbytes' own kernels.

diffusers refuses to quantize where there is no GPU; bitsandbytes itself computes on a CPU too, slowly. Its fast kernel
for inference there repacks the weights for good and has no gradient, so it is switched off.
"""

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import DPO, SIPO, changed, logged, lora, make_config, preference_pairs, snapshot
from trl_sipo.adapters import denoiser_names
from trl_sipo.errors import ConfigurationError
from trl_sipo.scripts.train import parse, quantization_config

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture
def on_the_cpu(monkeypatch):
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Stable Diffusion whose layers are as wide as a block of 64 quantized weights."""
    pipeline = tiny_stable_diffusion()
    width = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(width,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=width,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        )
        pipeline.text_encoder.config.hidden_size = width
        pipeline.text_encoder = CLIPTextModel(pipeline.text_encoder.config)
    folder = tmp_path_factory.mktemp("base")
    pipeline.save_pretrained(folder)
    return folder


def _parsed(base, tmp_path, *options):
    argv = [f"--model_name_or_path={base}", "--dataset_name=x/y", f"--output_dir={tmp_path}", "--use_cpu", "true"]
    return parse("sipo", [*argv, *options])


def _quantization(base, tmp_path, *options):
    _, training_args, model_args = _parsed(base, tmp_path, "--use_peft", "true", "--load_in_4bit", "true", *options)
    return quantization_config(training_args, model_args)


def test_a_lora_on_a_base_in_4_bits(base, tmp_path, on_the_cpu):
    trainer = DPO.trainer_class(
        str(base),
        args=make_config(DPO, tmp_path / "run", max_steps=3, gradient_checkpointing=True),
        train_dataset=preference_pairs(),
        peft_config=lora(),
        quantization_config=_quantization(base, tmp_path),
    )
    layers = [m for m in trainer.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) > 10 and all(layer.weight.dtype == torch.uint8 for layer in layers)
    assert all(layer.quant_state.quant_type == "nf4" for layer in layers)
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in trainer.adapter.pipeline.text_encoder.modules())
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(before, snapshot(trainer.model))
    assert moved and all("lora_" in name for name in moved)
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)
    assert abs(logged(trainer, "rewards/margins")[2]) > 1e-4

    trainer.save_model()
    trainer.model.eval()
    prompt = {"num_inference_steps": 2, "output_type": "pt"}
    tuned = trainer.adapter.pipeline("a cat", generator=torch.Generator().manual_seed(0), **prompt).images
    quantization = _quantization(base, tmp_path)
    loaded = DiffusionPipeline.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    untuned = loaded("a cat", generator=torch.Generator().manual_seed(0), **prompt).images
    loaded.load_lora_weights(tmp_path / "run")
    again = loaded("a cat", generator=torch.Generator().manual_seed(0), **prompt).images
    torch.testing.assert_close(again, tuned, rtol=0, atol=1e-5)
    assert (untuned - tuned).abs().max() > 1e-4


def test_the_command_lines_quantization(base, tmp_path):
    config = _quantization(base, tmp_path, "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant", "true")
    assert config.quant_backend == "bitsandbytes_4bit" and config.components_to_quantize == ["unet"]
    assert config.quant_kwargs == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    _, training_args, model_args = _parsed(base, tmp_path)
    assert quantization_config(training_args, model_args) is None
    assert denoiser_names(base) == ["unet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load_in_4bit", "true"], "`load_in_4bit` without `use_peft`"),
        (["--bnb_4bit_quant_type", "fp4"], "`bnb_4bit_quant_type='fp4'` only acts with `load_in_4bit`|without"),
        (["--use_bnb_nested_quant", "true"], "`use_bnb_nested_quant=True`"),
    ],
)
def test_quantization_that_makes_no_sense_is_refused(options, message, base, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        _parsed(base, tmp_path, *options)


def test_all_weights_in_4_bits_are_refused(base, tmp_path):
    with pytest.raises(ConfigurationError, match="Quantized weights cannot be trained"):
        SIPO.trainer_class(
            str(base),
            args=make_config(SIPO, tmp_path),
            train_dataset=preference_pairs(),
            quantization_config=_quantization(base, tmp_path),
        )
