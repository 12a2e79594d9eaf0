# SPDX-License-Identifier: Apache-2.0
"""What a step takes: seconds, operations, and bytes kept for its backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from trl_sipo.cost.measuring import timed

_ATEN = torch.ops.aten


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Five products where the forward pass has two: the scores are computed again."""
    return sdpa_flop_count(query, key, value) * 5 // 2


# The attention of CPUs, which PyTorch does not count.
_CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class RepeatedStep:
    """A trainer's step on its first batch, again and again: forward, backward, clip, update.

    Args:
        trainer: Of this library, which has not trained.
        num_steps: Of the schedule of its learning rate.
    """

    def __init__(self, trainer: Any, num_steps: int = 1000):
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(num_steps)
        # What `train()` does before its first step.
        if trainer.args.activation_checkpointing:
            trainer.model.activation_checkpointing_enable()
        trainer.model_wrapped = trainer.model = trainer.accelerator.prepare_model(trainer.model)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        self.batch = next(iter(trainer.get_train_dataloader()))
        self.model = trainer.model

    def __call__(self) -> None:
        """The step."""
        trainer = self.trainer
        trainer.training_step(trainer.model, dict(self.batch))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()


def measure(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, device))
    return seconds


def count_flops(step: Callable[[], None]) -> int:
    """Floating point operations of the matrix products, convolutions and attention of one step, as they are run.

    An addition and a multiplication count as two. What checkpointing computes again counts again.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        step()
    return counter.get_total_flops()


def activation_bytes(step: Callable[[], None], model: nn.Module, device: str) -> int:
    """What one step keeps for its backward pass, at the peak: saved tensors but weights; on CUDA the allocator's.

    Args:
        step: The step.
        model: Whose parameters do not count.
        device: Of the model.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    saved = _SavedBytes({parameter.untyped_storage().data_ptr() for parameter in model.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        step()
    return saved.peak


class _SavedBytes:
    """Bytes of the storages that autograd holds, now and at most.

    Args:
        known: Addresses of storages that do not count.
    """

    def __init__(self, known: set[int]):
        self.known = known
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps in the place of a tensor."""
        return tensor if tensor.untyped_storage().data_ptr() in self.known else _Held(tensor, self)

    def unpack(self, packed: Any) -> Tensor:
        """The tensor again."""
        return packed if isinstance(packed, Tensor) else packed.tensor

    def hold(self, address: int, size: int, change: int) -> None:
        """One holder of a storage more or less."""
        before = self.holders.get(address, 0)
        self.holders[address] = before + change
        if before == 0 or before + change == 0:
            self.now += change * size
            self.peak = max(self.peak, self.now)


class _Held:
    """One saved tensor; forgotten when autograd lets go of it."""

    def __init__(self, tensor: Tensor, counter: _SavedBytes):
        self.tensor, self.counter = tensor, counter
        storage = tensor.untyped_storage()
        self.storage = (storage.data_ptr(), storage.nbytes())
        counter.hold(*self.storage, 1)

    def __del__(self):
        self.counter.hold(*self.storage, -1)
