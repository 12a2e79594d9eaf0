# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo audit data`: what is wrong with preference data, and how a model and rewards see its labels."""

import argparse
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_sipo.errors import ConfigurationError, StorageError
from trl_sipo.printing import ArgumentParser
from trl_sipo.scripts.audit_data_report import figures_of, report_of, tables_of
from trl_sipo.scripts.audit_inputs import (
    add_data_options,
    add_level_options,
    add_model_options,
    load_adapter,
    load_rows,
    measure,
    noise_of,
    open_pairs,
    settings_of,
    training_settings,
)
from trl_sipo.scripts.audit_report import (
    prepare_output,
    print_sentences,
    print_tables,
    recorded_command,
    write_audit,
)
from trl_sipo.scripts.sampling_options import add_reward_options, check_sampling_options, opened_rewards

if TYPE_CHECKING:
    from torch import Tensor

    from trl_sipo.data.checking.check import DataCheck
    from trl_sipo.evaluation.data_findings import Finding

MODEL = "the model"
_LONGEST_PROMPT = 60  # characters that are shown


def make_parser(prog: str = "trl-sipo audit data") -> argparse.ArgumentParser:
    """The options; those that a training command has too have its names."""
    parser = ArgumentParser(
        prog=prog,
        description="Look at every row, at what tells the arms apart, and at how a model and rewards see the labels; "
        "say what is wrong and what to do. Without a model, what only a model can see is left out.",
        allow_abbrev=False,
    )
    add_model_options(parser, required=False)
    add_data_options(parser, num_pairs=64)
    add_level_options(parser, num_levels=10)
    add = parser.add_argument
    add(
        "--held_out_name",
        metavar="PATH",
        help="held-out pairs, which must not share anything (default: the same data)",
    )
    add("--held_out_split", metavar="NAME", help="their split (default: test, if --held_out_name is given)")
    add_reward_options(parser, required=False)
    add("--device", help="of the rewards (default: the GPU, if there is one)")
    add("--num_workers", type=int, default=0, help="processes that read rows (default: %(default)s, this one)")
    add("--output", type=Path, metavar="DIR", help="folder for data.json, data.html, data.png and lists of rows")
    return parser


