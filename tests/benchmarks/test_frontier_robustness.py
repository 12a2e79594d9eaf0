# SPDX-License-Identifier: Apache-2.0
"""What other definitions make of the frontier: each against the same computed by hand from the rows."""

import math

import numpy as np
import pytest

BASES = {name: {"frechet_distance": 10.0, "second_accuracy": 0.8, "diversity": 1.2} for name in ("shipped", "weak")}
#: Setting -> win rate and Frechet distance at steps 15 and 120.
DPO = {"beta 20": [(0.6, 10.0), (0.7, 30.0)], "beta 200, lr 0.0001": [(0.65, 10.0), (0.75, 20.0)]}
PROXIMAL = {
    "beta 20, kappa 0.5": [(0.6, 8.0), (0.65, 8.0)],
    "beta 200, kappa 0.05, lr 0.0001": [(0.7, 10.0), (0.8, 12.0)],
}


@pytest.fixture(scope="module")
def found(script):
    """Five seeds of two bases; what a seed adds to the win rate is the same in every cell, or the other way round."""
    evidence, protocol = script("beyond.evidence"), script("beyond.protocol")
    cells = {cell: 0.01 if cell.source == "on_policy" else -0.01 for cell in protocol.MAIN_CELLS if cell.base in BASES}
    arms = {(arm.method, arm.label): arm for arm in protocol.ARMS}
    records = []
    for cell, size in cells.items():
        for method, settings in (("DPO", DPO), ("proximal", PROXIMAL)):
            for setting, ends in settings.items():
                for seed in range(5):
                    run = script("beyond.runs").Run(cell, arms[method, setting], seed)
                    records.append(_record(script, run, ends, size * (seed - 2) * (method == "proximal")))
    return evidence.Evidence(BASES, records)


def _record(script, run, ends, extra):
    rows = [
        {"step": step, "win_rate": win_rate + extra, "frechet_distance": distance}
        | {"second_accuracy": 0.8, "diversity": 1.2, "held_out_loss": 0.5, "reward": -1.0}
        for step, (win_rate, distance) in zip((15, 120), ends, strict=True)
    ]
    return script("beyond.evidence")._kept({"run": script("beyond.runs").asdict(run), "rows": rows, "seconds": 1}, run)


@pytest.fixture(scope="module")
def result(script, found):
    return script("beyond.robustness").robustness(found, range(5))


def _height(distance, worst=4.0, best=0.5):
    return np.clip(math.log(worst * 10 / distance) / math.log(worst / best), 0, 1)


def _area(script, points, height=_height):
    plane = [(2 * win_rate - 1, height(distance)) for win_rate, distance in points]
    return float(script("beyond.area").dominated_area(np.array(plane)))


@pytest.mark.parametrize(
    ("name", "height", "keeps"),
    [
        ("as frozen", _height, lambda setting, step: True),
        ("quality 0 at 2 times the base's Frechet distance", lambda d: _height(d, 2.0), lambda setting, step: True),
        ("quality 0 at 8 times", lambda d: _height(d, 8.0), lambda setting, step: True),
        ("quality 1 at a quarter", lambda d: _height(d, 4.0, 0.25), lambda setting, step: True),
        ("Frechet distance on a linear scale", lambda d: 1 - d / 40, lambda setting, step: True),
        ("accuracy by the second verifier", lambda d: 0.8, lambda setting, step: True),
        ("diversity", lambda d: 1.0, lambda setting, step: True),
        ("last step alone", _height, lambda setting, step: step == 1),
        ("learning rate 1e-4 alone", _height, lambda setting, step: "lr" in setting),
        ("without the settings that were fixed", _height, lambda setting, step: "lr" in setting),
        ("proximal without beta 20, kappa 0.5", _height, lambda setting, step: setting != "beta 20, kappa 0.5"),
        ("proximal with beta 20, kappa 0.5 alone", _height, lambda setting, step: "beta 200, k" not in setting),
        ("on-policy pairs", _height, lambda setting, step: True),
        ("bases that tuning has not seen", _height, lambda setting, step: True),
        ("seeds resampled in all cells at once", _height, lambda setting, step: True),
        ("bases as the sample", _height, lambda setting, step: True),
    ],
)
def test_each_variant_is_what_its_name_says(script, result, name, height, keeps):
    areas = []
    for settings in (PROXIMAL, DPO):
        kept = [one for setting, ends in settings.items() for step, one in enumerate(ends) if keeps(setting, step)]
        areas.append(_area(script, kept, height))
    row = result["variants"][name]["DPO"]
    # Half of the seeds win a little more often: of two settings another may be on the frontier, hardly.
    assert row["value"] == pytest.approx(areas[0] - areas[1], abs=4e-3)
    assert row["cells"] == (2 if name in ("on-policy pairs", "bases that tuning has not seen") else 4)


