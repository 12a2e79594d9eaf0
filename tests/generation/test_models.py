# SPDX-License-Identifier: Apache-2.0
"""The models of a comparison: their names, and what training saved of them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import DPO, make_trainer, predict
from trl_sipo.errors import BackboneError, ConfigurationError
from trl_sipo.generation.models import LORA_FILES, ModelSpec, load_model, parse_model, parse_models


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["lora", "full"])
def run(request, base, tmp_path_factory):
    """A run's folder, what its model predicts, and whether it is a LoRA."""
    folder = tmp_path_factory.mktemp("run")
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "learning_rate": 1e-2}
    trainer = make_trainer(DPO, folder, model=str(base), is_lora=request.param, **options)
    trainer.train()
    trainer.save_model()
    return folder, predict(trainer.adapter.pipeline), request.param


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("base=org/model", ModelSpec("base", "org/model")),
        ("tuned=org/model+runs/sipo", ModelSpec("tuned", "org/model", "runs/sipo")),
        ("tuned=org/model+org/lora", ModelSpec("tuned", "org/model", "org/lora")),
        ("a=b=c", ModelSpec("a", "b=c")),
        ("x_1.0-b=./folder", ModelSpec("x_1.0-b", "./folder")),
    ],
)
def test_specs_are_parsed_and_written(text, spec):
    assert parse_model(text) == spec and str(spec) == text


def test_a_plus_sign_in_the_name_of_a_folder_separates_nothing(tmp_path):
    for name in ("sd+vae", "my+lora"):
        (tmp_path / name).mkdir()
    model, lora = f"{tmp_path}/sd+vae", f"{tmp_path}/my+lora"
    assert parse_model(f"a={model}") == ModelSpec("a", model)
    assert parse_model(f"a={model}+{lora}") == ModelSpec("a", model, lora)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["org/model"], "'org/model' is no model: write NAME=MODEL"),
        (["=org/model"], "cannot be that of a folder"),
        (["../a=org/model"], "cannot be that of a folder"),
        (["a="], "is empty"),
        (["a=org/model+"], "is empty"),
        (["a=x/y", "A=x/z"], "Two model names are the same folder's: 'a' and 'A'"),
        ([], "No model is given"),
    ],
)
def test_what_is_no_model_is_refused(texts, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_models(texts)


@pytest.mark.parametrize("of", ["output_dir", "checkpoint"])
def test_what_training_saved_loads_as_the_trained_model(of, run, base):
    folder, expected, is_lora = run
    saved = str(folder if of == "output_dir" else folder / "checkpoint-1")
    adapter = load_model(ModelSpec("tuned", str(base), saved) if is_lora else ModelSpec("tuned", saved), device="cpu")
    torch.testing.assert_close(predict(adapter.pipeline), expected, rtol=0, atol=1e-6)
    assert (predict(tiny_stable_diffusion()) - expected).abs().max() > 1e-3, "training has changed the model"
    assert not adapter.denoiser.training and not any(p.requires_grad for p in adapter.denoiser.parameters())


def test_a_lora_alone_needs_its_base(run):
    folder, _, is_lora = run
    if is_lora:
        with pytest.raises(BackboneError, match=r"does not say of which model: write tuned=BASE\+"):
            load_model(ModelSpec("tuned", str(folder)))


def test_the_base_of_a_lora_alone_is_what_its_card_names(run, tmp_path):
    folder, _, is_lora = run
    if is_lora:
        (tmp_path / LORA_FILES[0]).write_bytes((folder / LORA_FILES[0]).read_bytes())
        (tmp_path / "README.md").write_text("---\nbase_model: org/base\n---\n# A LoRA\n")
        with pytest.raises(BackboneError, match="'org/base' is not a local folder"):
            load_model(ModelSpec("tuned", str(tmp_path)), local_files_only=True, cache_dir=tmp_path)


def test_the_dtype_is_that_of_all_but_the_vae(base):
    pipeline = load_model(ModelSpec("base", str(base)), dtype="bfloat16", device="cpu").pipeline
    assert (pipeline.unet.dtype, pipeline.text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    assert pipeline.vae.dtype == torch.float32
    with pytest.raises(ConfigurationError, match="`dtype` must be one of float32, bfloat16, float16; got 'int8'"):
        load_model(ModelSpec("base", str(base)), dtype="int8")


def _no_lora(folder):
    return folder


def _other_layers(folder):
    save_file({"transformer.a.lora_A.weight": torch.ones(2, 2)}, folder / LORA_FILES[0])
    return folder


def _pickle(folder):
    torch.save({}, folder / "lora.bin")
    return folder / "lora.bin"


def _damaged(folder):
    (folder / LORA_FILES[0]).write_bytes(json.dumps({}).encode())
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_lora, "pytorch_lora_weights.safetensors is missing"),
        (_other_layers, "nothing was loaded"),
        (_pickle, "is no safetensors file"),
        (_damaged, "does not load into this pipeline"),
        (lambda folder: folder / "none", "There is no LoRA"),
    ],
)
def test_a_lora_that_does_not_load_is_explained(make, message, base, tmp_path):
    with pytest.raises(BackboneError, match=message):
        load_model(ModelSpec("tuned", str(base), str(make(tmp_path))), device="cpu")


def test_a_pipeline_that_is_not_there_is_explained():
    with pytest.raises(BackboneError, match="no folder './none'"):
        load_model(ModelSpec("base", "./none"))
