# SPDX-License-Identifier: Apache-2.0
"""Which runs the protocol asks for: those of tuning, of the test, the long ones, and those of the headline."""

from collections.abc import Sequence
from dataclasses import replace

from beyond import protocol
from beyond.protocol import Arm, Cell
from beyond.runs import Run

from trl_sipo.errors import ConfigurationError

#: Words for more than one cell.
GROUPS = {"main": protocol.MAIN_CELLS, "more": protocol.MORE_CELLS}
#: Words for runs that are of no frozen frontier: the long ones, and settings that were added after the test.
LONG, SETTINGS = "long", "settings"
#: Does it run?
QUICK_LONG_MEASURED_AT = (2, 3)


def test_cells(*, quick: bool) -> list[Cell]:
    """All of them; of a quick test those of the base that needs no training."""
    cells = [*protocol.MAIN_CELLS, *protocol.MORE_CELLS]
    return [cell for cell in cells if cell.base == "shipped"] if quick else cells


def seeds_of(cell: Cell, *, quick: bool) -> tuple[int, ...]:
    """The test seeds of a cell."""
    return protocol.FEW_SEEDS if quick or cell in protocol.MORE_CELLS else protocol.TEST_SEEDS


def named_cells(words: Sequence[str], *, quick: bool) -> list[Cell]:
    """Cells by "main", "more" or their own names, in the order of the protocol; of `LONG` and `SETTINGS`, none.

    Raises:
        ConfigurationError: No such cell.
    """
    known = test_cells(quick=quick)
    wanted: set[Cell] = set()
    for word in set(words) - {LONG, SETTINGS}:
        found = [cell for cell in known if cell in GROUPS.get(word, ()) or cell.name == word]
        if not found:
            names = ", ".join(repr(name) for name in [*GROUPS, LONG, SETTINGS, *(cell.name for cell in known)])
            raise ConfigurationError(f"--cells {word!r}: no such cell; known are {names}.")
        wanted.update(found)
    return [cell for cell in known if cell in wanted]


def runs_of(arms: Sequence[Arm], cells_and_seeds: Sequence[tuple[Cell, Sequence[int]]], *, quick: bool) -> list[Run]:
    """Seed by seed, so that what was stopped early has all arms of the first seeds."""
    seeds = sorted({seed for _, some in cells_and_seeds for seed in some})
    return [
        Run(cell, arm, seed, protocol.measured_at(arm, quick=quick))
        for seed in seeds
        for cell, some in cells_and_seeds
        if seed in some
        for arm in arms
        if protocol.applies(arm, cell)
    ]


def tuning_runs(*, quick: bool) -> list[Run]:
    """Every arm in the cells of tuning."""
    return runs_of(protocol.ARMS, [(cell, protocol.TUNING_SEEDS) for cell in protocol.TUNING_CELLS], quick=quick)


def test_runs(arms: Sequence[Arm], *, quick: bool) -> list[Run]:
    """The frozen arms in all cells of the test; candidates in theirs, of a quick test in those of tuning."""
    cells = [(cell, seeds_of(cell, quick=quick)) for cell in test_cells(quick=quick)]
    for_candidates = protocol.TUNING_CELLS if quick else protocol.CANDIDATE_CELLS
    runs = runs_of(arms, cells, quick=quick)
    return [run for run in runs if run.arm.method not in protocol.CANDIDATES or run.cell in for_candidates]


def long_runs(*, quick: bool) -> list[Run]:
    """A few arms for many more steps."""
    seeds = protocol.LONG_SEEDS[:1] if quick else protocol.LONG_SEEDS
    steps = QUICK_LONG_MEASURED_AT if quick else protocol.LONG_MEASURED_AT
    runs = runs_of(protocol.LONG_ARMS, [(cell, seeds) for cell in protocol.LONG_CELLS], quick=quick)
    return [replace(run, measured_at=steps) for run in runs]


def headline_runs(*, quick: bool) -> list[Run]:
    """What the headline rests on, in the order of `protocol.HEADLINE_ARMS`."""
    arms = [arm for arm in protocol.ARMS if (arm.method, arm.label) in protocol.HEADLINE_ARMS]
    return runs_of(arms, [(protocol.HEADLINE_CELL, protocol.HEADLINE_SEEDS)], quick=quick)


def settings_runs(arms: Sequence[Arm], *, quick: bool) -> list[Run]:
    """The settings that were added after the test, unless they are among the frozen arms."""
    known = {(arm.method, arm.label) for arm in arms}
    added = [arm for arm in protocol.MORE_SETTINGS if (arm.method, arm.label) not in known]
    cells = [cell for cell in test_cells(quick=quick) if cell in protocol.MAIN_CELLS and cell.source == "on_policy"]
    return runs_of(added, [(cell, seeds_of(cell, quick=quick)) for cell in cells], quick=quick)


def asked_runs(arms: Sequence[Arm], words: Sequence[str], seeds: Sequence[int], *, quick: bool) -> list[Run]:
    """The runs after the freeze that some words and seeds ask for, those of the frozen frontiers first.

    Args:
        arms: The frozen ones.
        words: Of `named_cells`.
        seeds: Those of the test, or some.
        quick: Whether they are quick runs.

    Raises:
        ConfigurationError: No such cell, or none of it has these seeds.
    """
    cells = named_cells(words, quick=quick)
    runs = [run for run in test_runs(arms, quick=quick) if run.cell in cells]
    runs += long_runs(quick=quick) if LONG in words else []
    runs += settings_runs(arms, quick=quick) if SETTINGS in words else []
    asked = [run for run in runs if run.seed in seeds]
    if not asked:
        known = sorted({run.seed for run in runs})
        raise ConfigurationError(f"--cells {' '.join(map(repr, words))} have the seeds {known}, not {list(seeds)}.")
    return asked
