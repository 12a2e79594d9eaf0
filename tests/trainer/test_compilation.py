# SPDX-License-Identifier: Apache-2.0
"""`torch_compile=True`: the results of the uncompiled run, few graphs, and weights under their own names."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from tests.adapters.backbone_cases import BACKBONES
from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    DPO,
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
from tests.trainer.test_backbones import trainer_for
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.compilation import check_compile_backend, regions_of

COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
# Tracing takes seconds a graph, and a LoRA on one layer a block makes it as many graphs as on all.
SMALL_LORA = {"peft_config": lora(target_modules=["attn1.to_q"])}
lora_and_full = pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """No graphs and counters of other tests, and the limit as it was."""
    limit = torch._dynamo.config.recompile_limit
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = limit


def graphs() -> int:
    """How many graphs were compiled so far."""
    return counters["stats"]["unique_graphs"]


class CountGraphs(TrainerCallback):
    """Notes the number of graphs after every step."""

    def __init__(self):
        self.after_step = []

    def on_step_end(self, args, state, control, **kwargs):
        """One step has ended."""
        self.after_step.append(graphs())


def _train(trainer):
    """The number of graphs after every step."""
    counter = CountGraphs()
    trainer.add_callback(counter)
    trainer.train()
    return counter.after_step


def _case(name):
    return next(case for case in BACKBONES if case.name == name)


SETTINGS = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "split": {"split_pair_backward": True},
    "both": {"gradient_checkpointing": True, "split_pair_backward": True},
    "bf16": {"bf16": True},
}
QUICK = (("both", True), ("plain", False))


@pytest.mark.parametrize(
    ("setting", "is_lora"),
    [
        pytest.param(setting, is_lora, marks=[] if (setting, is_lora) in QUICK else pytest.mark.slow)
        for setting in SETTINGS
        for is_lora in (True, False)
    ],
)
def test_a_compiled_run_is_the_uncompiled_one(setting, is_lora, tmp_path):
    """With the backend that changes no operation: to the bit, evaluation included, and without a break in a graph."""
    options = {"is_lora": False, "mask": False, **SETTINGS[setting]}
    options |= {"trainer_options": SMALL_LORA} if is_lora else {}
    plain, compiled = (make_trainer(SIPO, tmp_path, **options, **more) for more in ({}, COMPILED))
    before = snapshot(compiled.model)
    assert graphs() == 0
    plain.train()
    assert graphs() == 0
    after_step = _train(compiled)
    assert after_step[0] > 0 and len(set(after_step)) == 1, "no step but the first compiles"
    assert not counters["graph_break"] and counters["frames"]["ok"] == counters["frames"]["total"]
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()
    assert type(compiled.model_wrapped) is type(plain.model), "no wrapper"
    assert changed(before, snapshot(compiled.model))
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)
    assert largest_difference(trained_weights(plain), trained_weights(compiled)) < 1e-6

    held_out = preference_pairs(8, seed=1)
    assert compiled.evaluate(held_out)["eval_loss"] == pytest.approx(plain.evaluate(held_out)["eval_loss"], rel=1e-6)
    so_far = graphs()
    assert so_far > 8 or not is_lora, "more than torch's own limit for one class of blocks"
    compiled.evaluate(held_out)
    assert graphs() == so_far, "a second evaluation compiles nothing"
    assert set(_train(compiled)) == {so_far}, "training after an evaluation compiles nothing"


SLOW_FLOWS = (("flux-dev", True), ("sd3", True), ("sd3", False))


@pytest.mark.parametrize(
    ("name", "is_lora"),
    [("flux-dev", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_FLOWS)],
)
def test_a_compiled_flow_transformer(name, is_lora, tmp_path):
    """FLUX names the blocks that repeat; Stable Diffusion 3 does not, and is compiled as a whole."""
    options = {"is_lora": is_lora, "max_steps": 3, "learning_rate": 1e-3, "gradient_checkpointing": True}
    plain = trainer_for(_case(name), tmp_path / "plain", **options)
    compiled = trainer_for(_case(name), tmp_path / "compiled", **options, **COMPILED)
    plain.train()
    after_step = _train(compiled)
    assert after_step[0] > 0 and len(set(after_step)) == 1
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert largest_difference(trained_weights(plain), trained_weights(compiled)) < 1e-5


def test_policy_and_reference_are_both_compiled(tmp_path):
    """With all weights the reference is a model of its own."""
    trainer = make_trainer(DPO, tmp_path, is_lora=False, **COMPILED)
    for denoiser in (trainer.model, trainer.ref_model):
        regions = regions_of(denoiser)
        assert regions and all(region._compiled_call_impl is not None for region in regions)


@pytest.mark.slow
@lora_and_full
def test_what_is_saved_resumes_compiled_or_not(is_lora, tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "base")
    options = {"model": str(tmp_path / "base"), "is_lora": is_lora, "max_steps": 4}
    whole = make_trainer(DPO, tmp_path / "whole", save_strategy="steps", save_steps=2, **options, **COMPILED)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    files = sorted(checkpoint.rglob("*.safetensors"))
    assert files
    for file in files:
        with safe_open(file, framework="pt") as weights:
            assert not [key for key in weights.keys() if "_orig_mod" in key]
    for more in ({}, COMPILED):
        resumed = make_trainer(DPO, tmp_path / "resumed", **options, **more)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == 4
        assert largest_difference(trained_weights(whole), trained_weights(resumed)) < 1e-6
        shutil.rmtree(tmp_path / "resumed", ignore_errors=True)


@pytest.mark.slow
def test_a_unet_of_many_widths_stays_compiled(tmp_path, caplog):
    """Policy and reference, training and evaluation: more graphs than torch's own limit for one class of blocks."""
    trainer = make_trainer(DPO, tmp_path, max_steps=2, **COMPILED)
    trainer.train()
    trainer.evaluate(preference_pairs(5, seed=1))  # and a last batch of another size
    assert graphs() > 8
    assert torch._dynamo.config.recompile_limit > graphs()
    assert counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.mark.slow
