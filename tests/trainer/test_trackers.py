# SPDX-License-Identifier: Apache-2.0
"""Sample grids on disk and in the trackers; what the trackers of transformers read of a model."""

import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import DPO, PROMPTS, SIPO, make_trainer, trained_weights

SAMPLING = {
    "sample_prompts": list(PROMPTS[:3]),
    "sample_every_steps": 2,
    "sample_num_inference_steps": 2,
    "sample_guidance_scale": 3.0,
    "sample_seed": 11,
}


def _columns(path):
    """The two columns of a grid, as (rows, 32, 32, 3) arrays, and that what is between them is white."""
    grid = np.asarray(Image.open(path))
    assert grid.shape == (3 * 36 - 4, 68, 3) and (grid[:, 32:36] == 255).all()
    rows = [grid[36 * row : 36 * row + 32] for row in range(3)]
    return np.stack([row[:, :32] for row in rows]), np.stack([row[:, 36:] for row in rows])


def _drawn(pipeline):
    """The prompts as plain diffusers draws them, one generator per prompt."""
    images = pipeline(
        SAMPLING["sample_prompts"],
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(11 + i) for i in range(3)],
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def _loaded_lora(directory):
    first = make_trainer(DPO, directory / "first", learning_rate=1e-1)
    first.train()
    first.save_model(str(directory / "lora"))
    pipeline = tiny_stable_diffusion()
    pipeline.load_lora_weights(str(directory / "lora"))
    return {"model": pipeline, "is_lora": False}


KINDS = {"lora": lambda directory: {}, "full": lambda directory: {"is_lora": False}, "loaded_lora": _loaded_lora}


@pytest.mark.parametrize("kind", KINDS)
def test_grids_show_the_base_beside_the_current_model(kind, tmp_path):
    options = KINDS[kind](tmp_path)
    base = _drawn(options.get("model") or tiny_stable_diffusion())
    trainer = make_trainer(
        DPO, tmp_path / "run", max_steps=5, learning_rate=1e-1, max_grad_norm=1.0, **options, **SAMPLING
    )
    trainer.train()

    paths = sorted((tmp_path / "run" / "samples").glob("*.png"))
    assert [path.name for path in paths] == ["step-000002.png", "step-000004.png"]
    (left, right), (later_left, later_right) = map(_columns, paths)
    assert np.array_equal(left, later_left)
    assert np.abs(left.astype(int) - base).max() <= 1  # to rounding, what the pipeline drew before training
    assert not np.array_equal(right, left) and not np.array_equal(right, later_right)


def test_the_base_column_of_a_resumed_run_is_still_the_base(tmp_path):
    """And not the model that was resumed."""
    options = {"learning_rate": 1e-1, "save_strategy": "steps", "save_steps": 2, **SAMPLING}
    make_trainer(DPO, tmp_path / "first", max_steps=2, **options).train()
    resumed = make_trainer(DPO, tmp_path / "second", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    first, _ = _columns(tmp_path / "first" / "samples" / "step-000002.png")
    later, current = _columns(tmp_path / "second" / "samples" / "step-000004.png")
    assert np.array_equal(first, later) and not np.array_equal(later, current)


def test_the_current_column_is_what_the_trained_pipeline_draws(tmp_path):
    trainer = make_trainer(DPO, tmp_path, max_steps=2, learning_rate=1e-1, **SAMPLING)
    trainer.train()
    _, right = _columns(tmp_path / "samples" / "step-000002.png")
    trainer.model.eval()
    assert np.abs(right.astype(int) - _drawn(trainer.adapter.pipeline)).max() <= 1


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_sampling_leaves_no_trace_in_training(is_lora, tmp_path):
    weights = []
    for options in ({}, {**SAMPLING, "sample_every_steps": 1}):
        trainer = make_trainer(SIPO, tmp_path, is_lora=is_lora, **options)
        bar = dict(trainer.adapter.pipeline._progress_bar_config)
        trainer.train()
        weights.append(trained_weights(trainer))
        assert trainer.adapter.pipeline._progress_bar_config == bar
        assert trainer.adapter.denoiser is trainer.adapter.pipeline.unet
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_tensorboard_gets_scalars_configuration_and_grids(is_lora, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(SIPO, tmp_path, is_lora=is_lora, report_to=["tensorboard"], trainer_options={}, **SAMPLING)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    for key in ("loss", "rewards/margins", "sipo/masked_fraction", "drift/chosen_error", "grad_norm"):
        assert [event.step for event in events.Scalars(f"train/{key}")] == [1, 2, 3]
    assert "model_config/text_summary" in tags["tensors"]
    assert b"cross_attention_dim" in events.Tensors("model_config/text_summary")[0].tensor_proto.string_val[0]
    (image,) = events.Images("samples")
    assert image.step == 2
    drawn = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert np.array_equal(drawn, np.asarray(Image.open(tmp_path / "samples" / "step-000002.png")))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_grids_reach_the_other_trackers(name, tmp_path, monkeypatch):
    """Through a module of that name which records what it is given."""
    module = types.ModuleType(name)
    module.logged = []
    module.log = module.logged.append
    module.Image = lambda image: ("image", image)
    module.run = object()
    monkeypatch.setitem(sys.modules, name, module)
    trainer = make_trainer(SIPO, tmp_path, **SAMPLING)
    trainer.args.report_to = [name]
    trainer.train()
    (row,) = module.logged
    assert row["train/global_step"] == 2
    kind, image = row["samples"]
    on_disk = np.asarray(Image.open(tmp_path / "samples" / "step-000002.png"))
    assert kind == "image" and np.array_equal(np.asarray(image), on_disk)


def test_a_run_without_trackers_asks_none(tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    make_trainer(SIPO, tmp_path, max_steps=2, **SAMPLING).train()
    assert list(tmp_path.glob("samples/step-*.png"))


def test_progress_bars(tmp_path, capsys):
    make_trainer(DPO, tmp_path, max_steps=2, disable_tqdm=False).train()
    assert "2/2" in capsys.readouterr().err
