# SPDX-License-Identifier: Apache-2.0
"""`loss_type` of Diffusion-DPO: each loss is the one that is trained, and what makes no sense is refused."""

import math

import pytest
import torch

from tests.trainer.runs import DPO, SIPO, logged, make_config, make_trainer
from trl_sipo.core.objectives import hinge_loss, ipo_loss, robust_loss
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.statistics import PairErrors

FRESH = {"ipo": 0.25, "hinge": 1.0, "robust": math.log(2)}
LOSSES = {"ipo": ipo_loss, "hinge": hinge_loss, "robust": lambda z: robust_loss(z, label_smoothing=0.1)}


def _options(loss_type):
    return {"loss_type": loss_type, **({"label_smoothing": 0.1} if loss_type == "robust" else {})}


@pytest.mark.parametrize("loss_type", FRESH)
def test_the_loss_that_is_named_is_the_one_that_is_trained(loss_type, tmp_path):
    trainer = make_trainer(DPO, tmp_path, max_steps=2, beta=300.0, **_options(loss_type))
    values = torch.rand(4, 32, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.2
    errors = PairErrors(*values.unbind())
    level = trainer.noise_schedule.level(torch.full((32,), 500))
    loss, statistics = trainer.pair_loss(errors, level)
    logit = 300 * (errors.chosen_logratio - errors.rejected_logratio)
    torch.testing.assert_close(loss, LOSSES[loss_type](logit))
    torch.testing.assert_close(statistics["rewards/margins"], logit)

    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(FRESH[loss_type], abs=1e-4) and losses[1] != losses[0]
    assert loss_type in trainer.describe_run() and trainer.method_name == f"Diffusion-DPO ({loss_type} loss)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "nca_pair"}, "must be one of"),
        ({"loss_type": ["sigmoid", "ipo"]}, "not combined"),
        ({"loss_type": 3}, "must be one of"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"loss_type": "robust"}, "Set `label_smoothing`"),
    ],
    ids=str,
)
def test_losses_that_do_not_exist_or_do_not_fit_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        make_config(DPO, tmp_path, **options)


def test_other_methods_have_one_loss_and_say_where_the_others_are(tmp_path):
    with pytest.raises(ConfigurationError, match="`loss_type=.'ipo'.` has no meaning .* DiffusionDPOTrainer"):
        make_config(SIPO, tmp_path, loss_type=["ipo"])
    assert make_config(DPO, tmp_path).loss_type == make_config(DPO, tmp_path, loss_type="sigmoid").loss_type
