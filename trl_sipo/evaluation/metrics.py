# SPDX-License-Identifier: Apache-2.0
"""Measures of a set of generated images, from features and verdicts that somebody else computed. Pure torch.

Accuracy alone can certify a model that has lost its variety, or drifted to images that only please the judge: report
it with the Frechet distance and the diversity within a prompt.
"""

from __future__ import annotations

import math

import torch

from trl_sipo.errors import ConfigurationError


def symmetric_sqrt(matrix: torch.Tensor) -> torch.Tensor:
    """Square root of a symmetric positive semi-definite matrix (F, F); eigenvalues below zero count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def gaussian_frechet_distance(
    mean_a: torch.Tensor, covariance_a: torch.Tensor, mean_b: torch.Tensor, covariance_b: torch.Tensor
) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau, 1982; Heusel et al., 2017).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2). The inner matrix is symmetric, unlike C_a C_b
    with the same trace of the root, so that a symmetric eigendecomposition gives it without complex numbers.

    Args:
        mean_a: (F,), and `mean_b` likewise.
        covariance_a: (F, F), and `covariance_b` likewise.

    Returns:
        At least 0; the unit is that of the features, squared.
    """
    mean_a, covariance_a, mean_b, covariance_b = (
        part.to(torch.float64) for part in (mean_a, covariance_a, mean_b, covariance_b)
    )
    root_a = symmetric_sqrt(covariance_a)
    inner = root_a @ covariance_b @ root_a
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, distance.item())


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Frechet distance of two sets of features, each summed up by its mean and covariance, in float64.

    The estimate is biased upwards for small sets: compare only distances over the same numbers of images.

    Args:
        features_a: (N, F), N at least 2.
        features_b: (M, F), M at least 2.

    Raises:
        ConfigurationError: the sets have different numbers of features, fewer than two rows, or a value not finite.
    """
    for features in (features_a, features_b):
        if features.ndim != 2 or len(features) < 2:
            raise ConfigurationError(f"features have shape {tuple(features.shape)}; expected (N, F) with N >= 2.")
        if not torch.isfinite(features).all():
            raise ConfigurationError("features hold values that are not finite; the images or the judge are broken.")
    counts = features_a.shape[1], features_b.shape[1]
    if counts[0] != counts[1]:
        raise ConfigurationError(f"the sets have {counts[0]} features and {counts[1]}; use one judge for both.")
    moments = []
    for features in (features_a, features_b):
        wide = features.to(torch.float64)
        moments.append((wide.mean(0), torch.cov(wide.T).view(counts[0], counts[0])))
    return gaussian_frechet_distance(*moments[0], *moments[1])


def within_group_diversity(features: torch.Tensor, group_ids: torch.Tensor) -> float:
    """How much the images of one group (one prompt, say) differ: standard deviation per feature, averaged.

    The unbiased standard deviation of each feature within a group, averaged over features, then over groups. Groups of
    one image say nothing and are left out.

    Args:
        features: (N, F).
        group_ids: (N,), any integers.

    Returns:
        At least 0, in the unit of the features; 0 means that each group shows the same image over and over.

    Raises:
        ConfigurationError: lengths differ, or no group has two images.
    """
    if len(features) != len(group_ids):
        raise ConfigurationError(
            f"{len(features)} rows of features but {len(group_ids)} group_ids; give one for each."
        )
    groups = [features[group_ids == group].double() for group in group_ids.unique()]
    spreads = [group.std(dim=0).mean() for group in groups if len(group) > 1]
    if not spreads:
        raise ConfigurationError("no group has two images; sample several images per group to measure diversity.")
    return torch.stack(spreads).mean().item()


def wilson_interval(num_correct: int, num_total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson, 1927), meant for independent trials; 95 % by default.

    Unlike mean +- error it never leaves [0, 1] and is not empty at 0 or 1.

    Args:
        num_correct: successes, from 0 to `num_total`.
        num_total: trials, at least 1.
        z: quantile of the standard Normal for half of the error: 1.96 for 95 %, 2.576 for 99 %.

    Returns:
        (low, high), each in [0, 1].

    Raises:
        ConfigurationError: the counts do not describe a proportion.
    """
    if num_total < 1 or not 0 <= num_correct <= num_total:
        raise ConfigurationError(
            f"{num_correct} of {num_total} is no proportion; need 0 <= num_correct <= num_total >= 1."
        )
    share = num_correct / num_total
    centre = share + z * z / (2 * num_total)
    half_width = z * math.sqrt(share * (1 - share) / num_total + z * z / (4 * num_total**2))
    scale = 1 + z * z / num_total
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)
