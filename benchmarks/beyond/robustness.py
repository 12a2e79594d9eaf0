# SPDX-License-Identifier: Apache-2.0
"""What becomes of the conclusion when its definitions are others: none of this was fixed before the test.

One method, the subject, is compared with the others in `REFERENCES`: by other scales of quality, other settings, other
cells, and other ideas of what is random. Beside it stand what each setting gives alone, so that all methods have as
many, what tuning measured, and pairs of settings that differ in one thing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from beyond import protocol
from beyond.analysis import Areas
from beyond.area import FRECHET_BEST, FRECHET_WORST, MEASURES, PRIMARY, Quality, on_log_scale
from beyond.evidence import Evidence
from beyond.inference import Estimate, Resampled, mean_of, plain_area, resampled_area
from beyond.points import Points, by_run
from beyond.protocol import MAIN_CELLS, TUNING_CELLS, Cell

SUBJECT = "proximal"
REFERENCES = ("DPO", "DPO, stopped by reward", "DPO, stopped by loss", "SIPO", "KTO")
#: Settings that differ in one thing, as (method, setting): the first without the term, the second with it.
MATCHED = (
    (("DPO", "beta 200, lr 0.0001"), ("proximal", "beta 200, kappa 0.05, lr 0.0001")),
    (("DPO", "beta 200, lr 0.0001"), ("proximal", "beta 200, kappa 0.1, lr 0.0001")),
    # The other brake: ten times the beta.
    (("DPO", "beta 2000, lr 0.0001"), ("proximal", "beta 200, kappa 0.1, lr 0.0001")),
    (("DPO", "beta 20"), ("proximal", "beta 20, kappa 0.5")),
)

#: Of a method, a setting and whether it is the last measurement of its runs.
Keeps = Callable[[str, str, bool], bool]
Combines = Callable[[Mapping[Cell, Resampled]], Estimate | None]


def _linear(distance: np.ndarray, base: Mapping[str, float]) -> np.ndarray:
    return 1 - distance / (FRECHET_WORST * base["frechet_distance"])


def _every(method: str, setting: str, is_last: bool) -> bool:
    return True


def _cells_apart(found: Mapping[Cell, Resampled]) -> Estimate:
    return mean_of([one.estimate for one in found.values()])


def _seeds_at_once(found: Mapping[Cell, Resampled]) -> Estimate | None:
    """Seed 0 of all cells has the same order of pairs and the same noise: seeds as the unit, and not runs."""
    first, *others = found.values()
    if any(one.seeds != first.seeds for one in others):
        return None
    draws = np.mean([one.draws for one in found.values()], axis=0)
    return Resampled(float(np.mean([one.value for one in found.values()])), draws, first.seeds).estimate


def _bases_differ(found: Mapping[Cell, Resampled]) -> Estimate | None:
    """Bases as the unit: what holds for another base, and not for these alone."""
    bases = dict.fromkeys(cell.base for cell in found)
    means = [np.mean([one.value for cell, one in found.items() if cell.base == base]) for base in bases]
    return of_sample(means) if len(means) > 1 else None


@dataclass(frozen=True)
class Variant:
    """Another way to compare.

    Attributes:
        quality: What is the height in the plane.
        keeps: Which policies count.
        is_of: Which cells count.
        combines: From cells to one number; None where that cannot be.
    """

    quality: Quality = PRIMARY
    keeps: Keeps = _every
    is_of: Callable[[Cell], bool] = MAIN_CELLS.__contains__
    combines: Combines = _cells_apart


def of_sample(values: Sequence[float]) -> Estimate:
    """Mean of independent numbers, with Student's interval."""
    if len(values) < 2:
        return Estimate(float(np.mean(values)))
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1)


def variants(settings: Sequence[str]) -> dict[str, Variant]:
    """All of them by name.

    Args:
        settings: Those of the subject, each of which is left out once and is alone once.
    """

    def frechet(worst: float, best: float) -> Variant:
        return Variant(("frechet_distance", partial(on_log_scale, worst=worst, best=best)))

    def in_main(
        holds: Callable[[Cell], bool], combines: Combines = _cells_apart, quality: Quality = PRIMARY
    ) -> Variant:
        return Variant(quality, is_of=lambda cell: cell in MAIN_CELLS and holds(cell), combines=combines)

    def of_source(source: str, **other: Any) -> Variant:
        return in_main(lambda cell: cell.source == source, **other)

    tuned = {cell.base for cell in TUNING_CELLS}
    fixed = set(protocol.ALWAYS.items())
    return {
        "as frozen": Variant(),
        "quality 0 at 2 times the base's Frechet distance": frechet(2.0, FRECHET_BEST),
        "quality 0 at 8 times": frechet(8.0, FRECHET_BEST),
        "quality 1 at a quarter": frechet(FRECHET_WORST, 0.25),
        "Frechet distance on a linear scale": Variant(("frechet_distance", _linear)),
        "accuracy by the second verifier": Variant("second_accuracy"),
        "diversity": Variant("diversity"),
        "last step alone": Variant(keeps=lambda method, setting, is_last: is_last),
        "learning rate 1e-4 alone": Variant(keeps=lambda method, setting, is_last: "lr 0.0001" in setting),
        "without the settings that were fixed": Variant(
            keeps=lambda method, setting, _: (method, setting) not in fixed
        ),
        **{f"{SUBJECT} without {one}": Variant(keeps=partial(_keeps, one, False)) for one in settings},
        **{f"{SUBJECT} with {one} alone": Variant(keeps=partial(_keeps, one, True)) for one in settings},
        **{
            f"{source.replace('_', '-')} pairs{name}": of_source(source, **other)
            for source in ("on_policy", "off_policy")
            for name, other in {
                "": {},
                ", seeds at once": {"combines": _seeds_at_once},
                ", accuracy": {"quality": "second_accuracy"},
                ", accuracy, seeds at once": {"quality": "second_accuracy", "combines": _seeds_at_once},
                ", diversity": {"quality": "diversity"},
                ", diversity, seeds at once": {"quality": "diversity", "combines": _seeds_at_once},
            }.items()
        },
        "bases that tuning has not seen": in_main(lambda cell: cell.base not in tuned),
        "seeds resampled in all cells at once": Variant(combines=_seeds_at_once),
        "bases as the sample": Variant(combines=_bases_differ),
    }


