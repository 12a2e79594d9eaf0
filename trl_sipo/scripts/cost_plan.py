# SPDX-License-Identifier: Apache-2.0
"""From the settings of a training command to what its cost depends on."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import ConfigurationError
from trl_sipo.scripts.train import ModelArguments, check_name, check_trained_part, make_parser, parse_with
from trl_sipo.yaml_files import read_yaml

if TYPE_CHECKING:
    from trl_sipo.cost.estimate import RunPlan
    from trl_sipo.cost.models import Model

_SAMPLES = {"pair": 2, "each": 1, "chosen": 1}  # of a row, by the `arms` of a method's configuration


@dataclass(frozen=True)
class Around:
    """What decides the cost of a run beside its settings.

    Attributes:
        processes: GPUs.
        strategy: A member of `trl_sipo.cost.communication.STRATEGIES`.
        pairs: Of the training data; `None`: not known.
        prompts: Different ones among them; `None`: as many as pairs.
        is_cached: Whether the data are encoded.
        network: Bytes a second between machines, per GPU.
    """

    processes: int = 1
    strategy: str = "DDP"
    pairs: int | None = None
    prompts: int | None = None
    is_cached: bool = False
    network: float = 25e9


@dataclass(frozen=True)
class TrainingCommand:
    """The settings of a training command, parsed by that command's own parser.

    Attributes:
        method: A key of `trl_sipo.trainer.methods.METHODS`.
        data, training, model: Its arguments.
        precision: "float32", "bfloat16" or "float16", as the settings say; else bfloat16, the default on GPUs.
        names_precision: Whether the settings say it.
    """

    method: str
    data: Any
    training: Any
    model: ModelArguments
    precision: str
    names_precision: bool


def parse_command(method: str, words: list[str]) -> TrainingCommand:
    """The settings of `trl-sipo <method> <words>`; of the data nothing need be said.

    Raises:
        ConfigurationError: An unknown setting, or one that is out of range.
    """
    import torch

    names_precision = bool({"bf16", "fp16"} & _given(words))
    # What a GPU would do is asked on machines that have none.
    on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    data, training, model = parse_with(make_parser(method, f"trl-sipo audit cost {method}"), [*words, *on_cpu])
    check_name("model_name_or_path", model.model_name_or_path, "a diffusers pipeline")
    check_trained_part(model)
    half = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    return TrainingCommand(method, data, training, model, half if names_precision else "bfloat16", names_precision)


def _given(words: list[str]) -> set[str]:
    """Names of the settings that a command gives, itself or in its file."""
    names = {word.removeprefix("--").split("=", 1)[0] for word in words if word.startswith("--")}
    for place, word in enumerate(words):
        path = word.removeprefix("--config=") if word.startswith("--config=") else None
        if word == "--config" and place + 1 < len(words):
            path = words[place + 1]
        content = read_yaml(path) if path is not None else None
        names |= set(content) if isinstance(content, dict) else set()
    return names


def size_of(command: TrainingCommand) -> tuple[int | None, int | None, int | None]:
    """Height and width in pixels and number of frames; `None`: the model's own."""
    height, width = command.training.size or (None, None)
    return height, width, command.training.num_frames


def find_cached_pairs(command: TrainingCommand) -> int | None:
    """Pairs of the cache that the command names; `None`: it names none that is here.

    Raises:
        DatasetError: The cache is that of another split, or cannot be read.
    """
    from trl_sipo.data.cache.dataset import find_cache
    from trl_sipo.data.cache.manifest import read_manifest

    name = command.data.dataset_name
    if not isinstance(name, str) or not Path(name).is_dir():
        return None
    cache = find_cache(Path(name), command.data.dataset_train_split)
    return None if cache is None else read_manifest(cache).num_pairs


