# SPDX-License-Identifier: Apache-2.0
"""One pass of the reference over a dataset: each pair is read and encoded once, for all of its draws."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.parameterization import prediction_error
from trl_sipo.data.preference_dataset import StreamingPreferenceDataset
from trl_sipo.errors import NumericalError
from trl_sipo.trainer.arms import NoisedArm, arm_errors, arm_prediction
from trl_sipo.trainer.encoding import EncodedPairs, draw_pair_noise, pair_numbers
from trl_sipo.trainer.reference_errors import Bank
from trl_sipo.trainer.reference_predictions import PredictionStore

_MAX_NAMED = 8


class Draws(Protocol):
    """Draws of noise level and noise that are fixed beforehand."""

    num_draws: int
    is_training: bool

    def __call__(self, pair_index: torch.Tensor, draw: torch.Tensor) -> tuple[NoiseLevel, list[torch.Generator]]:
        """Levels (batch,) and generators of one draw per pair; both arguments are (batch,) integers."""


class ApartFromKnown:
    """Collates the pairs of a stream that came with their media; the others are counted.

    Args:
        collate: What makes a batch of pairs.
    """

    def __init__(self, collate: Callable[[list[dict]], dict]):
        self.collate = collate

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        """The batch of the pairs, if there are any, and `num_known`, how many others there were."""
        pairs = [item for item in items if item.keys() != {"pair_index"}]
        return {**(self.collate(pairs) if pairs else {}), "num_known": len(items) - len(pairs)}


def add_errors(trainer: Any, dataset: Any, bank: Bank, draws: Draws, name: str, max_batches: int | None) -> int:
    """Add to a bank what it lacks of a dataset; returns the number of pairs that were read of a stream.

    What was computed is written from time to time, and when the pass is interrupted: the next one goes on from there.
    Every process ends with all errors. The global random state is left as it was.

    Args:
        dataset: As a trainer has it.
        name: What the progress bar calls it.
        max_batches: Of a stream, how many batches of each process to read; `None`: all there are.
    """
    bank.check_is_writable()
    accelerator, args = trainer.accelerator, trainer.args
    loader = accelerator.prepare(_loader(trainer, dataset, bank, draws))
    total = max_batches if isinstance(dataset, StreamingPreferenceDataset) else len(loader)
    quiet = args.disable_tqdm or not trainer.is_world_process_zero()
    batches = islice(loader, max_batches)
    progress = tqdm(batches, total=total, desc=f"Reference of the {name} dataset", unit="batch", disable=quiet)
    num_pairs, device = 0, accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for inputs in progress:
                for ids, errors, num_known in gather_object([_batch_errors(trainer, inputs, bank, draws)]):
                    _check_finite(ids, errors)
                    bank.add(ids, errors)
                    num_pairs += len(ids) + num_known
        finally:
            bank.save()
            progress.close()
            loader.end()  # a stream goes on after the last batch that is read
            accelerator._dataloaders.remove(loader)  # else checkpoints would keep its state
    return num_pairs


def _loader(trainer: Any, dataset: Any, bank: Bank, draws: Draws) -> DataLoader:
    """Of the pairs that lack draws; a stream gives them in the batches and the order of the first epoch of training.

    Of the pairs of a stream that lack none, it gives the numbers alone.
    """
    args, collate = trainer.args, trainer.data_collator
    batch_size = batch_size_of(args)
    if isinstance(dataset, StreamingPreferenceDataset):
        is_known = bank.errors.num_known(bank.errors.ids) >= draws.num_draws
        dataset = dataset.without_media_of(bank.errors.ids[is_known].numpy())
        dataset.set_epoch(0)
        collate = ApartFromKnown(collate)
        batch_size = args.train_batch_size if draws.is_training else args.eval_batch_size
    else:
        missing = bank.num_missing(torch.arange(len(dataset)), draws.num_draws)
        dataset = Subset(dataset, missing.nonzero().flatten().tolist())
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def batch_size_of(args: Any) -> int:
    """How many pairs pass the reference at a time, at most."""
    return args.precompute_ref_batch_size or args.per_device_eval_batch_size


@torch.no_grad()
def _batch_errors(trainer: Any, inputs: dict, bank: Bank, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of the pairs of a batch: indices (n,), errors (n, draws, 2) with NaN where they are known, and `num_known`.

    Errors that are no finite numbers are infinite. Where predictions are kept too, they are written by then.
    """
    num_known = inputs.pop("num_known", 0)
    if not inputs:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, draws.num_draws, 2), num_known
    pair_index = pair_numbers(inputs)
    errors = torch.full((len(pair_index), draws.num_draws, 2), float("nan"))
    num_missing = bank.num_missing(pair_index, draws.num_draws)
    if bank.predictions is not None:
        num_missing = num_missing.masked_fill(_are_of_others(pair_index), 0)
    for rows, missing in _parts(num_missing, batch_size_of(trainer.args)):
        part = _rows_of(inputs, rows)
        part = trainer._encoder.encoded_once(part, trainer.accelerator.device)
        for draw in range(draws.num_draws - missing, draws.num_draws):
            if bank.predictions is None:
                found = _draw_errors(trainer, part, draw, draws).float().cpu()
            else:
                found = _keep_draw(trainer, part, draw, draws, bank.predictions).float().cpu()
            errors[rows, draw] = found.where(found.isfinite(), torch.inf)
    return pair_index, errors, num_known


