# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo dpo | sipo | poly-dpo | kto | mapo | d3po | sft --config file.yaml [--overrides]`.

Also a script for Accelerate: `accelerate launch -m trl_sipo.scripts.train sipo --config file.yaml`.
"""

import os
import shlex
import sys
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import (
    EXPECTED_ERRORS,
    ConfigurationError,
    Preempted,
)
from trl_sipo.printing import ArgumentParser, printable, words_without_secrets
from trl_sipo.trainer.checkpoint_files import checkpoint_to_resume
from trl_sipo.trainer.methods import METHODS, method_classes
from trl_sipo.yaml_files import read_yaml

if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class DataArguments:
    """Which pairs, or single images, to train on.

    Args:
        dataset_name: Hub id, or a local path: a folder of Parquet or JSONL, a saved dataset, `chosen/` and
            `rejected/`.
        dataset_config: Configuration name on the hub.
        dataset_train_split: Split to train on.
        dataset_test_split: Split to evaluate on, when `eval_strategy` is set.
        dataset_streaming: Read the data as a stream.
        dataset_format: What the columns are, where they do not tell: a key of `trl_sipo.data.readers.READERS` or
            `trl_sipo.data.formats.FORMATS`.
        dataset_media_folder: What relative paths of images and videos are relative to; the folder of their table if
            not given.
        min_confidence: Leave pairs out whose label gives neither side at least this share of the votes.
        skip_rows: A JSON Lines file, such as `trl-sipo data check` writes, of rows of the training split to leave out.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or local path of the preference pairs."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read the data as a stream."})
    dataset_format: str | None = field(default=None, metadata={"help": "Layout of the data; recognised if not given."})
    dataset_media_folder: str | None = field(
        default=None, metadata={"help": "Folder to which paths of images and videos are relative; else their table's."}
    )
    min_confidence: float | None = field(
        default=None, metadata={"help": "Leave out pairs whose label gives neither side this share of the votes."}
    )
    skip_rows: str | None = field(
        default=None, metadata={"help": "File of bad rows of the training split to leave out (trl-sipo data check)."}
    )


@dataclass
class ModelArguments:
    """Which model to train, and how much of it. Names are those of TRL's `ModelConfig`.

    Args:
        model_name_or_path: Hub id or local path of a diffusers pipeline.
        model_revision: Branch, tag or commit on the hub.
        dtype: Precision of the frozen weights: `float32`, `bfloat16` or `float16`.
        variant: Variant of the weight files, such as `fp16`.
        use_peft: Train a LoRA; otherwise all weights of the denoiser.
        lora_r: Rank.
        lora_alpha: Scale; the LoRA's output is multiplied by alpha / rank.
        lora_dropout: Dropout; needs `--disable_dropout false`.
        lora_target_modules: Modules to adapt, by the ends of their names; or one regular expression for whole names,
            or `all-linear`. The backbone's conventional ones if not given.
        use_rslora: Scale by alpha / sqrt(rank).
        use_dora: Weight-decomposed LoRA.
        load_in_4bit: Keep the frozen weights of the denoiser in 4 bits (QLoRA).
        bnb_4bit_quant_type: `nf4` or `fp4`.
        use_bnb_nested_quant: Quantize the scales of the 4-bit weights too.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or local path of a pipeline."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the frozen weights; that of bf16/fp16 if not given.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    variant: str | None = field(default=None, metadata={"help": "Variant of the weight files, such as fp16."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA; otherwise all weights of the denoiser."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=8, metadata={"help": "Scale of the LoRA: alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; the backbone's conventional ones if not given."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale the LoRA by alpha / sqrt(rank)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the denoiser's frozen weights in 4 bits (QLoRA; needs bitsandbytes)."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Data type of the 4 bits.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantize the scales of the 4-bit weights too."}
    )


def make_parser(method: str, prog: str | None = None) -> "TrlParser":
    """TRL's parser over data, training and model arguments of `method`, a key of `METHODS`."""
    from trl import TrlParser

    class Parser(ArgumentParser, TrlParser):
        """TRL's, whose errors show no tokens."""

    # Without abbreviations: a mistyped option must not be taken for a longer one.
    arguments = (DataArguments, method_classes(method)[0], ModelArguments)
    return Parser(arguments, prog=prog or f"trl-sipo {method}", allow_abbrev=False)


