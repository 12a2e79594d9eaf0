# SPDX-License-Identifier: Apache-2.0
"""What `test_strategy.py` runs in every process of a group."""

import os
import sys
from pathlib import Path

import pytest

from tests.trainer.runs import DPO, make_trainer
from trl_sipo.errors import ConfigurationError


def train_in_one_process(output: Path) -> None:
    """As under `torchrun --nproc_per_node 1`."""
    trainer = make_trainer(DPO, output, max_steps=1)
    trainer.train()
    assert "one process on cpu" in trainer.describe_run()


def train_copies_that_never_meet(output: Path) -> None:
    """As under torchrun on a machine without a GPU, where nothing says that CPUs are meant."""
    del os.environ["ACCELERATE_USE_CPU"]
    with pytest.raises(ConfigurationError, match="2 copies of the run would train without meeting"):
        make_trainer(DPO, output, use_cpu=False)


def ask_for_fsdp_on_cpus(output: Path) -> None:
    """Which Accelerate replaces by DDP."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    with pytest.raises(ConfigurationError, match="FSDP was asked for, but DDP on 2 processes"):
        make_trainer(DPO, output)


if __name__ == "__main__":  # under a launcher
    make_trainer(DPO, sys.argv[1])