def _are_of_others(pair_index: torch.Tensor) -> torch.Tensor:
    """Which pairs an earlier process has in its batch too, (batch,) bool: of two that write a row, one could tear it.

    So a loader fills the last batch up, where the pairs do not divide among the processes.
    """
    earlier = gather_object([pair_index])[: PartialState().process_index]
    return torch.isin(pair_index, torch.cat(earlier)) if earlier else torch.zeros_like(pair_index, dtype=torch.bool)


def _parts(num_missing: torch.Tensor, size: int) -> Iterator[tuple[list[int], int]]:
    """The rows that lack draws, in parts of at most `size` that lack equally many: (rows, how many they lack)."""
    alike = defaultdict(list)
    for row, number in enumerate(num_missing.tolist()):
        if number:
            alike[number].append(row)
    for number, rows in alike.items():
        for start in range(0, len(rows), size):
            yield rows[start : start + size], number


def _rows_of(inputs: dict, rows: list[int]) -> dict:
    """Some rows of a batch; all of them are the batch."""
    if len(rows) == len(inputs["pair_index"]):
        return inputs
    return {
        name: value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]
        for name, value in inputs.items()
    }


def _draw_errors(trainer: Any, inputs: dict, draw: int, draws: Draws) -> torch.Tensor:
    """Errors (batch, 2) of one draw of pairs that are encoded."""
    arms = _arms_of_draw(trainer, inputs, draw, draws)
    with trainer.accelerator.autocast(), trainer.reference.active(trainer.model, trainer.unwrapped_model) as ref_model:
        return torch.stack(arm_errors(trainer.adapter, ref_model, *arms), dim=1)


def _keep_draw(trainer: Any, inputs: dict, draw: int, draws: Draws, store: PredictionStore) -> torch.Tensor:
    """The same; the predictions that the errors are computed from are written."""
    arms = _arms_of_draw(trainer, inputs, draw, draws)
    with trainer.accelerator.autocast(), trainer.reference.active(trainer.model, trainer.unwrapped_model) as ref_model:
        predictions = arm_errors(trainer.adapter, ref_model, *arms, measure=arm_prediction)
    store.write(pair_numbers(inputs), draw, predictions)
    errors = [prediction_error(one, arm.target) for one, arm in zip(predictions, arms, strict=True)]
    return torch.stack(errors, dim=1)


def _arms_of_draw(trainer: Any, inputs: dict, draw: int, draws: Draws) -> list[NoisedArm]:
    """The arms at the noise levels of one draw."""
    pair_index, accelerator = pair_numbers(inputs), trainer.accelerator
    level, generators = draws(pair_index, torch.full((len(pair_index),), draw))
    pairs: EncodedPairs = trainer._encoder(inputs, accelerator.device, generators, training=draws.is_training)
    noise = draw_pair_noise(pairs, generators, share=trainer.args.share_noise or not draws.is_training)
    return trainer.noised_arms(pairs, level.to(accelerator.device), noise)


def _check_finite(ids: torch.Tensor, errors: torch.Tensor) -> None:
    """In every process alike, so that none waits for one that has ended."""
    bad = errors.isinf().any(dim=2)
    if bad.any():
        pairs = ids[bad.any(dim=1)].tolist()
        more = " ..." if len(pairs) > _MAX_NAMED else ""
        raise NumericalError(
            f"The reference errors of the pairs {pairs[:_MAX_NAMED]}{more} are not finite in draw "
            f"{int(bad.any(dim=0).nonzero()[0])}. Look at their latents; in float16, use bf16."
        )