def make_plan(command: TrainingCommand, model: "Model", around: Around) -> "RunPlan":
    """What the cost of a run depends on.

    Raises:
        ConfigurationError: Neither `max_steps` nor the number of pairs is known, or a number is out of range.
    """
    from trl_sipo.cost.disk import DiskPlan
    from trl_sipo.cost.estimate import RunPlan
    from trl_sipo.cost.models import guidance_passes
    from trl_sipo.cost.step import StepPlan

    _check_strategy(command, around)
    training, targets = command.training, command.model.lora_target_modules
    is_lora, is_precomputed = command.model.use_peft, training.precompute_ref_log_probs
    needs_media = not (around.is_cached or training.reads_trajectories)
    step = StepPlan(
        pairs=training.per_device_train_batch_size,
        arms=_SAMPLES[training.arms],
        passes=2 if training.reads_trajectories and training.guidance_scale != 1 else 1,
        has_reference=training.has_reference and not is_precomputed,
        lora_rank=command.model.lora_r if is_lora else None,
        lora_targets=tuple(targets) if isinstance(targets, list) else targets,
        precision=command.precision,
        frozen_precision=command.model.dtype or command.precision,
        is_quantized=command.model.load_in_4bit,
        checkpointing=training.gradient_checkpointing,
        split=training.split_pair_backward,
        encodes=needs_media and not training.precompute_latents,
        holds_encoders=not around.is_cached,
    )
    per_step = step.pairs * training.gradient_accumulation_steps * around.processes
    steps = _steps(training, around.pairs, per_step)
    pairs, grids = around.pairs or 0, _grids(training, steps)
    prompts = len(training.sample_prompts or ())
    optimizer = _optimizer(str(getattr(training.optim, "value", training.optim)))
    passes = guidance_passes(model.architecture) if grids else 0
    drawn = training.num_ref_draws if is_precomputed else 0
    return RunPlan(
        step=step,
        disk=DiskPlan(
            pairs=pairs,
            prompts=around.prompts or pairs,
            checkpoints=_checkpoints(training, steps),
            optimizer=optimizer,
            strategy=around.strategy if around.processes > 1 else "one process",
            grids=grids,
            grid_samples=2 * prompts,
            reference_draws=drawn,
            stores_predictions=training.precompute_ref_predictions,
        ),
        strategy=around.strategy,
        processes=around.processes,
        accumulation=training.gradient_accumulation_steps,
        optimizer=optimizer,
        steps=steps,
        allows_tf32=bool(training.tf32),
        reference_samples=drawn * (pairs or steps * per_step) * step.arms,
        grid_samples=(grids + 1) * prompts * training.sample_num_inference_steps * passes,
        network=around.network,
    )


def _check_strategy(command: TrainingCommand, around: Around) -> None:
    """Raise [`ConfigurationError`] for what training refuses under a strategy (docs/source/distributed.md)."""
    if around.processes == 1 or around.strategy == "DDP":
        return
    training, spreads = command.training, around.strategy in ("FSDP2", "ZeRO-3")
    refused = {
        "precompute_ref_log_probs": training.precompute_ref_log_probs,
        "fp16": spreads and command.precision == "float16",
        "sample_every_steps": spreads and training.sample_every_steps > 0,
        "load_in_4bit": spreads and command.model.load_in_4bit,
    }
    named = [f"`{name}`" for name, is_set in refused.items() if is_set]
    if named:
        raise ConfigurationError(
            f"Training refuses {' and '.join(named)} under {around.strategy}: leave it out, or estimate for another "
            "`--strategy`."
        )


def _steps(training: Any, pairs: int | None, per_step: int) -> int:
    if training.max_steps > 0:
        return training.max_steps
    if pairs is None:
        raise ConfigurationError(
            "How long the run is follows from `--max_steps`, or from `--num_train_epochs` and the number of pairs. "
            "Give the first among the training options, or `--num_pairs` before the method."
        )
    return max(math.ceil(training.num_train_epochs * pairs / per_step), 1)


def _checkpoints(training: Any, steps: int) -> int:
    """At a time at most: a new one is whole before an old one goes."""
    strategy = getattr(training.save_strategy, "value", training.save_strategy)
    if strategy == "no":
        return 0
    every = training.save_steps if training.save_steps >= 1 else max(training.save_steps * steps, 1)
    written = max(math.ceil(steps / every), 1) if strategy == "steps" else math.ceil(training.num_train_epochs)
    limit = training.save_total_limit
    return written if not limit or limit < 1 else min(written, limit + 1)


def _grids(training: Any, steps: int) -> int:
    every = training.sample_every_steps
    return steps // every if every and training.sample_prompts else 0


def _optimizer(name: str) -> str:
    """A key of `trl_sipo.cost.memory.ADAM_BYTES`."""
    return "8 bits" if "8bit" in name else "none" if name.startswith(("adafactor", "sgd")) else "32 bits"
