# SPDX-License-Identifier: Apache-2.0
"""What one GPU holds at the peak of a step, part by part, under each strategy of many GPUs."""

from trl_sipo.cost.step import StepCounts, StepPlan

RESERVE = 2 * 2**30
"""Bytes for the CUDA context, the libraries' workspaces and fragmentation."""
ADAM_BYTES = {"32 bits": 8, "8 bits": 2, "none": 0}
"""Of the optimiser's state, per trained parameter."""


def memory_parts(
    counts: StepCounts, plan: StepPlan, *, strategy: str, processes: int, accumulation: int, optimizer: str
) -> dict[str, float]:
    """Bytes at the peak of a step, by what they are for; their sum is the peak.

    Args:
        counts: Of `plan`.
        plan: The settings of one call.
        strategy: A member of `communication.STRATEGIES`; of no effect with one process.
        processes: GPUs.
        accumulation: Calls per step.
        optimizer: A key of `ADAM_BYTES`.
    """
    shards_weights = processes > 1 and strategy in ("FSDP2", "ZeRO-3")
    shards_state = processes > 1 and strategy != "DDP"
    weight_share = 1 / processes if shards_weights else 1.0
    state_share = 1 / processes if shards_state else 1.0
    gradients = 4 * counts.trained
    is_full = plan.lora_rank is None
    # DeepSpeed keeps the weights in 16 bits, and those that are trained in float32 beside them, cut up.
    has_master = shards_state and strategy != "FSDP2" and plan.precision != "float32"
    held = counts.weights / 2 if has_master and is_full else counts.weights
    half = 4 if plan.precision == "float32" else 2
    parts = {
        "weights": held * weight_share + (0 if is_full else 4 * counts.trained),
        "weights in float32 beside them": 4 * counts.trained * state_share if has_master else 0,
        "blocks put together": 2 * half * counts.largest_block if shards_weights else 0,
        "reference": 4 * counts.parameters * weight_share if is_full and plan.has_reference else 0,
        "optimiser": ADAM_BYTES[optimizer] * counts.trained * state_share,
        "gradients to be sent": gradients if processes > 1 and strategy == "DDP" else 0,
        "VAE and text encoders": counts.vae + counts.text_encoders if plan.holds_encoders else 0,
        "gradients and activations": _passing(counts, plan, gradients * state_share, accumulation),
        "reserve": RESERVE,
    }
    return {name: float(size) for name, size in parts.items() if size}


def _passing(counts: StepCounts, plan: StepPlan, kept: float, accumulation: int) -> float:
    """The largest of the passes of a step; in the first backward pass gradients come as activations go."""
    whole = 4 * counts.trained
    if accumulation == 1:
        own = max(counts.first_peak - whole + kept, kept)
        before = 0.0
    else:
        own, before = counts.later_peak + kept, kept
    encoding = counts.vae_peak if plan.encodes else 0
    return max(own, before + counts.reference_peak, before + encoding)
