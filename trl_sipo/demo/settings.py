# SPDX-License-Identifier: Apache-2.0
"""What the demo runs: the methods, their seeds and their length. One place for every number of the protocol."""

from dataclasses import dataclass, field, replace
from typing import Any

from trl_sipo.errors import ConfigurationError


@dataclass(frozen=True)
class Arm:
    """One method of the comparison.

    Attributes:
        label: For tables and figures.
        method: Key of `trl_sipo.scripts.train.METHODS`.
        overrides: Fields of the method's configuration.
        uses_best_beta: Whether it runs at the demo's best beta instead of the small one.
    """

    label: str
    method: str
    overrides: dict[str, Any] = field(default_factory=dict)
    uses_best_beta: bool = False


# The arms after the fifth are ablations, run on request (`--arms`).
ARMS = {
    "dpo": Arm("Diffusion-DPO", "dpo"),
    "dpo_cm": Arm("DPO-C&M", "sipo", {"objective": "dpo_cm"}),
    "sipo": Arm("SIPO", "sipo"),
    "poly_dpo": Arm("Poly-DPO", "poly-dpo"),
    "dpo_best": Arm("Diffusion-DPO, best beta", "dpo", uses_best_beta=True),
    "mask_only": Arm("dynamic mask only", "sipo", {"reweight": False}),
    "weight_only": Arm("SIPO weight, no mask", "sipo", {"mask": False}),
    "sipo_50": Arm("SIPO, w on the paper's 50-step grid", "sipo", {"importance_steps": 50}),
    "static_mask": Arm("static mask", "dpo", {"timestep_range": [0.06, 1.0]}),
}
DEFAULT_ARMS = ("dpo", "dpo_cm", "sipo", "poly_dpo", "dpo_best")


@dataclass(frozen=True)
class DemoSettings:
    """The protocol of one demo.

    Attributes:
        arms: Keys of `ARMS`.
        seeds: Training seeds; every arm sees the same pairs and, per seed, the same noise.
        max_steps: Optimiser steps of each run.
        eval_every: Steps between two measurements; the first is taken before training.
        batch_size: Pairs per step.
        learning_rate: Of AdamW, constant.
        beta: The matched small beta, in the Diffusion-DPO convention.
        best_beta: The beta of the arm `dpo_best`.
        importance_steps: Steps of the grid on which importance weights are defined; that of the demo's sampler.
        poly_alpha: Of the Poly-DPO arm.
        num_on_policy, num_off_policy: Training pairs sampled from the base, and made from photographs it cannot draw.
        num_held_out: Held-out pairs of each source, over prompts that training does not see.
        samples_per_prompt: Images per prompt in a measurement.
        num_inference_steps, guidance_scale: Sampler of the measurements.
        data_seed: Seed of the pairs.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    max_steps: int = 400
    eval_every: int = 100
    batch_size: int = 16
    learning_rate: float = 3e-4
    beta: float = 20.0
    best_beta: float = 2000.0
    importance_steps: int = 20
    poly_alpha: float = 2.0
    num_on_policy: int = 512
    num_off_policy: int = 0
    num_held_out: int = 64
    samples_per_prompt: int = 4
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    data_seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or not self.arms:
            raise ConfigurationError(f"Unknown arms {unknown}; known are {', '.join(ARMS)}.")
        if not self.seeds:
            raise ConfigurationError("At least one seed is needed.")
        if self.max_steps < 1 or self.eval_every < 1:
            raise ConfigurationError(f"max_steps={self.max_steps} and eval_every={self.eval_every} must be positive.")

    @property
    def num_runs(self) -> int:
        """Arms times seeds."""
        return len(self.arms) * len(self.seeds)


FULL = DemoSettings()
QUICK = replace(FULL, arms=("dpo", "sipo"), seeds=(0,), num_on_policy=256, num_held_out=32, samples_per_prompt=2)
