# SPDX-License-Identifier: Apache-2.0
"""Preference pairs from the shipped model and from photographs."""

import datasets
import pytest
import torch

from trl_sipo.demo.fashion import split_prompts
from trl_sipo.demo.model import build_pipeline
from trl_sipo.demo.pairs import FEATURES, off_policy_pairs, on_policy_pairs, to_png
from trl_sipo.demo.sampling import prompt_ids
from trl_sipo.demo.verifier import load_verifiers
from trl_sipo.errors import ConfigurationError


@pytest.fixture(scope="module")
def primary():
    return load_verifiers()[0]


def pixels_of(column) -> torch.Tensor:
    images = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3) for image in column]
    return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def log_probs(verifier, pairs: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor(pairs["class_id"]), torch.tensor(pairs["colour_id"])
    return tuple(verifier.scores(pixels_of(pairs[arm]), *ids)["log_prob"] for arm in ("chosen", "rejected"))


def test_png_keeps_eight_bits():
    levels = torch.arange(256, dtype=torch.float32).repeat(12).view(3, 32, 32)
    row = datasets.Dataset.from_dict(
        {"image": [to_png(levels / 127.5 - 1)]}, features=datasets.Features(image=datasets.Image())
    )
    assert torch.equal(pixels_of(row["image"])[0], levels / 127.5 - 1)


def test_on_policy_pairs_are_ranked_by_the_verifier_and_repeatable(primary, tmp_path):
    pipeline, prompts = build_pipeline(0), split_prompts()[0][:3]
    options = {"groups_per_prompt": 3, "samples_per_group": 3, "num_inference_steps": 2, "min_gap": 0.0, "seed": 1}
    pairs = on_policy_pairs(pipeline, primary, prompts, **options)
    assert pairs.features == FEATURES
    assert len(pairs) == 9
    assert pairs["prompt"] == [prompt.text for prompt in prompts for _ in range(3)]
    assert set(pairs["source"]) == {"on_policy"}
    chosen, rejected = log_probs(primary, pairs)
    assert (chosen > rejected).all()
    again = on_policy_pairs(pipeline, primary, prompts, **options)
    assert torch.equal(pixels_of(pairs["chosen"]), pixels_of(again["chosen"]))
    pairs.to_parquet(tmp_path / "pairs.parquet")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path))
    assert torch.equal(pixels_of(pairs["rejected"]), pixels_of(loaded["rejected"]))


def test_near_ties_are_dropped(primary):
    pipeline, prompts = build_pipeline(0), split_prompts()[0][:2]
    options = {"groups_per_prompt": 4, "samples_per_group": 2, "num_inference_steps": 2, "seed": 1}
    gaps = torch.sub(*log_probs(primary, on_policy_pairs(pipeline, primary, prompts, min_gap=0.0, **options)))
    threshold = gaps.median().item() + 1e-4
    kept = on_policy_pairs(pipeline, primary, prompts, min_gap=threshold, **options)
    assert 0 < len(kept) < len(gaps)
    assert torch.sub(*log_probs(primary, kept)).min() > threshold - 0.02


def test_a_pair_needs_two_samples(primary):
    with pytest.raises(ConfigurationError, match="samples_per_group=1"):
        on_policy_pairs(
            build_pipeline(0), primary, split_prompts()[0], groups_per_prompt=1, samples_per_group=1, seed=0
        )


def test_off_policy_pairs_show_the_prompt_against_something_else(primary):
    prompts = split_prompts()[0]
    pairs = off_policy_pairs(primary, prompts, pairs_per_prompt=4, seed=0)
    assert pairs.features == FEATURES
    assert set(pairs["source"]) == {"off_policy"}
    assert set(pairs["prompt"]) == {prompt.text for prompt in prompts}
    assert len(pairs) > 0.8 * 4 * len(prompts)
    ids = torch.tensor(pairs["class_id"]), torch.tensor(pairs["colour_id"])
    assert primary.scores(pixels_of(pairs["chosen"]), *ids)["both_correct"].float().mean() > 0.98
    assert primary.scores(pixels_of(pairs["rejected"]), *ids)["both_correct"].float().mean() < 0.02
    again = off_policy_pairs(primary, prompts, pairs_per_prompt=4, seed=0)
    assert torch.equal(pixels_of(pairs["chosen"]), pixels_of(again["chosen"]))


def test_prompt_ids_follow_the_prompts():
    prompts = split_prompts()[1]
    class_ids, colour_ids = prompt_ids(prompts)
    assert class_ids.tolist() == [p.class_id for p in prompts]
    assert colour_ids.tolist() == [p.colour_id for p in prompts]
