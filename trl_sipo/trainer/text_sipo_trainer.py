# SPDX-License-Identifier: Apache-2.0
"""SIPO for language models: TRL's `DPOTrainer` with one equation changed.

For a batch of pairs of completions y of a prompt x, with summed token log-probabilities:

    logit       =   beta * (chosen_logratio - rejected_logratio)         logratio = log p_theta(y|x) - log p_ref(y|x)
    log w       =   (log p_theta(y|x) - log mu(y|x)) / |y|               mu: the policy that wrote y
    pair weight =   min(w of chosen, w of rejected)
    loss        =   keep * -logsigmoid(clip(1 / w) * logit)              keep = w >= mask_threshold

The SIPO paper says in its appendix B.3 that the method applies to language models and gives no formula; what is chosen
here, and why, is in `docs/source/sipo_text.md`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from trl_sipo.core.importance import clip_log_weight, pair_log_weight, sequence_log_weight, timestep_mask
from trl_sipo.core.objectives._preference_nll import preference_logit
from trl_sipo.core.objectives.sipo import masked_scaled_nll
from trl_sipo.errors import ConfigurationError
from trl_sipo.trainer._trl_compat import DPOTrainer, policy_left_unprepared, text_forward
from trl_sipo.trainer.callbacks import MaskedWarningCallback
from trl_sipo.trainer.diffusion_sipo_trainer import SIPO_PAPER
from trl_sipo.trainer.process_group import release_process_group
from trl_sipo.trainer.sampled_logps import (
    SAMPLED_COLUMNS,
    RecordedCollator,
    check_recorded,
    uses_recorded,
    without_recorded,
)
from trl_sipo.trainer.statistics import weight_statistics
from trl_sipo.trainer.text_sipo_config import SIPOConfig


class SIPOTrainer(DPOTrainer):
    """SIPO for causal language models. The arguments are those of [`trl.DPOTrainer`].

    Args:
        model: A hub id, a local path, or a loaded causal language model; or a `PeftModel`.
        ref_model: The reference. By default a second copy of `model`, or with a LoRA the model without it.
        args: A [`SIPOConfig`].
        data_collator: Replaces TRL's.
        train_dataset: Text preferences in one of TRL's formats: `prompt`, `chosen`, `rejected`, plain or
            conversational. The columns `chosen_logps` and `rejected_logps`, if there, are the log-probabilities of the
            completions under the policy that wrote them, summed over their tokens.
        eval_dataset: Held-out pairs, one dataset or a dict of them, with the same columns.
        processing_class: The tokenizer; by default that of `model`.
        compute_metrics: As in TRL.
        callbacks: Added to the default ones.
        optimizers: An optimiser and a scheduler.
        quantization_config: Of transformers, used when `model` is a hub id or path.
        peft_config: A new LoRA.

    Raises:
        ConfigurationError: Settings that are out of range, contradict each other, or are not offered.
        DatasetError: Recorded log-probabilities that cannot be used.
    """

    _name = "SIPO"
    _tag_names = ["trl", "trl-sipo", "sipo"]
    _paper = SIPO_PAPER

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: PreTrainedModel | None = None,
        args: SIPOConfig | None = None,
        data_collator: Callable[[list[dict]], dict] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            args = SIPOConfig(f"{Path(model).name if isinstance(model, str) else type(model).__name__}-SIPO")
        if not isinstance(args, SIPOConfig):
            raise ConfigurationError(f"SIPOTrainer takes a SIPOConfig, got {type(args).__name__}.")
        self.uses_recorded = uses_recorded(train_dataset, args.sampling_policy)
        super().__init__(
            model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if self.uses_recorded:
            self.data_collator = RecordedCollator(self.data_collator)
        self.add_callback(MaskedWarningCallback())
        self.accelerator.print(self.describe_run())

    def describe_run(self) -> str:
        """What is printed at the start: beta, what weights are relative to, clip and mask."""
        args, whose = self.args, "those recorded in the data" if self.uses_recorded else "the reference"
        mask = f"masked below {args.lowest_weight:g}" if args.mask else "no mask"
        clip = f"within [{1 - args.clip_range:g}, {1 + args.clip_range:g}]" if args.reweight else "not used"
        return (
            f"SIPO on {self.model.config.model_type}: beta = {self.beta:g}; weights per token, against {whose}, "
            f"{mask}; 1 / w {clip}"
        )

    # ------------------------------------------------------------------------------------------------- the step

    def compute_importance_weights(
        self, logps: torch.Tensor, sampled_logps: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Log importance weights of completions, (2 * batch,); the gradient flows to `logps`.

        Args:
            logps: Of the policy, summed over the completion, (2 * batch,), chosen ones first.
            sampled_logps: Of the policy that wrote it.
            lengths: Its tokens.
        """
        return sequence_log_weight(logps, sampled_logps, lengths)

    def clip_importance_weights(self, pair_log_weight: torch.Tensor) -> torch.Tensor:
        """clip(1 / w), clipped in the log domain; 1 without `reweight`; (batch,)."""
        if not self.args.reweight:
            return torch.ones_like(pair_log_weight)
        weight = clip_log_weight(-pair_log_weight, self.args.clip_range).exp()
        return weight if self.args.weight_grad else weight.detach()

    def _compute_loss(self, model, inputs, return_outputs=False):
        forward = text_forward(self, model, without_recorded(inputs), return_outputs)
        logps, lengths = forward.log_probs.sum(dim=1), inputs["completion_mask"][:, 1:].sum(dim=1)
        sampled = torch.cat([inputs[name] for name in SAMPLED_COLUMNS]) if self.uses_recorded else forward.ref_logps
        chosen, rejected = self.compute_importance_weights(logps, sampled, lengths).chunk(2)
        log_weight = pair_log_weight(chosen, rejected)
        weight = self.clip_importance_weights(log_weight)
        keep = timestep_mask(log_weight, self.args.lowest_weight)
        logit = preference_logit(*(logps - forward.ref_logps).chunk(2), self.beta)
        self._record(
            {
                **weight_statistics(log_weight, weight, keep, clip_range=self.args.clip_range),
                "sipo/chosen_importance_weight": chosen.exp(),
                "sipo/rejected_importance_weight": rejected.exp(),
            }
        )
        # The mean is over all pairs, those that are masked too.
        loss = masked_scaled_nll(logit, keep, weight).mean() + forward.aux_loss
        return (loss, forward.result[1]) if return_outputs else loss

    def _record(self, statistics: dict[str, torch.Tensor]) -> None:
        """Keep the global batch's means beside TRL's, with one gather for all of them."""
        rows = self.accelerator.gather(torch.stack([value.detach().float() for value in statistics.values()], dim=1))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, mean in zip(statistics, rows.mean(0).tolist(), strict=True):
            metrics[name].append(mean)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """That of transformers, after which training begins as if there had been no evaluation."""
        with policy_left_unprepared(self):
            return super().evaluation_loop(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------- the data

    def compute_ref_log_probs(self, model, inputs):
        """Summed log-probabilities of both completions under the reference, (batch,) each."""
        return super().compute_ref_log_probs(model, without_recorded(inputs))

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return check_recorded(dataset, args.max_length, dataset_name) if self.uses_recorded else dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.uses_recorded:
            self._signature_columns = [*dict.fromkeys([*self._signature_columns, *SAMPLED_COLUMNS])]

    def end(self) -> None:
        """Finish the trackers and leave the group of processes, at the very end of a script."""
        release_process_group(self.accelerator)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""
