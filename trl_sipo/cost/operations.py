# SPDX-License-Identifier: Apache-2.0
"""Which operations a pass runs, with their floating point operations and the bytes that they read and write.

What a time is estimated from: an operation takes as long as its arithmetic or its memory traffic, whichever is longer
(the roofline model of Williams, Waterman and Patterson, 2009).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
_MAKES_NOTHING = frozenset("empty empty_like empty_strided new_empty new_empty_strided detach lift_fresh".split())
_CONVOLUTIONS = frozenset("convolution _convolution convolution_backward".split())
KINDS = ("matrix product", "convolution", "attention", "memory")
"""Of operations: three by what they compute, and all others, which take what their traffic takes."""


@dataclass(frozen=True)
class Operation:
    """One operation, as far as its time depends on it.

    Attributes:
        kind: A member of `KINDS`.
        flops: Floating point operations; an addition and a multiplication count as two.
        traffic: Bytes that it reads and writes.
        is_half: Whether it computes in 16 bits.
    """

    kind: str
    flops: int
    traffic: int
    is_half: bool


Operations = Counter[Operation]
"""How often each operation is run."""


class OperationCounter(TorchDispatchMode):
    """Counts the operations that are run while it is in force, on tensors with data or without."""

    def __init__(self):
        super().__init__()
        self.operations: Operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name not in _MAKES_NOTHING and not _is_view(func):
            rule = flop_registry.get(func._overloadpacket)
            flops = 0 if rule is None else rule(*args, **(kwargs or {}), out_val=result)
            kind = "memory" if rule is None else "convolution" if name in _CONVOLUTIONS else "matrix product"
            self.add(kind, flops, tree_leaves((args, kwargs, result)))
        return result

    def add(self, kind: str, flops: int, values: list[Any]) -> None:
        """Count an operation.

        Args:
            kind: A member of `KINDS`.
            flops: Floating point operations.
            values: Among them the tensors that it reads and writes.
        """
        tensors = [value for value in values if isinstance(value, Tensor)]
        # An expanded tensor is read again and again from where it is.
        traffic = sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)
        is_half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors)
        self.operations[Operation(kind, int(flops), traffic, is_half)] += 1


def _is_view(func: Any) -> bool:
    """Whether an operation gives a tensor in the memory of another, and computes nothing."""
    returns = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of the two products of fused attention, forward; backward there are five, the scores being computed again."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def total_flops(operations: Operations) -> int:
    """Of all operations together."""
    return sum(count * operation.flops for operation, count in operations.items())


def total_traffic(operations: Operations) -> int:
    """Bytes that all operations together read and write."""
    return sum(count * operation.traffic for operation, count in operations.items())


def times(operations: Operations, factor: int) -> Operations:
    """The same operations, run several times over."""
    return Counter({operation: factor * count for operation, count in operations.items()})


def to_rows(operations: Operations) -> list[list[Any]]:
    """For JSON: kind, floating point operations, bytes, whether in 16 bits, how often; in one order."""
    return sorted(
        [entry.kind, entry.flops, entry.traffic, entry.is_half, count] for entry, count in operations.items()
    )


def from_rows(rows: list[list[Any]]) -> Operations:
    """What [`to_rows`] wrote."""
    return Counter({Operation(*row[:4]): row[4] for row in rows})
