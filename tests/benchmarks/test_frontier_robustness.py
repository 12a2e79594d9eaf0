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
    "beta 20, kappa 0.1": [(0.62, 9.0), (0.74, 10.5)],
    "beta 200, kappa 0.05, lr 0.0001": [(0.7, 10.0), (0.8, 12.0)],
}
FIXED = ("beta 20", "beta 20, kappa 0.5")
#: What the proximal term wins besides, by base and source, so that it shows which cells a number is of.
GAINS = {("shipped", "on_policy"): 0.0, ("shipped", "off_policy"): 0.04}
GAINS |= {("weak", "on_policy"): 0.02, ("weak", "off_policy"): 0.1}


@pytest.fixture(scope="module")
def found(script):
    """Five seeds of two bases; what a seed adds to the win rate is the same in every cell, or the other way round."""
    return script("beyond.evidence").Evidence(BASES, _records(script, {"DPO": DPO, "proximal": PROXIMAL}))


def _records(script, methods, seeds=range(5), is_of=lambda cell: True):
    protocol = script("beyond.protocol")
    cells = {cell: 0.01 if cell.source == "on_policy" else -0.01 for cell in protocol.MAIN_CELLS if cell.base in BASES}
    arms = {(arm.method, arm.label): arm for arm in (*protocol.ARMS, *protocol.MORE_SETTINGS)}
    records = []
    for cell, size in cells.items():
        for method, settings in methods.items() if is_of(cell) else ():
            for setting, ends in settings.items():
                for seed in seeds:
                    run = script("beyond.runs").Run(cell, arms[method, setting], seed)
                    gain = GAINS[cell.base, cell.source] + size * (seed - 2)
                    records.append(_record(script, run, ends, gain * (method == "proximal")))
    return records


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


def _area(script, points, height=_height, gain=0.0):
    plane = [(2 * (win_rate + gain) - 1, height(distance)) for win_rate, distance in points]
    return float(script("beyond.area").dominated_area(np.array(plane)))


def _cells_of(name):
    """Base and source of the cells that a variant is of, by its name."""
    only = {"on-policy pairs": ("source", "on_policy"), "off-policy pairs": ("source", "off_policy")}
    only |= {"bases that tuning has not seen": ("base", "weak")}
    wanted = next((one for words, one in only.items() if name.startswith(words)), None)
    return [
        cell
        for cell in GAINS
        if wanted is None or dict(zip(("base", "source"), cell, strict=True))[wanted[0]] == wanted[1]
    ]


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
        ("without the settings that were fixed", _height, lambda setting, step: setting not in FIXED),
        ("proximal without beta 20, kappa 0.5", _height, lambda setting, step: setting != "beta 20, kappa 0.5"),
        ("proximal with beta 20, kappa 0.5 alone", _height, lambda setting, step: setting in (*DPO, FIXED[1])),
        ("on-policy pairs", _height, lambda setting, step: True),
        ("on-policy pairs, seeds at once", _height, lambda setting, step: True),
        ("off-policy pairs", _height, lambda setting, step: True),
        ("on-policy pairs, accuracy", lambda d: 0.8, lambda setting, step: True),
        ("off-policy pairs, diversity, seeds at once", lambda d: 1.0, lambda setting, step: True),
        ("bases that tuning has not seen", _height, lambda setting, step: True),
        ("seeds resampled in all cells at once", _height, lambda setting, step: True),
        ("bases as the sample", _height, lambda setting, step: True),
    ],
)
def test_each_variant_is_what_its_name_says(script, result, name, height, keeps):
    proximal, dpo = (
        [one for setting, ends in settings.items() for step, one in enumerate(ends) if keeps(setting, step)]
        for settings in (PROXIMAL, DPO)
    )
    row, cells = result["variants"][name]["DPO"], _cells_of(name)
    areas = [_area(script, proximal, height, GAINS[cell]) - _area(script, dpo, height) for cell in cells]
    # Half of the seeds win a little more often: of two settings another may be on the frontier, hardly.
    assert row["value"] == pytest.approx(np.mean(areas), abs=4e-3) and row["cells"] == len(cells)


def test_runs_that_are_stopped_early_have_no_last_step_to_compare(result):
    assert set(result["variants"]["last step alone"]) == {"DPO"} < set(result["variants"]["as frozen"])


