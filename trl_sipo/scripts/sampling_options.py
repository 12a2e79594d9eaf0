# SPDX-License-Identifier: Apache-2.0
"""The options that every command which samples and scores has, by the same names."""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from trl_sipo.generation.prompt_sets import PromptRecord
    from trl_sipo.generation.sampling import SamplingSettings
    from trl_sipo.rewards.base import Reward

SCORES_CACHE = "scores.sqlite"


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Which prompts are drawn."""
    add = parser.add_argument_group("prompts").add_argument
    add("--prompts", required=True, metavar="SET", help="a file, dataset:NAME:COLUMN, or composed:N; docs: prompts.md")
    add("--max_prompts", type=int, metavar="N", help="take so many of them, at random")
    add("--prompts_seed", type=int, default=0, metavar="SEED", help="of composing and choosing (default: %(default)s)")


def add_sampling_options(parser: argparse.ArgumentParser, *, samples_per_prompt: int) -> None:
    """How samples are drawn; what is not given is the pipeline's own."""
    add = parser.add_argument_group("sampling").add_argument
    add("--samples_per_prompt", type=int, default=samples_per_prompt, metavar="N", help="default: %(default)s")
    add("--num_inference_steps", type=int, metavar="N", help="steps of the sampler")
    add("--guidance_scale", type=float, metavar="SCALE", help="of classifier-free guidance")
    add("--height", type=int, metavar="PIXELS")
    add("--width", type=int, metavar="PIXELS")
    add("--num_frames", type=int, metavar="N", help="of a video model")
    add("--frame_rate", type=float, metavar="FPS", help="of a video model")
    add("--seed", type=int, default=0, help="of the noise, the same for every model (default: %(default)s)")
    add("--sampling_batch_size", type=int, default=4, metavar="N", help="samples drawn at once (default: %(default)s)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    add("--device", help="default: the GPU of this process, if there is one")


def add_reward_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which rewards score."""
    add = parser.add_argument_group("rewards").add_argument
    named = {"nargs": "+", "required": required, "default": [], "metavar": "REWARD"}
    add("--rewards", **named, help="names, module:Class, http://..., process:...")
    add(
        "--reward_options",
        type=_options_by_reward,
        default={},
        metavar="JSON",
        help='options by reward, such as \'{"pickscore": {"batch_size": 8}}\'',
    )
    add(
        "--scoring_batch_size", type=int, default=16, metavar="N", help="samples scored at once (default: %(default)s)"
    )


def _options_by_reward(text: str) -> Mapping[str, Mapping[str, Any]]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
        raise argparse.ArgumentTypeError(f'{text!r} must map rewards to options: {{"pickscore": {{"batch_size": 8}}}}')
    return options


def check_sampling_options(arguments: argparse.Namespace) -> None:
    """Raise [`ConfigurationError`] on numbers that make no sense, before anything is loaded."""
    for name in ("max_prompts", "sampling_batch_size", "scoring_batch_size"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise ConfigurationError(f"`--{name}` must be at least 1, got {value}.")
    unknown = set(getattr(arguments, "reward_options", {})) - set(getattr(arguments, "rewards", []))
    if unknown:
        raise ConfigurationError(
            f"`--reward_options` are given for {', '.join(sorted(unknown))}, but `--rewards` are "
            f"{', '.join(arguments.rewards)}."
        )


def sampling_settings(arguments: argparse.Namespace) -> "SamplingSettings":
    """The settings that the options ask for.

    Raises:
        ConfigurationError: A number out of range.
    """
    from trl_sipo.generation.sampling import SamplingSettings

    names = SamplingSettings.__dataclass_fields__
    return SamplingSettings(**{name: getattr(arguments, name) for name in names})


def chosen_prompts(arguments: argparse.Namespace) -> list["PromptRecord"]:
    """The prompts that the options ask for."""
    from trl_sipo.generation.prompt_sets import load_prompts

    prompts = load_prompts(arguments.prompts, limit=arguments.max_prompts, seed=arguments.prompts_seed)
    if not prompts:
        raise DatasetError(f"The prompt set {arguments.prompts!r} is empty.")
    return prompts


def opened_rewards(arguments: argparse.Namespace, cache: Path, stack: ExitStack) -> list["Reward"]:
    """The rewards that the options ask for; those outside end with `stack`.

    Scores are cached of those that say what they are a function of (`identity()`), as all of this package do.
    """
    from trl_sipo.generation.processes import chosen_device
    from trl_sipo.rewards.opening import open_rewards

    device = chosen_device(arguments.device)
    return open_rewards(arguments.rewards, arguments.reward_options, cache=cache, device=device, stack=stack)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table of plain text, columns as wide as they need."""
    cells = [
        list(header),
        *[[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows],
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
