# SPDX-License-Identifier: Apache-2.0
"""Every private part of TRL and transformers that is relied on. A new release that changes one fails here first."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import transformers
import trl
from accelerate.state import AcceleratorState
from huggingface_hub.utils import filter_repo_objects
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import DPOTrainer
from trl.models import utils as model_utils
from trl.trainer import callbacks, utils
from trl.trainer.base_trainer import _BaseTrainer

import trl_sipo
from tests.trainer.runs import DPO, METHODS, make_trainer
from trl_sipo.trainer._trl_compat import ReportableConfig
from trl_sipo.trainer.base_trainer import DiffusionPreferenceTrainer
from trl_sipo.trainer.reproduction import NONFINITE_FOLDER
from trl_sipo.trainer.resumable import ResumableTrainer
from trl_sipo.trainer.text_sipo_trainer import SIPOTrainer

PACKAGE = Path(trl_sipo.__file__).parent

# Function -> the parameters by which it is called, or with which it is overridden.
SIGNATURES = {
    model_utils.prepare_deepspeed: ("model", "accelerator"),
    model_utils.prepare_fsdp: ("model", "accelerator"),
    utils.disable_dropout_in_model: ("model",),
    utils.use_adapter: ("model", "adapter_name"),
    utils.get_comet_experiment_url: (),
    utils.get_trackio_space_url: (),
    callbacks.SyncRefModelCallback.__init__: ("self", "ref_model", "accelerator"),
    DPOTrainer._prepare_dataset: ("self", "dataset", "processing_class", "args", "dataset_name"),
    DPOTrainer._set_signature_columns_if_needed: ("self",),
    DPOTrainer.compute_ref_log_probs: ("self", "model", "inputs"),
    DPOTrainer._compute_loss: ("self", "model", "inputs", "return_outputs"),
    DPOTrainer.compute_loss: ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    DPOTrainer.prediction_step: ("self", "model", "inputs", "prediction_loss_only", "ignore_keys"),
    DPOTrainer.evaluate: ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
    DPOTrainer.log: ("self", "logs", "start_time"),
    DPOTrainer._save_checkpoint: ("self", "model", "trial"),
    _BaseTrainer._send_telemetry: ("self",),
    _BaseTrainer.create_model_card: ("self", "model_name", "dataset_name", "tags"),
    transformers.Trainer.evaluation_loop: (
        "self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix",
    ),
    transformers.Trainer.get_test_dataloader: ("self", "test_dataset"),
    transformers.Trainer._save: ("self", "output_dir", "state_dict"),
    transformers.Trainer._load_from_checkpoint: ("self", "resume_from_checkpoint", "model"),
    transformers.Trainer._init_training_state: (
        "self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ),
    transformers.Trainer._load_best_model: ("self",),
    transformers.Trainer.train: ("self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    transformers.Trainer.save_model: ("self", "output_dir", "_internal_call"),
    transformers.Trainer._save_checkpoint: ("self", "model", "trial"),
    transformers.Trainer._save_optimizer_and_scheduler: ("self", "output_dir"),
    transformers.Trainer._save_scaler: ("self", "output_dir"),
    transformers.Trainer._save_rng_state: ("self", "output_dir"),
    transformers.Trainer._load_rng_state: ("self", "checkpoint"),
    transformers.Trainer._get_output_dir: ("self", "trial"),
    transformers.Trainer._maybe_log_save_evaluate: (
        "self", "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time",
        "learning_rate",
    ),
    transformers.Trainer._finalize_training: ("self", "trial", "num_train_samples", "start_time"),
    transformers.Trainer._determine_best_metric: ("self", "metrics", "trial"),
    transformers.Trainer._get_grad_norm: ("self", "model", "grad_norm"),
    transformers.Trainer.training_step: ("self", "model", "inputs", "num_items_in_batch"),
    transformers.Trainer._push_from_checkpoint: ("self", "checkpoint_folder"),
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    assert tuple(inspect.signature(function).parameters) == SIGNATURES[function]


def test_our_overrides_take_what_they_are_called_with():
    ours = [*vars(ResumableTrainer).items(), *vars(DiffusionPreferenceTrainer).items(), *vars(SIPOTrainer).items()]
    for name, function in ours:
        theirs = getattr(DPOTrainer, name, None)
        if not inspect.isfunction(function) or theirs is None or name in ("__init__", "evaluation_loop"):
            continue
        parameters = list(inspect.signature(function).parameters)
        assert parameters == list(inspect.signature(theirs).parameters)[: len(parameters)], name


def _attributes_of_self(function):
    """Names read as `self.<name>` in the source of a method."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }


