# SPDX-License-Identifier: Apache-2.0
"""Every method against every other at one budget: `trl-sipo demo --baselines`.

The strength of each (its beta, which means another thing in each objective) is chosen from a few values, on a seed
that is not reported; then each runs with its default and with the chosen strength. All on the machinery of the demo:
runs in parallel, and a comparison that was stopped continues.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pyarrow.parquet import read_metadata

from trl_sipo.demo.arm import DemoFiles, write_json
from trl_sipo.demo.baselines_report import write_baselines_report
from trl_sipo.demo.baselines_summary import baselines_verdict, method_row
from trl_sipo.demo.demo import ceiling, environment, hush_libraries, prepare, train_all
from trl_sipo.demo.medium import Medium
from trl_sipo.demo.settings import FULL, STRENGTH_MARK, DemoSettings, Part, find_arm
from trl_sipo.errors import ConfigurationError
from trl_sipo.reporting.figures import check_plotting
from trl_sipo.trainer.methods import method_classes

OF_PAIRS = ("dpo", "dpo_cm", "sipo", "poly_dpo", "ipo", "hinge", "robust", "kto", "mapo", "sft")

# Beta, in each method's own meaning: its default, and others.
STRENGTHS = {
    "dpo": (40.0, 200.0, 1000.0, 5000.0),
    "dpo_cm": (20.0, 200.0, 1000.0, 5000.0),
    "sipo": (20.0, 200.0, 1000.0, 5000.0),
    "poly_dpo": (40.0, 200.0, 1000.0, 5000.0),
    "ipo": (4.0, 20.0, 200.0, 1000.0, 5000.0),
    "hinge": (40.0, 200.0, 1000.0, 5000.0),
    "robust": (40.0, 200.0, 1000.0, 5000.0),
    "kto": (2.0, 20.0, 200.0, 2000.0, 20000.0),
    "mapo": (0.001, 0.01, 0.1, 1.0),
    "d3po": (100.0, 1000.0, 10000.0),
    "spin": (200.0, 1000.0, 5000.0, 25000.0),
}


@dataclass(frozen=True)
class Comparison:
    """What is compared, at one budget.

    Attributes:
        settings: The budget; its `parts` are those of no run.
        arms: Of each source, keys of `settings.ARMS`.
        strengths: Of each arm that has one, the values that are tried; the default is one of them.
        seeds: Those that are reported.
        sweep_seed: The one that strengths are chosen on; none of `seeds`.
    """

    settings: DemoSettings
    arms: Mapping[str, tuple[str, ...]]
    strengths: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: STRENGTHS)
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep_seed: int = 100

    def __post_init__(self) -> None:
        if self.sweep_seed in self.seeds:
            raise ConfigurationError(
                f"Seed {self.sweep_seed} is the one that strengths are chosen on, and cannot be reported; reported "
                f"are {list(self.seeds)}."
            )
        for source, arms in self.arms.items():
            Part(source, arms, self.seeds)  # refuses what it does not know

    @property
    def sweep(self) -> DemoSettings:
        """The runs that strengths are chosen from."""
        tried = {source: [name for arm in arms for name in self.tried(arm)] for source, arms in self.arms.items()}
        parts = [Part(source, tuple(names), (self.sweep_seed,)) for source, names in tried.items() if names]
        return replace(self.settings, parts=tuple(parts))

    def with_arms(self, names: Sequence[str]) -> "Comparison":
        """Fewer methods.

        Raises:
            ConfigurationError: Names that are not compared.
        """
        known = dict.fromkeys(arm for arms in self.arms.values() for arm in arms)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigurationError(f"Unknown arms {unknown}; compared are {', '.join(known)}.")
        arms = {source: tuple(arm for arm in arms if arm in names) for source, arms in self.arms.items()}
        return replace(self, arms={source: kept for source, kept in arms.items() if kept})

    def tried(self, arm: str) -> list[str]:
        """The arm at each strength; none where there is nothing to choose."""
        return [at_strength(arm, value) for value in self.strengths.get(arm, ())]

    def reported(self, chosen: Mapping[tuple[str, str], str]) -> DemoSettings:
        """The runs of the table: of each source and arm the default, and what was chosen."""
        parts = []
        for source, arms in self.arms.items():
            names = [name for arm in arms for name in (default_name(arm), chosen[source, arm])]
            parts.append(Part(source, tuple(dict.fromkeys(names)), self.seeds))
        return replace(self.settings, parts=tuple(parts))


BASELINES = Comparison(
    replace(
        FULL,
        parts=(),
        max_steps=50,
        eval_every=50,
        batch_size=12,
        learning_rate=1e-4,
        measures_start=False,
        measures_weights=False,
    ),
    {"off_policy": OF_PAIRS, "on_policy": OF_PAIRS, "trajectories": ("d3po",), "self_play": ("spin",)},
)


def at_strength(arm: str, value: float) -> str:
    """The name of an arm at a strength."""
    return f"{arm}{STRENGTH_MARK}{value:g}"


def default_name(arm: str) -> str:
    """The name of an arm at the default of its method."""
    found = find_arm(arm)
    return arm if found.strength is None else at_strength(arm, method_classes(found.method)[0].default_beta)


def choose(records: Mapping[str, dict[str, Any]], num_samples: int) -> str:
    """The best of the same method at several strengths, by the last measurement of one run each.

    Of those whose accuracy is within one standard error of the highest, that with the lowest Frechet distance: an
    accuracy alone would choose models that please the verifier and draw one picture.

    Args:
        records: Name of an arm with its strength -> measures.
        num_samples: Samples of a measurement.
    """
    highest = max(record["accuracy"] for record in records.values())
    error = math.sqrt(highest * (1 - highest) / num_samples)
    near = {name: record for name, record in records.items() if record["accuracy"] >= highest - error}
    return min(near, key=lambda name: near[name]["frechet_distance"])


def run_baselines(
    comparison: Comparison, files: DemoFiles, medium: Medium, *, workers: int, command: str
) -> dict[str, Any]:
    """Run the comparison and write `summary.json`, `table.md`, the figures and `report.html` into its folder.

    Runs that are already there for the same budget are kept.

    Args:
        comparison: What is compared.
        files: The folder (made if it is missing) and the base model.
        medium: What that model draws.
        workers: Training processes at a time, one thread each.
        command: The command line, for the record.

    Returns:
        The summary, as written.
    """
    started = time.perf_counter()
    check_plotting()
    hush_libraries()
    files.root.mkdir(parents=True, exist_ok=True)
    sweep = comparison.sweep
    base = prepare(comparison.reported(_defaults(comparison)), files, medium, workers)
    num_kept = train_all(sweep, files, medium, workers) if sweep.parts else 0
    tried = _last_records(sweep, files)
    num_samples = len(medium.all_prompts()) * comparison.settings.samples_per_prompt
    chosen = _chosen(comparison, tried, num_samples)
    reported = comparison.reported(chosen)
    num_kept += train_all(reported, files, medium, workers)
    summary = {
        "command": command,
        "settings": asdict(comparison),
        "environment": environment(),
        # Of this call; runs that were there already took theirs before.
        "seconds": round(time.perf_counter() - started, 1),
        "num_runs_kept": num_kept,
        "num_samples": num_samples,
        "ceiling": ceiling(files),
        "base": base,
        "num_train_pairs": {source: read_metadata(files.train_pairs(source)).num_rows for source in comparison.arms},
        "rows": _rows(comparison, chosen, tried, files, base, medium),
    }
    summary["verdict"] = baselines_verdict(summary, medium)
    write_json(files.root / "summary.json", summary)
    print("Drawing the figures and the report")
    write_baselines_report(summary, files, medium)
    return summary


def _defaults(comparison: Comparison) -> dict[tuple[str, str], str]:
    return {(source, arm): default_name(arm) for source, arms in comparison.arms.items() for arm in arms}


def _results(settings: DemoSettings, files: DemoFiles) -> list[dict[str, Any]]:
    return [json.loads(files.result(part.source, *run).read_text()) for part in settings.parts for run in part.runs]


def _last_records(settings: DemoSettings, files: DemoFiles) -> dict[tuple[str, str], dict[str, Any]]:
    """Source and arm -> the last measurement of its run; of settings with one seed."""
    return {(run["source"], run["arm"]): run["records"][-1] for run in _results(settings, files)}


def _chosen(
    comparison: Comparison, tried: Mapping[tuple[str, str], dict[str, Any]], num_samples: int
) -> dict[tuple[str, str], str]:
    """Source and arm -> the arm with the strength that is best there; without a strength, the arm itself."""
    chosen = _defaults(comparison)
    for source, arm in chosen:
        names = comparison.tried(arm)
        if names:
            chosen[source, arm] = choose({name: tried[source, name] for name in names}, num_samples)
    return chosen


def _rows(
    comparison: Comparison,
    chosen: Mapping[tuple[str, str], str],
    tried: Mapping[tuple[str, str], dict[str, Any]],
    files: DemoFiles,
    base: dict[str, Any],
    medium: Medium,
) -> list[dict[str, Any]]:
    """One row of the table per source, arm and strength: the default, and the chosen one where it is another."""
    results = _results(comparison.reported(chosen), files)
    rows = []
    for (source, arm), best in chosen.items():
        default = default_name(arm)
        sweep = {name.partition(STRENGTH_MARK)[2]: tried[source, name] for name in comparison.tried(arm)}
        for name in dict.fromkeys((default, best)):
            runs = [run for run in results if (run["source"], run["arm"]) == (source, name)]
            roles = {"is_default": name == default, "is_best": name == best}
            found = {"source": source, "method": arm, "arm": name, **roles, "sweep": sweep}
            rows.append({**found, **method_row(runs, base, medium)})
    return rows
