# SPDX-License-Identifier: Apache-2.0
"""What a run costs on a device: whether it fits, how long it takes, and what would have to change."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from trl_sipo.cost.communication import Workload, sent_per_step
from trl_sipo.cost.devices import Device
from trl_sipo.cost.disk import DiskPlan
from trl_sipo.cost.duration import NO_TIME, Seconds, computing, sending, updating
from trl_sipo.cost.memory import memory_parts
from trl_sipo.cost.step import StepCounts, StepPlan

GPUS_PER_MACHINE = 8
HOUR = 3600.0


@dataclass(frozen=True)
class RunPlan:
    """What decides the cost of a run.

    Attributes:
        step: One call of the model.
        disk: What is kept.
        strategy: A member of `communication.STRATEGIES`; of no effect with one process.
        processes: GPUs.
        accumulation: Calls per step.
        optimizer: A key of `memory.ADAM_BYTES`.
        steps: Of the optimiser.
        allows_tf32: Whether products of matrices in float32 may take TF32.
        reference_samples: That pass the reference before training (`precompute_ref_log_probs`).
        grid_samples: That pass the denoiser without gradients for sample grids: samples x sampler steps x guidance.
        network: Bytes a second between machines, per GPU and in one direction.
    """

    step: StepPlan
    disk: DiskPlan
    strategy: str = "DDP"
    processes: int = 1
    accumulation: int = 1
    optimizer: str = "32 bits"
    steps: int = 1
    allows_tf32: bool = False
    reference_samples: int = 0
    grid_samples: int = 0
    network: float = 25e9

    @property
    def pairs_per_step(self) -> int:
        """Of all processes, in one step of the optimiser."""
        return self.step.pairs * self.accumulation * self.processes


@dataclass(frozen=True)
class Estimate:
    """The cost of a run on some devices of one kind.

    Attributes:
        device: Its name.
        memory: Bytes at the peak of a step, by what they are for.
        room: Bytes of the device.
        step: Seconds of a step.
        run: Seconds of the whole run: steps, reference errors before training, sample grids.
        note: What is particular to the device; empty if nothing is.
    """

    device: str
    memory: dict[str, float]
    room: float
    step: Seconds
    run: Seconds
    note: str = ""

    @property
    def peak(self) -> float:
        """Bytes at the peak of a step."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.peak <= self.room


def estimate(counts: StepCounts, run: RunPlan, device: Device) -> Estimate:
    """The cost of a run on `run.processes` such devices.

    Args:
        counts: Of `run.step`.
        run: What is planned.
        device: On which.
    """
    step = step_seconds(counts, run, device)
    sample = _forward_of_a_sample(counts, run, device)
    before = sample * (run.reference_samples / run.processes)
    # The first process draws the grids, and the others wait.
    grids = sample * run.grid_samples
    no_bfloat16 = run.step.precision == "bfloat16" and not device.has_bfloat16
    return Estimate(
        device=device.name,
        memory=memory_of(counts, run),
        room=device.memory,
        step=step,
        run=step * run.steps + before + grids,
        note="has no bfloat16: set fp16" if no_bfloat16 else "",
    )


def memory_of(counts: StepCounts, run: RunPlan) -> dict[str, float]:
    """Bytes at the peak of a step by what they are for, on one device of the run."""
    return memory_parts(
        counts,
        run.step,
        strategy=run.strategy,
        processes=run.processes,
        accumulation=run.accumulation,
        optimizer=run.optimizer,
    )


def step_seconds(counts: StepCounts, run: RunPlan, device: Device) -> Seconds:
    """Of one step of the optimiser."""
    tf32, plan = run.allows_tf32, run.step
    call = computing(counts.policy, device, allows_tf32=tf32)
    if plan.has_reference:
        call += computing(counts.reference, device, allows_tf32=tf32)
    if plan.encodes:
        call += computing(counts.encoding, device, allows_tf32=tf32) * (plan.pairs * plan.arms)
    updated = counts.trained / (run.processes if _is_sharded(run) else 1)
    busy = call * run.accumulation + updating(updated, device)
    if run.processes == 1:
        return busy
    rate = device.link if run.processes <= GPUS_PER_MACHINE else min(device.link, run.network)
    return busy + sending(sum(sent_per_step(run.strategy, workload(counts, run), run.processes).values()), rate, busy)


