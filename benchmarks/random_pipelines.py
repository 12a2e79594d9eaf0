# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines with random weights, of published sizes and of small ones: nothing is downloaded.

The denoiser, the VAE and the text encoders of a published size have the configurations of
`trl_sipo/cost/architectures.py`. Tokenizers know letters only, which costs neither time nor memory.
"""

import copy
import string
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from transformers import CLIPTokenizer, T5Tokenizer

from trl_sipo.cost.architectures import ARCHITECTURES, FROZEN, default_dtype

CLIP_TOKENS, T5_TOKENS = 77, 512


@dataclass(frozen=True)
class RandomPipeline:
    """What a pipeline is built from; parts are (class, what differs from its defaults).

    Attributes:
        pipeline: Class of the pipeline, in diffusers.
        denoiser, vae: Classes in diffusers.
        text_encoders: Classes in transformers.
        size: Height and width in pixels and number of frames of a training sample.
    """

    pipeline: str
    denoiser: tuple[str, dict[str, Any]]
    vae: tuple[str, dict[str, Any]]
    text_encoders: tuple[tuple[str, dict[str, Any]], ...]
    size: tuple[int, int, int]


def published(name: str) -> RandomPipeline:
    """That of a key of `ARCHITECTURES`."""
    found = ARCHITECTURES[name]
    vae, *text_encoders = [FROZEN[part][1:3] for part in found.frozen]
    return RandomPipeline(found.pipeline, (found.denoiser, found.config), vae, tuple(text_encoders), found.size)


def _image_vae(*widths: int) -> tuple[str, dict[str, Any]]:
    """Eight pixels a side for each latent, as in Stable Diffusion."""
    _, name, config, _ = FROZEN["vae_4"]
    return name, {**config, "block_out_channels": widths, "norm_num_groups": 4}


def _clip(width: int, layers: int, heads: int, *, projection: int | None = None) -> tuple[str, dict[str, Any]]:
    sizes = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "vocab_size": 64,
    }  # fmt: skip
    if projection is None:
        return "CLIPTextModel", sizes
    return "CLIPTextModelWithProjection", {**sizes, "projection_dim": projection}


_UNET_41M = {
    "block_out_channels": (128, 192, 352), "attention_head_dim": 8, "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_UNET_TINY = {
    "block_out_channels": (8, 16), "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1,
    "cross_attention_dim": 24,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_SDXL_TINY = {
    **_UNET_TINY, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 12,
}  # fmt: skip
_WAN_TINY = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 16, "num_layers": 2,
}  # fmt: skip
_WAN_VAE_TINY = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}  # fmt: skip
_UMT5_TINY = {"vocab_size": 128, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}

PIPELINES: dict[str, RandomPipeline] = {
    "sd15": published("Stable Diffusion 1.5"),
    "sdxl": published("Stable Diffusion XL"),
    "wan-1.3b": published("Wan2.1-T2V-1.3B"),
    "41M": RandomPipeline(
        "StableDiffusionPipeline", ("UNet2DConditionModel", _UNET_41M), _image_vae(64, 128, 256, 256),
        (_clip(768, 6, 12),), (128, 128, 1),
    ),
    "tiny": RandomPipeline(
        "StableDiffusionPipeline", ("UNet2DConditionModel", _UNET_TINY), _image_vae(4, 4, 4, 4),
        (_clip(24, 1, 2),), (64, 64, 1),
    ),
    "sdxl-tiny": RandomPipeline(
        "StableDiffusionXLPipeline", ("UNet2DConditionModel", _SDXL_TINY), _image_vae(4, 4, 4, 4),
        (_clip(8, 2, 2), _clip(16, 2, 2, projection=12)), (64, 64, 1),
    ),
    "wan-tiny": RandomPipeline(
        "WanPipeline", ("WanTransformer3DModel", _WAN_TINY), ("AutoencoderKLWan", _WAN_VAE_TINY),
        (("UMT5EncoderModel", _UMT5_TINY),), (64, 64, 5),
    ),
}  # fmt: skip


def make_pipeline(
    parts: RandomPipeline, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """A pipeline with random weights, the same ones each time.

    Args:
        parts: What it is built from.
        device: Where its weights are made.
        dtype: Of the denoiser and the text encoders; the VAE is float32, as it is trained with.
    """
    torch.manual_seed(0)
    with torch.device(device):
        with default_dtype(dtype):
            denoiser = _module(diffusers, *parts.denoiser)
        vae = _module(diffusers, *parts.vae)
    pipeline_class = getattr(diffusers, parts.pipeline)
    pipeline = _ASSEMBLE[pipeline_class](denoiser, vae, _text_parts(parts, device, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_own_denoiser(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline that shares all weights, and whose denoiser is a module of its own, to put a LoRA into."""
    name = "transformer" if isinstance(pipeline, WanPipeline) else "unet"
    shared = getattr(pipeline, name)
    own = copy.deepcopy(shared, {id(parameter): parameter for parameter in shared.parameters()})
    beside = copy.copy(pipeline)
    beside.register_modules(**{name: own})
    return beside


def _module(library: Any, class_name: str, config: dict[str, Any]) -> torch.nn.Module:
    return getattr(library, class_name)(**config).eval()


def _text_parts(parts: RandomPipeline, device: str, dtype: torch.dtype) -> list[tuple[Any, torch.nn.Module]]:
    """Tokenizer and encoder, for each text encoder."""
    found = []
    for class_name, config in parts.text_encoders:
        is_clip = class_name.startswith("CLIP")
        tokenizer = _clip_tokenizer() if is_clip else _t5_tokenizer()
        special = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
        encoder_class = getattr(transformers, class_name)
        with torch.device(device), default_dtype(dtype):
            encoder = encoder_class(encoder_class.config_class(**{**config, **(special if is_clip else {})}))
        found.append((tokenizer, encoder.to(dtype).eval()))
    return found


def _clip_tokenizer() -> CLIPTokenizer:
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def _t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [*special, *((letter, -3.0) for letter in string.ascii_lowercase)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def _vp_scheduler() -> DDIMScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _stable_diffusion(unet: Any, vae: Any, texts: list[tuple[Any, Any]]) -> StableDiffusionPipeline:
    ((tokenizer, text_encoder),) = texts
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_vp_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(unet: Any, vae: Any, texts: list[tuple[Any, Any]]) -> StableDiffusionXLPipeline:
    (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = texts
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=_vp_scheduler(),
        add_watermarker=False,
    )


def _wan(transformer: Any, vae: Any, texts: list[tuple[Any, Any]]) -> WanPipeline:
    ((tokenizer, text_encoder),) = texts
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


_ASSEMBLE: dict[type[DiffusionPipeline], Any] = {
    StableDiffusionPipeline: _stable_diffusion,
    StableDiffusionXLPipeline: _stable_diffusion_xl,
    WanPipeline: _wan,
}
