# SPDX-License-Identifier: Apache-2.0
"""Every mistake is an error of the right class that says what to do, and comes before weights are loaded if it can."""

import dataclasses
import re

import datasets
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from peft import IA3Config, get_peft_model
from transformers import CLIPTextConfig, CLIPTextModel
from trl import DPOConfig

from tests.tiny_models import tiny_stable_diffusion
from tests.trainer.runs import (
    DPO,
    METHODS,
    POLY_DPO,
    SIPO,
    lora,
    make_config,
    make_trainer,
    picture,
    preference_pairs,
)
from trl_sipo import load_preference_dataset
from trl_sipo.errors import BackboneError, ConfigurationError, DatasetError
from trl_sipo.trainer.base_config import REJECTED_FIELDS
from trl_sipo.trainer.methods import method_classes

LANGUAGE_MODEL_FIELDS = {
    "loss_type": ["apo_zero"],
    "loss_weights": [1.0],
    "max_length": 512,
    "truncation_mode": "keep_end",
    "padding_free": True,
    "pad_to_multiple_of": 8,
    "pad_token": "<pad>",
    "router_aux_loss_coef": 0.1,
    "ld_alpha": 0.5,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.3,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "activation_offloading": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "include_num_input_tokens_seen": True,
    "dataset_num_proc": 2,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_cache": True,
    "average_tokens_across_devices": False,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "label_names": ["label"],
    "include_for_metrics": ["inputs"],
    "do_predict": True,
    "enable_jit_checkpoint": True,
}