def workload(counts: StepCounts, run: RunPlan) -> Workload:
    """What the processes send to one another."""
    is_lora = run.step.lora_rank is not None
    width = 4 if run.step.precision == "float32" else 2
    return Workload(
        parameters=counts.parameters + (counts.trained if is_lora else 0),
        trained=counts.trained,
        outside=counts.outside_blocks,
        weight_bytes=width,
        gradient_bytes=width,
        has_reference_pass=run.step.has_reference,
        accumulation=run.accumulation,
    )


def encoding_seconds(counts: StepCounts, run: RunPlan, device: Device) -> Seconds:
    """Of `trl-sipo encode` on one device: every image or clip through the VAE, in float32."""
    return computing(counts.encoding, device) * (run.disk.pairs * run.step.arms)


def _forward_of_a_sample(counts: StepCounts, run: RunPlan, device: Device) -> Seconds:
    if not (run.reference_samples or run.grid_samples):
        return NO_TIME
    return computing(counts.reference, device, allows_tf32=run.allows_tf32) * (1 / run.step.samples)


# ---------------------------------------------------------------------------------------- what would have to change


@dataclass(frozen=True)
class Change:
    """A setting that needs less memory.

    Attributes:
        words: For the user: the setting, and in brackets its price.
        run: The plan with it.
    """

    words: str
    run: RunPlan


def changes(run: RunPlan) -> Iterator[Change]:
    """Plans that need less and less memory, each with one change more than the one before; the cheapest first."""
    for words, applies, change in _CHANGES:
        if applies(run):
            run = change(run)
            yield Change(words, run)


def _of_step(**settings: Any) -> Callable[[RunPlan], RunPlan]:
    return lambda run: replace(run, step=replace(run.step, **settings))


def _is_sharded(run: RunPlan) -> bool:
    return run.processes > 1 and run.strategy != "DDP"


def _one_pair_at_a_time(run: RunPlan) -> RunPlan:
    return replace(run, step=replace(run.step, pairs=1), accumulation=run.accumulation * run.step.pairs)


def _as_lora(run: RunPlan) -> RunPlan:
    frozen = run.step.precision
    return replace(run, step=replace(run.step, lora_rank=16, frozen_precision=frozen))


_CHANGES: tuple[tuple[str, Callable[[RunPlan], bool], Callable[[RunPlan], RunPlan]], ...] = (
    ("`trl-sipo encode` first", lambda run: run.step.holds_encoders, _of_step(encodes=False, holds_encoders=False)),
    (
        "`gradient_checkpointing` (a third more time)",
        lambda run: not run.step.checkpointing,
        _of_step(checkpointing=True),
    ),
    (
        "`per_device_train_batch_size` 1, with more `gradient_accumulation_steps`",
        lambda run: run.step.pairs > 1,
        _one_pair_at_a_time,
    ),
    (
        "`split_pair_backward` (a fifth more time)",
        lambda run: run.step.arms == 2 and not run.step.split,
        _of_step(split=True),
    ),
    (
        "an optimiser of 8 bits (`optim` adamw_bnb_8bit)",
        lambda run: run.optimizer == "32 bits" and run.step.lora_rank is None,
        lambda run: replace(run, optimizer="8 bits"),
    ),
    (
        "`precompute_ref_log_probs` (no second model)",
        lambda run: run.step.lora_rank is None and run.step.has_reference and not _is_sharded(run),
        _of_step(has_reference=False),
    ),
    (
        "FSDP2",
        lambda run: run.processes > 1 and run.strategy in ("DDP", "ZeRO-2"),
        lambda run: replace(run, strategy="FSDP2"),
    ),
    ("a LoRA (`use_peft`) instead of all weights", lambda run: run.step.lora_rank is None, _as_lora),
    (
        "weights of 4 bits (`load_in_4bit`)",
        lambda run: run.step.lora_rank is not None and not run.step.is_quantized and not _is_sharded(run),
        _of_step(is_quantized=True),
    ),
)


def first_that_fits(
    run: RunPlan, room: float, counts_of: Callable[[StepPlan], StepCounts]
) -> tuple[list[str], RunPlan] | None:
    """The changes, put together, after which a run fits into so many bytes; `None`: these are not enough.

    Args:
        run: What is planned.
        room: Bytes of the device.
        counts_of: Counts a step.
    """
    words = []
    for change in changes(run):
        words.append(change.words)
        if sum(memory_of(counts_of(change.run.step), change.run).values()) <= room:
            return words, change.run
    return None
