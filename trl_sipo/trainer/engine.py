# SPDX-License-Identifier: Apache-2.0
"""What is settled about transformers' Trainer and Accelerate, the engine under the training step."""

from typing import Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig


def settle_arguments(args: DiffusionPreferenceConfig) -> None:
    """Set, in place, what transformers' Trainer would otherwise decide to the harm of preference pairs.

    Raises:
        ConfigurationError: Several processes would have other batches than the settings and the first lines of the run
            say, or batches of different sizes.
    """
    if args.world_size > 1:
        _check_batches(args.accelerator_config)
    # Else accelerate would join and cut the batches of a stream itself, which it cannot do with lists of prompts.
    args.accelerator_config.dispatch_batches = False
    # Else the order of the data would hang on the global random state when training starts.
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    # Else each batch would wait for the one before it to be done with; only memory that is pinned can be sent ahead.
    args.accelerator_config.non_blocking = args.dataloader_pin_memory
    # Else transformers would log a loss of NaN as the mean of the losses before it. Steps that are left out have none.
    args.logging_nan_inf_filter = args.on_nonfinite == "skip"


def _check_batches(config: Any) -> None:
    if config.split_batches:
        raise ConfigurationError(
            "`accelerator_config` sets `split_batches` to true, which divides a batch among the processes: a step "
            "would take fewer pairs than `per_device_train_batch_size` says. Remove it, and set "
            "`per_device_train_batch_size` to what one process takes."
        )
    if not config.even_batches:
        raise ConfigurationError(
            "`accelerator_config` sets `even_batches` to false: at the end of an epoch some processes would have "
            "fewer pairs than others, or none, and they would wait for one another. Remove it; "
            "`dataloader_drop_last=True` leaves the pairs out that do not fill a batch."
        )
