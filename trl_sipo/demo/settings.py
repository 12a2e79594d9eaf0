# SPDX-License-Identifier: Apache-2.0
"""What the demo runs: the methods, their seeds and their length. One place for every number of the protocol."""

from dataclasses import dataclass, field, replace
from typing import Any

from trl_sipo.core.beta import check_beta
from trl_sipo.errors import ConfigurationError


@dataclass(frozen=True)
class Arm:
    """One method of the comparison.

    Attributes:
        label: For tables and figures.
        method: Key of `trl_sipo.trainer.methods.METHODS`.
        overrides: Fields of the method's configuration.
        uses_best_beta: Whether it runs at the demo's best beta instead of the small one.
        strength: The field that says how strongly the pairs act, or how strongly the reference holds; None: there is
            none.
        source: The only source whose data the method takes, a key of `SOURCES`; None: it takes pairs of images.
    """

    label: str
    method: str
    overrides: dict[str, Any] = field(default_factory=dict)
    uses_best_beta: bool = False
    strength: str | None = "beta"
    source: str | None = None


# The arms after the fifth are ablations and baselines, run on request (`--arms`, `--baselines`).
ARMS = {
    "dpo": Arm("Diffusion-DPO", "dpo"),
    "dpo_cm": Arm("DPO-C&M", "sipo", {"objective": "dpo_cm"}),
    "sipo": Arm("SIPO", "sipo"),
    "poly_dpo": Arm("Poly-DPO", "poly-dpo"),
    "dpo_best": Arm("Diffusion-DPO, best beta", "dpo", uses_best_beta=True),
    "mask_only": Arm("dynamic mask only", "sipo", {"reweight": False}),
    "weight_only": Arm("SIPO weight, no mask", "sipo", {"mask": False}),
    "sipo_50": Arm("SIPO, w on the paper's 50-step grid", "sipo", {"importance_steps": 50}),
    "sipo_redraws": Arm("SIPO, masked levels drawn anew", "sipo", {"mask_redraws": 3}),
    "static_mask": Arm("static mask", "dpo", {"timestep_range": [0.06, 1.0]}),
    "ipo": Arm("IPO", "dpo", {"loss_type": "ipo"}),
    "hinge": Arm("hinge loss", "dpo", {"loss_type": "hinge"}),
    "robust": Arm("Robust DPO", "dpo", {"loss_type": "robust", "label_smoothing": 0.1}),
    "sft": Arm("SFT", "sft", strength=None),
    "kto": Arm("Diffusion-KTO", "kto"),
    "mapo": Arm("MaPO", "mapo", {"beta": 0.1}),  # the weight of a margin, which no matched beta says
    "d3po": Arm("D3PO", "d3po", source="trajectories"),
    "spin": Arm("SPIN-Diffusion", "dpo", source="self_play"),
}
DEFAULT_ARMS = ("dpo", "dpo_cm", "sipo", "poly_dpo", "dpo_best")

# What is added to the seed of the data for the held-out pairs.
HELD_OUT_SEED_OFFSET = 1000

# Where the pairs of a comparison come from.
SOURCES = {
    "off_policy": "pairs that the base model could not have drawn: photographs, turned and mirrored",
    "on_policy": "pairs sampled from the base model itself",
    "trajectories": "pairs of what the base model went through while sampling, step by step",
    "self_play": "one round of self-play: photographs, each against a sample of the base model, not ranked",
}

# Between the name of an arm and another strength: "dpo@200".
STRENGTH_MARK = "@"


def find_arm(name: str) -> Arm:
    """The arm of a key of `ARMS`, or of a key with a strength of its own, such as "dpo@200".

    Raises:
        ConfigurationError: No such arm, one without a strength, or a strength that is no number.
    """
    key, mark, value = name.partition(STRENGTH_MARK)
    if key not in ARMS:
        raise ConfigurationError(f"Unknown arm {key!r}; known are {', '.join(ARMS)}.")
    arm = ARMS[key]
    if not mark:
        return arm
    if arm.strength is None:
        raise ConfigurationError(f"{name!r}: {arm.label} has no strength. Write {key!r}.")
    try:
        strength = float(value)
    except ValueError as error:
        raise ConfigurationError(f"{name!r}: {value!r} is no number. Write for example '{key}@200'.") from error
    overrides = {**arm.overrides, arm.strength: strength}
    return replace(arm, label=f"{arm.label}, {arm.strength} {strength:g}", overrides=overrides, uses_best_beta=False)


