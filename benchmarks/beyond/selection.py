# SPDX-License-Identifier: Apache-2.0
"""What the tuning runs decide: the settings of each method that are tested, and the one that a user would take."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from beyond.area import MEASURES, dominated_area, on_frontier, on_plane
from beyond.points import Points
from beyond.protocol import ALWAYS, MAX_SETTINGS, MAX_SETTINGS_OF_OTHERS, Arm

#: One method in one cell: its policies, and the base's measures.
Measured = tuple[Points, Mapping[str, float]]


def planes_of(measured: Sequence[Measured]) -> list[np.ndarray]:
    """The policies' means in the plane of each cell, (policies, 2)."""
    return [on_plane(points.means, base) for points, base in measured]


def settings_on_frontier(measured: Measured) -> set[str]:
    """Settings of a method with a policy on its frontier in a cell."""
    points, base = measured
    is_on = on_frontier(on_plane(points.means, base))
    return {setting for (setting, _), on in zip(points.policies, is_on, strict=True) if on}


def chosen_settings(measured: Sequence[Measured], max_settings: int, always: Sequence[str] = ()) -> list[str]:
    """The settings of a method that are tested, in the order in which they are chosen.

    Of those that are on the method's frontier in a cell, one after the other the one that adds most to the area, by
    its mean over the cells, until `max_settings` are chosen or none adds anything; of equals the first. If none is on
    a frontier, the first setting of all.

    Args:
        measured: Of each tuning cell that the method is made for, the same policies.
        max_settings: How many at most.
        always: Settings that are chosen first, whatever was measured.
    """
    settings = list(dict.fromkeys(setting for points, _ in measured for setting, _ in points.policies))
    allowed = set().union(*(settings_on_frontier(cell) for cell in measured))
    chosen = list(always)
    while len(chosen) < max_settings:
        left = [setting for setting in settings if setting in allowed and setting not in chosen]
        gains = {setting: _area(measured, [*chosen, setting]) - _area(measured, chosen) for setting in left}
        best = max(left, key=gains.__getitem__, default=None)
        if best is None or gains[best] <= 0:
            break
        chosen.append(best)
    return chosen or settings[:1]


def _area(measured: Sequence[Measured], settings: Sequence[str]) -> float:
    areas = []
    for (points, _), plane in zip(measured, planes_of(measured), strict=True):
        is_of = np.array([setting in settings for setting, _ in points.policies])
        areas.append(float(dominated_area(plane * is_of[:, None])))
    return sum(areas) / len(areas)


def chosen_arms(arms: Sequence[Arm], tuning: Mapping[str, Sequence[Measured]]) -> list[Arm]:
    """The arms that are tested, in the order of `arms`; of each method those of `chosen_settings`."""
    chosen = {
        method: chosen_settings(
            measured,
            MAX_SETTINGS.get(method, MAX_SETTINGS_OF_OTHERS),
            [ALWAYS[method]] if method in ALWAYS else [],
        )
        for method, measured in tuning.items()
    }
    return [arm for arm in arms if arm.label in chosen.get(arm.method, ())]


def one_policy(measured: Sequence[Measured], settings: Sequence[str], *, at_the_end: bool) -> tuple[str, int]:
    """The one (setting, step) of a method that a user would take everywhere.

    The one whose rectangle is the largest in the mean over the cells; of equals, such as where none wins against the
    base, the one of the highest quality.

    Args:
        measured: Of each tuning cell, the same policies.
        settings: Those that are tested.
        at_the_end: Whether every run goes to its last step.
    """
    policies = measured[0][0].policies
    last = {setting: step for setting, step in policies}  # steps ascend
    planes = np.mean([np.c_[plane.prod(-1), plane[:, 1]] for plane in planes_of(measured)], axis=0)
    allowed = [
        index
        for index, (setting, step) in enumerate(policies)
        if setting in settings and (not at_the_end or step == last[setting])
    ]
    return policies[max(allowed, key=lambda index: tuple(planes[index]))]


def tuning_table(tuning: Mapping[str, Mapping[str, Measured]], chosen: Sequence[Arm]) -> list[dict[str, Any]]:
    """Every policy of the tuning runs: method, cell, setting, step, measures, on its frontier or not, tested or not.

    Args:
        tuning: Method -> cell -> what it measured there.
        chosen: The arms that are tested.
    """
    is_chosen = {(arm.method, arm.label) for arm in chosen}
    rows = []
    for method, cells in tuning.items():
        for cell, (points, base) in cells.items():
            is_on = on_frontier(on_plane(points.means, base))
            for (setting, step), means, on in zip(points.policies, points.means, is_on, strict=True):
                about = {"method": method, "cell": cell, "setting": setting, "step": step}
                measures = dict(zip(MEASURES, means.tolist(), strict=True))
                flags = {"on_frontier": bool(on), "is_tested": (method, setting) in is_chosen}
                rows.append({**about, **measures, **flags})
    return rows