def test_sample_grids_compile_nothing(tmp_path):
    options = {"sample_prompts": ["a red cat"], "sample_every_steps": 1, "sample_num_inference_steps": 2}
    drawn, undrawn = (make_trainer(DPO, tmp_path, max_steps=2, **COMPILED, **more) for more in (options, {}))
    after_step = _train(drawn)
    torch.compiler.reset()
    counters.clear()
    assert _train(undrawn) == after_step
    assert len(list(tmp_path.glob("samples/*.png"))) == 2


@pytest.mark.slow
def test_a_precomputed_reference_is_compiled_too(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_sipo.trainer.reference_bank.reference_folder", lambda: tmp_path / "bank")
    options = {"precompute_ref_log_probs": True, "num_ref_draws": 1}
    trainer = make_trainer(DPO, tmp_path, **options, **COMPILED)
    assert graphs() > 0
    after_step = _train(trainer)
    assert len(set(after_step)) == 1


@pytest.mark.parametrize("backend", ["inductr", "tensorrt", "no"])
def test_an_unknown_backend_is_refused_before_anything_is_loaded(backend, tmp_path):
    with pytest.raises(ConfigurationError, match=f"{backend!r}.*inductor"):
        make_config(DPO, tmp_path, torch_compile_backend=backend)
    check_compile_backend("EAGER")


def test_accelerates_own_setting_compiles_the_same_way(tmp_path, monkeypatch):
    """`accelerate launch --dynamo_backend eager` sets this variable."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    trainer = make_trainer(DPO, tmp_path, max_steps=1)
    assert type(trainer.accelerator.prepare_model(trainer.model)) is PeftModel
    assert all(region._compiled_call_impl is not None for region in regions_of(trainer.model))


def test_what_is_compiled_is_recorded(tmp_path):
    """The settings of a run, which its folder keeps, say how it was compiled."""
    config = json.loads(make_config(DPO, tmp_path, torch_compile_backend="eager").to_json_string())
    assert config["torch_compile"] is True and config["torch_compile_backend"] == "eager"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@lora_and_full
def test_inductor(is_lora, tmp_path):
    options = {"is_lora": is_lora, "mask": False, "gradient_checkpointing": True, "split_pair_backward": True}
    plain, compiled = (make_trainer(SIPO, tmp_path, **options, torch_compile=more) for more in (False, True))
    plain.train()
    after_step = _train(compiled)
    assert after_step[0] > 0 and len(set(after_step)) == 1
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@lora_and_full
def test_inductor_on_a_gpu(mode, is_lora, tmp_path):
    options = {"is_lora": is_lora, "mask": False, "use_cpu": False, "max_steps": 4}
    plain = make_trainer(SIPO, tmp_path, **options)
    compiled = make_trainer(SIPO, tmp_path, torch_compile=True, torch_compile_mode=mode, **options)
    plain.train()
    after_step = _train(compiled)
    assert len(set(after_step)) == 1
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-2)
