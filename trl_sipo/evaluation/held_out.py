# SPDX-License-Identifier: Apache-2.0
"""What models implicitly prefer of held-out pairs: their errors on both arms, by noise level, by forward passes only.

One model is measured at a time, on the levels and the noise of `trainer.evaluate()`; the comparison of a candidate
with its base is arithmetic on two tables of errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.beta import to_diffusion_dpo_beta
from trl_sipo.data.cache.dataset import CachedPairs
from trl_sipo.data.collator import DataCollatorForDiffusionPreference
from trl_sipo.errors import ConfigurationError, DatasetError, NumericalError
from trl_sipo.evaluation.statistics import Interval, by_cluster, clustered_interval
from trl_sipo.generation.processes import process_state
from trl_sipo.trainer.arms import arm_errors, noised_arm
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.encoding import EVAL_STREAM, PairEncoder, draw_pair_noise, pair_generators
from trl_sipo.trainer.noise_levels import evaluation_levels, training_schedule
from trl_sipo.trainer.preference_data import as_tensors


@dataclass(frozen=True)
class HeldOutErrors:
    """Mean squared errors of one model on held-out pairs.

    Attributes:
        times: (levels,) of the schedule, 0 is clean, 1 pure noise.
        prompts: (pairs,); judgements on one prompt are not taken for independent.
        chosen, rejected: (levels, pairs) float32, in the denoiser's output space.
    """

    times: tuple[float, ...]
    prompts: tuple[str, ...]
    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class ImplicitPreference:
    """How a candidate's implicit reward ranks held-out pairs, at one time or over all of them.

    Attributes:
        time: Of the noise level; None: the mean over all.
        accuracy: Share of pairs with a positive margin; a tie counts one half.
        margin: `beta * (chosen_logratio - rejected_logratio)`.
        chosen_drift: Error on the chosen arm relative to the base's, minus 1, as `drift/chosen_error` in training:
            above 0 the candidate has forgotten what was preferred.
        rejected_drift: The same of the rejected arm.
    """

    time: float | None
    accuracy: Interval
    margin: Interval
    chosen_drift: Interval
    rejected_drift: Interval


@torch.no_grad()
def held_out_errors(
    adapter: BackboneAdapter,
    rows: Any,
    args: DiffusionPreferenceConfig,
    *,
    max_pairs: int | None = None,
    is_known_to_fit: bool = False,
    show_progress: bool = True,
) -> HeldOutErrors:
    """A model's errors on every pair; every process of the run must call it, and takes its share.

    Pairs that are labelled as ties are left out, also of a cache that has them.

    Args:
        adapter: Of the model as it is to be measured, its LoRA on.
        rows: A preference dataset, as [`load_preference_dataset`] gives it.
        args: Resolution, frames, number of noise levels and their seed, as for `trainer.evaluate()`.
        max_pairs: Take the first ones only.
        is_known_to_fit: An encoded cache was held against a model with the same encoders, and is not again: the files
            of a checkpoint are not those of the model that it was tuned from.

    Raises:
        DatasetError: No pairs, or such as the model does not take.
        NumericalError: An error that is not finite.
    """
    size = args.size or adapter.default_size
    is_checked = is_known_to_fit and isinstance(rows, CachedPairs)
    pairs = rows if is_checked else as_tensors(rows, adapter, args, size, "held-out")
    if not hasattr(pairs, "__len__") or not len(pairs):
        raise DatasetError("The held-out pairs are a stream, or there are none: give a dataset with some.")
    levels = evaluation_levels(adapter, training_schedule(adapter, args, size), args)
    encode = PairEncoder(adapter, sample_posterior=False, caption_dropout=0.0)
    collate, device, state = DataCollatorForDiffusionPreference(), adapter.pipeline.device, process_state()
    share = range(len(pairs))[:max_pairs][state.process_index :: state.num_processes]
    denoiser, found = adapter.denoiser, []
    was_training = denoiser.training
    denoiser.eval()
    is_shown = show_progress and state.is_main_process
    for number in tqdm(share, desc="Held-out pairs", disable=not is_shown):
        pair = pairs[number]
        if pair.get("label") == 0.5:
            continue
        inputs = collate([pair])
        encoded = encode(inputs, device, [], training=False)
        errors = [_errors(adapter, encoded, level, inputs, args, place) for place, level in enumerate(levels.values())]
        found.append((number, inputs["prompt"][0], torch.stack(errors).cpu()))
    denoiser.train(was_training)
    rows_of_all = sorted(gather_object(found), key=lambda row: row[0])
    if not rows_of_all:
        raise DatasetError("All held-out pairs are ties, which prefer nothing.")
    both = torch.stack([errors for _, _, errors in rows_of_all], dim=-1)  # (levels, 2, pairs)
    broken = (~both.isfinite()).any(0).any(0).nonzero()
    if len(broken):
        number = rows_of_all[int(broken[0])][0]
        raise NumericalError(f"The model's error on held-out pair {number} is not finite: try another dtype.")
    return HeldOutErrors(tuple(levels), tuple(prompt for _, prompt, _ in rows_of_all), both[:, 0], both[:, 1])


def _errors(
    adapter: BackboneAdapter, encoded: Any, level: Any, inputs: dict, args: DiffusionPreferenceConfig, place: int
) -> Tensor:
    """(2,) errors on the chosen and the rejected arm, on the noise that `trainer.evaluate()` gives the pair."""
    generators = pair_generators(inputs["pair_index"], EVAL_STREAM, args.eval_noise_seed, place)
    noise = draw_pair_noise(encoded, generators, share=True)
    told = {"guidance_scale": args.embedded_guidance_scale, "frame_rate": args.frame_rate}
    if encoded.frame_rate is not None:
        told["frame_rate"] = encoded.frame_rate
    extra = {name: value for name, value in told.items() if value is not None}
    level = level.expand(1).to(adapter.pipeline.device)
    arms = [
        noised_arm(latents, arm_noise, level, encoded.conditioning, extra, adapter.prediction_type)
        for latents, arm_noise in zip((encoded.chosen_latents, encoded.rejected_latents), noise, strict=True)
    ]
    return torch.cat(arm_errors(adapter, adapter.denoiser, *arms))


def implicit_preferences(
    base: HeldOutErrors, candidate: HeldOutErrors, *, beta: float, level: float = 0.95, num_resamples: int = 2000
) -> list[ImplicitPreference]:
    """The candidate's preferences at each time, and over all times last.

    Args:
        base: Errors of the model that the candidate was tuned from.
        beta: In the Diffusion-DPO convention; it scales margins, and changes no accuracy.
        level: Of the intervals.

    Raises:
        ConfigurationError: Tables of different pairs or times.
    """
    if base.times != candidate.times or base.prompts != candidate.prompts:
        raise ConfigurationError("Base and candidate were measured on different pairs or noise levels.")
    beta = to_diffusion_dpo_beta(beta, "diffusion_dpo", latent_dims=1)
    chosen, rejected = candidate.chosen - base.chosen, candidate.rejected - base.rejected
    margin = beta * (rejected - chosen) / 2
    accuracy = (margin.sign() + 1) / 2
    tables = (accuracy, margin, candidate.chosen / base.chosen - 1, candidate.rejected / base.rejected - 1)
    options = {"level": level, "num_resamples": num_resamples}
    rows = [
        ImplicitPreference(time, *_intervals([table[place] for table in tables], base.prompts, options))
        for place, time in enumerate(base.times)
    ]
    return [*rows, ImplicitPreference(None, *_intervals([table.mean(0) for table in tables], base.prompts, options))]


def _intervals(columns: Sequence[Tensor], prompts: Sequence[str], options: dict[str, Any]) -> list[Interval]:
    bounds = [(0.0, 1.0), *[(-float("inf"), float("inf"))] * 3]
    return [
        clustered_interval(by_cluster(column.tolist(), prompts), bounds=bound, **options)
        for column, bound in zip(columns, bounds, strict=True)
    ]
