# SPDX-License-Identifier: Apache-2.0
"""Reference errors computed once, on a fixed bank of (noise level, noise) draws per pair.

Draw k of a pair is a function of (seed, pair, k): its noise is made again from that seed when training comes to it, so
two floats per draw are all that is stored. The levels of a pair's draws follow a Kronecker sequence from an offset of
its own: any number of first draws covers the schedule evenly, so that a bank can grow.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import constants

from trl_sipo.core.noise_schedule import FlowSchedule, NoiseLevel, VPSchedule
from trl_sipo.core.timestep_sampling import time_quantile
from trl_sipo.data.preference_dataset import StreamingPreferenceDataset
from trl_sipo.data.seeding import seeded_generator
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.encoding import EVAL_STREAM, pair_generators
from trl_sipo.trainer.noise_levels import evaluation_levels, level_of_timesteps
from trl_sipo.trainer.processes import from_main
from trl_sipo.trainer.reference import AdapterReference, Reference
from trl_sipo.trainer.reference_errors import Bank, ReferenceErrors
from trl_sipo.trainer.reference_key import reference_key
from trl_sipo.trainer.reference_pass import add_errors
from trl_sipo.trainer.reference_predictions import (
    check_has_predictions,
    check_room,
    describe_cost,
    in_bytes,
    prediction_dtype,
    store_for,
)

# First word of the key of the bank's generators, beside those of training and evaluation.
BANK_STREAM = 2
_GOLDEN_RATIO = (5**0.5 - 1) / 2


class BankDraws:
    """The draws of a training bank.

    Args:
        args: The run's settings, of which the distribution of the levels is taken.
        schedule: The noise process.
    """

    is_training = True

    def __init__(self, args: DiffusionPreferenceConfig, schedule: VPSchedule | FlowSchedule):
        self.args = args
        self.schedule = schedule
        self.num_draws = args.num_ref_draws

    @property
    def key(self) -> dict[str, Any]:
        """The settings that the draws depend on."""
        names = (
            "seed", "timestep_sampling", "timestep_range", "logit_mean", "logit_std", "timesteps", "share_noise",
            "caption_dropout",
        )  # fmt: skip
        return {name: getattr(self.args, name) for name in names}

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


class EvaluationDraws:
    """The draws on which `evaluate` compares: the same levels for every pair, draw k the k-th of them.

    Args:
        args: The run's settings, of which the seed is taken.
        levels: One after the other, of shape ().
    """

    is_training = False

    def __init__(self, args: DiffusionPreferenceConfig, levels: Iterable[NoiseLevel]):
        self.seed = args.eval_noise_seed
        self.levels = list(levels)
        self.num_draws = len(self.levels)

    @property
    def key(self) -> dict[str, Any]:
        """What the draws depend on: the levels too, since another number means others, to which none can be added."""
        return {"eval_noise_seed": self.seed, "levels": [level.timestep.item() for level in self.levels]}

    def __call__(self, pair_index: torch.Tensor, draw: torch.Tensor) -> tuple[NoiseLevel, list[torch.Generator]]:
        """Levels (batch,) and generators of one draw, the same for all pairs; both arguments are (batch,) integers."""
        position = int(draw[0])
        generators = pair_generators(pair_index, EVAL_STREAM, self.seed, position)
        return self.levels[position].expand(len(pair_index)), generators


class BankedReference:
    """The reference of a run whose reference errors are all there: no pass, and no model.

    Args:
        train: Those of the training data.
        evaluation: The same by `id` of a prepared evaluation dataset, one draw per level.
        live: What the errors were computed with, where it costs nothing to keep it (a LoRA's base).
    """

    def __init__(self, train: ReferenceErrors, evaluation: dict[int, ReferenceErrors], live: Reference | None):
        self.train = train
        self.evaluation = evaluation
        self.live = live
        stored = "errors" if train.predictions is None else "errors and predictions"
        self.description = f"precomputed {stored} of {train.num_draws} draws per pair"

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


def lookup(errors: ReferenceErrors, pair_index: torch.Tensor, draw: torch.Tensor | int) -> dict[str, Any]:
    """What is known of the reference on one draw per pair, as arguments of `pair_errors`.

    `ref_errors` (chosen, rejected), (batch,) each, and where they are stored `ref_predictions`, (batch, ...) each.
    """
    known: dict[str, Any] = {"ref_errors": errors.look_up(pair_index, draw)}
    if errors.predictions is not None:
        known["ref_predictions"] = errors.predictions.read(pair_index, draw)
    return known


def training_draw(
    trainer: Any, pair_index: torch.Tensor, epoch: int
) -> tuple[NoiseLevel, list[torch.Generator], dict[str, Any]]:
    """Levels (batch,) and generators of the draws of some pairs in an epoch, and what is known of the reference there.

    Args:
        trainer: One whose reference is banked.
        pair_index: (batch,) integers, on the CPU.
        epoch: From 0.
    """
    draws = BankDraws(trainer.args, trainer.noise_schedule)
    draw = draws.choose(pair_index, epoch)
    level, generators = draws(pair_index, draw)
    return level.to(trainer.accelerator.device), generators, lookup(trainer.reference.train, pair_index, draw)


def check_precomputing(args: DiffusionPreferenceConfig, *, is_stream: bool, keeps_reference: bool) -> None:
    """Raise [`ConfigurationError`], before anything is loaded, when stored errors would be those of something else.

    Args:
        is_stream: Whether the training data is one.
        keeps_reference: Whether the reference costs nothing and stays (the base of a LoRA).
    """
    _check_predictions(args)
    if not args.precompute_ref_log_probs:
        return
    if is_stream and not args.dataloader_in_order:
        raise ConfigurationError(
            "`precompute_ref_log_probs=True` reads a stream before training, which must then come in the same order: "
            "leave `dataloader_in_order` on, or compute the reference live."
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


def _check_predictions(args: DiffusionPreferenceConfig) -> None:
    """Raise unless the predictions of a precomputed reference are stored where they are needed, and there alone."""
    if args.precompute_ref_predictions and not (args.precompute_ref_log_probs and args.proximal_kappa):
        raise ConfigurationError(
            "`precompute_ref_predictions=True` stores the reference's predictions for the proximal term of a "
            f"precomputed reference, but `proximal_kappa={args.proximal_kappa:g}` and `precompute_ref_log_probs="
            f"{args.precompute_ref_log_probs}`: nothing would read them. Set both, or remove it."
        )
    if args.precompute_ref_log_probs and args.proximal_kappa and not args.precompute_ref_predictions:
        raise ConfigurationError(
            f"`precompute_ref_log_probs=True` keeps the errors of the reference, but `proximal_kappa="
            f"{args.proximal_kappa:g}` needs its predictions. Compute the reference live, which costs no second model "
            "where a LoRA is trained; or store them too, with `precompute_ref_predictions=True`, which says what they "
            "take on the disk before anything is computed; or set `proximal_kappa=0`."
        )


def _check_is_the_same_each_time(dataset: Any, name: str) -> None:
    """Raise when a dataset that was made of rows beforehand reads them at random, which no setting tells."""
    transform, clip = getattr(dataset, "transform", None), getattr(dataset, "clip", None)
    if (transform is not None and transform.is_random) or (clip is not None and clip.random_start):
        raise ConfigurationError(
            f"`precompute_ref_log_probs=True` computes the reference once, but the {name} dataset has a random crop, "
            "flip or start, and each epoch would show it something else. Make it with "
            "`PairedTransform(..., center_crop=True, random_flip=False)` and `ClipSampler(..., random_start=False)`."
        )


@dataclass(frozen=True)
class _Part:
    """A dataset of a trainer, by what its errors are computed and kept."""

    name: str
    dataset: Any
    draws: BankDraws | EvaluationDraws
    bank: Bank

    @property
    def is_stream(self) -> bool:
        return isinstance(self.dataset, StreamingPreferenceDataset)

    def num_missing(self) -> int:
        """Draws that are not known, of all pairs together; not for streams, whose pairs are not known either."""
        return int(self.bank.num_missing(torch.arange(len(self.dataset)), self.draws.num_draws).sum())


def precompute_reference(trainer: Any) -> Reference:
    """A trainer's live reference, or the errors that it makes on its datasets, if they are to be precomputed."""
    args, live = trainer.args, trainer.reference
    if not args.precompute_ref_log_probs:
        return live
    draws = EvaluationDraws(args, evaluation_levels(trainer.adapter, trainer.noise_schedule, args).values())
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    held_out = {name: dataset for name, dataset in held_out.items() if dataset is not None}
    for name, dataset in {"train": trainer.train_dataset, **held_out}.items():
        _check_is_the_same_each_time(dataset, name)
        if args.precompute_ref_predictions:
            check_has_predictions(dataset, name)
    key = reference_key(trainer)
    banks: dict[Path, Bank] = {}
    train = _open_part(trainer, trainer.train_dataset, "train", key, BankDraws(args, trainer.noise_schedule), banks)
    evaluation = [_open_part(trainer, dataset, name, key, draws, banks) for name, dataset in held_out.items()]
    if args.precompute_ref_predictions:
        _make_room(trainer, [train, *evaluation])
    errors = _errors_of(trainer, train)
    found = {id(part.dataset): _errors_of(trainer, part) for part in evaluation}
    return BankedReference(errors, found, live if isinstance(live, AdapterReference) else None)


def _open_part(
    trainer: Any,
    dataset: Any,
    name: str,
    key: dict[str, Any],
    draws: BankDraws | EvaluationDraws,
    banks: dict[Path, Bank],
) -> _Part:
    """What the file of a dataset has. Errors whose predictions are stored have a file of their own.

    Args:
        banks: Those that are open, to which this one is added: one dataset may have several names.
    """
    key = {**key, **draws.key, "dataset": dataset.fingerprint, "is_training": draws.is_training}
    if trainer.args.precompute_ref_predictions:
        key["predictions"] = str(prediction_dtype(trainer))
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = reference_folder() / f"{digest}.safetensors"
    store = store_for(trainer, dataset, path) if trainer.args.precompute_ref_predictions else None
    if path not in banks:
        bank = banks[path] = Bank(path, key, is_written=trainer.is_world_process_zero(), predictions=store)
        # What one process has read, since another may see another file, or none.
        (bank.errors,) = broadcast_object_list([bank.errors])
    return _Part(name, dataset, draws, banks[path])


def _make_room(trainer: Any, parts: Sequence[_Part]) -> None:
    """Say what the predictions take on the disk, and refuse what it has no room for, before anything is computed."""
    parts = list({part.bank.path: part for part in parts}.values())
    stores = [(part, part.bank.predictions) for part in parts if part.bank.predictions is not None]
    total = sum(store.num_bytes(part.draws.num_draws) for part, store in stores)
    lacking = [(part, store, number) for part, store in stores if (number := part.num_missing())]
    missing = sum(number * store.row_bytes for _, store, number in lacking)
    costs = [f"  {describe_cost(part.name, store, part.draws.num_draws)}" for part, store in stores]
    heading = f"Predictions of the reference on disk: {in_bytes(total)}, of which {in_bytes(missing)} are missing"
    trainer.accelerator.print("\n".join([heading, *costs]))

    def make() -> None:
        check_room(reference_folder(), missing)
        for part, store, _ in lacking:  # what is whole may lie in a folder that is not ours to write
            part.bank.check_is_writable()
            store.make(part.draws.num_draws)

    from_main(make)
    unseen = [str(store.folder) for part, store in stores if not store.is_whole(part.draws.num_draws)]
    if unseen:
        raise ConfigurationError(
            f"`precompute_ref_predictions=True` keeps the predictions in {unseen[0]!r}, which the main process has "
            f"made and process {trainer.accelerator.process_index} does not see. Set HF_HOME to a folder that all "
            "processes share, or compute the reference live."
        )


def _errors_of(trainer: Any, part: _Part) -> ReferenceErrors:
    """The errors of a dataset: what its file has, and the rest computed and added to it. Says where they are."""
    args, bank, draws, is_stream = trainer.args, part.bank, part.draws, part.is_stream
    num_pairs, num_before = 0 if is_stream else len(part.dataset), bank.num_added
    if is_stream or part.num_missing():
        num_batches = args.max_steps * args.gradient_accumulation_steps if is_stream and draws.is_training else None
        num_read = add_errors(trainer, part.dataset, bank, draws, part.name, num_batches)
        num_pairs = num_read if is_stream else num_pairs
    num_added = bank.num_added - num_before
    computed = f"{num_added} pairs computed" if num_added else "all found"
    trainer.accelerator.print(
        f"Reference of the {part.name} dataset: {draws.num_draws} draws of {num_pairs} pairs, {computed}: {bank.path}"
    )
    return bank.errors.first(draws.num_draws, bank.predictions)


def reference_folder() -> Path:
    """Where banks are kept: the folder `trl_sipo_reference` of `HF_HOME`."""
    return Path(constants.HF_HOME) / "trl_sipo_reference"
