# SPDX-License-Identifier: Apache-2.0
"""The device that an option names."""

import pytest
import torch

from trl_sipo.errors import ConfigurationError
from trl_sipo.generation.processes import chosen_device, process_state


def test_a_device_that_is_there():
    assert chosen_device("cpu") == torch.device("cpu")
    assert chosen_device() == process_state().device


@pytest.mark.parametrize("name", ["cuda:77", "gpu", "cpu:x", ""])
def test_one_that_is_not_is_named_with_those_that_are(name):
    with pytest.raises(ConfigurationError, match=f"`--device {name}` cannot be used: .* This machine has cpu"):
        chosen_device(name)
