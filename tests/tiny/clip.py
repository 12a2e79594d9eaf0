# SPDX-License-Identifier: Apache-2.0
"""Tiny CLIP text encoders, built in process; their tokenizer is `tests.tiny_models.tiny_clip_tokenizer`."""

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def tiny_clip_config(tokenizer: CLIPTokenizer, width: int = 16, projection_dim: int = 16) -> CLIPTextConfig:
    """Two layers of `width`, so that there is a penultimate one; pooled outputs of `projection_dim`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_clip_encoder(tokenizer: CLIPTokenizer, width: int = 16) -> CLIPTextModel:
    """A CLIP text model in eval mode. The caller seeds."""
    return CLIPTextModel(tiny_clip_config(tokenizer, width)).eval()


def tiny_clip_projector(
    tokenizer: CLIPTokenizer, width: int = 16, projection_dim: int = 16
) -> CLIPTextModelWithProjection:
    """A CLIP text model with a projected pooled output, in eval mode. The caller seeds."""
    return CLIPTextModelWithProjection(tiny_clip_config(tokenizer, width, projection_dim)).eval()
