# SPDX-License-Identifier: Apache-2.0
"""Which charts a report of runs has, and which lines these have: one place that knows metrics by their names."""

from collections.abc import Iterator, Mapping, Sequence

from trl_sipo.reporting.charts import Chart, Line, short
from trl_sipo.reporting.run_files import Run
from trl_sipo.reporting.run_quality import Measured
from trl_sipo.reporting.thinning import Course
from trl_sipo.trainer.run_warnings import DRIFT_RISE, MASKED_SHARE, SATURATED_SHARE

# Methods whose rewards are no log-ratios of pairs against a reference (docs/source/metrics.md), and what theirs are.
OTHER_REWARDS = {
    "MaPO": "Scores of the policy alone, without a reference: their difference counts.",
    "Diffusion-KTO": "How much more likely than the reference the policy finds images that are liked, or not.",
    "D3PO": "How much more likely than the reference the policy finds the recorded steps.",
}
TRAINING = "training"


def course_line(label: str, course: Course, style: int, *, is_faint: bool = False) -> Line:
    """A line with a band where points stand for several logs."""
    band = (course.lows, course.highs) if course.has_spread else ((), ())
    return Line(label, course.steps, course.means, *band, style=style, is_faint=is_faint)


def reward_chart(run: Run, y_range: tuple[float, float] | None) -> Chart | None:
    """Chosen and rejected reward of one run (Fig. 2 of the SIPO paper), held out over training."""
    lines = []
    for name, key, style in (("chosen", "rewards/chosen", 0), ("rejected", "rewards/rejected", 1)):
        if (course := run.course(key)) is not None:
            lines.append(course_line(f"{name}, {TRAINING}", course, style, is_faint=bool(run.held_out)))
        for split in run.held_out:
            if (course := run.course(key, split)) is not None:
                lines.append(course_line(f"{name}, {split}", course, style + 2 * _place(run, split)))
    usual = "How much more likely than the reference the policy finds the images. Both falling: it wins by forgetting."
    note = OTHER_REWARDS.get(run.text("method"), usual)
    return _chart("Chosen and rejected reward", lines, note, y_range=y_range, levels=((0.0, ""),)) if lines else None


def reward_range(runs: Sequence[Run]) -> tuple[float, float] | None:
    """One scale for the reward charts of runs whose rewards are of one kind, of what their logs span."""
    values = [0.0]
    for run in runs:
        for key in ("rewards/chosen", "rewards/rejected"):
            courses = [run.course(key), *(run.course(key, split) for split in run.held_out)]
            for course in filter(None, courses):
                values += [value for part in (course.lows, course.highs) for value in part if value is not None]
    low, high = min(values), max(values)
    if len(runs) < 2 or low == high:
        return None
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _place(run: Run, split: str) -> int:
    return list(run.held_out).index(split)


def metric_charts(runs: Sequence[Run], *, is_reward: bool) -> Iterator[Chart]:
    """Charts that show all runs: training thin, held out with markers.

    Args:
        is_reward: Whether those of rewards or the others are wanted.
    """
    for title, key, note in _REWARD_METRICS if is_reward else _METRICS:
        lines = list(_lines(runs, key))
        if lines:
            yield _chart(title, lines, note, levels=_LEVELS.get(key, ()), limits=_LIMITS.get(key, ()))


_REWARD_METRICS = (
    ("Margin", "rewards/margins", "Chosen minus rejected reward: the argument of the loss."),
    ("Implicit accuracy", "rewards/accuracies", "Share of pairs with a margin above 0."),
)
_METRICS = (
    (
        "Loss",
        "loss",
        "Of the objective, masked pairs counted as 0, and what is added to it. Between methods, compare accuracies.",
    ),
    ("Drift of the winner", "drift/chosen_error", "Error on chosen images against the reference's, minus 1."),
    (
        "Drift of the loser",
        "drift/rejected_error",
        "The same of rejected images. It rises by design, but not for ever.",
    ),
    (
        "Distance from the reference",
        "proximal/distance",
        "Of predictions, mean square, with proximal_kappa. It stops to rise where the policy, or the learning rate, "
        "has come to rest.",
    ),
    ("Proximal term", "proximal/loss", "What the pull to the reference adds to the loss."),
    ("Masked share", "sipo/masked_fraction", "Share of pairs that were dropped. Near 1 is a standstill."),
    (
        "Importance weight",
        "sipo/importance_weight",
        "w of a pair before clipping. It falls as the policy leaves the data.",
    ),
    ("Saturated share", "rewards/saturated_fraction", "Share of pairs whose gradient is below 1 % of its largest."),
    ("Clipped share", "sipo/clip_fraction", "Share of pairs whose w is outside of the clip range."),
    ("Gradient norm", "grad_norm", "Before clipping. Exactly 0: everything was masked."),
    ("Learning rate", "learning_rate", ""),
    ("Reference point", "kl", "Of Diffusion-KTO, in log-ratios."),
)
_LEVELS = {
    "rewards/margins": ((0.0, ""),),
    "rewards/accuracies": ((0.5, "chance"),),
    "drift/chosen_error": ((0.0, ""),),
    "drift/rejected_error": ((0.0, ""),),
    # At the start what kernels round, which would make the axis one of decades.
    "proximal/distance": ((0.0, ""),),
    "proximal/loss": ((0.0, ""),),
}
# Where the trainer warns.
_LIMITS = {
    "drift/chosen_error": ((DRIFT_RISE, "warns above"),),
    "sipo/masked_fraction": ((MASKED_SHARE, "warns above"),),
    "rewards/saturated_fraction": ((SATURATED_SHARE, "warns above"),),
}


