# SPDX-License-Identifier: Apache-2.0
"""From a batch of preference pairs to what the training step needs: latents, noise and conditioning.

All randomness of a pair (noise level, noise, caption dropout, VAE sample) comes from a generator of its own, keyed by
(seed, epoch, pair index). The draw of a pair therefore does not depend on its neighbours in the batch, on the batch
size, or on the number of processes. One setting is the exception: `timestep_sampling="stratified"` spreads the levels
of a micro-batch, so they depend on which pairs it holds.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from trl_sipo.adapters.base import BackboneAdapter
from trl_sipo.core.transfer import to_device
from trl_sipo.data.formats import Arms
from trl_sipo.data.seeding import seeded_generator
from trl_sipo.errors import ConfigurationError

# First word of the key of every per-pair generator, so that training and evaluation never share a draw.
TRAIN_STREAM, EVAL_STREAM = 0, 1

# Bytes of embeddings kept per process, on the text encoder's device: in float32 those of a thousand prompts of Stable
# Diffusion 1.5, and of eight of FLUX.2.
PROMPT_CACHE_BYTES = 2**28


# The first is that of samples of one arm.
ARMS = ("chosen", "rejected")

PairNoise = tuple[torch.Tensor, ...]
"""Noise of each arm that there is, the chosen one first, float32 of the shape of its latents."""


@dataclass(frozen=True)
class EncodedPairs:
    """A batch of pairs, or of samples of one arm, on the training device.

    Attributes:
        chosen_latents: (batch, ...) float32, normalised latents of the preferred images or clips; of samples of one
            arm, those that there are.
        rejected_latents: (batch, ...) float32, of the dispreferred ones; `None` of samples of one arm.
        conditioning: Batched tensors for the denoiser, one row per pair.
        frame_rate: (batch,) frames per second of clips; `None` where it is not known, or for images.
    """

    chosen_latents: torch.Tensor
    rejected_latents: torch.Tensor | None
    conditioning: dict[str, torch.Tensor]
    frame_rate: torch.Tensor | None = None

    @property
    def arms(self) -> tuple[torch.Tensor, ...]:
        """The latents of each arm that there is, the chosen one first."""
        return tuple(latents for latents in (self.chosen_latents, self.rejected_latents) if latents is not None)

    @property
    def latents(self) -> torch.Tensor:
        """[chosen; rejected], (2 * batch, ...)."""
        return torch.cat(self.arms)

    @property
    def pair_conditioning(self) -> dict[str, torch.Tensor]:
        """The conditioning repeated for [chosen; rejected]."""
        return {name: torch.cat([value, value]) for name, value in self.conditioning.items()}

    @property
    def pair_frame_rate(self) -> torch.Tensor | None:
        """The frame rate repeated for [chosen; rejected], (2 * batch,)."""
        return None if self.frame_rate is None else torch.cat([self.frame_rate, self.frame_rate])


def pair_numbers(inputs: dict) -> torch.Tensor:
    """`pair_index` (batch,) on the CPU, without waiting for the device where the collator has kept it there too."""
    kept = inputs.get("pair_numbers")
    return inputs["pair_index"].cpu() if kept is None else torch.tensor(kept)


def pair_generators(pair_index: torch.Tensor, *key: int) -> list[torch.Generator]:
    """One CPU generator per pair, keyed by `(*key, index)`."""
    return [seeded_generator(*key, index) for index in pair_index.tolist()]


def draw_noise(like: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Standard normal noise of the shape of `like` (batch, ...) in float32, each row from its own generator."""
    rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return to_device(torch.stack(rows), like.device)


def draw_pair_noise(pairs: EncodedPairs, generators: list[torch.Generator], *, share: bool) -> PairNoise:
    """Noise for each arm: the same one for both, unless `share` is False or their shapes differ."""
    first = draw_noise(pairs.chosen_latents, generators)
    others = [
        first if share and latents.shape == first.shape else draw_noise(latents, generators)
        for latents in pairs.arms[1:]
    ]
    return first, *others


