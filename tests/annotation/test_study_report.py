# SPDX-License-Identifier: Apache-2.0
"""What is said of a study, finished or not, and in which files."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest

from tests.annotation.studies import answer_all, comparisons, empty_study, side_of
from tests.browsers import PHONE, open_context
from trl_sipo.annotation.rater_checks import CheckSettings
from trl_sipo.annotation.records import GOLD, LEFT, MIRRORED, SAMPLE, TIE, Study
from trl_sipo.annotation.store import STUDY_FILE, Store
from trl_sipo.annotation.study_analysis import analyse
from trl_sipo.annotation.study_report import chart, markdown, page, report_json, verdict, write_report
from trl_sipo.annotation.votes import FIRST, SECOND
from trl_sipo.errors import StudyError

HOSTILE = "<script>alert(1)</script>\"'|`=cmd()"


def three_groups(folder, **options):
    """Twelve raters in three groups, as in the paper."""
    store = empty_study(folder, **{"number": 12, "num_gold": 2, "num_mirrored": 4, **options})
    for number in range(12):
        store.invite(f"rater-{number + 1:02d}", number % 3 + 1)
    return store


def number_of(task):
    return int(task.pair_id.rsplit("-", 1)[1])


def opinion(rater, task):
    """Of pair 0 to 5 all say "second"; of 6 to 8 groups 1 and 2 do, and group 3 says "first"; of 9 and 10 each group
    says something else; of 11 all say "first"."""
    if task.kind == GOLD:
        return side_of(FIRST, task)
    number, group = number_of(task), rater.group
    if number < 6:
        label = SECOND
    elif number < 9:
        label = FIRST if group == 3 else SECOND
    elif number < 11:
        label = (FIRST, SECOND, TIE)[group - 1]
    else:
        label = FIRST
    return side_of(label, task)


def lazy(rater, task):
    """As the opinion, but for rater-03 of group 3, who always takes the left one."""
    return LEFT if rater.name == "rater-03" else opinion(rater, task)


def test_a_finished_study_by_hand(tmp_path):
    store = three_groups(tmp_path)
    answer_all(store, opinion)
    analysis = analyse(store)
    assert not analysis.is_partial and analysis.discarded == []
    assert analysis.num_answered == analysis.num_tasks == analysis.num_stored == 12 * 18
    (couple,) = analysis.kept.couples
    assert (couple.first, couple.second) == ("base", "tuned")
    assert (couple.wins, couple.ties, couple.losses) == (9, 2, 1)
    assert couple.win_rate.estimate == pytest.approx((9 + 2 / 2) / 12)
    # Of single answers: 6 whole pairs, 3 of two thirds, 2 of one half, and none of the last.
    assert couple.share_of_answers.estimate == pytest.approx((6 + 3 * 2 / 3 + 2 * 0.5) / 12)
    assert couple.by_group == {
        1: pytest.approx(9 / 12),  # it says "first" of 9, 10 and 11
        2: pytest.approx(11 / 12),
        3: pytest.approx((6 + 2 * 0.5) / 12),
    }
    assert couple.num_in_all_groups == couple.num_pairs == 12
    # Without ties and flips of the two ties: 9 against 1 of 10 pairs, two-sided: 2 * (1 + 10) / 2^10.
    assert couple.p_value == couple.corrected_p_value == pytest.approx(22 / 1024)
    by_category = {row.category: (row.wins, row.ties, row.losses) for row in analysis.kept.categories}
    assert by_category == {"food": (5, 1, 0), "animals": (4, 1, 1)}
    assert analysis.kept.agreement.groups_alike == pytest.approx(7 / 12)
    # Group 1 says what the final label is on all but 9 and 10.
    assert analysis.kept.agreement.with_final["rater-01"] == pytest.approx(10 / 12)
    assert 0 < analysis.kept.agreement.alpha < 1
    assert analysis.kept.agreement.kappa.num_labels == 12
    share = analysis.kept.side_bias.share_of_left
    assert share.low < 0.5 < share.high and analysis.kept.side_bias.p_value > 0.05


def test_discarded_raters_are_named_and_results_shown_with_and_without(tmp_path):
    store = three_groups(tmp_path)
    answer_all(store, lazy)
    analysis = analyse(store)
    (check,) = analysis.discarded
    assert check.rater.name == "rater-03"
    assert check.reasons == ("chose the left one in 18 of 18 decisions",)
    assert analysis.kept.num_raters == 11 and analysis.everyone.num_raters == 12
    share = analysis.kept.couples[0].share_of_answers.estimate
    assert analysis.everyone.couples[0].share_of_answers.estimate != share
    text = markdown(analysis, "the command", CheckSettings())
    assert "1 of 12 raters are left out (rater-03)" in text and "With every rater" in text
    assert "chose the left one in 18 of 18 decisions" in text


def test_a_study_is_finished_when_those_who_are_kept_have_finished(tmp_path):
    store = three_groups(tmp_path)
    answer_all(store, lambda rater, task: "skip" if rater.name == "rater-05" else opinion(rater, task))
    assert analyse(store).is_partial
    analysis = analyse(store, CheckSettings(min_answered_share=0.5))
    assert [check.rater.name for check in analysis.discarded] == ["rater-05"] and not analysis.is_partial
    assert analysis.kept.couples[0].num_in_all_groups == 12
    assert not verdict(analysis)[0].startswith("This study is not finished")


def test_a_partial_study_says_so_and_counts_what_there_is(tmp_path):
    store = three_groups(tmp_path)
    rater = store.raters()[0]
    for assignment, task in zip(store.assignments(1), store.tasks(1), strict=True):
        if task.kind == SAMPLE and number_of(task) < 4:
            store.answer(1, assignment.assignment_id, opinion(rater, task), 4.0, f"r{assignment.position}")
        elif task.kind == MIRRORED:
            store.answer(1, assignment.assignment_id, "skip", 1.0, f"r{assignment.position}")
    analysis = analyse(store)
    assert analysis.is_partial and analysis.num_answered == 4 and analysis.num_skipped == 4
    (couple,) = analysis.kept.couples
    assert (couple.wins, couple.ties, couple.losses, couple.num_pairs) == (4, 0, 0, 12)
    assert couple.by_group == {1: 1.0}
    assert couple.num_in_all_groups == 0  # two groups have not begun
    assert analysis.kept.agreement.alpha is None and analysis.kept.agreement.groups_alike is None
    first, *_ = verdict(analysis)
    assert first.startswith("This study is not finished: 4 of 216 tasks are answered.")
    assert "not finished" in page(analysis, "", CheckSettings())


def test_nothing_answered_is_an_error(tmp_path):
    with pytest.raises(StudyError, match="Nobody has judged"):
        analyse(three_groups(tmp_path))


def test_all_raters_discarded_leaves_no_result_but_a_report(tmp_path):
    store = three_groups(tmp_path)
    answer_all(store, lambda rater, task: LEFT)
    analysis = analyse(store)
    assert len(analysis.discarded) == 12 and analysis.kept.couples == []
    assert any("there is no result" in sentence for sentence in verdict(analysis))
    assert "there is no result" in page(analysis, "", CheckSettings())
    assert analysis.everyone.side_bias.share_of_left.estimate == 1.0
    assert analysis.everyone.side_bias.p_value < 0.001


def test_a_rater_does_not_agree_with_themselves(tmp_path):
    """Two say "first" and one "second": without their own label, each of the two faces one of either, a tie."""
    store = empty_study(tmp_path, number=1)
    for number in range(3):
        store.invite(f"rater-{number}", 1)
    answer_all(store, lambda rater, task: side_of(SECOND if rater.name == "rater-2" else FIRST, task))
    agreement = analyse(store).kept.agreement
    assert agreement.with_others == {"rater-0": 0.0, "rater-1": 0.0, "rater-2": 0.0}
    assert agreement.with_final == {"rater-0": 1.0, "rater-1": 1.0, "rater-2": 0.0}


def test_samples_of_one_prompt_are_no_independent_trials(tmp_path):
    """Six wins of three prompts: of the 2^3 exchanges of prompts two are as far from one half."""
    store = Store.create(tmp_path / STUDY_FILE, Study("t"))
    store.add_pairs([replace(pair, prompt_id=f"p{index // 2}") for index, pair in enumerate(comparisons(6))])
    store.invite("rater-01", 1)
    answer_all(store, lambda rater, task: side_of(SECOND, task))
    (couple,) = analyse(store).kept.couples
    assert couple.wins == 6 and couple.p_value == pytest.approx(2 / 2**3)


def test_several_models_are_corrected_for_their_number(tmp_path):
    store = Store.create(tmp_path / STUDY_FILE, Study("t"))
    store.add_pairs(
        [
            replace(pair, pair_id=f"{pair.pair_id}-{first}", first_model=first)
            for first, second in (("a", "b"), ("a", "c"), ("b", "c"))
            for pair in comparisons(9, models=(first, second))
        ]
    )
    store.invite("rater-01", 1)
    answer_all(store, lambda rater, task: side_of(SECOND, task))
    couples = analyse(store).kept.couples
    assert [(couple.first, couple.second) for couple in couples] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [couple.p_value for couple in couples] == [pytest.approx(2 / 2**9)] * 3
    assert [couple.corrected_p_value for couple in couples] == [pytest.approx(3 * 2 / 2**9)] * 3
    assert all("corrected for 3 comparisons" in sentence for sentence in verdict(analyse(store)))


def test_files_hold_the_same_numbers_and_nothing_hostile_gets_through(tmp_path):
    store = Store.create(tmp_path / STUDY_FILE, Study(HOSTILE))
    pairs = [
        replace(pair, prompt=f"=1+1 {HOSTILE}", category=HOSTILE, first_model=f"={HOSTILE}") for pair in comparisons(4)
    ]
    store.add_pairs(pairs)
    store.invite(HOSTILE, 1)
    answer_all(store, lambda rater, task: side_of(SECOND, task))
    analysis, checks = analyse(store), CheckSettings()
    paths = {path.name: path for path in write_report(analysis, tmp_path / "report", command=HOSTILE, checks=checks)}
    report = json.loads(paths["study.json"].read_text())
    assert report == report_json(analysis, HOSTILE, checks)
    assert report["kept"]["couples"][0]["wins"] == 4 and not report["is_partial"]
    for name in ("report.html", "report.md"):
        text = paths[name].read_text()
        assert "<script>alert" not in re.sub(r"(?m)^    .*$", "", text)  # indented lines are code in Markdown
    assert "<script>alert" not in paths["report.html"].read_text() and "<script" not in chart(analysis.kept.couples)
    for name in ("results.csv", "pairs.csv", "raters.csv"):
        rows = list(csv.reader(io.StringIO(paths[name].read_text())))
        assert len(rows) > 1 and all(len(row) == len(rows[0]) for row in rows)
        assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row)
    assert write_report(analysis, tmp_path / "report", command="", checks=checks)  # replaces an earlier one


def test_long_names_are_cut_in_the_chart_alone(tmp_path):
    store = Store.create(tmp_path / STUDY_FILE, Study("t"))
    names = "a-model-of-a-very-long-name", "another-model-of-a-long-name"
    store.add_pairs(comparisons(3, models=names))
    store.invite("rater-01", 1)
    answer_all(store, lambda rater, task: side_of(SECOND, task))
    analysis = analyse(store)
    assert "another-model-… against a-model-of-a-v…: 100.0%</text>" in chart(analysis.kept.couples)
    assert f"<td>{names[1]} against {names[0]}</td>" in page(analysis, "", CheckSettings())


def test_the_page_is_readable_on_a_phone_and_runs_nothing(tmp_path, browser):
    store = three_groups(tmp_path)
    answer_all(store, lazy)
    write_report(analyse(store), tmp_path, command="trl-sipo study report", checks=CheckSettings())
    with open_context(browser, viewport=PHONE, is_phone=True, dark=True) as context:
        opened = context.new_page()
        opened.goto((tmp_path / "report.html").as_uri())
        assert context.failures == [] and opened.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        bars = opened.locator("svg rect")
        assert bars.count() == 3
        widths = [bars.nth(number).bounding_box()["width"] for number in range(3)]
        couple = analyse(store).kept.couples[0]
        shares = [number / 12 for number in (couple.wins, couple.ties, couple.losses)]
        assert [width / sum(widths) for width in widths] == pytest.approx(shares, abs=0.01)
        assert "tuned wins against base" in opened.locator("svg").get_attribute("aria-label")
