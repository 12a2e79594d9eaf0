# SPDX-License-Identifier: Apache-2.0
"""What a run and its data take on disk."""

from dataclasses import dataclass, replace

from trl_sipo.cost.memory import ADAM_BYTES
from trl_sipo.cost.step import StepCounts, StepPlan

STORED_BYTES = 2
"""Of a number in a cache, whose default is bfloat16."""
PICTURE_BYTES = 1.5
"""Of a pixel of a sample, as PNG: assumed; photographs take one to two."""
_DRAW_BYTES = 4


@dataclass(frozen=True)
class DiskPlan:
    """What of a run's settings decides its place on disk.

    Attributes:
        pairs: Of the training data; 0 if not known.
        prompts: Different ones among them.
        checkpoints: That there are at a time at most, beside the final model.
        optimizer: A key of `memory.ADAM_BYTES`.
        strategy: A member of `communication.STRATEGIES`, or "one process".
        grids: Sample grids of the run.
        grid_samples: Samples of one grid, base and current model.
        reference_draws: Of a precomputed reference, per pair; 0 without one.
        stores_predictions: Whether its predictions are kept beside its errors.
    """

    pairs: int = 0
    prompts: int = 0
    checkpoints: int = 1
    optimizer: str = "32 bits"
    strategy: str = "one process"
    grids: int = 0
    grid_samples: int = 0
    reference_draws: int = 0
    stores_predictions: bool = False


def disk_parts(counts: StepCounts, plan: StepPlan, disk: DiskPlan, size: tuple[int, int, int]) -> dict[str, float]:
    """Bytes by what they are for.

    Args:
        counts: Of `plan`.
        plan: The settings of one call.
        disk: Those of the run.
        size: Height and width in pixels and number of frames of a sample.
    """
    height, width, frames = size
    final = checkpoint_bytes(counts, plan, replace(disk, optimizer="none", strategy="one process"))
    drawn = disk.pairs * plan.arms * disk.reference_draws
    predicted = drawn * counts.latents * (4 if plan.precision == "float32" else 2)
    parts = {
        "cache of latents": disk.pairs * plan.arms * counts.latents * STORED_BYTES,
        "cache of prompts": disk.prompts * counts.conditioning * STORED_BYTES,
        "checkpoints": disk.checkpoints * checkpoint_bytes(counts, plan, disk),
        "final model": final,
        "samples": disk.grids * disk.grid_samples * height * width * frames * PICTURE_BYTES,
        "reference errors": drawn * _DRAW_BYTES,
        "reference predictions": predicted if disk.stores_predictions else 0,
    }
    return {name: float(bytes_) for name, bytes_ in parts.items() if bytes_}


def checkpoint_bytes(counts: StepCounts, plan: StepPlan, disk: DiskPlan) -> float:
    """Of one checkpoint: a LoRA, or the pipeline, with the optimiser's state; FSDP adds a copy of the weights."""
    state = ADAM_BYTES[disk.optimizer] * counts.trained
    if plan.lora_rank is not None:
        return 4 * counts.trained + state
    copies = 2 if disk.strategy == "FSDP2" else 1
    return 4 * counts.trained * copies + state + counts.vae + counts.text_encoders
