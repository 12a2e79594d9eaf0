# SPDX-License-Identifier: Apache-2.0
"""What a report says of numbers that are known: verdicts, charts, frames, tables, and how large the page gets."""

import json
import math
import re
from datetime import UTC, datetime

import pytest

from tests.reporting.logged_runs import ENDED, START, held_out, learning, levels_at, write_log
from trl_sipo.cli.main import main
from trl_sipo.reporting.chart_cards import ChartCards
from trl_sipo.reporting.charts import (
    Axis,
    Chart,
    Line,
    axes_of,
    describe,
    line_chart,
    path_of,
    round_ticks,
    short,
)
from trl_sipo.reporting.figures import COLOURS
from trl_sipo.reporting.heat_maps import HeatMap, colour_of, describe_heat_map, heat_map
from trl_sipo.reporting.level_panels import level_panel
from trl_sipo.reporting.page import script_json
from trl_sipo.reporting.run_charts import metric_charts, table_of
from trl_sipo.reporting.run_files import read_runs
from trl_sipo.reporting.run_findings import chance_range, findings_of
from trl_sipo.reporting.run_quality import Measured, Quality
from trl_sipo.reporting.run_report import Contents, contrast, luminance, readable_on, run_page

STEPS = range(10, 101, 10)


def _findings(folder, rows, **start):
    return findings_of(read_runs([write_log(folder, rows, **start)])[0])


def _both(**others):
    return [row for step in STEPS for row in (learning(step, **others), held_out(learning(step, **others)))]


