# SPDX-License-Identifier: Apache-2.0
"""A process that answers as one rater without end, and says what was acknowledged: STUDY TOKEN [NUMBER]."""

import itertools
import sys

from trl_sipo.annotation.store import Store


def main(folder: str, token: str, number: str = "") -> None:
    store = Store.open(folder)
    rater = store.rater_of(token)
    assignments = store.assignments(rater.rater_id)
    rounds = range(int(number)) if number else itertools.count()
    for turn in rounds:
        choice = ("left", "right", "tie")[turn % 3]
        assignment = assignments[turn % len(assignments)]
        store.answer(rater.rater_id, assignment.assignment_id, choice, 1.0, f"{rater.name}-{turn}")
        print(f"{assignment.assignment_id} {choice} {rater.name}-{turn}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
