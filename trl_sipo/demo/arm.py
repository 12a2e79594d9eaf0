# SPDX-License-Identifier: Apache-2.0
"""One run of the demo: one method, one seed, through the same trainers as any other model, measured as it goes."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.data.loading import load_preference_dataset
from trl_sipo.demo.medium import Medium
from trl_sipo.demo.settings import Arm, DemoSettings, find_arm
from trl_sipo.demo.verifier import Verifier, load_verifiers
from trl_sipo.evaluation.importance_curve import importance_weight_curve
from trl_sipo.evaluation.metrics import frechet_distance, within_group_diversity
from trl_sipo.trainer.methods import method_classes

# Seed of the samples of every measurement: the same starting noise for every method, seed and step.
MEASUREMENT_SEED = 1234
# Pairs over which w(t) is averaged.
CURVE_PAIRS = 32


@dataclass(frozen=True)
class DemoFiles:
    """Where a demo keeps its data and its runs, and where its base model is.

    Attributes:
        root: The demo's own folder.
        base: Folder with `pipeline/`, `verifier/` and `training_log.json`: the one that is shipped for the
            medium, or one made by its `pretrain`.
    """

    root: Path
    base: Path

    @property
    def base_pipeline(self) -> Path:
        """The base model, a saved pipeline."""
        return self.base / "pipeline"

    @property
    def verifiers(self) -> Path:
        """Folder of the two verifiers' weights."""
        return self.base / "verifier"

    @property
    def training_log(self) -> Path:
        """How base and verifiers were trained, and the verifiers' accuracies on real media."""
        return self.base / "training_log.json"

    @property
    def reference_features(self) -> Path:
        """Features of real media, for the Frechet distance."""
        return self.root / "reference_features.safetensors"

    @property
    def base_images(self) -> Path:
        """The base model's samples of a measurement."""
        return self.root / "base_images.safetensors"

    def pairs_directory(self, source: str) -> Path:
        """Folder of the pairs of one source."""
        return self.root / "pairs" / source

    def train_pairs(self, source: str) -> Path:
        """Parquet of the training pairs."""
        return self.pairs_directory(source) / "train.parquet"

    def held_out_pairs(self, source: str) -> Path:
        """Parquet of the held-out pairs."""
        return self.pairs_directory(source) / "held_out.parquet"

    def run_directory(self, source: str, arm_name: str, seed: int) -> Path:
        """Folder of one run."""
        return self.root / "runs" / f"{source}-{arm_name}-seed{seed}"

    def result(self, source: str, arm_name: str, seed: int) -> Path:
        """The record of one finished run."""
        return self.run_directory(source, arm_name, seed) / "result.json"


def measurement_prompts(settings: DemoSettings, medium: Medium) -> list[Any]:
    """The prompts whose samples are measured: every combination, several times."""
    return [prompt for prompt in medium.all_prompts() for _ in range(settings.samples_per_prompt)]


def measure_samples(
    samples: torch.Tensor,
    prompts: list[Any],
    verifiers: tuple[Verifier, Verifier],
    reference: torch.Tensor,
    medium: Medium,
) -> dict[str, float]:
    """Accuracy by both verifiers, Frechet distance and within-class diversity of generated media.

    Args:
        samples: (n, 3, ...) in [-1, 1].
        prompts: One per sample.
        verifiers: The primary one, which ranked the pairs, and the second, which did not.
        reference: Features of real media, by the second verifier, (m, features).
    """
    primary, second = verifiers
    judged, checked = (medium.judge(verifier, samples, prompts) for verifier in (primary, second))
    features = medium.features(second, samples)
    return {
        **{f"{name}_accuracy": judged[f"{name}_correct"].float().mean().item() for name in medium.attributes},
        "accuracy": judged["correct"].float().mean().item(),
        "second_accuracy": checked["correct"].float().mean().item(),
        "reward": judged["log_prob"].mean().item(),
        "frechet_distance": frechet_distance(features, reference),
        "diversity": within_group_diversity(features, medium.class_ids(prompts)),
    }


class MeasureCallback(TrainerCallback):
    """After each evaluation, samples from the policy, measures what it drew and writes the record."""

    def __init__(self, settings: DemoSettings, files: DemoFiles, medium: Medium, report: Callable[[int], None]):
        self.settings = settings
        self.medium = medium
        self.report = report
        self.verifiers = load_verifiers(files.verifiers)
        self.reference = load_file(files.reference_features)["features"]
        self.prompts = measurement_prompts(settings, medium)
        self.records: list[dict[str, Any]] = []
        self.pipeline: DiffusionPipeline | None = None
        self.samples = torch.empty(0)
        self.step_seconds = 0.0
        self._step_began = 0.0
        self._masked: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Collect the share of masked pairs of the training batches."""
        if logs and "sipo/masked_fraction" in logs:
            self._masked.append(logs["sipo/masked_fraction"])

    def on_step_begin(self, args, state, control, **kwargs):
        """Look at the clock of this process, which does not count what others do to the machine."""
        self._step_began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        """Say that a step is done."""
        self.step_seconds += time.process_time() - self._step_began
        self.report(1)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Sample and measure."""
        self.samples = draw(self.pipeline, self.prompts, self.settings, self.medium)
        record = {
            "step": state.global_step,
            **measure_samples(self.samples, self.prompts, self.verifiers, self.reference, self.medium),
        }
        for name in (
            "rewards/accuracies",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "drift/chosen_error",
        ):
            # A method without pairs, or without a reference, has not all of them.
            if f"eval_{name}" in metrics:
                record[name.replace("rewards/", "held_out_").replace("drift/", "held_out_")] = metrics[f"eval_{name}"]
        record["masked_share"] = sum(self._masked) / len(self._masked) if self._masked else 0.0
        self._masked.clear()
        self.records.append(record)


