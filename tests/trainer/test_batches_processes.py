# SPDX-License-Identifier: Apache-2.0
"""How the pairs of an epoch become the batches of several processes."""

import pytest
import torch

from tests.trainer import batches_run
from tests.trainer.processes import run_ranks
from tests.trainer.runs import SIPO, largest_difference, make_trainer


def test_without_incomplete_batches_two_processes_are_one(tmp_path):
    """What does not fill a batch is left out in both; else accelerate fills it up, and one process does not."""
    batches_run.train_on_ten_pairs(tmp_path, 8)
    run_ranks(batches_run.train_on_ten_pairs, tmp_path, 4, directory=tmp_path)
    one, two = (torch.load(tmp_path / f"result-{number}.pt", weights_only=False) for number in (1, 2))
    assert one["epoch"] == two["epoch"] == 3
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_batches_that_processes_cannot_share_are_refused(tmp_path):
    run_ranks(batches_run.refuse, tmp_path, directory=tmp_path, timeout=60)


@pytest.mark.parametrize("setting", [{"split_batches": True}, {"even_batches": False}])
def test_one_process_has_nothing_to_share(setting, tmp_path):
    assert make_trainer(SIPO, tmp_path, accelerator_config=setting).train_dataset