CASES = {
    "learning": (_both(), "good", "Learning", "36%|80.0%.*40% to 60%"),
    "unheld": ([learning(step) for step in STEPS], "neutral", "Learning its training pairs", "may be memory"),
    "drifting": (_both(**{"drift/chosen_error": 0.2}), "doubt", "The winner drifts", "20.0% above"),
    "nan": (_both(loss=math.nan), "bad", "Numbers that are not finite", "of `loss` .* the first by step 10"),
    "recovered": (
        [*_both(), held_out(learning(100)), *(learning(100 + s, grad_norm=math.inf if s == 1 else 1.0)
                                             for s in range(1, 21))],
        "good", "Learning", "80.0%",
    ),
    "nan held out": (
        [*_both(), held_out(learning(110, loss=math.nan))], "bad", "Numbers that are not finite", r"`loss` .held out."
    ),
    "one masked": (
        [held_out(learning(90)), *(learning(s, **{"sipo/masked_fraction": float(s == 6)}) for s in range(1, 7))],
        "good", "Learning", "77.0%",
    ),
    "small fall": (
        [row for s in STEPS for row in (
            learning(s, **{"rewards/margins": 0.0}),
            held_out(learning(s, **{"rewards/margins": 0.3 / s, "rewards/accuracies": 0.5})))],
        "doubt", "No sign of learning", "50.0%",
    ),
    "begun": (
        [row for s in range(1, 9) for row in (
            learning(s), held_out(learning(s, **{"rewards/margins": 0.0, "rewards/accuracies": 0.5})))],
        "neutral", "Too early to say", "50.0%",
    ),
    "few memorised": (
        [learning(1, **{"rewards/accuracies": 1.0}), held_out(learning(1))], "neutral", "Too early to say", "50.3%"
    ),
    "far": (_both(**{"drift/chosen_error": 2.0}), "bad", "The winner drifts far", "200.0% above"),
    "masked": (_both(**{"sipo/masked_fraction": 1.0}), "doubt", "Standing still: masked", "100% of the pairs"),
    "masked with a proximal term": (
        _both(**{"sipo/masked_fraction": 1.0, "proximal/loss": 0.1}), "doubt", "Nearly all masked", "only the proximal"
    ),
    "saturated": (_both(**{"rewards/saturated_fraction": 0.8}), "doubt", "Standing still: saturated", "80%"),
    "forgetting": (_both(**{"rewards/chosen": -0.4}), "doubt", "Winning by forgetting", "get worse faster"),
    "memorising": (
        [r for s in STEPS for r in (learning(s, **{"rewards/accuracies": 1.0}),
                                    held_out(learning(s, **{"rewards/accuracies": 0.5})))],
        "doubt", "Memorising", "100% in training and 50% held out",
    ),
    "nothing": (
        _both(**{"rewards/margins": 0.0001, "rewards/accuracies": 0.5}), "doubt", "No sign of learning", "small"
    ),
    "early": ([held_out(learning(0)), learning(1)], "neutral", "Too early to say", "50.0%"),
    "empty": ([], "neutral", "Nothing logged yet", "has not logged"),
    "alone": ([{"step": s, "loss": 1 / s} for s in STEPS], "neutral", "Trains without pairs", "0.1 to 0.01"),
    "fallen": (
        [held_out(learning(s, **{"rewards/margins": 1.0 if s == 50 else 0.1})) for s in STEPS],
        "bad", "Falling apart", "from 1 at step 50 to 0.1 at step 100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_what_the_numbers_say(tmp_path, name):
    rows, kind, verdict, words = CASES[name]
    findings = _findings(tmp_path, rows)
    assert (findings.kind, findings.verdict) == (kind, verdict)
    assert re.search(words, findings.sentences[0]), findings.sentences[0]


@pytest.mark.parametrize(
    "low, high, verdict",
    [(0.55, 0.7, "Better than its base"), (0.2, 0.4, "Worse than its base"), (0.4, 0.6, "Learning")],
)
@pytest.mark.parametrize("step, is_sure", [(100, True), (100, False), (50, True)])
def test_what_was_measured_counts_for_more(tmp_path, low, high, verdict, step, is_sure):
    run = read_runs([write_log(tmp_path / "run", _both())])[0]
    quality = Quality(win_rates={"win rate by pick": {"run": [Measured(step, (low + high) / 2, low, high, is_sure)]}})
    findings = findings_of(run, quality)
    assert findings.verdict == (verdict if is_sure and step == 100 else "Learning")
    assert any(text.startswith(f"Measured at step {step}: win rate by pick") for text in findings.sentences)


def test_a_run_with_a_proximal_term_shows_its_distance_beside_the_drift(tmp_path):
    rows = [learning(step, **{"proximal/distance": step / 1000, "proximal/loss": step / 100}) for step in STEPS]
    run = read_runs([write_log(tmp_path / "run", rows)])[0]
    shown = {chart.title: table_of(chart)[1][-1] for chart in metric_charts([run], is_reward=False)}
    assert shown["Distance from the reference"] == ["100", "0.1"] and shown["Proximal term"] == ["100", "1"]
    titles = list(shown)
    assert titles.index("Distance from the reference") == titles.index("Drift of the loser") + 1
    (figure,) = (figure for figure in findings_of(run).figures if figure.name == "distance")
    assert (figure.value, figure.note) == ("0.1", "training, step 100")


def test_what_kernels_round_at_the_start_does_not_flatten_the_distance(tmp_path):
    rows = [learning(step, **{"proximal/distance": 1e-14 if step == 10 else step / 1000}) for step in STEPS]
    (chart,) = (
        chart
        for chart in metric_charts(read_runs([write_log(tmp_path / "run", rows)]), is_reward=False)
        if chart.title == "Distance from the reference"
    )
    _, axis = axes_of(chart)
    assert not axis.is_log and axis.low == 0.0


def test_rewards_of_another_kind_have_a_scale_of_their_own(tmp_path):
    scores = {"rewards/chosen": 760.0, "rewards/rejected": 755.0}
    rows = {"SIPO": _both(), "Diffusion-DPO": _both(), "MaPO": _both(**scores)}
    runs = read_runs([write_log(tmp_path / name, logs, method=name) for name, logs in rows.items()])
    page = run_page(Contents("three", runs, [None] * 3, Quality()))
    charts = re.findall("<svg class=.chart. [^>]*Chosen and rejected reward: (.*?)</svg>", page)
    ticks = [[text for text in re.findall(">([-.0-9]+)</text>", chart)] for chart in charts]
    assert "600" in ticks[2] and "0.2" in ticks[0] and "600" not in ticks[0] and ticks[0] == ticks[1]
    assert "Scores of the policy alone" in page


def test_nothing_is_minus_nothing(tmp_path):
    findings = _findings(tmp_path, _both(**{"drift/chosen_error": -1e-5}))
    assert [figure.value for figure in findings.figures if figure.name == "winner's drift"] == ["0.0%"]


def test_the_trainers_warnings_are_given_with_their_step(tmp_path):
    rows = [learning(step, **{"drift/chosen_error": step / 100}) for step in STEPS]
    findings = _findings(tmp_path, rows)
    assert any(
        text.startswith("Step 50: the error on the chosen images has risen for 5 logs") for text in findings.sentences
    )


@pytest.mark.parametrize(
    "pairs, wanted", [(100, (0.402, 0.598)), ({"cats": 25}, (0.304, 0.696)), (None, None), (True, None)]
)
def test_chance_knows_how_many_pairs_there_are(tmp_path, pairs, wanted):
    found = chance_range(read_runs([write_log(tmp_path, [], eval_pairs=pairs)])[0])
    assert found == (None if wanted is None else pytest.approx(wanted))


def test_ticks_are_round_and_numbers_short():
    assert round_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert round_ticks(-3.2, 7) == pytest.approx([-2, 0, 2, 4, 6])
    assert Axis(1e-3, 1e6, 0, 1, is_log=True).ticks == pytest.approx([1e-3, 1, 1e3, 1e6])
    assert [short(value) for value in (0, 0.12345, 1e-7, 300.0, None, 123456)] == [
        "0",
        "0.1235",
        "1e-7",
        "300",
        "-",
        "1.235e5",
    ]


def test_a_logarithmic_axis_has_even_decades_and_ticks_within_one():
    axis = Axis(1.0, 1000.0, 0.0, 3.0, is_log=True)
    assert [axis.place(value) for value in (1, 10, 100, 1000)] == pytest.approx([0, 1, 2, 3])
    assert axis.ticks == pytest.approx([1, 10, 100, 1000])
    assert Axis(0.9, 45.0, 0, 1, is_log=True).ticks == pytest.approx([1, 2, 5, 10, 20])
    assert Axis(0.97, 1.04, 0, 1, is_log=True).ticks == pytest.approx([0.98, 1.0, 1.02, 1.04])


def test_a_path_breaks_at_gaps():
    assert path_of([0, 1, 2, 3], [5.0, 6.0, None, 7.0]) == "M0.0 5.0L1.0 6.0M3.0 7.0h0.1"


def test_a_chart_says_its_course_and_its_gaps(tmp_path):
    rows = [learning(10), learning(20, loss=math.nan), learning(30, loss=2.0)]
    runs = read_runs([write_log(tmp_path, rows)])
    chart = next(chart for chart in metric_charts(runs, is_reward=False) if chart.title == "Loss")
    words = describe(chart)
    assert "training: 0.67 at step 10, 2 at step 30; lowest 0.67 at 10, highest 2 at 30." in words
    assert "1 point(s) are not finite" in words
    assert "1 point(s) are not finite" in ChartCards().line_card(chart).split("<figcaption>")[1]  # for all to read
    svg = line_chart(chart)
    assert svg.count('<path class="line"') == 1 and re.search(r'class="line" d="M[\d. ]+h0.1M[\d. ]+h0.1"', svg)
    header, cells = table_of(chart)
    assert header == ["step", "training"] and cells == [["10", "0.67"], ["20", "not finite"], ["30", "2"]]


def test_bands_span_what_a_point_stands_for(tmp_path):
    rows = [learning(step, loss=float(step % 2)) for step in range(1, 1001)]
    runs = read_runs([write_log(tmp_path, rows)])
    chart = next(chart for chart in metric_charts(runs, is_reward=False) if chart.title == "Loss")
    (line,) = chart.lines
    assert set(line.y) == {0.5} and set(line.low) == {0.0} and set(line.high) == {1.0}
    assert 'class="band"' in line_chart(chart) and table_of(chart)[1][0][1] == "0.5 [0, 1]"


def test_values_over_decades_get_a_logarithmic_axis():
    svg = line_chart(Chart("norm", [Line("one", [0, 1, 2], [0.001, 1.0, 1000.0])]))
    assert ">0.001<" in svg or ">1e-3<" in svg
    places = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search('class="line" d="([^"]+)', svg)[1])]
    assert places[0] - places[1] == pytest.approx(places[1] - places[2], abs=0.11)


