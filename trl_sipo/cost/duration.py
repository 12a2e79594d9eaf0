# SPDX-License-Identifier: Apache-2.0
"""How long operations take on a device: a range between what is hoped for and what is feared.

An operation takes its arithmetic or its memory traffic, whichever is longer, since eager PyTorch runs one after the
other; together they take no less than the host needs to start them.
"""

import math
from dataclasses import dataclass

from trl_sipo.cost.devices import FAST, SLOW, Device, Efficiency
from trl_sipo.cost.operations import Operation, Operations

# AdamW reads weight, gradient and two moments and writes all but the gradient, in float32; clipping reads the gradient
# twice and writes it once.
UPDATE_BYTES = 4 * (4 + 3 + 3)

CALIBRATED_WITHIN = 1.25
"""The range of a machine that was measured, as a factor up and down: assumed, for what is not a forward pass."""


@dataclass(frozen=True)
class Seconds:
    """A range of seconds.

    Attributes:
        low: If the device is used well.
        high: If it is not.
    """

    low: float
    high: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.low + other.low, self.high + other.high)

    @property
    def middle(self) -> float:
        """The geometric mean of both ends."""
        return math.sqrt(self.low * self.high)

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(self.low * factor, self.high * factor)


def computing(operations: Operations, device: Device, *, allows_tf32: bool = False) -> Seconds:
    """What the operations take, on their own; of a machine that was measured, around the middle times its ratio."""
    low, high = (_computing(operations, device, efficiency, allows_tf32) for efficiency in (FAST, SLOW))
    if device.calibration is None:
        return Seconds(low, high)
    middle = Seconds(low, high).middle * device.calibration
    return Seconds(middle / CALIBRATED_WITHIN, middle * CALIBRATED_WITHIN)


def _computing(operations: Operations, device: Device, efficiency: Efficiency, allows_tf32: bool) -> float:
    busy = 0.0
    for operation, count in operations.items():
        moving = operation.traffic / (device.bandwidth * efficiency.bandwidth)
        busy += count * max(moving, _arithmetic(operation, device, efficiency, allows_tf32))
    return max(busy, operations.total() * efficiency.launch)


def _arithmetic(operation: Operation, device: Device, efficiency: Efficiency, allows_tf32: bool) -> float:
    if operation.flops == 0:
        return 0.0
    return operation.flops / (device.rate(operation, allows_tf32) * efficiency.shares[operation.kind])


def updating(parameters: float, device: Device) -> Seconds:
    """What clipping and AdamW take for so many parameters."""
    seconds = parameters * UPDATE_BYTES / device.bandwidth
    return Seconds(seconds / FAST.bandwidth, seconds / SLOW.bandwidth)


def sending(sent: float, rate: float, busy: Seconds) -> Seconds:
    """What is left of sending so many bytes, beside a step that computes for `busy`.

    Args:
        sent: By one process in one step.
        rate: Published bytes a second.
        busy: What the step computes meanwhile.
    """
    low, high = (sent / (rate * efficiency.link) for efficiency in (FAST, SLOW))
    return Seconds(max(low - FAST.overlap * busy.low, (1 - FAST.overlap) * low), high)