def parse(
    method: str, argv: list[str], defaults: dict[str, Any] | None = None
) -> tuple[DataArguments, Any, ModelArguments]:
    """Arguments from a YAML file (`--config`) and the command line, which wins. Unknown keys are errors.

    Args:
        defaults: Settings where neither says anything.
    """
    data_args, training_args, model_args = parse_with(make_parser(method), argv, defaults)
    check_name("dataset_name", data_args.dataset_name, "preference pairs")
    check_name("model_name_or_path", model_args.model_name_or_path, "a diffusers pipeline")
    check_trained_part(model_args)
    _check_quantization_package(model_args)
    check_trackers(training_args.report_to)
    return data_args, training_args, model_args


def check_name(name: str, value: Any, what: str) -> None:
    """Raise [`ConfigurationError`] unless a hub id or path is given, as text."""
    if not value:
        raise ConfigurationError(f"`{name}` is required: a hub id or a local path of {what}.")
    if not isinstance(value, str):  # as YAML reads 1984
        raise ConfigurationError(f"`{name}` must be a text, got {value!r:.80}: put it in quotation marks.")


def parse_with(parser: "TrlParser", argv: list[str], defaults: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """What a parser makes of a YAML file and the command line, one object per class of arguments.

    Raises:
        ConfigurationError: A file that cannot be read, an unknown key, or a value that is none.
    """
    parser.set_defaults(**(defaults or {}))
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in argv:
        path = next(iter(argv[argv.index("--config") + 1 :]), None)
        if path is None:
            raise ConfigurationError("`--config` needs the path of a YAML file.")
        read_yaml(path)
    try:
        return parser.parse_args_and_config(argv, fail_with_unknown_args=True)
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, ConfigurationError) else ConfigurationError(str(error)) from error


def check_trained_part(model_args: ModelArguments) -> None:
    """Raise [`ConfigurationError`] when what is said of a LoRA, and of weights in four bits, makes no sense."""
    _check_lora_arguments(model_args)
    _check_quantization(model_args)


def _check_lora_arguments(model_args: ModelArguments) -> None:
    if model_args.use_peft:
        for name in ("lora_r", "lora_alpha"):
            if getattr(model_args, name) < 1:
                raise ConfigurationError(f"`{name}` must be at least 1, got {getattr(model_args, name)}.")
        if not 0.0 <= model_args.lora_dropout < 1.0:
            raise ConfigurationError(
                f"`lora_dropout` is a probability and must lie in [0, 1), got {model_args.lora_dropout}."
            )
        return
    for setting in fields(ModelArguments):
        if "lora" in setting.name or setting.name == "use_dora":
            value = getattr(model_args, setting.name)
            if value != setting.default:
                raise ConfigurationError(
                    f"`{setting.name}={value!r}` without `use_peft`: all weights would be trained. Set `use_peft` to "
                    f"true to train a LoRA, or remove `{setting.name}`."
                )


def _check_quantization(model_args: ModelArguments) -> None:
    if not model_args.load_in_4bit:
        for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
            value = getattr(model_args, name)
            if value != getattr(ModelArguments, name):
                raise ConfigurationError(
                    f"`{name}={value!r}` without `load_in_4bit` has no effect. Set it, or remove it."
                )
        return
    if not model_args.use_peft:
        raise ConfigurationError(
            "`load_in_4bit` without `use_peft`: weights of 4 bits cannot be trained. Set `use_peft` to true to train "
            "a LoRA on them, or remove `load_in_4bit`."
        )


def _check_quantization_package(model_args: ModelArguments) -> None:
    if model_args.load_in_4bit and find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            'The package bitsandbytes is missing, which `load_in_4bit` needs: pip install "trl-sipo[quantization]".'
        )


def check_trackers(names: list[str]) -> None:
    """Before data and weights are read: transformers looks for a tracker's package only when training starts."""
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    # transformers does not say of these two whether they are there.
    installed = {*get_available_reporting_integrations(), "azure_ml", "flyte"}
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigurationError(f"Unknown tracker {name!r} in `report_to`; known are {known}, and none.")
        if name not in installed:
            raise ConfigurationError(
                f"`report_to` names {name!r}, whose package is not installed: install it (`pip install {name}`), or "
                "set `report_to` to none."
            )


def lora_config(model_args: ModelArguments):
    """The `LoraConfig` of the arguments, or `None` for full fine-tuning."""
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=_target_modules(model_args.lora_target_modules),
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        init_lora_weights="gaussian",
    )


def _target_modules(names: list[str] | str | None) -> list[str] | str | None:
    """PEFT takes a string for a regular expression over whole names, or for `all-linear`."""
    names = [names] if isinstance(names, str) else names  # one name in a YAML file
    if names is not None and len(names) == 1 and (names[0] == "all-linear" or set(names[0]) & set("*|+?()[]^$\\")):
        return names[0]
    return names


