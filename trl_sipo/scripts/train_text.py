# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo sipo-text --config file.yaml [--overrides]`: SIPO for language models.

The options are those of TRL's own script for DPO, and those of `SIPOConfig`. Also a script for Accelerate:
`accelerate launch -m trl_sipo.scripts.train_text --config file.yaml`.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from trl_sipo.errors import EXPECTED_ERRORS, ConfigurationError, DatasetError
from trl_sipo.scripts.train import check_trackers, parse_with
from trl_sipo.trainer.checkpoint_files import checkpoint_to_resume

if TYPE_CHECKING:
    from trl import TrlParser


def make_parser(prog: str | None = None) -> "TrlParser":
    """TRL's parser over its data and model arguments and our configuration."""
    from trl import ModelConfig, ScriptArguments, TrlParser

    from trl_sipo import SIPOConfig

    return TrlParser((ScriptArguments, SIPOConfig, ModelConfig), prog=prog or "trl-sipo sipo-text", allow_abbrev=False)


def parse(argv: list[str]) -> tuple[Any, Any, Any]:
    """Arguments from a YAML file (`--config`) and the command line, which wins. Unknown keys are errors."""
    data_args, training_args, model_args = parse_with(make_parser(), argv)
    if not data_args.dataset_name:
        raise ConfigurationError("`dataset_name` is required: a hub id or a local folder of text preferences.")
    if not model_args.model_name_or_path:
        raise ConfigurationError("`model_name_or_path` is required: a hub id or a local path of a language model.")
    check_trackers(training_args.report_to)
    return data_args, training_args, model_args


def load_splits(data_args: Any, *, evaluates: bool) -> dict[str, Any]:
    """The training split, and the test split where it is evaluated on, as `datasets` loads them.

    Raises:
        DatasetError: There is no such data, or it cannot be read.
    """
    from datasets import load_dataset

    names = [data_args.dataset_train_split, *([data_args.dataset_test_split] if evaluates else [])]
    options = {"name": data_args.dataset_config, "streaming": data_args.dataset_streaming}
    try:
        return {name: load_dataset(data_args.dataset_name, split=name, **options) for name in names}
    except (OSError, ValueError) as error:
        raise DatasetError(f"The data {data_args.dataset_name!r} cannot be loaded: {error}") from error


def model_options(training_args: Any, model_args: Any) -> dict[str, Any]:
    """`model_init_kwargs` of the arguments.

    Raises:
        ConfigurationError: There is no such model.
    """
    from transformers import AutoConfig

    hub = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    try:
        AutoConfig.from_pretrained(model_args.model_name_or_path, **hub)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The model {model_args.model_name_or_path!r} cannot be loaded: {error}") from error
    loading = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    return {**hub, **loading, **(training_args.model_init_kwargs or {})}


def main(data_args: Any, training_args: Any, model_args: Any) -> None:
    """Load the pairs, train, save, and push when asked to."""
    from trl import get_peft_config, get_quantization_config

    from trl_sipo import SIPOTrainer
    from trl_sipo.trainer.processes import from_main

    # First of all: a mistake in it must not show after an hour of loading.
    checkpoint = from_main(
        lambda: checkpoint_to_resume(training_args.output_dir, training_args.resume_from_checkpoint)
    )
    training_args.model_init_kwargs = model_options(training_args, model_args)
    splits = load_splits(data_args, evaluates=training_args.eval_strategy != "no")
    trainer = SIPOTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=splits[data_args.dataset_train_split],
        eval_dataset=splits.get(data_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    # A card names data by its hub id; the path of a folder says nothing to others.
    dataset_name = None if os.path.exists(data_args.dataset_name) else data_args.dataset_name
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    trainer.end()


def run(command: str, argv: list[str]) -> None:
    """Entry point of the command."""
    main(*parse(argv))


if __name__ == "__main__":
    try:
        run("sipo-text", sys.argv[1:])
    except EXPECTED_ERRORS as error:
        print(f"sipo-text: {error}", file=sys.stderr)
        sys.exit(2)
