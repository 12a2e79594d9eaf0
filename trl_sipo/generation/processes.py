# SPDX-License-Identifier: Apache-2.0
"""Which of the processes of a run this one is, also where there are no GPUs."""

import os

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """accelerate's state of this process, with the group of processes joined that torchrun or accelerate started.

    Left to itself, accelerate takes each of several processes without a GPU for the only one.
    """
    is_on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return PartialState(cpu=is_on_cpus)
