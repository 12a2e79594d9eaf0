# SPDX-License-Identifier: Apache-2.0
"""The protocol of the frontier: every number that is fixed before a test run is made.

A cell is a setting in which methods are compared: a base, where the pairs come from, whether labels are flipped, and
what is trained. A method is tried at several values of its own knob; what is measured on the way gives the knob
"steps" to all of them. Tuning runs, on the shipped base and with seeds of their own, show which values trace a
method's frontier; `freeze` writes these into `reports/beyond/protocol.json`, and test runs are made by that file.
`beta` is in the convention of Diffusion-DPO.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from trl_sipo.demo.settings import FULL, Part

TUNING_SEEDS = (100,)
TEST_SEEDS = (0, 1, 2, 3, 4)
#: Of cells that no claim rests on.
FEW_SEEDS = TEST_SEEDS[:2]

#: Optimiser steps of 12 pairs, and those after which 256 images are measured.
MEASURED_AT = (15, 30, 60, 120)
LEARNING_RATE, FAST = 3e-5, 1e-4
LORA_RANK, LORA_LEARNING_RATE = 8, 3e-4
NOISY = 0.3

SETTINGS = replace(
    FULL,
    parts=(Part("off_policy", ("dpo",), (0,)), Part("on_policy", ("dpo",), (0,))),
    max_steps=MEASURED_AT[-1],
    eval_every=MEASURED_AT[-1],
    batch_size=12,
    learning_rate=LEARNING_RATE,
    samples_per_prompt=4,
    measures_start=False,
    measures_weights=False,
)
#: Does it run? The numbers mean nothing.
QUICK = replace(SETTINGS, num_pairs=40, num_held_out=8, batch_size=4, samples_per_prompt=2, num_inference_steps=3)
QUICK_STEPS = (3, 6)
#: So much faster, a few steps are far enough for what held in every run to show.
QUICK_RATE = 10.0


@dataclass(frozen=True)
class Cell:
    """A setting in which methods are compared.

    Attributes:
        base: Key of `bases.BASES`.
        source: Of the pairs.
        flip_rate: Share of the training labels that are exchanged.
        is_lora: Whether a LoRA is trained, or all weights.
    """

    base: str
    source: str
    flip_rate: float = 0.0
    is_lora: bool = False

    @property
    def name(self) -> str:
        """Of files and figures: "shipped, on_policy"."""
        extras = ["noisy labels"] * (self.flip_rate > 0) + ["LoRA"] * self.is_lora
        return ", ".join([self.base, self.source, *extras])


@dataclass(frozen=True)
class Arm:
    """A method at one value of its knob.

    Attributes:
        method: Whose frontier it belongs to.
        label: The value, for people.
        trainer: Key of `trl_sipo.trainer.methods.METHODS`.
        overrides: Fields of the configuration.
        candidate: Key of `candidates.CANDIDATES`; empty: the library as it is.
        rounds: Rounds of new on-policy pairs; 1: the pairs stay.
    """

    method: str
    label: str
    trainer: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    candidate: str = ""
    rounds: int = 1


MAIN_CELLS = tuple(
    Cell(base, source) for base in ("shipped", "second", "weak") for source in ("on_policy", "off_policy")
)
MORE_CELLS = tuple(
    Cell("shipped", source, flip_rate=flip_rate, is_lora=is_lora)
    for source in ("on_policy", "off_policy")
    for flip_rate, is_lora in ((NOISY, False), (0.0, True))
)
TUNING_CELLS = (Cell("shipped", "on_policy"), Cell("shipped", "off_policy"))


def _arm(method: str, trainer: str, label: str, kappa: float, candidate: str, **fields: Any) -> Arm:
    overrides = {**fields, **({"proximal_kappa": kappa} if kappa else {})}
    parts = [label, *([f"kappa {kappa:g}"] if kappa else [])]
    parts += [f"lr {fields['learning_rate']:g}"] if "learning_rate" in fields else []
    return Arm(method, ", ".join(parts), trainer, overrides, candidate)


def _dpo(method: str, beta: float, kappa: float = 0.0, candidate: str = "", **fields: Any) -> Arm:
    return _arm(method, "dpo", f"beta {beta:g}", kappa, candidate, beta=beta, **fields)


def _sipo(method: str, beta: float, clip_range: float, kappa: float = 0.0, candidate: str = "", **fields: Any) -> Arm:
    label = f"beta {beta:g}, clip {clip_range:g}"
    return _arm(method, "sipo", label, kappa, candidate, beta=beta, clip_range=clip_range, **fields)


#: What tuning tries.
ARMS: Sequence[Arm] = (
    *(_dpo("DPO", beta) for beta in (2.0, 20.0, 200.0, 2000.0)),
    *(_dpo("DPO", beta, learning_rate=FAST) for beta in (200.0, 2000.0)),
    *(_sipo("SIPO", beta, clip) for beta, clip in ((2.0, 0.1), (20.0, 0.1), (200.0, 0.1), (20.0, 0.3))),
    *(_sipo("SIPO", beta, 0.1, learning_rate=FAST) for beta in (200.0, 2000.0)),
    *(_dpo("proximal", 20.0, kappa) for kappa in (0.1, 0.25, 0.5, 1.0)),
    *(_dpo("proximal", 200.0, kappa) for kappa in (0.1, 0.25, 0.5)),
    *(
        _dpo("proximal", beta, kappa, learning_rate=FAST)
        for beta, kappa in ((200.0, 0.1), (200.0, 0.05), (2000.0, 0.1))
    ),
    _sipo("SIPO + proximal", 20.0, 0.1, 0.25),
    *(Arm("SFT", f"lr {rate:g}", "sft", {"learning_rate": rate}) for rate in (LEARNING_RATE, FAST)),
    *(Arm("KTO", f"beta {beta:g}", "kto", {"beta": beta}) for beta in (20.0, 200.0)),
    _dpo("kappa schedule", 20.0, 0.5, "kappa_schedule"),
    _dpo("kappa by level", 20.0, 0.5, "kappa_by_level"),
    _dpo("winner anchor", 20.0, 0.5, "winner_anchor"),
    *(_dpo("loser anchor", 20.0, kappa, "loser_anchor") for kappa in (0.1, 0.25)),
    _dpo("moving reference", 20.0, 0.5, "moving_reference"),
    _sipo("soft trust region", 20.0, 0.1, candidate="soft_trust_region"),
    *(replace(_dpo("rounds", 20.0, kappa), rounds=3) for kappa in (0.25, 0.5)),
    # What new pairs do by themselves.
    *(replace(_dpo("DPO in rounds", beta), rounds=3) for beta in (200.0, 2000.0)),
)
#: Does it rest, or only fall slowly? The same beta for all, and the large one that is said to be safe.
LONG_MEASURED_AT, LONG_SEEDS = (120, 250, 500, 1000), TEST_SEEDS[:3]
LONG_CELLS = MAIN_CELLS[:2]
LONG_ARMS: Sequence[Arm] = (
    _dpo("DPO", 20.0),
    _dpo("DPO", 2000.0),
    _sipo("SIPO", 20.0, 0.1),
    _dpo("proximal", 20.0, 0.5),
)
#: Added after the test, and so part of no frozen number: more of what other methods can be set to, which tuning left
#: out or did not try, as it tried most settings of the proximal term. In the on-policy cells.
MORE_SETTINGS: Sequence[Arm] = (
    *(_dpo("DPO", beta) for beta in (200.0, 2000.0)),
    *(_dpo("DPO", beta, learning_rate=FAST) for beta in (500.0, 5000.0)),
    _dpo("DPO", 2000.0, learning_rate=3 * FAST),
    *(_sipo("SIPO", beta, 0.1, learning_rate=FAST) for beta in (200.0, 2000.0)),
    *(_arm("KTO", "kto", f"beta {beta:g}", 0.0, "", beta=beta, learning_rate=FAST) for beta in (200.0, 2000.0)),
)
#: Changes that are tried: tested where they could move the frontier, on bases that tuning has not seen.
CANDIDATES = (
    "SIPO + proximal", "kappa schedule", "kappa by level", "winner anchor", "loser anchor", "moving reference",
    "soft trust region", "rounds", "DPO in rounds",
)  # fmt: skip
CANDIDATE_CELLS = (Cell("second", "on_policy"), Cell("weak", "on_policy"))
#: Settings of a method that are tested: of those whose frontiers are compared, and of the others.
MAX_SETTINGS = {"DPO": 3, "SIPO": 3, "proximal": 3}
#: Among them, whatever tuning says: all at the same small beta, and the proximal term where it is bounded.
ALWAYS = {"DPO": "beta 20", "SIPO": "beta 20, clip 0.1", "proximal": "beta 20, kappa 0.5"}
MAX_SETTINGS_OF_OTHERS = 1
#: Not made for a LoRA (its reference is the base itself), or for pairs that are not the policy's.
ONLY_FULL, ONLY_ON_POLICY = ("moving reference",), ("rounds", "DPO in rounds")

#: What the headline rests on, as (method, label) of `ARMS`: it is trained anew within ten minutes on two cores.
HEADLINE_CELL, HEADLINE_SEEDS = Cell("shipped", "on_policy"), (0, 1)
HEADLINE_ARMS = (
    ("DPO", "beta 20"),
    ("DPO", "beta 200, lr 0.0001"),
    ("DPO", "beta 2000, lr 0.0001"),
    ("SIPO", "beta 20, clip 0.1"),
    ("proximal", "beta 20, kappa 0.5"),
    ("proximal", "beta 200, kappa 0.1, lr 0.0001"),
)


def measured_at(arm: Arm, *, quick: bool = False) -> tuple[int, ...]:
    """Steps after which a run is measured; of one in rounds, at the end of each."""
    if arm.rounds == 1:
        return QUICK_STEPS if quick else MEASURED_AT
    last = QUICK_STEPS[-1] * arm.rounds if quick else MEASURED_AT[-1]
    return tuple(last * number // arm.rounds for number in range(1, arm.rounds + 1))


def applies(arm: Arm, cell: Cell) -> bool:
    """Whether a method is made for a cell."""
    if arm.method in ONLY_FULL and cell.is_lora:
        return False
    if arm.method in CANDIDATES and cell not in (*CANDIDATE_CELLS, *TUNING_CELLS):
        return False
    return arm.method not in ONLY_ON_POLICY or (cell.source == "on_policy" and not cell.flip_rate)


def as_record(arms: Sequence[Arm]) -> dict[str, Any]:
    """The protocol of test runs with these arms, as it is frozen."""
    shared = asdict(SETTINGS)
    kept = ("batch_size", "importance_steps", "num_pairs", "num_held_out", "samples_per_prompt", "num_inference_steps")
    return {
        **{name: shared[name] for name in kept},
        "learning_rate": LEARNING_RATE,
        "lora": {"rank": LORA_RANK, "learning_rate": LORA_LEARNING_RATE},
        "measured_at": list(MEASURED_AT),
        "tuning_seeds": list(TUNING_SEEDS),
        "test_seeds": list(TEST_SEEDS),
        "few_seeds": list(FEW_SEEDS),
        "main_cells": [asdict(cell) for cell in MAIN_CELLS],
        "more_cells": [asdict(cell) for cell in MORE_CELLS],
        "arms": [asdict(arm) for arm in arms],
        "long": {
            "measured_at": list(LONG_MEASURED_AT),
            "seeds": list(LONG_SEEDS),
            "cells": [asdict(cell) for cell in LONG_CELLS],
            "arms": [asdict(arm) for arm in LONG_ARMS],
        },
    }
