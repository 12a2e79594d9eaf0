# SPDX-License-Identifier: Apache-2.0
"""The reverse step from first principles, in float64 numpy: Bayes' rule, Normal densities, 2x2 linear solves.

Nothing here shares a formula with `trl_sipo.core`: the posterior is the product of two Gaussians (precisions add), and
the clean latents come from solving the pair of equations "x_t is this mixture" and "the output is that mixture".
"""

import numpy as np

# What each kind of network outputs, as coefficients of (x_0, eps).
_OUTPUT_ROWS = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow_prediction": lambda alpha, sigma: (-1.0, 1.0),
    "sample": lambda alpha, sigma: (1.0, 0.0),
}


def network_output(x_0, eps, alpha, sigma, prediction_type):
    """The output of a perfect network of `prediction_type`."""
    row = _OUTPUT_ROWS[prediction_type](alpha, sigma)
    return row[0] * np.asarray(x_0) + row[1] * np.asarray(eps)


def clean_from_output(output, x_t, alpha, sigma, prediction_type):
    """x_0 such that some eps reproduces both `x_t` and `output`."""
    system = np.array([(alpha, sigma), _OUTPUT_ROWS[prediction_type](alpha, sigma)], dtype=np.float64)
    right = np.stack([np.ravel(x_t), np.ravel(output)]).astype(np.float64)
    return np.linalg.solve(system, right)[0].reshape(np.shape(x_t))


def bayes_posterior(x_t, x_0, alpha_t, sigma_t, alpha_s, sigma_s):
    """Mean and variance of q(x_s | x_t, x_0): prior N(alpha_s x_0, sigma_s^2), likelihood of x_t given x_s."""
    scale = alpha_t / alpha_s
    likelihood_variance = sigma_t**2 - scale**2 * sigma_s**2
    precision = 1 / sigma_s**2 + scale**2 / likelihood_variance
    mean = (alpha_s * np.asarray(x_0) / sigma_s**2 + scale * np.asarray(x_t) / likelihood_variance) / precision
    return mean, 1 / precision


def normal_log_density(x, mean, variance):
    """log N(x; mean, variance), elementwise."""
    return -0.5 * np.log(2 * np.pi * variance) - (x - mean) ** 2 / (2 * variance)


def expected_log_density_ratio(mean_q, mean_p, variance):
    """E over x ~ q of log p(x) - log q(x), averaged over dims; q and p share `variance`.

    Uses the second moment E (x - m)^2 = variance + (mean_q - m)^2 for each of the two expectations.
    """
    entropy_part = -0.5 * np.log(2 * np.pi * variance)
    expected_p = entropy_part - (variance + (mean_q - mean_p) ** 2) / (2 * variance)
    expected_q = entropy_part - variance / (2 * variance)
    return float(np.mean(expected_p - expected_q))
