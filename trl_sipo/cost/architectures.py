# SPDX-License-Identifier: Apache-2.0
"""The published configurations of the denoisers that the adapters train, and of the frozen parts beside them.

Written from the models' public configuration files and the defaults of diffusers' and transformers' classes, not read
from a download. The check is the number of parameters: `parameters` and the counts of `FROZEN` are published sizes in
billions, and a test counts the built modules against them. Numbers of parameters cannot tell apart how a width is
divided into heads; they, like the sizes and lengths of a usual sample, are as stated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Architecture:
    """One published model.

    Attributes:
        pipeline: Class of the pipeline, a key of `trl_sipo.adapters.ADAPTERS`.
        denoiser: Class of the denoiser, in diffusers.
        parameters: Published number of the denoiser's parameters, in billions.
        size: Height and width in pixels and number of frames of a usual training sample.
        latents: Shape of its latents, without the batch, as the adapter gives them: (C, h, w) or (C, f, h, w).
        text_tokens: Length of the prompt's embedding that the pipeline's call gives the denoiser; the longest possible
            where it depends on the prompt.
        config: What differs from the class's defaults.
        frozen: Keys of `FROZEN`: the VAE first, then the text encoders.
    """

    pipeline: str
    denoiser: str
    parameters: float
    size: tuple[int, int, int]
    latents: tuple[int, ...]
    text_tokens: int
    config: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()


_SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
_SD3_FROZEN = ("vae_16", "clip_l_projected", "clip_g", "t5_xxl")
_COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_KLEIN_4B = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
    "guidance_embeds": False,
}  # fmt: skip
_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

ARCHITECTURES: dict[str, Architecture] = {
    "Stable Diffusion 1.5": Architecture(
        "StableDiffusionPipeline", "UNet2DConditionModel", 0.86, (512, 512, 1), (4, 64, 64), 77,
        {"cross_attention_dim": 768}, ("vae_4", "clip_l"),
    ),
    "Stable Diffusion XL": Architecture(
        "StableDiffusionXLPipeline", "UNet2DConditionModel", 2.57, (1024, 1024, 1), (4, 128, 128), 77,
        _SDXL, ("vae_4", "clip_l", "clip_g"),
    ),
    "Stable Diffusion 3 Medium": Architecture(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", 2.03, (1024, 1024, 1), (16, 128, 128), 333,
        {**_SD3, "pos_embed_max_size": 192}, _SD3_FROZEN,
    ),
    "Stable Diffusion 3.5 Medium": Architecture(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", 2.24, (1024, 1024, 1), (16, 128, 128), 333,
        {**_SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        _SD3_FROZEN,
    ),
    "FLUX.1-dev": Architecture(
        "FluxPipeline", "FluxTransformer2DModel", 11.9, (1024, 1024, 1), (16, 128, 128), 512,
        {"guidance_embeds": True}, ("vae_16", "clip_l", "t5_xxl"),
    ),
    "FLUX.2-dev": Architecture(
        "Flux2Pipeline", "Flux2Transformer2DModel", 32.0, (1024, 1024, 1), (128, 64, 64), 512,
        {}, ("vae_flux2", "mistral_24b"),
    ),
    "FLUX.2-klein 4B": Architecture(
        "Flux2KleinPipeline", "Flux2Transformer2DModel", 3.9, (1024, 1024, 1), (128, 64, 64), 512,
        _KLEIN_4B, ("vae_flux2", "qwen3_4b"),
    ),
    "Qwen-Image": Architecture(
        "QwenImagePipeline", "QwenImageTransformer2DModel", 20.4, (1024, 1024, 1), (16, 1, 128, 128), 512,
        {}, ("vae_wan", "qwen25_vl_7b"),
    ),
    "Z-Image": Architecture(
        "ZImagePipeline", "ZImageTransformer2DModel", 6.2, (1024, 1024, 1), (16, 128, 128), 512,
        {}, ("vae_16", "qwen3_4b"),
    ),
    "CogVideoX-2B": Architecture(
        "CogVideoXPipeline", "CogVideoXTransformer3DModel", 1.69, (480, 720, 49), (16, 13, 60, 90), 226,
        {}, ("vae_cogvideox", "t5_xxl"),
    ),
    "CogVideoX-5B": Architecture(
        "CogVideoXPipeline", "CogVideoXTransformer3DModel", 5.57, (480, 720, 49), (16, 13, 60, 90), 226,
        _COGVIDEOX_5B, ("vae_cogvideox", "t5_xxl"),
    ),
    "Wan2.1-T2V-1.3B": Architecture(
        "WanPipeline", "WanTransformer3DModel", 1.42, (480, 832, 81), (16, 21, 60, 104), 512,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, ("vae_wan", "umt5_xxl"),
    ),
    "Wan2.1-T2V-14B": Architecture(
        "WanPipeline", "WanTransformer3DModel", 14.3, (480, 832, 81), (16, 21, 60, 104), 512,
        {}, ("vae_wan", "umt5_xxl"),
    ),
    "Wan2.2-TI2V-5B": Architecture(
        "WanPipeline", "WanTransformer3DModel", 5.0, (704, 1280, 121), (48, 31, 44, 80), 512,
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        ("vae_wan22", "umt5_xxl"),
    ),
    "LTX-Video 2B": Architecture(
        "LTXPipeline", "LTXVideoTransformer3DModel", 1.92, (512, 704, 161), (128, 21, 16, 22), 128,
        {}, ("vae_ltx", "t5_xxl"),
    ),
    "HunyuanVideo": Architecture(
        "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", 12.8, (480, 832, 61), (16, 16, 60, 104), 256,
        {}, ("vae_hunyuan", "llama3_8b", "clip_l"),
    ),
    "HunyuanVideo-1.5": Architecture(
        "HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel", 8.3, (480, 832, 61), (32, 16, 30, 52), 1000,
        {"task_type": "t2v"}, ("vae_hunyuan15", "qwen25_vl_7b_text", "byt5"),
    ),
}  # fmt: skip

# Hub id -> (key of `ARCHITECTURES`, denoisers of that kind, of which a sample passes one).
HUB_MODELS: dict[str, tuple[str, int]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("Stable Diffusion 1.5", 1),
    "stabilityai/stable-diffusion-xl-base-1.0": ("Stable Diffusion XL", 1),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("Stable Diffusion 3 Medium", 1),
    "stabilityai/stable-diffusion-3.5-medium": ("Stable Diffusion 3.5 Medium", 1),
    "black-forest-labs/FLUX.1-dev": ("FLUX.1-dev", 1),
    "black-forest-labs/FLUX.2-dev": ("FLUX.2-dev", 1),
    "black-forest-labs/FLUX.2-klein-base-4B": ("FLUX.2-klein 4B", 1),
    "Qwen/Qwen-Image": ("Qwen-Image", 1),
    "Tongyi-MAI/Z-Image": ("Z-Image", 1),
    "zai-org/CogVideoX-2b": ("CogVideoX-2B", 1),
    "zai-org/CogVideoX-5b": ("CogVideoX-5B", 1),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("Wan2.1-T2V-1.3B", 1),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("Wan2.1-T2V-14B", 1),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("Wan2.2-TI2V-5B", 1),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("Wan2.1-T2V-14B", 2),
    "Lightricks/LTX-Video": ("LTX-Video 2B", 1),
    "hunyuanvideo-community/HunyuanVideo": ("HunyuanVideo", 1),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": ("HunyuanVideo-1.5", 1),
}

_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip
_T5_XXL = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "vocab_size": 32128,
}  # fmt: skip
_BYT5 = {**_T5_XXL, "d_model": 1472, "d_ff": 3584, "num_layers": 12, "num_heads": 6, "vocab_size": 1510}
_QWEN3_4B = {
    "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN25_7B = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064,
}  # fmt: skip
_QWEN25_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
}  # fmt: skip
_LLAMA3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128320,
}  # fmt: skip
_MISTRAL_24B = {
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 32768, "vocab_size": 131072,
    },
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "patch_size": 14,
    },
}  # fmt: skip
_WAN22_VAE = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip

# Name -> (library, class, what differs from its defaults, published parameters in billions).
FROZEN: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "vae_4": ("diffusers", "AutoencoderKL", {**_VAE, "latent_channels": 4}, 0.0837),
    "vae_16": (
        "diffusers", "AutoencoderKL",
        {**_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}, 0.0838,
    ),
    "vae_flux2": ("diffusers", "AutoencoderKLFlux2", {}, 0.084),
    "vae_cogvideox": ("diffusers", "AutoencoderKLCogVideoX", {}, 0.2156),
    "vae_wan": ("diffusers", "AutoencoderKLWan", {}, 0.1269),
    "vae_wan22": ("diffusers", "AutoencoderKLWan", _WAN22_VAE, 0.7047),
    "vae_ltx": ("diffusers", "AutoencoderKLLTXVideo", {}, 0.419),
    "vae_hunyuan": ("diffusers", "AutoencoderKLHunyuanVideo", {}, 0.2465),
    "vae_hunyuan15": ("diffusers", "AutoencoderKLHunyuanVideo15", {}, 1.26),
    "clip_l": ("transformers", "CLIPTextModel", _CLIP_L, 0.1231),
    "clip_l_projected": ("transformers", "CLIPTextModelWithProjection", _CLIP_L, 0.1237),
    "clip_g": ("transformers", "CLIPTextModelWithProjection", _CLIP_G, 0.6947),
    "t5_xxl": ("transformers", "T5EncoderModel", _T5_XXL, 4.762),
    "umt5_xxl": ("transformers", "UMT5EncoderModel", {**_T5_XXL, "vocab_size": 256384}, 5.681),
    "byt5": ("transformers", "T5EncoderModel", _BYT5, 0.219),
    "qwen3_4b": ("transformers", "Qwen3Model", _QWEN3_4B, 4.02),
    "qwen25_vl_7b": (
        "transformers", "Qwen2_5_VLForConditionalGeneration",
        {"text_config": _QWEN25_7B, "vision_config": _QWEN25_VISION}, 8.29,
    ),
    "qwen25_vl_7b_text": ("transformers", "Qwen2_5_VLTextModel", _QWEN25_7B, 7.07),
    "llama3_8b": ("transformers", "LlamaModel", _LLAMA3_8B, 7.505),
    "mistral_24b": ("transformers", "Mistral3ForConditionalGeneration", _MISTRAL_24B, 24.0),
}  # fmt: skip


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are made in `dtype`, so that no float32 copy of a model ever exists."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
