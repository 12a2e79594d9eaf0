# SPDX-License-Identifier: Apache-2.0
"""What `test_reference_pass.py` starts in each process: `reference_distributed_run.py <output> <kind> <batch>`."""

import sys
from pathlib import Path

import torch

from tests.trainer.runs import DPO, logged, make_trainer, preference_pairs, trained_weights
from trl_sipo.trainer import reference_bank


def main(output: str, kind: str, batch_size: int) -> None:
    """Precompute two draws, and then a third, and train; every process writes what it knew and where it ended."""
    torch.set_num_threads(1)
    folder = Path(output)
    reference_bank.reference_folder = lambda: folder / "banks"
    pairs = preference_pairs(8)
    settings = {"precompute_ref_batch_size": 3, "per_device_train_batch_size": batch_size, "max_steps": 5}
    for num_draws in (2, 3):
        trainer = make_trainer(
            DPO,
            folder,
            is_lora=kind == "rows",  # else there is no model left to measure a stream with
            pairs=pairs if kind == "rows" else pairs.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=3),
            trainer_options={"eval_dataset": preference_pairs(5, seed=3).to_iterable_dataset()},
            precompute_ref_log_probs=True,
            num_ref_draws=num_draws,
            optim="sgd",
            **settings,
        )
    trainer.train()
    errors = trainer.reference.train
    result = {
        "ids": errors.ids,
        "errors": errors.errors,
        "weights": trained_weights(trainer),
        "loss": logged(trainer, "loss"),
        "metrics": trainer.evaluate(),
        "processes": trainer.accelerator.num_processes,
    }
    torch.save(result, folder / f"result-{trainer.args.process_index}.pt")
    # Without it a thread of gloo may still run when the interpreter ends, which aborts the process.
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
