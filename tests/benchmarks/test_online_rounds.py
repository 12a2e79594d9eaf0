# SPDX-License-Identifier: Apache-2.0
"""What the report of rounds is made of, on summaries whose numbers are known."""

import math

import pytest


def _summary(values, wins, masked):
    """A run whose policy scores `values` after each round, beside a base that scores 0.9."""

    def row(metric, model, mean, win=None):
        against = None if win is None else {"win_rate": {"estimate": win}}
        return {"metric": metric, "model": model, "mean": {"estimate": mean}, "against_base": against}

    metrics = ("fashion", "fashion-correct", "fashion-second", "fashion-second-correct")
    rounds = [
        {
            "pairs": 3,
            "log": [{"sipo/masked_fraction": masked}, {"sipo/masked_fraction": 0.0}],
            "evaluation": {
                "metrics": [line for m in metrics for line in (row(m, "base", 0.9), row(m, "policy", value, win))],
                "variety": {"relative_spread": {"estimate": 0.5}, "drift": {"estimate": 2.0}},
            },
        }
        for value, win in zip(values, wins, strict=True)
    ]
    weights = [
        {"policy": policy, "data": data, "mean": 0.9 - 0.1 * (policy - data), "masked_share": 0.0}
        for data in range(2)
        for policy in range(data, 3)
    ]
    return {"rounds": rounds, "weights": weights}


def test_numbers_are_those_of_the_runs(script, tmp_path):
    online = script("online_rounds")
    runs = {
        "dpo": [_summary([0.2, 0.4], [0.1, 0.2], 0.0), _summary([0.4, 0.6], [0.3, 0.4], 0.0)],
        "sipo": [_summary([0.5, 0.8], [0.5, 0.6], 0.4), _summary([0.5, 0.6], [0.5, 0.6], 0.4)],
    }
    found = online.aggregate(runs)
    assert found["dpo"]["curves"]["fashion"] == [[0.9, 0.2, 0.4], [0.9, 0.4, 0.6]]
    assert found["dpo"]["final"]["fashion"]["mean"] == pytest.approx(0.5)
    assert found["dpo"]["lowest"]["fashion"]["smallest"] == 0.2
    assert found["sipo"]["masked_in_training"] == [[0.2, 0.2], [0.2, 0.2]]
    assert found["dpo"]["weights"]["mean"][0]["before"] == pytest.approx([0.9, 0.9])
    assert found["dpo"]["weights"]["mean"][0]["final"] == pytest.approx([0.7, 0.8])
    difference = online.paired(found, "sipo", "dpo", "fashion")["final"]  # 0.4 and 0.0 by seed
    half = 12.706 * (0.4 / math.sqrt(2)) / math.sqrt(2)
    assert difference["mean"] == pytest.approx(0.2) and difference["low"] == pytest.approx(0.2 - half)
    lowest = online.paired(found, "sipo", "dpo", "fashion")["lowest"]  # 0.5 - 0.2 and 0.5 - 0.4, the base left out
    assert lowest["smallest"] == pytest.approx(0.1) and lowest["largest"] == pytest.approx(0.3)
    assert "| Diffusion-DPO, beta 2 | 50% [40%, 60%] |" in online.table(found)
    online.draw_figures(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"quality.png", "weights.png"}
