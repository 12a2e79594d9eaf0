# SPDX-License-Identifier: Apache-2.0
"""Figures of audits. Needs matplotlib (extra `plots`); plain numbers in, a `matplotlib.figure.Figure` out."""

from collections.abc import Mapping, Sequence

from trl_sipo.reporting.figures import label_axes, line_style, new_figure


def beta_figure(
    betas: Sequence[float],
    saturated: Mapping[str, Sequence[float]],
    span: tuple[float, float],
    given: float | None,
    *,
    levels: Sequence[float],
    scale: Sequence[float],
    level_label: str,
):
    """Saturation over beta, with the recommended span, and the margin scale over noise levels.

    Args:
        betas: (betas,) ascending, positive.
        saturated: Drift as a fraction, in text, to (betas,) shares.
        span: Ends of the recommended range.
        given: The beta that is judged; None: none.
        levels, scale: (levels,).
    """
    figure = new_figure(figsize=(9.2, 3.4))
    left, right = figure.subplots(1, 2)
    left.axvspan(*span, color="#999999", alpha=0.18, linewidth=0)
    for index, (drift, shares) in enumerate(saturated.items()):
        left.plot(
            betas, [100 * share for share in shares], label=f"at a drift of {float(drift):.0%}", **line_style(index)
        )
    if given is not None:
        left.axvline(given, color="#000000", linewidth=1.2)
        left.annotate(" given", (given, 50), rotation=90, ha="right", va="center", fontsize=8)
    left.set_xscale("log")
    left.set_ylim(-2, 102)
    label_axes(left, "Draws that are let go (grey: recommended)", "beta", "%")
    left.legend(frameon=False, fontsize=8, loc="best")
    right.plot(levels, scale, **line_style(0))
    right.set_yscale("log")
    label_axes(right, "Margin by beta and drift", level_label, "scale")
    return figure


def data_figure(
    shortcuts: Mapping[str, Mapping[str, float]],
    levels: Sequence[float],
    agreements: Sequence[Mapping[str, float]],
    *,
    level_label: str,
):
    """How far simple properties, and the model as it is, tell the chosen sample from the rejected one.

    Args:
        shortcuts: Property to its share with "estimate", "low" and "high".
        levels, agreements: Of the model, (levels,), the shares likewise; empty without a model.
    """
    figure = new_figure(figsize=(9.2, 3.4))
    left, right = figure.subplots(1, 2)
    for place, share in enumerate(reversed(shortcuts.values())):
        ends = [[100 * (share["estimate"] - share["low"])], [100 * (share["high"] - share["estimate"])]]
        left.errorbar(100 * share["estimate"], place, xerr=ends, fmt="o", color=line_style(0)["color"])
    left.set_yticks(range(len(shortcuts)), [name.replace("_", " ") for name in reversed(shortcuts)])
    left.axvline(50, color="#555555", linewidth=0.8)
    left.set_xlim(-2, 102)
    label_axes(left, "Chosen sample has more of it", "% of pairs", "")
    if levels:
        low, middle, high = ([100 * share[end] for share in agreements] for end in ("low", "estimate", "high"))
        style = line_style(1)
        right.plot(levels, middle, **style)
        right.fill_between(levels, low, high, color=style["color"], alpha=0.15, linewidth=0)
        right.axhline(50, color="#555555", linewidth=0.8)
        right.set_ylim(-2, 102)
        label_axes(right, "Chosen sample is likelier to the model", level_label, "% of pairs")
    else:
        right.set_visible(False)
    return figure
