# SPDX-License-Identifier: Apache-2.0
"""What is wrong with preference data, each with its count and the way out. Pure: numbers in, sentences out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trl_sipo.data.checking.features import FEATURES
from trl_sipo.evaluation.label_agreement import LABEL, Agreement
from trl_sipo.evaluation.shortcuts import Shortcut
from trl_sipo.evaluation.statistics import Interval

STOP, LOOK, GOOD = "stop", "look", "good"
"""Do not train before it is mended; look at it; nothing wrong."""
_ORDER = (STOP, LOOK, GOOD)

_MANY = 0.05  # share of pairs from which a fault stops a run
_DOMINANT, _LEAST_ROWS = 0.1, 20  # share of one prompt, and rows below which it means nothing
# How far a shortcut's area lies from one half at least, and how sure those pairs are that differ.
_STRONG, _WEAK, _SURE = 0.2, 0.05, 0.95
_TELLS_CAPTIONS = 0.75  # share of captions that a model which knows these pictures tells from another one, at least


@dataclass(frozen=True)
class Finding:
    """One thing that was found, or looked for.

    Attributes:
        name: Short, such as "broken".
        severity: `STOP`, `LOOK` or `GOOD`.
        count, total: How many of how many; None where it is no count.
        words: What it is.
        way_out: What to do; empty where there is nothing to do.
    """

    name: str
    severity: str
    words: str
    way_out: str = ""
    count: int | None = None
    total: int | None = None

    def as_numbers(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def by_severity(findings: Sequence[Finding | None]) -> list[Finding]:
    """Those that there are, the worst first."""
    found = [finding for finding in findings if finding is not None]
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence on all of them."""
    stops = [finding.name for finding in findings if finding.severity == STOP]
    looks = [finding.name for finding in findings if finding.severity == LOOK]
    if stops:
        beside = f" Look also at: {', '.join(looks)}." if looks else ""
        return f"DO NOT TRAIN ON THIS YET: {', '.join(stops)}.{beside}"
    if looks:
        return f"Nothing that stops a run was found; look at: {', '.join(looks)}."
    return "Nothing wrong was found, of what this audit can see."


# ------------------------------------------------------------------------------------------------ rows by themselves


def row_findings(report: Mapping[str, Any], lists: str) -> list[Finding | None]:
    """From the report of `trl-sipo data check`.

    Args:
        report: `DataCheck.report`.
        lists: Where the lists of rows are, for the ways out, such as "audit/rows".
    """
    rows, opened = report["num_rows"], report["num_rows"] - report["num_bad"]
    pairs = report["num_pairs"]
    return [
        _broken(report["num_bad"], rows, lists),
        _identical(report["num_identical_arms"], opened, lists),
        _contradictory(report["num_contradictory_pairs"], pairs, lists),
        _repeats(report["num_repeats"], opened, lists),
        _undecided(report["num_ties"] + report["num_unlabelled"], rows),
    ]


def _broken(count: int, total: int, lists: str) -> Finding | None:
    if not count:
        return Finding("broken", GOOD, f"All of {total} rows open.", count=0, total=total)
    words = f"{count} of {total} rows do not open: training ends at the first one that it comes to."
    return Finding("broken", STOP, words, f"Mend them, or --skip_rows {lists}/bad_rows.jsonl", count, total)


def _identical(count: int, total: int, lists: str) -> Finding | None:
    if not count:
        return None
    severity = STOP if count > _MANY * total else LOOK
    words = f"{count} of {total} pairs show the same thing twice, to the bit: they teach nothing."
    return Finding("identical arms", severity, words, f"--skip_rows {lists}/identical_arms.jsonl", count, total)


def _contradictory(count: int, total: int, lists: str) -> Finding | None:
    if not count:
        return None
    severity = STOP if count > _MANY * total else LOOK
    words = f"{count} pairs are preferred one way in one row and the other way in another."
    way_out = f"Merge the votes and train them with soft_labels, or --skip_rows {lists}/contradictory.jsonl"
    return Finding("contradictory labels", severity, words, way_out, count, total)


def _repeats(count: int, total: int, lists: str) -> Finding | None:
    if not count:
        return None
    words = f"{count} of {total} rows repeat an earlier one: they weigh twice."
    return Finding("repeats", LOOK, words, f"--skip_rows {lists}/repeats.jsonl", count, total)


def _undecided(count: int, total: int) -> Finding | None:
    if count <= _MANY * total:
        return None
    words = f"{count} of {total} rows are ties or have no label, and are dropped."
    return Finding(
        "undecided rows", LOOK, words, "Train ties with soft_labels, if votes are what they are.", count, total
    )


