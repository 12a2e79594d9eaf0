# SPDX-License-Identifier: Apache-2.0
"""Which of the processes of a run this one is, also where there are no GPUs, and on which device it works."""

import os

import torch
from accelerate import PartialState

from trl_sipo.errors import ConfigurationError


def process_state() -> PartialState:
    """accelerate's state of this process, with the group of processes joined that torchrun or accelerate started.

    Left to itself, accelerate takes each of several processes without a GPU for the only one.
    """
    is_on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return PartialState(cpu=is_on_cpus)


def chosen_device(name: str | None = None) -> torch.device:
    """The device that a `--device` option names; without one the GPU of this process, if there is one.

    Raises:
        ConfigurationError: Not the name of a device, or of one that this machine has not.
    """
    if name is None:
        return process_state().device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        there = "cpu"
        if (kind := torch.accelerator.current_accelerator()) is not None:
            there += "".join(f", {kind.type}:{index}" for index in range(torch.accelerator.device_count()))
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"`--device {name}` cannot be used: {reason} This machine has {there}.") from error
    return device
