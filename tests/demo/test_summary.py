# SPDX-License-Identifier: Apache-2.0
"""The sentences of the report follow from the numbers, whichever way they fall."""

from dataclasses import asdict, replace

import pytest

from trl_sipo.demo.images import IMAGES
from trl_sipo.demo.report import table
from trl_sipo.demo.settings import FULL, QUICK, DemoSettings, Part
from trl_sipo.demo.summary import aggregate, measures, verdict
from trl_sipo.errors import ConfigurationError

CEILING = {"primary": {kind: {"class": 0.94, "colour": 1.0, "both": 0.93} for kind in ("real", "reconstructed")}}
BASE = {"accuracy": 0.9, "frechet_distance": 10.0, "diversity": 0.8}


def run(arm: str, seed: int, accuracies: list[float], **last: float) -> dict:
    """A run's result with the given accuracies over the steps; the other measures of the last step by name."""
    records = [
        {"step": 100 * i, **dict.fromkeys(measures(IMAGES), 0.5), "accuracy": a} for i, a in enumerate(accuracies)
    ]
    records[-1].update(last)
    return {"arm": arm, "seed": seed, "records": records}


def summary_of(runs: list[dict]) -> dict:
    return {
        "ceiling": CEILING,
        "parts": {"off_policy": {"methods": aggregate(runs, BASE, IMAGES)}},
        "base": BASE,
        "settings": asdict(FULL),
    }


def test_aggregate_takes_the_last_step_and_the_spread_over_seeds():
    methods = aggregate([run("dpo", 0, [0.9, 0.95, 0.2]), run("dpo", 1, [0.9, 0.9, 0.6])], BASE, IMAGES)
    final = methods["dpo"]["final"]["accuracy"]
    assert final == {"mean": pytest.approx(0.4), "min": 0.2, "max": 0.6, "values": [0.2, 0.6]}
    assert methods["dpo"]["best_accuracy"]["values"] == [0.95, 0.9]
    # Below half of the base's accuracy: the first run, not the second.
    assert methods["dpo"]["num_collapsed"] == 1


def sentences_of(runs: list[dict]) -> str:
    return " ".join(verdict(summary_of(runs), IMAGES)["off_policy"])


def test_the_verdict_claims_a_difference_only_when_every_pair_of_seeds_shows_it():
    dpo = [run("dpo", 0, [0.9, 0.1], frechet_distance=400.0), run("dpo", 1, [0.9, 0.2], frechet_distance=300.0)]
    sipo = [run("sipo", 0, [0.9, 0.7], frechet_distance=40.0), run("sipo", 1, [0.9, 0.8], frechet_distance=30.0)]
    text = sentences_of(dpo + sipo)
    assert "SIPO at beta 2 against Diffusion-DPO at the same beta, over all of 2 seeds" in text
    assert "Accuracy higher (75% against 15%)" in text
    assert "Frechet distance lower (better) (35 against 350)" in text
    assert "Diversity not clearly different" in text
    assert "every run collapsed" in text and "no run collapsed" in text

    text = sentences_of([run("dpo", 0, [0.9, 0.1]), run("dpo", 1, [0.9, 0.75]), *sipo])
    assert "Accuracy not clearly different" in text and "1 of 2 runs collapsed" in text

    text = sentences_of([run("dpo", 0, [0.9, 0.9]), run("sipo", 0, [0.9, 0.3], frechet_distance=40.0)])
    assert "Accuracy lower" in text and "Frechet distance higher (worse)" in text
    assert "one seed each, so chance is not excluded" in text


def test_the_verdict_sets_sipo_against_a_well_chosen_beta():
    text = sentences_of([run("sipo", 0, [0.9, 0.7]), run("dpo_best", 0, [0.9, 0.95])])
    assert "SIPO at beta 2 against Diffusion-DPO at beta 2000" in text and "Accuracy lower (70% against 95%)" in text


def test_what_a_method_does_not_have_is_left_out():
    sft = run("sft", 0, [0.9, 0.8])
    for record in sft["records"]:
        for name in ("held_out_accuracies", "held_out_chosen", "held_out_rejected"):
            del record[name]
    runs = [sft, run("dpo@50", 0, [0.9, 0.8])]
    summary = summary_of(runs)
    methods = summary["parts"]["off_policy"]["methods"]
    assert "held_out_accuracies" not in methods["sft"]["final"] and "reward" in methods["sft"]["final"]
    text = sentences_of(runs)
    assert "SFT ends at 80%" in text and "Diffusion-DPO, beta 50 ends at 80%" in text
    # A share that was not measured is an empty cell; a beta is that of the arm, not of the protocol.
    _, (_, first, second) = table(summary | {"base": dict.fromkeys(measures(IMAGES), 0.5)}, "off_policy", IMAGES)
    assert (first[0], first[1], first[-2]) == ("SFT", "", "")
    assert (second[1], second[-2]) == ("50", "50%")


def test_the_ceiling_is_said_with_class_and_colour_apart():
    text = " ".join(verdict(summary_of([run("dpo", 0, [0.9, 0.9])]), IMAGES)["base"])
    assert "93% of real test photographs (class 94%, colour 100%)" in text


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


@pytest.mark.parametrize(("changes", "named"), [({"max_steps": 0}, "max_steps=0"), ({"beta": -1.0}, "beta=-1.0")])
def test_settings_that_make_no_sense_are_refused(changes, named):
    with pytest.raises(ConfigurationError, match=named):
        replace(QUICK, **changes)


def test_the_quick_demo_is_the_full_one_with_fewer_runs():
    assert replace(QUICK, parts=FULL.parts) == FULL
    assert [len(part.runs) for part in QUICK.parts] == [2]
    assert isinstance(FULL, DemoSettings) and all(isinstance(part, Part) for part in FULL.parts)