def dominant_prompt(count: int, total: int, prompt: str) -> Finding | None:
    """One prompt has too many of the rows.

    Args:
        count, total: Rows of the most common prompt, and all.
        prompt: It.
    """
    if total < _LEAST_ROWS or count <= _DOMINANT * total:
        return None
    words = f"{count} of {total} rows have one prompt, {prompt!r}: the policy is tuned to it, and intervals are wide."
    severity = STOP if count > 0.5 * total else LOOK
    return Finding(
        "one prompt dominates", severity, words, "Leave most of its rows out, or add other prompts.", count, total
    )


# ------------------------------------------------------------------------------------------------------- of two splits


@dataclass(frozen=True)
class Overlap:
    """What two splits share.

    Attributes:
        pairs: Rows of the first split whose pair is in the second as well.
        media: Rows with an image or video that is in the second as well.
        prompts: Rows whose prompt is.
        total: Rows of the first split.
    """

    pairs: int
    media: int
    prompts: int
    total: int


def overlap_findings(overlap: Overlap, lists: str) -> list[Finding]:
    """What the held-out pairs do not test any more."""
    if overlap.media:
        words = (
            f"{overlap.media} of {overlap.total} rows show something that is in the held-out pairs too, "
            f"{overlap.pairs} of them the same pair: what is measured there has been trained on."
        )
        way_out = f"--skip_rows {lists}/shared_with_held_out.jsonl"
        return [Finding("shared with held-out", STOP, words, way_out, overlap.media, overlap.total)]
    if overlap.prompts:
        words = (
            f"{overlap.prompts} of {overlap.total} rows have a prompt that is in the held-out pairs too, with other "
            "pictures: held-out pairs test other samples of known prompts."
        )
        way_out = "Split by prompt, if new prompts are what counts."
        return [Finding("prompts of held-out", LOOK, words, way_out, overlap.prompts, overlap.total)]
    words = f"None of {overlap.total} rows shares a picture or a prompt with the held-out pairs, to the bit."
    return [Finding("held-out", GOOD, words, count=0, total=overlap.total)]


# ---------------------------------------------------------------------------------------------------------- of labels


def shortcut_findings(shortcuts: Sequence[Shortcut]) -> list[Finding]:
    """Features by which the arms can be told apart without looking at what they show."""
    found = []
    for shortcut in shortcuts:
        is_sure = shortcut.num_differing >= _LEAST_ROWS and _certainty(shortcut) >= _SURE
        if shortcut.strength < _WEAK:
            continue
        severity = STOP if shortcut.strength >= _STRONG or is_sure else LOOK
        which = "more" if shortcut.is_more else "less"
        area = shortcut.area if shortcut.is_more else _mirrored(shortcut.area)
        wins = shortcut.wins if shortcut.is_more else shortcut.num_differing - shortcut.wins
        words = (
            f"By {FEATURES.get(shortcut.name, shortcut.name)} alone {area.estimate:.0%} [{area.low:.0%}, "
            f"{area.high:.0%}] of the pairs are told right: of {shortcut.num_differing} pairs that differ the chosen "
            f"one has {which} in {wins}."
        )
        found.append(
            Finding(
                f"shortcut: {shortcut.name}", severity, words, _shortcut_way_out(shortcut.name),
                wins, shortcut.num_pairs,
            )
        )  # fmt: skip
    if not found:
        found.append(Finding("shortcuts", GOOD, f"None of {len(FEATURES)} simple properties tells the arms apart."))
    return found


def _certainty(shortcut: Shortcut) -> float:
    return max(shortcut.wins, shortcut.num_differing - shortcut.wins) / shortcut.num_differing


def _mirrored(interval: Interval) -> Interval:
    return Interval(1 - interval.estimate, 1 - interval.high, 1 - interval.low, interval.level)


_FILE_FEATURES = ("file_bytes", "bytes_per_pixel", "is_lossy", "sharpness", "pixels", "aspect")


def _shortcut_way_out(name: str) -> str:
    if name in _FILE_FEATURES:
        return "Bring both arms to one size and one format, from the originals, or leave these pairs out."
    if name in ("num_frames", "frame_rate"):
        return "Cut both arms to one length and rate."
    return "If it is no preference, balance it: leave pairs out, or adjust both arms alike."


