# SPDX-License-Identifier: Apache-2.0
"""The protocol of the paper's questions: every number that was fixed before the runs that are reported.

It was chosen on pilot runs with seed 100, which is none of `SEEDS`, and was frozen before the first reported run. Arms
were taken out twice, for want of time, and most of them put back later: `report.py` says which and when.
`beta` is in the convention of Diffusion-DPO; the paper's is this divided by 1000 (`docs/source/beta.md`).
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from runs import Run

from trl_sipo.demo.settings import FULL, DemoSettings, Part

#: Training seeds. The last two were added to every arm after the first three had been read, since intervals over three
#: decide little; tests are over prompts as well.
SEEDS = (0, 1, 2, 3, 4)
SOURCES = ("off_policy", "on_policy")

#: Three decades. The paper's sweep of 0.02 to 10 is 20 to 10000 here.
BETAS = (2.0, 20.0, 200.0, 2000.0)
#: Those of them that lie in the paper's sweep.
PAPER_BETAS = (20.0, 200.0, 2000.0)
#: Where Diffusion-DPO loses everything in the time that a run has, and a beta that is good for it.
SMALL_BETA, GOOD_BETA = 2.0, 200.0
#: Steps of 12 pairs; measurements of 256 images, 4 for each of 64 prompts.
STEPS, EVAL_EVERY = 100, 50
LONG_STEPS = 300
#: Table A1 gives Diffusion-DPO a beta of its own, here for video; Diffusion-DPO collapses with it in Table 1.
OWN_BETA = 2000.0

#: Paper's epsilon: of the clip, and through 1 - epsilon of the mask; those of Table A2.
CLIP_RANGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
#: Of the training labels, exchanged; and Poly-DPO's alpha. 0 is Diffusion-DPO.
FLIP_RATES = (0.0, 0.3)
ALPHAS = (-0.5, 0.0, 2.0, 8.0)

#: Accuracies closer than this are called alike.
MARGIN = 0.05
#: Of tests, after Holm's correction over the comparisons of a question, and of intervals.
LEVEL = 0.05

SETTINGS = replace(
    FULL,
    parts=tuple(Part(source, ("dpo",), SEEDS) for source in SOURCES),
    max_steps=STEPS,
    eval_every=EVAL_EVERY,
    batch_size=12,
    learning_rate=1e-4,
    samples_per_prompt=4,
    measures_start=False,
    measures_weights=False,
)
#: Does it run? A few steps on few pairs; the numbers mean nothing.
QUICK = replace(SETTINGS, num_pairs=40, num_held_out=8, batch_size=4, samples_per_prompt=1, num_inference_steps=3)
QUICK_STEPS = 4

#: Name of an arm -> method, and the fields that make it; in all of them beta is the question's.
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DPO": ("dpo", {}),
    "C&M": ("sipo", {"objective": "dpo_cm"}),
    "SIPO": ("sipo", {}),
    "dynamic mask": ("sipo", {"reweight": False}),
    "weight": ("sipo", {"mask": False}),
    # The paper's range; and where w of the base is below 0.9 on the grid of these runs, which is coarser.
    "static mask": ("dpo", {"timestep_range": [0.06, 1.0]}),
    "wide static mask": ("dpo", {"timestep_range": [0.36, 1.0]}),
    "SIPO, weight detached": ("sipo", {"weight_grad": False}),
    "Poly-DPO": ("poly-dpo", {}),
}


def arm(
    name: str,
    beta: float,
    *,
    source: str = "off_policy",
    steps: int = STEPS,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """A run of a method without its seed (0), which `with_seed` gives it.

    Off-policy runs of the small beta and long runs are measured on the way, all others only at the end, whichever
    question asks: so that questions share runs.

    Args:
        name: Key of `METHODS`.
        beta: In the convention of Diffusion-DPO.
        source: Of the pairs.
        steps: Of the optimiser.
        overrides: More fields of the method's configuration.
        options: More of `Run`.
    """
    method, fields = METHODS[name]
    merged = {"beta": beta, **fields, **(overrides or {})}
    is_watched = (beta == SMALL_BETA and source == "off_policy") or steps > STEPS
    return Run(method, source, 0, steps, EVAL_EVERY if is_watched else steps, merged, **options)


def with_seed(run: Run, seed: int, *, quick: bool) -> Run:
    """The same run with a training seed; a quick one takes two steps per measurement."""
    if quick:
        return replace(run, seed=seed, steps=QUICK_STEPS, eval_every=QUICK_STEPS // 2)
    return replace(run, seed=seed)


def settings(*, quick: bool) -> DemoSettings:
    """What all runs share."""
    return QUICK if quick else SETTINGS


def as_record(*, quick: bool) -> dict[str, Any]:
    """The protocol as it is written into each result."""
    shared = asdict(settings(quick=quick))
    kept = ("batch_size", "learning_rate", "importance_steps", "num_pairs", "num_held_out", "samples_per_prompt")
    return {
        **{name: shared[name] for name in kept},
        "sampler_steps": shared["num_inference_steps"],
        "margin": MARGIN,
        "level": LEVEL,
        "is_quick": quick,
    }
