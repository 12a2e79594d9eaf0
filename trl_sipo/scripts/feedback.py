# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo feedback`: prompts -> samples of a model -> scores -> preference pairs."""

import argparse
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.printing import ArgumentParser
from trl_sipo.scripts.sampling_options import (
    SCORES_CACHE,
    add_prompt_options,
    add_reward_options,
    add_sampling_options,
    check_sampling_options,
    chosen_prompts,
    opened_rewards,
    print_table,
    sampling_settings,
)


def make_parser(prog: str = "trl-sipo feedback") -> argparse.ArgumentParser:
    """The options."""
    parser = ArgumentParser(
        prog=prog,
        description="Sample a model, score the samples by rewards, and write preference pairs for the trainers. A run "
        "that was stopped goes on where it was when the same command is given again.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="NAME=MODEL[+LORA]", help="whose samples are scored")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    add_prompt_options(parser)
    add_sampling_options(parser, samples_per_prompt=4)
    add_reward_options(parser)
    add = parser.add_argument_group("pairs").add_argument
    add("--selection", default="best_worst", help="best_worst: a pair a prompt; all: every ordered pair")
    add("--combine", default="weighted", help="of several rewards: weighted, consensus or pareto")
    add("--weights", nargs="+", default=[], metavar="REWARD=WEIGHT", help="by the rewards' names (default: 1 each)")
    add("--min_margin", type=float, default=0.0, metavar="SDS", help="in standard deviations (default: %(default)s)")
    add("--held_out_share", type=float, default=0.0, metavar="SHARE", help="of the prompts, for evaluation")
    add("--sft_per_prompt", type=int, default=1, metavar="N", help="best samples kept for SFT (default: %(default)s)")
    add(
        "--sft_quantile", type=float, default=0.5, metavar="Q", help="of these, the better part (default: %(default)s)"
    )
    return parser


def parse_weights(texts: list[str]) -> dict[str, float]:
    """`REWARD=WEIGHT`, several of them.

    Raises:
        ConfigurationError: One is not of that form.
    """
    weights = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise ConfigurationError(f"--weights {text!r} is not of the form REWARD=WEIGHT, such as pickscore=2.")
    return weights


def run(command: str, argv: list[str]) -> None:
    """Sample, score, and write pairs.

    Raises:
        ConfigurationError: Options that make no sense, or a model that does not take them.
        DatasetError: Prompts that cannot be read, or scores that prefer nothing.
        RewardError: A scorer failed.
    """
    arguments = make_parser(f"trl-sipo {command}").parse_args(argv)
    check_sampling_options(arguments)
    from trl_sipo.feedback.feedback import FeedbackSettings, write_feedback
    from trl_sipo.generation.models import load_model, parse_model
    from trl_sipo.generation.processes import chosen_device, process_state
    from trl_sipo.generation.sampling import draw_samples
    from trl_sipo.generation.scoring import score_samples

    settings = FeedbackSettings(
        selection=arguments.selection,
        combine=arguments.combine,
        weights=parse_weights(arguments.weights),
        min_margin=arguments.min_margin,
        held_out_share=arguments.held_out_share,
        sft_per_prompt=arguments.sft_per_prompt,
        sft_quantile=arguments.sft_quantile,
    )
    spec, sampling, prompts = parse_model(arguments.model), sampling_settings(arguments), chosen_prompts(arguments)
    if sampling.samples_per_prompt < 2:
        raise ConfigurationError("`--samples_per_prompt` must be at least 2: a pair is two samples of one prompt.")
    with ExitStack() as stack:
        rewards = opened_rewards(arguments, arguments.output / SCORES_CACHE, stack)
        settings.check([reward.info.name for reward in rewards])
        model = load_model(spec, dtype=arguments.dtype, device=chosen_device(arguments.device))
        samples = arguments.output / "samples"
        draw_samples(model, prompts, samples, sampling, batch_size=arguments.sampling_batch_size, name=spec.name)
        scored = score_samples(samples, rewards, batch_size=arguments.scoring_batch_size)
    if process_state().is_main_process:
        scored.write(arguments.output / "scores.parquet")
        tell(write_feedback(scored, arguments.output, settings, source=spec.name), arguments.output)


def tell(report: dict[str, Any], output: Path) -> None:
    """Print what was made, how far the rewards agree, and what to do next."""
    print(
        f"{report['pairs']} pairs and {report['held_out_pairs']} held out, of {report['samples']} samples of "
        f"{report['prompts']} prompts; {report['sft']} samples for fine-tuning."
    )
    if report["conflicts"]:
        rows = [
            (row["first"], row["second"], _share(row["conflict_rate"]), row["num_pairs"], row["num_ties"])
            for row in report["conflicts"]
        ]
        print_table(["reward", "against", "ranks opposed", "of pairs", "ties"], rows)
        print(f"All rewards rank alike: {_share(report['all_agree'])} of the pairs of samples of a prompt.")
    print(
        f"Written to {output}. Next:\n  trl-sipo sipo --dataset_name {shlex.quote(str(output / 'pairs.parquet'))} ..."
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
