# SPDX-License-Identifier: Apache-2.0
"""The passes that a training step is made of, on noise: for counting them, and for measuring them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trl_sipo.adapters.wrappers import unwrap_denoiser
from trl_sipo.cost.architectures import Architecture
from trl_sipo.cost.denoiser_inputs import DENOISER_INPUTS, Sample

PAIR = 2  # samples of a step on one pair


def forward_loss(
    model: nn.Module,
    architecture: Architecture,
    device: str,
    dtype: torch.dtype,
    *,
    samples: int = PAIR,
    split: bool = False,
) -> Callable[[], Tensor]:
    """A forward pass to a scalar; with `split`, on one arm after the other, as the trainers do it.

    Args:
        model: The denoiser, or a PEFT model around it.
        architecture: Its kind and size.
        device, dtype: Of the inputs.
        samples: In one call; both arms of the pairs together.
        split: Whether each arm is a call of its own, with the activations of one alive at a time.
    """
    sample = Sample(samples // 2 if split else samples, architecture.latents, architecture.text_tokens, device, dtype)
    make_inputs = DENOISER_INPUTS[architecture.denoiser]

    def mean_square() -> Tensor:
        with torch.device(device):
            output = model(**make_inputs(sample, unwrap_denoiser(model).config), return_dict=False)[0]
        output = torch.stack(output) if isinstance(output, list) else output
        return output.float().square().mean()

    def of_both_arms() -> Tensor:
        return checkpoint(mean_square, use_reentrant=False) + mean_square()

    return of_both_arms if split else mean_square
