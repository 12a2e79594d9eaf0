# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo data check PATH`: look at every row before training; nothing is changed."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trl_sipo.errors import ConfigurationError, DatasetError
from trl_sipo.printing import ArgumentParser, printable

if TYPE_CHECKING:
    from trl_sipo.data.checking.check import DataCheck


def make_parser(prog: str = "trl-sipo data check") -> argparse.ArgumentParser:
    """The options; those that a training command has too have its names."""
    parser = ArgumentParser(
        prog=prog,
        description="Look at every row of preference data, and write what was found: a page, numbers, lists of rows.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("dataset_name", metavar="PATH", help="hub id or local path of preference pairs")
    add("--dataset_config", metavar="NAME", help="configuration of a hub dataset")
    add("--dataset_split", default="train", help="default: %(default)s")
    add("--dataset_format", metavar="NAME", help="layout of the data (default: recognised by its columns)")
    add("--dataset_media_folder", metavar="DIR", help="folder to which paths are relative (default: their table's)")
    add("--dataset_streaming", action="store_true", help="read the data as a stream")
    add("--limit", type=int, metavar="ROWS", help="look at the first rows only")
    add("--num_frames", type=int, help="frames that clips need; shorter videos are bad (default: any length)")
    add("--frame_rate", type=float, help="frames per second of the clips (default: each video's own)")
    add("--decode_videos", action="store_true", help="decode every frame, not only the index and the first frame")
    add("--num_workers", type=int, default=0, help="processes that read (default: %(default)s, this one)")
    add("--output", type=Path, default=Path("data_check"), metavar="DIR", help="default: %(default)s")
    add("--strict", action="store_true", help="end with an error when a row cannot be trained on")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] on numbers that make no sense together."""
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigurationError(f"`--limit` must be at least 1, got {arguments.limit}.")
    if arguments.num_frames is not None and arguments.num_frames < 1:
        raise ConfigurationError(f"`--num_frames` must be at least 1, got {arguments.num_frames}.")
    if arguments.num_workers < 0:
        raise ConfigurationError(f"`--num_workers` must be zero or more, got {arguments.num_workers}.")
    if arguments.num_workers and arguments.dataset_streaming:
        raise ConfigurationError("`--num_workers` with `--dataset_streaming`: a stream is read by one process.")


def run(command: str, argv: list[str]) -> None:
    """Check, print what was found, and write it.

    Raises:
        ConfigurationError: Options that make no sense.
        DatasetError: Data that cannot be read at all; with `--strict` also a bad row.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    check_arguments(arguments)
    from trl_sipo.data.checking.check import CheckOptions, check_data
    from trl_sipo.data.loading import load_preference_dataset
    from trl_sipo.reporting.data_page import data_page

    dataset = load_preference_dataset(
        arguments.dataset_name,
        name=arguments.dataset_config,
        split=arguments.dataset_split,
        streaming=arguments.dataset_streaming,
        format=arguments.dataset_format,
        media_folder=arguments.dataset_media_folder,
    )
    options = CheckOptions(
        limit=arguments.limit,
        num_frames=arguments.num_frames,
        frame_rate=arguments.frame_rate,
        decode_videos=arguments.decode_videos,
        num_workers=arguments.num_workers,
    )
    found = check_data(dataset, options)
    paths = found.write(arguments.output)
    page = arguments.output / "report.html"
    title = f"{Path(arguments.dataset_name).name}, {arguments.dataset_split}"
    page.write_text(data_page(title, found.report, found.shown, found.listed["bad_rows"]), encoding="utf-8")
    print(summary(found))
    print("Written: " + ", ".join(str(path) for path in [page, *paths]))
    if found.listed["bad_rows"]:
        _tell_of_bad_rows(found, arguments)


def summary(found: "DataCheck") -> str:
    """A few lines on what was found."""
    report, noise = found.report, found.report["label_noise"]
    lines = [
        f"{report['num_rows']} rows of the {report['format']} format ({report['kind']}): {report['num_pairs']} pairs, "
        f"{report['num_ties']} ties, {report['num_unlabelled']} without a label, {report['num_bad']} bad.",
        f"{report['num_identical_arms']} pairs of the same thing twice, {report['num_repeats']} repeats, "
        f"{report['num_contradictory_pairs']} contradictory pairs, {report['num_unequal_sizes']} of unequal size.",
    ]
    for key, text in (("agreement_of_repeats", "repeated judgements agree"), ("cyclic_triples", "triples are cyclic")):
        if noise[key] is not None:
            part = noise[key]
            lines.append(f"{part['hits']} of {part['total']} {text} (95 %: {part['low']:.1%} to {part['high']:.1%}).")
    lines.append(f"For Poly-DPO: {noise['suggestion']}")
    return "\n".join(lines)


def _tell_of_bad_rows(found: "DataCheck", arguments: argparse.Namespace) -> None:
    bad = found.listed["bad_rows"]
    file = arguments.output / "bad_rows.jsonl"
    text = f"{len(bad)} rows cannot be trained on; the first: row {bad[0].row}: {bad[0].reason.rstrip('.')}."
    advice = f"Mend them, or leave them out: --skip_rows {file}"
    if arguments.strict:
        raise DatasetError(f"{text} {advice}")
    print(printable(f"{text}\n{advice}"))
