# SPDX-License-Identifier: Apache-2.0
"""What can be said of several seeds and prompts: intervals over both, and paired tests.

Accuracy has a value per image, so that two arms are compared prompt by prompt: all arms draw the same prompts from the
same noise. Other measures have one value per run, and only the seeds to say how sure they are.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trl_sipo.evaluation.statistics import by_cluster, clustered_interval, holm, sign_flip_test

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

#: Measures with a value per image, and the field of a record that has them.
PER_IMAGE = {"accuracy": "correct", "second_accuracy": "second_correct"}
#: Measures with one value per run; not every method has all of them.
PER_RUN = (
    "frechet_distance",
    "diversity",
    "held_out_accuracies",
    "held_out_chosen",
    "held_out_rejected",
    "held_out_margins",
    "held_out_chosen_error",
    "masked_share",
)


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % interval of Student's t, and the values; of one seed, or of too many for the table, no interval."""
    mean, count = statistics.fmean(values), len(values)
    if count - 1 not in STUDENT_T:
        return {"mean": mean, "low": None, "high": None, "values": list(values)}
    half = STUDENT_T[count - 1] * statistics.stdev(values) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def prompts_of(count: int, per_prompt: int) -> list[int]:
    """The prompt of each image of a measurement: `per_prompt` of one after the other."""
    return [image // per_prompt for image in range(count)]


def mean_over_runs(rows: Sequence[Sequence[float]]) -> list[float]:
    """Image by image over seeds; (images,)."""
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def over_prompts(values: Sequence[float], per_prompt: int, bounds: tuple[float, float]) -> dict[str, float]:
    """Bootstrap-t interval of a mean over images, prompts drawn with replacement."""
    return asdict(clustered_interval(by_cluster(values, prompts_of(len(values), per_prompt)), bounds=bounds))


def measured(records: Sequence[Mapping[str, Any]], per_prompt: int) -> dict[str, Any]:
    """One arm at one step: each measure over seeds, and accuracies over prompts too.

    Args:
        records: One per seed.
        per_prompt: Images of a prompt.
    """
    found = {name: over_seeds([record[name] for record in records]) for name in PER_IMAGE}
    for name, field in PER_IMAGE.items():
        values = mean_over_runs([record[field] for record in records])
        found[name]["over_prompts"] = over_prompts(values, per_prompt, (0.0, 1.0))
    for name in PER_RUN:
        if name in records[0]:
            found[name] = over_seeds([record[name] for record in records])
    return found


def compared(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], per_prompt: int
) -> dict[str, Any]:
    """One arm minus another, paired by seed and, where there is a value per image, by prompt.

    Args:
        first, second: Records of the same seeds in the same order; of a model without seeds, such as the base, the
            same record for each.
        per_prompt: Images of a prompt.

    Returns:
        Measure -> mean difference, interval over seeds, values by seed; of accuracies also `over_prompts`, the
        interval over prompts of the difference averaged over seeds, and `p`, of the sign-flip test over prompts.
    """
    found = {}
    for name in (*PER_IMAGE, *PER_RUN):
        if name in first[0] and name in second[0]:
            pairs = zip(first, second, strict=True)
            found[name] = over_seeds([one[name] - other[name] for one, other in pairs])
    for name, field in PER_IMAGE.items():
        rows = [[a - b for a, b in zip(x[field], y[field], strict=True)] for x, y in zip(first, second, strict=True)]
        values = mean_over_runs(rows)
        found[name]["over_prompts"] = over_prompts(values, per_prompt, (-1.0, 1.0))
        found[name]["p"] = sign_flip_test(by_cluster(values, prompts_of(len(values), per_prompt)))
    return found


def with_holm(comparisons: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The comparisons of a question with `p_holm` beside `p`, corrected for their number, measure by measure."""
    found = {name: {measure: dict(row) for measure, row in rows.items()} for name, rows in comparisons.items()}
    for measure in PER_IMAGE:
        rows = [part[measure] for part in found.values()]
        for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = corrected
    return found
