# SPDX-License-Identifier: Apache-2.0
"""The sentences of the report follow from the numbers, whichever way they fall."""

from dataclasses import asdict, replace

import pytest

from trl_sipo.demo.settings import FULL, QUICK, DemoSettings, Part
from trl_sipo.demo.summary import MEASURES, aggregate, verdict
from trl_sipo.errors import ConfigurationError

BASE = {"accuracy": 0.9, "frechet_distance": 10.0, "diversity": 0.8}


def run(arm: str, seed: int, accuracies: list[float], **last: float) -> dict:
    """A run's result with the given accuracies over the steps; the other measures of the last step by name."""
    records = [{"step": 100 * i, **dict.fromkeys(MEASURES, 0.5), "accuracy": a} for i, a in enumerate(accuracies)]
    records[-1].update(last)
    return {"arm": arm, "seed": seed, "records": records}


def summary_of(runs: list[dict]) -> dict:
    return {"parts": {"off_policy": {"methods": aggregate(runs, BASE)}}, "base": BASE, "settings": asdict(FULL)}


def test_aggregate_takes_the_last_step_and_the_spread_over_seeds():
    methods = aggregate([run("dpo", 0, [0.9, 0.95, 0.2]), run("dpo", 1, [0.9, 0.9, 0.6])], BASE)
    final = methods["dpo"]["final"]["accuracy"]
    assert final == {"mean": pytest.approx(0.4), "min": 0.2, "max": 0.6, "values": [0.2, 0.6]}
    assert methods["dpo"]["best_accuracy"]["values"] == [0.95, 0.9]
    # Below half of the base's accuracy: the first run, not the second.
    assert methods["dpo"]["num_collapsed"] == 1


def test_the_verdict_claims_a_win_only_when_every_pair_of_seeds_shows_it():
    apart = [
        run("dpo", 0, [0.9, 0.1]),
        run("dpo", 1, [0.9, 0.2]),
        run("sipo", 0, [0.9, 0.7]),
        run("sipo", 1, [0.9, 0.8]),
    ]
    text = " ".join(verdict(summary_of(apart))["off_policy"])
    assert "SIPO ends above Diffusion-DPO in accuracy for every pair of seeds" in text
    assert "every run collapsed" in text and "no run collapsed" in text

    mixed = [
        run("dpo", 0, [0.9, 0.1]),
        run("dpo", 1, [0.9, 0.9]),
        run("sipo", 0, [0.9, 0.7]),
        run("sipo", 1, [0.9, 0.8]),
    ]
    text = " ".join(verdict(summary_of(mixed))["off_policy"])
    assert "overlap over the seeds" in text and "1 of 2 runs collapsed" in text

    worse = [run("dpo", 0, [0.9, 0.9]), run("sipo", 0, [0.9, 0.3], frechet_distance=40.0)]
    text = " ".join(verdict(summary_of(worse))["off_policy"])
    assert "SIPO ends below Diffusion-DPO" in text and "higher (worse)" in text


def test_the_verdict_says_so_when_a_well_chosen_beta_is_as_good():
    runs = [run("sipo", 0, [0.9, 0.7]), run("dpo_best", 0, [0.9, 0.95])]
    assert "not a better optimum" in verdict(summary_of(runs))["off_policy"][-1]
    runs = [run("sipo", 0, [0.9, 0.97]), run("dpo_best", 0, [0.9, 0.95])]
    assert "ends above Diffusion-DPO at its best one" in verdict(summary_of(runs))["off_policy"][-1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arms": ("dpo", "sipoo")}, "sipoo"),
        ({"arms": ()}, "arms"),
        ({"seeds": ()}, "seed"),
        ({"source": "elsewhere"}, "elsewhere"),
    ],
)
def test_parts_that_make_no_sense_are_refused(changes, named):
    with pytest.raises(ConfigurationError, match=named):
        replace(QUICK.parts[0], **changes)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigurationError, match="max_steps=0"):
        replace(QUICK, max_steps=0)


def test_the_quick_demo_is_the_full_one_with_fewer_runs():
    assert replace(QUICK, parts=FULL.parts) == FULL
    assert QUICK.num_runs == 2 < FULL.num_runs
    assert isinstance(FULL, DemoSettings) and all(isinstance(part, Part) for part in FULL.parts)
