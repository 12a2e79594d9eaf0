# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a run say, in sentences: whether it learns, stands still or falls apart, and from which numbers.

The rules are those of docs/source/metrics.md, "Reading them together"; the warnings are the trainer's own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from trl_sipo.reporting.charts import short
from trl_sipo.reporting.run_files import Run
from trl_sipo.reporting.run_quality import Quality
from trl_sipo.reporting.thinning import Course
from trl_sipo.trainer.run_warnings import DRIFT_RISE, MASKED_SHARE, SATURATED_SHARE

ACCURACY, MARGIN, CHOSEN = "rewards/accuracies", "rewards/margins", "rewards/chosen"
DRIFT, REJECTED_DRIFT = "drift/chosen_error", "drift/rejected_error"
MASKED, SATURATED = "sipo/masked_fraction", "rewards/saturated_fraction"
DISTANCE, PROXIMAL_LOSS = "proximal/distance", "proximal/loss"
_FEW_LOGS = 5
# The margin has fallen when less than this share of its best is left, which must have been one: large, or with an
# accuracy that chance does not give.
_FALLEN, _LARGE_MARGIN = 0.5, 0.1
# Share of the steps from which on a run that has not learned anything is said not to.
_EARLY = 0.1
# Share of the steps since when samples that were measured are those of the present model.
_FRESH = 0.9
# Share of points that are not finite from which on they are more than an accident.
_MANY_BROKEN = 0.1
# Accuracy in training and held out between which a run memorises.
_MEMORISED, _UNLEARNT = 0.95, 0.6
_NO_MARGIN = 0.01
# Rise of the winner's error that is far.
_FAR = 0.5
# Its rewards are scores of the policy alone: below 0 is not below a reference.
_WITHOUT_REFERENCE = "MaPO"
# Kinds of what is found, the best first.
GOOD, NEUTRAL, DOUBT, BAD = "good", "neutral", "doubt", "bad"


@dataclass(frozen=True)
class Figure:
    """One number of the summary.

    Attributes:
        name: What it is.
        value: As text.
        note: Since when, or compared with what.
    """

    name: str
    value: str
    note: str = ""


@dataclass
class Findings:
    """What is said of a run.

    Attributes:
        kind: "good", "neutral", "doubt" or "bad".
        verdict: In a few words.
        sentences: What it rests on.
        figures: The numbers worth a look.
    """

    kind: str
    verdict: str
    sentences: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def findings_of(run: Run, quality: Quality | None = None) -> Findings:
    """Look at a run, and at what was measured of its samples, which counts for more than its own numbers."""
    if run.is_empty:
        return Findings(NEUTRAL, "Nothing logged yet", ["The run has not logged anything so far."], [])
    measured = _measured(run, quality or Quality())
    rules = (_fallen, _standing, _drifting, _forgetting, _memorising, _learning)
    broken = _broken(run)
    fresh = [finding for is_fresh, finding in measured if is_fresh]
    found = [*broken, *fresh, *(result for rule in rules if (result := rule(run)) is not None)]
    found += [finding for is_fresh, finding in measured if not is_fresh]
    judged = [finding for finding in found if finding[1]]
    kind, verdict, first = judged[0] if judged else _unknown(run)
    undecided = [sentence for _, verdict, sentence in found if not verdict]
    sentences = [first, *(sentence for _, _, sentence in judged[1:]), *undecided, *run.warnings]
    return Findings(kind, verdict, sentences, _figures(run))


_Finding = tuple[str, str, str]


def _best_course(run: Run, key: str) -> tuple[Course | None, str]:
    """Held out if it is there, else of training."""
    for split in run.held_out:
        if (course := run.course(key, split)) is not None and course.finite:
            return course, "held-out"
    course = run.course(key)
    return (course if course is not None and course.finite else None), "training"


