# SPDX-License-Identifier: Apache-2.0
"""In which dtype the reference's predictions may be stored for the proximal term: what rounding does to it.

    python benchmarks/stored_predictions.py --threads 1                # a CPU: a U-Net of 41 M parameters, float32
    python benchmarks/stored_predictions.py --threads 1 --dtype bf16   # the same under autocast to bfloat16

Before the first update policy and reference predict the same, so that the distance d of their predictions is 0, the
proximal term too, and its gradient with it. Stored in a narrower dtype, the reference's prediction is another one:
then d is not 0, and the term pulls the policy to where the rounding went. Prints, over some draws of the pairs and for
each dtype, d, the term beside the loss of Diffusion-DPO (ln 2), and the norm of its gradient as a share of that of
Diffusion-DPO's; and what is left of them with float32, the same predictions unrounded. Weights are random and nothing
is downloaded.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from random_pipelines import PIPELINES, make_pipeline
from records import add_common_options, write_record
from step_time import settle_size
from step_variants import DTYPES, trainer_step

from trl_sipo.trainer.arms import arm_prediction
from trl_sipo.trainer.encoding import pair_numbers
from trl_sipo.trainer.passes import errors_and_distances_of, of_reference
from trl_sipo.trainer.reference_predictions import prediction_dtype

STORED = (torch.float32, torch.float16, torch.bfloat16)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=PIPELINES, default="41M", help="with random weights (default: %(default)s)")
    add("--size", type=int, nargs="+", metavar="N", help="height and width, and frames of a video, in pixels")
    add("--dtype", choices=DTYPES, default="fp32", help="of frozen weights and of autocast (default: %(default)s)")
    add("--pairs", type=int, default=4, help="per draw (default: %(default)s)")
    add("--draws", type=int, default=8, help="of noise level and noise for each pair (default: %(default)s)")
    add_common_options(parser, "stored_predictions.json")
    parser.set_defaults(checkpointing=False)
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns what was written."""
    parser = make_parser()
    options = parser.parse_args(argv)
    settle_size(parser, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = make_pipeline(PIPELINES[options.model], device=options.device, dtype=DTYPES[options.dtype])
        step = trainer_step("proximal term", pipeline, options, Path(folder))
        draws = [effects(step.trainer, step.batch, epoch) for epoch in range(options.draws)]
    names = [str(dtype).removeprefix("torch.") for dtype in STORED]
    found = {name: average([draw[name] for draw in draws]) for name in names}
    predicted = str(prediction_dtype(step.trainer)).removeprefix("torch.")
    print(f"{options.model}, predicted in {predicted}; means over {options.draws} draws of {options.pairs} pairs")
    print("| stored in | d | term | gradient of the term / that of Diffusion-DPO |\n|---|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | {row['distance']:.1e} | {row['term']:.1e} | {row['gradient_share']:.1e} |")
    return write_record(options, {}, predicted=predicted, stored=found)


def effects(trainer: Any, batch: dict, epoch: int) -> dict[str, dict[str, float]]:
    """What each dtype does on one draw of a batch, by its name."""
    trainer.set_epoch(epoch)
    level, generators, _ = trainer._draw(pair_numbers(batch))
    pairs = trainer._encoder(batch, trainer.accelerator.device, generators, training=True)
    arms = trainer.noised_arms(pairs, level, trainer.draw_noise(pairs, generators, share=True))
    predictions = of_reference(trainer, arms, arm_prediction)
    found = {}
    for dtype in STORED:
        rounded = [one.to(dtype).float() for one in predictions]
        found[str(dtype).removeprefix("torch.")] = _effect(trainer, arms, level, rounded)
    return found


def _effect(trainer: Any, arms: Sequence[Any], level: Any, predictions: Sequence[torch.Tensor]) -> dict[str, float]:
    errors = errors_and_distances_of(trainer, trainer.model, arms, None, predictions)
    loss, term = trainer.pair_loss(errors, level)[0].mean(), trainer.proximal_term(errors, level).mean()
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    norms = [_norm(torch.autograd.grad(part, weights, retain_graph=True)) for part in (term, loss)]
    return {
        "distance": torch.stack(errors.distances).mean().item(),
        "term": term.item(),
        "gradient_share": norms[0] / norms[1],
    }


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    return torch.stack([gradient.double().norm() for gradient in gradients]).norm().item()


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every number."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


if __name__ == "__main__":
    main()
