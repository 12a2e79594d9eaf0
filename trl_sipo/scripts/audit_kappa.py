# SPDX-License-Identifier: Apache-2.0
"""What `trl-sipo audit beta` says of the proximal term: the kappa for a wanted win rate, and what a given one wins."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import ConfigurationError

if TYPE_CHECKING:
    from trl_sipo.evaluation.beta_range import BetaRange
    from trl_sipo.evaluation.kappa_choice import LabelNoise
    from trl_sipo.reporting.evaluation_tables import Table
    from trl_sipo.scripts.audit_inputs import AuditedPair

_TABLE_KAPPAS = (0.25, 0.5, 1.0, 2.0, 5.0)
_MOST_PAIRS = 10_000  # whose labels are read, evenly spaced: the interval is 1 % wide then
_CONDITIONS = (
    "All win rates are the closed form of Diffusion-DPO with the term. It holds for pairs of two samples that the "
    "model itself drew, without guidance, none left out: not for pictures from elsewhere (how far they are says "
    "`trl-sipo audit weights`), nor for the best and the worst of several. And it is where a long training ends at a "
    "beta well below the range above: a larger one is itself a pull to the reference, and less is won."
)


def add_kappa_options(parser: argparse.ArgumentParser) -> None:
    """What is wanted of the proximal term, or which one is to be judged."""
    add = parser.add_argument
    add("--win_rate", type=float, metavar="RATE", help="wanted against the base model: recommend a `proximal_kappa`")
    add("--proximal_kappa", type=float, metavar="KAPPA", help="the one that you are going to train with")
    add(
        "--label_noise",
        type=float,
        metavar="SHARE",
        help="of labels that are turned (default: estimated where the data has votes or scores, else 0)",
    )


def check_kappa_options(arguments: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] on a win rate, a kappa or a share that is none."""
    from trl_sipo.core.objectives.proximal import check_kappa, kappa_for_win_rate
    from trl_sipo.evaluation.kappa_choice import check_label_noise

    if arguments.win_rate is not None:
        kappa_for_win_rate(arguments.win_rate)
    if arguments.proximal_kappa is not None:
        check_kappa(arguments.proximal_kappa)
    if arguments.label_noise is None:
        return
    check_label_noise(arguments.label_noise)
    if not is_asked(arguments):
        raise ConfigurationError(
            f"`--label_noise {arguments.label_noise}` tells how much a kappa wins: give `--win_rate` or "
            "`--proximal_kappa` with it."
        )


def is_asked(arguments: argparse.Namespace) -> bool:
    """Whether anything is to be said of the proximal term."""
    return arguments.win_rate is not None or arguments.proximal_kappa is not None


# ------------------------------------------------------------------------------------------------------- label noise


def label_noises(arguments: argparse.Namespace, rows: Any, pairs: Sequence["AuditedPair"]) -> list["LabelNoise"]:
    """How noisy the labels are, the one to go by first: as given, by votes, by scores, or none assumed.

    Of a cache, which has no scores, the labels of `pairs` are read; of other data those of evenly spaced rows.

    Raises:
        DatasetError: A label that is none.
    """
    from trl_sipo.data.cache.dataset import CachedPairs
    from trl_sipo.evaluation.kappa_choice import known_noise

    found = _of_cache(rows, pairs) if isinstance(rows, CachedPairs) else _of_rows(rows)
    if arguments.label_noise is not None:
        return [known_noise(arguments.label_noise, "given"), *found]
    return found or [known_noise(0.0, "assumed")]


def _of_cache(rows: Any, pairs: Sequence["AuditedPair"]) -> list["LabelNoise"]:
    import numpy as np

    from trl_sipo.evaluation.kappa_choice import noise_of_votes

    if not rows.manifest.soft_labels:
        return []
    votes = noise_of_votes(np.array([rows[pair.index]["label"] for pair in pairs]), [pair.prompt for pair in pairs])
    return [] if votes is None else [votes]