def _keeps(one: str, alone: bool, method: str, setting: str, is_last: bool) -> bool:
    return method != SUBJECT or (setting == one) == alone


def kept(points: Points, method: str, keeps: Keeps) -> Points | None:
    """Some of the policies of a method; None if there are none."""
    last = dict(points.policies)  # steps ascend
    name = method.split(", stopped")[0]
    chosen = [
        # Of runs that are stopped early, whose step is 0, none is the last.
        index
        for index, (setting, step) in enumerate(points.policies)
        if keeps(name, setting, 0 < step == last[setting])
    ]
    policies = tuple(points.policies[index] for index in chosen)
    return Points(policies, points.seeds, points.values[chosen]) if chosen else None


def robustness(evidence: Evidence, seeds: Sequence[int]) -> dict[str, Any]:
    """All of it, as `frontier.json` has it: "variants", "settings", "matched", "tuning".

    Args:
        evidence: Records of runs.
        seeds: Those of the test.
    """
    areas = Areas(evidence, seeds)
    own = [points[SUBJECT].policies for points in areas.points.values() if SUBJECT in points]
    settings = list(dict.fromkeys(setting for policies in own for setting, _ in policies))
    return {
        "variants": {name: _compared(areas, variant) for name, variant in variants(settings).items()},
        "settings": _settings_alone(areas),
        "matched": [_matched(areas, *pair) for pair in MATCHED],
        "tuning": _tuning(evidence),
    }


def with_more_settings(evidence: Evidence, tested: Evidence, seeds: Sequence[int]) -> dict[str, Any]:
    """The subject as it was frozen against methods that have more settings than the protocol gave them.

    Each is compared in the cells and by the seeds that have all of its added settings.

    Args:
        evidence: With the added settings.
        tested: Without.
        seeds: Those of the test.

    Returns:
        "compared": method -> how many settings it has, those that were added, names of cells, fewest seeds of one, and
        the area of the subject minus its own, "as tested", "with more" and that of "seeds at once"; "alone": the area
        of each added setting alone. Empty where none was added.
    """
    areas, before = Areas(evidence, seeds), Areas(tested, seeds)
    found = {}
    for reference in REFERENCES:
        method = reference.split(", stopped")[0]
        added = _settings(areas, method) - _settings(before, method)
        cells = [cell for cell in areas.points if added and added <= _settings(areas, method, [cell])]
        compared = _with_more(areas, before, reference, cells)
        if compared:
            settings = {"settings": len(_settings(areas, method, cells)), "added": sorted(added)}
            found[reference] = {**settings, "cells": [cell.name for cell in cells], **compared}
    new = {(one.split(", stopped")[0], setting) for one, row in found.items() for setting in row["added"]}
    alone = [row for row in _settings_alone(areas) if (row["method"], row["setting"]) in new]
    return {"compared": found, "alone": alone} if found else {}


def _settings(areas: Areas, method: str, cells: Sequence[Cell] | None = None) -> set[str]:
    """Of a method, in some cells or in any."""
    return {setting for cell in cells or areas.rows for setting in by_run(areas.rows[cell].get(method, ()))}


def _with_more(areas: Areas, before: Areas, reference: str, cells: Sequence[Cell]) -> dict[str, Any]:
    variant = Variant()
    both = {
        cell: [_difference(one, cell, reference, variant) for one in (before, areas)]
        for cell in cells
        if SUBJECT in areas.points[cell]
    }
    both = {cell: pair for cell, pair in both.items() if None not in pair}
    if not both:
        return {}
    old, new = ({cell: pair[side] for cell, pair in both.items()} for side in (0, 1))
    at_once = _seeds_at_once(new)
    return {
        "seeds": min(len(one.seeds) for one in new.values()),
        "as tested": _cells_apart(old).as_record(-1.0),
        "with more": _cells_apart(new).as_record(-1.0),
        "seeds at once": at_once.as_record(-1.0) if at_once else None,
    }