def _broken(run: Run) -> list[_Finding]:
    """The metric that suffers most; without a verdict where it has recovered, as a gradient norm of float16 does."""
    found = []
    for place, log in (("", run.train), *((f" ({split})", log) for split, log in run.held_out.items())):
        for key in log.keys:
            course = log.course(key)
            if course is not None and course.num_broken:
                gaps = course.means.count(None)
                is_bad = course.means[-1] is None or gaps > _MANY_BROKEN * len(course.means)
                found.append((is_bad, gaps, f"`{key}`{place}", course))
    if not found:
        return []
    is_bad, _, name, course = max(found, key=lambda entry: entry[:2])
    text = (
        f"{course.num_broken} logged value(s) of {name} are NaN or infinite, the first by step "
        f"{short(course.first_broken)}; charts have gaps there."
    )
    return [(BAD, "Numbers that are not finite", text) if is_bad else (NEUTRAL, "", text)]


def _measured(run: Run, quality: Quality) -> list[tuple[bool, _Finding]]:
    """What evaluations say of the latest model against the base, and whether that is nearly the present one; without a
    verdict where they cannot tell."""
    found = []
    for measure, by_run in quality.win_rates.items():
        points = by_run.get(run.name)
        if not points:
            continue
        last = points[-1]
        kind, verdict = NEUTRAL, ""
        if last.low > 0.5 and last.is_sure:
            kind, verdict = GOOD, "Better than its base"
        elif last.high < 0.5 and last.is_sure:
            kind, verdict = BAD, "Worse than its base"
        interval = f"{last.value:.1%} [{last.low:.1%}, {last.high:.1%}]"
        text = f"Measured at step {last.step}: {measure} against the base {interval}"
        finding = kind, verdict, f"{text}{'.' if verdict else ', which cannot tell them apart.'}"
        found.append((last.step >= _FRESH * run.last_step, finding))
    return sorted(found, key=lambda entry: (BAD, GOOD, NEUTRAL).index(entry[1][0]))


def _fallen(run: Run) -> _Finding | None:
    margin, where = _best_course(run, MARGIN)
    if margin is None or where != "held-out":
        return None
    best_step, best = max(margin.finite, key=lambda point: point[1])
    step, last = margin.finite[-1]
    if best <= _NO_MARGIN or last >= _FALLEN * best:
        return None
    if best < _LARGE_MARGIN and not _is_beyond_chance(run, best_step):
        return None
    text = (
        f"The held-out margin has fallen from {short(best)} at step {short(best_step)} to {short(last)} at step "
        f"{short(step)}: take the weights of the former."
    )
    return BAD, "Falling apart", text


def _is_beyond_chance(run: Run, step: float) -> bool:
    accuracy, _ = _best_course(run, ACCURACY)
    chance = chance_range(run)
    return accuracy is not None and dict(accuracy.finite).get(step, 0.0) > (chance[1] if chance else 0.5)


def _drifting(run: Run) -> _Finding | None:
    drift, where = _best_course(run, DRIFT)
    if drift is None or drift.finite[-1][1] <= DRIFT_RISE:
        return None
    step, last = drift.finite[-1]
    text = (
        f"The winner drifts: at step {short(step)} the {where} error on chosen images is {last:.1%} above the "
        "reference's. Look at the samples, and measure their quality."
    )
    return (BAD, "The winner drifts far", text) if last > _FAR else (DOUBT, "The winner drifts", text)


def _standing(run: Run) -> _Finding | None:
    if run.train.num_rows < _FEW_LOGS:
        return None
    masked, saturated = run.recent(MASKED), run.recent(SATURATED)
    if masked is not None and masked >= MASKED_SHARE:
        lately = f"Lately {masked:.0%} of the pairs are masked:"
        if run.recent(PROXIMAL_LOSS) is not None:  # which a mask leaves as it is
            return DOUBT, "Nearly all masked", f"{lately} only the proximal term acts, which pulls the policy back."
        text = f"{lately} hardly anything is trained, and flat is no convergence."
        return DOUBT, "Standing still: masked", text
    if saturated is not None and saturated > SATURATED_SHARE:
        return (
            DOUBT,
            "Standing still: saturated",
            f"Lately {saturated:.0%} of the logits are saturated: `beta` is large.",
        )
    return None


