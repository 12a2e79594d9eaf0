# SPDX-License-Identifier: Apache-2.0
"""w(t), the masked region and the errors by noise level: charts with frames, through which a slider goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trl_sipo.reporting.charts import Chart, Line, short
from trl_sipo.reporting.heat_maps import HeatMap
from trl_sipo.reporting.level_frames import Frame
from trl_sipo.reporting.run_files import Run

WEIGHT, MASKED_SHARE = "importance_weight", "masked"
# Where nothing is masked, the line at which SIPO's default would.
_DEFAULT_THRESHOLD = 0.9
_FIRST_STYLE = 7
_ROOM = 1.05  # above and below the errors


@dataclass(frozen=True)
class FramedChart:
    """A chart by noise level that shows one frame at a time, with lines that stay.

    Attributes:
        chart: With the lines of the last frame first, then those that stay.
        times: Common to all lines.
        frames: Frame by frame, the values of the lines that move.
        texts: What each frame shows, in words.
    """

    chart: Chart
    times: list[float]
    frames: list[list[list[float | None]]]
    texts: list[str]


@dataclass(frozen=True)
class LevelPanel:
    """What is shown of one run by noise level.

    Attributes:
        steps: Of the frames.
        note: What a frame is.
        charts: Those with frames.
        maps: Step by noise level.
    """

    steps: list[int]
    note: str
    charts: list[FramedChart]
    maps: list[HeatMap]


def level_panel(run: Run) -> LevelPanel | None:
    """The panel of a run; None where no levels were logged."""
    frames = run.eval_frames if _has_measures(run.eval_frames) else run.train_frames
    if not _has_measures(frames):
        return None
    charts = [chart for make in (_weight_chart, _error_chart) if (chart := make(run, frames)) is not None]
    denser = run.train_frames if _has_measures(run.train_frames) and len(run.train_frames) > 1 else frames
    return LevelPanel(
        [frame.step for frame in frames], _what_frames_are(run, frames), charts, list(_maps(run, denser))
    )


def _has_measures(frames: Sequence[Frame]) -> bool:
    return any(set(values) - {"pairs", "timestep"} for frame in frames for values in frame.levels.values())


def _what_frames_are(run: Run, frames: Sequence[Frame]) -> str:
    if frames is run.eval_frames:
        left_out = run.num_eval_frames - len(frames)
        some = f" {left_out} evaluations between them are left out." if left_out else ""
        return f"Each step is an evaluation of the held-out pairs, with the same noise.{some}"
    pooled = " The draws of neighbouring logs are pooled." if run.num_train_frames > len(frames) else ""
    return f"Each step stands for the pairs trained since the one before; few pairs a level make it noisy.{pooled}"


def _times(frames: Sequence[Frame]) -> list[float]:
    return sorted({time for frame in frames for time in frame.levels})


def _weight_chart(run: Run, frames: Sequence[Frame]) -> FramedChart | None:
    times = _times(frames)
    values = [frame.values(WEIGHT, times) for frame in frames]
    if not any(value is not None for row in values for value in row):
        return None
    threshold = run.setting("mask_threshold")
    lines = [Line("this step", times, values[-1], style=0)]
    if len(frames) > 1:
        lines.append(Line(f"step {frames[0].step}", times, values[0], style=_FIRST_STYLE, is_faint=True))
    is_masking = threshold is not None and 0 < threshold <= 1
    line = threshold if is_masking and threshold is not None else _DEFAULT_THRESHOLD
    name = "masked below" if is_masking else "SIPO would mask below"
    chart = Chart(
        "Importance weight w(t)",
        lines,
        "Mean w by noise level, 0 clean, 1 pure noise; pairs below the line are masked. It falls as the policy leaves "
        "the data.",
        x_label="noise",
        x_range=(0.0, 1.0),
        levels=((line, f"{name} {short(line)}"),),
        y_range=(0.0, _top_of(values, 1.04)),
        shaded_below=line if is_masking else None,
    )
    texts = [_weight_text(frame, row, line) for frame, row in zip(frames, values, strict=True)]
    return FramedChart(chart, times, [[row] for row in values], texts)


def _top_of(rows: Sequence[Sequence[float | None]], least: float) -> float:
    return max([least, *(1.04 * value for row in rows for value in row if value is not None)])


def _weight_text(frame: Frame, row: Sequence[float | None], line: float) -> str:
    known = [value for value in row if value is not None]
    below = sum(value < line for value in known)
    shares = [(values[MASKED_SHARE], values["pairs"]) for values in frame.levels.values() if MASKED_SHARE in values]
    pairs = sum(count for _, count in shares)
    masked = f", and {sum(share * count for share, count in shares) / pairs:.0%} of the pairs masked" if pairs else ""
    return f"Step {frame.step}: mean w below {short(line)} at {below} of {len(known)} noise levels{masked}."


def _error_chart(run: Run, frames: Sequence[Frame]) -> FramedChart | None:
    """Errors over the reference's, or as they are where there is none."""
    has_reference = any("chosen_ref_error" in values for frame in frames for values in frame.levels.values())
    measure = _ratio if has_reference else _absolute
    times = _times(frames)
    rows = [[measure(frame, arm, times) for arm in ("chosen", "rejected")] for frame in frames]
    known = [value for row in rows for line in row for value in line if value is not None]
    if not known:
        return None
    low, high = (min([1.0, *known]), max([1.0, *known])) if has_reference else (min(known), max(known))
    arms = [Line(name, times, rows[-1][index], style=index) for index, name in enumerate(("chosen", "rejected"))]
    note = "Error of the policy by noise level."
    if has_reference:
        note = "Error of the policy over the reference's. Chosen below 1 is learning; both above 1 is forgetting."
    chart = Chart(
        "Error by noise level",
        arms,
        note,
        x_label="noise",
        x_range=(0.0, 1.0),
        levels=((1.0, "the reference"),) if has_reference else (),
        y_range=(low / _ROOM, high * _ROOM),
        is_log=True,
    )
    show = (lambda value: f"{value - 1:+z.1%}") if has_reference else short
    texts = [_error_text(frame, row, show) for frame, row in zip(frames, rows, strict=True)]
    return FramedChart(chart, times, rows, texts)


