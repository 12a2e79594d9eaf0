# SPDX-License-Identifier: Apache-2.0
import gc

import pytest
import torch
import transformers

from tests.trainer import runs


@pytest.fixture(scope="session", autouse=True)
def _modules_out_of_the_collectors_way():
    """Each run calls `gc.collect()`, which takes longer than a tiny run while it walks all of torch and TRL."""
    assert runs.METHODS
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_quiet_thread(monkeypatch):
    """One thread, so that sums have one order; no network; no mark of a CI, under which TRL behaves otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)
