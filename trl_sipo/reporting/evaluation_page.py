# SPDX-License-Identifier: Apache-2.0
"""An evaluation as one HTML file, with pictures of what changed most."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trl_sipo.reporting.evaluation_tables import Report, tables, verdict
from trl_sipo.reporting.figures import wrapped
from trl_sipo.reporting.page import Page, png_bytes

_CELL, _GAP, _LINE = 224, 10, 15
_FRAMES = 3
_PROMPT_LENGTH, _PROMPT_LINES = 300, 3


@dataclass(frozen=True)
class Change:
    """One sample of the base beside the candidate's from the same noise.

    Attributes:
        prompt: Of both.
        base, candidate: Images, or videos as uint8 (frames, height, width, 3).
        base_score, candidate_score: By the reward that chose them.
    """

    prompt: str
    base: Image.Image | np.ndarray
    candidate: Image.Image | np.ndarray
    base_score: float
    candidate_score: float


@dataclass(frozen=True)
class Grid:
    """The samples that changed most.

    Attributes:
        name: Of its file.
        caption: What is seen.
        image: Base left, candidate right.
    """

    name: str
    caption: str
    image: Image.Image


def change_grid(name: str, caption: str, changes: Sequence[Change]) -> Grid:
    """Draw changes below one another, two a line: base left, candidate right, with prompt and scores."""
    cells = [_cell(change) for change in changes]
    width = max(cell.width for cell in cells)
    lines = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    heights = [max(cell.height for cell in line) for line in lines]
    sheet = Image.new("RGB", (min(len(cells), 2) * (width + 2 * _GAP), sum(heights) + _GAP * len(lines)), "white")
    top = 0
    for line, height in zip(lines, heights, strict=True):
        for column, cell in enumerate(line):
            sheet.paste(cell, (column * (width + 2 * _GAP), top))
        top += height + _GAP
    return Grid(name, caption, sheet)


def _cell(change: Change) -> Image.Image:
    strips = [_strip(medium) for medium in (change.base, change.candidate)]
    width, font = sum(strip.width for strip in strips) + _GAP, ImageFont.load_default(size=12)
    lines = wrapped(change.prompt[:_PROMPT_LENGTH], width, font).split("\n")[:_PROMPT_LINES]
    lines.append(f"{change.base_score:.4g} -> {change.candidate_score:.4g}")
    top = len(lines) * _LINE + 4
    cell = Image.new("RGB", (width, top + max(strip.height for strip in strips)), "white")
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((0, number * _LINE), line, fill="black", font=font)
    cell.paste(strips[0], (0, top))
    cell.paste(strips[1], (strips[0].width + _GAP, top))
    return cell


def _strip(medium: Image.Image | np.ndarray) -> Image.Image:
    """An image in a cell, or some frames of a video side by side."""
    if isinstance(medium, Image.Image):
        return _fitted(medium, _CELL)
    positions = np.linspace(0, len(medium) - 1, _FRAMES).round().astype(int)
    frames = [_fitted(Image.fromarray(medium[position]), _CELL // 2) for position in positions]
    strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height))
    left = 0
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width
    return strip


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    # Small pictures are enlarged as they are: their pixels are what there is.
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def evaluation_page(report: Report, grids: Sequence[Grid]) -> str:
    """The whole report as HTML."""
    page = Page(report["title"])
    for sentence in verdict(report):
        page.paragraph(sentence, "verdict")
    for table in tables(report):
        page.heading(table.title)
        if table.note:
            page.paragraph(table.note, "note")
        page.table(table.header, table.rows)
    if grids:
        page.heading("What changed most")
        for grid in grids:
            page.figure(png_bytes(grid.image), grid.caption, grid.caption)
    page.heading("How it was made")
    page.code(report["command"])
    page.code(json.dumps({name: report[name] for name in ("settings", "models", "prompts", "versions")}, indent=1))
    return page.render()
