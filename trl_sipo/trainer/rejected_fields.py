# SPDX-License-Identifier: Apache-2.0
"""Settings that a method does not have: set to anything but its default, one raises and says the way out."""

from dataclasses import MISSING, Field, fields
from typing import Any

from trl_sipo.errors import ConfigurationError

# Besides the default, what TRL's own `__post_init__` and the command line's parser make of it.
_NEUTRAL_VALUES: dict[str, tuple] = {
    "loss_type": ("sigmoid",),
    "pad_to_multiple_of": (None,),
    "include_num_input_tokens_seen": (False,),
    "train_sampling_strategy": ("sequential",),
}

# Fields that `DPOConfig` and `TrainingArguments` bring and that mean nothing for a diffusion model, or are not offered
# yet. Each with the way out. A value other than the default raises: nothing is silently ignored.
REJECTED_FIELDS = {
    "loss_type": "the trainer class names its objective, and DiffusionDPOTrainer alone has several, 'sigmoid', 'ipo', "
    "'hinge' and 'robust'; choose it, DiffusionSIPOTrainer or DiffusionPolyDPOTrainer",
    "loss_weights": "use `sft_weight` to add a denoising term on the chosen images",
    "max_length": "prompts are cut at the length that the pipeline uses in inference",
    "truncation_mode": "prompts are cut at the length that the pipeline uses in inference",
    "padding_free": "it concerns token sequences",
    "pad_to_multiple_of": "it concerns token sequences",
    "pad_token": "it concerns token sequences",
    "router_aux_loss_coef": "it concerns mixture-of-experts language models",
    "ld_alpha": "it concerns sequence lengths",
    "f_divergence_type": "only the reverse KL is defined for the diffusion objectives here",
    "f_alpha_divergence_coef": "only the reverse KL is defined for the diffusion objectives here",
    "use_weighting": "WPO weights are token probabilities; for importance weights use DiffusionSIPOTrainer",
    "discopop_tau": "it belongs to a language-model loss",
    "activation_offloading": "use `gradient_checkpointing=True`",
    "use_liger_kernel": "its kernels replace language-model layers",
    "liger_kernel_config": "its kernels replace language-model layers",
    "neftune_noise_alpha": "it adds noise to token embeddings",
    "include_num_input_tokens_seen": "it counts tokens",
    "dataset_num_proc": "images are decoded in the data loader: use `dataloader_num_workers`",
    "bf16_full_eval": "evaluation runs in the precision of training; it would change the weights that are trained",
    "fp16_full_eval": "evaluation runs in the precision of training; it would change the weights that are trained",
    "label_smoothing_factor": "use `label_smoothing`, the probability that a preference label is flipped",
    "use_cache": "it caches the keys and values of a language model's tokens",
    "average_tokens_across_devices": "it counts tokens",
    "train_sampling_strategy": "pairs of images have no length to group by: use 'random' or 'sequential'",
    "length_column_name": "pairs of images have no length",
    "label_names": "which image is preferred is read from the columns of the dataset; `compute_metrics` is given the "
    "chosen and rejected rewards, with labels 0",
    "include_for_metrics": "`compute_metrics` is given the chosen and rejected rewards, with labels 0; to look at "
    "more, override `prediction_step`",
    "do_predict": "call `predict()`",
    "enable_jit_checkpoint": "every run saves itself on SIGTERM, when the step that it is in has ended",
}


# Fields of ours and of TRL's that mean nothing without a reference, to be added to the others.
OF_A_REFERENCE = {
    name: "the method compares with no reference"
    for name in (
        "precompute_ref_log_probs",
        "precompute_ref_batch_size",
        "num_ref_draws",
        "precompute_ref_predictions",
        "sync_ref_model",
        "ref_model_sync_steps",
        "ref_model_mixup_alpha",
        "check_reference",
        "max_drift",
        "proximal_kappa",
    )
}
# The same of what only a pair has, or a loss on the logit of one.
OF_PAIRS = {
    "share_noise": "samples have one arm",
    "split_pair_backward": "samples have one arm; `gradient_checkpointing=True` saves memory",
    "soft_labels": "samples have one arm, which is liked or not",
    "label_smoothing": "it belongs to a loss on pairs",
    "sft_weight": "it belongs to a loss on pairs; DiffusionSFTTrainer trains the denoising loss alone",
}
OF_IMPORTANCE_WEIGHTS = {"importance_steps": "the method has no importance weights"}


def default_of(config_field: Field) -> object:
    """The value of a field that is not set; `MISSING`: it has none."""
    if config_field.default is not MISSING:
        return config_field.default
    return config_field.default_factory() if config_field.default_factory is not MISSING else MISSING


def reject_fields(config: Any) -> None:
    """Raise when one of `config.rejected_fields` was set to anything but its default.

    Raises:
        ConfigurationError: Names the field, its value and the way out.
    """
    for config_field in fields(config):
        if config_field.name not in config.rejected_fields:
            continue
        value, default = getattr(config, config_field.name), default_of(config_field)
        if value == default or value in _NEUTRAL_VALUES.get(config_field.name, ()):
            continue
        raise ConfigurationError(
            f"`{config_field.name}={value!r}` has no meaning in {type(config).__name__}: "
            f"{config.rejected_fields[config_field.name]}. Remove it (default: {default!r})."
        )
