"""Distances between two sets of feature vectors, in float64."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets (Heusel et al. 2017; FID's formula).

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), the last term from the
    eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2). Unit: the features' unit, squared.

    Args:
        a, b: float (N, D) and (M, D), N and M at least 2.

    Raises:
        ValueError: other shapes.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"need two sets of at least 2 vectors of one length, got {a.shape} and {b.shape}"
        )
    mean_a, mean_b = a.mean(0, dtype=np.float64), b.mean(0, dtype=np.float64)
    cov_a = np.atleast_2d(np.cov(a, rowvar=False, dtype=np.float64))
    cov_b = np.atleast_2d(np.cov(b, rowvar=False, dtype=np.float64))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    gap = np.square(mean_a - mean_b).sum()
    return float(max(gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, 0.0))


def half_split_distance(features: np.ndarray, num_splits: int = 10) -> float:
    """Fréchet distance of two random halves of a set, averaged over splits of fixed seeds.

    It is what chance gives sets of that size, and about twice what it gives sets of the whole.
    """
    half = len(features) // 2
    distances = []
    for seed in range(num_splits):
        order = np.random.default_rng(seed).permutation(len(features))
        distances.append(frechet_distance(features[order[:half]], features[order[half:]]))
    return float(np.mean(distances))
