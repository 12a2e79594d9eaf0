# SPDX-License-Identifier: Apache-2.0
"""The page of `trl-sipo report`: what runs did, in one HTML file that needs nothing else."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from trl_sipo.reporting.chart_cards import PLOT, ChartCards
from trl_sipo.reporting.charts import swatch
from trl_sipo.reporting.figures import COLOURS, STYLES
from trl_sipo.reporting.level_panels import level_panel
from trl_sipo.reporting.page import Page, data_address, table_markup
from trl_sipo.reporting.run_charts import (
    OTHER_REWARDS,
    metric_charts,
    quality_charts,
    reward_chart,
    reward_range,
    sample_score_charts,
)
from trl_sipo.reporting.run_files import Run, started_at, time_text
from trl_sipo.reporting.run_findings import Findings, findings_of
from trl_sipo.reporting.run_pictures import GRID, Picture, PromptSamples, Samples, facts_of
from trl_sipo.reporting.run_quality import Quality
from trl_sipo.reporting.setting_tables import command_of, environment_rows, setting_rows, start_rows

_SIGNS = {"good": "✓", "neutral": "·", "doubt": "!", "bad": "✕"}
# Contrast that a line needs against its background (WCAG 2.2, 1.4.11), with a little to spare.
_CONTRAST = 3.2
_BACKGROUNDS = {"light": "#ffffff", "dark": "#1d2329"}


@dataclass(frozen=True)
class Contents:
    """All that a report shows.

    Attributes:
        title: Its heading.
        runs: Under their names.
        samples: One per run; None: it has none.
        quality: From evaluations.
        reload_seconds: Between two looks at a run that goes on; None: the page stays as it is.
    """

    title: str
    runs: Sequence[Run]
    samples: Sequence[Samples | None]
    quality: Quality
    reload_seconds: int | None = None


def run_page(contents: Contents, now: datetime | None = None) -> str:
    """The report as HTML.

    Args:
        now: The time that it tells; by default that of the clock.
    """
    cards = ChartCards()
    sections = [
        ("summary", "Summary", _summary(contents)),
        ("rewards", "Rewards", _rewards(contents, cards)),
        ("quality", "Quality", _quality(contents, cards)),
        ("training", "Training", _training(contents, cards)),
        ("levels", "Noise levels", _levels(contents, cards)),
        ("samples", "Samples", _samples(contents)),
        ("settings", "Settings", _settings(contents)),
        ("environment", "Environment and commands", _environment(contents)),
    ]
    shown = [section for section in sections if section[2]]
    page = Page(contents.title, style=_style(), script=_asset("report.js"), reload_seconds=contents.reload_seconds)
    page.parts.append(_bar(contents, [section[:2] for section in shown], now or datetime.now(UTC)))
    for name, title, content in shown:
        page.parts.append(f'<section id="{name}"><h2>{html.escape(title)}</h2>{content}</section>')
    page.data = {"plot": PLOT, "charts": cards.data, "reload": contents.reload_seconds}
    return page.render()


def _asset(name: str) -> str:
    return files("trl_sipo.reporting").joinpath("assets", name).read_text(encoding="utf-8")


def _style() -> str:
    """The style sheet, with the colours and dashes of the figures."""
    dashes = "".join(f".d{i} .line{{stroke-dasharray:{_dash(style)}}}" for i, style in enumerate(STYLES))
    light, dark = (
        "".join(f"--c{i}:{readable_on(colour, background)};" for i, colour in enumerate(COLOURS))
        for background in _BACKGROUNDS.values()
    )
    uses = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(len(COLOURS)))
    sheet = _asset("report.css").replace("/*light colours*/", light).replace("/*dark colours*/", dark)
    return sheet + dashes + uses


def _dash(style: Any) -> str:
    """A matplotlib line style as SVG has it, in units of a line of two."""
    named = {"-": "none", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"}
    return named[style] if isinstance(style, str) else " ".join(str(2 * length) for length in style[1])


def readable_on(colour: str, background: str, ratio: float = _CONTRAST) -> str:
    """The colour, mixed with black or white just as far as it needs to be told from the background."""
    towards = 255 if luminance(background) < 0.2 else 0
    channels = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    for percent in range(0, 101, 2):
        mixed = "#" + "".join(f"{round(c + (towards - c) * percent / 100):02x}" for c in channels)
        if contrast(mixed, background) >= ratio:
            return mixed
    return mixed


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb", 0 to 1 (WCAG 2.2)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _bar(contents: Contents, sections: Sequence[tuple[str, str]], now: datetime) -> str:
    links = "".join(f'<li><a href="#{name}">{html.escape(title)}</a></li>' for name, title in sections)
    state = f"Written {now:%Y-%m-%d %H:%M:%S} UTC."
    if contents.reload_seconds:
        state += f" The page looks again every {contents.reload_seconds} s."
    pause = '<button type="button" id="pause" hidden aria-pressed="false">Pause updates</button>'
    return (
        f'<div class="bar"><nav aria-label="Sections"><ul>{links}</ul></nav><div class="tools">'
        f"{pause if contents.reload_seconds else ''}"
        '<button type="button" id="theme" hidden>Theme: system</button></div></div>'
        f'<p class="note" id="written">{html.escape(state)}</p>'
    )


def _summary(contents: Contents) -> str:
    runs = contents.runs
    found = [findings_of(run, contents.quality) for run in runs]
    parts = [
        _summary_card(run, findings, style, len(runs))
        for style, (run, findings) in enumerate(zip(runs, found, strict=True))
    ]
    return f'<div class="summaries">{"".join(parts)}</div>'


def _summary_card(run: Run, findings: Findings, style: int, num_runs: int) -> str:
    key = swatch(style) if num_runs > 1 else ""
    facts = [run.text("method"), run.text("model") or run.text("backbone"), _progress(run)]
    figures = "".join(
        f"<div><dt>{html.escape(figure.name)}</dt><dd>{html.escape(figure.value)}</dd>"
        f'<dd class="since">{html.escape(figure.note)}</dd></div>'
        for figure in findings.figures
    )
    sentences = "".join(f"<li>{_prose(text)}</li>" for text in [*findings.sentences, *run.notes])
    return (
        f'<article class="summary {findings.kind}"><h3>{key}{html.escape(run.name)}</h3>'
        f'<p class="facts">{html.escape(" · ".join(filter(None, facts)))}</p>'
        f'<p class="finding"><span class="sign" aria-hidden="true">{_SIGNS[findings.kind]}</span> '
        f"{html.escape(findings.verdict)}</p>"
        f'<dl class="figures">{figures}</dl><ul class="sentences">{sentences}</ul></article>'
    )


def _prose(text: str) -> str:
    """A sentence as markup; what stands between backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _progress(run: Run) -> str:
    most = run.setting("max_steps")
    of_all = f" of {most:.0f}" if most and most > 0 else ""
    begun = started_at(run.starts[0]) if run.starts else ""
    state = "ended" if run.has_ended else "not ended" if run.source else ""
    latest = "" if run.has_ended else time_text(run.last_time)
    times = [f"{word} {when}" for word, when in (("started", begun), ("last log", latest)) if when]
    parts = [f"step {run.last_step}{of_all}", state, *times]
    return ", ".join(filter(None, parts))


