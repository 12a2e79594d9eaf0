# SPDX-License-Identifier: Apache-2.0
"""Copies that are queued, from pinned memory, and only towards a device."""

import pytest
import torch

from trl_sipo.core import transfer
from trl_sipo.core.noise_schedule import FlowSchedule
from trl_sipo.core.transfer import to_device


@pytest.fixture
def copies(monkeypatch):
    """What is pinned, and how it is sent to the meta device, which stands for a GPU."""
    seen, to = [], torch.Tensor.to

    def spied_to(tensor, *args, **kwargs):
        seen.append(kwargs.get("non_blocking", False))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(transfer, "QUEUEING_DEVICES", ("meta",))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", spied_to)
    return seen


def test_a_copy_to_a_gpu_is_queued_from_pinned_memory(copies):
    assert to_device(torch.ones(2), "meta").device.type == "meta"
    assert copies == ["pinned", True]


@pytest.mark.parametrize(("source", "target"), [("cpu", "cpu"), ("meta", "meta")])
def test_where_nothing_crosses_nothing_is_pinned(copies, source, target):
    tensor = torch.ones(2, device=source)
    assert to_device(tensor, target) is tensor
    assert copies == [False]


def test_a_copy_back_waits(copies):
    """The host would read what has not arrived. (A tensor on the meta device has nothing to copy.)"""
    with pytest.raises(NotImplementedError, match="meta"):
        to_device(torch.ones(2, device="meta"), "cpu")
    assert copies == [False]


def test_a_noise_level_is_sent_so(copies):
    level = FlowSchedule().level(torch.tensor([0.1, 0.7]))
    copies.clear()
    assert {part.device.type for part in vars(level.to("meta")).values()} == {"meta"}
    assert copies.count("pinned") == 3 and copies.count(True) == 3


@pytest.mark.gpu
def test_a_queued_copy_arrives():
    values = torch.arange(1 << 20)
    copy = to_device(values, "cuda")
    values = values.clone()
    assert torch.equal(copy.cpu(), values)