def test_frames_by_noise_level_move_and_the_first_stays(tmp_path):
    lines = [levels_at(step, lambda time, step=step: time - step / 1000) for step in (0, 50, 100)]
    panel = level_panel(read_runs([write_log(tmp_path, [learning(100)], lines)])[0])
    weight, error = panel.charts
    assert panel.steps == [0, 50, 100]
    assert weight.frames[0][0] == list(weight.chart.lines[1].y) == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert weight.frames[2][0] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert weight.chart.shaded_below == 0.9
    assert weight.texts[0] == "Step 0: mean w below 0.9 at 4 of 5 noise levels, and 80% of the pairs masked."
    assert error.frames[2] == [pytest.approx([0.9] * 5), pytest.approx([1.1] * 5)]
    assert error.texts[2] == "Step 100: chosen -10.0% to -10.0%, rejected +10.0% to +10.0%."
    assert [chart.title for chart in panel.maps] == [
        "w by step and noise level",
        "Masked share by step and noise level",
    ]
    assert panel.maps[1].cells[0] == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_where_nothing_is_masked_nothing_is_shaded(tmp_path):
    panel = level_panel(
        read_runs([write_log(tmp_path, [], [levels_at(1, lambda time: time)], mask_threshold=None)])[0]
    )
    assert panel.charts[0].chart.shaded_below is None and "would" in panel.charts[0].chart.levels[0][1]
    assert panel.maps == []  # one frame is no course


