# SPDX-License-Identifier: Apache-2.0
"""One training step for every diffusion preference objective. Nothing method-specific lives here.

The step, for a batch of pairs concatenated as [chosen; rejected]:

    level, noise  ->  noisy latents, target            (one level per pair, one noise per pair)
    reference     ->  ref_error                        (no gradient, first)
    policy        ->  error                            (mean squared error per image, float32)
    logratio      =   (ref_error - error) / 2
    logit         =   beta * (chosen_logratio - rejected_logratio)
    loss          =   compute_pair_loss(logit, weight, keep)  +  proximal_term(distances)

What a method changes, it changes in one of the hooks: `sample_noise_levels`, `compute_importance_weights`,
`clip_importance_weights`, `mask_timesteps`, `compute_pair_loss`, `proximal_term`. One without pairs or without a
reference, which its configuration says, has samples of one arm, no `ref_error`, and a `pair_loss` of its own.
"""

import math
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import EvalPrediction

from trl_sipo.core.beta import describe_beta, to_diffusion_dpo_beta
from trl_sipo.core.importance import log_importance_weight, pair_log_weight
from trl_sipo.core.noise_schedule import NoiseLevel
from trl_sipo.core.objectives._preference_nll import preference_logit
from trl_sipo.core.objectives.proximal import proximal_penalty
from trl_sipo.core.objectives.soft_label import soft_label_loss
from trl_sipo.core.transition import rho_squared
from trl_sipo.data.collator import BATCH_KEYS, DataCollatorForDiffusionPreference
from trl_sipo.trainer._trl_compat import disable_dropout_in_model, init_trainer, policy_left_unprepared
from trl_sipo.trainer.arms import NoisedArm, noised_arm
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig
from trl_sipo.trainer.cached_data import bucket_sampler, needs_encoders, stored_null
from trl_sipo.trainer.callbacks import watching_callbacks
from trl_sipo.trainer.compilation import compile_denoisers
from trl_sipo.trainer.description import describe_run
from trl_sipo.trainer.divergence_guard import DivergenceGuard
from trl_sipo.trainer.encoding import (
    EVAL_STREAM,
    TRAIN_STREAM,
    EncodedPairs,
    PairEncoder,
    PairNoise,
    check_inputs,
    draw_pair_noise,
    pair_generators,
    pair_numbers,
)
from trl_sipo.trainer.engine import settle_arguments
from trl_sipo.trainer.evaluated_pairs import no_pair_dropped
from trl_sipo.trainer.level_memory import LevelMemory
from trl_sipo.trainer.metrics_recorder import make_recorder
from trl_sipo.trainer.model_card import save_run_card
from trl_sipo.trainer.model_preparation import check_model_arguments, is_adapted, load_policy, own_arguments
from trl_sipo.trainer.noise_levels import draw_levels, evaluation_levels, time_sampler_options, training_schedule
from trl_sipo.trainer.nonfinite import first_broken
from trl_sipo.trainer.passes import errors_and_distances_of, errors_of
from trl_sipo.trainer.preference_data import as_tensors, check_dataset, for_each_split
from trl_sipo.trainer.process_group import end_at_once_on_errors
from trl_sipo.trainer.reference import make_reference
from trl_sipo.trainer.reference_bank import (
    BankedReference,
    check_precomputing,
    lookup,
    precompute_reference,
    training_draw,
)
from trl_sipo.trainer.reproduction import StepBatch, without_gradient
from trl_sipo.trainer.resumable import ResumableTrainer
from trl_sipo.trainer.sample_rewards import open_sample_rewards
from trl_sipo.trainer.sharding import prepare_sharding
from trl_sipo.trainer.statistics import PairErrors, pair_statistics, proximal_statistics
from trl_sipo.trainer.strategy import StrategyCallback, check_strategy


