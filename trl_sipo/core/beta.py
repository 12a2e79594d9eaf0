# SPDX-License-Identifier: Apache-2.0
"""One beta, many conventions.

This package's beta is that of Diffusion-DPO (Wallace et al., 2023): the logit is `beta` times the difference of
`(ref_error - error) / 2` between chosen and rejected, with errors *averaged* over all non-batch dims. Other sources
divide by the number of timesteps, drop the factor 1/2, or sum.
"""

from trl_sipo.errors import ConfigurationError

BETA_CONVENTIONS: dict[str, float | None] = {
    "diffusion_dpo": 1.0,  # 5000 for Stable Diffusion, 2000 for video
    "sipo_paper": 1000.0,  # Table A1 gives beta / T with T = 1000: its 5, 2, 1 and 0.02
    "diffusers_sd15": 2.0,  # the example script of diffusers has no factor 1/2: its 2500
    "flow": 1.0,  # flow-matching recipes keep the 1/2 and the mean
    "summed": None,  # errors summed over the latents: multiply by their number of dims
}
"""Factor from each convention to this package's beta; None: the number of latent dims, given by the caller."""


def to_diffusion_dpo_beta(beta: float, convention: str, *, latent_dims: int | None = None) -> float:
    """Convert a published beta to this package's.

    Args:
        beta: positive, in the named convention.
        convention: a key of `BETA_CONVENTIONS`.
        latent_dims: numbers in one sample's latents (4 * 64 * 64 for SD1.5 at 512 px); needed, and only used, by
            `summed`.

    Returns:
        beta in the Diffusion-DPO convention.

    Raises:
        ConfigurationError: unknown convention, beta not positive and finite, or `summed` without `latent_dims`.
    """
    check_beta(beta)
    if convention not in BETA_CONVENTIONS:
        raise ConfigurationError(f"Unknown beta convention {convention!r}; known are {', '.join(BETA_CONVENTIONS)}.")
    factor = BETA_CONVENTIONS[convention]
    if factor is None:
        if latent_dims is None or latent_dims < 1:
            raise ConfigurationError(
                f"beta={beta} in the 'summed' convention needs latent_dims, the size of one sample's latents (4 * 64 "
                f"* 64 for SD1.5 at 512 px), got latent_dims={latent_dims}."
            )
        factor = float(latent_dims)
    return beta * factor


def check_beta(beta: float) -> None:
    """Raise ConfigurationError unless beta is positive and finite."""
    if not 0 < beta < float("inf"):
        raise ConfigurationError(
            f"beta={beta} must be positive and finite. In the Diffusion-DPO convention Stable Diffusion uses 2000 to "
            "5000."
        )


def describe_beta(beta: float) -> str:
    """One line for the log: beta, the factor 1/2, the reduction, and the same strength in other conventions."""
    check_beta(beta)
    return (
        f"beta = {beta:g} (Diffusion-DPO convention: logit = beta * [chosen - rejected] of (ref_error - error) / 2, "
        f"errors averaged over all latent dims); the same strength is {beta / 1000:g} in the SIPO paper's tables and "
        f"{beta / 2:g} in the diffusers SD1.5 example script, which has no factor 1/2."
    )
