# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo online --config file.yaml [--overrides]`: rounds of sampling, ranking and training.

Several processes: `torchrun --nproc_per_node N -m trl_sipo.scripts.online --config file.yaml`.
"""

import argparse
import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl_sipo.errors import EXPECTED_ERRORS, ConfigurationError, Preempted
from trl_sipo.printing import ArgumentParser, words_without_secrets
from trl_sipo.scripts.sampling_options import print_table

_PACKAGES = ("trl-sipo", "torch", "diffusers", "transformers")


def make_parser(prog: str = "trl-sipo online") -> argparse.ArgumentParser:
    """The one option that is no setting; the others are those of `trl_sipo.online.config`."""
    parser = ArgumentParser(
        prog=prog,
        description="Draw samples of a model, rank them, train on the pairs, and do it again, for several rounds. "
        "Every setting of the file can be overridden: --rounds 3 --training.beta 2000. A run that was stopped goes on "
        "where it was when the same command is given again.",
        epilog="Settings: docs/source/online.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings, as YAML")
    return parser


def run(command: str, argv: list[str]) -> None:
    """Run what is missing, and write the report.

    Raises:
        ConfigurationError: Settings that make no sense, or those of another run in the same folder.
        BackboneError, DatasetError, NumericalError, RewardError, StorageError: As the parts do.
        Preempted: SIGTERM came.
    """
    arguments, words = make_parser(f"trl-sipo {command}").parse_known_args(argv)
    from trl_sipo.generation.processes import process_state
    from trl_sipo.online.config import make_config, read_settings, with_overrides
    from trl_sipo.online.rounds import run_rounds
    from trl_sipo.reporting.figures import check_plotting

    if arguments.config is None and not words:
        raise ConfigurationError(
            "There are no settings: give `--config FILE`, such as examples/configs/online_demo.yaml."
        )
    config = make_config(with_overrides(read_settings(arguments.config) if arguments.config else {}, words))
    check_plotting()
    line = shlex.join(words_without_secrets(["trl-sipo", command, *argv]))
    try:
        summary = run_rounds(config, on_round=tell_round)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("What is done is kept: run the same command again to go on.") from error
    except Preempted as stop:
        print(f"{command}: {stop}\nThe command that continues:\n{line}", file=sys.stderr)
        raise
    if process_state().is_main_process:
        write_report(Path(config.output), summary, line)


def tell_round(record: dict[str, Any]) -> None:
    """One line about a round."""
    rewards = ", ".join(f"{name} {value:.4g}" for name, value in record["rewards"].items())
    print(
        f"Round {record['round']}: {record['pairs']} pairs of {record['samples']} samples"
        f"{f' ({rewards})' if rewards else ''}, {record['replayed']} replayed.",
        flush=True,
    )


def write_report(output: Path, summary: dict[str, Any], command: str) -> None:
    """Write `report.md`, `report.html` and the figures; print the table of rounds."""
    from trl_sipo.data.cache.shards import write_whole
    from trl_sipo.reporting.online_report import figures, markdown, page, tables
    from trl_sipo.reporting.page import png_bytes

    packages = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    report = {**summary, "command": command, "versions": packages}
    pictures = {name: png_bytes(figure) for name, figure in figures(report).items()}
    texts = {
        "online.json": json.dumps(report, indent=1, default=str) + "\n",
        "report.md": markdown(report),
        "report.html": page(report, pictures),
    }
    for name, text in texts.items():
        write_whole(output / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    for name, picture in pictures.items():
        write_whole(output / f"{name}.png", lambda path, picture=picture: path.write_bytes(picture))
    first = tables(report)[0]
    print_table(first.header, first.rows)
    print(f"\nOpen {output / 'report.html'}; numbers are in online.json.")


if __name__ == "__main__":
    try:
        run("online", sys.argv[1:])
    except EXPECTED_ERRORS as error:
        from trl_sipo.trainer.process_group import end_process

        print(f"online: {error}", file=sys.stderr)
        end_process(2)
