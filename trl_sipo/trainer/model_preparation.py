# SPDX-License-Identifier: Apache-2.0
"""The policy and its reference: loading, LoRA, precision, and the combinations that make no sense."""

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists

from trl_sipo.adapters import adapter_for, load_pipeline
from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.adapters.weightless import ENCODER_NAMES
from trl_sipo.adapters.wrappers import unwrap_denoiser
from trl_sipo.core.noise_schedule import FlowSchedule, VPSchedule
from trl_sipo.errors import BackboneError, ConfigurationError
from trl_sipo.trainer._trl_compat import make_checkpointable, make_config_reportable
from trl_sipo.trainer.attention import check_attention_backend, use_attention_backend
from trl_sipo.trainer.base_config import DiffusionPreferenceConfig

logger = logging.getLogger(__name__)

REFERENCE_ADAPTER_NAME = "ref"  # as in TRL's DPOTrainer


def own_arguments(trainer: Any, model: Any, args: DiffusionPreferenceConfig | None) -> DiffusionPreferenceConfig:
    """The settings of a trainer of a method: those given, or the defaults in a folder that is named after the model.

    Raises:
        ConfigurationError: They are of another method.
    """
    if args is None:
        name = Path(str(model)).name if isinstance(model, (str, os.PathLike)) else type(model).__name__
        return trainer.config_class(f"{name}-{trainer._name.replace(' ', '-')}")
    if not isinstance(args, trainer.config_class):
        raise ConfigurationError(
            f"{type(trainer).__name__} takes a {trainer.config_class.__name__}, got {type(args).__name__}."
        )
    return args


def check_model_arguments(
    model: Any,
    ref_model: Any,
    args: DiffusionPreferenceConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any,
) -> None:
    """Raise before anything is loaded when model, reference, LoRA and quantization arguments make no sense.

    Raises:
        BackboneError: `model` is neither a name nor a pipeline, or a pipeline that no adapter knows.
        ConfigurationError: The arguments contradict each other.
    """
    if not isinstance(model, (str, os.PathLike, DiffusionPipeline)):
        raise BackboneError(
            f"`model` must be a hub id, a local path, or a loaded diffusers pipeline; got {type(model).__name__}. A "
            "denoiser alone is not enough, since prompts and images are encoded by the pipeline's other parts."
        )
    if args.n_gpu > 1:
        raise ConfigurationError(
            f"{args.n_gpu} GPUs are visible to one process, which transformers would drive through `nn.DataParallel`. "
            "Start with `accelerate launch`, or make one visible with CUDA_VISIBLE_DEVICES=0."
        )
    check_attention_backend(args.attention_backend, args.device, network_dtype(args))
    _check_peft_config(args, peft_config)
    if quantization_config is not None and peft_config is None:
        raise ConfigurationError(
            "Quantized weights cannot be trained: give a `peft_config`, to train a LoRA on them, or leave out "
            "`quantization_config`."
        )
    if not args.has_reference:
        _check_no_reference(model, ref_model, args, peft_config)
    if ref_model is not None:
        _check_ref_model(model, ref_model, peft_config)
    if args.sync_ref_model and (peft_config is not None or is_adapted(model)):
        raise ConfigurationError(
            "`sync_ref_model=True` needs a reference with the same weights as the policy, but with LoRA the reference "
            "is the model with its adapter switched off or exchanged. Set `sync_ref_model=False`, or train all "
            "weights."
        )


def _check_peft_config(args: DiffusionPreferenceConfig, peft_config: PeftConfig | None) -> None:
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ConfigurationError(
            "`peft_config` must be a peft configuration such as `peft.LoraConfig(r=8)`, got "
            f"{type(peft_config).__name__}."
        )
    if args.disable_dropout and getattr(peft_config, "lora_dropout", 0.0):
        logger.warning(
            "`lora_dropout` is not used, since `disable_dropout=True` (TRL's default: dropout makes policy and "
            "reference differ by chance). Set `disable_dropout=False` to use it."
        )


