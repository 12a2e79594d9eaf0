# SPDX-License-Identifier: Apache-2.0
"""All questions that train, one after the other, with one pool of processes, and the page.

    python benchmarks/paper/all_questions.py

The same files as by the commands of the questions. Runs that several ask for are made once either way.
"""

from collections.abc import Sequence
from importlib import import_module

import overhead
import protocol
import report
from options import guarded
from question import ask, checked, make_parser
from runs import Workplace, run_all

#: The most asked for first; a command that is stopped has the runs of the first questions.
ORDER = (
    "ablation",
    "beta_sensitivity",
    "on_off_policy",
    "static_dynamic_mask",
    "long_training",
    "gradient_through_w",
    "threshold_clip",
    "label_noise",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make all runs, then ask each question, which finds them there, and write the page."""
    words = list(arguments) if arguments is not None else None
    options = checked(make_parser("All questions").parse_args(words))
    questions = {name: import_module(name).QUESTION for name in ORDER}
    place = Workplace(options.runs, protocol.settings(quick=options.quick)).prepared(options.workers)
    runs = [
        protocol.with_seed(run, seed, quick=options.quick)
        for question in questions.values()
        for seed in options.seeds
        for run in question.arms.values()
    ]
    run_all(runs, place, options.workers)
    for question in questions.values():
        ask(question, words)
    overhead.ask(words)
    report.main(["--results", str(options.output)])


if __name__ == "__main__":
    guarded(main)