def test_a_heat_map_has_a_cell_per_value_and_words():
    chart = HeatMap("w", [10, 20], [0.1, 0.9], [[0.2, 1.0], [None, 0.6]], 0.2, 1.0)
    svg = heat_map(chart)
    assert svg.count('class="unknown"') == 1 and colour_of(0.0) in svg and colour_of(1.0) in svg
    assert describe_heat_map(chart).startswith(
        "w. Mean over noise levels 0.6 at step 10, 0.6 at step 20. Lowest 0.2 at time 0.1"
    )
    assert [luminance(colour_of(share / 9)) for share in range(10)] == sorted(
        luminance(colour_of(s / 9)) for s in range(10)
    )


@pytest.mark.parametrize("background", ["#ffffff", "#1d2329"])
def test_lines_can_be_told_from_the_background(background):
    assert all(contrast(readable_on(colour, background), background) >= 3 for colour in COLOURS)
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and readable_on("#0072b2", "#ffffff") == "#0072b2"


def test_numbers_within_the_page_end_no_script():
    text = script_json({"</script>": "<!--\u2028&"})
    assert json.loads(text) == {"</script>": "<!--\u2028&"} and not set("<>&\u2028") & set(text)
    with pytest.raises(ValueError, match="JSON compliant"):
        script_json(math.nan)


def test_a_hostile_log_becomes_no_markup(tmp_path):
    evil = "</script><script>alert(1)</script>"
    rows = [learning(1), held_out(learning(1), f"eval_{evil[:40]}_"), {"step": 2, f"samples/{evil}": 1.0}]
    start = {"method": evil, "model": evil, "command": [evil], "settings": {evil: evil}, "environment": {evil: [evil]}}
    run = write_log(tmp_path / "run", rows, **start)
    output = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(output), "--title", evil]) == 0
    text = output.read_text(encoding="utf-8")
    assert "alert(1)" in text and text.count("<script") == 2 and text.count("</script>") == 2


_HUGE_LEVEL = {
    "time": 0.5, "pairs": 1e308, "importance_weight": 1e308, "masked": -1e308, "chosen_error": 1e300,
    "chosen_ref_error": 1e-300, "rejected_error": 1e99, "rejected_ref_error": 1e-99,
}  # fmt: skip
EXTREMES = {
    "huge": [learning(step, loss=(-1) ** step * 1e308) for step in range(5)],
    "tiny": [learning(step, loss=5e-324 * step, grad_norm=1e-320) for step in range(5)],
    "wide": [learning(step, loss=10.0 ** (step * 49 - 98)) for step in range(5)],
    "one": [learning(0, loss=0.0)],
    "late": [learning(2**53 - 5 + step) for step in range(5)],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_numbers_are_drawn_or_left_out(tmp_path, name):
    levels = [
        {"step": step, "split": split, "levels": [_HUGE_LEVEL]} for split in ("train", "eval") for step in (1, 2)
    ]
    run = write_log(tmp_path / "run", EXTREMES[name], levels)
    page = run_page(Contents("extreme", read_runs([run]), [None], Quality()))
    drawn = " ".join(re.findall(r' (?:d|x|y)="([^"]*)"', page))
    assert "nan" not in drawn and "inf" not in drawn and page.count("<svg") > 10


def test_a_start_that_is_none_is_shown_as_far_as_it_goes(tmp_path):
    start = {
        "settings": [1],
        "environment": 5,
        "eval_pairs": {"a": "b"},
        "command": "text",
        "method": ["x"],
        "step": "x",
    }
    run = write_log(tmp_path / "run", [learning(1)], **start)
    page = run_page(Contents("odd", read_runs([run]), [None], Quality()))
    assert "Started without a command." in page


def test_ten_thousand_logs_make_a_small_page(tmp_path):
    rows = [
        row
        for step in range(1, 10_001)
        for row in ((learning(step), held_out(learning(step)))[: 1 + (step % 10 == 0)])
    ]
    lines = [levels_at(step, lambda time: time) for step in range(10, 10_001, 10)]
    run = write_log(tmp_path / "run", rows, lines)
    page = run_page(Contents("long", read_runs([run]), [None], Quality()))
    assert 100_000 < len(page.encode()) < 2_000_000
    assert "has 10000 training logs: a point is the mean of 64" in page


def test_the_page_of_one_run_says_when_how_and_what(tmp_path):
    run = write_log(tmp_path / "run", [learning(50), {"step": 50, **ENDED}])
    now = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    page = run_page(Contents("my run", read_runs([run]), [None], Quality()), now)
    assert "Written 2030-01-02 03:04:05 UTC." in page and "step 50 of 100, ended" in page
    assert "trl-sipo sipo --config &#x27;a file.yaml&#x27;" in page and START["environment"]["python"] in page
    assert 'id="samples"' not in page and 'id="levels"' not in page and 'http-equiv="refresh"' not in page
