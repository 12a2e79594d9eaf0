# SPDX-License-Identifier: Apache-2.0
"""How often the intervals of win rates cover the truth, and how often the test rejects what is true, by simulation.

    python benchmarks/interval_coverage.py --output coverage.json

A prompt's own win rate is drawn from a beta distribution, so that its samples are alike; a tenth of the outcomes are
ties, or in the last rows nearly all, as with a verifier that both models nearly always satisfy. The nominal values are
0.95 and at most 0.05. The standard error of a row is 0.007 at 1,000 trials.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from trl_sipo.evaluation.statistics import Clusters, clustered_interval, sign_flip_test

TIES = 0.1
MANY_TIES = 0.99
CONCENTRATION = 2.0  # of the beta distribution: an intra-cluster correlation of 1 / 3
SAMPLES_PER_PROMPT = 4


def outcomes(generator: np.random.Generator, num_prompts: int, win_rate: float, ties: float) -> tuple[Clusters, float]:
    """Simulated outcomes, and the true mean: a tie pulls it towards one half."""
    rates = generator.beta(CONCENTRATION * win_rate, CONCENTRATION * (1 - win_rate), size=num_prompts)
    wins = generator.binomial(1, rates[:, None], size=(num_prompts, SAMPLES_PER_PROMPT)).astype(float)
    wins = np.where(generator.random(wins.shape) < ties, 0.5, wins)
    counts = np.full(num_prompts, float(SAMPLES_PER_PROMPT))
    return Clusters(wins.sum(1), counts), (1 - ties) * win_rate + ties / 2


def percentile_interval(clusters: Clusters, num_resamples: int, seed: int) -> tuple[float, float]:
    """What the plain bootstrap gives, for comparison."""
    count = len(clusters.sums)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=num_resamples)
    low, high = np.quantile((draws @ clusters.sums) / (draws @ clusters.counts), [0.025, 0.975])
    return float(low), float(high)


def measure(
    num_prompts: int, win_rate: float, trials: int, num_resamples: int = 999, ties: float = TIES
) -> dict[str, float]:
    """One row of the table."""
    generator = np.random.default_rng([num_prompts, round(1000 * win_rate)])
    covered, plain, width, rejected = 0, 0, 0.0, 0
    for trial in range(trials):
        clusters, truth = outcomes(generator, num_prompts, win_rate, ties)
        interval = clustered_interval(clusters, bounds=(0.0, 1.0), num_resamples=num_resamples, seed=trial)
        covered += interval.low <= truth <= interval.high
        width += interval.high - interval.low
        low, high = percentile_interval(clusters, num_resamples, trial)
        plain += low <= truth <= high
        rejected += sign_flip_test(clusters, null=0.5, num_flips=499, seed=trial) <= 0.05
    return {
        "prompts": num_prompts,
        "win_rate": win_rate,
        "ties": ties,
        "coverage": covered / trials,
        "mean_width": width / trials,
        "percentile_coverage": plain / trials,
        "rejected": rejected / trials,
    }


def main(argv: list[str] | None = None) -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description="Coverage of the intervals of win rates, by simulation.")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 20, 50, 200])
    parser.add_argument("--win-rates", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    cells = [(prompts, rate) for prompts in arguments.prompts for rate in arguments.win_rates]
    options = [(*cell, TIES) for cell in cells] + [(prompts, 0.5, MANY_TIES) for prompts in arguments.prompts]
    rows = [measure(*cell, arguments.trials, ties=ties) for *cell, ties in tqdm(options, unit="cell")]
    print("| prompts | win rate | ties | covered | width | percentile bootstrap covers | test rejects 'alike' |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['prompts']} | {row['win_rate']} | {row['ties']} | {row['coverage']:.3f} "
            f"| {row['mean_width']:.3f} | {row['percentile_coverage']:.3f} | {row['rejected']:.3f} |"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps({"trials": arguments.trials, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
