# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.data.pictures import canonical
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.data.preference_dataset import PreferenceDataset
from trl_sipo.data.transforms import PairedTransform
from trl_sipo.errors import DatasetError

collate = DataCollatorForDiffusionPreference()


def latents(index: int, *shape: int) -> dict:
    return {
        "prompt": f"p{index}",
        "chosen_latents": torch.full(shape, float(index)),
        "rejected_latents": torch.full(shape, -float(index)),
        "pair_index": index,
    }


def test_pixels():
    dataset = PreferenceDataset(canonical(3), transform=PairedTransform(8))
    batch = collate([dataset[2], dataset[0]])
    assert batch.keys() == {"prompt", "chosen_pixels", "rejected_pixels", "pair_index", "pair_numbers"}
    assert batch["prompt"] == ["prompt 2", "prompt 0"]
    assert batch["chosen_pixels"].shape == batch["rejected_pixels"].shape == (2, 3, 8, 8)
    assert batch["chosen_pixels"].dtype == torch.float32
    assert torch.equal(batch["rejected_pixels"][1], dataset[0]["rejected_pixels"])
    assert batch["pair_index"].dtype == torch.int64
    assert batch["pair_index"].tolist() == batch["pair_numbers"] == [2, 0]


def test_latents_and_large_indices():
    batch = collate([latents(2**62, 4, 2, 2), latents(1, 4, 2, 2)])
    assert batch["chosen_latents"].shape == (2, 4, 2, 2)
    assert batch["pair_index"].tolist() == [2**62, 1]


def test_shapes_that_differ_are_named():
    with pytest.raises(DatasetError, match=r"chosen_latents.*\{1: \(4, 2, 2\), 2: \(4, 2, 3\)\}"):
        collate([latents(1, 4, 2, 2), latents(2, 4, 2, 3)])


def test_pixels_and_latents_do_not_mix():
    pixels = PreferenceDataset(canonical(1), transform=PairedTransform(8))[0]
    with pytest.raises(DatasetError, match="a batch mixes pairs"):
        collate([pixels, latents(1, 4, 2, 2)])
