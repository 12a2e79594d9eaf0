# SPDX-License-Identifier: Apache-2.0
"""Which strategy a run was asked for, which one is in force, and an error where the two differ.

Launchers and engines fall back without a word: `accelerate launch --cpu --num_processes 2` starts one process,
torchrun on a machine without a GPU starts copies that never meet, FSDP that is asked for on CPUs becomes plain data
parallelism. Each of them trains, and none trains what was meant. What the run was asked for is read from the
environment that the launchers leave and from the arguments; what is in force, from Accelerate's state when the trainer
is made, and from the wrapped model itself before the first step.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from trl_sipo.adapters.wrappers import unwrap_denoiser
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.launcher import environment_before_launch

# By which launchers tell a process how many there are: torchrun and `accelerate launch`, the MPIs, `srun`.
_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_DATA_PARALLEL = ("no", "multi_")  # beginnings of the values of `DistributedType`
_HOW_TO_LAUNCH = (
    "On GPUs: `accelerate launch --num_processes N` or `torchrun --nproc_per_node N`. On CPUs: "
    "`ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N`, or torchrun with `use_cpu=True`."
)
_HOW_TO_BE_ALONE = "If this process is meant to train alone, set `WORLD_SIZE=1` in its environment."


@dataclass(frozen=True)
class Strategy:
    """How a model is spread over processes, and in which precision it runs.

    Attributes:
        name: "DDP", "FSDP2", "DeepSpeed ZeRO-2", ..., or "one process".
        processes: How many there are.
        device: Kind of device of this process, such as "cuda".
        precision: "no" (that of the weights), "bf16" or "fp16".
    """

    name: str
    processes: int
    device: str
    precision: str

    def __str__(self) -> str:
        spread = f"one process on {self.device}"
        if self.processes > 1 or self.name != "one process":
            spread = f"{self.name} on {self.processes} processes ({self.device})"
        precision = "the precision of the weights" if self.precision == "no" else f"{self.precision} mixed precision"
        return f"{spread}, {precision}"


def strategy_in_force(accelerator: Accelerator) -> Strategy:
    """What Accelerate says it does."""
    return Strategy(
        name=_name_of(accelerator),
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        precision=_precision_of(accelerator),
    )


def _name_of(accelerator: Accelerator) -> str:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    if not str(accelerator.distributed_type.value).lower().startswith(_DATA_PARALLEL):
        return str(accelerator.distributed_type.value)
    return "one process" if accelerator.num_processes == 1 else "DDP"


def _precision_of(accelerator: Accelerator) -> str:
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return str(accelerator.mixed_precision)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    is_on = {name: config.get(name, {}).get("enabled") for name in ("bf16", "fp16")}
    return next((name for name, enabled in is_on.items() if enabled is True), "no")


def check_strategy(
    args: Any,
    accelerator: Accelerator,
    environment: Mapping[str, str] = os.environ,
    before_launch: Callable[[], Mapping[str, str] | None] = environment_before_launch,
) -> None:
    """Raise [`ConfigurationError`] unless Accelerate does what the launcher and the arguments asked for.

    Args:
        args: The trainer's configuration.
        accelerator: The trainer's.
        environment: Of this process, as the launcher left it.
        before_launch: Gives that of `accelerate launch`, where it is the launcher.
    """
    strategy = strategy_in_force(accelerator)
    _check_processes(strategy, environment)
    _check_started(strategy, environment, before_launch)
    _check_sharding(args, strategy, environment)
    _check_precision(args, strategy, environment)


def launched_processes(environment: Mapping[str, str]) -> int:
    """How many processes the launcher says there are; 1 where nothing does."""
    # `srun --ntasks 8 --pty bash`: the shell is the first task, and the others have ended.
    is_shell = "SLURM_PTY_PORT" in environment and environment.get("SLURM_PROCID") == "0"
    names = [name for name in _WORLD_SIZES if not (is_shell and name.startswith("SLURM_"))]
    return next((int(environment[name]) for name in names if environment.get(name)), 1)


def _check_processes(strategy: Strategy, environment: Mapping[str, str]) -> None:
    launched = launched_processes(environment)
    if launched != strategy.processes:
        raise ConfigurationError(
            f"The launcher says that there are {launched} processes, but this one knows of {strategy.processes}: "
            f"{launched} copies of the run would train without meeting. {_HOW_TO_LAUNCH} {_HOW_TO_BE_ALONE}"
        )


def _check_started(
    strategy: Strategy,
    environment: Mapping[str, str],
    before_launch: Callable[[], Mapping[str, str] | None],
) -> None:
    # Written by `accelerate launch` where it was told of several processes and has no launcher for them. What was
    # exported before is no request.
    address = ("MASTER_ADDR", "MASTER_PORT")
    if strategy.processes > 1 or environment.keys() & {"LOCAL_RANK", "WORLD_SIZE"} or address[0] not in environment:
        return
    before = before_launch()
    if before is not None and any(environment.get(name) != before.get(name) for name in address):
        raise ConfigurationError(
            "`accelerate launch` was told of several processes and started one: on CPUs it does not start more. "
            f"{_HOW_TO_LAUNCH} {_HOW_TO_BE_ALONE}"
        )


def _check_sharding(args: Any, strategy: Strategy, environment: Mapping[str, str]) -> None:
    asked = {
        "FSDP": bool(args.fsdp) or _is_on(environment, "ACCELERATE_USE_FSDP"),
        "DeepSpeed": bool(args.deepspeed) or _is_on(environment, "ACCELERATE_USE_DEEPSPEED"),
    }
    for engine, is_asked in asked.items():
        if is_asked and not strategy.name.startswith(engine):
            raise ConfigurationError(
                f"{engine} was asked for, but {strategy} is in force: Accelerate offers {engine} on GPUs under a "
                "launcher, and falls back without a word otherwise. Start with `accelerate launch --config_file` and "
                "a GPU for each process, or ask for plain data parallelism."
            )


def _check_precision(args: Any, strategy: Strategy, environment: Mapping[str, str]) -> None:
    asked = _asked_precision(args)
    launcher = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    # A launcher's "no" is its default and asks for nothing.
    if asked != strategy.precision or launcher not in ("no", asked):
        raise ConfigurationError(
            f"The arguments ask for the mixed precision {asked!r} (`bf16`, `fp16`), the launcher for {launcher!r} "
            f"(`mixed_precision`), and {strategy.precision!r} is in force. Set both to the same."
        )


def _asked_precision(args: Any) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "no"


def _check_precision_since(args: Any, strategy: Strategy) -> None:
    """Accelerate keeps the precision for the whole process: that of the trainer which was made last."""
    asked = _asked_precision(args)
    if asked not in ("no", strategy.precision):  # one without mixed precision does not look at it
        raise ConfigurationError(
            f"This trainer was made for {asked!r}, but {strategy.precision!r} is in force since another one was made "
            "in this process with another `bf16` or `fp16`. Make the one that is to be trained after it."
        )


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true", "yes")


def check_prepared(trainer: Any) -> None:
    """Raise [`ConfigurationError`] unless the model was wrapped for the strategy that is in force.

    Args:
        trainer: A diffusion preference trainer whose model is ready for the first step.
    """
    strategy, model = strategy_in_force(trainer.accelerator), trainer.model_wrapped
    kind = next((name for name in _IS_WRAPPED if strategy.name.startswith(name)), None)
    if kind is None:
        raise ConfigurationError(f"{strategy.name} is in force, which is not supported: use one of {[*_IS_WRAPPED]}.")
    models = {"policy": model}
    if kind == "FSDP2" and (ref_model := getattr(trainer.reference, "ref_model", None)) is not None:
        models["reference"] = ref_model
    for role, module in models.items():
        if not _IS_WRAPPED[kind](getattr(module, "_orig_mod", module)):
            raise ConfigurationError(
                f"{strategy} was to be in force, but the {role} is a {type(module).__name__} that is not wrapped for "
                "it: each process would train, or hold, a model of its own. Make a new trainer, and do not prepare "
                "its model with another Accelerator."
            )
    _check_precision_since(trainer.args, strategy)
    _check_checkpointing(trainer.args, model)


def _is_sharded(module: torch.nn.Module) -> bool:
    """Whether FSDP2 holds every weight in parts; those that cannot be cut, as of four bits, are whole."""
    if not isinstance(module, FSDPModule):
        return False
    module.reshard()  # after an evaluation, what belongs to no block is still whole
    weights = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    return all(isinstance(weight, DTensor) for weight in weights)


# Beginning of the name of a strategy -> whether a module is wrapped for it.
_IS_WRAPPED = {
    "one process": lambda module: not isinstance(module, FSDPModule),  # under a launcher Accelerate wraps it for DDP
    "DDP": lambda module: isinstance(module, DistributedDataParallel),
    "FSDP2": _is_sharded,
    "DeepSpeed": lambda module: type(module).__name__ == "DeepSpeedEngine",
}


def _check_checkpointing(args: Any, model: torch.nn.Module) -> None:
    denoiser = unwrap_denoiser(model)
    is_on = denoiser.is_gradient_checkpointing or any(isinstance(part, CheckpointWrapper) for part in model.modules())
    if args.gradient_checkpointing and not is_on:
        raise ConfigurationError(
            f"`gradient_checkpointing=True`, but the {type(denoiser).__name__} keeps all its activations. Set it to "
            "false, or do not switch it off on the model."
        )


class StrategyCallback(TrainerCallback):
    """Looks at the wrapped model before the first step.

    Args:
        trainer: A diffusion preference trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """The model is prepared, and nothing is trained yet."""
        check_prepared(self.trainer)
