# SPDX-License-Identifier: Apache-2.0
"""What is settled about transformers' Trainer and Accelerate, the engine under the training step."""

from accelerate import Accelerator

from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig


def settle_arguments(args: DiffusionPreferenceConfig) -> None:
    """Set, in place, what transformers' Trainer would otherwise decide to the harm of preference pairs."""
    # Else accelerate would join and cut the batches of a stream itself, which it cannot do with lists of prompts.
    args.accelerator_config.dispatch_batches = False
    # Else the order of the data would hang on the global random state when training starts.
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    # Else transformers would log a loss of NaN as the mean of the losses before it. Steps that are left out have none.
    args.logging_nan_inf_filter = args.on_nonfinite == "skip"


def check_engine(accelerator: Accelerator, *, is_fsdp_enabled: bool) -> None:
    """Raise [`ConfigurationError`] under an engine that shards the weights."""
    deepspeed = accelerator.state.deepspeed_plugin
    if is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3):
        raise ConfigurationError(
            "FSDP and DeepSpeed ZeRO-3 shard the weights, and saving sharded weights in diffusers' format is not "
            "supported yet. Use plain data parallelism (`accelerate launch --multi_gpu`) or ZeRO-2."
        )
