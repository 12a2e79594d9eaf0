# SPDX-License-Identifier: Apache-2.0
"""What the frontier says of every run: judged on rows, and held by real training, short and fast."""

import pytest

OFF_POLICY = {"source": "off_policy"}


@pytest.fixture
def claims(script):
    return script("beyond.claims")


def row(arm, step=120, seed=0, drift=0.0, distance=10.0, **cell):
    cell = {"base": "shipped", "source": "on_policy", "flip_rate": 0.0, "is_lora": False} | cell
    measures = {"step": step, "seed": seed, "held_out_chosen_drift": drift, "frechet_distance": distance}
    return {**cell, "method": arm[0], "setting": arm[1], **measures}


def test_claims_are_judged_pair_by_pair(claims):
    without, with_term = claims.SMALL_BETA
    rows = [
        *(row(without, seed=seed, drift=0.5, distance=20.0) for seed in (0, 1)),
        row(with_term, seed=0, drift=0.1),
        row(with_term, seed=1, drift=0.6),  # worse in the one, better in the other
        row(with_term, seed=2, drift=9.0),  # nothing to compare with
        *(row(arm, drift=0.0, **cell) for arm in (without, with_term) for cell in ({"is_lora": True}, OFF_POLICY)),
        row(without, step=60, drift=0.1),
        row(with_term, step=60, drift=0.0, distance=99.0),  # not the end of the run
    ]
    judgements = claims.judged(rows, last_step=120)
    assert [counts for _, *counts in judgements] == [[2, 3], [2, 2], [0, 0]]
    assert claims.failed(judgements) == [claims.CLAIMS[0].text, claims.CLAIMS[2].text]
    assert claims.as_lines(judgements)[0].endswith("2 of 3 measurements.")
    assert [claim.at_the_end for claim, *_ in claims.judged(rows, last_step=120, quick=True)] == [False]


def test_arms_of_the_claims_are_trained_by_the_headline(claims, script):
    arms = set(script("beyond.protocol").HEADLINE_ARMS)
    assert {arm for claim in claims.CLAIMS for arm in claim.arms} <= arms


def test_the_term_holds_the_policy_in_a_short_run_too(claims, script, tmp_path):
    """Some steps at a rate at which Diffusion-DPO is on its way out; the first claim, which held in every run."""
    protocol, runs = script("beyond.protocol"), script("beyond.runs")
    place = runs.Place(tmp_path, is_quick=True)
    place.prepare(["shipped"], 1)
    arms = [arm for arm in protocol.ARMS if (arm.method, arm.label) in claims.SMALL_BETA]
    records = []
    for arm in arms:
        run = runs.Run(protocol.TUNING_CELLS[0], arm, 0, protocol.QUICK_STEPS)
        runs.make(run, place)
        records.append(runs.json.loads(place.result(run).read_text()))
    judgements = claims.judged(runs.rows_of(records), last_step=protocol.QUICK_STEPS[-1], quick=True)
    assert [total for *_, total in judgements] == [len(protocol.QUICK_STEPS)]
    assert not claims.failed(judgements), claims.as_lines(judgements)