def test_cells_that_share_their_seeds_are_told_apart_from_cells_that_do_not(script, found, result):
    """What a seed adds cancels between the sources when seeds are the unit, and adds up within one of them."""

    def width(row):
        return row["high"] - row["low"]

    variants = result["variants"]
    assert width(variants["as frozen"]["DPO"]) > 0.01
    assert variants["seeds resampled in all cells at once"]["DPO"]["low"] is None  # they do not differ at all
    every, dpo = [end for ends in PROXIMAL.values() for end in ends], [end for ends in DPO.values() for end in ends]
    areas = {cell: _area(script, every, gain=gain) - _area(script, dpo) for cell, gain in GAINS.items()}
    means = [np.mean([area for (base, _), area in areas.items() if base == one]) for one in BASES]
    row = variants["bases as the sample"]["DPO"]  # Student's interval of two bases, by hand
    assert row["high"] - row["value"] == pytest.approx(12.706 * np.std(means, ddof=1) / math.sqrt(2), rel=0.05)
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
    rows = {name: cell["difference"] for name, cell in pair["cells"].items()}
    gains = {", ".join(cell): gain for cell, gain in GAINS.items()}
    for name, row in {**rows, "all": pair["all"]}.items():
        gain = gains.get(name, np.mean(list(GAINS.values())))
        assert row["win_rate"]["value"] == pytest.approx(0.05 + gain) and row["win_rate"]["low"] < 0.05 + gain
        assert row["log_frechet"]["value"] == pytest.approx(math.log2(12 / 20))
    own, other = PROXIMAL[pair["with"][1]], DPO[pair["without"][1]]
    by_hand = np.mean([_area(script, own, gain=gain) for gain in GAINS.values()]) - _area(script, other)
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
            gains = [gain * (method == "proximal") for gain in GAINS.values()]
            by_hand = np.mean([_area(script, ends, gain=gain) for gain in gains])
            assert rows[method, setting]["value"] == pytest.approx(by_hand, abs=2e-3)
            assert set(rows[method, setting]["by_source"]) == {"on_policy", "off_policy"}
    values = [row["value"] for row in result["settings"]]
    assert values == sorted(values, reverse=True) and len(rows) == 5


ADDED = {"beta 2000": [(0.8, 9.0), (0.9, 11.0)], "beta 200": [(0.55, 9.5), (0.6, 9.5)]}


def test_added_settings_count_where_all_of_them_are(script, found):
    """All of DPO's by five seeds on the shipped base; one of them by two on the weak one, which counts for nothing."""
    robustness, evidence = script("beyond.robustness"), script("beyond.evidence")

    def is_shipped(cell):
        return cell.base == "shipped" and cell.source == "on_policy"

    added = _records(script, {"DPO": ADDED}, is_of=is_shipped)
    part = _records(script, {"DPO": {"beta 2000": ADDED["beta 2000"]}}, range(2), lambda cell: cell.base == "weak")
    more = robustness.with_more_settings(evidence.Evidence(BASES, [*found.records, *added, *part]), found, range(5))
    assert robustness.with_more_settings(found, found, range(5)) == {}
    row = more["compared"]["DPO"]
    assert (row["settings"], row["added"], row["cells"]) == (4, sorted(ADDED), ["shipped, on_policy"])
    every, tested = ([end for ends in some.values() for end in ends] for some in ({**DPO, **ADDED}, DPO))
    own = _area(script, [end for ends in PROXIMAL.values() for end in ends])
    assert row["as tested"]["value"] == pytest.approx(own - _area(script, tested), abs=4e-3)
    assert row["with more"]["value"] == pytest.approx(own - _area(script, every), abs=4e-3)
    assert row["seeds"] == 5 and row["with more"]["low"] is not None
    assert {row["setting"] for row in more["alone"]} == set(ADDED)
    table = script("beyond.tables").added_table(more)
    assert "| DPO | 2 + 2 | 1 | 5 | " in table and script("beyond.tables").added_table({}) == ""


def test_cells_with_other_seeds_are_not_resampled_at_once(script, found):
    """Seeds are paired by their numbers, and not by their place."""
    left_out = {"on_policy": 0, "off_policy": 4}
    some = [one for one in found.records if one["run"]["seed"] != left_out[one["run"]["cell"]["source"]]]
    variants = script("beyond.robustness").robustness(script("beyond.evidence").Evidence(BASES, some), range(5))[
        "variants"
    ]
    assert variants["seeds resampled in all cells at once"] == {}
    assert variants["on-policy pairs, seeds at once"]["DPO"]["cells"] == 2


def test_the_tables_show_it(script, result):
    tables, shown = script("beyond.tables"), {"robustness": result}
    assert "| as frozen | 4 | +0." in tables.variants_table(shown)
    assert tables.matched_table(shown).count("mean of 4 cells") == 2  # pairs of which both are there
    assert "| DPO, beta 200, lr 0.0001 |" in tables.matched_table(shown) and "ratio" in tables.matched_table(shown)
    assert tables.settings_table(shown["robustness"]["settings"]).count("\n") == 6 and tables.tuned_table(shown) == ""
