# SPDX-License-Identifier: Apache-2.0
"""The same run, whatever the batches, the workers or the order of the work; another seed, another run."""

import pytest
import torch

from tests.trainer.runs import (
    DPO,
    METHODS,
    SIPO,
    largest_difference,
    logged,
    make_trainer,
    preference_pairs,
    trained_weights,
)

# Every random part of a pair at once: its noise, its level, its prompt, its latents, its crop and its flip.
RANDOM_PARTS = {
    "caption_dropout": 0.3,
    "sample_posterior": True,
    "random_flip": True,
    "center_crop": False,
    "share_noise": False,
    "timestep_sampling": "logit_normal",
}


def _train(method, tmp_path, **options):
    trainer = make_trainer(method, tmp_path, **options)
    trainer.train()
    return trained_weights(trainer)


def _equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_gradient_accumulation_is_exact(method, is_lora, tmp_path):
    """8 x 1 = 4 x 2 = 1 x 8, with every random part of a pair switched on, over several epochs."""
    weights = [
        _train(
            method,
            tmp_path,
            is_lora=is_lora,
            pairs=preference_pairs(16, width=64),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            max_steps=4,
            optim="sgd",  # Adam divides by the gradient's size, which magnifies its rounding where it vanishes
            learning_rate=1e-2,
            **RANDOM_PARTS,
        )
        for batch in (8, 2, 1)
    ]
    start = trained_weights(make_trainer(method, tmp_path, is_lora=is_lora))
    assert largest_difference(start, weights[0]) > 1e-4
    for other in weights[1:]:
        assert largest_difference(weights[0], other) < 1e-6


def test_gradient_accumulation_with_adam(tmp_path):
    runs = [
        _train(SIPO, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch)
        for batch in (8, 1)
    ]
    assert largest_difference(*runs) < 1e-4


def test_the_last_accumulated_batch_of_an_epoch_is_averaged_over_what_it_has(tmp_path):
    """6 pairs in steps of 4: the second step has two parts, and not a gradient of half the size."""
    options = {"pairs": preference_pairs(6), "max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "beta": 100.0}
    accumulated = _train(DPO, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    at_once = _train(DPO, tmp_path, per_device_train_batch_size=4, **options)
    assert largest_difference(accumulated, at_once) < 1e-6


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_seeds(is_lora, tmp_path):
    first, again, other = (_train(SIPO, tmp_path, is_lora=is_lora, seed=seed, **RANDOM_PARTS) for seed in (1, 1, 2))
    assert _equal(first, again) and largest_difference(first, other) > 1e-6


def test_the_global_random_state_does_not_matter(tmp_path):
    runs = []
    for seed in (1, 2):
        trainer = make_trainer(SIPO, tmp_path, **RANDOM_PARTS)
        torch.manual_seed(seed)
        trainer.train()
        runs.append(trained_weights(trainer))
    assert _equal(*runs)


def test_data_loader_workers_change_nothing(tmp_path):
    pairs = preference_pairs(8, width=64)
    alone, two = (
        _train(SIPO, tmp_path, pairs=pairs, max_steps=4, dataloader_num_workers=workers, **RANDOM_PARTS)
        for workers in (0, 2)
    )
    assert _equal(alone, two)


def _seen(trainer, *names):
    """What the encoder is given in each step."""
    batches = []
    encode = trainer._encoder

    def spy(inputs, *args, **kwargs):
        batches.append({name: inputs[name] for name in names})
        return encode(inputs, *args, **kwargs)

    trainer._encoder = spy
    return batches


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_each_epoch_has_its_own_noise_crops_and_flips(streaming, tmp_path):
    """A pair comes back in the next epoch with other noise and another crop."""
    pairs = preference_pairs(4, width=64)
    trainer = make_trainer(
        DPO,
        tmp_path,
        pairs=pairs.to_iterable_dataset() if streaming else pairs,
        center_crop=False,
        max_steps=6,
        per_device_train_batch_size=2,
    )
    batches = _seen(trainer, "pair_index", "chosen_pixels")
    timesteps = []
    sample = trainer.sample_noise_levels

    def spy(generators):
        level = sample(generators)
        timesteps.append(level.timestep)
        return level

    trainer.sample_noise_levels = spy
    trainer.train()
    index = torch.cat([batch["pair_index"] for batch in batches])
    pixels, times = torch.cat([batch["chosen_pixels"] for batch in batches]), torch.cat(timesteps)
    assert len(index) == 12
    for pair in index.unique():
        where = (index == pair).nonzero().flatten()
        assert len(where) == 3
        assert len(times[where].unique()) == 3
        assert not any(torch.equal(pixels[a], pixels[b]) for a in where for b in where if a < b)


def test_a_stream_trains(tmp_path):
    """Ties are skipped; the stream begins again when it ends."""
    rows = preference_pairs(5).add_column("label", [1.0, 0.5, 0.0, 1.0, 1.0])
    trainer = make_trainer(
        SIPO, tmp_path, pairs=rows.to_iterable_dataset(), per_device_train_batch_size=2, max_steps=5
    )
    before = trained_weights(trainer)
    trainer.train()
    assert len(logged(trainer, "loss")) == 5 and largest_difference(before, trained_weights(trainer)) > 0
    assert trainer.train_dataset.num_ties == 1


def test_a_stream_with_workers_trains(tmp_path):
    pairs = preference_pairs(8).to_iterable_dataset(num_shards=4)
    options = {"dataloader_num_workers": 2, "per_device_train_batch_size": 2}
    three = _train(DPO, tmp_path / "three", pairs=pairs, max_steps=3, **options)
    one = _train(DPO, tmp_path / "one", pairs=pairs, max_steps=1, **options)
    assert not _equal(three, one)
