# SPDX-License-Identifier: Apache-2.0
"""What each denoiser is called with, as its pipeline calls it, filled with noise: for counting, nothing depends on it.

The adapters make the same calls, but from a whole pipeline, which at real size does not fit in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """The size of one forward pass.

    Attributes:
        batch: Samples; a pair is two.
        latents: (C, h, w) or (C, f, h, w).
        text_tokens: Length of the prompt's embedding.
        device, dtype: Of the inputs.
    """

    batch: int
    latents: tuple[int, ...]
    text_tokens: int
    device: str
    dtype: torch.dtype

    def random(self, *shape: int) -> Tensor:
        """Noise of the shape (batch, *shape)."""
        return torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)

    def level(self) -> Tensor:
        """A noise level in [0, 1] for each sample."""
        return torch.rand(self.batch, device=self.device)

    def mask(self, tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """A mask that hides no token."""
        return torch.ones(self.batch, tokens, device=self.device, dtype=dtype)

    def positions(self, tokens: int, axes: int) -> Tensor:
        """Position ids (tokens, axes)."""
        return torch.zeros(tokens, axes, device=self.device)


def _unet(sample: Sample, config: Any) -> dict[str, Any]:
    inputs = {
        "sample": sample.random(*sample.latents),
        "timestep": (999 * sample.level()).long(),
        "encoder_hidden_states": sample.random(sample.text_tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": sample.random(width), "time_ids": sample.random(6)}
    return inputs


def _sd3(sample: Sample, config: Any) -> dict[str, Any]:
    return {
        "hidden_states": sample.random(*sample.latents),
        "timestep": 1000 * sample.level(),
        "encoder_hidden_states": sample.random(sample.text_tokens, config.joint_attention_dim),
        "pooled_projections": sample.random(config.pooled_projection_dim),
    }


def _flux(sample: Sample, config: Any) -> dict[str, Any]:
    _, height, width = sample.latents
    tokens = height * width // 4  # packed two by two
    return {
        "hidden_states": sample.random(tokens, config.in_channels),
        "timestep": sample.level(),
        "guidance": sample.level() if config.guidance_embeds else None,
        "pooled_projections": sample.random(config.pooled_projection_dim),
        "encoder_hidden_states": sample.random(sample.text_tokens, config.joint_attention_dim),
        "txt_ids": sample.positions(sample.text_tokens, 3),
        "img_ids": sample.positions(tokens, 3),
    }


def _flux2(sample: Sample, config: Any) -> dict[str, Any]:
    _, height, width = sample.latents
    tokens, axes = height * width, len(config.axes_dims_rope)
    return {
        "hidden_states": sample.random(tokens, config.in_channels),
        "timestep": sample.level(),
        "guidance": sample.level() if config.guidance_embeds else None,
        "encoder_hidden_states": sample.random(sample.text_tokens, config.joint_attention_dim),
        "txt_ids": sample.positions(sample.text_tokens, axes).expand(sample.batch, -1, -1),
        "img_ids": sample.positions(tokens, axes).expand(sample.batch, -1, -1),
    }


def _qwen_image(sample: Sample, config: Any) -> dict[str, Any]:
    _, _, height, width = sample.latents
    return {
        "hidden_states": sample.random(height * width // 4, config.in_channels),
        "timestep": sample.level(),
        "encoder_hidden_states": sample.random(sample.text_tokens, config.joint_attention_dim),
        "encoder_hidden_states_mask": None,  # what the pipeline gives where no token is hidden
        "img_shapes": [[(1, height // 2, width // 2)]] * sample.batch,
    }


def _z_image(sample: Sample, config: Any) -> dict[str, Any]:
    channels, height, width = sample.latents
    return {
        "x": list(sample.random(channels, 1, height, width)),
        "t": sample.level(),
        "cap_feats": list(sample.random(sample.text_tokens, config.cap_feat_dim)),
    }


def _cogvideox(sample: Sample, config: Any) -> dict[str, Any]:
    channels, frames, height, width = sample.latents
    together = config.patch_size_t or 1  # frames in a token: two in CogVideoX 1.5, which are filled up
    frames += -frames % together
    rotary = None
    if config.use_rotary_positional_embeddings:
        rotary = (sample.positions(frames // together * height * width // 4, config.attention_head_dim),) * 2
    return {
        "hidden_states": sample.random(frames, channels, height, width),
        "timestep": (999 * sample.level()).long(),
        "encoder_hidden_states": sample.random(sample.text_tokens, config.text_embed_dim),
        "image_rotary_emb": rotary,
    }


def _wan(sample: Sample, config: Any) -> dict[str, Any]:
    _, frames, height, width = sample.latents
    timestep = 1000 * sample.level()
    if config.in_channels == 48:  # Wan2.2-TI2V-5B has a timestep for each token
        timestep = timestep[:, None].expand(-1, frames * height * width // 4)
    return {
        "hidden_states": sample.random(*sample.latents),
        "timestep": timestep,
        "encoder_hidden_states": sample.random(sample.text_tokens, config.text_dim),
    }


def _ltx(sample: Sample, config: Any) -> dict[str, Any]:
    channels, frames, height, width = sample.latents
    return {
        "hidden_states": sample.random(frames * height * width, channels),
        "timestep": 1000 * sample.level(),
        "encoder_hidden_states": sample.random(sample.text_tokens, config.caption_channels),
        "encoder_attention_mask": sample.mask(sample.text_tokens),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _hunyuan(sample: Sample, config: Any) -> dict[str, Any]:
    return {
        "hidden_states": sample.random(*sample.latents),
        "timestep": (1000 * sample.level()).long(),
        "encoder_hidden_states": sample.random(sample.text_tokens, config.text_embed_dim),
        "encoder_attention_mask": sample.mask(sample.text_tokens),
        "pooled_projections": sample.random(config.pooled_projection_dim),
        "guidance": 6000 * sample.level(),
    }


def _hunyuan15(sample: Sample, config: Any) -> dict[str, Any]:
    _, *size = sample.latents
    return {
        "hidden_states": sample.random(config.in_channels, *size),  # latents, the image's and its mask
        "timestep": (1000 * sample.level()).to(sample.dtype),
        "encoder_hidden_states": sample.random(sample.text_tokens, config.text_embed_dim),
        "encoder_attention_mask": sample.mask(sample.text_tokens),
        "encoder_hidden_states_2": sample.random(256, config.text_embed_2_dim),
        "encoder_attention_mask_2": sample.mask(256),
        "image_embeds": 0 * sample.random(729, config.image_embed_dim),
    }


# Class of the denoiser -> its keyword arguments, from a size and the module's configuration.
DENOISER_INPUTS: dict[str, Callable[[Sample, Any], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "CogVideoXTransformer3DModel": _cogvideox,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "HunyuanVideo15Transformer3DModel": _hunyuan15,
}

OF_THE_PROMPT = (
    "encoder_hidden_states", "encoder_hidden_states_2", "pooled_projections", "text_embeds", "cap_feats",
)  # fmt: skip
"""Those that a prompt is encoded to, which a cache stores."""
