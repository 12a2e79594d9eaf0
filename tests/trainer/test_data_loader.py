# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to the device: loaded ahead, in pinned memory, all of their parts."""

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from tests.trainer.runs import DPO, SIPO, collate_first, logged, make_config, make_trainer, preference_pairs
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.trainer.engine import settle_arguments

META = torch.device("meta")


def _cached_items(count=2):
    return [
        {
            "prompt": "a cat",
            "pair_index": index,
            "chosen_latents": torch.zeros(4, 8, 8),
            "rejected_latents": torch.zeros(4, 8, 8),
            "chosen_std": torch.ones(4, 8, 8),
            "rejected_std": torch.ones(4, 8, 8),
            "conditioning": {"prompt_embeds": torch.zeros(3 + index, 16), "prompt_embeds_mask": torch.ones(3 + index)},
            "label": 1.0,
        }
        for index in range(count)
    ]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for part in parts for tensor in _tensors(part)]


def test_every_tensor_of_a_batch_is_pinned(monkeypatch):
    """Those of the conditioning too, a list of one dict per pair."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    batch = DataCollatorForDiffusionPreference()(_cached_items())
    result = pin_memory(batch)
    assert len(pinned) == len(_tensors(batch)) == 10
    assert result["prompt"] == batch["prompt"] and result["pair_numbers"] == [0, 1]
    assert [sorted(row) for row in result["conditioning"]] == [["prompt_embeds", "prompt_embeds_mask"]] * 2


def test_every_tensor_of_a_batch_is_sent(tmp_path):
    """By accelerate's loader, which takes the batch that was pinned."""
    trainer = make_trainer(DPO, tmp_path)
    collator = trainer.data_collator
    trainer.data_collator = lambda items: collator(_cached_items(len(items)))
    loader = trainer.get_train_dataloader()
    loader.device = META
    batch = next(iter(loader))
    assert {tensor.device for tensor in _tensors(batch)} == {META}
    assert len(_tensors(batch["conditioning"])) == 8 and batch["pair_numbers"] == [0, 1, 2, 3]


@pytest.mark.parametrize("is_pinned", [True, False])
def test_batches_are_sent_ahead_where_memory_is_pinned(is_pinned, tmp_path):
    config = make_config(DPO, tmp_path)
    config.dataloader_pin_memory = is_pinned
    settle_arguments(config)
    assert config.accelerator_config.non_blocking is is_pinned


def test_nothing_is_pinned_without_a_device(tmp_path):
    trainer = make_trainer(DPO, tmp_path, dataloader_pin_memory=True)
    assert trainer.args.dataloader_pin_memory is False
    assert trainer.get_train_dataloader()._non_blocking is False


def test_workers_that_stay_and_load_ahead_give_the_same_run(tmp_path):
    """Over several epochs, each with noise, crops and flips of its own."""
    ahead = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    options = {"pairs": preference_pairs(8, width=64), "center_crop": False, "random_flip": True, "max_steps": 6}
    runs = [make_trainer(SIPO, tmp_path, **options, **more) for more in ({}, ahead)]
    for trainer in runs:
        trainer.train()
    plain, loaded = runs
    loader = loaded.get_train_dataloader()
    assert loader.prefetch_factor == 3 and loader.persistent_workers and loader.num_workers == 2
    assert logged(loaded, "loss") == logged(plain, "loss")


@pytest.mark.gpu
def test_a_batch_on_a_gpu_was_pinned(tmp_path):
    trainer = make_trainer(DPO, tmp_path, use_cpu=False)
    loader = trainer.get_train_dataloader()
    assert loader._non_blocking and loader.pin_memory
    batch = next(iter(loader))
    reference = collate_first(trainer, 4)
    assert {tensor.device.type for tensor in _tensors(batch)} == {"cuda"}
    assert sorted(batch) == sorted(reference)
