# SPDX-License-Identifier: Apache-2.0
"""The page of `trl-sipo data check`: counts, label noise, and pairs to look at."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from trl_sipo.data.checking.check import Listed
from trl_sipo.data.checking.rows import THUMBNAIL, CheckedRow
from trl_sipo.reporting.page import Page, png_bytes

_CELL, _MARGIN, _LINE = THUMBNAIL[0], 8, 16
_PAIRS_PER_ROW = 3
_NUM_BAD = 50

_COUNTS = {
    "num_rows": "Rows",
    "num_pairs": "Pairs, one arm preferred",
    "num_ties": "Ties (dropped, or trained with soft_labels)",
    "num_unlabelled": "Rows without a label (dropped)",
    "num_bad": "Bad rows (training refuses them)",
    "num_identical_arms": "Pairs of the same thing twice",
    "num_repeats": "Rows that repeat an earlier one",
    "num_contradictory_pairs": "Pairs of which either arm is preferred somewhere",
    "num_unequal_sizes": "Pairs of unequal size",
    "num_unequal_lengths": "Pairs of unequal length",
    "shortest_frames": "Frames of the shortest video",
    "longest_frames": "Frames of the longest video",
}


def data_page(title: str, report: Mapping[str, Any], shown: Sequence[CheckedRow], bad: Sequence[Listed]) -> str:
    """The report as one HTML file.

    Args:
        title: of the page.
        report: as `DataCheck.report`.
        shown: rows with thumbnails.
        bad: bad rows; the first of them are shown.
    """
    page = Page(title)
    verdict = "every row can be read" if not report["num_bad"] else f"{report['num_bad']} rows cannot be trained on"
    page.paragraph(
        f"{report['num_rows']} rows of the {report['format']} format ({report['kind']}): {verdict}.", "verdict"
    )
    page.heading("Counts")
    page.table(("", ""), [(text, str(report[key])) for key, text in _COUNTS.items() if key in report])
    _label_noise(page, report["label_noise"])
    page.heading("Sizes and prompts")
    rows = [(f"size {size}", str(count)) for size, count in report["sizes"].items()]
    rows += [(f"{rate} frames/s", str(count)) for rate, count in report.get("frame_rates", {}).items()]
    rows += [(f"prompts: {key}", str(value)) for key, value in _flat(report["prompts"])]
    page.table(("", "images, videos or prompts"), rows)
    if bad:
        page.heading("Bad rows")
        page.table(("row", "reason"), [(str(listed.row), listed.reason) for listed in bad[:_NUM_BAD]])
    if shown:
        page.heading("Pairs")
        page.figure(png_bytes(contact_sheet(shown)), "First arm left, second arm right.", "A contact sheet of pairs.")
        page.table(("row", "label", "prompt"), [(str(row.number), _label(row), row.prompt or "") for row in shown])
    return page.render()


def contact_sheet(rows: Sequence[CheckedRow]) -> Image.Image:
    """Rows with thumbnails, the arms side by side under the row's number and label."""
    width, height = 2 * _CELL + 2 * _MARGIN, _CELL + _LINE + _MARGIN
    num_columns = min(_PAIRS_PER_ROW, len(rows))
    num_lines = -(-len(rows) // num_columns)
    sheet = Image.new("RGB", (num_columns * width, num_lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for position, row in enumerate(rows):
        left, top = (position % num_columns) * width, (position // num_columns) * height
        draw.text((left + _MARGIN, top + 2), f"row {row.number}  label {_label(row)}", fill="black")
        for column, arm in enumerate(row.arms or ()):
            if arm.thumbnail is not None:
                sheet.paste(arm.thumbnail, (left + _MARGIN + column * _CELL, top + _LINE))
    return sheet


def _label(row: CheckedRow) -> str:
    return "none" if row.label != row.label else f"{row.label:.3g}"


def _label_noise(page: Page, noise: Mapping[str, Any]) -> None:
    page.heading("How noisy the labels look")
    rows = [
        (text, f"{noise[key]['hits']} of {noise[key]['total']}", _interval(noise[key]), _interval(noise[flips]))
        for key, flips, text in (
            ("agreement_of_repeats", "flips_from_repeats", "Judgements of one pair that agree"),
            ("cyclic_triples", "flips_from_triples", "Triples that are cyclic"),
        )
        if noise[key] is not None
    ]
    if rows:
        page.table(("", "counted", "share (95 %)", "labels turned, if at random"), rows)
    if noise["mean_minority_share"] is not None:
        page.paragraph(
            f"On average {noise['mean_minority_share']:.1%} of the votes are for the side with fewer: how much single "
            "voters differ, not how often the majority errs."
        )
    page.paragraph(f"What it suggests for Poly-DPO: {noise['suggestion']}")
    page.paragraph(noise["cannot_know"], "note")


def _interval(part: Mapping[str, float]) -> str:
    return f"{part['value']:.1%} ({part['low']:.1%} to {part['high']:.1%})"


def _flat(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values, those of a mapping within a mapping under both names."""
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        flat += [(f"{key.replace('_', ' ')} {name}".strip(), part) for name, part in inner]
    return flat