def _compared(areas: Areas, variant: Variant) -> dict[str, Any]:
    rows = {}
    for reference in REFERENCES:
        found = {cell: _difference(areas, cell, reference, variant) for cell in areas.points if variant.is_of(cell)}
        found = {cell: one for cell, one in found.items() if one is not None}
        estimate = variant.combines(found) if found else None
        if estimate:
            rows[reference] = {**estimate.as_record(-1.0), "cells": len(found)}
    return rows


def _difference(areas: Areas, cell: Cell, reference: str, variant: Variant) -> Resampled | None:
    both = [
        kept(areas.points[cell][method], method, variant.keeps) if method in areas.points[cell] else None
        for method in (SUBJECT, reference)
    ]
    return _paired(both, areas.bases[cell.base], variant.quality)


def _paired(both: Sequence[Points | None], base: Mapping[str, float], quality: Quality) -> Resampled | None:
    """Area of the first minus that of the second, of the seeds that both have."""
    if any(points is None for points in both):
        return None
    seeds = sorted(set(both[0].seeds) & set(both[1].seeds))
    if not seeds:
        return None
    first, second = (resampled_area(points.of_seeds(seeds), base, quality) for points in both)
    return first.minus(second)


def _one_setting(areas: Areas, cell: Cell, method: str, setting: str) -> Points | None:
    points = areas.points[cell].get(method)
    return kept(points, method, lambda _, other, is_last: other == setting) if points else None


def _settings_alone(areas: Areas) -> list[dict[str, Any]]:
    """The cross-fitted area of each setting's own steps over the main cells, and over those of each source."""
    names = dict.fromkeys(
        (method, setting)
        for cell, methods in areas.points.items()
        if cell in MAIN_CELLS
        for method in areas.trained
        if method in methods
        for setting, _ in methods[method].policies
    )
    rows = []
    for method, setting in names:
        found = {
            cell: resampled_area(points, areas.bases[cell.base]).estimate
            for cell in areas.points
            if cell in MAIN_CELLS and (points := _one_setting(areas, cell, method, setting))
        }
        sources = dict.fromkeys(cell.source for cell in found)
        by_source = {
            source: mean_of([one for cell, one in found.items() if cell.source == source]).as_record()
            for source in sources
        }
        over = {**mean_of(list(found.values())).as_record(), "cells": len(found), "by_source": by_source}
        rows.append({"method": method, "setting": setting, **over})
    return sorted(rows, key=lambda row: -row["value"])


def _matched(areas: Areas, without: tuple[str, str], subject: tuple[str, str]) -> dict[str, Any]:
    """Two settings cell by cell: both at their last step, and the second minus the first with its interval."""
    cells, estimates = {}, []
    for cell in areas.points:
        both = [_one_setting(areas, cell, *one) for one in (subject, without)]
        area = _paired(both, areas.bases[cell.base], PRIMARY)
        if cell in MAIN_CELLS and area:
            seeds = sorted(set(both[0].seeds) & set(both[1].seeds))
            ends = [_at_the_end(points.of_seeds(seeds), areas.bases[cell.base]) for points in both]
            found = {name: of_sample(ends[0][name] - ends[1][name]) for name in ends[0]} | {"area": area.estimate}
            estimates.append(found)
            about = {"seeds": seeds, "with": _means(ends[0]), "without": _means(ends[1])}
            cells[cell.name] = {**about, "difference": _records(found)}
    over = {name: mean_of([found[name] for found in estimates]) for name in estimates[0]} if estimates else {}
    return {"without": list(without), "with": list(subject), "cells": cells, "all": _records(over)}


def _at_the_end(points: Points, base: Mapping[str, float]) -> dict[str, np.ndarray]:
    """By seed: win rate, and the logarithm to base 2 of the Frechet distance over the base's."""
    last = points.values[-1]
    times = last[:, MEASURES.index("frechet_distance")] / base["frechet_distance"]
    log_times = np.log2(np.nan_to_num(times, nan=FRECHET_WORST))  # what is no number is the worst
    return {"win_rate": last[:, MEASURES.index("win_rate")], "log_frechet": log_times}


def _means(end: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in end.items()}


def _records(found: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: one.as_record(-math.inf, math.inf) for name, one in found.items()}


def _tuning(evidence: Evidence) -> dict[str, Any]:
    """Of each method: how many settings were tried, and the area of all of them in each tuning cell, of one seed."""
    areas = Areas(evidence, protocol.TUNING_SEEDS)
    found: dict[str, Any] = {}
    for cell, methods in areas.points.items():
        for method in areas.trained:
            if method in methods:
                points, base = areas.measured(cell, method)
                row = found.setdefault(method, {"settings": len(dict(points.policies)), "cells": {}})
                row["cells"][cell.name] = float(plain_area(points, base, np.ones((1, len(points.seeds))))[0])
    return found