def _lines(runs: Sequence[Run], key: str) -> Iterator[Line]:
    is_alone = len(runs) == 1
    for style, run in enumerate(runs):
        prefix = "" if is_alone else f"{run.name}, "
        held_out = {split: run.course(key, split) for split in run.held_out}
        has_both = any(course is not None for course in held_out.values())
        if (course := run.course(key)) is not None:
            label = f"{prefix}{TRAINING}" if has_both or is_alone else run.name
            yield course_line(label, course, style, is_faint=has_both)
        for number, (split, course) in enumerate(held_out.items()):
            if course is not None:
                yield course_line(f"{prefix}{split}", course, (style + number) if is_alone else style)


def _chart(title: str, lines: Sequence[Line], note: str, **options) -> Chart:
    return Chart(title, lines, note, gaps=[text for line in lines if (text := _gap(line))], **options)


def _gap(line: Line) -> str:
    missing = sum(value is None for value in line.y)
    return f"{line.label}: {missing} point(s) are not finite and are left as gaps." if missing else ""


def sample_score_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Scores of the sample grids: the policy's with the reference's behind, by reward."""
    keys = list(dict.fromkeys(key for run in runs for key in run.samples.keys))
    for key in keys:
        if key.endswith("_base") and key.removesuffix("_base") in keys:
            continue
        lines = []
        for style, run in enumerate(runs):
            prefix = "" if len(runs) == 1 else f"{run.name}, "
            if (course := run.samples.course(f"{key}_base")) is not None:
                lines.append(course_line(f"{prefix}base", course, style + len(runs), is_faint=True))
            if (course := run.samples.course(key)) is not None:
                lines.append(course_line(f"{prefix}policy", course, style))
        yield _chart(
            f"{key} of the sample grids", lines, "Mean score of the pictures of each grid, same prompts and noise."
        )


def quality_charts(
    measures: Mapping[str, Mapping[str, Sequence[Measured]]], runs: Sequence[Run], note: str
) -> Iterator[Chart]:
    """Measures of evaluations over steps, with intervals where there are any."""
    styles = {run.name: style for style, run in enumerate(runs)}
    for measure, by_run in measures.items():
        lines = []
        for name, points in by_run.items():
            has_interval = any(point.low != point.high for point in points)
            bounds = ([point.low for point in points], [point.high for point in points]) if has_interval else ((), ())
            steps, values = [point.step for point in points], [point.value for point in points]
            label = name if len(runs) > 1 else "policy"
            lines.append(Line(label, steps, values, *bounds, style=styles[name], is_measured=True))
        yield _chart(
            measure, lines, note, levels=((0.5, "as good as the base"),) if measure.startswith("win rate") else ()
        )


def table_of(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the numbers of a chart; where points stand for several logs, the extremes in brackets."""
    steps = sorted({x for line in chart.lines for x in line.x})
    by_line = []
    for line in chart.lines:
        lows, highs = line.low or [None] * len(line.x), line.high or [None] * len(line.x)
        by_line.append({x: _entry(*parts) for x, *parts in zip(line.x, line.y, lows, highs, strict=True)})
    header = [chart.x_label, *(line.label for line in chart.lines)]
    return header, [[short(step), *(cells.get(step, "") for cells in by_line)] for step in steps]


def _entry(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "not finite"
    return short(value) if low is None or low == high else f"{short(value)} [{short(low)}, {short(high)}]"
