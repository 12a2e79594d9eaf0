# SPDX-License-Identifier: Apache-2.0
"""ImageReward's network, written down anew: the names of its checkpoint, and what the authors' code computes."""

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention


def _named(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None = None):
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
    return scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)


class _Vision(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, side: int, patch: int):
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.patch_embed = _named(proj=nn.Conv2d(3, width, patch, patch))
        self.blocks = nn.ModuleList(self._block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def _block(self, width: int) -> nn.ModuleDict:
        return _named(
            norm1=nn.LayerNorm(width, eps=1e-6),
            attn=_named(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)),
            norm2=nn.LayerNorm(width, eps=1e-6),
            mlp=_named(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            query, key, value = block["attn"]["qkv"](block["norm1"](x)).chunk(3, -1)
            x = x + block["attn"]["proj"](_attend(query, key, value, self.heads))
            x = x + block["mlp"]["fc2"](gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return self.norm(x)


class _Text(nn.Module):
    def __init__(self, width: int, inner: int, layers: int, heads: int, positions: int, words: int, seen: int):
        super().__init__()
        self.heads = heads
        self.embeddings = _named(
            word_embeddings=nn.Embedding(words, width),
            position_embeddings=nn.Embedding(positions, width),
            LayerNorm=nn.LayerNorm(width, eps=1e-12),
        )
        self.embeddings.register_buffer("position_ids", torch.arange(positions)[None])
        self.encoder = _named(
            layer=nn.ModuleList(
                _named(
                    attention=self._attention(width, width),
                    crossattention=self._attention(width, seen),
                    intermediate=_named(dense=nn.Linear(width, inner)),
                    output=_named(dense=nn.Linear(inner, width), LayerNorm=nn.LayerNorm(width, eps=1e-12)),
                )
                for _ in range(layers)
            )
        )

    def _attention(self, width: int, seen: int) -> nn.ModuleDict:
        own = _named(query=nn.Linear(width, width), key=nn.Linear(seen, width), value=nn.Linear(seen, width))
        return _named(self=own, output=_named(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12)))

    def _step(self, module: nn.ModuleDict, x: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor | None):
        own = module["self"]
        attended = _attend(own["query"](x), own["key"](seen), own["value"](seen), self.heads, mask)
        return module["output"]["LayerNorm"](module["output"]["dense"](attended) + x)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        table = self.embeddings
        x = table["word_embeddings"](tokens) + table["position_embeddings"].weight[: tokens.shape[1]]
        x = table["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = self._step(layer["attention"], x, x, mask[:, None, None].bool())
            x = self._step(layer["crossattention"], x, patches, None)
            inner = gelu(layer["intermediate"]["dense"](x))
            x = layer["output"]["LayerNorm"](layer["output"]["dense"](inner) + x)
        return x


class PublishedImageReward(nn.Module):
    """The authors' model.

    Args:
        vision: width, layers, heads, side and patch.
        text: width, inner width, layers, heads, positions, words, and the vision's width.
    """

    def __init__(self, vision: tuple[int, ...], text: tuple[int, ...]):
        super().__init__()
        width = text[0]
        self.blip = _named(visual_encoder=_Vision(*vision), text_encoder=_Text(*text))
        self.blip["vision_proj"] = nn.Linear(vision[0], 256)
        self.blip["text_proj"] = nn.Linear(width, 256)
        sizes = [(width, 1024), None, (1024, 128), None, (128, 64), None, (64, 16), (16, 1)]
        layers = [nn.Identity() if size is None else nn.Linear(*size) for size in sizes]
        self.mlp = _named(layers=nn.Sequential(*layers))

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.blip["text_encoder"](tokens, mask, self.blip["visual_encoder"](pixels))[:, 0]
        return (self.mlp["layers"](x)[:, 0] - 0.16717362830052426) / 1.0333394966054072