def _grid(cards: Sequence[str]) -> str:
    """Cards three a line on a wide screen, or two where that fills the lines."""
    wide = " wide" if len(cards) in (2, 4) else ""
    return f'<div class="cards{wide}">{"".join(cards)}</div>' if cards else ""


def _by_run(contents: Contents, make: Callable[[int, Run], str]) -> str:
    """A part per run, under the run's name where there are several."""
    parts = [(run, make(number, run)) for number, run in enumerate(contents.runs)]
    if len(contents.runs) == 1:
        return parts[0][1]
    named = [(number, run, part) for number, (run, part) in enumerate(parts) if part]
    return "".join(
        f'<div class="of-run"><p class="run-name">{swatch(number)}{html.escape(run.name)}</p>{part}</div>'
        for number, run, part in named
    )


def _rewards(contents: Contents, cards: ChartCards) -> str:
    shared = reward_range([run for run in contents.runs if run.text("method") not in OTHER_REWARDS])
    own = []
    for run in contents.runs:
        y_range = None if run.text("method") in OTHER_REWARDS else shared
        if (chart := reward_chart(run, y_range)) is not None:
            title = chart.title if len(contents.runs) == 1 else f"{chart.title}: {run.name}"
            own.append(cards.line_card(type(chart)(**{**chart.__dict__, "title": title})))
    others = [cards.line_card(chart) for chart in metric_charts(contents.runs, is_reward=True)]
    unlike = sorted({run.text("method") for run in contents.runs} & set(OTHER_REWARDS))
    note = (
        f'<p class="note">Rewards of {html.escape(" and ".join(unlike))} are of another kind than those of the other '
        "methods: compare their courses, not their values.</p>"
        if unlike and len({run.text("method") for run in contents.runs}) > 1
        else ""
    )
    return _grid([*own, *others]) + note


def _quality(contents: Contents, cards: ChartCards) -> str:
    quality = contents.quality
    charts = [
        *quality_charts(quality.measures, contents.runs, "Samples of the model at each step; whiskers are intervals."),
        *quality_charts(quality.win_rates, contents.runs, "Against the base, same prompts and noise; ties one half."),
        *sample_score_charts(contents.runs),
    ]
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in quality.notes)
    return _grid([cards.line_card(chart) for chart in charts]) + notes


def _training(contents: Contents, cards: ChartCards) -> str:
    thinned = [run for run in contents.runs if run.train.rows_per_point > 1]
    notes = "".join(
        f'<p class="note">{html.escape(run.name)} has {run.train.num_rows} training logs: a point is the mean of '
        f"{run.train.rows_per_point}, the band spans them.</p>"
        for run in thinned
    )
    return _grid([cards.line_card(chart) for chart in metric_charts(contents.runs, is_reward=False)]) + notes


