# SPDX-License-Identifier: Apache-2.0
"""The frontier of quality against preference strength: which method gives more of one without losing the other.

    python benchmarks/frontier.py headline     # the headline, anew: some minutes on two cores
    python benchmarks/frontier.py tune         # tuning runs, and what they gave
    python benchmarks/frontier.py freeze       # the protocol of the test, before the test
    python benchmarks/frontier.py test         # the test: many hours; a stopped one goes on where it was
    python benchmarks/frontier.py test --cells settings    # settings that were added after the test
    python benchmarks/frontier.py report       # results, tables and figures from the runs that are there
    python benchmarks/frontier.py report --evidence reports/beyond/runs.json    # the same without a run

A method's points in a cell (`beyond/protocol.py`) are its settings after some steps: the win rate over the base by a
verifier that ranked no pairs, and the quality. Areas are defined in `beyond/area.py`, how sure they are in
`beyond/inference.py`, how settings are chosen for the test in `beyond/selection.py`, and what other definitions give
in `beyond/robustness.py`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from beyond import claims, freezing, plan, protocol, selection, tables
from beyond import evidence as evidence_file
from beyond import report as report_files
from beyond.analysis import Areas, analysed
from beyond.evidence import Evidence
from beyond.protocol import Arm
from beyond.robustness import robustness, with_more_settings
from beyond.runs import Place, rows_of, run_all
from paper.options import ROOT, add_places, check_places, guarded

from trl_sipo.errors import ConfigurationError

REPORTS = ROOT / "reports" / "beyond"


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=list(ACTIONS), help="what to do")
    add_places(parser, REPORTS, "frontier")
    parser.add_argument(
        "--cells",
        nargs="+",
        metavar="NAME",
        help='of the test: "main", "more", "long", "settings", or "weak, on_policy"',
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="of the test; default: all of the protocol")
    parser.add_argument("--evidence", type=Path, metavar="FILE", help="report from this file instead of runs")
    return parser


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options with their defaults filled in.

    Raises:
        ConfigurationError: Options that do not go together, or that nothing can be made with.
    """
    for name, action in (("cells", "test"), ("seeds", "test"), ("evidence", "report")):
        if getattr(options, name) is not None and options.action != action:
            raise ConfigurationError(f"--{name} is of `{action}`: `{options.action}` takes all of the protocol.")
    unknown = sorted(set(options.seeds or ()) - set(protocol.TEST_SEEDS))
    if unknown:
        raise ConfigurationError(f"--seeds {unknown}: the test has {list(protocol.TEST_SEEDS)}.")
    check_places(options, REPORTS)
    return options


def tune(options: argparse.Namespace) -> None:
    """Make the tuning runs and print every policy of every method."""
    run_all(plan.tuning_runs(quick=options.quick), place_of(options), options.workers)
    tuning = _tuned(options)
    print(tables.policies_table(selection.tuning_table(tuning, _chosen(tuning))))


def freeze(options: argparse.Namespace) -> None:
    """Fix the arms of the test by what tuning measured."""
    tuning = _tuned(options)
    arms = _chosen(tuning)
    settings = {method: [arm.label for arm in arms if arm.method == method] for method in tuning}
    single = {
        method: {
            "at the end": selection.one_policy(list(cells.values()), settings[method], at_the_end=True),
            "at any step": selection.one_policy(list(cells.values()), settings[method], at_the_end=False),
        }
        for method, cells in tuning.items()
    }
    options.output.mkdir(parents=True, exist_ok=True)
    record = freezing.record_of(arms, single, quick=options.quick)
    every = plan.test_runs(protocol.ARMS, quick=options.quick)
    num_made = sum(place_of(options).result(run).is_file() for run in every)
    reported = options.output / evidence_file.NAME  # of runs that are kept elsewhere
    num_made = max(num_made, len(evidence_file.read(reported).of_the_test) if reported.is_file() else 0)
    path = freezing.write(options.output, record, selection.tuning_table(tuning, arms), num_made)
    for method, labels in settings.items():
        print(f"{method}: {'; '.join(labels)}")
    print(f"Wrote {path}: {len(arms)} arms, {len(plan.test_runs(arms, quick=options.quick))} runs.", file=sys.stderr)


def test(options: argparse.Namespace) -> None:
    """Make the runs of the frozen protocol, all or some; with `settings` those that were added after it."""
    arms, _ = freezing.read(options.output, quick=options.quick)
    words = options.cells or [*plan.GROUPS, plan.LONG]
    runs = plan.asked_runs(arms, words, options.seeds or protocol.TEST_SEEDS, quick=options.quick)
    run_all(runs, place_of(options), options.workers)
    print(f"{len(runs)} runs are there: now `python benchmarks/frontier.py report`.")


