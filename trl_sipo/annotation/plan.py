# SPDX-License-Identifier: Apache-2.0
"""Who judges which pair, on which side and when. Pure: pairs and a seed in, tasks out.

A group goes through all pairs in laps, one lap a rater unless a rater gets only a part of them. Sides are random and
balanced: of the pairs of two models, a rater who gets all of them sees as many with the first on the left as on the
right, but for one, and of the raters of a group as many see a pair one way as the other, but for one. The order in
which a rater sees them is drawn apart.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from trl_sipo.annotation.records import GOLD, MIRRORED, SAMPLE, Comparison, Study, Task
from trl_sipo.errors import StudyError

# So many other tasks lie between a pair and its mirrored repeat, where there are twice as many.
_DISTANCE = 20


def plan_tasks(pairs: Sequence[Comparison], study: Study, group: int, number: int) -> list[Task]:
    """The tasks of a rater, in the order in which they come.

    Args:
        pairs: All of the study, gold ones among them, in an order that does not change.
        study: `seed`, `tasks_per_rater` and `num_mirrored` are used.
        group: The rater's, from 1.
        number: Of the rater's share within the group, from 0.

    Returns:
        Every rater's share of the pairs, all gold ones, and the mirrored repeats.
    """
    samples = _share([pair for pair in pairs if not pair.is_gold], study, group, number)
    gold = _gold_tasks([pair for pair in pairs if pair.is_gold], study, group, number)
    return _in_order(samples, gold, study.num_mirrored, _generator(study, "order", group, number))


def check_plan(num_samples: int, tasks_per_rater: int | None, num_mirrored: int) -> None:
    """Raise [`StudyError`] on numbers of tasks that cannot be had of so many pairs."""
    if num_samples < 1:
        raise StudyError("There are no pairs to judge.")
    if tasks_per_rater is not None and not 1 <= tasks_per_rater <= num_samples:
        raise StudyError(
            f"{tasks_per_rater} pairs for each rater, of {num_samples}: give a number from 1 to {num_samples}, or "
            "none for all of them."
        )
    share = tasks_per_rater or num_samples
    if not 0 <= num_mirrored <= share // 2:
        raise StudyError(
            f"{num_mirrored} mirrored repeats of {share} pairs: give a number from 0 to {share // 2}, so that each "
            "comes well after the pair it repeats."
        )


def _generator(study: Study, *purpose: object) -> random.Random:
    """Of a text, since its numbers are then the same on every machine and in every version of Python."""
    return random.Random("/".join(map(str, (study.seed, *purpose))))


def _share(pairs: Sequence[Comparison], study: Study, group: int, number: int) -> list[Task]:
    """The rater's part of the group's laps through all pairs."""
    size = study.tasks_per_rater or len(pairs)
    laps: dict[int, list[Task]] = {}
    tasks = []
    for place in range(number * size, (number + 1) * size):
        lap, position = divmod(place, len(pairs))
        if lap not in laps:
            laps[lap] = _lap(pairs, study, group, lap)
        tasks.append(laps[lap][position])
    return tasks


def _lap(pairs: Sequence[Comparison], study: Study, group: int, lap: int) -> list[Task]:
    """All pairs once, in the order of the group, which is that of every lap: no share has a pair twice.

    Sides come in permuted blocks of two: of each two models, of two pairs that follow one another, one has the first
    model on the left and one on the right. Every even lap draws them anew; the odd one after it exchanges all.
    """
    generator = _generator(study, "sides", group, lap // 2)
    pending: dict[tuple[str, str], bool] = {}  # the side of the second of a block
    tasks = []
    for pair in _lap_order(pairs, _generator(study, "pairs", group)):
        if pair.models in pending:
            is_flipped = pending.pop(pair.models)
        else:
            is_flipped = generator.random() < 0.5
            pending[pair.models] = not is_flipped
        tasks.append(Task(pair.pair_id, SAMPLE, is_flipped != bool(lap % 2)))
    return tasks


def _lap_order(pairs: Sequence[Comparison], generator: random.Random) -> list[Comparison]:
    """At random, with each two models in turn: a share of the pairs has as many of one two as of another."""
    by_models: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for pair in pairs:
        by_models[pair.models].append(pair)
    for part in by_models.values():
        generator.shuffle(part)
    return [pair for turn in zip_longest(*by_models.values()) for pair in turn if pair is not None]


def _gold_tasks(pairs: Sequence[Comparison], study: Study, group: int, number: int) -> list[Task]:
    generator = _generator(study, "gold", group, number)
    first = generator.randrange(2)
    order = generator.sample(range(len(pairs)), len(pairs))
    return [Task(pairs[index].pair_id, GOLD, bool((place + first) % 2)) for place, index in enumerate(order)]


def _in_order(samples: list[Task], gold: list[Task], num_mirrored: int, generator: random.Random) -> list[Task]:
    """Samples, gold and repeats, shuffled, each repeat well after the task that it repeats."""
    num_others = len(samples) + len(gold)
    distance = min(_DISTANCE, num_others // 2)
    generator.shuffle(samples)
    repeated, others = samples[:num_mirrored], samples[num_mirrored:] + gold
    places = generator.sample(range(num_others - distance), num_mirrored) if num_mirrored else []
    generator.shuffle(others)
    rest = iter(others)
    by_place = dict(zip(places, repeated, strict=True))
    tasks = [by_place.get(place) or next(rest) for place in range(num_others)]
    later: dict[int, list[Task]] = defaultdict(list)  # before which place a repeat comes
    for place, task in by_place.items():
        slot = generator.randint(place + distance + 1, num_others)
        later[slot].append(Task(task.pair_id, MIRRORED, not task.is_flipped))
    return [task for place in range(num_others + 1) for task in (*later[place], *tasks[place : place + 1])]
