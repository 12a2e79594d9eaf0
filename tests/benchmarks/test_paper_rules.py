# SPDX-License-Identifier: Apache-2.0
"""Verdicts on the papers' claims, from results whose numbers are made up so that the answer is known, either way."""

import math

import numpy as np
import pytest

from trl_sipo.errors import ConfigurationError

PER_PROMPT, PROMPTS = 4, 96


def _record(shares, **measures):
    """A measurement in which of each prompt's four images so many are right, by both verifiers."""
    correct = [int(image < share) for share in shares for image in range(PER_PROMPT)]
    accuracy = sum(correct) / len(correct)
    return {
        "correct": correct,
        "second_correct": correct,
        "accuracy": accuracy,
        "second_accuracy": accuracy,
        "frechet_distance": 20.0,
        "diversity": 1.0,
        **measures,
    }


def _compared(paper, first, second):
    intervals = paper("intervals")
    return intervals.with_holm({"a - b": intervals.compared(first, second, PER_PROMPT)})["a - b"]


def _row(values, low, high, p_holm):
    mean = sum(values) / len(values)
    prompts = {"low": low, "high": high}
    return {
        "mean": mean,
        "low": min(values),
        "high": max(values),
        "values": values,
        "over_prompts": prompts,
        "p_holm": p_holm,
    }


@pytest.mark.parametrize(
    ("values", "low", "high", "p", "outcome"),
    [
        ([0.3, 0.4, 0.5], 0.2, 0.6, 0.001, "holds"),
        ([-0.3, -0.4, -0.5], -0.6, -0.2, 0.001, "opposite"),
        ([0.3, 0.4, -0.1], 0.1, 0.4, 0.001, "undecided"),  # seeds disagree
        ([0.3, 0.4, 0.5], -0.1, 0.9, 0.2, "undecided"),  # prompts disagree
        ([0.01, -0.02, 0.03], -0.03, 0.04, 0.9, "alike"),
        ([0.01, -0.02, 0.06], -0.03, 0.04, 0.9, "undecided"),  # one seed is beyond the margin
        ([0.01, 0.02, 0.03], 0.01, 0.04, 0.03, "holds"),  # small, and sure
    ],
)
def test_a_claimed_sign(values, low, high, p, outcome, paper):
    rules = paper("rules")
    row = _row(values, low, high, p)
    assert rules.by_prompts(row, 1) == outcome
    turned = {"holds": "opposite", "opposite": "holds"}
    assert rules.by_prompts(row, -1) == turned.get(outcome, outcome)


@pytest.mark.parametrize(
    ("values", "low", "p", "outcome"),
    [
        ([0.0, 0.01, -0.02], -0.04, 0.9, "holds"),
        ([0.3, 0.4, 0.5], 0.2, 0.001, "holds"),
        ([-0.3, -0.4, -0.5], -0.6, 0.001, "opposite"),
        ([-0.06, 0.01, 0.0], -0.04, 0.9, "undecided"),
        ([0.0, 0.01, -0.02], -0.08, 0.9, "undecided"),
    ],
)
def test_what_is_kept(values, low, p, outcome, paper):
    assert paper("rules").is_kept(_row(values, low, 0.6, p)) == outcome


@pytest.mark.parametrize(
    ("low", "high", "sign", "null", "outcome"),
    [
        (1.0, 2.0, 1, 0.0, "holds"),
        (1.0, 2.0, -1, 0.0, "opposite"),
        (1.0, 2.0, 1, 3.0, "opposite"),
        (-1.0, 2.0, 1, 0.0, "undecided"),
        (None, None, 1, 0.0, "undecided"),
    ],
)
def test_an_interval_over_seeds(low, high, sign, null, outcome, paper):
    assert paper("rules").by_seeds({"low": low, "high": high}, sign, null=null) == outcome


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["holds", "holds"], "reproduced"),
        (["holds", "alike"], "partly"),
        (["holds", "undecided"], "partly"),
        (["alike", "undecided"], "not reproduced"),
        (["opposite"], "not reproduced"),
        (["undecided", "undecided"], "cannot be said here"),
        ([], "cannot be said here"),
    ],
)
def test_a_verdict_of_several_checks(outcomes, verdict, paper):
    rules = paper("rules")
    assert rules.verdict([rules.Check("", outcome) for outcome in outcomes]) == verdict


