# SPDX-License-Identifier: Apache-2.0
"""The only place that touches private parts of TRL and transformers. Each shim says when it can go.

`tests/trainer/test_trl_compat.py` names every private symbol used here, so that a new TRL fails there and not in a
user's run.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch.utils.checkpoint import checkpoint
from transformers import Trainer
from trl import DPOConfig, DPOTrainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import disable_dropout_in_model, get_comet_experiment_url, get_trackio_space_url, use_adapter

from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.sharding import is_sharded, shard_reference

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "TextForward",
    "SyncRefModelCallback",
    "disable_dropout_in_model",
    "get_comet_experiment_url",
    "get_trackio_space_url",
    "init_trainer",
    "log_by_itself",
    "make_checkpointable",
    "make_config_reportable",
    "policy_left_unprepared",
    "prepare_reference_model",
    "text_forward",
    "use_adapter",
]


def init_trainer(trainer: DPOTrainer, **kwargs: Any) -> None:
    """Initialise `trainer` as a `transformers.Trainer` the way TRL does, without `DPOTrainer.__init__`.

    `DPOTrainer.__init__` needs a tokenizer, `generation_config`, `get_text_config` and a fused language-model head. It
    can be called again when TRL separates model preparation from the trainer's initialisation.
    """
    _BaseTrainer.__init__(trainer, **kwargs)
    # What `DPOTrainer.__init__` sets and its inherited methods (`log`, `evaluate`, `training_step`) read.
    trainer.maybe_activation_offload_context = contextlib.nullcontext()
    trainer.precompute_ref_logps = False
    trainer._is_vision_dataset = False


def log_by_itself(trainer: DPOTrainer, logs: dict[str, float]) -> None:
    """Log a row within a step, without what TRL would add to it, and take from the row of the step that comes next.

    Goes when TRL's `log` leaves the metrics of the steps to the rows that have a `loss`.
    """
    is_due = trainer.control.should_log
    Trainer.log(trainer, logs)
    trainer.control.should_log = is_due  # each row says that the one which is due has been logged


def make_checkpointable(denoiser: torch.nn.Module) -> None:
    """Give a diffusers model the method by which transformers switches activation checkpointing on.

    diffusers calls it `enable_gradient_checkpointing`; transformers 5.23 looks for `activation_checkpointing_enable`.
    Goes when diffusers offers transformers' name.
    """
    if not hasattr(denoiser, "activation_checkpointing_enable"):
        # Through __dict__: a bound method set as an attribute would otherwise be looked up as a submodule first.
        denoiser.__dict__["activation_checkpointing_enable"] = MethodType(_enable_checkpointing, denoiser)


def _enable_checkpointing(
    denoiser: Any,
    activation_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    if every_n_layers != 1 or offload:
        raise ConfigurationError(
            f"`activation_checkpointing_kwargs` has every_n_layers={every_n_layers} and offload={offload}, which "
            "diffusers models do not offer: they checkpoint every block, or none. Remove the two."
        )
    options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}

    def checkpoint_block(module: torch.nn.Module, *args: Any) -> Any:
        return checkpoint(module.__call__, *args, **options)

    denoiser.enable_gradient_checkpointing(checkpoint_block)


class ReportableConfig(FrozenDict):
    """A diffusers configuration with the two methods by which the trackers of transformers read one."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a plain dictionary."""
        return dict(self)

    def to_json_string(self) -> str:
        """The configuration as JSON."""
        return json.dumps(dict(self), indent=2, sort_keys=True, default=str)


def make_config_reportable(denoiser: Any) -> None:
    """Let TensorBoard and the other trackers read the configuration of a diffusers model.

    `TensorBoardCallback` calls `model.config.to_json_string()`, which a diffusers `FrozenDict` lacks. Goes when
    diffusers or transformers closes the gap.
    """
    if not hasattr(denoiser.config, "to_json_string"):
        denoiser._internal_dict = ReportableConfig(denoiser.config)


