# SPDX-License-Identifier: Apache-2.0
"""What `test_fsdp.py` runs in every process: FSDP2 through Accelerate, on CPUs over gloo.

Accelerate makes DDP of FSDP where the processes have no GPU, with one `elif`. Here its state is told otherwise, and
all that follows is its own code, transformers' and torch's.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.trainer.runs import METHODS, logged, make_trainer, preference_pairs
from trl_sipo.errors import ConfigurationError

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def offer_fsdp_on_cpus() -> None:
    """As `accelerate launch --config_file fsdp2.yaml` would, if it took CPUs."""
    os.environ.update(LAUNCHED)
    make_state = AcceleratorState.__init__

    def with_fsdp(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make_state(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.fsdp_plugin, state.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if state.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state.mixed_precision)

    AcceleratorState.__init__ = with_fsdp


def make(output: Path, method: str, kind: str, batch_size: int, **options: Any) -> Any:
    """A trainer of one kind of training, on 16 pairs."""
    settings = {"optim": "sgd", "learning_rate": 1e-2, "gradient_checkpointing": True, "max_steps": 4}
    return make_trainer(
        next(one for one in METHODS if one.name == method),
        output,
        is_lora=kind == "lora",
        pairs=preference_pairs(16, width=64),
        trainer_options={"eval_dataset": preference_pairs(7, seed=5)},
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2,
        **{**settings, **options},
    )


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """The trained weights, gathered by torch alone."""
    trained = {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()
        for name, weight in trained.items()
    }


def report(trainer: Any, output: Path) -> None:
    """Write, from the first process, what a run gave."""
    weights = whole_weights(trainer)
    if trainer.is_world_process_zero():
        found = {"weights": weights, "loss": logged(trainer, "loss"), "metrics": trainer.state.log_history[-1]}
        found["shares"] = shares(trainer.model)
        ref_model = getattr(trainer.reference, "ref_model", None)
        found["reference_shares"] = None if ref_model is None else shares(ref_model)
        found["described"] = trainer.describe_run()
        torch.save(found, output / "result.pt")


def shares(model: torch.nn.Module) -> float:
    """The numbers of the weights that this process holds, as a share of all."""
    if isinstance(model, FSDPModule):
        model.reshard()  # what belongs to no block stays whole after an evaluation
    weights = list(model.parameters())
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return sum(part.numel() for part in local) / sum(weight.numel() for weight in weights)


def train(output: Path, method: str, kind: str, batch_size: int, options: dict[str, Any]) -> None:
    """Train, evaluate and save."""
    if "RANK" in os.environ:
        offer_fsdp_on_cpus()
    output.mkdir(parents=True, exist_ok=True)
    trainer = make(output, method, kind, batch_size, **options)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    report(trainer, output)
    trainer.end()


def resume(output: Path, method: str, kind: str, batch_size: int, options: dict[str, Any]) -> None:
    """Continue a run of `train` from its second step, in a process that knows nothing of it."""
    offer_fsdp_on_cpus()
    trainer = make(output, method, kind, batch_size, **options)
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    report(trainer, output)
    trainer.end()


def refuse(output: Path) -> None:
    """Everything that is not shown to work on a sharded model, or is known not to."""
    offer_fsdp_on_cpus()
    arguments = (output, "dpo", "full", 4)
    for options, message in (
        ({"precompute_ref_log_probs": True}, "would hold all of it"),
        ({"sync_ref_model": True}, "`sync_ref_model` is with plain data parallelism"),
        ({"sample_every_steps": 1, "sample_prompts": ["a cat"]}, "draws in one process"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make(*arguments, **options)
    for name, value, message in (
        ("FSDP_VERSION", "1", "FSDP 1 is not supported"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "Set it to FULL_STATE_DICT"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "text encoders of the others would stay empty"),
    ):
        os.environ[name] = value
        with pytest.raises(ConfigurationError, match=message):
            make(*arguments)
        os.environ[name] = LAUNCHED[name]
    with pytest.raises(ConfigurationError, match="Use `eval_on_start=True`"):
        make(*arguments).evaluate()
