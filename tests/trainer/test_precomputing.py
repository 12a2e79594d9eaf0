# SPDX-License-Identifier: Apache-2.0
"""Clips are large: no more of them are in memory at a time than the VAE encodes."""

import pytest
from torch.utils.data import DataLoader

from tests.adapters.backbone_cases import BACKBONES
from tests.trainer.media import pairs_for
from tests.trainer.runs import DPO, make_config
from trl_sipo.adapters import adapter_for
from trl_sipo.trainer import preference_data


@pytest.mark.parametrize(("name", "sizes"), [("wan21", [1, 1, 1]), ("flux", [3])])
def test_batches_are_what_the_vae_takes(name, sizes, tmp_path, monkeypatch):
    case = next(case for case in BACKBONES if case.name.split("-")[0] == name)
    adapter = adapter_for(case.build())
    taken, loaders = [], []
    encode = adapter.encode_media
    monkeypatch.setattr(adapter, "encode_media", lambda pixels: taken.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(
        preference_data,
        "DataLoader",
        lambda *args, **options: loaders.append(DataLoader(*args, **options)) or loaders[-1],
    )
    size = case.size["height"], case.size["width"]
    for workers, ahead in ((0, None), (1, 1)):
        settings = {"num_frames": case.size["num_frames"], "dataloader_num_workers": workers}
        args = make_config(DPO, tmp_path, precompute_latents=True, per_device_eval_batch_size=3, **settings)
        pairs = preference_data.as_tensors(pairs_for(case, tmp_path, count=3), adapter, args, size, "train")
        assert len(pairs) == 3 and taken == [size for size in sizes for _ in ("chosen", "rejected")]
        assert loaders.pop().prefetch_factor == ahead
        taken.clear()