@dataclass
class Evidence:
    """What is known of the pairs with a preference; arrays are over these, in the order of the rows.

    Attributes:
        rows: (pairs,) their row numbers.
        prompts: (pairs,) hashes.
        votes: Rater to (pairs,) differences of scores, chosen minus rejected, NaN where it was not asked.
        findings: What was found.
    """

    rows: np.ndarray
    prompts: list[int]
    votes: dict[str, np.ndarray]
    findings: list["Finding | None"]

    def picked(self, count: int) -> np.ndarray:
        """Places of at most so many pairs, evenly spaced."""
        number = min(count, len(self.rows))
        return np.array([place * len(self.rows) // number for place in range(number)], dtype=np.int64)

    def add_votes(self, rater: str, places: np.ndarray, differences: np.ndarray) -> None:
        """What a rater says of some pairs."""
        column = np.full(len(self.rows), np.nan)
        column[places] = differences
        self.votes[rater] = column


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] on options that make no sense together, before anything is read."""
    for name, least in (("num_pairs", 1), ("num_levels", 2), ("num_workers", 0)):
        if getattr(arguments, name) < least:
            raise ConfigurationError(f"`--{name}` must be at least {least}, got {getattr(arguments, name)}.")
    if arguments.lora is not None and arguments.model_name_or_path is None:
        raise ConfigurationError(f"`--lora {arguments.lora}` goes on a model: give `--model_name_or_path`.")
    check_sampling_options(arguments)


def run(command: str, argv: list[str]) -> None:
    """Look, print, and write when asked to.

    Raises:
        ConfigurationError: Options that make no sense, or contradict the data or the model.
        BackboneError, DatasetError, NumericalError, RewardError, StorageError: As the parts do.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    check_arguments(arguments)
    draws = prepare_output(arguments.output)
    if arguments.model_name_or_path is not None:
        training_settings(arguments)
    from trl_sipo.data.cache.dataset import CachedPairs
    from trl_sipo.scripts.audit_data_scores import check_media

    rows = load_rows(arguments)
    with ExitStack() as stack:
        if isinstance(rows, CachedPairs):
            refuse_for_cache(arguments)
        # All that may be missing is opened before any row is looked at, which may take hours.
        adapter = load_adapter(arguments) if arguments.model_name_or_path is not None else None
        if isinstance(rows, CachedPairs):
            evidence, found, shortcuts = of_cache(rows), None, []
        else:
            held_out = held_out_rows(arguments)
            rewards = opened_rewards(arguments, scores_cache(arguments, stack), stack)
            check_media(rows, rewards)
            found = checked(rows, arguments)
            evidence, shortcuts = of_rows(rows, found, held_out, arguments)
            scored(rows, found, evidence, arguments, rewards)
    implicit = None if adapter is None else seen_by_model(arguments, adapter, rows, evidence)
    report = report_of(evidence, found, shortcuts, implicit)
    tables = tables_of(report)
    settings = (implicit or {}).get("settings", {"dataset_split": arguments.dataset_split})
    report = {"command": recorded_command(command, argv), "settings": settings, **report}
    tell(report)
    print_tables(tables)
    if arguments.output is not None:
        sentences = [report["verdict"], *(finding_words(finding) for finding in report["findings"])]
        sentences.append(f"For Poly-DPO: {report['advice']['words']}")
        write_audit(arguments.output, "data", report, sentences, tables, figures_of(report) if draws else {})


def tell(report: dict[str, Any]) -> None:
    """Print the verdict, what was found with the ways out, and the advice."""
    found = [finding_words(finding, "\n       ") for finding in report["findings"]]
    notes = [f"Note: {sentence}" for sentence in report["cannot_know"]]
    print_sentences([report["verdict"], "", *found, "", f"For Poly-DPO: {report['advice']['words']}", *notes])


def finding_words(finding: dict[str, Any], separator: str = " ") -> str:
    """A finding and its way out."""
    way_out = f"{separator}-> {finding['way_out']}" if finding["way_out"] else ""
    return f"[{finding['severity']}] {finding['words']}{way_out}"


# ------------------------------------------------------------------------------------------------------------- rows


def lists_folder(arguments: argparse.Namespace) -> Path:
    """Where lists of rows are written; without `--output` where they would be."""
    return (arguments.output or Path("OUTPUT")) / "rows"


def scores_cache(arguments: argparse.Namespace, stack: ExitStack) -> Path:
    """The file in which scores of rewards are kept for the next run; without `--output` for this one alone."""
    import tempfile

    from trl_sipo.scripts.sampling_options import SCORES_CACHE

    if arguments.output is not None:
        return arguments.output / SCORES_CACHE
    return Path(stack.enter_context(tempfile.TemporaryDirectory())) / SCORES_CACHE


def checked(rows: Any, arguments: argparse.Namespace, *, measure_features: bool = True) -> "DataCheck":
    """Every row looked at, as by `trl-sipo data check`."""
    from trl_sipo.data.checking.check import CheckOptions, check_data

    is_clip = arguments.num_frames is not None and arguments.num_frames > 1
    options = CheckOptions(
        num_frames=arguments.num_frames if is_clip else None,
        frame_rate=arguments.frame_rate,
        num_workers=arguments.num_workers,
        measure_features=measure_features,
    )
    return check_data(rows, options)


def held_out_rows(arguments: argparse.Namespace) -> Any:
    """The held-out pairs as they are stored; None: none are named.

    Raises:
        ConfigurationError: They are a cache.
        DatasetError: There are none.
    """
    from trl_sipo.data.cache.dataset import CachedPairs

    if arguments.held_out_name is None and arguments.held_out_split is None:
        return None
    other = argparse.Namespace(**vars(arguments))
    other.dataset_name = arguments.held_out_name or arguments.dataset_name
    other.dataset_split = arguments.held_out_split or "test"
    rows = load_rows(other)
    if isinstance(rows, CachedPairs):
        raise ConfigurationError(
            f"`--held_out_name {other.dataset_name}` is a cache, which has no pictures to compare with. Give the data "
            "that it was made of."
        )
    return rows


def of_rows(rows: Any, found: "DataCheck", held_out: Any, arguments: argparse.Namespace) -> tuple[Evidence, list[Any]]:
    """What the rows say by themselves, and beside the held-out ones."""
    from trl_sipo.data.checking.features import FEATURES
    from trl_sipo.evaluation.data_findings import row_findings, shortcut_findings
    from trl_sipo.evaluation.label_agreement import LABEL
    from trl_sipo.evaluation.shortcuts import find_shortcuts

    folder = lists_folder(arguments)
    lists = shlex.quote(str(folder))
    if arguments.output is not None:
        written(found, folder)
    judgements = found.judgements
    is_decided = judgements.is_decided
    prompts = judgements.prompt[is_decided].tolist()
    findings = [*row_findings(found.report, lists), prompt_finding(rows, found)]
    evidence = Evidence(judgements.row[is_decided], prompts, {}, findings)
    evidence.votes[LABEL] = np.ones(len(prompts))
    shortcuts = []
    if found.features is not None and len(prompts):
        features, is_first = found.features[is_decided], judgements.label[is_decided] > 0.5
        arms = [np.where(is_first[:, None], features[:, one], features[:, 1 - one]) for one in (0, 1)]
        shortcuts = find_shortcuts(tuple(FEATURES), *arms, prompts)
        findings += shortcut_findings(shortcuts)
    if held_out is not None:
        findings += held_out_findings(found, held_out, arguments, folder)
    return evidence, shortcuts


def written(found: "DataCheck", folder: Path) -> None:
    """Write report and lists of rows. Raises [`StorageError`] where they cannot be written."""
    try:
        found.write(folder)
    except OSError as error:
        raise StorageError(
            f"{str(folder)!r} cannot be written: {error}. Make room, or give another folder."
        ) from error


def prompt_finding(rows: Any, found: "DataCheck") -> "Finding | None":
    """Whether one prompt has too many of the rows."""
    from trl_sipo.data.formats import detect_format, read_prompt
    from trl_sipo.evaluation.data_findings import dominant_prompt

    hashes = found.judgements.prompt
    if not len(hashes):
        return None
    _, firsts, counts = np.unique(hashes, return_index=True, return_counts=True)
    column = detect_format(rows.column_names).prompt
    row = int(found.judgements.row[firsts[counts.argmax()]])
    prompt = read_prompt(rows.select_columns([column])[row][column])
    return dominant_prompt(int(counts.max()), len(hashes), prompt[:_LONGEST_PROMPT])


def held_out_findings(
    found: "DataCheck", held_out: Any, arguments: argparse.Namespace, folder: Path
) -> list["Finding"]:
    """What the rows share with the held-out ones, to the bit."""
    from trl_sipo.data.checking.check import ListedRows
    from trl_sipo.evaluation.data_findings import Overlap, overlap_findings

    held = checked(held_out, arguments, measure_features=False).judgements
    own = found.judgements
    media = np.concatenate([held.first, held.second])
    shares_media = np.isin(own.first, media) | np.isin(own.second, media)
    held_pairs = set(zip(held.prompt.tolist(), *(side.tolist() for side in held.sides()[:2]), strict=True))
    pairs = zip(own.prompt.tolist(), *(side.tolist() for side in own.sides()[:2]), strict=True)
    num_pairs = sum(pair in held_pairs for pair in pairs)
    overlap = Overlap(num_pairs, int(shares_media.sum()), int(np.isin(own.prompt, held.prompt).sum()), len(own.row))
    if arguments.output is not None:
        reason = "shows what a held-out pair shows"
        listed = ListedRows(own.row[shares_media], found.keys[shares_media], reason)
        write_list(folder / "shared_with_held_out.jsonl", listed)
    return overlap_findings(overlap, shlex.quote(str(folder)))


def write_list(path: Path, listed: Any) -> None:
    """Rows as JSON Lines, for `--skip_rows`; no file of none."""
    import json

    from trl_sipo.data.cache.shards import write_whole

    path.unlink(missing_ok=True)  # of an earlier audit
    if len(listed):
        text = "".join(json.dumps(row._asdict()) + "\n" for row in listed)
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------- rewards


def scored(
    rows: Any, found: "DataCheck", evidence: Evidence, arguments: argparse.Namespace, rewards: Sequence[Any]
) -> None:
    """Add what columns of scores, and rewards, say of the pairs."""
    from trl_sipo.data.formats import detect_format
    from trl_sipo.scripts.audit_data_scores import column_differences, reward_differences, score_columns

    if not len(evidence.rows):
        return
    fmt = detect_format(rows.column_names)
    decided = found.judgements.where(found.judgements.is_decided)
    sign = np.where(decided.label > 0.5, 1.0, -1.0)
    for name, columns in score_columns(rows, fmt).items():
        every = np.arange(len(evidence.rows))
        evidence.add_votes(name, every, sign * column_differences(rows, columns, evidence.rows))
    if rewards:
        places = evidence.picked(arguments.num_pairs)
        is_video = found.report["kind"] == "videos"
        options = {"batch_size": arguments.scoring_batch_size, "is_video": is_video}
        scores = reward_differences(rows, fmt, evidence.rows[places], rewards, **options)
        for name, differences in scores.items():
            evidence.add_votes(name, places, sign[places] * differences)


# ------------------------------------------------------------------------------------------------------------- cache


def refuse_for_cache(arguments: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] on what a cache cannot answer."""
    if arguments.rewards or arguments.held_out_name or arguments.held_out_split:
        raise ConfigurationError(
            f"{arguments.dataset_name!r} is a cache: it holds latents, and no pictures to score or to compare with "
            "held-out ones. Give the data that it was made of, or leave `--rewards` and `--held_out_*` out."
        )
    if arguments.model_name_or_path is None:
        raise ConfigurationError(
            f"{arguments.dataset_name!r} is a cache: without a model nothing can be said of it. Give "
            "`--model_name_or_path`, or the data that it was made of."
        )


def of_cache(rows: Any) -> Evidence:
    """Of encoded pairs: what files, columns and pictures would say is not known."""
    from trl_sipo.evaluation.data_findings import LOOK, Finding, dominant_prompt
    from trl_sipo.evaluation.label_agreement import LABEL

    prompts, counts = np.unique(rows.index.prompt, return_counts=True)
    most = int(np.flatnonzero(rows.index.prompt == prompts[counts.argmax()])[0])
    words = "A cache holds latents: files, formats, repeats, columns of scores and held-out pairs were not looked at."
    findings = [
        Finding("cache", LOOK, words, "Audit the data that it was made of too."),
        dominant_prompt(int(counts.max()), len(rows), rows[most]["prompt"][:_LONGEST_PROMPT]),
    ]
    evidence = Evidence(np.arange(len(rows)), rows.index.prompt.tolist(), {}, findings)
    evidence.votes[LABEL] = np.ones(len(rows))
    return evidence


# ------------------------------------------------------------------------------------------------------------- model


def seen_by_model(arguments: argparse.Namespace, adapter: Any, rows: Any, evidence: Evidence) -> dict[str, Any] | None:
    """The model's errors on both arms, and on the chosen one with another caption; adds its votes and findings."""
    from trl_sipo.data.cache.dataset import CachedPairs
    from trl_sipo.evaluation.data_findings import caption_finding, implicit_finding
    from trl_sipo.evaluation.policy_distance import as_numbers, share_interval

    if not len(evidence.rows):
        return None
    places = evidence.picked(arguments.num_pairs)
    chosen = rows if isinstance(rows, CachedPairs) else rows.select(evidence.rows[places])
    settings, size, audited, pairs = open_pairs(arguments, adapter, chosen, at_most=True)
    weights, prompts = measure(adapter, pairs, audited, settings), [pair.prompt for pair in pairs]
    log_ratio = weights.rejected_error.double().log() - weights.chosen_error.double().log()
    evidence.add_votes(MODEL, places, log_ratio.mean(0).numpy())
    agreeing = share_interval(votes_of(log_ratio.mean(0))[None], prompts)
    evidence.findings.append(implicit_finding(agreeing, len(pairs)))
    found = {
        "settings": settings_of(arguments, adapter, settings, audited, size, len(pairs)),
        "agreement": as_numbers(agreeing),
        "levels": [
            {
                "time": time,
                audited.unit: audited.positions[place],
                "agreement": as_numbers(share_interval(votes_of(log_ratio[place])[None], prompts)),
            }
            for place, time in enumerate(audited.times.tolist())
        ],
        "captions": None,
    }
    partners = other_prompts(prompts)
    if partners is not None:
        other = errors_with_other_prompts(adapter, pairs, partners, audited, settings)
        gains = (other.double().log() - weights.chosen_error.double().log()).mean(0)
        telling = share_interval(votes_of(gains)[None], prompts)
        evidence.findings.append(caption_finding(telling, len(pairs)))
        found["captions"] = as_numbers(telling)
    return found


def votes_of(differences: "Tensor") -> "Tensor":
    """1 where positive, 0 where negative, one half where neither."""
    return (differences.sign() + 1) / 2


def other_prompts(prompts: Sequence[str]) -> list[int] | None:
    """For each pair the place of one with another prompt, each as far along the list; None: all have one prompt."""
    count = len(prompts)
    partners = []
    for place, prompt in enumerate(prompts):
        others = (step % count for step in range(place + 1, place + count))
        partner = next((other for other in others if prompts[other] != prompt), None)
        if partner is None:
            return None
        partners.append(partner)
    return partners


def errors_with_other_prompts(
    adapter: Any, pairs: Sequence[Any], partners: Sequence[int], audited: Any, settings: Any
) -> "Tensor":
    """The model's errors (levels, pairs) on the chosen samples, given another pair's prompt, with the same noise."""
    import torch
    from tqdm.auto import tqdm

    from trl_sipo.evaluation.importance_curve import errors_at_levels

    columns = []
    with tqdm(total=len(pairs) * len(audited.times), desc="With other captions") as progress:
        for pair, partner in zip(pairs, partners, strict=True):
            rate = pair.encoded.frame_rate
            errors = errors_at_levels(
                adapter,
                adapter.denoiser,
                pair.encoded.chosen_latents,
                noise_of(pair, settings),
                pairs[partner].encoded.conditioning,
                audited.levels,
                extra=None if rate is None else {"frame_rate": rate},
                on_level=progress.update,
            )
            columns.append(errors)
    return torch.cat(columns, dim=1)