class PairEncoder:
    """Turns the collator's output into [`EncodedPairs`] through a backbone's frozen VAE and text encoders.

    Args:
        adapter: The backbone.
        sample_posterior: Draw latents from the VAE's posterior instead of taking its mean.
        caption_dropout: Probability of replacing a prompt by the empty one while training.

    Attributes:
        null: What takes the place of a dropped prompt; `None`: it is encoded when it is first needed.
    """

    def __init__(self, adapter: BackboneAdapter, *, sample_posterior: bool, caption_dropout: float):
        self.adapter = adapter
        self.sample_posterior = sample_posterior
        self.caption_dropout = caption_dropout
        self._prompt_cache: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self.null: dict[str, torch.Tensor] | None = None

    def __call__(
        self, inputs: dict, device: torch.device, generators: list[torch.Generator], *, training: bool
    ) -> EncodedPairs:
        """Encode one batch. Caption dropout and VAE sampling happen only when `training`, from `generators`."""
        latents = {arm: self._latents(inputs, arm, device, generators, training) for arm in arms_of(inputs)}
        conditioning = self._conditioning(inputs, generators, training)
        conditioning = {name: to_device(value, device) for name, value in conditioning.items()}
        return EncodedPairs(latents["chosen"], latents.get("rejected"), conditioning, inputs.get("frame_rate"))

    def encoded_once(self, inputs: dict, device: torch.device) -> dict:
        """A batch as a cache gives it, with latents (posterior mean) and conditioning: to encode it again is free."""
        arms = arms_of(inputs)
        latents = {f"{arm}_latents": self._latents(inputs, arm, device, [], training=False) for arm in arms}
        return {**inputs, **latents, "conditioning": self._prompt_rows(inputs)}

    def _latents(
        self, inputs: dict, arm: str, device: torch.device, generators: list[torch.Generator], training: bool
    ) -> torch.Tensor:
        if f"{arm}_latents" in inputs:
            latents = inputs[f"{arm}_latents"].to(device, torch.float32)
            if self.sample_posterior and training:
                return latents + inputs[f"{arm}_std"].to(latents) * draw_noise(latents, generators)
            return latents
        pixels = inputs[f"{arm}_pixels"].to(device)
        noise = None
        if self.sample_posterior and training:
            height, width = pixels.shape[-2:]
            shape = self.adapter.latent_shape(height, width, pixels.shape[2] if pixels.ndim == 5 else 1)
            noise = draw_noise(torch.empty(len(generators), *shape, device=device), generators)
        return self.adapter.encode_media(pixels, noise=noise)

    def _conditioning(
        self, inputs: dict, generators: list[torch.Generator], training: bool
    ) -> dict[str, torch.Tensor]:
        rows = self._prompt_rows(inputs)
        if training and self.caption_dropout > 0:
            dropped = [bool(torch.rand((), generator=generator) < self.caption_dropout) for generator in generators]
            rows = [self._null_like(row) if drop else row for row, drop in zip(rows, dropped, strict=True)]
        return self.adapter.collate(rows)

    def _prompt_rows(self, inputs: dict) -> list[dict[str, torch.Tensor]]:
        return inputs["conditioning"] if "conditioning" in inputs else self._encode_prompts(inputs["prompt"])

    def _null_like(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.null is None:
            self.null = self.adapter.null_conditioning()
        return {name: to_device(value, row[name].device) for name, value in self.null.items()}

    def _encode_prompts(self, prompts: list[str]) -> list[dict[str, torch.Tensor]]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompt_cache]
        if missing:
            self._prompt_cache.update(zip(missing, self.adapter.encode_prompts(missing), strict=True))
        rows = [self._prompt_cache[prompt] for prompt in prompts]
        for prompt in prompts:
            self._prompt_cache.move_to_end(prompt)
        size = sum(map(_num_bytes, self._prompt_cache.values()))
        while size > PROMPT_CACHE_BYTES:
            _, dropped = self._prompt_cache.popitem(last=False)
            size -= _num_bytes(dropped)
        return rows


def _num_bytes(row: dict[str, torch.Tensor]) -> int:
    return sum(value.nbytes for value in row.values())


def arms_of(inputs: dict) -> list[str]:
    """The arms that a batch has, the chosen one first."""
    return [arm for arm in ARMS if f"{arm}_pixels" in inputs or f"{arm}_latents" in inputs]


def check_inputs(inputs: dict, samples: Arms = "pair") -> None:
    """Raise [`ConfigurationError`] when a batch lacks what the training step reads (a custom collator, usually).

    Args:
        samples: What the samples of the method are made of.
    """
    arms = ARMS if samples == "pair" else ARMS[:1]
    needed = {"prompt", "pair_index", *(["label"] if samples == "each" else [])}
    has_media = any({f"{arm}_{kind}" for arm in arms} <= set(inputs) for kind in ("pixels", "latents"))
    if not has_media or not needed <= set(inputs):
        pixels, latents = ("/".join(f"`{arm}_{kind}`" for arm in arms) for kind in ("pixels", "latents"))
        raise ConfigurationError(
            f"A batch has the keys {sorted(inputs)}, but the training step needs {sorted(needed)} and either "
            f"{pixels} or {latents}. A custom `data_collator` must return them; see trl_sipo.data.collator."
        )