def _levels(contents: Contents, cards: ChartCards) -> str:
    def panel(number: int, run: Run) -> str:
        found = level_panel(run)
        if found is None:
            return ""
        group = f"levels-{number}"
        charts = [cards.framed_card(chart, found.steps, group) for chart in found.charts]
        maps = [cards.map_card(chart, group) for chart in found.maps]
        slider = _slider(group, found.steps, f"Step of the noise levels of {run.name}")
        return f'{slider}<p class="note">{html.escape(found.note)}</p>{_grid([*charts, *maps])}'

    return _by_run(contents, panel)


def _slider(slider_id: str, steps: Sequence[int], label: str) -> str:
    """Goes through steps; nothing without the script."""
    last = len(steps) - 1
    values = html.escape(" ".join(map(str, steps)))
    hidden = " data-single" if last < 1 else ""
    return (
        f'<div class="slider" hidden{hidden}><label for="{slider_id}">Step</label>'
        f'<input type="range" id="{slider_id}" min="0" max="{last}" value="{last}" step="1" data-steps="{values}" '
        f'aria-label="{html.escape(label)}" aria-valuetext="step {steps[-1]}">'
        f'<output for="{slider_id}">{steps[-1]}</output></div>'
    )


def _samples(contents: Contents) -> str:
    def panel(number: int, run: Run) -> str:
        samples = contents.samples[number]
        return "" if samples is None else _sample_panel(f"samples-{number}", samples, run.name)

    return _by_run(contents, panel)


def _sample_panel(group: str, samples: Samples, name: str) -> str:
    steps = samples.steps
    is_clip = any(picture.still for row in samples.rows for picture in row.current.values())
    stop = '<button type="button" class="stop" hidden aria-pressed="false">Stop clips</button>' if is_clip else ""
    facts = facts_of(samples)
    facts = f"Drawn with {facts}; the same noise at every step." if facts else "The same noise at every step."
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in [facts, *samples.notes[:10]])
    rows = "".join(_sample_row(row, steps, f"{group}-{index}") for index, row in enumerate(samples.rows))
    return (
        f'<div class="samples" data-group="{group}">{_slider(group, steps, f"Step of the samples of {name}")}'
        '<div class="tools"><button type="button" class="mode" hidden aria-pressed="false">Side by side</button>'
        f"{stop}</div>"
        f'{notes}<div class="prompts">{rows}</div></div>'
    )


def _sample_row(row: PromptSamples, steps: Sequence[int], row_id: str) -> str:
    prompt = "All prompts, one below the other" if row.prompt == GRID else row.prompt or "Prompt not known"
    shown = [] if row.base is None else [_picture(row.base, "base", f"Base model: {prompt}", "base")]
    for step in steps:
        if step in row.current:
            shown.append(_picture(row.current[step], str(step), f"Step {step}: {prompt}", f"step {step}"))
    return (
        f'<figure class="prompt" id="{row_id}"><div class="strip" tabindex="0">{"".join(shown)}</div>'
        f"<figcaption>{html.escape(prompt)}</figcaption></figure>"
    )


def _picture(picture: Picture, key: str, alternative: str, caption: str) -> str:
    small = " small" if max(picture.width, picture.height) <= 128 else ""
    still = ""
    if picture.still:
        address = data_address("image/webp", picture.still)
        still = f'<source media="(prefers-reduced-motion: reduce)" srcset="{address}">'
    return (
        f'<div class="shot{small}" data-step="{key}"><picture>{still}'
        f'<img src="{data_address("image/webp", picture.data)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{html.escape(alternative)}"></picture><span class="which">{html.escape(caption)}</span></div>'
    )


def _settings(contents: Contents) -> str:
    different, every = setting_rows(contents.runs)
    if not every:
        return ""
    header = ["setting", *(run.name for run in contents.runs)]
    whole = _details("all-settings", f"All {len(every)} settings", table_markup(header, every))
    if len(contents.runs) == 1:
        return whole
    if not different:
        return f'<p class="note">The runs have the same settings.</p>{whole}'
    return f"<h3>What differs</h3>{table_markup(header, different)}{whole}"


def _environment(contents: Contents) -> str:
    different, every = environment_rows(contents.runs)
    parts = []
    for run in contents.runs:
        starts = start_rows(run)
        if starts:
            command = command_of(run.last_start)
            typed = (
                f"<pre>{html.escape(command)}</pre>" if command else '<p class="note">Started without a command.</p>'
            )
            table = table_markup(("started", "from step", "settings that changed"), starts)
            parts.append(f"<h3>{html.escape(run.name)}</h3>{typed}{table}")
    header = ["", *(run.name for run in contents.runs)]
    if different:
        parts.append(f"<h3>Environments differ</h3>{table_markup(header, different)}")
    if every:
        parts.append(_details("all-environment", "Whole environment", table_markup(header, every)))
    return "".join(parts)


def _details(details_id: str, summary: str, content: str) -> str:
    return f'<details id="{details_id}"><summary>{summary}</summary>{content}</details>'
