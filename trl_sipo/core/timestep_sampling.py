# SPDX-License-Identifier: Apache-2.0
"""Random training times in [0, 1): 0 is the clean end, 1 the noise end.

Every sampler takes an explicit generator, so that two runs with one seed draw the same times, and returns float32
`(n,)`. A schedule turns times into noise levels with its `level_at` (a flow schedule applies its shift there).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trl_sipo.errors import ConfigurationError

# Rounding can push a time up to 1.0 exactly, which lies beyond the last timestep.
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def _finish(time: Tensor, device: torch.device | str | None) -> Tensor:
    return time.clamp(min=0.0, max=_LARGEST_BELOW_ONE).to(device)


def uniform_time(n: int, *, generator: torch.Generator, device: torch.device | str | None = None) -> Tensor:
    """Independent uniform times.

    Args:
        n: how many.
        generator: the only source of randomness; times are drawn on its device, then moved.
        device: of the result; None keeps the generator's.

    Returns:
        `(n,)` float32 in [0, 1).
    """
    return _finish(torch.rand(n, generator=generator, device=generator.device, dtype=torch.float32), device)


def logit_normal_time(
    n: int,
    *,
    generator: torch.Generator,
    mean: float = 0.0,
    std: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times whose logit is Normal(mean, std): denser in the middle (Esser et al., 2024, Sec. 3.1).

    Args:
        n: how many.
        generator: the only source of randomness.
        mean: of the logit; positive leans to the noise end.
        std: of the logit, positive.
        device: of the result; None keeps the generator's.

    Returns:
        `(n,)` float32 in [0, 1).

    Raises:
        ConfigurationError: `std` is not positive.
    """
    if not std > 0:
        raise ConfigurationError(f"std={std} of the logit-normal time sampler must be positive.")
    normal = torch.randn(n, generator=generator, device=generator.device, dtype=torch.float32)
    return _finish(torch.sigmoid(mean + std * normal), device)


def stratified_time(n: int, *, generator: torch.Generator, device: torch.device | str | None = None) -> Tensor:
    """One uniform time in each of `n` equal strata, in random order: less variance than independent ones.

    The order is shuffled so that no place of the batch is tied to a noise level.

    Args:
        n: how many.
        generator: the only source of randomness.
        device: of the result; None keeps the generator's.

    Returns:
        `(n,)` float32 in [0, 1).
    """
    offset = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float32)
    stratum = torch.randperm(n, generator=generator, device=generator.device)
    return _finish((stratum + offset) / n, device)


def time_quantile(sampler: str, quantile: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The time below which a share `quantile` of a sampler's times lie: its inverse distribution function.

    Args:
        sampler: one of `TIME_SAMPLERS`.
        quantile: `(n,)` in [0, 1).
        mean, std: of the logit-normal sampler.

    Returns:
        `(n,)` float32 in [0, 1).
    """
    if sampler == "logit_normal":
        return _finish(torch.sigmoid(mean + std * torch.special.ndtri(quantile.double())).float(), None)
    return _finish(quantile.float(), None)


TIME_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_time,
    "logit_normal": logit_normal_time,
    "stratified": stratified_time,
}
