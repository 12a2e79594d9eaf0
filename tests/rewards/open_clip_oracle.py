# SPDX-License-Identifier: Apache-2.0
"""open_clip's CLIP with a vision transformer, written down anew: its names of weights, and what it computes."""

from collections import OrderedDict

import torch
from torch import nn


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=up, gelu=nn.GELU(), c_proj=down))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Vision(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, side: int, patch: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Transformer(width, layers, heads)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """Text and image embeddings.

    Args:
        out: width of the embeddings.
        vision: width, layers, heads, side and patch of the vision transformer.
        text: width, layers, heads, positions and vocabulary of the text transformer.
    """

    def __init__(self, out: int, vision: tuple[int, ...], text: tuple[int, ...]):
        super().__init__()
        width, layers, heads, positions, vocabulary = text
        self.visual = _Vision(*vision, out)
        self.transformer = _Transformer(width, layers, heads)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def text(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, positions) with the end of text as the largest number -> (n, out)."""
        mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(-1)] @ self.text_projection
