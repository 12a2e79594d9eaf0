# SPDX-License-Identifier: Apache-2.0
"""What is settled about transformers' Trainer and Accelerate, the engine under the training step."""

from trl_sipo.trainer.base_config import DiffusionPreferenceConfig


def settle_arguments(args: DiffusionPreferenceConfig) -> None:
    """Set, in place, what transformers' Trainer would otherwise decide to the harm of preference pairs."""
    # Else accelerate would join and cut the batches of a stream itself, which it cannot do with lists of prompts.
    args.accelerator_config.dispatch_batches = False
    # Else the order of the data would hang on the global random state when training starts.
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    # Else each batch would wait for the one before it to be done with; only memory that is pinned can be sent ahead.
    args.accelerator_config.non_blocking = args.dataloader_pin_memory
    # Else transformers would log a loss of NaN as the mean of the losses before it. Steps that are left out have none.
    args.logging_nan_inf_filter = args.on_nonfinite == "skip"
