# SPDX-License-Identifier: Apache-2.0
"""Every backbone through the same trainers: nothing in them knows which one it is."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

import trl_sipo.trainer
from tests.adapters.backbone_cases import BACKBONES, BackboneCase, spied_forward
from tests.trainer.media import pairs_for
from tests.trainer.runs import DPO, PROMPTS, SIPO, changed, collate_first, logged, make_config, snapshot
from trl_sipo.adapters import ADAPTERS, adapter_for, load_pipeline
from trl_sipo.errors import ConfigurationError

each_backbone = pytest.mark.parametrize("case", BACKBONES, ids=lambda case: case.name)


def _case(name: str) -> BackboneCase:
    return next(case for case in BACKBONES if case.name.split("-")[0] == name)


def trainer_for(case: BackboneCase, folder: Path, method=SIPO, *, is_lora=True, is_video=True, **options) -> Any:
    """A trainer of a few steps at the size of the case; the mask is off, since all of a random model is masked."""
    size = case.size
    settings = {
        "resolution": [size["height"], size["width"]],
        "num_frames": size["num_frames"] if is_video else 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        **({"mask": False} if method is SIPO else {}),
        **options,
    }

    return method.trainer_class(
        case.build(),
        args=make_config(method, folder / "run", **settings),
        train_dataset=pairs_for(case, folder, is_video=is_video),
        **({"peft_config": LoraConfig(r=4, lora_alpha=10)} if is_lora else {}),
    )


@each_backbone
def test_a_lora_trains_and_loads_in_plain_diffusers(case, tmp_path):
    trainer = trainer_for(case, tmp_path, gradient_checkpointing=True)
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(before, snapshot(trainer.model))
    assert moved and all("lora_" in name for name in moved)
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-4), "a fresh LoRA is the reference"
    assert abs(logged(trainer, "rewards/margins")[1]) > 1e-4
    assert all(map(math.isfinite, logged(trainer, "loss")))

    trainer.save_model()
    pipeline = trainer.adapter.pipeline
    trainer.model.eval()
    tuned = case.generate(pipeline, output_type="pt")
    fresh = case.build()
    assert (case.generate(fresh, output_type="pt") - tuned).abs().max() > 1e-4
    case.load_lora(fresh, tmp_path / "run")
    torch.testing.assert_close(case.generate(fresh, output_type="pt"), tuned, rtol=0, atol=1e-5)


@each_backbone
def test_all_weights_train_and_load_in_plain_diffusers(case, tmp_path):
    trainer = trainer_for(case, tmp_path, DPO, is_lora=False, learning_rate=1e-3, max_steps=2)
    before = snapshot(trainer.model)
    trainer.train()
    assert changed(before, snapshot(trainer.model))
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-3)  # beta is 5000
    assert all(map(math.isfinite, logged(trainer, "loss")))
    trainer.save_model()
    trainer.model.eval()
    tuned = case.generate(trainer.adapter.pipeline, output_type="pt")
    loaded = load_pipeline(tmp_path / "run")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(case.generate(loaded, output_type="pt"), tuned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wan21", "ltx", "hunyuanvideo"])
def test_a_video_model_learns_from_pairs_of_images(name, tmp_path):
    trainer = trainer_for(_case(name), tmp_path, is_video=False)
    trainer.train()
    batch = collate_first(trainer, 2)
    assert batch["chosen_pixels"].ndim == 4 and "frame_rate" not in batch
    assert abs(logged(trainer, "rewards/margins")[1]) > 0


@pytest.mark.parametrize(("name", "argument", "factor"), [("flux", "guidance", 1), ("hunyuanvideo", "guidance", 1000)])
def test_a_distilled_model_is_told_the_guidance_scale(name, argument, factor, tmp_path):
    trainer = trainer_for(_case(name), tmp_path, embedded_guidance_scale=2.5, max_steps=1)
    with spied_forward(trainer.adapter.denoiser) as calls:
        trainer.train()
    assert len(calls) == 2  # reference and policy
    for call in calls:
        assert call[argument].unique().tolist() == [2.5 * factor]


def test_the_frame_rate_of_the_clips_reaches_a_model_that_is_told_it(tmp_path):
    trainer = trainer_for(_case("ltx"), tmp_path, max_steps=1)
    with spied_forward(trainer.adapter.denoiser) as calls:
        trainer.train()
    temporal, *_ = calls[0]["rope_interpolation_scale"]
    compression = trainer.adapter.pipeline.vae_temporal_compression_ratio
    assert torch.as_tensor(temporal).unique().tolist() == pytest.approx([compression / 12])


def test_precomputed_clips_give_the_losses_of_live_ones(tmp_path):
    case = _case("ltx")
    live, stored = (
        trainer_for(case, tmp_path, precompute_latents=precompute, random_flip=False) for precompute in (False, True)
    )
    for trainer in (live, stored):
        trainer.train()
    assert collate_first(stored, 2)["frame_rate"].tolist() == [12.0, 12.0]
    assert logged(live, "loss") == pytest.approx(logged(stored, "loss"), rel=1e-5)


def test_levels_are_drawn_with_the_shift_of_the_resolution_or_the_one_given(tmp_path):
    case = _case("flux")
    sampled = trainer_for(case, tmp_path)
    height, width = case.size["height"], case.size["width"]
    schedule = sampled.adapter.noise_schedule_for(height, width)
    assert sampled.noise_schedule.drawn_shift == sampled.noise_schedule.shift == schedule.shift != 1
    even = trainer_for(case, tmp_path, timestep_shift=1.0)
    assert even.noise_schedule.drawn_shift == 1 and even.noise_schedule.shift == schedule.shift
    generators = [torch.Generator().manual_seed(i) for i in range(400)]
    sigmas = even.sample_noise_levels(generators).sigma_t
    assert abs(sigmas.mean() - 0.5) < 0.05
    assert "shift 1," in even.describe_run()


def test_a_shift_for_a_schedule_of_timesteps_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="`timestep_shift=3.0` shifts the levels of flow models"):
        trainer_for(_case("sd"), tmp_path, timestep_shift=3.0)


@pytest.mark.parametrize(("name", "scale"), [("sdxl", None), ("flux", 1000)])
def test_a_few_timesteps_alone_are_trained(name, scale, tmp_path):
    trainer = trainer_for(_case(name), tmp_path, timesteps=[249, 999], importance_steps=4)
    level = trainer.sample_noise_levels([torch.Generator().manual_seed(i) for i in range(64)])
    drawn = level.timestep if scale is None else level.sigma_t * scale
    assert set(drawn.round().int().tolist()) == {249, 999}
    assert 16 < (drawn > 500).sum() < 48
    trainer.train()
    assert "timesteps [249, 999]" in trainer.describe_run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 4}, r"num_frames 4 .*Nearest valid: 1 or 5"),
        ({"resolution": [17, 32]}, r"height 17 .*Nearest valid"),
        ({"num_frames": 1, "frame_rate": 8.0}, "only acts on videos"),
        ({"resolution": [1, 2, 3]}, "`resolution` must be"),
        ({"timesteps": [5], "timestep_sampling": "logit_normal"}, "contradicts `timestep_sampling"),
        ({"timesteps": [1000]}, "within 0 .. 999"),
        ({"timesteps": [249.5]}, r"`timesteps` must be one or several whole numbers, got \[249.5\]"),
        ({"timesteps": "249"}, "`timesteps` must be one or several whole numbers, got '249'"),
        ({"resolution": 32.0}, "`resolution` must be one or several whole numbers, got 32.0"),
        ({"resolution": ["32", "32"]}, "`resolution` must be one or several whole numbers"),
        ({"num_frames": "5"}, "`num_frames` must be a whole number, got '5'"),
        ({"num_frames": True}, "`num_frames` must be a whole number, got True"),
        ({"frame_rate": "8"}, "`frame_rate` must be a number, got '8'"),
        ({"timestep_shift": "3"}, "`timestep_shift` must be a number"),
        ({"embedded_guidance_scale": 3.5}, "tells its denoiser no guidance scale"),
    ],
)
def test_what_the_model_would_crop_or_ignore_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        trainer_for(_case("wan21"), tmp_path, **options)


def test_videos_for_an_image_model_are_refused(tmp_path):
    wan, sd = _case("wan21"), _case("sd")
    arguments = {
        "args": make_config(SIPO, tmp_path / "run", num_frames=wan.size["num_frames"], resolution=32),
        "train_dataset": pairs_for(wan, tmp_path),
    }
    with pytest.raises(ConfigurationError, match="StableDiffusionPipeline draws images: leave num_frames at 1"):
        SIPO.trainer_class(sd.build(), **arguments)


def test_sample_grids_of_video(tmp_path):
    """A contact sheet of frames, the base above the current model, and both side by side in motion."""
    case = _case("wan21")
    options = {"sample_prompts": ["a red cat", "a boat"], "sample_every_steps": 2, "sample_num_inference_steps": 2}
    trainer = trainer_for(case, tmp_path, frame_rate=12.0, **options)
    trainer.train()
    height, width, num_frames = case.size["height"], case.size["width"], case.size["num_frames"]
    sheet = Image.open(tmp_path / "run" / "samples" / "step-000002.png")
    assert sheet.size == (num_frames * (width + 4) - 4, 4 * (height + 4) - 4)
    film = Image.open(tmp_path / "run" / "samples" / "step-000002.webp")
    assert film.n_frames == num_frames and film.size == (2 * width + 4, 2 * (height + 4) - 4)
    film.load()
    assert film.info["duration"] == 83
    for name in ("base", "step-000002"):  # and each clip by itself
        clip = Image.open(tmp_path / "run" / "samples" / name / "01.webp")
        assert clip.n_frames == num_frames and clip.size == (width, height)
    assert json.loads((tmp_path / "run/samples/samples.json").read_text())["frame_rate"] == 12.0
    pixels = np.asarray(sheet)
    base, current = pixels[:height], pixels[height + 4 : 2 * height + 4]
    assert np.abs(base.astype(int) - current).max() > 0


@pytest.mark.parametrize(("missing", "within"), [("transformer", [0.0, 0.5]), ("transformer_2", [0.9, 1.0])])
def test_one_expert_alone_is_trained_on_its_levels(missing, within, tmp_path):
    case = replace(_case("wan22_a14b"), build=lambda: _without(_case("wan22_a14b").build(), missing))
    with pytest.raises(ConfigurationError, match="`timestep_range=.* expert that is not loaded"):
        trainer_for(case, tmp_path)
    trainer = trainer_for(case, tmp_path, timestep_range=within)
    trainer.train()
    metrics = trainer.evaluate(pairs_for(case, tmp_path))
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize(("missing", "within"), [("transformer", [0.0, 0.875]), ("transformer_2", [0.875, 1.0])])
def test_the_levels_of_one_expert_follow_the_shift_that_is_drawn_with(missing, within, tmp_path):
    """Its boundary is a sigma of 0.875, which is time 0.7 of the sampler at shift 3, and 0.875 without a shift."""
    case = replace(_case("wan22_a14b"), build=lambda: _without(_case("wan22_a14b").build(), missing))
    too_wide = [0.7, 1.0] if missing == "transformer_2" else [0.0, 0.95]
    with pytest.raises(ConfigurationError, match=r"the other takes \[0\.(0000, 0\.8750|8750, 1\.0000)\]"):
        trainer_for(case, tmp_path, timestep_range=too_wide, timestep_shift=1.0)
    trainer = trainer_for(case, tmp_path, timestep_range=within, timestep_shift=1.0)
    trainer.train()
    assert math.isfinite(trainer.evaluate(pairs_for(case, tmp_path))["eval_loss"])
    with pytest.raises(ConfigurationError, match="`timesteps`.*expert that is not loaded"):
        trainer_for(case, tmp_path, timesteps=[10, 990])


def test_evaluation_of_a_few_step_model_is_at_its_steps(tmp_path):
    trainer = trainer_for(_case("sdxl"), tmp_path, timesteps=[999, 249], importance_steps=4)
    metrics = trainer.evaluate(pairs_for(_case("sdxl"), tmp_path))
    assert {name.rsplit("_", 1)[1] for name in metrics if "/time_" in name} == {"0.25", "1.00"}


def test_latents_of_another_size_are_refused(tmp_path):
    """The shift, and the strength of a summed beta, depend on the size."""
    case = _case("wan21")
    adapter = adapter_for(case.build())
    rows = {"prompt": list(PROMPTS)}
    for arm in ("chosen_latents", "rejected_latents"):
        rows[arm] = [torch.randn(adapter.latent_shape(**case.size)).tolist() for _ in PROMPTS]
    pairs = datasets.Dataset.from_dict(rows)
    size = {"resolution": [case.size["height"], case.size["width"]], "max_steps": 1}
    with pytest.raises(ConfigurationError, match="set `resolution` and `num_frames` to what was encoded"):
        DPO.trainer_class(case.build(), args=make_config(DPO, tmp_path, **size), train_dataset=pairs)
    size["num_frames"] = case.size["num_frames"]
    trainer = DPO.trainer_class(case.build(), args=make_config(DPO, tmp_path, **size), train_dataset=pairs)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-3)


def test_stored_clips_are_of_the_frame_rate_that_is_set(tmp_path):
    case = _case("ltx")
    adapter = adapter_for(case.build())
    rows = {"prompt": list(PROMPTS)}
    for arm in ("chosen_latents", "rejected_latents"):
        rows[arm] = [torch.randn(adapter.latent_shape(**case.size)).tolist() for _ in PROMPTS]
    size = case.size
    options = {"resolution": [size["height"], size["width"]], "num_frames": size["num_frames"], "frame_rate": 5.0}
    config = make_config(DPO, tmp_path, max_steps=1, **options)
    trainer = DPO.trainer_class(case.build(), args=config, train_dataset=datasets.Dataset.from_dict(rows))
    with spied_forward(trainer.adapter.denoiser) as calls:
        trainer.train()
    temporal, *_ = calls[0]["rope_interpolation_scale"]
    assert float(temporal) == pytest.approx(trainer.adapter.pipeline.vae_temporal_compression_ratio / 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wan21", {"sample_prompts": ["a"] * 1200}, "Draw at most"),
        ("ltx", {"sample_prompts": ["a"], "sample_num_inference_steps": 1}, "at least 2"),
    ],
)
def test_grids_that_cannot_be_drawn_are_refused_before_training(name, options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        trainer_for(_case(name), tmp_path, sample_every_steps=1, **options)


@pytest.mark.parametrize("name", ["sd", "flux2", "cogvideox_2b"])
def test_a_half_precision_base_draws_grids(name, tmp_path):
    """As it is loaded by name: the VAE in float32, the rest in bfloat16."""
    case = _case(name)

    def build():
        pipeline = case.build()
        for part, module in pipeline.components.items():
            if isinstance(module, torch.nn.Module) and part != "vae":
                module.to(torch.bfloat16)
        return pipeline

    options = {"sample_prompts": ["a red cat"], "sample_every_steps": 1, "sample_num_inference_steps": 2}
    trainer = trainer_for(replace(case, build=build), tmp_path, max_steps=1, **options)
    trainer.train()
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-000001.png"))
    assert grid.std() > 1


def _without(pipeline: Any, name: str) -> Any:
    setattr(pipeline, name, None)
    return pipeline


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("sdxl", ['pipe.load_lora_weights("card")']),
        ("hunyuanvideo15", ['pipe.transformer.load_lora_adapter("card", use_safetensors=True)']),
        (
            "wan22_a14b",
            [
                'pipe.load_lora_weights("card")',
                'load_into_transformer_2=True, weight_name="pytorch_lora_weights_2',
                "frames = pipe(",
            ],
        ),
    ],
)
def test_the_model_card_says_how_to_load_the_lora(name, lines, tmp_path):
    trainer = trainer_for(_case(name), tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="card")
    card = (tmp_path / "run" / "README.md").read_text()
    assert all(line in card for line in lines)
    assert f"pipeline_tag: text-to-{'video' if trainer.adapter.is_video else 'image'}" in card


def test_the_trainers_know_no_backbone():
    """What is particular to a model is its adapter's: no name of a pipeline, of its module or of a denoiser."""
    sources = {path: path.read_text(encoding="utf-8") for path in Path(trl_sipo.trainer.__file__).parent.rglob("*.py")}
    assert len(sources) > 15
    modules = {path.split(":")[0].rsplit(".", 1)[1] for path in ADAPTERS.values()}
    forbidden = re.compile(
        "|".join([*ADAPTERS, *(rf"adapters\.{name}\b" for name in modules), r"\.unet\b", r'"unet"'])
    )
    for path, source in sources.items():
        assert not forbidden.search(source), path