def draw(pipeline: DiffusionPipeline, prompts: list[Any], settings: DemoSettings, medium: Medium) -> torch.Tensor:
    """The samples of one measurement, (n, 3, ...) in [-1, 1]; every module comes back in the mode it had."""
    modes = {module: module.training for module in pipeline.components.values() if isinstance(module, torch.nn.Module)}
    for module in modes:
        module.eval()
    try:
        return medium.sample(pipeline, [prompt.text for prompt in prompts], MEASUREMENT_SEED, settings)
    finally:
        for module, was_training in modes.items():
            module.train(was_training)


def method_options(arm: Arm, settings: DemoSettings, medium: Medium) -> dict[str, Any]:
    """What the protocol says about the method: its strength and grid, without what the method does not have."""
    shared = {
        "beta": settings.best_beta if arm.uses_best_beta else settings.beta,
        "importance_steps": settings.importance_steps,
        "precompute_latents": True,
        **medium.training_options,
    }
    if arm.method == "poly-dpo":
        shared["poly_alpha"] = settings.poly_alpha
    if arm.method == "d3po":
        shared |= {"trajectory_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    meaningless = method_classes(arm.method)[0].rejected_fields
    return {name: value for name, value in shared.items() if name not in meaningless} | arm.overrides


def samples_per_pair(config_class: Any) -> int:
    """How many samples of a batch a pair is: two where its arms are taken apart."""
    return 2 if config_class.arms == "each" else 1


def make_config(arm: Arm, seed: int, settings: DemoSettings, medium: Medium, directory: Path):
    """The method's configuration for one run."""
    config_class = method_classes(arm.method)[0]
    return config_class(
        output_dir=str(directory),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size * samples_per_pair(config_class),
        per_device_eval_batch_size=64,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        eval_on_start=settings.measures_start,
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **method_options(arm, settings, medium),
    )


def run_arm(
    source: str,
    arm_name: str,
    seed: int,
    settings: DemoSettings,
    files: DemoFiles,
    medium: Medium,
    report: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Train one arm with one seed and measure it; the result is also written, so that a stopped demo continues.

    Args:
        report: Called with the number of steps that have been done since the last call.

    Returns:
        `{"source", "arm", "seed", "records", "step_seconds", "weight_curve", "log"}`; see `MeasureCallback` for a
        record. `step_seconds` are those of the processor in all optimiser steps; `weight_curve` is None unless the
        protocol measures it.
    """
    arm = find_arm(arm_name)
    directory = files.run_directory(source, arm_name, seed)
    directory.mkdir(parents=True, exist_ok=True)
    callback = MeasureCallback(settings, files, medium, report)
    trainer = method_classes(arm.method)[1](
        medium.load_pipeline(files.base_pipeline),
        args=make_config(arm, seed, settings, medium, directory),
        train_dataset=load_preference_dataset(str(files.train_pairs(source))),
        eval_dataset=load_preference_dataset(str(files.held_out_pairs(source))),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    callback.pipeline = trainer.adapter.pipeline
    trainer.train()
    result = {
        "source": source,
        "arm": arm_name,
        "seed": seed,
        "records": callback.records,
        "step_seconds": callback.step_seconds,
        "weight_curve": weight_curve(trainer.adapter, source, settings.importance_steps, files, medium)
        if settings.measures_weights
        else None,
        "log": [row for row in trainer.state.log_history if "rewards/chosen" in row],
    }
    save_file({"images": to_bytes(callback.samples)}, directory / "images.safetensors")
    write_json(files.result(source, arm_name, seed), result)
    return result


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is either complete or not there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def to_bytes(samples: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as uint8."""
    return ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def weight_curve(
    adapter: BackboneAdapter, source: str, num_steps: int, files: DemoFiles, medium: Medium
) -> list[float]:
    """Mean importance weight w(t) of the pipeline's denoiser on held-out chosen media, at the medium's levels.

    Args:
        num_steps: Steps of the grid on which w is defined.
    """
    pairs = load_preference_dataset(str(files.held_out_pairs(source)))
    latents, prompts = medium.chosen_latents(adapter, pairs, CURVE_PAIRS)
    levels = medium.levels(adapter)
    return importance_weight_curve(adapter, adapter.denoiser, latents, prompts, levels, num_steps=num_steps)