def _ratio(frame: Frame, arm: str, times: Sequence[float]) -> list[float | None]:
    errors, references = frame.values(f"{arm}_error", times), frame.values(f"{arm}_ref_error", times)
    return [a / b if a and b and a > 0 and b > 0 else None for a, b in zip(errors, references, strict=True)]


def _absolute(frame: Frame, arm: str, times: Sequence[float]) -> list[float | None]:
    return [value if value is not None and value > 0 else None for value in frame.values(f"{arm}_error", times)]


def _error_text(frame: Frame, rows: Sequence[Sequence[float | None]], show: Callable[[float], str]) -> str:
    """How far the errors go, as they are or against the reference's."""
    words = []
    for name, row in zip(("chosen", "rejected"), rows, strict=True):
        known = [value for value in row if value is not None]
        if known:
            words.append(f"{name} {show(min(known))} to {show(max(known))}")
    return f"Step {frame.step}: {', '.join(words)}."


def _maps(run: Run, frames: Sequence[Frame]):
    times, steps = _times(frames), [frame.step for frame in frames]
    for title, measure, note in (
        ("w by step and noise level", WEIGHT, "Dark: the policy no longer makes the steps that lead to the data."),
        ("Masked share by step and noise level", MASKED_SHARE, "Light: nearly all pairs of the level are dropped."),
    ):
        cells = [frame.values(measure, times) for frame in frames]
        known = [value for column in cells for value in column if value is not None]
        if len(frames) < 2 or not known:
            continue
        low, high = (min(known), max(known)) if measure == WEIGHT else (0.0, 1.0)
        yield HeatMap(title, steps, times, cells, low, high, note)
