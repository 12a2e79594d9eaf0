# SPDX-License-Identifier: Apache-2.0
"""Pairs to a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_sipo.errors import DatasetError

_TENSOR_KEYS = (
    "chosen_pixels", "rejected_pixels", "chosen_latents", "rejected_latents", "chosen_std", "rejected_std",
)  # fmt: skip
_KEYS = (*_TENSOR_KEYS, "frame_rate", "label")
BATCH_KEYS = ("prompt", *_KEYS, "conditioning", "pair_index", "pair_numbers")
"""What a batch may hold."""


@dataclass(frozen=True)
class DataCollatorForDiffusionPreference:
    """Stack the items of a `PreferenceDataset`.

    `[{"prompt", "chosen_pixels", "rejected_pixels", "pair_index"}, ...]` becomes `{"prompt": list[str],
    "chosen_pixels": (B, 3, H, W), "rejected_pixels": (B, 3, H, W), "pair_index": int64 (B,), "pair_numbers": the same
    as a list}`, and likewise for `chosen_latents`, `rejected_latents`: (B, *latent_shape), float32. Of videos, the
    pixels are (B, 3, F, H, W), and there is `frame_rate`: float32 (B,). With soft labels, there is `label`: float32
    (B,).
    Of a cache, there is `conditioning` too, a list of one dict of tensors per pair, and where it holds the VAE's
    posterior `chosen_std`, `rejected_std`.

    Raises:
        DatasetError: the items do not have the same keys, or their tensors not the same shape.
    """

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        present = [key for key in _KEYS if key in items[0]]
        for item in items:
            if [key for key in _KEYS if key in item] != present:
                raise DatasetError(f"a batch mixes pairs that hold {present} with one that holds {sorted(item)}")
        batch: dict[str, Any] = {"prompt": [item["prompt"] for item in items]}
        for key in present:
            if key in _TENSOR_KEYS:
                batch[key] = _stack(key, items)
            else:
                batch[key] = torch.tensor([item[key] for item in items], dtype=torch.float32)
        if "conditioning" in items[0]:
            batch["conditioning"] = [item["conditioning"] for item in items]
        # Twice: the tensor goes to the device with the others, and the seeds of the pairs are made of the numbers.
        batch["pair_numbers"] = [int(item["pair_index"]) for item in items]
        batch["pair_index"] = torch.tensor(batch["pair_numbers"], dtype=torch.int64)
        return batch


def _stack(key: str, items: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    shapes = {int(item["pair_index"]): tuple(item[key].shape) for item in items}
    if len(set(shapes.values())) > 1:
        raise DatasetError(f"{key} of one batch have different shapes, by pair index: {shapes}")
    return torch.stack([item[key] for item in items])
