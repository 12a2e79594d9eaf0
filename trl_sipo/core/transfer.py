# SPDX-License-Identifier: Apache-2.0
"""Copies from main memory to the training device for which the host does not wait.

A plain copy to a GPU waits until all that was queued there before it is done, so that nothing can be queued ahead.
"""

import torch
from torch import Tensor

# Devices to which a copy from pinned memory may be queued.
QUEUEING_DEVICES = ("cuda",)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`. From main memory to a GPU the copy is queued, from pinned memory.

    Only in this direction: what the host reads must have arrived.
    """
    if tensor.device.type != "cpu" or torch.device(device).type not in QUEUEING_DEVICES:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