def _of_rows(rows: Any) -> list["LabelNoise"]:
    import numpy as np

    from trl_sipo.data.formats import TIE, detect_format, label_values
    from trl_sipo.evaluation.kappa_choice import noise_by_scores, noise_of_votes
    from trl_sipo.scripts.audit_data_scores import column_differences, score_columns

    fmt = detect_format(rows.column_names)
    labels = label_values(rows, fmt)
    judged = _spread(np.flatnonzero(~np.isnan(labels)))
    votes = noise_of_votes(labels[judged], _prompts(rows, fmt.prompt, judged))
    decided = _spread(np.flatnonzero(~np.isnan(labels) & (labels != TIE)))
    sign = np.where(labels[decided] > TIE, 1.0, -1.0)
    differences = {
        name: sign * column_differences(rows, columns, decided) for name, columns in score_columns(rows, fmt).items()
    }
    scores = noise_by_scores(differences, _prompts(rows, fmt.prompt, decided)) if differences else []
    return [*([] if votes is None else [votes]), *scores]


def _spread(numbers: Any) -> Any:
    """At most so many of them, evenly spaced."""
    step = max(len(numbers) / _MOST_PAIRS, 1.0)
    return numbers[[int(place * step) for place in range(min(len(numbers), _MOST_PAIRS))]]


def _prompts(rows: Any, column: str, numbers: Any) -> list[str]:
    from trl_sipo.data.formats import read_prompt

    return [read_prompt(value) for value in rows.select_columns([column]).select(numbers).with_format(None)[:][column]]


# ----------------------------------------------------------------------------------------------------------- numbers


def kappa_section(arguments: argparse.Namespace, noises: Sequence["LabelNoise"]) -> dict[str, Any]:
    """The section `kappa` of the report, by the first of the noises of [`label_noises`]."""
    noise, wanted, given = noises[0], arguments.win_rate, arguments.proximal_kappa
    kappas: dict[float, list[str]] = {kappa: [] for kappa in _TABLE_KAPPAS}
    section: dict[str, Any] = {"noise": [_noise_numbers(one) for one in noises]}
    if wanted is not None:
        section["wanted"] = wanted_numbers(wanted, noise)
        if section["wanted"]["kappa"] is not None:
            kappas.setdefault(section["wanted"]["kappa"]["estimate"], []).append("wanted")
    if given is not None:
        kappas.setdefault(given, []).append("given")
    section["rows"] = [kappa_row(kappa, noise) | {"is": names} for kappa, names in sorted(kappas.items())]
    if given is not None:
        section["given"] = next(row for row in section["rows"] if "given" in row["is"])
    return section


def _noise_numbers(noise: "LabelNoise") -> dict[str, Any]:
    from trl_sipo.evaluation.policy_distance import as_numbers

    return as_numbers(noise.share) | {"source": noise.source, "name": noise.name, "num_pairs": noise.num_pairs}


def wanted_numbers(wanted: float, noise: "LabelNoise") -> dict[str, Any]:
    """The kappa for a win rate, and where none has an optimum, those for it in more rounds."""
    from trl_sipo.evaluation.kappa_choice import MOST_ROUNDS, kappa_for, kappa_interval, surest_guarantee
    from trl_sipo.evaluation.policy_distance import as_numbers

    kappa = kappa_interval(wanted, noise)
    known = noise.share.estimate < 0.5
    by_rounds = {n: kappa_for(wanted, noise.share.estimate, rounds=n) for n in range(2, MOST_ROUNDS + 1) if known}
    return {
        "win_rate": wanted,
        "kappa": None if kappa is None else as_numbers(kappa),
        "optimum": None if kappa is None else surest_guarantee(kappa.estimate, noise),
        "kappa_by_rounds": by_rounds,
    }


def kappa_row(kappa: float, noise: "LabelNoise") -> dict[str, Any]:
    """One row of the table of kappas; what is not known beforehand is None."""
    from trl_sipo.evaluation.kappa_choice import (
        MOST_ROUNDS,
        surest_guarantee,
        win_rate,
        win_rate_by_such_judges,
        win_rate_interval,
    )
    from trl_sipo.evaluation.policy_distance import as_numbers

    share, wins = noise.share.estimate, win_rate_interval(kappa, noise)
    rounds = range(2, MOST_ROUNDS + 1)
    return {
        "kappa": kappa,
        "optimum": surest_guarantee(kappa, noise),
        "win_rate": None if wins is None else as_numbers(wins),
        "win_rate_by_such_judges": None if wins is None else win_rate_by_such_judges(kappa, share),
        "win_rate_by_rounds": {n: None if wins is None else win_rate(kappa, share, rounds=n) for n in rounds},
    }