def prepare_reference_model(trainer: DPOTrainer, ref_model: torch.nn.Module) -> torch.nn.Module:
    """Shard or wrap a frozen reference as TRL does, for the engine in force (DeepSpeed, FSDP, or none)."""
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(ref_model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(shard_reference(ref_model, trainer.accelerator), trainer.accelerator)
    return trainer.accelerator.prepare_model(ref_model, evaluation_mode=True)


@contextlib.contextmanager
def policy_left_unprepared(trainer: DPOTrainer) -> Iterator[None]:
    """Take back that an evaluation before training prepares the policy; in training it does nothing.

    transformers' `evaluation_loop` prepares the policy without the wrapper for several processes, and accelerate then
    takes it for prepared in training too: each process would train a model of its own. Goes when one of the two is
    fixed.

    Raises:
        ConfigurationError: Under FSDP and DeepSpeed, where a policy can only be prepared together with its optimiser.
    """
    is_left_to_training = trainer.is_fsdp_enabled and not is_sharded(trainer.model)
    if is_left_to_training or (trainer.is_deepspeed_enabled and trainer.deepspeed is None):
        raise ConfigurationError(
            "Under FSDP and DeepSpeed a model is evaluated during training or after it, not before: it is prepared "
            "together with its optimiser. Use `eval_on_start=True`."
        )
    model, models = trainer.model, trainer.accelerator._models
    names = ("_is_accelerate_prepared", "forward", "_original_forward")
    models_before, before = list(models), {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        yield
    finally:
        if "_is_accelerate_prepared" not in before and "_is_accelerate_prepared" in model.__dict__:
            models[:] = models_before
            for name in names:
                model.__dict__.pop(name, None)
            model.__dict__.update(before)


@dataclass(frozen=True)
class TextForward:
    """What `DPOTrainer` computes of a batch of pairs of completions, and otherwise keeps to itself.

    Attributes:
        result: What its `_compute_loss` returned: its own loss, with the outputs where they were asked for.
        log_probs: Of the policy, (2 * batch, length - 1): per token, 0 outside of the completions; chosen ones first.
        ref_logps: Of the reference, (2 * batch,): summed over the completions.
        aux_loss: The load-balancing term of the policy, scaled; 0.0 where it has none.
    """

    result: Any
    log_probs: torch.Tensor
    ref_logps: torch.Tensor
    aux_loss: torch.Tensor | float


def text_forward(trainer: DPOTrainer, model: Any, inputs: dict[str, Any], return_outputs: bool) -> TextForward:
    """One forward pass of policy and reference, in which TRL records its own metrics.

    TRL computes passes, loss and metrics in one method that gives out the loss alone. The policy is handed to it in a
    wrapper that keeps its output, and the reference's log-probabilities as if they had been precomputed. Goes when TRL
    separates the passes from the loss.

    Args:
        trainer: A text trainer that is initialised.
        model: The policy, as the trainer wraps it.
        inputs: The batch, without columns that are not TRL's.
        return_outputs: As `compute_loss` is told.
    """
    if not trainer.precompute_ref_logps:
        reference = trainer.model if trainer.ref_model is None else trainer.ref_model
        chosen, rejected = trainer.compute_ref_log_probs(reference, inputs)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    outputs: list[Any] = []

    def recorded(**kwargs: Any) -> Any:
        outputs.append(model(**kwargs))
        return outputs[-1]

    was_precomputed, trainer.precompute_ref_logps = trainer.precompute_ref_logps, True
    try:
        result = DPOTrainer._compute_loss(trainer, recorded, inputs, return_outputs)
    finally:
        trainer.precompute_ref_logps = was_precomputed
    # An adapter that puts tokens of its own in front of the others lengthens the output.
    length = inputs["completion_mask"].size(1) - 1
    return TextForward(
        result,
        outputs[0].log_probs[:, -length:],
        torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]),
        trainer.router_aux_loss_coef * outputs[0].aux_loss if trainer.aux_loss_enabled else 0.0,
    )