def _check_no_reference(
    model: Any, ref_model: Any, args: DiffusionPreferenceConfig, peft_config: PeftConfig | None
) -> None:
    method = type(args).__name__.removesuffix("Config")
    if ref_model is not None:
        raise ConfigurationError(f"{method} compares with no reference: leave `ref_model` out.")
    if args.sample_every_steps and peft_config is None and not is_adapted(model):
        raise ConfigurationError(
            f"{method} keeps no reference, and in full fine-tuning no base model either, beside which sample grids "
            "would show the current one. Set `sample_every_steps=0`, or train a LoRA with `peft_config`."
        )


def _check_ref_model(model: Any, ref_model: Any, peft_config: PeftConfig | None) -> None:
    if not isinstance(ref_model, (str, os.PathLike, DiffusionPipeline, torch.nn.Module)):
        raise ConfigurationError(
            f"`ref_model` must be a denoiser, a pipeline, a hub id or a local path; got {type(ref_model).__name__}."
        )
    if ref_model is model or _denoiser_of(ref_model) is _denoiser_of(model) is not None:
        raise ConfigurationError(
            "`model` and `ref_model` are the same object or share their denoiser, so the reference would move with "
            "the policy. Leave `ref_model` out: a frozen copy (or the model with its LoRA switched off) is used."
        )
    if peft_config is not None:
        raise ConfigurationError(
            "`ref_model` was given together with a new LoRA (`peft_config`). The reference of a new LoRA is the base "
            "model with the adapter switched off, which costs no memory: leave `ref_model` out. To start from another "
            "model, load it as `model`."
        )


def _denoiser_of(model: Any) -> torch.nn.Module | None:
    denoiser = adapter_for(model).denoiser if isinstance(model, DiffusionPipeline) else model
    return unwrap_denoiser(denoiser) if isinstance(denoiser, torch.nn.Module) else None


def is_adapted(model: Any) -> bool:
    """Whether `model` is a pipeline whose denoiser already carries a LoRA, as a PeftModel or injected by diffusers."""
    if not isinstance(model, DiffusionPipeline):
        return False
    denoiser = adapter_for(model).denoiser
    return isinstance(denoiser, PeftModel) or bool(getattr(denoiser, "peft_config", None))


def load_policy(
    model: str | os.PathLike | DiffusionPipeline,
    args: DiffusionPreferenceConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    processing_class: Any,
    *,
    needs_reference_adapter: bool = True,
    needs_encoders: bool = True,
) -> tuple[BackboneAdapter, torch.nn.Module, bool]:
    """Load the pipeline and prepare its denoiser for training.

    Args:
        needs_reference_adapter: Whether a LoRA that came with the model is copied, frozen, to be the reference.
        needs_encoders: Whether prompts or media are encoded; else VAE and text encoders are loaded without weights.

    Returns:
        The backbone's adapter (its pipeline holds plain modules, so that it can sample while training), the module to
        train (a `PeftModel` with LoRA), and whether it came with a trained LoRA.

    Raises:
        BackboneError: `model` is no pipeline, or one that no adapter knows.
        ConfigurationError: A LoRA on top of a LoRA, half-precision weights in full fine-tuning, or loading options
            given for a pipeline that is already loaded.
    """
    pipeline = _load(model, args, peft_config, quantization_config, () if needs_encoders else ENCODER_NAMES)
    adapter = adapter_for(pipeline)
    use_attention_backend(adapter.denoiser, args.attention_backend)
    if processing_class is not None:
        pipeline.tokenizer = processing_class
    was_adapted = is_adapted(pipeline)
    if was_adapted and peft_config is not None:
        raise ConfigurationError(
            "The denoiser already carries a LoRA and a `peft_config` was given too. Either train the existing LoRA "
            "further (leave `peft_config` out; a frozen copy becomes the reference), or merge it first "
            "(`pipe.fuse_lora(); pipe.unload_lora_weights()`)."
        )
    if was_adapted:
        denoiser = _adopt(adapter)
        if needs_reference_adapter and args.lora_reference == "copy":
            add_reference_adapter(denoiser)
    elif peft_config is not None:
        denoiser = _add_lora(adapter, peft_config)
    else:
        denoiser = _all_weights(adapter)
    make_checkpointable(adapter.denoiser)
    make_config_reportable(adapter.denoiser)
    return adapter, denoiser, was_adapted