# What remains of `TrainingArguments`: transformers' Trainer acts on it, whatever the model is.
USED_BY_TRANSFORMERS = set(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps auto_find_batch_size logging_strategy
    logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps batch_eval_metrics save_only_model save_strategy save_steps
    save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed debug skip_memory_metrics resume_from_checkpoint local_rank
    """.split()
)
# Nothing is removed from our datasets, and who calls `train()` trains: either value promises what is done anyway.
EITHER_VALUE_IS_TRUE = {"remove_unused_columns", "do_train"}


@pytest.mark.parametrize("name", LANGUAGE_MODEL_FIELDS)
def test_language_model_fields_are_refused(name, tmp_path):
    for method in METHODS:
        with pytest.raises(ConfigurationError, match=f"`{name}="):
            make_config(method, tmp_path, **{name: LANGUAGE_MODEL_FIELDS[name]})


def test_every_field_of_trl_is_used_or_refused():
    """A field that TRL or transformers adds must be placed in one of these."""
    assert LANGUAGE_MODEL_FIELDS.keys() == REJECTED_FIELDS.keys()
    ours = {
        "model_init_kwargs", "trust_remote_code", "disable_dropout", "label_smoothing", "beta", "sync_ref_model",
        "ref_model_mixup_alpha", "ref_model_sync_steps", "do_eval", "precompute_ref_log_probs",
        "precompute_ref_batch_size",
    }  # fmt: skip
    groups = (ours, USED_BY_TRANSFORMERS, EITHER_VALUE_IS_TRUE, set(REJECTED_FIELDS))
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(DPOConfig))


@pytest.mark.parametrize("options", [{"train_sampling_strategy": "sequential"}, {"do_train": True}])
def test_values_that_do_act_are_taken(options, tmp_path):
    config = make_config(DPO, tmp_path, **options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("method", [DPO, SIPO, POLY_DPO], ids=lambda method: method.name)
def test_a_convention_needs_a_beta(method, tmp_path):
    """It would otherwise be applied to a default that is in another convention."""
    with pytest.raises(ConfigurationError, match="`beta_convention='sipo_paper'` needs a `beta`"):
        make_config(method, tmp_path, beta_convention="sipo_paper")


BAD_SETTINGS = {
    "beta_zero": (DPO, {"beta": 0.0}, "beta"),
    "beta_negative": (SIPO, {"beta": -1.0}, "beta"),
    "beta_infinite": (DPO, {"beta": float("inf")}, "beta"),
    "beta_nan": (DPO, {"beta": float("nan")}, "beta"),
    "alpha": (POLY_DPO, {"poly_alpha": -1.01}, "poly_alpha"),
    "alpha_sipo": (SIPO, {"poly_alpha": -2.0}, "poly_alpha"),
    "alpha_nan": (POLY_DPO, {"poly_alpha": float("nan")}, "poly_alpha"),
    "clip_range_zero": (SIPO, {"clip_range": 0.0}, "clip_range"),
    "clip_range_one": (SIPO, {"clip_range": 1.0}, "clip_range"),
    "mask_threshold": (SIPO, {"mask_threshold": 1.0}, "mask_threshold"),
    "mask_threshold_zero": (SIPO, {"mask_threshold": 0.0}, "mask=False"),
    "mask_contradiction": (SIPO, {"mask": False, "mask_threshold": 0.5}, "contradicts"),
    "objective": (SIPO, {"objective": "dpo"}, "dpo_cm"),
    "weight_grad_of_a_constant": (SIPO, {"weight_grad": False, "reweight": False}, "reweight"),
    "weight_grad_of_dpo_cm": (SIPO, {"weight_grad": False, "objective": "dpo_cm"}, "dpo_cm"),
    "beta_convention": (DPO, {"beta_convention": "paper"}, "sipo_paper"),
    "label_smoothing": (DPO, {"label_smoothing": 0.5}, "label_smoothing"),
    "sft_weight": (DPO, {"sft_weight": -1.0}, "sft_weight"),
    "timestep_sampling": (DPO, {"timestep_sampling": "normal"}, "logit_normal"),
    "timestep_range_order": (DPO, {"timestep_range": [0.5, 0.5]}, "timestep_range"),
    "timestep_range_length": (DPO, {"timestep_range": [0.1]}, "timestep_range"),
    "timestep_range_outside": (DPO, {"timestep_range": [0.0, 1.5]}, "timestep_range"),
    "logit_std": (DPO, {"timestep_sampling": "logit_normal", "logit_std": 0.0}, "logit_std"),
    "logit_std_infinite": (DPO, {"timestep_sampling": "logit_normal", "logit_std": float("inf")}, "logit_std"),
    "logit_mean_nan": (DPO, {"timestep_sampling": "logit_normal", "logit_mean": float("nan")}, "logit_mean"),
    "do_eval_alone": (DPO, {"do_eval": True}, "eval_strategy"),
    "sync_steps_alone": (DPO, {"ref_model_sync_steps": 5}, "ref_model_sync_steps=5` only acts with `sync_ref_model"),
    "mixup_alone": (DPO, {"ref_model_mixup_alpha": 0.2}, "ref_model_mixup_alpha=0.2` only acts with `sync_ref_model"),
    "logit_without_sampling": (DPO, {"logit_mean": 1.0}, "logit_normal"),
    "importance_steps": (SIPO, {"importance_steps": 0}, "importance_steps"),
    "eval_noise_levels": (DPO, {"eval_noise_levels": 0}, "eval_noise_levels"),
    "caption_dropout": (DPO, {"caption_dropout": 1.0}, "caption_dropout"),
    "resolution": (DPO, {"resolution": 0}, "resolution"),
    "num_checked_images": (DPO, {"num_checked_images": -1}, "num_checked_images"),
    "precompute_and_flip": (DPO, {"precompute_latents": True, "random_flip": True}, "random_flip"),
    "precompute_and_crop": (DPO, {"precompute_latents": True, "center_crop": False}, "center_crop"),
    "precompute_and_sample": (DPO, {"precompute_latents": True, "sample_posterior": True}, "sample_posterior"),
    "grids_without_prompts": (DPO, {"sample_every_steps": 5}, "sample_prompts"),
    "prompts_without_grids": (DPO, {"sample_prompts": ["a cat"]}, "sample_every_steps"),
    "seed_negative": (DPO, {"seed": -1}, "`seed`"),
    "seed_too_large": (DPO, {"seed": 2**32}, "`seed`"),
    "sample_every_steps": (DPO, {"sample_every_steps": -1}, "sample_every_steps"),
    "sample_steps": (DPO, {"sample_num_inference_steps": 0}, "sample_num_inference_steps"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_out_of_range(case, tmp_path):
    method, options, message = BAD_SETTINGS[case]
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        make_config(method, tmp_path, **options)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading any weights is a failure of the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded before the arguments were checked")

    for target in (
        "trl_sipo.trainer.model_preparation.load_pipeline",
        "diffusers.DiffusionPipeline.from_pretrained",
        "diffusers.UNet2DConditionModel.from_pretrained",
    ):
        monkeypatch.setattr(target, refuse)


def _text_model():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPTextModel(CLIPTextConfig(**sizes))


def _unknown_pipeline():
    return DDPMPipeline(tiny_stable_diffusion().unet, DDPMScheduler())


def _with_injected_lora():
    pipeline = tiny_stable_diffusion()
    pipeline.unet = get_peft_model(pipeline.unet, lora(target_modules=["to_q"]))
    return pipeline


BAD_MODELS = {
    "unet": lambda: (tiny_stable_diffusion().unet, {}, BackboneError, "pipeline"),
    "text_model": lambda: (_text_model(), {}, BackboneError, "pipeline"),
    "none": lambda: (42, {}, BackboneError, "int"),
    "unknown_pipeline": lambda: (_unknown_pipeline(), {}, BackboneError, "StableDiffusionPipeline"),
    "v_prediction_typo": lambda: (
        tiny_stable_diffusion("velocity"), {}, BackboneError, "prediction_type",
    ),
    "ref_model_with_new_lora": lambda: (
        "some/model", {"ref_model": tiny_stable_diffusion().unet}, ConfigurationError, "peft_config",
    ),
    "ref_model_of_another_kind": lambda: ("some/model", {"ref_model": 3}, ConfigurationError, "ref_model"),
    "peft_config_of_another_kind": lambda: ("some/model", {"peft_config": {"r": 4}}, ConfigurationError, "LoraConfig"),
    "lora_on_lora": lambda: (_with_injected_lora(), {}, ConfigurationError, "already carries a LoRA"),
    "quantized_full": lambda: (
        "some/model", {"quantization_config": object(), "peft_config": None}, ConfigurationError, "Quantized",
    ),
    "quantization_of_a_loaded_model": lambda: (
        tiny_stable_diffusion(), {"quantization_config": object()}, ConfigurationError, "quantization_config",
    ),
    "no_data": lambda: ("some/model", {"train_dataset": None}, ConfigurationError, "train_dataset"),
    "a_dataset_of_splits": lambda: (
        "some/model",
        {"train_dataset": datasets.DatasetDict({"train": preference_pairs(2)})},
        DatasetError,
        "split",
    ),
    "a_list": lambda: ("some/model", {"train_dataset": [1, 2]}, DatasetError, "from_list"),
    "not_peft_but_ia3": lambda: (
        tiny_stable_diffusion(),
        {"peft_config": IA3Config(target_modules=["to_k"], feedforward_modules=[])},
        ConfigurationError,
        "LoRA",
    ),
    "lora_that_cannot_be_saved": lambda: (
        tiny_stable_diffusion(), {"peft_config": lora(bias="all")}, ConfigurationError, "bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_references_and_loras(case, no_weights, tmp_path):
    model, options, error, message = BAD_MODELS[case]()
    arguments = {"train_dataset": preference_pairs(4), "peft_config": lora(), **options}
    with pytest.raises(error, match=re.escape(message)):
        DPO.trainer_class(model, args=make_config(DPO, tmp_path), **arguments)


def _reference_of(kind, pipeline):
    return {
        "the_model": pipeline,
        "its_denoiser": pipeline.unet,
        "a_pipeline_that_shares_it": type(pipeline)(**pipeline.components, requires_safety_checker=False),
    }[kind]


@pytest.mark.parametrize("kind", ["the_model", "its_denoiser", "a_pipeline_that_shares_it"])
def test_a_reference_that_would_move_with_the_policy(kind, no_weights, tmp_path):
    pipeline = tiny_stable_diffusion()
    with pytest.raises(ConfigurationError, match="move with the policy"):
        make_trainer(
            DPO,
            tmp_path,
            model=pipeline,
            is_lora=False,
            trainer_options={"ref_model": _reference_of(kind, pipeline)},
        )
    assert all(parameter.requires_grad for parameter in pipeline.unet.parameters())  # untouched


def test_a_reference_of_another_class(tmp_path):
    with pytest.raises(ConfigurationError, match="Linear"):
        make_trainer(DPO, tmp_path, is_lora=False, trainer_options={"ref_model": torch.nn.Linear(2, 2)})


@pytest.mark.parametrize("model", ["new_lora", "trained_lora"])
def test_a_synchronised_reference_needs_all_weights(model, no_weights, tmp_path):
    pipeline = tiny_stable_diffusion() if model == "new_lora" else _with_injected_lora()
    with pytest.raises(ConfigurationError, match="sync_ref_model"):
        make_trainer(DPO, tmp_path, model=pipeline, is_lora=model == "new_lora", sync_ref_model=True)


@pytest.mark.parametrize(
    ("trainer", "config"), [(DPO, SIPO), (SIPO, DPO), (POLY_DPO, DPO)], ids=lambda method: method.name
)
def test_a_configuration_of_another_method(trainer, config, no_weights, tmp_path):
    with pytest.raises(ConfigurationError, match=trainer.config_class.__name__):
        trainer.trainer_class("some/model", args=make_config(config, tmp_path), train_dataset=preference_pairs(2))


def test_a_configuration_of_trl(no_weights, tmp_path):
    with pytest.raises(ConfigurationError, match="DiffusionDPOConfig"):
        DPO.trainer_class("some/model", args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_loading_options_for_a_loaded_model(tmp_path):
    with pytest.raises(ConfigurationError, match="model_init_kwargs"):
        make_trainer(DPO, tmp_path, model_init_kwargs={"revision": "main"})


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(BackboneError, match="./nowhere"):
        make_trainer(DPO, tmp_path, model="./nowhere")


def test_a_resolution_that_the_model_cannot_take(tmp_path):
    with pytest.raises(ConfigurationError, match="multiple"):
        make_trainer(DPO, tmp_path, resolution=33)


def _broken_image():
    rows = preference_pairs(4).to_list()
    rows[2]["chosen"] = {"bytes": b"not an image", "path": None}
    return datasets.Dataset.from_list(rows)


def _latents(shape):
    zeros, ones = torch.zeros(shape).tolist(), torch.ones(shape).tolist()
    return datasets.Dataset.from_list([{"prompt": "a cat", "chosen_latents": zeros, "rejected_latents": ones}])


BAD_DATA = {
    "broken_image": (_broken_image, "row 2"),
    "missing_column": (lambda: preference_pairs(2).remove_columns("rejected"), "rejected"),
    "language_model_data": (
        lambda: datasets.Dataset.from_dict({"prompt": ["q"], "chosen": ["a good answer"], "rejected": ["a bad one"]}),
        "images",
    ),
    "empty": (lambda: preference_pairs(2).select([]), "empty"),
    "only_ties": (lambda: preference_pairs(2).add_column("label", [0.5, 0.5]), "ties"),
    "empty_prompt": (
        lambda: datasets.Dataset.from_list([{"prompt": " ", "chosen": picture(1), "rejected": picture(2)}]),
        "prompt",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
def test_data(case, split, no_weights, tmp_path):
    make, message = BAD_DATA[case]
    options = {"train_dataset": preference_pairs(2), split: make()}
    with pytest.raises(DatasetError, match=message):
        DPO.trainer_class("some/model", args=make_config(DPO, tmp_path), peft_config=lora(), **options)


def test_data_of_unequal_columns():
    with pytest.raises(DatasetError, match="equal length"):
        load_preference_dataset({"prompt": ["a", "b"], "chosen": [picture(1)], "rejected": [picture(2)]})


@pytest.mark.parametrize("make", [_broken_image, BAD_DATA["only_ties"][0], lambda: [1]], ids=["image", "ties", "list"])
def test_data_given_to_evaluate(make, tmp_path):
    trainer = make_trainer(DPO, tmp_path)
    with pytest.raises(DatasetError):
        trainer.evaluate(make())


@pytest.mark.parametrize("shape", [(8, 8, 8), (4, 8)])
def test_latents_of_another_model(shape, tmp_path):
    with pytest.raises(DatasetError, match="channels"):
        make_trainer(DPO, tmp_path, pairs=_latents(shape))


@pytest.mark.parametrize("options", [{"sample_posterior": True}, {"random_flip": True}, {"center_crop": False}])
def test_latents_cannot_be_encoded_anew(options, tmp_path):
    with pytest.raises(ConfigurationError, match=f"{next(iter(options))}=.*latents|latents.*{next(iter(options))}="):
        make_trainer(DPO, tmp_path, pairs=_latents((4, 8, 8)), **options)


def test_a_grid_finer_than_the_schedule(tmp_path):
    with pytest.raises(ConfigurationError, match="1001"):
        make_trainer(SIPO, tmp_path, importance_steps=1001)


def test_an_unknown_method():
    with pytest.raises(ConfigurationError, match="poly-dpo"):
        method_classes("ppo")


@pytest.mark.parametrize(
    ("options", "message"), [({"max_steps": -1}, "max_steps"), ({"precompute_latents": True}, "precompute_latents")]
)
def test_streams(options, message, no_weights, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(DPO, tmp_path, model="some/model", pairs=preference_pairs(2).to_iterable_dataset(), **options)


@pytest.mark.parametrize("missing", ["prompt", "pair_index", "chosen_pixels"])
def test_a_collator_that_leaves_something_out(missing, tmp_path):
    standard = make_trainer(DPO, tmp_path).data_collator

    def collate(items):
        return {key: value for key, value in standard(items).items() if key != missing}

    trainer = make_trainer(DPO, tmp_path, trainer_options={"data_collator": collate})
    with pytest.raises(ConfigurationError, match=missing):
        trainer.train()


def test_several_gpus_in_one_process(no_weights, tmp_path, monkeypatch):
    config = make_config(DPO, tmp_path)
    monkeypatch.setattr(type(config), "n_gpu", property(lambda self: 2))
    with pytest.raises(ConfigurationError, match="accelerate launch"):
        DPO.trainer_class("some/model", args=config, train_dataset=preference_pairs(2))


def test_an_adapter_that_takes_the_references_name(tmp_path):
    pipeline = _with_injected_lora()
    pipeline.unet.add_adapter("ref", lora(target_modules=["to_q"]))
    with pytest.raises(ConfigurationError, match="'ref'"):
        make_trainer(DPO, tmp_path, model=pipeline, is_lora=False)


def test_an_adapter_of_another_name(tmp_path):
    pipeline = tiny_stable_diffusion()
    pipeline.unet = get_peft_model(pipeline.unet, lora(target_modules=["to_q"]), adapter_name="mine")
    with pytest.raises(ConfigurationError, match="default"):
        make_trainer(DPO, tmp_path, model=pipeline, is_lora=False)