def test_cells_that_share_their_seeds_are_told_apart_from_cells_that_do_not(script, found, result):
    """What a seed adds cancels between the sources when seeds are the unit, and adds up within one of them."""

    def width(row):
        return row["high"] - row["low"]

    variants = result["variants"]
    assert width(variants["as frozen"]["DPO"]) > 0.01
    assert variants["seeds resampled in all cells at once"]["DPO"]["low"] is None  # they do not differ at all
    assert variants["bases as the sample"]["DPO"]["low"] is None  # the same on both
    one_source = script("beyond.evidence").Evidence(
        BASES, [record for record in found.records if record["run"]["cell"]["source"] == "on_policy"]
    )
    alike = script("beyond.robustness").robustness(one_source, range(5))["variants"]
    assert width(alike["seeds resampled in all cells at once"]["DPO"]) > 1.1 * width(alike["as frozen"]["DPO"])
    at_once = variants["on-policy pairs, seeds at once"]["DPO"]
    assert width(at_once) > 1.1 * width(variants["on-policy pairs"]["DPO"]) and at_once["cells"] == 2


def test_matched_settings_differ_by_what_their_ends_do(script, result):
    pair = result["matched"][0]
    assert pair["with"] == ["proximal", "beta 200, kappa 0.05, lr 0.0001"] and len(pair["cells"]) == 4
    for row in (*(cell["difference"] for cell in pair["cells"].values()), pair["all"]):
        assert row["win_rate"]["value"] == pytest.approx(0.05) and row["win_rate"]["low"] < 0.05
        assert row["log_frechet"]["value"] == pytest.approx(math.log2(12 / 20))
    by_hand = _area(script, PROXIMAL[pair["with"][1]]) - _area(script, DPO[pair["without"][1]])
    assert pair["all"]["area"]["value"] == pytest.approx(by_hand, abs=2e-3)
    # Student's interval of five seeds, by hand.
    half = 2.776 * np.std(0.01 * np.arange(5), ddof=1) / math.sqrt(5)
    one = pair["cells"]["weak, on_policy"]["difference"]["win_rate"]
    assert one["high"] - one["value"] == pytest.approx(half, rel=1e-3)
    assert result["matched"][1]["cells"] == {} and result["matched"][1]["all"] == {}  # not trained


def test_settings_alone_have_their_own_areas(script, result):
    rows = {(row["method"], row["setting"]): row for row in result["settings"]}
    for method, settings in (("DPO", DPO), ("proximal", PROXIMAL)):
        for setting, ends in settings.items():
            assert rows[method, setting]["value"] == pytest.approx(_area(script, ends), abs=2e-3)
            assert set(rows[method, setting]["by_source"]) == {"on_policy", "off_policy"}
    values = [row["value"] for row in result["settings"]]
    assert values == sorted(values, reverse=True) and len(rows) == 4


def test_the_tables_show_it(script, result):
    tables, shown = script("beyond.tables"), {"robustness": result}
    assert "| as frozen | 4 | +0." in tables.variants_table(shown)
    assert tables.matched_table(shown).count("mean of 4 cells") == 2  # pairs of which both are there
    assert "| DPO, beta 200, lr 0.0001 |" in tables.matched_table(shown) and "ratio" in tables.matched_table(shown)
    assert tables.settings_table(shown["robustness"]["settings"]).count("\n") == 5 and tables.tuned_table(shown) == ""