def test_a_clear_difference_is_found_and_none_is_not_invented(paper):
    rules = paper("rules")
    good, bad = [_record([4] * PROMPTS)] * 3, [_record([1] * PROMPTS)] * 3
    row = _compared(paper, good, bad)["second_accuracy"]
    assert row["mean"] == pytest.approx(0.75) and row["values"] == pytest.approx([0.75] * 3)
    assert row["p"] == row["p_holm"] < 0.001 and rules.by_prompts(row, 1) == "holds"
    same = _compared(paper, good, good)
    assert same["second_accuracy"]["p"] == 1 and same["frechet_distance"]["mean"] == 0
    chance = np.random.default_rng(0)
    one, other = ([_record(chance.integers(0, 5, PROMPTS)) for _ in range(3)] for _ in range(2))
    assert rules.by_prompts(_compared(paper, one, other)["second_accuracy"], 1) == "undecided"


def test_pairs_are_of_one_seed_and_of_one_prompt(paper):
    """Prompts differ a lot and the arms a little, in few of them: only the pairing sees how little."""
    shares = [0, 3] * (PROMPTS // 2)
    better = [share + (number % 8 == 0) for number, share in enumerate(shares)]
    arms = [[_record(rows)] * 3 for rows in (better, shares)]
    first, second = (paper("intervals").measured(records, PER_PROMPT)["accuracy"]["over_prompts"] for records in arms)
    assert first["low"] < second["high"]
    row = _compared(paper, *arms)["accuracy"]
    assert row["mean"] == pytest.approx(1 / 32) and row["p"] < 0.001


def test_intervals_over_seeds_are_students(paper):
    found = paper("intervals").over_seeds([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)
    assert found["mean"] == 2 and (found["low"], found["high"]) == pytest.approx((2 - half, 2 + half))
    assert paper("intervals").over_seeds([1.0])["low"] is None


def test_holm_is_over_the_comparisons_of_a_question(paper):
    rows = {name: {m: {"p": p} for m in ("accuracy", "second_accuracy")} for name, p in (("a", 0.01), ("b", 0.04))}
    found = paper("intervals").with_holm(rows)
    assert [found[name]["second_accuracy"]["p_holm"] for name in rows] == pytest.approx([0.02, 0.04])


def _result(paper, question, records):
    """The result of a question from made-up records, label -> one per seed; the same at all steps."""
    module, base = paper("question"), _record([3] * PROMPTS)
    runs = {
        label: [
            {
                "run": {"seed": s, "steps": 300},
                "records": [{**r, "step": t} for t in (50, 300)],
                "log": [],
                "seconds": 1.0,
            }
            for s, r in enumerate(rows)
        ]
        for label, rows in records.items()
    }

    class Place:
        class settings:  # noqa: N801
            samples_per_prompt = PER_PROMPT

    Place.base = base
    return module.evaluated(paper(question).QUESTION, runs, Place)


def _arms(paper, question, shares, **measures):
    """Records of all arms of a question: so many right of four, by label; 3 as the base where none is given."""
    labels = paper(question).QUESTION.arms
    return {label: [_record([shares.get(label, 3)] * PROMPTS, **measures)] * 3 for label in labels}


def test_beta_claims_go_both_ways(paper):
    beta, checks, rules = paper("beta_sensitivity"), paper("checks"), paper("rules")
    fragile = {beta.label("DPO", 2.0): 0, beta.label("DPO", 20.0): 2}
    result = _result(paper, "beta_sensitivity", _arms(paper, "beta_sensitivity", fragile))
    assert rules.verdict(checks.small_beta_fails(result)) == "reproduced"
    rows = checks.range_is_smaller(result)
    assert [row.outcome for row in rows] == ["holds", "holds"]
    assert "2 to 2000: DPO 75 points, SIPO 0" in rows[0].text and "20 to 2000: DPO 25 points" in rows[1].text
    assert rules.verdict(checks.sipo_above_base(result)) == "not reproduced"  # alike, at every beta
    turned = {label.replace("DPO", "SIPO"): share for label, share in fragile.items()}
    result = _result(paper, "beta_sensitivity", _arms(paper, "beta_sensitivity", turned))
    assert rules.verdict(checks.small_beta_fails(result)) == "not reproduced"
    assert [row.outcome for row in checks.range_is_smaller(result)] == ["opposite", "opposite"]
    assert rules.verdict(checks.sipo_above_base(result)) == "not reproduced"
    best = {beta.label("SIPO", value): 4 for value in (2.0, 20.0, 200.0, 2000.0)}
    result = _result(paper, "beta_sensitivity", _arms(paper, "beta_sensitivity", best))
    assert rules.verdict(checks.sipo_above_base(result)) == "reproduced"
    assert [check.outcome for check in checks.sipo_best_above(result)] == ["holds", "undecided"]


def test_what_happens_only_below_the_papers_betas_is_partly_reproduced(paper):
    beta, checks, rules = paper("beta_sensitivity"), paper("checks"), paper("rules")
    result = _result(paper, "beta_sensitivity", _arms(paper, "beta_sensitivity", {beta.label("DPO", 2.0): 0}))
    assert [check.outcome for check in checks.small_beta_fails(result)] == ["holds", "alike"]
    assert rules.verdict(checks.small_beta_fails(result)) == "partly"
    assert [check.outcome for check in checks.range_is_smaller(result)] == ["holds", "undecided"]


def test_a_sentence_says_at_which_betas_sipo_is_better_and_at_which_worse(paper):
    beta = paper("beta_sensitivity")
    shares = {beta.label("SIPO", 2.0): 4, beta.label("SIPO", 20.0): 4, beta.label("SIPO", 2000.0): 1}
    result = _result(paper, "beta_sensitivity", _arms(paper, "beta_sensitivity", shares))
    for value, low, high in ((20.0, 1.0, 3.0), (200.0, -3.0, -1.0)):
        row = result["comparisons"][f"{beta.label('SIPO', value)} - {beta.label('DPO', value)}"]
        row["frechet_distance"] |= {"low": low, "high": high}
    sentence = paper("report").at_the_same_beta(result)
    assert "accuracy better at 2, 20, worse at 2000" in sentence
    assert "Frechet distance better at 200, worse at 20." in sentence


@pytest.mark.parametrize(
    ("narrow", "wide", "helps", "dynamic_better"),
    [(4, 4, "reproduced", "not reproduced"), (4, 1, "partly", "partly"), (1, 1, "not reproduced", "partly")],
)
def test_each_static_mask_is_compared(narrow, wide, helps, dynamic_better, paper):
    mask, rules, checks = paper("static_dynamic_mask"), paper("rules"), paper("checks")
    shares = {mask.STATIC: narrow, mask.WIDE: wide}
    result = _result(paper, "static_dynamic_mask", _arms(paper, "static_dynamic_mask", shares))
    assert rules.verdict(checks.static_helps(result)) == helps
    assert rules.verdict(checks.dynamic_better(result)) == dynamic_better


def test_the_wide_static_mask_is_where_the_bases_weight_is_low(paper):
    """On the grid of the runs and on the pairs that they train on; the label says where it ends."""
    weights = paper("question").read("on_off_policy")["weights"]
    part = weights["sources"]["off_policy"][str(paper("protocol").SETTINGS.importance_steps)]
    low, high = paper("protocol").METHODS["wide static mask"][1]["timestep_range"]
    assert high == 1 and low == pytest.approx(part["masked_share"], abs=0.01)
    assert paper("static_dynamic_mask").WIDE.endswith(f" {1000 * low:.0f}")
    assert low == pytest.approx(paper("checks").cut_of(part["times"], part["curve"], weights["threshold"]), abs=0.02)


def test_the_page_says_of_what_is_partly_reproduced_how_much(paper):
    report, rules = paper("report"), paper("rules")
    claim = paper("claims").CLAIMS[0]
    found = [rules.Check("", outcome) for outcome in ("holds", "opposite", "alike")]
    text = "\n".join(report.summary([report.Row(claim, rules.verdict(found), found)]))
    assert f"{claim.place}, 1 of 3 checks)" in text and "1 partly" in text
    whole = [rules.Check("", "holds")]
    assert f"({claim.place})" in report.summary([report.Row(claim, rules.verdict(whole), whole)])[1]


def test_diffusion_dpo_is_judged_at_its_own_beta_too(paper):
    """Only at the small one does it collapse: partly."""
    long, rules, checks = paper("long_training"), paper("rules"), paper("checks")
    result = _result(paper, "long_training", _arms(paper, "long_training", {long.DPO: 0}))
    assert [check.outcome for check in checks.collapses(result)] == ["holds", "alike", "alike", "alike"]
    assert rules.verdict(checks.collapses(result)) == "partly"


@pytest.mark.parametrize(("dynamic", "random", "verdict"), [(4, 1, "partly"), (1, 4, "not reproduced")])
def test_the_control_decides_whether_selection_matters(dynamic, random, verdict, paper):
    mask, rewards = paper("static_dynamic_mask"), {"held_out_chosen": -1.0, "held_out_rejected": -2.0}
    shares = {mask.DYNAMIC: dynamic, mask.RANDOM: random}
    result = _result(
        paper, "static_dynamic_mask", _arms(paper, "static_dynamic_mask", shares, held_out_margins=1.0, **rewards)
    )
    assert paper("rules").verdict(paper("checks").selection_matters(result)) == verdict


def test_a_loss_that_comes_back_is_told_from_one_that_falls(paper):
    rebounds = paper("checks").rebounds
    assert rebounds([{"loss": value} for value in (0.7, 0.5, 0.3, 0.6)]) == pytest.approx(0.3)
    assert rebounds([{"loss": value} for value in (0.7, 0.5, 0.3, 0.2)]) == pytest.approx(-0.1)
    uneven = [0.7] * 7 + [0.5] * 8 + [0.3] * 7 + [0.3] * 6 + [0.7] * 2  # thirty: the end counts as well
    assert rebounds([{"loss": value} for value in uneven]) == pytest.approx(0.1)


def test_of_a_run_too_short_for_four_losses_nothing_is_said(paper):
    rules, checks = paper("rules"), paper("checks")
    result = _result(paper, "long_training", _arms(paper, "long_training", {}))
    for arm in result["arms"].values():
        arm["log"] = [[{"loss": 0.7}]] * 3
    assert rules.verdict(checks.loss_rebounds(result)) == "cannot be said here"


@pytest.mark.parametrize(("high", "outcome"), [(1.05, "holds"), (1.3, "undecided")])
def test_overhead(high, outcome, paper):
    row = {"seconds_ratio": {"mean": 1.02, "low": 1.0, "high": high}, "flops_ratio": 1.0, "bytes_ratio": 1.0}
    found = paper("checks").overhead({"objectives": {"C&M": row, "SIPO": row}})
    assert [check.outcome for check in found] == [outcome] * 2


@pytest.mark.parametrize(("gain", "outcome"), [(1, "opposite"), (0, "holds"), (-1, "holds")])
def test_clean_labels_need_no_alpha(gain, outcome, paper):
    noise = paper("label_noise")
    result = _result(paper, "label_noise", _arms(paper, "label_noise", {noise.label(8.0, 0.0): 3 + gain}))
    assert {check.outcome for check in paper("checks").clean_needs_none(result)} == {"holds", outcome}


def test_the_cut_of_a_curve_is_where_it_crosses(paper):
    cut_of = paper("checks").cut_of
    assert cut_of([0.0, 0.1, 0.2], [0.5, 0.8, 1.0], 0.9) == pytest.approx(0.15)
    assert cut_of([0.0, 0.1, 0.2], [0.95, 0.98, 1.0], 0.9) == 0


def test_every_claim_has_a_place_and_something_to_decide_it(paper):
    report = paper("report")
    for claim in paper("claims").CLAIMS:
        assert claim.text and claim.place and claim.paper
        if claim.question:
            assert claim.question in (*report.QUESTIONS, "online")
        else:
            assert claim.reason


@pytest.mark.parametrize(("off", "verdict"), [(1, "reproduced"), (3, "not reproduced")])
def test_each_method_is_compared_on_both_kinds_of_pairs(off, verdict, paper):
    policy = paper("on_off_policy")
    shares = {policy.label(method, 2.0, "off_policy"): off for method in policy.METHODS}
    result = _result(paper, "on_off_policy", _arms(paper, "on_off_policy", shares))
    checks = paper("checks").off_policy_is_worse(result)
    assert [check.text.split(",")[0] for check in checks] == ["DPO", "SIPO"]
    assert paper("rules").verdict(checks) == verdict


def test_masked_shares_are_of_as_many_steps_in_all_runs(paper):
    log = [{"step": step, "sipo/masked_fraction": step / 100} for step in range(10, 101, 10)]
    often, once = (
        {"records": [{"step": s, "masked_share": 0.0} for s in steps], "log": log} for steps in ((50, 100), (100,))
    )
    shares = [
        [r["masked_share"] for r in paper("question").with_masked_share(run)["records"]] for run in (often, once)
    ]
    assert shares[0] == pytest.approx([0.3, 0.8]) and shares[1] == pytest.approx([0.8])


def test_ratios_of_times_are_within_rounds(paper):
    """Rounds that are ten times as slow as others do not matter: what is timed in them is slow alike."""
    overhead = paper("overhead")
    slowness = [1.0, 10.0, 2.0, 5.0, 1.5, 7.0, 3.0, 1.2, 4.0, 9.0, 2.5, 6.0]
    noise = np.random.default_rng(0).normal(1.2, 0.01, len(slowness))
    found = overhead.interval_of_ratio([a * b for a, b in zip(slowness, noise, strict=True)], slowness)
    assert found["low"] < 1.2 < found["high"] and found["high"] - found["low"] < 0.05


@pytest.mark.parametrize(("content", "words"), [(None, "does not exist"), ('{"arms": {', "is no whole JSON")])
def test_a_result_that_cannot_be_read_is_named_with_its_command(content, words, paper, tmp_path):
    if content is not None:
        (tmp_path / "ablation.json").write_text(content)
    with pytest.raises(ConfigurationError, match=f"ablation.json {words}.*ablation.py`"):
        paper("question").read("ablation", tmp_path)