def _load(
    model: str | os.PathLike | DiffusionPipeline,
    args: DiffusionPreferenceConfig,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    weightless: tuple[str, ...],
) -> DiffusionPipeline:
    if isinstance(model, (str, os.PathLike)):
        options = _loading_options(args, peft_config, quantization_config)
        return load_pipeline(model, weightless=weightless, **options)
    given = [
        name
        for name, value in {
            "model_init_kwargs": args.model_init_kwargs,
            "quantization_config": quantization_config,
        }.items()
        if value
    ]
    if given:
        raise ConfigurationError(
            f"`{given[0]}` only applies when `model` is a hub id or a path, but a loaded pipeline was given. Pass the "
            "options to `from_pretrained` yourself, or give the id."
        )
    return model


def _loading_options(
    args: DiffusionPreferenceConfig, peft_config: PeftConfig | None, quantization_config: Any
) -> dict[str, Any]:
    options = dict(args.model_init_kwargs or {})  # None is a value: the pipeline is loaded without this component
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    if quantization_config is not None:
        if not isinstance(quantization_config, PipelineQuantizationConfig):
            raise ConfigurationError(
                f"`quantization_config` must be a `diffusers.PipelineQuantizationConfig`, got "
                f"{type(quantization_config).__name__}: a pipeline has several parts and it says which are quantized."
            )
        options["quantization_config"] = quantization_config
    given = options.pop("torch_dtype", None) or options.get("dtype")  # `torch_dtype` is the former name
    if isinstance(given, dict):
        return {**options, "dtype": given}
    # A frozen base may be kept in half precision; weights that are trained may not, nor what is saved beside them. The
    # VAE stays in float32: several overflow in float16, and it is small.
    frozen = network_dtype(args) if peft_config is not None else torch.float32
    dtype = frozen if given is None else _dtype_of(given) if isinstance(given, str) else given
    return {**options, "dtype": {"default": dtype, "vae": torch.float32}}