# ----------------------------------------------------------------------------------------------------------- reading


def kappa_reading(
    section: dict[str, Any], noises: Sequence["LabelNoise"], beta: float | None, found: "BetaRange"
) -> list[str]:
    """What was found: the wanted and the given kappa, what is known of the labels, and when it holds.

    Args:
        section: Of [`kappa_section`].
        noises: Of [`label_noises`].
        beta: That was given, in the Diffusion-DPO convention; None: none was.
        found: The recommended range of betas.
    """
    from trl_sipo.evaluation.kappa_choice import ALWAYS, AS_NOISY

    sentences = []
    if "wanted" in section:
        sentences.append(wanted_words(section["wanted"], noises[0]))
    if "given" in section:
        sentences.append(given_words(section["given"], noises[0]))
    optimum = section.get("given", section.get("wanted", {})).get("optimum")
    if beta is not None and beta < found.low and optimum in (ALWAYS, AS_NOISY):
        sentences.append(
            "What is said of beta is of training without the term: with this kappa, and pairs drawn from the model, a "
            "small beta has an optimum too, and it is a small beta that these win rates are of."
        )
    return [*sentences, noise_words(noises), _CONDITIONS]


def wanted_words(wanted: dict[str, Any], noise: "LabelNoise") -> str:
    """Which kappa wins so often, or that none does."""
    from trl_sipo.core.objectives.proximal import BOUNDED_KAPPA
    from trl_sipo.evaluation.kappa_choice import ALWAYS, win_rate

    rate, share = f"{100 * wanted['win_rate']:.6g}%", noise.share.estimate
    if share >= 0.5:
        return f"No kappa wins {rate} with labels that are no better than chance."
    if wanted["kappa"] is None:
        return unreachable_words(wanted, rate)
    kappa = _with_ends(wanted["kappa"])
    sentence = f"To win {rate} against the base model: proximal_kappa = {kappa}, for pairs drawn from it."
    if wanted["optimum"] == ALWAYS:
        return sentence
    most = win_rate(BOUNDED_KAPPA, share)
    return (
        f"{sentence} That is below {BOUNDED_KAPPA}, and has an optimum only if all pairs are as noisy as the labels "
        f"on the whole; the most that one with an optimum whatever the labels are wins is {most:.1%}."
    )


def unreachable_words(wanted: dict[str, Any], rate: str) -> str:
    """That no kappa with an optimum wins so often, and the ways out."""
    from trl_sipo.core.objectives.proximal import BOUNDED_KAPPA, optimal_win_rate

    by_rounds = wanted["kappa_by_rounds"]
    enough = [n for n, kappa in by_rounds.items() if kappa is not None and kappa >= BOUNDED_KAPPA]
    if enough:
        rounds = f"{enough[0]} rounds with proximal_kappa = {by_rounds[enough[0]]:.3g}"
    else:
        rounds = f"more than {max(by_rounds)} rounds"
    return (
        f"NO KAPPA WITH AN OPTIMUM WINS {rate} against the base model: it is {optimal_win_rate(BOUNDED_KAPPA):.1%} at "
        f"the most, with clean labels at {BOUNDED_KAPPA}. Ways out: {rounds}, each on new pairs that the policy of "
        "the round before drew, and with that policy as the reference (`trl-sipo online`, `reference: refreshed`); or "
        "a smaller kappa, 0.1 to 0.25, which pulls less and promises nothing: stop it by held-out pairs, as training "
        "without the term."
    )