# Methods of TRL that are never called: our reference errors hang on noise, and its loss is not ours.
NEVER_CALLED = {"_precompute_ref_logps", "compute_ref_log_probs", "_load_precompute_model", "_truncate_inputs"}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_inherited_methods_read_is_there(method, tmp_path):
    """`DPOTrainer.__init__` is not called, so whatever its methods read must have been set by ours."""
    trainer = make_trainer(method, tmp_path)
    checked = 0
    for cls in (DPOTrainer, _BaseTrainer):
        for name, function in vars(cls).items():
            if not inspect.isfunction(function) or name == "__init__" or name in NEVER_CALLED:
                continue
            if getattr(method.trainer_class, name) is not function:
                continue  # overridden
            for attribute in _attributes_of_self(function):
                assert hasattr(trainer, attribute), f"{cls.__name__}.{name} reads self.{attribute}"
                checked += 1
    assert checked > 12


def test_what_begins_with_an_underscore_is_not_uploaded():
    """Of an output folder: above all the folder of steps that were not finite."""
    for function in (transformers.Trainer.push_to_hub, transformers.Trainer._push_from_checkpoint):
        assert 'ignore_patterns=["_*"' in inspect.getsource(function)
    assert not list(filter_repo_objects([f"{NONFINITE_FOLDER}/step-000001.json"], ignore_patterns=["_*"]))


def test_what_the_text_trainer_takes_out_of_trls_loss():
    """One pass of the policy, called in this way, and a reference that is read from the batch."""
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert source.count(" = model(") == 2  # the second for `return_outputs`
    assert "outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)" in source
    assert 'ref_chosen_logps, ref_rejected_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]' in source
    assert "outputs.log_probs[:, -seq_len:]" in source and "loss + self.router_aux_loss_coef * aux_loss" in source


def test_the_loss_is_not_scaled_twice():
    assert DPOTrainer.loss_is_scaled_for_ga is False
    assert "loss_is_scaled_for_ga" in inspect.getsource(transformers.Trainer)


def test_names_of_the_running_loss():
    """Set when training begins, before `on_train_begin`, where a resumed run takes up its own."""
    source = inspect.getsource(transformers.Trainer._inner_training_loop)
    before = source[: source.index("on_train_begin")]
    for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step"):
        assert f"self.{name} = " in before
    # What is in a checkpoint: whatever is added must be written by ours too.
    saved = inspect.getsource(transformers.Trainer._save_checkpoint)
    called = set(re.findall(r"self\.(_?save\w+|_push\w+|store\w+)\(", saved))
    assert called == {
        "save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state", "_push_from_checkpoint",
        "store_flos",
    }  # fmt: skip


def test_names_that_are_called_by_transformers():
    """The method by which activation checkpointing is switched on, and the one by which a configuration is read."""
    assert "self.model.activation_checkpointing_enable(" in inspect.getsource(transformers.Trainer)
    assert "model.config.to_json_string()" in inspect.getsource(TensorBoardCallback)
    assert PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert hasattr(AcceleratorState, "deepspeed_plugin")


def test_a_reportable_configuration_is_still_the_models(tmp_path):
    trainer = make_trainer(DPO, tmp_path)
    config = trainer.adapter.denoiser.config
    assert isinstance(config, ReportableConfig) and config.cross_attention_dim == config["cross_attention_dim"] == 16
    assert config.to_dict() == dict(config) and '"cross_attention_dim": 16' in config.to_json_string()
    trainer.adapter.denoiser.save_config(tmp_path / "saved")
    assert "to_dict" not in (tmp_path / "saved" / "config.json").read_text()


def test_private_parts_are_touched_in_one_file_only():
    """Elsewhere only what `import trl` offers is used."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                if name.startswith("trl."):
                    found.setdefault(path.name, set()).add(name)
    assert set(found) == {"_trl_compat.py"}


def test_the_minor_release_is_the_one_that_was_tested():
    assert trl.__version__.split(".")[:2] == ["1", "16"]
