# SPDX-License-Identifier: Apache-2.0
"""What `test_evaluation_processes.py` runs in every process, and once in its own."""

from pathlib import Path

import numpy as np
import torch

from tests.trainer.runs import DPO, lora, make_trainer, preference_pairs


def mean_reward(prediction) -> dict[str, float]:
    """What users compute of predictions: how many there are, and their mean."""
    assert len(prediction.predictions) == len(prediction.label_ids)
    return {"rows": len(prediction.predictions), "mean_reward": float(np.mean(prediction.predictions[:, 0]))}


def evaluate(output: Path, *, is_stream: bool) -> None:
    """Evaluate seven held-out pairs, in batches of two, and predict them; every process writes what it got."""
    held_out = preference_pairs(7, seed=5)
    options = {"eval_dataset": held_out.to_iterable_dataset() if is_stream else held_out}
    trainer = make_trainer(
        DPO,
        output,
        trainer_options={**options, "compute_metrics": mean_reward, "peft_config": lora(init_lora_weights=False)},
        max_steps=1,
        per_device_eval_batch_size=2,
    )
    metrics = trainer.evaluate()
    prediction = trainer.predict(options["eval_dataset"])
    result = {"metrics": metrics, "predictions": prediction.predictions, "predicted": prediction.metrics}
    torch.save(result, output / f"result-{trainer.args.process_index}.pt")
    trainer.end()


def evaluate_rows(output: Path) -> None:
    """Of a dataset with a length."""
    evaluate(output, is_stream=False)


def evaluate_stream(output: Path) -> None:
    """Of a stream, whose last batch accelerate fills up, and does not cut again."""
    evaluate(output, is_stream=True)
