# SPDX-License-Identifier: Apache-2.0
"""What a step that was not finite was given, on disk; and that step again.

`<output_dir>/_nonfinite/step-000012-process-0-part-0.safetensors` holds the tensors of a micro-batch, the `.json`
beside it what they mean. Where a LoRA is trained and the weights are still those of the step, it is in the folder
`step-000012-weights`.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer._trl_compat import DPOConfig
from trl_sipo.trainer.checkpointing import load_weights, save_weights
from trl_sipo.trainer.encoding import ARMS, TRAIN_STREAM, EncodedPairs, PairNoise
from trl_sipo.trainer.nonfinite import LINKS, first_broken, gradient_norms
from trl_sipo.trainer.reference_bank import BankedReference
from trl_sipo.trainer.sharding import is_sharded
from trl_sipo.trainer.statistics import PairErrors

logger = logging.getLogger(__name__)

# With the underscore, transformers never uploads it with the model: it holds what was made of training data.
NONFINITE_FOLDER = "_nonfinite"
# Bounds of what a run leaves behind: steps of each process, bytes of a step and of the LoRA beside it.
MAX_STEPS = 8
MAX_BYTES = 2**27
_MAX_NAMES = 100
_FORMAT = 1
_CONDITIONING = "conditioning."
_PREDICTION = "ref_prediction."
# Settings of transformers and TRL on which the numbers of a step depend, beside all of ours.
_INHERITED_SETTINGS = (
    "beta", "label_smoothing", "loss_type", "seed", "bf16", "fp16", "disable_dropout", "learning_rate", "optim",
    "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
    "torch_compile", "precompute_ref_log_probs", "sync_ref_model",
)  # fmt: skip


@dataclass(frozen=True)
class StepBatch:
    """A micro-batch as the step has it, on the training device.

    Attributes:
        pairs: Latents and conditioning.
        level: Noise level of each pair, (batch,).
        noise: Of both arms.
        errors: Of policy and reference, without gradient.
        pair_index: (batch,) int64.
        label: (batch,) float32 with soft labels.
        epoch: From which noise and noise levels are drawn.
        ref_predictions: Of the reference, for each arm, where they were stored and the proximal term read them.
    """

    pairs: EncodedPairs
    level: NoiseLevel
    noise: PairNoise
    errors: PairErrors
    pair_index: torch.Tensor
    label: torch.Tensor | None = None
    epoch: int = 0
    ref_predictions: tuple[torch.Tensor, ...] | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it by name, (batch, ...) each."""
        pairs, level, errors = self.pairs, self.level, self.errors
        tensors = {
            **{f"{arm}_latents": latents for arm, latents in zip(ARMS, pairs.arms, strict=False)},
            **{f"{_PREDICTION}{arm}": one for arm, one in zip(ARMS, self.ref_predictions or (), strict=False)},
            "chosen_noise": self.noise[0],
            "alpha_t": level.alpha_t,
            "sigma_t": level.sigma_t,
            "timestep": level.timestep,
            "pair_index": self.pair_index,
            **{f"errors.{name}": error for name, error in errors.named().items()},
            **{_CONDITIONING + name: value for name, value in pairs.conditioning.items()},
        }
        if self.noise[-1] is not self.noise[0]:
            tensors["rejected_noise"] = self.noise[-1]
        if pairs.frame_rate is not None:
            tensors["frame_rate"] = pairs.frame_rate
        if self.label is not None:
            tensors["label"] = self.label
        return tensors

    @classmethod
    def of_tensors(cls, tensors: dict[str, torch.Tensor]) -> "StepBatch":
        """Inverse of [`tensors`]."""
        conditioning = {
            name.removeprefix(_CONDITIONING): value
            for name, value in tensors.items()
            if name.startswith(_CONDITIONING)
        }
        pairs = EncodedPairs(
            tensors["chosen_latents"], tensors.get("rejected_latents"), conditioning, tensors.get("frame_rate")
        )
        predictions = tuple(tensors[_PREDICTION + arm] for arm in ARMS if _PREDICTION + arm in tensors)
        noise = [tensors["chosen_noise"], tensors.get("rejected_noise", tensors["chosen_noise"])]
        return cls(
            pairs,
            NoiseLevel(tensors["alpha_t"], tensors["sigma_t"], tensors["timestep"]),
            tuple(noise[: len(pairs.arms)]),
            PairErrors(*(tensors.get(f"errors.{field.name}") for field in fields(PairErrors))),
            tensors["pair_index"],
            tensors.get("label"),
            ref_predictions=predictions or None,
        )

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def within(self, num_bytes: int) -> "StepBatch":
        """At most so many bytes of it, and at least one pair: those first whose errors are not finite."""
        if self.num_bytes <= num_bytes:
            return self
        errors = torch.stack(list(self.errors.named().values()))
        count = max(1, len(self.pair_index) * num_bytes // self.num_bytes)
        chosen = errors.isfinite().all(0).int().argsort(stable=True)[:count]
        rows = {name: value[chosen.to(value.device)] for name, value in self.tensors().items()}
        return replace(StepBatch.of_tensors(rows), epoch=self.epoch)


@dataclass(frozen=True)
class Fault:
    """Something that was not finite.

    Attributes:
        message: What, and what to do.
        link: Of [`~trl_sipo.trainer.nonfinite.LINKS`].
        step: The optimiser step, counted from 1; 0 for an evaluation.
        batches: The micro-batches of this process among which it arose.
        parameters: Names of those whose gradient is not finite, as far as it is known.
        has_weights: Whether the weights are still those that it arose with.
    """

    message: str
    link: str
    step: int
    batches: Sequence[StepBatch]
    parameters: Sequence[str] = ()
    has_weights: bool = True


class ReproductionWriter:
    """Writes what a step was given into a run's folder, for the first faults of a run.

    Args:
        trainer: A diffusion preference trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir, NONFINITE_FOLDER)
        self._written = 0

    def __call__(self, fault: Fault) -> str | None:
        """Write the micro-batches of this process; where they lie, `None` if enough lie there already.

        All processes must call it. None returns before all have written: the error that follows ends one of them
        first, and then the launcher ends the others.
        """
        if self._written == MAX_STEPS:
            return None
        self._written += 1
        try:
            return self._write_all(fault)
        finally:
            self.trainer.accelerator.wait_for_everyone()

    def _write_all(self, fault: Fault) -> str | None:
        """A disk that is full, or read-only, is no reason to hide the fault: it is logged, and nothing is written."""
        stem = f"step-{fault.step:06d}" if fault.step else "evaluation"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part, batch in enumerate(fault.batches):
                name = f"{stem}-process-{self.trainer.accelerator.process_index}-part-{part}"
                self._write(self.folder / name, batch, fault)
            if fault.has_weights and self.trainer.is_world_process_zero():
                self._write_weights(self.folder / f"{stem}-weights")
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            logger.warning("%s cannot be written: %s", self.folder, error)
            return None
        return str(self.folder)

    def _write(self, path: Path, batch: StepBatch, fault: Fault) -> None:
        batch = batch.within(MAX_BYTES)
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in batch.tensors().items()}
        save_file(tensors, path.with_suffix(".safetensors"))
        text = json.dumps(self._description(batch, fault), indent=2, default=str)
        path.with_suffix(".json").write_text(text, encoding="utf-8")

    def _description(self, batch: StepBatch, fault: Fault) -> dict[str, Any]:
        trainer, args = self.trainer, self.trainer.args
        inherited = {field.name for field in fields(DPOConfig)} - set(_INHERITED_SETTINGS)
        settings = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in inherited}
        pairs = zip(batch.pair_index.tolist(), batch.level.timestep.tolist(), strict=True)
        # From this key come level, caption dropout, posterior sample and noise of a pair in training.
        key = [TRAIN_STREAM, args.seed, batch.epoch]
        is_keyed = fault.step > 0 and not isinstance(trainer.reference, BankedReference)
        return {
            "format": _FORMAT,
            "message": fault.message,
            "link": fault.link,
            "step": fault.step,
            "epoch": batch.epoch,
            "pairs": [
                {"pair_index": index, "timestep": time} | ({"key": [*key, index]} if is_keyed else {})
                for index, time in pairs
            ],
            "parameters_with_a_gradient_that_is_not_finite": list(fault.parameters[:_MAX_NAMES]),
            "trainer": type(trainer).__name__,
            "pipeline": type(trainer.adapter.pipeline).__name__,
            "model": getattr(trainer.adapter.pipeline.config, "_name_or_path", None),
            "reference": trainer.reference.description,
            "weights_are_those_of_the_step": fault.has_weights,
            "settings": settings,
        }

    def _write_weights(self, folder: Path) -> None:
        model = self.trainer.unwrapped_model
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        if isinstance(model, PeftModel) and not is_sharded(model) and trained <= MAX_BYTES:
            folder.mkdir(exist_ok=True)
            save_weights(self.trainer.adapter, model, str(folder))


def bounded(batches: Sequence[StepBatch], num_bytes: int = MAX_BYTES) -> list[StepBatch]:
    """The last of some micro-batches, at most so many bytes of them, and at least one."""
    kept, used = [], 0
    for batch in reversed(batches):
        used += batch.num_bytes
        if kept and used > num_bytes:
            break
        kept.append(batch)
    return kept[::-1]


@dataclass(frozen=True)
class Replay:
    """What a step gave when it was computed again.

    Attributes:
        broken: The first link that is not finite, by pair index, of the pairs that have one.
        parameters: Names of those whose gradient is not finite.
    """

    broken: dict[int, str]
    parameters: list[str]

    @property
    def is_finite(self) -> bool:
        """Whether it did not happen again."""
        return not self.broken and not self.parameters

    def __str__(self) -> str:
        if self.is_finite:
            return "All is finite: errors, loss and gradient."
        lines = [f"pair {pair}: {link} is the first that is not finite" for pair, link in self.broken.items()]
        lines += [f"gradient of {name}: not finite" for name in self.parameters]
        return "\n".join(lines)


def replay(path: str | Path, trainer: Any, checkpoint: str | Path | None = None) -> Replay:
    """Compute a step that was not finite again, forward and backward, and say where it breaks.

    Args:
        path: A `.safetensors` or `.json` file of a run's folder `_nonfinite`.
        trainer: Made as for the run, by which objective, precision and reference are the same. It is not trained; its
            weights become those of the step.
        checkpoint: Whose weights to use, a checkpoint of the run. `None`: those in the folder, if there are any; else
            the trainer's own.

    Raises:
        ConfigurationError: There is no such file, or it is damaged or of another version.
    """
    batch, description = load_reproduction(path)
    weights = Path(path).parent / f"{Path(path).name.split('-process-')[0]}-weights"
    # An earlier run in this folder may have left weights of a step of the same number.
    has_weights = description["weights_are_those_of_the_step"] and weights.is_dir()
    if checkpoint is not None or has_weights:
        load_weights(trainer.adapter, trainer.unwrapped_model, str(checkpoint or weights))
    device = trainer.accelerator.device
    batch = StepBatch.of_tensors({name: value.to(device) for name, value in batch.tensors().items()})
    known: dict[str, Any] = {}
    if isinstance(trainer.reference, BankedReference):
        known = {"ref_errors": batch.errors.reference, "ref_predictions": batch.ref_predictions}
    model = trainer.model.train(description["step"] > 0)  # in evaluation nothing is random
    errors = trainer.pair_errors(model, batch.pairs, batch.level, batch.noise, **known)
    loss, statistics = trainer.objective(errors, batch.level, batch.label)
    loss.mean().backward()
    broken = first_broken(batch.pairs, errors, loss, statistics.get("rewards/margins", loss))
    norms = gradient_norms(model)
    model.zero_grad()
    return Replay(
        {int(pair): LINKS[int(link) - 1] for pair, link in zip(batch.pair_index, broken, strict=True) if link > 0},
        [name for name, norm in norms.items() if not norm.isfinite()],
    )


def load_reproduction(path: str | Path) -> tuple[StepBatch, dict[str, Any]]:
    """What [`ReproductionWriter`] wrote: the micro-batch on the CPU, and the description.

    Raises:
        ConfigurationError: There is no such file, or it is damaged or of another version.
    """
    path = Path(path)
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        with safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigurationError(
            f"{path} is no reproduction: {error}. Give a .json or .safetensors file of the folder "
            f"{NONFINITE_FOLDER!r} of a run's `output_dir`."
        ) from error
    if description.get("format") != _FORMAT:
        raise ConfigurationError(
            f"{path} has format {description.get('format')!r}, and this version reads {_FORMAT}: use the version of "
            "trl_sipo that wrote it."
        )
    return StepBatch.of_tensors(tensors), description


def without_gradient(errors: PairErrors) -> PairErrors:
    """The same errors, detached from the graph, so that keeping them keeps no activations."""
    return PairErrors(**{name: error.detach() for name, error in errors.named().items()})
