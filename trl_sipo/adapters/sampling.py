# SPDX-License-Identifier: Apache-2.0
"""Drawing samples through a pipeline's own call, several prompts at a time."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trl_sipo.errors import ConfigurationError


def draw_batch(
    adapter: Any,
    prompts: Sequence[str],
    height: int,
    width: int,
    num_frames: int,
    num_inference_steps: int,
    guidance_scale: float | None,
    frame_rate: float | None,
    generators: Sequence[torch.Generator] | None,
) -> Tensor:
    """What `BackboneAdapter.sample_batch` gives for these arguments, in its order."""
    if generators is not None and len(generators) != len(prompts):
        raise ConfigurationError(f"{len(generators)} generators for {len(prompts)} prompts: give one for each.")
    known = inspect.signature(adapter.pipeline.__call__).parameters
    options: dict[str, Any] = {} if guidance_scale is None else {adapter.guidance_argument: guidance_scale}
    if not options.keys() <= known.keys():
        raise ConfigurationError(
            f"guidance_scale={guidance_scale}, but the call of {adapter.pipeline_class_name} takes none: leave it."
        )
    if adapter.is_video:
        options["num_frames"] = num_frames
    if frame_rate is not None and "frame_rate" in known:
        options["frame_rate"] = frame_rate
    with _decoding_in_own_dtype(adapter.pipeline.vae):
        output = adapter.pipeline(
            prompt=list(prompts),  # by name: the first argument of some is an image; a copy: some write into it
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            generator=None if generators is None else list(generators),
            output_type="pt",
            **adapter.sampling_options,
            **options,
        )
    pixels = output.frames.transpose(1, 2) if adapter.is_video else output.images
    return pixels.float().cpu() * 2 - 1


@contextmanager
def _decoding_in_own_dtype(vae: Any) -> Iterator[None]:
    """Let the VAE decode in its own dtype, whatever the denoiser's, and inside autocast too."""
    decode = vae.decode

    def decode_in_own_dtype(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(vae.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = decode_in_own_dtype
    try:
        yield
    finally:
        del vae.decode
