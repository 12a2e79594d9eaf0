# SPDX-License-Identifier: Apache-2.0
"""Reference errors computed once, on a fixed bank of (noise level, noise) draws per pair.

Draw k of a pair is a function of (seed, pair, k): its noise is made again from that seed when training comes to it, so
two floats per draw are all that is stored. The levels of a pair's draws follow a Kronecker sequence from an offset of
its own: any number of first draws covers the schedule evenly, so that a bank can grow.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
from trl_sipo.core.timestep_sampling import time_quantile
from trl_sipo.data.seeding import seeded_generator
from trl_sipo.errors import ConfigurationError, NumericalError
from trl_sipo.trainer.arms import arm_errors
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.encoding import EVAL_STREAM, draw_pair_noise, pair_generators
from trl_sipo.trainer.noise_levels import evaluation_levels, level_of_timesteps
from trl_sipo.trainer.reference import AdapterReference, Reference

# First word of the key of the bank's generators, beside those of training and evaluation.
BANK_STREAM = 2
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_FORMAT = 1
_SAMPLED_VALUES = 64

# (pair indices, draw) -> levels, and one generator per pair
Draw = Callable[[torch.Tensor, int], tuple[NoiseLevel, list[torch.Generator]]]


class BankDraws:
    """The draws of a training bank.

    Args:
        args: The run's settings, of which the distribution of the levels is taken.
        schedule: The noise process.
    """

    def __init__(self, args: DiffusionPreferenceConfig, schedule: VPSchedule | FlowSchedule):
        self.args = args
        self.schedule = schedule

    def __call__(self, pair_index: torch.Tensor, draw: torch.Tensor) -> tuple[NoiseLevel, list[torch.Generator]]:
        """Levels (batch,) and generators of one draw per pair; both arguments are (batch,) integers."""
        seed = self.args.seed
        keys = list(zip(pair_index.tolist(), draw.tolist(), strict=True))
        offsets = [torch.rand((), generator=seeded_generator(BANK_STREAM, seed, pair)).item() for pair, _ in keys]
        quantiles = [(offset + k * _GOLDEN_RATIO) % 1.0 for offset, (_, k) in zip(offsets, keys, strict=True)]
        generators = [seeded_generator(BANK_STREAM, seed, pair, k) for pair, k in keys]
        return self._levels(torch.tensor(quantiles)), generators

    def choose(self, pair_index: torch.Tensor, epoch: int) -> torch.Tensor:
        """The draw of each pair in this epoch, (batch,): all of a pair's draws come once in `num_ref_draws` epochs."""
        round_number, place = divmod(epoch, self.args.num_ref_draws)
        orders = [
            torch.randperm(self.args.num_ref_draws, generator=seeded_generator(BANK_STREAM, self.args.seed, p, -1 - r))
            for p, r in ((pair, round_number) for pair in pair_index.tolist())
        ]
        return torch.stack([order[place] for order in orders])

    def _levels(self, quantiles: torch.Tensor) -> NoiseLevel:
        args = self.args
        if args.timesteps is not None:
            index = (quantiles * len(args.timesteps)).long().clamp(max=len(args.timesteps) - 1)
            return level_of_timesteps(self.schedule, torch.tensor(args.timesteps)[index])
        time = time_quantile(args.timestep_sampling, quantiles, mean=args.logit_mean, std=args.logit_std)
        low, high = args.timestep_range
        return self.schedule.level_at(low + (high - low) * time)


