# SPDX-License-Identifier: Apache-2.0
"""The configurations for Accelerate are ones that it takes, and ask for what their names say."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "accelerate_configs"
TYPES = {
    "single_gpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def launched(name):
    """The arguments with which `accelerate launch` would start."""
    arguments = ["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def test_all_configurations_are_tested():
    assert {file.stem for file in CONFIGS.iterdir()} == TYPES.keys()


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_takes_the_configuration(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == TYPES[name] and config.mixed_precision == "bf16"
    assert launched(name).num_processes == config.num_processes


@pytest.mark.parametrize("name", TYPES)
def test_every_configuration_says_when_to_use_it_and_how(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert "When:" in text and f"--config_file examples/accelerate_configs/{name}.yaml" in text


def test_fsdp_is_version_2_saves_whole_weights_and_loads_them_everywhere():
    environment = prepare_multi_gpu_env(launched("fsdp2"))
    expected = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    assert {name: environment[name] for name in expected} == expected


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_has_the_stage_of_its_name_and_cuts_nothing_but_the_model(name, stage):
    arguments = launched(name)
    assert arguments.use_deepspeed and arguments.zero_stage == stage
    assert str(arguments.zero3_init_flag).lower() == "false"
