# SPDX-License-Identifier: Apache-2.0
"""What each GPU sends over the network in a training step, by strategy.

`benchmarks/scaling.py` holds this arithmetic to what real runs send.

Collectives are rings: to give all of S bytes to N processes, or to add up S bytes and leave each a part, a process
sends (N - 1) / N * S; an all-reduce is both. A process receives as much as it sends.
"""

from dataclasses import dataclass

STRATEGIES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")


@dataclass(frozen=True)
class Workload:
    """What is trained, and how.

    Attributes:
        parameters: Of the denoiser, those of a LoRA included.
        trained: Those that have a gradient.
        outside: Those that belong to none of the repeated blocks, which are the units of FSDP2.
        weight_bytes: Of a number that FSDP2 and ZeRO-3 gather: 2 in bf16.
        gradient_bytes: Of a number of a gradient: FSDP2 and DeepSpeed add up in the precision of the weights that they
            gather, DDP in that of the weights that are trained, which is float32.
        has_reference_pass: Whether the reference is computed in the step, and not read from a bank.
        accumulation: Forward and backward passes per step.
    """

    parameters: int
    trained: int
    outside: int
    weight_bytes: int = 2
    gradient_bytes: int = 2
    has_reference_pass: bool = True
    accumulation: int = 1


def sent_per_step(strategy: str, work: Workload, processes: int) -> dict[str, float]:
    """Bytes that each process sends in one step of the optimiser, by purpose.

    Args:
        strategy: One of `STRATEGIES`.
        processes: How many, each with a GPU.
    """
    share = (processes - 1) / processes
    gathered = {name: share * size for name, size in _gathered(strategy, work).items()}
    if strategy == "DDP":
        return {"gradients": 2 * share * 4 * work.trained}
    gradients = share * work.gradient_bytes * work.trained
    if strategy == "FSDP2":
        return {**gathered, "gradients": gradients}
    # DeepSpeed adds up in every micro-batch, since a process keeps no gradients but its own part.
    gradients *= work.accumulation
    if strategy == "ZeRO-3":
        return {**gathered, "gradients": gradients}
    # ZeRO-2 gives all of them to every process, which drops the parts of the others: its default is one all-reduce
    # (`use_multi_rank_bucket_allreduce`).
    return {"gradients": 2 * gradients, "weights after the step": share * work.weight_bytes * work.trained}


def _gathered(strategy: str, work: Workload) -> dict[str, float]:
    """Bytes of the weights that FSDP2 and ZeRO-3 put together in a step, by pass.

    What belongs to no block FSDP2 puts together once, in the forward pass, and keeps for the backward pass; that of a
    reference it keeps from step to step, or from the reference to the policy where both are one model.
    """
    blocks = work.parameters - (work.outside if strategy == "FSDP2" else 0)
    passes = {"weights, policy forward": work.parameters, "weights, policy backward": blocks}
    if work.has_reference_pass:
        passes["weights, reference"] = blocks
    return {name: work.accumulation * work.weight_bytes * count for name, count in passes.items()}
