# SPDX-License-Identifier: Apache-2.0
"""Labels as probabilities, from the dataset to the loss of every method."""

import pytest
import torch

from tests.trainer.runs import (
    DPO,
    METHODS,
    SIPO,
    collate_first,
    logged,
    make_trainer,
    preference_pairs,
    trained_weights,
)
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.statistics import PairErrors

LABELS = [1.0, 0.5, 0.2, 0.75]
CHOSEN_LABELS = [1.0, 0.5, 0.8, 0.75]  # of the arm that is called chosen

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def labelled(labels=LABELS):
    return preference_pairs(len(labels)).add_column("label", labels)


def _errors(count=4):
    values = torch.rand(4, count, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.2
    return PairErrors(*values.unbind())


@pytest.mark.parametrize("is_stream", [False, True], ids=["map", "stream"])
def test_batches_carry_the_label_of_the_chosen_arm(is_stream, tmp_path):
    pairs = labelled().to_iterable_dataset() if is_stream else labelled()
    trainer = make_trainer(DPO, tmp_path, pairs=pairs, soft_labels=True)
    items = list(trainer.train_dataset) if is_stream else [trainer.train_dataset[index] for index in range(4)]
    batch = trainer.data_collator(items)
    assert batch["label"].dtype == torch.float32 and batch["label"].tolist() == pytest.approx(CHOSEN_LABELS)
    plain = make_trainer(DPO, tmp_path, pairs=labelled())
    swapped = plain.train_dataset[1]  # the tie before it is left out
    assert torch.equal(swapped["chosen_pixels"], items[2]["chosen_pixels"]) and "label" not in swapped


def test_ties_are_pairs_only_with_soft_labels(tmp_path, capsys):
    assert len(make_trainer(DPO, tmp_path, pairs=labelled(), soft_labels=True).train_dataset) == 4
    assert "ties 1" in capsys.readouterr().out
    assert len(make_trainer(DPO, tmp_path, pairs=labelled()).train_dataset) == 3


@every_method
def test_the_loss_is_the_mean_over_the_label(method, tmp_path):
    trainer = make_trainer(method, tmp_path, label_smoothing=0.1)
    level = trainer.sample_noise_levels([torch.Generator().manual_seed(index) for index in range(4)])
    errors, label = _errors(), torch.tensor([0.9, 0.5, 1.0, 0.6])
    flipped = PairErrors(errors.rejected, errors.chosen, errors.ref_rejected, errors.ref_chosen)
    loss, statistics = trainer.pair_loss(errors, level, label)
    plain, plain_statistics = trainer.pair_loss(errors, level)
    torch.testing.assert_close(loss, label * plain + (1 - label) * trainer.pair_loss(flipped, level)[0])
    assert loss[2] == plain[2]
    assert all(torch.equal(statistics[name], plain_statistics[name]) for name in statistics)


@every_method
def test_certain_labels_train_as_no_labels(method, tmp_path):
    with_labels = make_trainer(method, tmp_path / "a", pairs=labelled([1.0] * 8), soft_labels=True)
    without = make_trainer(method, tmp_path / "b", pairs=preference_pairs(8))
    for trainer in (with_labels, without):
        trainer.train()
    assert logged(with_labels, "loss") == logged(without, "loss")
    left, right = trained_weights(with_labels), trained_weights(without)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_labels_move_the_weights(tmp_path):
    weights = []
    for labels in ([1.0] * 8, [0.6] * 8):
        trainer = make_trainer(DPO, tmp_path, pairs=labelled(labels), soft_labels=True)
        trainer.train()
        weights.append(trained_weights(trainer))
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_evaluation_takes_the_label(tmp_path):
    losses = []
    for labels in ([1.0] * 4, [0.6] * 4):
        trainer = make_trainer(DPO, tmp_path, pairs=labelled([1.0] * 8), soft_labels=True, beta=1e6)
        trainer.train()
        losses.append(trainer.evaluate(labelled(labels))["eval_loss"])
    assert losses[0] != losses[1]


def test_precomputed_latents_keep_the_label(tmp_path):
    trainer = make_trainer(SIPO, tmp_path, pairs=labelled(), soft_labels=True, precompute_latents=True)
    assert collate_first(trainer)["label"].tolist() == pytest.approx(CHOSEN_LABELS)


def test_soft_labels_without_labels_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="soft_labels=True.*the dataset has none.*`label`"):
        make_trainer(DPO, tmp_path, soft_labels=True)
