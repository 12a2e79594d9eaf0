# SPDX-License-Identifier: Apache-2.0
"""What does data do that the model could not have drawn? (Fig. 3 and 4, Sec. 3.1 of the SIPO paper)

    python benchmarks/paper/on_off_policy.py

The importance weights of the base model on pairs of both kinds, by forward passes alone; then Diffusion-DPO and SIPO
on both at a small beta, and off-policy also near the paper's (1000 and 5000 for images, Table A1).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawing import over_steps
from options import guarded
from protocol import SMALL_BETA, SOURCES, arm
from question import BASE, Question, ask
from runs import Workplace

METHODS = ("DPO", "SIPO")
AT = (SMALL_BETA, 2000.0)
#: Noise levels at which weights are measured, in the middle of equal parts of the schedule.
LEVELS = 50
#: Steps of the grid that defines w: the sampler's of the demo, and the paper's (with which Fig. 4 is what it is).
GRIDS = (10, 50)


def label(method: str, beta: float, source: str) -> str:
    """The name of an arm."""
    return f"{method}, beta {beta:g}, {source.replace('_', '-')}"


def weights(place: Workplace) -> dict[str, Any]:
    """w of the base on held-out pairs of each source, per pair and by level."""
    from tempfile import TemporaryDirectory

    from trl_sipo import DiffusionSIPOConfig
    from trl_sipo.adapters import adapter_for
    from trl_sipo.data.loading import load_preference_dataset
    from trl_sipo.demo.images import IMAGES
    from trl_sipo.online.off_policy import off_policy_weights

    files = place.files
    adapter = adapter_for(IMAGES.load_pipeline(files.base_pipeline))
    found: dict[str, Any] = {"threshold": 0.9, "sources": {}}
    for source in SOURCES:
        pairs = load_preference_dataset(str(files.held_out_pairs(source)))
        found["sources"][source] = {}
        for grid in GRIDS:
            with TemporaryDirectory() as folder:
                args = DiffusionSIPOConfig(folder, importance_steps=grid, use_cpu=True, bf16=False, report_to=[])
            singles = [
                off_policy_weights(
                    adapter,
                    pairs.select([index]),
                    args,
                    policy=0,
                    data=0,
                    num_pairs=1,
                    num_levels=LEVELS,
                    seed=index,
                )
                for index in range(len(pairs))
            ]
            curve = [sum(column) / len(singles) for column in zip(*(one.mean_by_time for one in singles), strict=True)]
            found["sources"][source][str(grid)] = {
                "times": list(singles[0].times),
                "curve": curve,
                "by_pair": [one.mean for one in singles],
                "masked_share": sum(one.masked_share for one in singles) / len(singles),
            }
    return {"weights": found}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """w by level, and the outcomes over steps."""
    from trl_sipo.reporting.figures import importance_weight_figure

    sources = result["weights"]["sources"]
    times = next(iter(sources.values()))["50"]["times"]
    curves = {
        f"{source.replace('_', '-')}, grid of {grid}": part[str(grid)]["curve"]
        for source, part in sources.items()
        for grid in GRIDS
    }
    options = {"title": "w(t) of the base model on held-out pairs", "level_label": "time (0 is clean, 1 pure noise)"}
    figure = importance_weight_figure(times, curves, result["weights"]["threshold"], **options)
    figure.savefig(path.with_name(f"{path.stem}_weights.png"), dpi=110)
    over_steps(result, list(QUESTION.arms), ("second_accuracy", "frechet_distance", "masked_share"), path)


ARMS = [(method, beta, "off_policy") for beta in AT for method in METHODS]
ARMS += [(method, SMALL_BETA, "on_policy") for method in METHODS]
QUESTION = Question(
    "on_off_policy",
    "On- and off-policy data",
    {label(*key): arm(key[0], key[1], source=key[2]) for key in ARMS},
    [
        *[(label(*key), BASE) for key in ARMS],
        *[(label("SIPO", *key), label("DPO", *key)) for method, *key in ARMS if method == "DPO"],
        *[(label(method, SMALL_BETA, "off_policy"), label(method, SMALL_BETA, "on_policy")) for method in METHODS],
    ],
    more=weights,
    draw=draw,
)

if __name__ == "__main__":
    guarded(ask, QUESTION)
