# SPDX-License-Identifier: Apache-2.0
"""`load_pipeline` and `adapter_for`: what cannot be trained is refused, by name, before weights are read."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from tests.tiny_models import tiny_stable_diffusion
from trl_sipo.adapters import adapter_for, denoiser_names, load_pipeline
from trl_sipo.adapters.weightless import ENCODER_NAMES
from trl_sipo.errors import BackboneError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pipeline")
    tiny_stable_diffusion().save_pretrained(directory)
    return directory


def test_an_unknown_class_is_named_beside_the_known_ones():
    pipeline = tiny_stable_diffusion()
    image_to_image = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    for wrong in (image_to_image, pipeline.unet, "org/model"):
        with pytest.raises(BackboneError, match=f"{type(wrong).__name__}.*StableDiffusionPipeline"):
            adapter_for(wrong)


def test_strings_and_paths_load_with_their_options(saved):
    assert load_pipeline(saved).unet.dtype == torch.float32
    assert load_pipeline(str(saved), dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_the_home_folder_is_expanded(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    path = f"~/{saved.name}"
    assert type(load_pipeline(path)).__name__ == "StableDiffusionPipeline"
    assert denoiser_names(path) == ["unet"]


def test_of_a_hub_model_no_weights_of_encoders_are_needed(saved, tmp_path):
    """As the hub's cache has it when only their configurations were downloaded."""
    folder = tmp_path / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    shutil.copytree(saved, folder / "snapshots" / "abc123")
    for part in ("vae", "text_encoder"):
        for weights in (folder / "snapshots" / "abc123" / part).glob("*.safetensors"):
            weights.unlink()
    pipeline = load_pipeline("org/tiny", weightless=ENCODER_NAMES, cache_dir=tmp_path, local_files_only=True)
    devices = [pipeline.components[name].device.type for name in ("vae", "text_encoder", "unet")]
    assert devices == ["meta", "meta", "cpu"]
    assert adapter_for(pipeline).latent_shape(32, 32) == (4, 8, 8)
    with pytest.raises(BackboneError, match="does not load"):
        load_pipeline("org/tiny", cache_dir=tmp_path, local_files_only=True)


def test_the_class_is_checked_before_the_weights(saved, tmp_path):
    index = json.loads((saved / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionImg2ImgPipeline"
    (tmp_path / "model_index.json").write_text(json.dumps(index))  # there are no weights at all
    with pytest.raises(BackboneError, match="is a StableDiffusionImg2ImgPipeline, which no adapter knows"):
        load_pipeline(tmp_path)


def test_incomplete_and_broken_folders(saved, tmp_path):
    with pytest.raises(BackboneError, match=r"no model_index\.json.*load_lora_weights"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{not json")
    with pytest.raises(BackboneError, match="not a valid JSON"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text((saved / "model_index.json").read_text())
    with pytest.raises(BackboneError, match="does not load"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(BackboneError, match=f"no folder '{os.path.expanduser(name)}'"):
        load_pipeline(name)


def test_single_files_are_explained(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    for name in (file, "org/model.safetensors"):
        with pytest.raises(BackboneError, match="from_single_file"):
            load_pipeline(name)


def test_a_model_id_without_a_connection_is_explained(tmp_path):
    with pytest.raises(BackboneError, match=r"'org/model' is not a local folder.*HF_HUB_OFFLINE"):
        load_pipeline("org/model", local_files_only=True, cache_dir=tmp_path)


def test_the_package_imports_without_the_heavy_libraries():
    code = "import sys, trl_sipo.adapters; sys.exit(bool({'torch', 'diffusers', 'peft', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