def report(options: argparse.Namespace) -> None:
    """Write evidence, results, tables and figures, of what is there."""
    from trl_sipo.reporting.figures import check_plotting

    check_plotting()
    folder, path = options.output, options.evidence
    given = evidence_file.read(path) if path else None
    arms, frozen = freezing.read(path.parent if path else folder, quick=options.quick)
    found = given or _collected(arms, frozen["digest"], options)
    if found.protocol != frozen["digest"]:
        raise ConfigurationError(
            f"{path} is of the protocol {found.protocol}, and {freezing.NAME} beside it is {frozen['digest']}: bring "
            "together what belongs together."
        )
    if not found.of_the_test:
        raise ConfigurationError(
            f"{path or options.runs} has no test run: `python benchmarks/frontier.py test` first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not path:
        evidence_file.write(found, folder / evidence_file.NAME)
    tested = found.of_arms(arms)
    result = {
        "protocol": frozen["digest"],
        "is_quick": options.quick,
        **analysed(tested, protocol.TEST_SEEDS, frozen["protocol"]["single"]),
        "robustness": robustness(tested, protocol.TEST_SEEDS),
        "more_settings": with_more_settings(found, tested, protocol.TEST_SEEDS),
    }
    report_files.write_json(result, folder / "frontier.json")
    text = tables.tables(result)
    (folder / "table.md").write_text(
        f"# All tables of the frontier\n\n{text}\n## Tuning runs\n\n{tables.policies_table(frozen['tuning'])}\n"
    )
    report_files.draw_all(Areas(tested, protocol.TEST_SEEDS), result, folder)
    print(text)
    for name in found.missing:
        print(f"missing: {name}", file=sys.stderr)


def _collected(arms: Sequence[Arm], digest: str, options: argparse.Namespace) -> Evidence:
    """What is there; of the runs that no protocol asks for, nothing is missing."""
    runs = [*plan.tuning_runs(quick=options.quick), *plan.test_runs(arms, quick=options.quick)]
    found = evidence_file.collect([*runs, *plan.long_runs(quick=options.quick)], place_of(options))
    added = evidence_file.collect(plan.settings_runs(arms, quick=options.quick), place_of(options))
    return replace(found, records=[*found.records, *added.records], protocol=digest)


def headline(options: argparse.Namespace) -> None:
    """Train what the headline rests on, print it beside what the report has, and see what held in every run.

    Raises:
        ConfigurationError: Something did not hold this time.
    """
    runs = plan.headline_runs(quick=options.quick)
    run_all(runs, place_of(options), options.workers)
    kept = REPORTS / evidence_file.NAME
    reported = evidence_file.read(kept) if kept.is_file() and not options.quick else None
    found = evidence_file.collect(runs, place_of(options))
    print(tables.headline_table(found, reported))
    last_step = (protocol.QUICK_STEPS if options.quick else protocol.MEASURED_AT)[-1]
    judgements = claims.judged(rows_of(found.records), last_step=last_step, quick=options.quick)
    print("\n".join(["", *claims.as_lines(judgements)]))
    if failed := claims.failed(judgements):
        raise ConfigurationError(f"what held in every run of the report did not hold here: {'; '.join(failed)}.")


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "tune": tune,
    "freeze": freeze,
    "test": test,
    "report": report,
    "headline": headline,
}


def place_of(options: argparse.Namespace) -> Place:
    """Where the runs are."""
    return Place(options.runs, options.quick)


def _tuned(options: argparse.Namespace) -> dict[str, dict[str, selection.Measured]]:
    """Method -> tuning cell -> what it measured there.

    Raises:
        ConfigurationError: A tuning run is missing.
    """
    found = evidence_file.collect(plan.tuning_runs(quick=options.quick), place_of(options))
    if found.missing:
        raise ConfigurationError(
            f"{len(found.missing)} tuning runs are missing in {options.runs}, the first: {found.missing[0]}. Run "
            "`python benchmarks/frontier.py tune`."
        )
    return measured_by_method(found)


def measured_by_method(found: Evidence) -> dict[str, dict[str, selection.Measured]]:
    """Method -> name of a tuning cell -> its policies and the base's measures, in the order of `protocol.ARMS`."""
    areas = Areas(found, protocol.TUNING_SEEDS)
    return {
        method: {cell.name: areas.measured(cell, method) for cell in areas.points if method in areas.points[cell]}
        for method in dict.fromkeys(arm.method for arm in protocol.ARMS)
    }


def _chosen(tuning: dict[str, dict[str, selection.Measured]]) -> list[Arm]:
    return selection.chosen_arms(protocol.ARMS, {method: list(cells.values()) for method, cells in tuning.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options = make_parser().parse_args(arguments)
    guarded(_act, options)


def _act(options: argparse.Namespace) -> None:
    from trl_sipo.demo.demo import hush_libraries

    checked(options)
    hush_libraries()
    ACTIONS[options.action](options)


if __name__ == "__main__":
    main()
