# SPDX-License-Identifier: Apache-2.0
"""Counting the bytes and the operations of a training step, on tensors without data (device "meta") or with.

`count_step` runs a forward and a backward pass and follows every storage from its creation to its end. On the meta
device nothing is computed, so a model of any size is counted in seconds; what a GPU does differently there is stood in
for: fused attention, and autocast, which casts as on CUDA.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trl_sipo.cost.operations import OperationCounter, attention_flops

# The lists of CUDA's autocast, as far as denoisers call them; see "Autocast Op Reference" in PyTorch's documentation.
_CAST_DOWN = frozenset(
    "linear conv1d conv2d conv3d conv_transpose2d conv_transpose3d matmul __matmul__ mm bmm baddbmm addmm einsum "
    "scaled_dot_product_attention".split()
)
_CAST_UP = frozenset(
    "layer_norm group_norm rms_norm exp log pow __pow__ rsqrt reciprocal softplus softmax cumsum sum prod norm "
    "interpolate mse_loss".split()
)


class _FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient attention keep: inputs, output, and one float32 for each row of scores."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, counter: OperationCounter | None
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        # Heads behind tokens in memory, so that merging them is free.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        row_statistics = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, row_statistics)
        ctx.counter = counter
        if counter is not None:
            counter.add("attention", attention_flops(query, key, value), [query, key, value, mask, output])
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, _ = ctx.saved_tensors
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        if ctx.counter is not None:
            flops = attention_flops(query, key, value) * 5 // 2
            ctx.counter.add("attention", flops, [query, key, value, mask, output, grad, *grads])
        return *grads, None, None


def _attention(
    counter, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)  # the kernels add a mask to the scores
    return _FusedAttention.apply(query, key, value, attn_mask, counter)


class GpuStandIns(TorchFunctionMode):
    """On the meta device: fused attention, and CUDA's autocast to `autocast_dtype` unless it is None.

    Values do not exist there, so what depends on them is settled: a condition holds, and a mask selects everything
    (its negation nothing).

    Args:
        autocast_dtype: Of the autocast that is stood in for; `None`: there is none.
        counter: What counts the operations, to be told of attention.
    """

    def __init__(self, autocast_dtype: torch.dtype | None, counter: OperationCounter | None = None):
        super().__init__()
        self.autocast_dtype, self.counter = autocast_dtype, counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self.autocast_dtype is not None and name in _CAST_DOWN | _CAST_UP:
            dtype = self.autocast_dtype if name in _CAST_DOWN else torch.float32
            args, kwargs = tree_map_only(
                Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, (args, kwargs)
            )
        if name == "scaled_dot_product_attention":
            return _attention(self.counter, *args, **kwargs)
        if name == "__bool__":
            return True
        if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0][: 0 if hasattr(args[1], "is_negation") else None]
        result = func(*args, **kwargs)
        if name in ("__invert__", "bitwise_not"):
            result.is_negation = True
        return result


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, now and at most, of those that operations made.

    Args:
        existing: Tensors that do not count, such as a model's parameters.
    """

    def __init__(self, existing: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def backward(loss: Tensor) -> None:
    """`loss.backward()`, with [`GpuStandIns`] still in force when checkpointing recomputes a block.

    PyTorch's own entry hands itself to the mode, and switches it off meanwhile; hence straight to the engine.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    gradient = torch.ones_like(loss)
    engine.run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def count_step(
    model: torch.nn.Module,
    loss: Callable[[], Tensor],
    autocast_dtype: torch.dtype | None = None,
    counter: OperationCounter | None = None,
) -> dict[str, int]:
    """Bytes of one forward and backward pass, beside the model's parameters, buffers and the gradients that it has.

    Args:
        model: On the meta device, or any other; its gradients are left in place.
        loss: The forward pass, to a scalar; what it makes, inputs included, counts.
        autocast_dtype: Of the autocast that is stood in for; on the meta device only.
        counter: Where the operations are counted as well.

    Returns:
        `saved`: what the forward pass keeps for the backward pass; `peak`: the most that was alive at a time,
        the gradients of the trained parameters included.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    existing = [*model.parameters(), *model.buffers(), *gradients]
    is_meta = existing[0].device.type == "meta"
    assert is_meta or autocast_dtype is None, "with data, autocast itself is there"
    own = {tensor.untyped_storage()._cdata for tensor in existing}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with (
        GpuStandIns(autocast_dtype, counter) if is_meta else nullcontext(),
        LiveBytes(existing) as live,
        nullcontext() if counter is None else counter,
    ):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        backward(value)
    return {"saved": sum(saved.values()), "peak": live.peak}


def count_inference(
    module: torch.nn.Module,
    run: Callable[[], Any],
    autocast_dtype: torch.dtype | None = None,
    counter: OperationCounter | None = None,
) -> int:
    """Bytes at the peak of a pass without gradients, beside the module's parameters and buffers.

    Args:
        module: On the meta device.
        run: The pass; what it makes, inputs included, counts.
        autocast_dtype: Of the autocast that is stood in for.
        counter: Where the operations are counted as well.
    """
    with (
        torch.no_grad(),
        GpuStandIns(autocast_dtype, counter),
        LiveBytes([*module.parameters(), *module.buffers()]) as live,
        nullcontext() if counter is None else counter,
    ):
        run()
    return live.peak