class DiffusionPreferenceTrainer(ResumableTrainer):
    """Base of the diffusion preference trainers: a [`trl.DPOTrainer`] whose policy is a diffusers denoiser.

    Args:
        model: A hub id, a local path, or a loaded `DiffusionPipeline`. A pipeline whose denoiser already carries a
            trained LoRA (a `PeftModel`, or loaded by `pipe.load_lora_weights`) is trained further, with a frozen copy
            of that LoRA as the reference, or the base model: see `lora_reference` of the configuration.
        ref_model: The reference: a denoiser, a pipeline, a hub id or a local path. Only for full fine-tuning; with
            LoRA the reference is the model with its adapter switched off.
        args: The method's configuration.
        data_collator: Replaces [`~trl_sipo.data.collator.DataCollatorForDiffusionPreference`].
        train_dataset: `datasets.Dataset` or `IterableDataset` with `prompt`, `chosen`, `rejected` (images), or the
            columns of Pick-a-Pic. A stream is resumed where it was, which means reading it up to there.
        eval_dataset: Held-out pairs, one dataset or a dict of them.
        processing_class: Replaces the pipeline's `tokenizer`.
        compute_metrics: Called with predictions `(n, 2)`, the chosen and rejected rewards, and labels 0 (the index of
            the chosen one).
        callbacks: Added to the default ones.
        optimizers: An optimiser and a scheduler, as for `transformers.Trainer`.
        quantization_config: A `diffusers.PipelineQuantizationConfig`, used when `model` is a hub id or path.
        peft_config: A new LoRA. Without `target_modules` it takes the backbone's conventional ones.

    Raises:
        ConfigurationError: Contradicting arguments.
        BackboneError: A pipeline that no adapter knows, or an unsupported configuration of it.
        DatasetError: Data that cannot be used.
    """

    _tag_names = ["trl", "trl-sipo", "diffusers"]
    config_class: type[DiffusionPreferenceConfig]
    # Of each sample: what `predict` and `compute_metrics` are given, and what `evaluate` logs for every noise level.
    predictions: tuple[str, ...] = ("rewards/chosen", "rewards/rejected")
    metrics_by_level: tuple[str, ...] = ("rewards/accuracies", "rewards/margins")
    # What `sipo/clip_fraction` counts with where nothing is clipped: the range of the SIPO paper.
    clip_range: float = 0.1
    # Times that a masked noise level is drawn anew, where the method masks.
    mask_redraws: int = 0

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        ref_model: torch.nn.Module | DiffusionPipeline | str | os.PathLike | None = None,
        args: DiffusionPreferenceConfig | None = None,
        data_collator: Callable[[list[dict]], dict] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        args = own_arguments(self, model, args)
        end_at_once_on_errors(args.world_size)
        check_model_arguments(model, ref_model, args, peft_config, quantization_config)
        keeps_reference = ref_model is None and (peft_config is not None or is_adapted(model))
        check_precomputing(args, is_stream=isinstance(train_dataset, IterableDataset), keeps_reference=keeps_reference)
        # Before the model is loaded: all can take long, and bad data is the likelier mistake.
        self.sample_rewards = open_sample_rewards(args)
        train_dataset = check_dataset(train_dataset, args, "train")
        eval_dataset = for_each_split(eval_dataset, lambda split, name: check_dataset(split, args, name))

        settle_arguments(args)
        set_seed(args.seed)  # LoRA weights are drawn at random
        self.args = args
        self.adapter, denoiser, was_adapted = load_policy(
            *(model, args, peft_config, quantization_config, processing_class),
            needs_reference_adapter=ref_model is None and (args.has_reference or args.sample_every_steps > 0),
            needs_encoders=needs_encoders(args, train_dataset, eval_dataset),
        )
        self._prepare_backbone(denoiser)
        self._encoder.null = stored_null(train_dataset)
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}  # what TRL's `log` reads
        self._epoch, self._evaluated = 0, None
        init_trainer(
            self,
            model=denoiser,
            args=args,
            data_collator=data_collator or DataCollatorForDiffusionPreference(),
            train_dataset=as_tensors(train_dataset, self.adapter, args, self.size, "train", is_training=True),
            eval_dataset=for_each_split(
                eval_dataset, lambda split, name: as_tensors(split, self.adapter, args, self.size, name)
            ),
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._prepare_reference(ref_model, was_adapted)
        self.divergence_guard = DivergenceGuard(args.max_drift, args.max_margin_fall)
        self.prepare_resuming()
        for callback in [StrategyCallback(self), *watching_callbacks(self)]:
            self.add_callback(callback)
        self.accelerator.print(self.describe_run())

    def _prepare_backbone(self, denoiser: torch.nn.Module) -> None:
        """What the training step needs of the backbone: frozen parts in place, noise schedule, resolution, beta."""
        args, adapter = self.args, self.adapter
        adapter.freeze()
        self.size = args.size or adapter.default_size
        latent_shape = adapter.latent_shape(*self.size, args.num_frames)
        self.noise_schedule = training_schedule(adapter, args, self.size)
        convention = {"convention": args.beta_convention, "latent_dims": math.prod(latent_shape)}
        self.beta = None if args.beta is None else to_diffusion_dpo_beta(args.beta, **convention)
        self._time_sampler_options = time_sampler_options(args)
        self._encoder = PairEncoder(
            adapter, sample_posterior=args.sample_posterior, caption_dropout=args.caption_dropout
        )
        if args.disable_dropout:
            disable_dropout_in_model(denoiser)
        for module in adapter.frozen_modules():
            module.to(args.device)

    def _prepare_reference(self, ref_model: Any, was_adapted: bool) -> None:
        """What the training step needs of the engine, and the reference, live or precomputed."""
        args = self.args
        is_elsewhere = ref_model is not None or (was_adapted and args.lora_reference == "base")
        self.recorder = make_recorder(self, starts_at_reference=args.has_reference and not is_elsewhere)
        remembered = (self.noise_schedule, self.mask_timesteps, self.mask_redraws)
        self.level_memory = LevelMemory(*remembered, self.accelerator.gather, self.accelerator.device)
        check_strategy(args, self.accelerator)
        prepare_sharding(self)
        self.reference = make_reference(self, ref_model, was_adapted, is_precomputed=args.precompute_ref_log_probs)
        compile_denoisers(self.accelerator, [self.model, getattr(self.reference, "ref_model", None)])
        self.reference = precompute_reference(self)
        self.ref_model = getattr(self.reference, "ref_model", None)

    # ------------------------------------------------------------------------------------------------ the hooks

    def sample_noise_levels(self, generators: list[torch.Generator]) -> NoiseLevel:
        """Draw one noise level per pair, each from the pair's own generator.

        "stratified" is the one sampler that depends on the batch: it spreads the levels of a micro-batch evenly, from
        the generator of its first pair, so that batch size, accumulation and processes change the levels.

        Args:
            generators: One CPU generator per pair.

        Returns:
            Levels of shape (batch,) on the training device.
        """
        # Made on the CPU: a level on the device costs a copy, but no way back.
        level = draw_levels(self.noise_schedule, self.args, generators, self._time_sampler_options)
        return level.to(self.accelerator.device)

    def compute_importance_weights(
        self, chosen_error: torch.Tensor, rejected_error: torch.Tensor, level: NoiseLevel
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log importance weights log p_theta(x_s | x_t) - log q(x_s | x_t, x_0) of both arms, (batch,) each.

        Args:
            chosen_error, rejected_error: The policy's mean squared errors, (batch,) float32.
            level: The pair's noise level.
        """
        previous_level = self.noise_schedule.previous_level(level, self.args.importance_steps)
        rho_squared_t = rho_squared(level, previous_level, self.adapter.prediction_type)
        return log_importance_weight(chosen_error, rho_squared_t), log_importance_weight(rejected_error, rho_squared_t)

    def clip_importance_weights(self, pair_log_weight: torch.Tensor) -> torch.Tensor:
        """The factor that the objective applies, (batch,); 1 here: plain objectives do not weight."""
        return torch.ones_like(pair_log_weight)

    def mask_timesteps(self, pair_log_weight: torch.Tensor) -> torch.Tensor:
        """Which pairs are kept, (batch,) bool; all of them here: plain objectives do not mask."""
        return torch.ones_like(pair_log_weight, dtype=torch.bool)

    @abstractmethod
    def compute_pair_loss(self, logit: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """The method's objective: per-pair loss (batch,), unreduced.

        Args:
            logit: beta * (chosen_logratio - rejected_logratio), (batch,) float32.
            weight: What `clip_importance_weights` returned.
            keep: What `mask_timesteps` returned.
        """

    def proximal_term(self, errors: PairErrors, level: NoiseLevel) -> torch.Tensor:
        """What pulls the policy to the reference beside the objective, (batch,); under a mask it stays as it is.

        Args:
            errors: With the distances of all arms.
            level: The pair's noise level.
        """
        return proximal_penalty(*errors.distances, beta=self.beta, kappa=self.args.proximal_kappa)

    # ------------------------------------------------------------------------------------------------- the step

    @property
    def predictor(self) -> Any:
        """What calls the denoiser: the adapter, or something with a `forward` like its own."""
        return self.adapter

    def draw_noise(self, pairs: EncodedPairs, generators: list[torch.Generator], *, share: bool) -> PairNoise:
        """Noise of each arm, from the pairs' own generators."""
        return draw_pair_noise(pairs, generators, share=share)

    def noised_arms(self, pairs: EncodedPairs, level: NoiseLevel, noise: PairNoise) -> list[NoisedArm]:
        """The arms of the pairs at their noise levels."""
        extra, prediction_type = self._extra(pairs), self.adapter.prediction_type
        return [
            noised_arm(latents, arm_noise, level, pairs.conditioning, extra, prediction_type)
            for latents, arm_noise in zip(pairs.arms, noise, strict=True)
        ]

    def pair_errors(
        self,
        model: torch.nn.Module,
        pairs: EncodedPairs,
        level: NoiseLevel,
        noise: PairNoise,
        ref_errors: tuple[torch.Tensor, ...] | None = None,
        ref_predictions: tuple[torch.Tensor, ...] | None = None,
    ) -> PairErrors:
        """The errors of reference, if there is one, and policy on all arms, reference first; and their distances.

        Args:
            model: The policy, as the trainer wraps it.
            pairs: The batch, on the training device.
            level: One noise level per pair, (batch,).
            noise: Of the arms, float32 of the shape of their latents.
            ref_errors, ref_predictions: Of the reference, (batch,) and (batch, ...) each, where they are known.
        """
        arms = self.noised_arms(pairs, level, noise)
        if self.args.proximal_kappa:
            return errors_and_distances_of(self, model, arms, ref_errors, ref_predictions)
        return errors_of(self, model, arms, ref_errors)

    def _extra(self, pairs: EncodedPairs) -> dict[str, Any]:
        """What some backbones are told beside the prompt; what is not known is left to their pipeline's default."""
        frame_rate = self.args.frame_rate if pairs.frame_rate is None else pairs.frame_rate
        extra = {"guidance_scale": self.args.embedded_guidance_scale, "frame_rate": frame_rate}
        return {name: value for name, value in extra.items() if value is not None}

    def pair_loss(
        self, errors: PairErrors, level: NoiseLevel, label: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Per-pair loss (batch,) and per-pair statistics (name to detached (batch,) tensor) at one noise level.

        Args:
            label: (batch,) probability that the chosen arm is preferred; `None`: it is.
        """
        logit = preference_logit(errors.chosen_logratio, errors.rejected_logratio, self.beta)
        log_weight = pair_log_weight(*self.compute_importance_weights(errors.chosen, errors.rejected, level))
        weight, keep = self.clip_importance_weights(log_weight), self.mask_timesteps(log_weight)
        loss_of = partial(self.compute_pair_loss, weight=weight, keep=keep)
        loss = loss_of(logit) if label is None else soft_label_loss(loss_of, logit, label)
        if self.args.sft_weight:
            loss = loss + self.args.sft_weight * errors.chosen
        options = {"beta": self.beta, "clip_range": self.clip_range}
        return loss, pair_statistics(errors, logit, log_weight, weight, keep, **options)

    def objective(
        self, errors: PairErrors, level: NoiseLevel, label: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What is trained: `pair_loss`, and the proximal term where there is one; (batch,), and the statistics."""
        loss, statistics = self.pair_loss(errors, level, label)
        if not errors.distances:
            return loss, statistics
        term = self.proximal_term(errors, level)
        return loss + term, {**statistics, **proximal_statistics(errors, term)}

    def _compute_loss(self, model, inputs, return_outputs=False):
        check_inputs(inputs, self.args.arms)
        if self.model.training:
            loss, statistics = self._training_loss(model, inputs)
        else:
            loss, statistics = self._evaluation_loss(model, inputs)
        if not return_outputs:
            return loss
        return loss, torch.stack([statistics[name] for name in self.predictions], dim=1)

    def _training_loss(self, model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        level, generators, known = self._draw(pair_numbers(inputs))
        pairs = self._encoder(inputs, self.accelerator.device, generators, training=True)
        noise = self.draw_noise(pairs, generators, share=self.args.share_noise)
        errors = self.pair_errors(model, pairs, level, noise, **known)
        loss, statistics = self.objective(errors, level, inputs.get("label"))
        kept = (pairs, level, noise, without_gradient(errors), inputs["pair_index"], inputs.get("label"))
        batch = StepBatch(*kept, epoch=self._epoch, ref_predictions=known.get("ref_predictions"))
        broken = first_broken(pairs, errors, loss, statistics.get("rewards/margins", loss))
        if self.mask_redraws:  # what is not finite says nothing about its level
            weight = torch.where(broken > 0, torch.nan, statistics["sipo/importance_weight"])
            statistics |= self.level_memory.record(level, weight, ends_step=self.accelerator.sync_gradients)
        self.recorder.record_training(loss, statistics, broken, batch, self.state.global_step + 1)
        # The mean is over the full batch, never over the kept pairs: a batch with little kept moves the model little.
        return loss.mean(), statistics

    def training_step(self, *args, **kwargs):
        """The inherited step; its gradients are looked at before they are clipped, which makes all NaN if one is."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.recorder.look_at_gradients(self.unwrapped_model)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.recorder.end_step(norm):
            model.zero_grad(set_to_none=True)  # an optimiser passes over weights without a gradient: nothing moves
        return norm

    def _draw(self, pair_index: torch.Tensor) -> tuple[NoiseLevel, list[torch.Generator], dict[str, Any]]:
        """Noise level and generator of each pair; with a precomputed reference its draw, and what is known of it."""
        if not isinstance(self.reference, BankedReference):
            generators = pair_generators(pair_index, TRAIN_STREAM, self.args.seed, self._epoch)
            return self.level_memory.draw(self.sample_noise_levels, generators), generators, {}
        return training_draw(self, pair_index, self._epoch)

    def _evaluation_loss(self, model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean over a fixed grid of noise levels, with noise keyed by (seed, level, pair), so that calls compare."""
        pairs = self._encoder(inputs, self.accelerator.device, [], training=False)
        per_level, by_level, of_levels, pair_index = [], {}, [], pair_numbers(inputs)
        levels = evaluation_levels(self.adapter, self.noise_schedule, self.args)
        bank = getattr(self.reference, "evaluation", {}).get(self._evaluated)
        for position, (time, level) in enumerate(levels.items()):
            generators = pair_generators(pair_index, EVAL_STREAM, self.args.eval_noise_seed, position)
            level = level.expand(len(generators)).to(self.accelerator.device)
            known = {} if bank is None else lookup(bank, pair_index, position)
            noise = self.draw_noise(pairs, generators, share=True)
            errors = self.pair_errors(model, pairs, level, noise, **known)
            loss, statistics = self.objective(errors, level, inputs.get("label"))
            per_level.append({"loss": loss.detach(), **statistics})
            kept = (pairs, level, noise, errors, inputs["pair_index"], inputs.get("label"))
            batch = StepBatch(*kept, ref_predictions=known.get("ref_predictions"))
            broken = first_broken(pairs, errors, loss, statistics.get("rewards/margins", loss))
            self.recorder.check_evaluation(broken, batch)
            by_level |= {f"{name}/time_{time:.2f}": statistics[name] for name in self.metrics_by_level}
            of_levels.append((errors, statistics))
        mean = {name: torch.stack([level[name] for level in per_level]).mean(0) for name in per_level[0]}
        self.recorder.record_evaluation({**by_level, **mean}, inputs["pair_index"], levels, of_levels)
        return mean["loss"].mean(), mean

    # ---------------------------------------------------------------------------------------------- bookkeeping

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of one evaluation batch; rewards (batch, 2) and labels 0 when `compute_metrics` wants them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, rewards = self.compute_loss(model, inputs, return_outputs=True)
        return loss, rewards, torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """The inherited loop, with our metrics under its prefix (TRL would give all datasets of a dict one name)."""
        # Several processes read a stream through shares of it.
        self._evaluated = id(getattr(dataloader.dataset, "dataset", dataloader.dataset))
        self.recorder.begin_evaluation(metric_key_prefix)
        self.gather_function = self.recorder.gather_counted  # what `compute_metrics` and `predict` get
        device = self.args.device
        # Evaluation leaves the random state as it found it: training goes on as if nothing had happened.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), policy_left_unprepared(self):
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self.recorder.end_evaluation(metric_key_prefix))
        return output

    def _determine_best_metric(self, metrics, trial):
        # Else the evaluation that stopped training could be the best one: a margin may rise by forgetting.
        return not self.divergence_guard.has_diverged and super()._determine_best_metric(metrics, trial)

    @property
    def method_name(self) -> str:
        """Name of the objective, for people."""
        return self._name

    @property
    def beta_description(self) -> str:
        """What beta means, in one line; empty where the method has none."""
        return describe_beta(self.beta)

    def describe_run(self) -> str:
        """What is printed at the start: objective, beta with its convention, reference, noise and resolution."""
        return describe_run(self)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    # ------------------------------------------------------------------------------------------------- the data

    def set_epoch(self, epoch: int) -> None:
        """Choose the noise, the crops and the flips of this epoch."""
        self._epoch = epoch
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(epoch)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Rows that are handed to `evaluate` or `predict` become tensors; what is prepared passes through."""
        return as_tensors(check_dataset(dataset, args, dataset_name), self.adapter, args, self.size, dataset_name)

    def get_eval_dataloader(self, eval_dataset=None):
        """The data loader of `evaluate`, of all pairs, whatever training drops."""
        with no_pair_dropped(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """The data loader of `predict`, which takes rows as `evaluate` does, and all of them."""
        with no_pair_dropped(self.args):
            return super().get_test_dataloader(self._prepare_dataset(test_dataset, None, self.args, "test"))

    def _get_train_sampler(self, train_dataset=None):
        return bucket_sampler(self.train_dataset, self.args) or super()._get_train_sampler(train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        # None of our datasets has columns to remove; the collator's keys are what the step reads.
        self._signature_columns = list(BATCH_KEYS)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card into the output directory (main process only)."""
        if self.is_world_process_zero():
            tags = [*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])]
            save_run_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags, paper=self._paper)