def reward_findings(found: Sequence[Agreement], near_ties: Mapping[str, float | None]) -> list[Finding]:
    """How rewards see the labels."""
    findings = []
    for pair in found:
        if LABEL not in (pair.first, pair.second) or pair.agreeing is None:
            continue
        reward = pair.second if pair.first == LABEL else pair.first
        agreeing = pair.agreeing
        share = f"{agreeing.estimate:.0%} [{agreeing.low:.0%}, {agreeing.high:.0%}] of {pair.num_pairs} pairs"
        against = round((1 - agreeing.estimate) * pair.num_pairs)
        if agreeing.high < 0.5:
            words = f"The labels agree with {reward} on {share}, LESS THAN CHANCE: they look turned around."
            way_out = "Look which column is the preferred one, or whether a smaller score is the better one."
            findings.append(Finding("turned labels", STOP, words, way_out, against, pair.num_pairs))
        elif agreeing.low <= 0.5:
            words = f"The labels agree with {reward} on {share}, which may be chance."
            way_out = (
                "Audit more pairs, of more prompts (--num_pairs). If it stays, the labels are noise, or this reward "
                "says nothing of what was preferred."
            )
            findings.append(Finding(f"chance agreement with {reward}", LOOK, words, way_out, against, pair.num_pairs))
        else:
            words = f"The labels agree with {reward} on {share}."
            findings.append(Finding(f"agreement with {reward}", GOOD, words, "", against, pair.num_pairs))
    for reward, share in near_ties.items():
        if share is not None and share > 0.25:
            words = f"{share:.0%} of the pairs are near-ties by {reward}: nearer than a tenth of its spread."
            findings.append(
                Finding(f"near-ties by {reward}", LOOK, words, "Leave them out, or train votes as soft_labels.")
            )
    return findings


def noise_finding(turned: Mapping[str, Mapping[str, float]], lowest_noisy: float) -> Finding | None:
    """Many labels are turned, whoever says so.

    Args:
        turned: Ways of estimating it, each with "estimate", "low" and "high".
        lowest_noisy: From which share on it is noisy.
    """
    sure = {name: part for name, part in turned.items() if part["low"] > lowest_noisy}
    if not sure:
        return None
    name, part = max(sure.items(), key=lambda item: item[1]["low"])
    words = (
        f"About {part['estimate']:.0%} [{part['low']:.0%}, {part['high']:.0%}] of the labels look turned, by {name}."
    )
    return Finding("noisy labels", LOOK, words, "See what is suggested below.")


# ----------------------------------------------------------------------------------------------------- of the model


def implicit_finding(agreeing: Interval, num_pairs: int) -> Finding:
    """How the model that is to be trained sees the labels: which arm it has the lower error on."""
    share = f"{agreeing.estimate:.0%} [{agreeing.low:.0%}, {agreeing.high:.0%}] of {num_pairs} pairs"
    words = f"The model has the lower error on the chosen sample in {share}"
    if agreeing.high < 0.5:
        words += ": chosen samples are less likely to it than rejected ones, which training has to turn around."
        way_out = (
            "Look whether the labels are turned, or the chosen samples are of another kind (`trl-sipo audit weights`)."
        )
        return Finding("against the model", LOOK, words, way_out)
    if agreeing.low > 0.9:
        words += ": it prefers them as it is, so that these pairs may be too easy."
        return Finding("easy pairs", LOOK, words, "Look whether the rejected samples are broken, or of another model.")
    if agreeing.low > 0.5:
        return Finding("implicit agreement", GOOD, f"{words}; 50 % is chance, and no fault.")
    return Finding("implicit agreement", GOOD, f"{words}, which may be chance; that is no fault.")


def caption_finding(telling: Interval, num_pairs: int) -> Finding:
    """Whether the captions belong to the pictures: how often the chosen sample's error is lower with its own one."""
    share = f"{telling.estimate:.0%} [{telling.low:.0%}, {telling.high:.0%}] of {num_pairs} pictures"
    words = f"With its own caption the model's error is lower than with another pair's on {share}"
    if telling.low > 0.5:
        return Finding("captions", GOOD, f"{words}.")
    way_out = (
        "Look at some pairs and their captions, and at a join that may have slipped; or score them with clipscore."
    )
    if telling.high < _TELLS_CAPTIONS:
        words += ", WHICH MAY BE CHANCE: the captions are shuffled, or the model knows nothing of what they name."
        return Finding("captions do not fit", STOP, words, way_out)
    return Finding("captions", LOOK, f"{words}: too few to tell whether they fit.", "Audit more pairs (--num_pairs).")