def network_dtype(args: DiffusionPreferenceConfig) -> torch.dtype:
    """The dtype that the network runs in: that of `bf16` or `fp16`, or else float32."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigurationError(
            f"Unknown `dtype` {name!r} in `model_init_kwargs`; use 'float32', 'bfloat16' or 'float16'."
        )
    return dtype


def _adopt(adapter: BackboneAdapter) -> PeftModel:
    """The PeftModel of a denoiser that came with a LoRA, its adapter "default" trainable in float32."""
    denoiser = adapter.peft_denoiser()
    adapter.check_lora(denoiser)
    denoiser.peft_config["default"].inference_mode = False
    denoiser.set_adapter("default")
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(".default." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return denoiser


def add_reference_adapter(model: PeftModel) -> None:
    """Add a frozen copy of the trained adapter "default" under the name "ref", as TRL's DPOTrainer does.

    Raises:
        ConfigurationError: The model has an adapter of that name.
    """
    if REFERENCE_ADAPTER_NAME in model.peft_config:
        raise ConfigurationError(
            f"The model already has an adapter named {REFERENCE_ADAPTER_NAME!r}, the name of the frozen copy that "
            f"becomes the reference. Remove it first: `model.delete_adapter({REFERENCE_ADAPTER_NAME!r})`."
        )
    model.add_adapter(REFERENCE_ADAPTER_NAME, copy.deepcopy(model.peft_config["default"]))
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            copied = model.get_parameter(name.replace(".default.", f".{REFERENCE_ADAPTER_NAME}."))
            copied.data = parameter.data.detach().clone()
            copied.requires_grad_(False)


def check_lora_targets(adapter: BackboneAdapter, peft_config: PeftConfig) -> None:
    """Raise [`ConfigurationError`] when `target_modules` names nothing that this denoiser has.

    PEFT says so itself when it adds the LoRA; where that is long after the model was loaded, ask earlier.
    """
    config = _with_default_targets(adapter, peft_config)
    if not any(check_target_module_exists(config, name) for name, _ in adapter.denoiser.named_modules()):
        raise _no_lora(adapter, config, "no module has such a name.")


def _with_default_targets(adapter: BackboneAdapter, peft_config: PeftConfig) -> PeftConfig:
    peft_config = copy.deepcopy(peft_config)
    if getattr(peft_config, "target_modules", None) is None:
        peft_config.target_modules = _default_targets(adapter)
    return peft_config


def _default_targets(adapter: BackboneAdapter) -> str | list[str]:
    default = adapter.lora_target_modules
    return default if isinstance(default, str) else list(default)


def _no_lora(adapter: BackboneAdapter, peft_config: PeftConfig, reason: str) -> ConfigurationError:
    targets = peft_config.target_modules
    targets = targets if isinstance(targets, str) else sorted(targets)
    return ConfigurationError(
        f"PEFT adds no LoRA with `target_modules` {targets!r} to this denoiser: {reason} Those of "
        f"{adapter.pipeline_class_name} are {_default_targets(adapter)!r} if none are given; a string is a regular "
        "expression for whole names, a list holds the ends of names."
    )


def _add_lora(adapter: BackboneAdapter, peft_config: PeftConfig) -> PeftModel:
    peft_config = _with_default_targets(adapter, peft_config)
    peft_config.task_type = None  # scripts for language models set one, whose wrapper calls methods of such models
    adapter.denoiser.requires_grad_(False)
    # autocast_adapter_dtype (peft's default) keeps the LoRA in float32 on a half-precision base.
    try:
        denoiser = get_peft_model(adapter.denoiser, peft_config)
    except ValueError as error:
        raise _no_lora(adapter, peft_config, str(error)) from error
    adapter.check_lora(denoiser)
    return denoiser


def _all_weights(adapter: BackboneAdapter) -> torch.nn.Module:
    half = {parameter.dtype for parameter in adapter.denoiser.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        raise ConfigurationError(
            f"Full fine-tuning needs float32 weights, but the denoiser has {sorted(map(str, half))}: updates as small "
            "as these vanish in half precision. Load it in float32 (`bf16=True` or `fp16=True` still runs it in half "
            "precision), or train a LoRA with `peft_config`."
        )
    return adapter.denoiser.requires_grad_(True)


def _check_same_process(ref_adapter: BackboneAdapter, adapter: BackboneAdapter) -> None:
    if ref_adapter.prediction_type != adapter.prediction_type:
        raise ConfigurationError(
            f"The pipeline of `ref_model` predicts {ref_adapter.prediction_type!r} and the policy "
            f"{adapter.prediction_type!r}, so their errors cannot be compared. Use a reference of the same prediction "
            "type, or correct `prediction_type` in the configuration of the wrong scheduler."
        )
    if not _is_same_schedule(ref_adapter.noise_schedule, adapter.noise_schedule):
        raise ConfigurationError(
            "The pipeline of `ref_model` was trained on another noise schedule than the policy's, so a timestep means "
            "another noise level to it. Use a reference of the same schedule (`beta_schedule`, `beta_start`, "
            "`beta_end`, `rescale_betas_zero_snr` of the scheduler's configuration)."
        )


def _is_same_schedule(one: VPSchedule | FlowSchedule, other: VPSchedule | FlowSchedule) -> bool:
    if isinstance(one, VPSchedule) and isinstance(other, VPSchedule):
        tables = one.alphas_cumprod, other.alphas_cumprod
        return tables[0].shape == tables[1].shape and torch.allclose(*tables, rtol=1e-3, atol=1e-6)
    # The shift of a flow says which levels are drawn, not what a level means.
    return type(one) is type(other) and one.timestep_scale == other.timestep_scale


def load_reference_denoiser(ref_model: Any, denoiser: torch.nn.Module, adapter: BackboneAdapter) -> torch.nn.Module:
    """The frozen denoiser behind a `ref_model` argument: a module, a pipeline, a hub id or a path.

    Args:
        denoiser: The policy.
        adapter: Of the policy's pipeline.

    Raises:
        ConfigurationError: It is not of the policy's class, or its pipeline predicts something else or was trained on
            another noise schedule (of a module alone this is not known).
    """
    if isinstance(ref_model, (str, os.PathLike)):
        ref_model = load_pipeline(ref_model, weightless=ENCODER_NAMES)
    if isinstance(ref_model, DiffusionPipeline):
        ref_adapter = adapter_for(ref_model)
        _check_same_process(ref_adapter, adapter)
        ref_model = ref_adapter.denoiser
    base = denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser
    if type(ref_model) is not type(base):
        raise ConfigurationError(
            f"`ref_model` is a {type(ref_model).__name__} and the policy a {type(base).__name__}; the reference must "
            "be of the same class, since both see the same noisy latents."
        )
    return ref_model.requires_grad_(False).eval()