def quantization_config(training_args: Any, model_args: ModelArguments):
    """diffusers' configuration of a denoiser in 4 bits (Dettmers et al., 2023), or `None`."""
    if not model_args.load_in_4bit:
        return None
    import torch
    from diffusers import PipelineQuantizationConfig

    from trl_sipo.adapters import denoiser_names

    half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
    options = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": model_args.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": model_args.use_bnb_nested_quant,
        "bnb_4bit_compute_dtype": half or torch.float32,
    }
    return PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs=options,
        components_to_quantize=denoiser_names(model_args.model_name_or_path, revision=model_args.model_revision),
    )


def loading_options(training_args: Any, model_args: ModelArguments) -> dict[str, Any]:
    """`model_init_kwargs` of the arguments."""
    options = dict(training_args.model_init_kwargs or {})
    if model_args.model_revision is not None:
        options["revision"] = model_args.model_revision
    if model_args.variant is not None:
        options["variant"] = model_args.variant
    if model_args.dtype is not None:
        options["dtype"] = model_args.dtype
    return options


def main(method: str, data_args: DataArguments, training_args: Any, model_args: ModelArguments) -> None:
    """Load the pairs, train, save, and push when asked to."""
    from trl_sipo.data.loading import load_preference_dataset
    from trl_sipo.trainer.processes import from_main

    # First of all: a mistake in it must not show after an hour of loading.
    checkpoint = from_main(
        lambda: checkpoint_to_resume(training_args.output_dir, training_args.resume_from_checkpoint)
    )
    splits = {"train": data_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        splits["test"] = data_args.dataset_test_split
    datasets = {
        name: load_preference_dataset(
            data_args.dataset_name,
            name=data_args.dataset_config,
            split=split,
            streaming=data_args.dataset_streaming,
            format=data_args.dataset_format,
            media_folder=data_args.dataset_media_folder,
            min_confidence=data_args.min_confidence,
            skip_rows=data_args.skip_rows if name == "train" else None,
        )
        for name, split in splits.items()
    }
    training_args.model_init_kwargs = loading_options(training_args, model_args)
    # A card names data by its hub id; the path of a folder says nothing to others.
    dataset_name = None if os.path.exists(data_args.dataset_name) else data_args.dataset_name
    trainer = method_classes(method)[1](
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("test"),
        peft_config=lora_config(model_args),
        quantization_config=quantization_config(training_args, model_args),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    trainer.end()


def run(
    command: str, argv: list[str], defaults: dict[str, Any] | None = None, program: list[str] | None = None
) -> None:
    """Entry point of the training commands.

    Args:
        command: A key of `METHODS`.
        argv: Its options.
        defaults: Settings where neither these nor a file say anything.
        program: The script and what was given to it before `argv`; by default it is the command `trl-sipo`.
    """
    arguments = parse(command, argv, defaults)
    try:
        main(command, *arguments)
    except Preempted as stop:
        if arguments[1].process_index == 0:
            python = "python " if arguments[1].world_size == 1 else "accelerate launch <its options> "
            launcher = "" if program is None else python
            words = continuing_command([*(program or ["trl-sipo", command]), *argv], launcher)
            print(f"{command}: {stop} The command that continues:\n{words}", file=sys.stderr)
        raise


def continuing_command(words: list[str], launcher: str = "") -> str:
    """The same command with `--resume_from_checkpoint true`, as it is typed, but for its tokens: logs are kept."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--resume_from_checkpoint":
            next(rest, None)  # its value
        elif not word.startswith("--resume_from_checkpoint="):
            kept.append(word)
    return launcher + shlex.join(words_without_secrets([*kept, "--resume_from_checkpoint", "true"]))


def run_as_script(method: str, argv: list[str], defaults: dict[str, Any] | None = None) -> None:
    """Train with settings of a script's own, which the command line overrides.

    A mistake of the user ends the process with one line and status 2.
    """
    program = sys.argv[: len(sys.argv) - len(argv)]
    try:
        run(method, argv, defaults, program)
    except EXPECTED_ERRORS as error:
        from trl_sipo.trainer.process_group import end_process

        print(f"{method}: {printable(error)}", file=sys.stderr)
        end_process(2)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in METHODS:
        sys.exit(f"usage: python -m trl_sipo.scripts.train {{{','.join(METHODS)}}} --config file.yaml [--overrides]")
    run_as_script(sys.argv[1], sys.argv[2:])
