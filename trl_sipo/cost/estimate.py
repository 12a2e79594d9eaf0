# SPDX-License-Identifier: Apache-2.0
"""What a run costs on a device: whether it fits, how long it takes, and what would have to change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trl_sipo.cost.communication import Workload, sent_per_step
from trl_sipo.cost.devices import Device
from trl_sipo.cost.disk import DiskPlan
from trl_sipo.cost.duration import Seconds, computing, sending, updating
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
        step: Seconds of a step; `None`: the device's rates are not known.
        run: Seconds of the whole run: steps, reference errors before training, sample grids; `None` as `step`.
        note: What is particular to the device; empty if nothing is.
    """

    device: str
    memory: dict[str, float]
    room: float
    step: Seconds | None
    run: Seconds | None
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
    step = step_seconds(counts, run, device) if device.has_rates else None
    no_bfloat16 = run.step.precision == "bfloat16" and not device.has_bfloat16
    return Estimate(
        device=device.name,
        memory=memory_of(counts, run),
        room=device.memory,
        step=step,
        run=None if step is None else step * run.steps + beside_steps(counts, run, device),
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


def _is_sharded(run: RunPlan) -> bool:
    return run.processes > 1 and run.strategy != "DDP"


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


def beside_steps(counts: StepCounts, run: RunPlan, device: Device) -> Seconds:
    """Of the reference errors before training, which the devices share, and of the sample grids, which one draws."""
    samples = run.reference_samples / run.processes + run.grid_samples
    return computing(counts.reference, device, allows_tf32=run.allows_tf32) * (samples / run.step.samples)


# ------------------------------------------------------------------------------------------ what would have to change


@dataclass(frozen=True)
class Change:
    """A setting that needs less memory.

    Attributes:
        words: For the user: the setting, and in brackets its price.
        applies: Whether it is possible, and not there yet.
        made: The plan with it.
    """

    words: str
    applies: Callable[[RunPlan], bool]
    made: Callable[[RunPlan], RunPlan]


def _of_step(**settings: Any) -> Callable[[RunPlan], RunPlan]:
    return lambda run: replace(run, step=replace(run.step, **settings))


def _one_pair_at_a_time(run: RunPlan) -> RunPlan:
    return replace(run, step=replace(run.step, pairs=1), accumulation=run.accumulation * run.step.pairs)


def _can_shard(run: RunPlan) -> bool:
    """What FSDP2 is refused with is not there (docs/source/distributed.md); fp16 may be exchanged."""
    is_plain = not (run.step.is_quantized or run.reference_samples or run.grid_samples)
    return is_plain and run.processes > 1 and run.strategy in ("DDP", "ZeRO-2")


def _shard(run: RunPlan) -> RunPlan:
    step = run.step if run.step.precision == "float32" else replace(run.step, precision="bfloat16")
    return replace(run, strategy="FSDP2", step=step)


# The cheapest first. Those that name another number of steps or a price in time say so.
CHANGES: tuple[Change, ...] = (
    Change(
        "`trl-sipo encode` first",
        lambda run: run.step.holds_encoders,
        _of_step(encodes=False, holds_encoders=False),
    ),
    Change(
        "`gradient_checkpointing` (a third more time)",
        lambda run: not run.step.checkpointing,
        _of_step(checkpointing=True),
    ),
    Change(
        "`per_device_train_batch_size` 1, with as many times more `gradient_accumulation_steps`",
        lambda run: run.step.pairs > 1,
        _one_pair_at_a_time,
    ),
    Change(
        "`split_pair_backward` (a fifth more time)",
        lambda run: run.step.arms == 2 and not run.step.split,
        _of_step(split=True),
    ),
    Change(
        "FSDP2, with `bf16`",
        _can_shard,
        _shard,
    ),
    Change(
        "`precompute_ref_log_probs` (no second model)",
        lambda run: run.step.lora_rank is None and run.step.has_reference and not _is_sharded(run),
        _of_step(has_reference=False),
    ),
    Change(
        "an optimiser of 8 bits (`optim` adamw_bnb_8bit)",
        lambda run: run.optimizer == "32 bits" and run.step.lora_rank is None,
        lambda run: replace(run, optimizer="8 bits"),
    ),
    Change(
        "a LoRA (`use_peft`) instead of all weights",
        lambda run: run.step.lora_rank is None,
        lambda run: replace(run, step=replace(run.step, lora_rank=16, frozen_precision=run.step.precision)),
    ),
    Change(
        "weights of 4 bits (`load_in_4bit`)",
        lambda run: run.step.lora_rank is not None and not run.step.is_quantized and not _is_sharded(run),
        _of_step(is_quantized=True),
    ),
)


def first_that_fits(
    run: RunPlan, device: Device, counts_of: Callable[[StepPlan], StepCounts]
) -> tuple[list[str], RunPlan] | None:
    """The first changes of `CHANGES` after which a run fits, less those that are not needed; `None`: it never does.

    Args:
        run: What is planned.
        device: On which; what it has no bfloat16 for is not advised.
        counts_of: Counts a step.
    """

    def fits(made: Sequence[Change]) -> bool:
        changed = _with(run, made)
        return sum(memory_of(counts_of(changed.step), changed).values()) <= device.memory

    def can_be_made(change: Change) -> bool:
        before = _with(run, made)
        if not change.applies(before):
            return False
        wanted = change.made(before).step.precision
        return device.has_bfloat16 or wanted in (before.step.precision, "float32", "float16")

    made: list[Change] = []
    for change in CHANGES:
        if can_be_made(change):
            made.append(change)
            if fits(made):
                break
    else:
        return None
    # The last is needed, since the others alone were not enough.
    for change in made[:-1]:
        others = [other for other in made if other is not change]
        if all(other.applies(_with(run, others[:place])) for place, other in enumerate(others)) and fits(others):
            made = others
    return [change.words for change in made], _with(run, made)


def _with(run: RunPlan, made: Sequence[Change]) -> RunPlan:
    for change in made:
        run = change.made(run)
    return run
