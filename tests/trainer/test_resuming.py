# SPDX-License-Identifier: Apache-2.0
"""A run that is resumed ends, and logs, as one that was never stopped: to the bit."""

import pytest

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.resuming import differences, end_of, recorded_order
from tests.trainer.runs import DPO, DPO_CM, SIPO, lora, make_trainer, preference_pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny pipeline on disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny_stable_diffusion().save_pretrained(folder)
    return str(folder)


def _stream(count, num_shards=1):
    return preference_pairs(count).to_iterable_dataset(num_shards=num_shards).shuffle(seed=3, buffer_size=4)


# Pairwise combinations, so that each setting meets most of the others. The checkpoint of step 3 or 5 falls between two
# logs, in the middle of an epoch or at its end; five pairs make three batches of two, the last one short.
CASES = {
    "middle_of_an_epoch": (SIPO, 3, {"logging_steps": 4, "lr_scheduler_type": "linear", "warmup_steps": 2}),
    "end_of_an_epoch": (
        DPO,
        4,
        {"logging_strategy": "epoch", "eval_strategy": "epoch", "is_lora": False, "optim": "sgd"},
    ),
    "saved_by_epochs": (DPO, 4, {"save_strategy": "epoch", "logging_strategy": "epoch", "eval_strategy": "epoch"}),
    "accumulation": (
        DPO_CM,
        3,
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "logging_steps": 4,
            "pairs": lambda: preference_pairs(5),
            "mask_threshold": 0.98,
            "mask_redraws": 2,
        },
    ),
    "workers": (
        SIPO,
        3,
        {
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
            "logging_steps": 2,
            "random_flip": True,
            "center_crop": False,
            "pairs": lambda: preference_pairs(8, width=64),
            "is_lora": False,
        },
    ),
    "stream": (
        DPO,
        5,
        {"pairs": lambda: _stream(7, 2), "logging_steps": 3, "gradient_accumulation_steps": 2},
    ),
    "stream_by_epochs": (
        DPO,
        3,
        {"pairs": lambda: _stream(6), "save_strategy": "epoch", "logging_steps": 4, "max_steps": 8, "is_lora": False},
    ),
    "precomputed": (
        SIPO,
        3,
        {"precompute_ref_log_probs": True, "num_ref_draws": 2, "is_lora": False, "logging_steps": 4},
    ),
    "moving_reference": (
        DPO,
        5,
        {"sync_ref_model": True, "ref_model_sync_steps": 3, "is_lora": False, "logging_steps": 7, "eval_steps": 3},
    ),
    "dropout": (
        DPO,
        3,
        {"disable_dropout": False, "caption_dropout": 0.3, "logging_steps": 5, "adam_beta2": 0.9, "eval_steps": 2},
    ),
}


def _trainer(case, base, folder):
    method, saved_at, options = CASES[case]
    settings = {"max_steps": 7, "per_device_train_batch_size": 2, "model": base, "save_strategy": "steps", **options}
    extra = {}
    if "eval_steps" in settings or "eval_strategy" in settings:
        settings.setdefault("eval_strategy", "steps")
        extra["eval_dataset"] = preference_pairs(3, seed=5)
    if case == "dropout":
        extra["peft_config"] = lora(lora_dropout=0.5)
    settings["pairs"] = settings.get("pairs", lambda: preference_pairs(8))()
    trainer = make_trainer(method, folder, trainer_options=extra, **{"save_steps": saved_at, **settings})
    return trainer, recorded_order(trainer)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_one_that_was_never_stopped(case, base, tmp_path):
    whole, order = _trainer(case, base, tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{CASES[case][1]}"

    resumed, rest = _trainer(case, base, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert rest == order[-len(rest) :] and len(rest) < len(order)
    assert differences(end_of(whole), end_of(resumed)) == []


def test_a_run_that_was_saved_after_the_evaluation_of_its_last_step(base, tmp_path):
    """Which leaves the model in evaluation, so that the last row of the log has no metrics of training."""
    settings = {"model": base, "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 3}
    settings |= {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    data = {"trainer_options": {"eval_dataset": preference_pairs(3, seed=5)}}
    whole, resumed = (make_trainer(DPO, tmp_path / name, **settings, **data) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert differences(end_of(whole), end_of(resumed)) == []
