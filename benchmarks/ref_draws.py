# SPDX-License-Identifier: Apache-2.0
"""How many draws per pair a precomputed reference needs: held-out margins against `num_ref_draws`.

    OMP_NUM_THREADS=1 python benchmarks/ref_draws.py --seeds 3

The demo's base model and its pairs; Diffusion-DPO with a LoRA, each number of draws and the live reference with the
same seeds, steps and settings. Held-out pairs are evaluated at fixed noise by the live reference. Prints a table and
writes JSON. All data ships with the package.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig
from tqdm.auto import tqdm

from trl_sipo import DiffusionDPOConfig, DiffusionDPOTrainer
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.demo.arm import DemoFiles
from trl_sipo.demo.fashion import ASSETS
from trl_sipo.demo.images import ImageMedium
from trl_sipo.demo.prepare import prepare_pairs
from trl_sipo.demo.settings import FULL
from trl_sipo.demo.verifier import load_verifiers
from trl_sipo.scripts.env import environment
from trl_sipo.trainer import reference_bank

METRICS = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=240, help="of 16 pairs (default: %(default)s)")
    parser.add_argument("--beta", type=float, default=2000.0, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--source", default="on_policy", help="of the demo's pairs (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("ref_draws.json"), help="default: %(default)s")
    return parser


def run(draws: int | None, seed: int, pairs: Any, held_out: Any, options: argparse.Namespace, folder: Path) -> dict:
    """Held-out metrics of one run; `draws` None is the live reference."""
    medium, files = ImageMedium(), DemoFiles(folder, ASSETS)
    bank = {} if draws is None else {"precompute_ref_log_probs": True, "num_ref_draws": draws}
    began = time.process_time()
    trainer = DiffusionDPOTrainer(
        medium.load_pipeline(files.base_pipeline),
        args=DiffusionDPOConfig(
            str(folder / f"run-{draws}-{seed}"),
            max_steps=options.steps,
            beta=options.beta,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            lr_scheduler_type="constant",
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=options.steps,
            report_to=[],
            disable_tqdm=True,
            **bank,
        ),
        train_dataset=pairs,
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    metrics = trainer.evaluate(held_out)
    return {**{name: metrics[name] for name in METRICS}, "cpu_seconds": time.process_time() - began}


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Run all, print and write."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reference_bank.reference_folder = lambda: folder / "banks"
        medium, files = ImageMedium(), DemoFiles(folder, ASSETS)
        pipeline = medium.load_pipeline(files.base_pipeline)
        verifier, _ = load_verifiers(files.verifiers)
        prepare_pairs(pipeline, verifier, FULL, options.source, files, medium)
        pairs = load_preference_dataset(str(files.train_pairs(options.source)))
        held_out = load_preference_dataset(str(files.held_out_pairs(options.source)))
        results: dict[str, list[dict]] = {}
        for seed in range(options.seeds):
            for draws in tqdm([None, *options.draws], desc=f"seed {seed}"):
                name = "live" if draws is None else str(draws)
                results.setdefault(name, []).append(run(draws, seed, pairs, held_out, options, folder))
    print(f"{'draws':>6}  {'held-out margin':>24}  {'held-out accuracy':>18}  {'loss':>8}")
    for name, rows in results.items():
        losses, margins, accuracies = ([row[metric] for row in rows] for metric in METRICS)
        spread = f"({min(margins):.3f} .. {max(margins):.3f})"
        print(
            f"{name:>6}  {statistics.mean(margins):8.3f} {spread:>16}  {statistics.mean(accuracies):18.3f}  "
            f"{statistics.mean(losses):8.4f}"
        )
    record = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "num_pairs": len(pairs),
        "results": results,
        "environment": environment(),
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main(make_parser().parse_args())
