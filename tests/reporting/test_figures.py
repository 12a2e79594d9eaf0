# SPDX-License-Identifier: Apache-2.0
"""Figures draw what they are given, and the page holds it safely."""

import sys

import pytest
from PIL import Image

from trl_sipo.errors import ConfigurationError
from trl_sipo.reporting.figures import (
    Series,
    importance_weight_figure,
    quality_figure,
    reward_figure,
    sample_grid,
)
from trl_sipo.reporting.page import Page, png_bytes

TWO_SEEDS = Series("SIPO", [0, 10, 20], [[0.9, 0.8, 0.7], [0.9, 0.6, 0.9]])


def test_a_series_knows_its_centre_and_its_bounds():
    assert TWO_SEEDS.centre == pytest.approx([0.9, 0.7, 0.8])
    assert TWO_SEEDS.low == [0.9, 0.6, 0.7]
    assert TWO_SEEDS.high == [0.9, 0.8, 0.9]


def test_quality_figure_has_a_line_per_method_and_a_band_over_seeds():
    one_seed = Series("DPO", [0, 10, 20], [[0.9, 0.5, 0.1]])
    figure = quality_figure({"accuracy": [one_seed, TWO_SEEDS], "diversity": [one_seed]})
    first, second, unused = figure.axes
    assert [list(line.get_ydata()) for line in first.lines] == [[0.9, 0.5, 0.1], pytest.approx([0.9, 0.7, 0.8])]
    assert len(first.collections) == 1  # the band of the method with two seeds
    assert len(second.lines) == 1 and not unused.get_visible()
    # Readable without colour: each method has a line style of its own.
    assert len({line.get_linestyle() for line in first.lines}) == 2


def test_importance_weight_figure_marks_the_masked_region():
    axes = importance_weight_figure([0, 500, 999], {"base": [0.0, 0.95, 1.0]}, threshold=0.9).axes[0]
    assert list(axes.lines[0].get_ydata()) == [0.0, 0.95, 1.0]
    assert axes.patches[0].get_height() == pytest.approx(0.9)


def test_reward_figure_has_a_panel_per_method():
    figure = reward_figure({"DPO": (TWO_SEEDS, TWO_SEEDS), "SIPO": (TWO_SEEDS, TWO_SEEDS)})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["DPO", "SIPO"]


def test_sample_grid_places_each_image_in_its_cell():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    grid = sample_grid({"base": [red, blue], "SIPO": [blue, red]}, ["one", "two"], cell=32)
    colours = {grid.getpixel((x, y)) for x in range(grid.width) for y in range(grid.height)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
    left = grid.width - 2 * (32 + 6)
    assert grid.getpixel((left + 16, 34 + 16)) == (255, 0, 0)
    assert grid.getpixel((left + 38 + 16, 34 + 16)) == (0, 0, 255)
    assert grid.getpixel((left + 16, 34 + 38 + 16)) == (0, 0, 255)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r"trl-sipo\[plots\]"):
        quality_figure({"accuracy": [TWO_SEEDS]})


def test_the_page_escapes_what_it_is_given():
    page = Page("a <b> title")
    page.heading("x & y")
    page.paragraph("<script>alert(1)</script>", "verdict")
    page.table(["name", "value"], [["<img>", "1"]])
    page.figure(png_bytes(Image.new("RGB", (4, 4))), 'a "caption"', 'an "alternative"')
    page.code("1 < 2")
    text = page.render()
    assert "<script>" not in text and "<img>" not in text
    assert "&lt;script&gt;" in text and "x &amp; y" in text and 'alt="an &quot;alternative&quot;"' in text
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