def given_words(row: dict[str, Any], noise: "LabelNoise") -> str:
    """What a kappa promises."""
    from trl_sipo.core.objectives.proximal import BOUNDED_KAPPA
    from trl_sipo.evaluation.kappa_choice import ALWAYS, AS_NOISY, OFF

    kappa, optimum = f"proximal_kappa = {row['kappa']:g}", row["optimum"]
    if optimum == OFF:
        return f"{kappa} switches the term off: nothing but beta, and when it is stopped, holds the policy."
    if row["win_rate"] is None and noise.share.estimate >= 0.5 and optimum == ALWAYS:
        return f"{kappa} has an optimum, but none that is known to win: the labels are no better than chance."
    if row["win_rate"] is None:
        return (
            f"{kappa} is BELOW {BOUNDED_KAPPA}: where less than {max(0.5 - row['kappa'], 0):.3g} of the comparisons "
            "are won, samples are pushed away, the farther the smaller beta is, and no win rate is known beforehand. "
            "Stop it by held-out pairs, as training without the term."
        )
    wins = f"wins {_with_ends(row['win_rate'], '.1%')} against the base model"
    if optimum == AS_NOISY:
        return (
            f"{kappa}, for pairs drawn from the model, {wins} if all are as noisy as the labels on the whole; else it "
            "may have no optimum."
        )
    if row["kappa"] == BOUNDED_KAPPA:
        return (
            f"{kappa} is the least that has an optimum for pairs drawn from the model, whatever their labels, and "
            f"{wins}. For pairs from elsewhere take more."
        )
    return f"{kappa} has an optimum whatever the pairs are; for pairs drawn from the model it {wins}."


def noise_words(noises: Sequence["LabelNoise"]) -> str:
    """What is known of the labels and what is assumed, by the first of the noises; and what the others are."""
    noise, numbers = noises[0], _with_ends(_noise_numbers(noises[0]), ".1%")
    even = "as likely for close pairs as for others; if it is rarer for those far apart, more is won"
    if noise.source == "assumed":
        return (
            "Assumed: labels without errors (`--label_noise` says otherwise); the data has no votes or scores to tell."
        )
    if noise.source == "given":
        sentence = f"Assumed, as given: {numbers} of the labels are turned, which is {even}."
    elif noise.source == "labels":
        sentence = (
            f"Estimated from the labels of {noise.num_pairs} pairs: {numbers} of the votes are against their pair's "
            f"majority. Assumed: the majority is right, and a vote against it is {even}; and labels are trained as "
            "votes (`soft_labels`). Without it they are rounded to the majority, and are clean: `--label_noise 0`."
        )
    else:
        sentence = (
            f"Estimated from {noise.num_pairs} pairs: the labels contradict the scores {noise.name!r} in {numbers}, "
            f"and a win is one by {noise.name!r}. Assumed: a contradiction is {even}. `--label_noise` says otherwise."
        )
    others = [
        f"{_OTHERS[one.source]} {one.name}".rstrip() + f" {_with_ends(_noise_numbers(one), '.1%')}"
        for one in noises[1:]
    ]
    return f"{sentence} Not gone by: {'; '.join(others)}." if others else sentence


_OTHERS = {"labels": "votes against the majority", "scores": "labels that contradict"}


def _with_ends(numbers: dict[str, Any], form: str = ".3g") -> str:
    value, low, high = (f"{numbers[name]:{form}}" for name in ("estimate", "low", "high"))
    return value if low == high else f"{value} [{low}, {high}]"


_OPTIMUM_WORDS = {"always": "yes", "if_as_noisy": "if as noisy", "none": "not for certain", "off": "no term"}


def kappa_table(section: dict[str, Any]) -> "Table":
    """Win rates by kappa."""
    from trl_sipo.reporting.evaluation_tables import Table

    rounds = list(section["rows"][0]["win_rate_by_rounds"])
    has_noise = section["noise"][0]["estimate"] > 0
    cells = []
    for row in section["rows"]:
        wins = row["win_rate"]
        cell = [f"{row['kappa']:.3g}" + "".join(f" ({name})" for name in row["is"]), _OPTIMUM_WORDS[row["optimum"]]]
        cell.append("-" if wins is None else _with_ends(wins, ".1%"))
        cell += [_percent(row["win_rate_by_such_judges"])] if has_noise else []
        cells.append([*cell, *(_percent(row["win_rate_by_rounds"][n]) for n in rounds)])
    header = ["kappa", "optimum", "win rate", *(["by such judges"] if has_noise else [])]
    header += [f"{n} rounds" for n in rounds]
    judges = " By such judges: who err as often as the labels; else by the true order." if has_noise else ""
    note = (
        f"Against the base model, by the closed form; for pairs drawn from the model.{judges} Rounds: the reference "
        "and the pairs of each are those of the policy of the round before."
    )
    return Table("Proximal term", note, header, cells)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
