# SPDX-License-Identifier: Apache-2.0
"""What `test_fsdp.py` and `test_deepspeed.py` run in every process, on CPUs over gloo."""

import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import METHODS, logged, lora, make_trainer, preference_pairs
from trl_sipo.errors import ConfigurationError

# The benchmark of scaling needs it too, and is no package.
_CPU_FSDP = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "cpu_fsdp.py"))
LAUNCHED, offer_fsdp_on_cpus = _CPU_FSDP["LAUNCHED"], _CPU_FSDP["offer_fsdp_on_cpus"]


def offer_deepspeed(stage: int) -> None:
    """As `accelerate launch --config_file zero<stage>.yaml`, in float32. It takes CPUs, if they are not asked for."""
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ.update(
        DS_ACCELERATOR="cpu",
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage),
        ACCELERATE_DEEPSPEED_ZERO3_INIT="false",
        ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true",
    )


# Strategy -> how a process asks for it, and the settings of the trainer that go with it on CPUs.
ENGINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one process": (lambda: None, {}),
    "FSDP2": (offer_fsdp_on_cpus, {}),
    "DeepSpeed ZeRO-2": (lambda: offer_deepspeed(2), {"use_cpu": False, "ddp_backend": "gloo"}),
    "DeepSpeed ZeRO-3": (lambda: offer_deepspeed(3), {"use_cpu": False, "ddp_backend": "gloo"}),
}


def make(output: Path, method: str, kind: str, batch_size: int, **options: Any) -> Any:
    """A trainer of one kind of training, on 16 pairs."""
    settings = {"optim": "sgd", "learning_rate": 1e-2, "gradient_checkpointing": True, "max_steps": 4}
    pipeline = tiny_stable_diffusion()
    if kind == "trained_lora":
        torch.manual_seed(5)
        pipeline.unet = get_peft_model(pipeline.unet, lora(target_modules=["to_q", "to_v"], init_lora_weights=False))
    return make_trainer(
        next(one for one in METHODS if one.name == method),
        output,
        model=pipeline,
        is_lora=kind == "lora",
        pairs=preference_pairs(16, width=64),
        trainer_options={"eval_dataset": preference_pairs(7, seed=5)},
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2,
        **{**settings, **options},
    )


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """The trained weights, gathered by torch alone."""
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return {name: _whole(weight) for name, weight in trained.items()}


def _whole(weight: torch.Tensor) -> torch.Tensor:
    if isinstance(weight, DTensor):
        return weight.detach().full_tensor()
    if not hasattr(weight, "ds_id"):
        return weight.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


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
    parts = [getattr(part, "ds_tensor", part).numel() for part in local]
    return sum(parts) / sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)


def train(output: Path, engine: str, method: str, kind: str, batch_size: int, options: dict[str, Any]) -> None:
    """Train, evaluate and save."""
    ask, settings = ENGINES[engine]
    ask()
    output.mkdir(parents=True, exist_ok=True)
    trainer = make(output, method, kind, batch_size, **settings, **options)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    report(trainer, output)
    trainer.end()


def resume(output: Path, engine: str, method: str, kind: str, batch_size: int, options: dict[str, Any]) -> None:
    """Continue a run of `train` from its second step, in a process that knows nothing of it."""
    ask, settings = ENGINES[engine]
    ask()
    trainer = make(output, method, kind, batch_size, **settings, **options)
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


def refuse_under_deepspeed(output: Path, stage: int) -> None:
    """The same, of what differs."""
    ask, settings = ENGINES[f"DeepSpeed ZeRO-{stage}"]
    ask()
    arguments = (output, "dpo", "full", 4)
    with pytest.raises(ConfigurationError, match="would hold all of it"):
        make(*arguments, precompute_ref_log_probs=True, **settings)
    with pytest.raises(ConfigurationError, match="Use `eval_on_start=True`"):
        make(*arguments, **settings).evaluate()
    if stage == 3:
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "true"
        with pytest.raises(ConfigurationError, match="cuts up the text encoders"):
            make(*arguments, **settings)
