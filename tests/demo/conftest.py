# SPDX-License-Identifier: Apache-2.0
"""What several tests of the demo share."""

import pytest
import torch

from trl_sipo.demo import pretrain, verifier_training
from trl_sipo.demo.fashion import FashionSplit, load_split


@pytest.fixture
def few_photographs(monkeypatch):
    """Ten photographs per class instead of hundreds: the stages are the same, the wait is not."""

    def load_few(name: str) -> FashionSplit:
        split = load_split(name)
        chosen = torch.arange(0, len(split), len(split) // 80)
        return FashionSplit(split.images[chosen], split.class_ids[chosen])

    monkeypatch.setattr(pretrain, "load_split", load_few)
    monkeypatch.setattr(verifier_training, "load_split", load_few)