def _forgetting(run: Run) -> _Finding | None:
    """Margins rise while the chosen images become less likely too."""
    chosen, where = _best_course(run, CHOSEN)
    margin, _ = _best_course(run, MARGIN)
    if chosen is None or margin is None or len(chosen.finite) < 2 or run.text("method") == _WITHOUT_REFERENCE:
        return None
    last, gain = chosen.finite[-1][1], margin.finite[-1][1]
    if gain <= _NO_MARGIN or last >= -0.1 * gain:
        return None
    text = (
        f"The {where} reward of chosen images is {short(last)}, so that the margin of {short(gain)} "
        "comes from rejected images that get worse faster."
    )
    return DOUBT, "Winning by forgetting", text


def _memorising(run: Run) -> _Finding | None:
    train, held_out = run.recent(ACCURACY), run.last_held_out(ACCURACY)
    if train is None or held_out is None or run.train.num_rows < _FEW_LOGS:
        return None
    if train < _MEMORISED or held_out > _UNLEARNT:
        return None
    return (
        DOUBT,
        "Memorising",
        f"Accuracy is {train:.0%} in training and {held_out:.0%} held out: the run memorises its pairs.",
    )


def _learning(run: Run) -> _Finding | None:
    accuracy, where = _best_course(run, ACCURACY)
    margin, _ = _best_course(run, MARGIN)
    if accuracy is None or margin is None:
        return None
    last, gain = accuracy.finite[-1][1], margin.finite[-1][1]
    chance = chance_range(run) if where == "held-out" else None
    band = f"; chance alone would be {chance[0]:.0%} to {chance[1]:.0%} with that many pairs" if chance else ""
    if where != "held-out":
        band = "; without held-out pairs this may be memory"
    text = f"The {where} accuracy is {last:.1%}{band}. The margin is {short(gain)}."
    if last > (chance[1] if chance else 0.5) and gain > 0:
        return (GOOD, "Learning", text) if where == "held-out" else (NEUTRAL, "Learning its training pairs", text)
    if run.train.num_rows < _FEW_LOGS or accuracy.finite[-1][0] == 0 or _is_early(run):
        return NEUTRAL, "Too early to say", text
    advice = " The learning rate or the number of steps is small for this `beta`." if abs(gain) < _NO_MARGIN else ""
    return DOUBT, "No sign of learning", f"{text}{advice}"


def _is_early(run: Run) -> bool:
    most = run.setting("max_steps")
    return most is not None and not run.has_ended and run.last_step < _EARLY * most


def _unknown(run: Run) -> _Finding:
    loss, _ = _best_course(run, "loss")
    if loss is None:
        return NEUTRAL, "Nothing to judge by", "Neither accuracy nor margin nor loss was logged."
    (_, first), (step, last) = loss.finite[0], loss.finite[-1]
    course = f"from {short(first)} to {short(last)} at step {short(step)}"
    text = f"This method has no margin to judge by. Its loss went {course}."
    return NEUTRAL, "Trains without pairs", text


def chance_range(run: Run) -> tuple[float, float] | None:
    """Accuracies of a model that knows nothing, in 95 of 100 runs; a pair counts once, however many its levels."""
    pairs = run.last_start.get("eval_pairs")
    if isinstance(pairs, Mapping):
        judged = next((split for split in run.held_out if run.course(ACCURACY, split) is not None), None)
        pairs = pairs.get(judged, next(iter(pairs.values()), None))
    if isinstance(pairs, bool) or not isinstance(pairs, int) or not 0 < pairs < 2**53:
        return None
    half = min(0.98 / math.sqrt(pairs), 0.5)
    return 0.5 - half, 0.5 + half


def _figures(run: Run) -> list[Figure]:
    figures = []
    for name, key, is_share in (
        ("accuracy", ACCURACY, True),
        ("margin", MARGIN, False),
        ("winner's drift", DRIFT, True),
        ("distance", DISTANCE, False),
        ("loss", "loss", False),
    ):
        course, where = _best_course(run, key)
        if course is not None:
            step, value = course.finite[-1]
            figures.append(Figure(name, f"{value:z.1%}" if is_share else short(value), f"{where}, step {short(step)}"))
    for name, key in (("masked", MASKED), ("saturated", SATURATED)):
        if (share := run.recent(key)) is not None:
            figures.append(Figure(name, f"{share:.0%}", "last tenth, at least 5 logs"))
    return figures
