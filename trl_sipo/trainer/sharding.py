# SPDX-License-Identifier: Apache-2.0
"""A denoiser whose weights are spread over processes: what may be asked of it, its reference, and its whole weights.

FSDP2 and DeepSpeed ZeRO-3 keep a part of every weight in each process. Diffusers' format is whole, so weights are
gathered into a twin of the model to be saved, and spread again when they are loaded. The twin is made before the model
is sharded, and has no memory of its own.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.adapters.wrappers import repeated_blocks
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.strategy import strategy_in_force

SHARDING = ("FSDP2", "DeepSpeed ZeRO-3")

# Sharded model -> what it was before, without memory.
_TWINS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def prepare_sharding(trainer: Any) -> None:
    """Check that what is asked of a trainer goes with a sharded model, before it is one, and keep its twin.

    Args:
        trainer: Initialised as far as its `args`, `adapter`, `model` and `accelerator`.

    Raises:
        ConfigurationError: Names what does not, and the way out. Under other strategies nothing is checked.
    """
    strategy = strategy_in_force(trainer.accelerator).name
    if strategy.startswith("FSDP"):
        _check_fsdp_plugin(trainer.accelerator.state.fsdp_plugin)
        _wrap_blocks(trainer.accelerator.state.fsdp_plugin, trainer.model)
    if strategy == "DeepSpeed ZeRO-3" and trainer.accelerator.state.deepspeed_plugin.zero3_init_flag:
        raise ConfigurationError(
            "`zero3_init_flag: true` cuts up the text encoders too, and nothing puts them together again. Set it to "
            "false, as in examples/accelerate_configs/zero3.yaml."
        )
    if strategy.startswith(("FSDP", "DeepSpeed")) and trainer.args.precompute_ref_log_probs:
        raise ConfigurationError(
            f"Not under {strategy}: `precompute_ref_log_probs` runs before the engine has the model, and would hold "
            "all of it. Leave it out, or train with plain data parallelism (DDP)."
        )
    if strategy not in SHARDING:
        return
    _check_settings(trainer, strategy)
    _TWINS[trainer.model] = _without_memory(trainer.model)


def _check_fsdp_plugin(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ConfigurationError("FSDP 1 is not supported; set `fsdp_version: 2`.")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ConfigurationError(
            f"`fsdp_state_dict_type` is {plugin.state_dict_type}, but weights are saved in the format of diffusers, "
            "which is whole. Set it to FULL_STATE_DICT."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigurationError(
            "`fsdp_cpu_ram_efficient_loading: true` loads weights in the first process alone, and the text encoders "
            "of the others would stay empty. Set it to false."
        )


def _check_settings(trainer: Any, strategy: str) -> None:
    args = trainer.args
    refused = {
        "`sync_ref_model` is": args.sync_ref_model,
        "`sample_every_steps` draws in one process, and the others would not take part: sample": bool(
            args.sample_every_steps
        ),
        "`fp16` is not tested: use `bf16`, or train": args.fp16,
        "weights of 4 or 8 bits are": bool(getattr(trainer.adapter.denoiser, "is_quantized", False)),
        "this model calls a part of its blocks for one pair and another for the next, so processes would wait for "
        "each other: train": not trainer.adapter.calls_all_blocks,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ConfigurationError(f"Not under {strategy}: {what} with plain data parallelism (DDP).")


def _wrap_blocks(plugin: Any, model: nn.Module) -> None:
    """Make the denoiser's repeated blocks the units of FSDP2, unless the user named others.

    Without units all weights would be gathered at once. Those that diffusers names may be of another variant of the
    model, which Accelerate takes for an error.
    """
    if plugin.transformer_cls_names_to_wrap is None and plugin.auto_wrap_policy is not None:
        plugin.transformer_cls_names_to_wrap = repeated_blocks(model)


def shard_reference(ref_model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Cut a frozen reference up block by block, as the policy; TRL alone would make one unit of all of it."""
    return fsdp2_prepare_model(accelerator, ref_model)


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds parts of the weights only (`ds_id`: DeepSpeed ZeRO-3)."""
    return isinstance(model, FSDPModule) or any(hasattr(weight, "ds_id") for weight in model.parameters())


@contextmanager
def whole(adapter: BackboneAdapter, model: nn.Module) -> Iterator[nn.Module]:
    """Lend the model with whole weights, to be saved by the first process; every process takes part.

    A model that is not sharded is lent itself. Of a LoRA the weights that are trained are whole, and others have no
    memory. While it is lent it is the adapter's denoiser.
    """
    if not is_sharded(model):
        yield model
        return
    weights = _gather(model)
    twin = copy.deepcopy(_TWINS[model])
    if dist.get_rank() == 0:
        twin.load_state_dict(weights, strict=not isinstance(model, PeftModel), assign=True)
        _check_complete(twin)
    denoiser = adapter.denoiser
    adapter.install_denoiser(twin)
    try:
        yield twin
    finally:
        adapter.install_denoiser(denoiser)


@contextmanager
def refilled(model: nn.Module) -> Iterator[nn.Module]:
    """Lend the model with whole weights, to be filled by the first process; they are spread when the block ends.

    A model that is not sharded is lent itself.
    """
    if not is_sharded(model):
        yield model
        return
    twin = copy.deepcopy(_TWINS[model])
    for name, weight in list(twin.named_parameters()):
        if weight.requires_grad:
            path, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(path), leaf, nn.Parameter(torch.empty_like(weight, device="cpu")))
    yield twin
    _spread(model, {name: weight.detach() for name, weight in twin.named_parameters() if weight.requires_grad})


def is_filling() -> bool:
    """Whether this process is the one that reads what [`refilled`] spreads, or there are no others."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _gather(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by name, on the CPU of the first process; of a LoRA those that are trained."""
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        return _gather_deepspeed(model)
    is_lora = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_lora)
    return get_model_state_dict(model, options=options)


def _gather_deepspeed(model: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    is_lora, weights = isinstance(model, PeftModel), {}
    for name, weight in model.named_parameters():
        if weight.requires_grad or not is_lora:
            with deepspeed.zero.GatheredParameters([weight]):  # one at a time: all at once may not fit
                if dist.get_rank() == 0:
                    weights[name] = weight.detach().cpu().clone()
    if not is_lora:
        names = model.state_dict().keys()
        weights |= {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in names}
    return weights


def _spread(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a sharded model the whole weights of the first process."""
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        import deepspeed

        for name, weight in model.named_parameters():
            if name in weights:
                with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                    if dist.get_rank() == 0:
                        weight.data.copy_(weights[name])
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights if dist.get_rank() == 0 else {}, options=options)


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy whose weights and buffers have a shape and a dtype, and no numbers."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _check_complete(twin: nn.Module) -> None:
    missing = [name for name, weight in twin.named_parameters() if weight.requires_grad and weight.is_meta]
    assert not missing, f"{len(missing)} trained weights were not gathered: {', '.join(missing[:3])}"