@dataclass(frozen=True)
class Part:
    """One comparison of methods, all on the same pairs.

    Attributes:
        source: Key of `SOURCES`.
        arms: Keys of `ARMS`.
        seeds: Training seeds; per seed every arm sees the same noise.
    """

    source: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ConfigurationError(f"Unknown source {self.source!r}; known are {', '.join(SOURCES)}.")
        if not self.arms:
            raise ConfigurationError(f"At least one arm is needed; known arms are {', '.join(ARMS)}.")
        for name in self.arms:
            if find_arm(name).source not in (None, self.source):
                raise ConfigurationError(
                    f"The arm {name!r} learns from data of its own, not from those of {self.source!r}: run it with "
                    "`trl-sipo demo --baselines`."
                )
        if not self.seeds:
            raise ConfigurationError("At least one seed is needed.")

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Arm and seed of every run; seed by seed, so that a demo stopped early has all arms of the first seeds."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]


@dataclass(frozen=True)
class DemoSettings:
    """The protocol of one demo.

    Attributes:
        parts: The comparisons.
        max_steps: Optimiser steps of each run.
        eval_every: Steps between two measurements; the first is taken before training.
        batch_size: Pairs per step.
        learning_rate: Of AdamW, constant.
        beta: The matched small beta, in the Diffusion-DPO convention.
        best_beta: The beta of the arm `dpo_best`.
        importance_steps: Steps of the grid on which importance weights are defined; that of the demo's sampler.
        poly_alpha: Of the Poly-DPO arm.
        num_pairs, num_held_out: Training pairs, and held-out pairs over prompts that training does not see.
        samples_per_prompt: Images per prompt in a measurement.
        num_inference_steps, guidance_scale: Sampler of the pairs and the measurements; a scale of 1 is no guidance.
        data_seed: Seed of the pairs.
        measures_start: Whether the first measurement is taken; it is that of the base model, by the same noise.
        measures_weights: Whether w(t) is measured at the end of each run.
    """

    parts: tuple[Part, ...]
    max_steps: int = 300
    eval_every: int = 75
    batch_size: int = 16
    learning_rate: float = 5e-5
    beta: float = 2.0
    best_beta: float = 2000.0
    importance_steps: int = 10
    poly_alpha: float = 2.0
    num_pairs: int = 384
    num_held_out: int = 48
    samples_per_prompt: int = 2
    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    data_seed: int = 0
    measures_start: bool = True
    measures_weights: bool = True

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.eval_every < 1:
            raise ConfigurationError(f"max_steps={self.max_steps} and eval_every={self.eval_every} must be positive.")
        check_beta(self.beta)
        check_beta(self.best_beta)


FULL = DemoSettings((Part("off_policy", DEFAULT_ARMS, (0, 1, 2)), Part("on_policy", ("dpo", "sipo"), (0, 1))))
QUICK = replace(FULL, parts=(Part("off_policy", ("dpo", "sipo"), (0,)),))

# The video demo: a step on clips takes longer, so there are fewer of them, and of fewer pairs.
VIDEO_FULL = DemoSettings(
    (Part("off_policy", ("dpo", "sipo", "dpo_best"), (0, 1)),),
    max_steps=160,
    eval_every=40,
    batch_size=8,
    learning_rate=1e-4,
)
VIDEO_QUICK = replace(
    VIDEO_FULL,
    parts=(Part("off_policy", ("dpo", "sipo"), (0,)),),
    max_steps=60,
    eval_every=60,
    num_pairs=192,
    num_held_out=16,
    samples_per_prompt=1,
)
