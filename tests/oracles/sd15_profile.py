# SPDX-License-Identifier: Apache-2.0
"""Published facts on Stable Diffusion 1.5: its noise schedule, and its epsilon error at nine timesteps.

Between the nine timesteps the error is interpolated linearly in log-SNR (`numpy.interp` on the log-SNR of the
schedule), the variable in which the profile is smoothest: interpolated linearly in t, its first and steepest segments
bulge by up to 7 %. Beyond the ends it is held constant.
"""

import numpy as np
import torch

KNOT_TIMESTEPS = (0, 20, 63, 100, 200, 300, 500, 800, 990)
KNOT_ERRORS = (0.900, 0.627, 0.437, 0.357, 0.228, 0.155, 0.068, 0.012, 0.0025)


def alphas_cumprod() -> torch.Tensor:
    """The "scaled_linear" schedule of SD1.5, `(1000,)` float64."""
    root_betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64)
    return torch.from_numpy(np.cumprod(1 - root_betas**2))


def _log_snr(timesteps) -> np.ndarray:
    table = alphas_cumprod().numpy()[np.asarray(timesteps)]
    return np.log(table) - np.log1p(-table)


def epsilon_error_at_log_snr(log_snr) -> np.ndarray:
    """Mean squared epsilon error at any log-SNR; numpy.interp wants increasing abscissae, hence the signs."""
    return np.interp(-np.asarray(log_snr), -_log_snr(KNOT_TIMESTEPS), KNOT_ERRORS)


def epsilon_error(timesteps) -> torch.Tensor:
    """Mean squared epsilon error at integer timesteps, float64."""
    return torch.from_numpy(epsilon_error_at_log_snr(_log_snr(timesteps)))