class BankedReference:
    """The reference of a run whose reference errors are all there: no pass, and no model.

    Args:
        train: (pairs, draws, 2) float32, chosen and rejected errors.
        evaluation: The same by `id` of a prepared evaluation dataset, one draw per level.
        live: What the errors were computed with, where it costs nothing to keep it (a LoRA's base).
    """

    def __init__(self, train: torch.Tensor, evaluation: dict[int, torch.Tensor], live: Reference | None):
        self.train = train
        self.evaluation = evaluation
        self.live = live
        self.description = f"precomputed errors of {train.shape[1]} draws per pair"

    def active(self, model: torch.nn.Module, unwrapped: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Lend the reference model, for what was not precomputed: sample grids, and other datasets.

        Raises:
            ConfigurationError: It is not kept (full fine-tuning).
        """
        if self.live is None:
            raise ConfigurationError(
                "`precompute_ref_log_probs=True` keeps no reference model, but one is needed for data that was not "
                "given to the trainer as `train_dataset` or `eval_dataset`. Give it there, or train a LoRA, whose "
                "reference costs nothing."
            )
        return self.live.active(model, unwrapped)


def lookup(errors: torch.Tensor, pair_index: torch.Tensor, draw: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
    """Reference errors (chosen, rejected), (batch,) each, of one draw per pair."""
    return errors[pair_index.cpu(), draw].unbind(dim=1)


def check_precomputing(args: DiffusionPreferenceConfig, *, is_stream: bool, keeps_reference: bool) -> None:
    """Raise [`ConfigurationError`], before anything is loaded, when stored errors would be those of something else.

    Args:
        is_stream: Whether the training data is one.
        keeps_reference: Whether the reference costs nothing and stays (the base of a LoRA).
    """
    if not args.precompute_ref_log_probs:
        return
    if is_stream:
        raise ConfigurationError(
            "`precompute_ref_log_probs=True` numbers the pairs, which a stream does not allow. Download the dataset, "
            "or compute the reference live."
        )
    if args.random_encoding_settings():
        raise ConfigurationError(
            f"`precompute_ref_log_probs=True` computes the reference once, which contradicts "
            f"{', '.join(args.random_encoding_settings())}: each epoch would show it something else."
        )
    if args.sync_ref_model:
        raise ConfigurationError(
            "`precompute_ref_log_probs=True` contradicts `sync_ref_model=True`, which moves the reference."
        )
    if args.sample_every_steps and not keeps_reference:
        raise ConfigurationError(
            "`precompute_ref_log_probs=True` keeps no reference model in full fine-tuning, beside which sample grids "
            "would show the current one. Set `sample_every_steps=0`, or compute the reference live."
        )


def precompute_reference(trainer: Any) -> Reference:
    """A trainer's live reference, or the errors that it makes on its datasets, if they are to be precomputed."""
    args, live = trainer.args, trainer.reference
    if not args.precompute_ref_log_probs:
        return live
    draws = BankDraws(args, trainer.noise_schedule)
    key = _key(trainer)
    train = _bank(trainer, trainer.train_dataset, "train", key, args.num_ref_draws, draws)
    evaluation = {}
    levels = list(evaluation_levels(trainer.adapter, trainer.noise_schedule, args).values())

    def at_level(pair_index: torch.Tensor, draw: torch.Tensor) -> tuple[NoiseLevel, list[torch.Generator]]:
        position = int(draw[0])
        generators = pair_generators(pair_index, EVAL_STREAM, args.eval_noise_seed, position)
        return levels[position].expand(len(pair_index)), generators

    datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    for name, dataset in datasets.items():
        if dataset is not None:
            evaluation[id(dataset)] = _bank(trainer, dataset, name, key, len(levels), at_level)
    return BankedReference(train, evaluation, live if isinstance(live, AdapterReference) else None)


def _bank(trainer: Any, dataset: Any, name: str, key: dict[str, Any], num_draws: int, draws: Callable) -> torch.Tensor:
    """(pairs, num_draws, 2): what the file has, and the rest computed and added to it."""
    is_training = isinstance(draws, BankDraws)
    key = {**key, "dataset": dataset.fingerprint, "is_training": is_training}
    if not is_training:
        key["num_levels"] = num_draws  # another number means other levels, to which none can be added
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = reference_folder() / f"{digest}.safetensors"
    known = _read(path, len(dataset))
    if known.shape[1] < num_draws:
        new = [
            _measure(trainer, dataset, draw, draws, f"Reference of the {name} dataset, draw {draw + 1}/{num_draws}")
            for draw in range(known.shape[1], num_draws)
        ]
        known = torch.cat([known, torch.stack(new, dim=1)], dim=1)
        if trainer.is_world_process_zero():
            _write(path, known, key)
    return known[:, :num_draws].contiguous()


@torch.no_grad()
def _measure(trainer: Any, dataset: Any, draw: int, draws: Callable, description: str) -> torch.Tensor:
    """Reference errors (pairs, 2) of one draw of every pair; every process gets all of them."""
    args, accelerator = trainer.args, trainer.accelerator
    is_training = isinstance(draws, BankDraws)
    loader = accelerator.prepare(
        DataLoader(
            dataset,
            batch_size=args.precompute_ref_batch_size or args.per_device_eval_batch_size,
            collate_fn=trainer.data_collator,
            num_workers=args.dataloader_num_workers,
        )
    )
    errors = torch.full((len(dataset), 2), float("nan"))
    for inputs in tqdm(loader, desc=description, disable=args.disable_tqdm or not trainer.is_world_process_zero()):
        pair_index = inputs["pair_index"]
        level, generators = draws(pair_index.cpu(), torch.full((len(pair_index),), draw))
        pairs = trainer._encoder(inputs, accelerator.device, generators, training=is_training)
        noise = draw_pair_noise(pairs, generators, share=args.share_noise or not is_training)
        arms = trainer.noised_arms(pairs, level.to(accelerator.device), noise)
        with (
            accelerator.autocast(),
            trainer.reference.active(trainer.model, trainer.unwrapped_model) as ref_model,
        ):
            found = torch.stack(arm_errors(trainer.adapter, ref_model, *arms), dim=1)
        index, found = accelerator.gather_for_metrics((pair_index, found))
        errors[index.cpu()] = found.float().cpu()
    accelerator._dataloaders.remove(loader)  # else checkpoints would keep its state
    if not errors.isfinite().all():
        bad = (~errors.isfinite()).any(dim=1).nonzero().flatten().tolist()
        more = " ..." if len(bad) > 8 else ""
        raise NumericalError(
            f"The reference errors of the pairs {bad[:8]}{more} are not finite in draw {draw}. Look at their latents; "
            "in float16, use bf16."
        )
    return errors


def reference_folder() -> Path:
    """Where banks are kept: the folder `trl_sipo_reference` of `HF_HOME`."""
    return Path(constants.HF_HOME) / "trl_sipo_reference"


def _read(path: Path, num_pairs: int) -> torch.Tensor:
    empty = torch.empty(num_pairs, 0, 2)
    if not path.is_file():
        return empty
    try:
        with safe_open(path, framework="pt") as file:
            errors = file.get_tensor("errors")
    except (SafetensorError, OSError):
        return empty  # computed anew, and written over
    return errors if errors.shape[0] == num_pairs else empty


def _write(path: Path, errors: torch.Tensor, key: dict[str, Any]) -> None:
    """Whole or not at all: a run killed here leaves the earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"errors": errors.contiguous()}, temporary, metadata={"key": json.dumps(key, sort_keys=True)})
    os.replace(temporary, path)


def _key(trainer: Any) -> dict[str, Any]:
    """All that the reference errors depend on, but for the pairs and the number of draws."""
    args, schedule = trainer.args, trainer.noise_schedule
    names = (
        "seed", "timestep_sampling", "timestep_range", "logit_mean", "logit_std", "timesteps", "share_noise",
        "caption_dropout", "embedded_guidance_scale", "frame_rate", "num_frames", "eval_noise_seed", "bf16", "fp16",
    )  # fmt: skip
    process = (
        {"shift": schedule.drawn_shift, "scale": schedule.timestep_scale}
        if isinstance(schedule, FlowSchedule)
        else {"alphas_cumprod": hashlib.blake2b(schedule.alphas_cumprod.numpy().tobytes()).hexdigest()}
    )
    return {
        "format": _FORMAT,
        "pipeline": type(trainer.adapter.pipeline).__name__,
        "prediction_type": trainer.adapter.prediction_type,
        "weights": _hash_of_reference(trainer),
        "encoders": _hash_of_encoders(trainer.adapter),
        "size": list(trainer.size),
        "process": process,
        **{name: getattr(args, name) for name in names},
    }


def _hash_of_reference(trainer: Any) -> str:
    """Of the weights that the reference is made of: without the LoRA in training, with the frozen one, if any."""
    digest = hashlib.blake2b(digest_size=16)
    ref_model = getattr(trainer.reference, "ref_model", None) or trainer.unwrapped_model
    name_of_reference = getattr(trainer.reference, "adapter_name", None)
    for name, parameter in sorted(trainer.accelerator.unwrap_model(ref_model).named_parameters()):
        if "lora_" in name and (name_of_reference is None or f".{name_of_reference}." not in name):
            continue
        # As it is called without PEFT around it: which layers a new LoRA adapts is no part of its reference.
        digest.update(name.removeprefix("base_model.model.").replace(".base_layer.", ".").encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_of_encoders(adapter: BackboneAdapter) -> str:
    """Of the beginning of every weight of the VAE and the text encoders, on which latents and conditioning depend."""
    digest = hashlib.blake2b(digest_size=16)
    for module in adapter.frozen_modules():
        for name, parameter in module.named_parameters():
            beginning = parameter.detach().flatten()[:_SAMPLED_VALUES].float().cpu()
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(beginning.numpy())
    return digest.hexdigest()
