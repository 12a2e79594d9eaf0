# SPDX-License-Identifier: Apache-2.0
"""What a study says so far: who wins, how sure that is, how far raters agree, and who was left out. Numbers alone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from trl_sipo.annotation.agreement import FleissKappa, agreement_with, fleiss_kappa, krippendorff_alpha
from trl_sipo.annotation.rater_checks import CheckSettings, RaterCheck, check_rater
from trl_sipo.annotation.records import LEFT, SAMPLE, TIE, Comparison, Rater, Study
from trl_sipo.annotation.store import Store
from trl_sipo.annotation.votes import FIRST, SECOND, Judgement, PairVote, group_label, last_judgements, votes, worth
from trl_sipo.errors import StudyError
from trl_sipo.evaluation.comparison import StatisticsSettings
from trl_sipo.evaluation.statistics import Interval, by_cluster, clustered_interval, holm, sign_flip_test


@dataclass(frozen=True)
class CoupleResult:
    """Two models, over all prompts or those of a category.

    Attributes:
        first, second: Names.
        category: None: all prompts.
        wins, ties, losses: Of the second, by the final labels.
        win_rate: Of the second; a tie counts one half.
        p_value: Of "neither wins more often"; of categories not corrected for their number.
        corrected_p_value: Holm's, over all two models; None of categories.
        share_of_answers: For the second, of the single answers to a pair; the mean over pairs. A tie counts one half.
        by_group: Group -> win rate of the second by this group's labels.
        num_pairs: In the study; those that nobody judged count nowhere else.
        num_in_all_groups: Pairs that every group has judged.
    """

    first: str
    second: str
    category: str | None
    wins: int
    ties: int
    losses: int
    win_rate: Interval
    p_value: float
    corrected_p_value: float | None
    share_of_answers: Interval
    by_group: Mapping[int, float]
    num_pairs: int
    num_in_all_groups: int


@dataclass(frozen=True)
class Agreement:
    """How far raters agree on the pairs, mirrored repeats and gold not among them.

    Attributes:
        alpha: Krippendorff's, of nominal labels.
        kappa: Fleiss'.
        with_final: Rater's name -> share of their labels that are the final ones, to which they contributed.
        with_others: Rater's name -> share of their labels that are what the others said most often.
        groups_alike: Share of the pairs on which all groups have one label, of those that all have judged.
    """

    alpha: float | None
    kappa: FleissKappa
    with_final: Mapping[str, float]
    with_others: Mapping[str, float]
    groups_alike: float | None


@dataclass(frozen=True)
class SideBias:
    """Whether the side decides.

    Attributes:
        share_of_left: Of all decisions that are no ties, with an interval over raters; None without any.
        p_value: Of "left is as likely as right", with raters as trials.
    """

    share_of_left: Interval | None
    p_value: float | None


@dataclass(frozen=True)
class Result:
    """All that some raters said.

    Attributes:
        num_raters, num_answers: Whose, and how many; repeats and gold among the answers.
        couples, categories: Without two models that nobody compared yet.
        agreement, side_bias: Of these raters.
        votes: By pair.
    """

    num_raters: int
    num_answers: int
    couples: Sequence[CoupleResult]
    categories: Sequence[CoupleResult]
    agreement: Agreement
    side_bias: SideBias
    votes: Sequence[PairVote]


@dataclass(frozen=True)
class StudyAnalysis:
    """A study as it is now.

    Attributes:
        study: Its texts and numbers.
        checks: Of every rater.
        num_answered, num_tasks: Assignments of all raters, decided and in all.
        num_stored, num_skipped: Answers that are stored, replaced ones among them; assignments whose last answer is to
            skip them.
        kept, everyone: Without the raters who are discarded, and with all.
    """

    study: Study
    checks: Sequence[RaterCheck]
    num_answered: int
    num_tasks: int
    num_stored: int
    num_skipped: int
    kept: Result
    everyone: Result

    @property
    def is_partial(self) -> bool:
        """Something is not answered yet by a rater who is kept."""
        return any(check.num_answered < check.num_tasks for check in self.checks if not check.reasons)

    @property
    def discarded(self) -> list[RaterCheck]:
        """Raters who are left out."""
        return [check for check in self.checks if check.reasons]


def analyse(
    store: Store, checks: CheckSettings | None = None, statistics: StatisticsSettings | None = None
) -> StudyAnalysis:
    """Read a study, which may be running, and say what it says.

    Raises:
        StudyError: Nobody has answered anything.
    """
    checks, statistics = checks or CheckSettings(), statistics or StatisticsSettings()
    study, pairs = store.study(), [pair for pair in store.pairs() if not pair.is_gold]
    answers = store.answers()
    judgements = last_judgements(answers)
    if not any(judgement.kind == SAMPLE for judgement in judgements):
        raise StudyError(f"Nobody has judged a pair of the study {str(store.path)!r} yet: there is nothing to report.")
    by_rater: dict[int, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        by_rater[judgement.rater.rater_id].append(judgement)
    found = [
        check_rater(rater, len(store.tasks(rater.rater_id)), by_rater[rater.rater_id], checks)
        for rater in store.raters()
    ]
    if not study.is_blind:  # of `trl-sipo label`: who labels their own pairs is not checked
        found = [replace(check, reasons=()) for check in found]
    kept = [check.rater for check in found if not check.reasons]
    kept_ids = {rater.rater_id for rater in kept}
    return StudyAnalysis(
        study=study,
        checks=found,
        num_answered=len(judgements),
        num_tasks=sum(check.num_tasks for check in found),
        num_stored=len(answers),
        num_skipped=len({answer.assignment_id for answer in answers}) - len(judgements),
        kept=result_of(pairs, kept, [j for j in judgements if j.rater.rater_id in kept_ids], statistics),
        everyone=result_of(pairs, [check.rater for check in found], judgements, statistics),
    )


def result_of(
    pairs: Sequence[Comparison],
    raters: Sequence[Rater],
    judgements: Sequence[Judgement],
    settings: StatisticsSettings,
) -> Result:
    """What some raters say of the pairs.

    Args:
        pairs: Without gold ones.
        raters: Those who were asked, whether or not they answered.
        judgements: Of these raters, all kinds.
    """
    found = votes(pairs, judgements)
    num_groups = len({rater.group for rater in raters})
    couples = _results(pairs, found, num_groups, settings, lambda pair: None)
    corrected = holm([couple.p_value for couple in couples])
    return Result(
        num_raters=len({judgement.rater.rater_id for judgement in judgements}),
        num_answers=len(judgements),
        couples=[replace(c, corrected_p_value=p) for c, p in zip(couples, corrected, strict=True)],
        categories=_results(
            [pair for pair in pairs if pair.category],
            [vote for vote in found if vote.pair.category],
            num_groups,
            settings,
            lambda pair: pair.category,
        ),
        agreement=_agreement(found, [j for j in judgements if j.kind == SAMPLE], num_groups),
        side_bias=_side_bias(judgements, settings),
        votes=found,
    )


def _results(
    pairs: Sequence[Comparison],
    found: Sequence[PairVote],
    num_groups: int,
    settings: StatisticsSettings,
    category_of: Callable[[Comparison], str | None],
) -> list[CoupleResult]:
    """A row for each two models, and each category that the pairs are parted by."""
    planned = Counter((pair.models, category_of(pair)) for pair in pairs)
    parts: dict[tuple[tuple[str, str], str | None], list[PairVote]] = defaultdict(list)
    for vote in found:
        parts[vote.pair.models, category_of(vote.pair)].append(vote)
    return [_couple(*key, parts[key], number, num_groups, settings) for key, number in planned.items() if parts[key]]


def _couple(
    models: tuple[str, str],
    category: str | None,
    found: Sequence[PairVote],
    num_pairs: int,
    num_groups: int,
    settings: StatisticsSettings,
) -> CoupleResult:
    prompts = [vote.pair.prompt_id for vote in found]
    outcomes = by_cluster([worth(vote.label) for vote in found], prompts)
    shares = by_cluster([vote.share_of_second for vote in found], prompts)
    options = {"level": settings.level, "num_resamples": settings.num_resamples, "seed": settings.seed}
    labels = Counter(vote.label for vote in found)
    by_group: dict[int, list[float]] = defaultdict(list)
    for vote in found:
        for group, label in vote.group_labels.items():
            by_group[group].append(worth(label))
    return CoupleResult(
        *models,
        category=category,
        wins=labels[SECOND],
        ties=labels[TIE],
        losses=labels[FIRST],
        win_rate=clustered_interval(outcomes, bounds=(0.0, 1.0), **options),
        p_value=sign_flip_test(outcomes, null=0.5, seed=settings.seed),
        corrected_p_value=None,
        share_of_answers=clustered_interval(shares, bounds=(0.0, 1.0), **options),
        by_group={group: mean(worths) for group, worths in sorted(by_group.items())},
        num_pairs=num_pairs,
        num_in_all_groups=sum(len(vote.group_labels) == num_groups for vote in found),
    )


def _agreement(found: Sequence[PairVote], judgements: Sequence[Judgement], num_groups: int) -> Agreement:
    labels: dict[str, dict[str, str]] = defaultdict(dict)  # pair -> rater -> label
    for judgement in judgements:
        labels[judgement.pair_id][judgement.rater.name] = judgement.label
    final = {vote.pair.pair_id: vote.label for vote in found}
    raters = dict.fromkeys(judgement.rater.name for judgement in judgements)
    own = {name: {pair: given[name] for pair, given in labels.items() if name in given} for name in raters}
    others = {
        name: {
            pair: group_label([label for other, label in labels[pair].items() if other != name])
            for pair in own[name]
            if len(labels[pair]) > 1
        }
        for name in raters
    }
    items = [list(given.values()) for given in labels.values()]
    complete = [vote for vote in found if len(vote.group_labels) == num_groups > 1]
    with_others = {name: agreement_with(own[name], others[name]) for name in raters}
    return Agreement(
        alpha=krippendorff_alpha(items),
        kappa=fleiss_kappa(items),
        with_final={name: share for name in raters if (share := agreement_with(own[name], final)) is not None},
        with_others={name: share for name, share in with_others.items() if share is not None},
        groups_alike=mean(len(set(vote.group_labels.values())) == 1 for vote in complete) if complete else None,
    )


def _side_bias(judgements: Sequence[Judgement], settings: StatisticsSettings) -> SideBias:
    decided = [judgement for judgement in judgements if judgement.choice != TIE]
    if not decided:
        return SideBias(None, None)
    lefts = by_cluster([float(j.choice == LEFT) for j in decided], [j.rater.rater_id for j in decided])
    interval = clustered_interval(
        lefts, bounds=(0.0, 1.0), level=settings.level, num_resamples=settings.num_resamples, seed=settings.seed
    )
    return SideBias(interval, sign_flip_test(lefts, null=0.5, seed=settings.seed))
