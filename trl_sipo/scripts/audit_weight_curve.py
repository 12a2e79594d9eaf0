# SPDX-License-Identifier: Apache-2.0
"""The curve w(t) of `trl-sipo audit weights`: one row per level, the regions that are masked, and both in words."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
    from trl_sipo.evaluation.importance_curve import PairWeights


def level_rows(
    times: list[float], levels: "NoiseLevel", weights: "PairWeights", mask_threshold: float
) -> list[dict[str, Any]]:
    """One row of numbers per level; means over the pairs."""
    from trl_sipo.core.importance import timestep_mask

    columns = {
        "time": times,
        "timestep": levels.timestep.tolist(),
        "sigma": levels.sigma_t.tolist(),
        # JSON has no infinity: zero terminal SNR and the clean end have no logarithm there.
        "log_snr": [value if math.isfinite(value) else None for value in levels.log_snr.tolist()],
        "chosen_error": weights.chosen_error.mean(1).tolist(),
        "rejected_error": weights.rejected_error.mean(1).tolist(),
        "chosen_weight": weights.chosen.exp().mean(1).tolist(),
        "rejected_weight": weights.rejected.exp().mean(1).tolist(),
        "pair_weight": weights.pair.exp().mean(1).tolist(),
        "median_pair_weight": weights.pair.exp().quantile(0.5, dim=1).tolist(),
        "masked_share": (~timestep_mask(weights.pair, mask_threshold)).float().mean(1).tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def table(rows: list[dict[str, Any]], level_name: str) -> str:
    """The rows as text."""
    heads = ("time", level_name, "log-SNR", "error", "w(chosen)", "w(rejected)", "w(pair)", "masked")
    lines = [" ".join(f"{head:>11}" for head in heads)]
    for row in rows:
        level = f"{row['timestep']:>11d}" if level_name == "timestep" else f"{row['sigma']:>11.4f}"
        log_snr = "    infinite" if row["log_snr"] is None else f"{row['log_snr']:>11.2f}"
        error = (row["chosen_error"] + row["rejected_error"]) / 2
        weights = " ".join(f"{row[name]:>11.4f}" for name in ("chosen_weight", "rejected_weight", "pair_weight"))
        lines.append(f"{row['time']:>11.3f} {level} {log_snr} {error:>11.4f} {weights} {row['masked_share']:>10.0%} ")
    return "\n".join(lines)


def find_regions(
    rows: list[dict[str, Any]],
    schedule: "VPSchedule | FlowSchedule",
    level_name: str,
    mask_threshold: float,
    within: tuple[float, float] = (0.0, 1.0),
) -> list[dict[str, Any]]:
    """Where half of the pairs or more are masked: ends in time and in the schedule's own unit, and in words."""
    import torch

    from trl_sipo.evaluation.importance_curve import masked_regions

    curve = [row["median_pair_weight"] for row in rows]
    regions = []
    for start, end in masked_regions([row["time"] for row in rows], curve, mask_threshold, within=within):
        ends = schedule.level_at(torch.tensor([start, end], dtype=torch.float64))
        low, high = (ends.timestep if level_name == "timestep" else ends.sigma_t).tolist()
        shown = [f"{value:.0f}" if level_name == "timestep" else f"{value:.2f}" for value in (low, high)]
        if start == 0 and end == 1:
            words = f"every {level_name}"
        elif start == 0:
            words = f"{level_name} <= {shown[1]}"
        elif end == 1:
            words = f"{level_name} >= {shown[0]}"
        else:
            words = f"{shown[0]} <= {level_name} <= {shown[1]}"
        regions.append({"time": [start, end], level_name: [low, high], "words": words})
    return regions


def describe(
    regions: list[dict[str, Any]], masked_share: float, num_levels: int, within: tuple[float, float] = (0.0, 1.0)
) -> list[str]:
    """What is masked of the levels `within` these times, in plain words, and what that suggests."""
    length = within[1] - within[0]
    if not regions:
        masked = "Masked: no level for half of the pairs or more."
    else:
        share = sum(region["time"][1] - region["time"][0] for region in regions) / length
        where = " and ".join(region["words"] for region in regions)
        known = f"{length / num_levels:.2g}"
        masked = f"Masked: {where}, i.e. {share:.1%} of uniformly drawn times (ends known to {known} in time)."
    expected = f"Of single pairs at single levels, {masked_share:.1%} are masked: about where `sipo/masked_fraction` "
    return [masked, expected + "should start with uniform `timestep_sampling`.", suggestion(regions, masked_share)]


def suggestion(regions: list[dict[str, Any]], masked_share: float) -> str:
    """What the masked region means for a run."""
    if masked_share == 0:
        return "SIPO would start as Diffusion-DPO does; its mask acts only once the policy's error has grown."
    if masked_share > 0.9:
        return (
            "Next to nothing is left to train on: the grid is too coarse for this model, or the data is unlike what "
            "it knows. Raise `importance_steps`, or lower `mask_threshold`."
        )
    if [region["time"][0] for region in regions] in ([], [0.0]):
        return (
            "Only the clean end is cut, as in Fig. 4 of the SIPO paper. As the policy moves away from the data its "
            "error grows, and so does this region."
        )
    return (
        "Levels beyond the clean end are cut as well, unlike in the SIPO paper: there the model's error is large "
        "for a step of this grid. See whether they stay with more `importance_steps`."
    )
