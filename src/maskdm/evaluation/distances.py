"""Distances between two sets of feature vectors, each with its error over samples.

Fréchet and sliced distances are ours; kernel distance, precision, recall and Inception score are
torch-fidelity's. All are functions of the features alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from maskdm.evaluation.statistics import CHUNK, Statistics, statistics_of
from maskdm.images.joined import Array, SelectedRows

NORMAL_95 = 1.96  # standard errors on either side of a 95 % interval
NUM_BLOCKS = 10  # of samples, by whose spread the sliced distance's error is estimated
NUM_DIRECTIONS = 1000
DIRECTIONS_AT_A_TIME = 50
MOST_NEIGHBOURS = 10_000  # of a set, in precision and recall
NEIGHBOURHOOD = 3  # which neighbour gives the radius (Kynkäänniemi et al. 2019)
MOST_INFLUENCES = 4000  # of a set, in the kernel distance's error
KID_SUBSET_SIZE = 1000


@dataclass(frozen=True)
class Measured:
    """A figure with its standard error over samples.

    Attributes:
        value: the estimate.
        error: what other samples of that number would change it by, a standard deviation; None
            where it wasn't estimated.
        spread: standard deviation between subsets, which the field prints beside the kernel
            distance and the Inception score; or between repetitions of the drawing.
    """

    value: float
    error: float | None = None
    spread: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the 95 % interval by the normal approximation."""
        if self.error is None:
            return None
        return self.value - NORMAL_95 * self.error, self.value + NORMAL_95 * self.error


def frechet_distance(a: Array, b: Array) -> float:
    """Fréchet distance of the Gaussians fitted to two sets, float (N, D) and (M, D)."""
    return frechet_of_statistics(statistics_of(a), statistics_of(b))


def frechet_of_statistics(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two Gaussians (Heusel et al. 2017; FID's formula).

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), the last term from the
    eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2). Unit: the features' unit, squared.

    Raises ValueError for features of unlike length.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {len(a.mean)} and of {len(b.mean)} values are not the same features"
        )
    return _frechet(a, b, _root(b.cov))


def _root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance, (D, D)."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def _frechet(a: Statistics, b: Statistics, root_b: np.ndarray) -> float:
    cross = np.sqrt(np.linalg.eigvalsh(root_b @ a.cov @ root_b).clip(0)).sum()
    gap = np.square(a.mean - b.mean).sum()
    return float(max(gap + np.trace(a.cov) + np.trace(b.cov) - 2 * cross, 0.0))


def frechet(samples: Array, reference: Statistics, num_bootstrap: int = 50) -> Measured:
    """Fréchet distance of samples to a reference, with its error by the bootstrap.

    Resampled sets have repeated vectors and so lie farther off: their spread is used, not their
    place. The reference is taken as it is.

    Args:
        samples: float (N, D).
        reference: of the real images.
        num_bootstrap: resampled sets; 0 = no error.
    """
    own = statistics_of(samples)
    if own.mean.shape != reference.mean.shape:
        raise ValueError(
            f"features of {len(own.mean)} values can't be compared with the reference's "
            f"{len(reference.mean)}: it is of other features"
        )
    root = _root(reference.cov)
    value = _frechet(own, reference, root)
    if num_bootstrap < 2:
        return Measured(value)
    generator = np.random.default_rng(0)
    num = len(samples)
    values = []
    for _ in range(num_bootstrap):
        counts = generator.multinomial(num, np.full(num, 1 / num))
        values.append(_frechet(_weighted(samples, counts, own.mean), reference, root))
    return Measured(value, float(np.std(values, ddof=1)))


def _weighted(features: Array, counts: np.ndarray, shift: np.ndarray) -> Statistics:
    """Statistics of a set in which vector i occurs counts[i] times."""
    num, dim = int(counts.sum()), len(shift)
    total, products = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, len(features), CHUNK):
        weights = counts[start : start + CHUNK, None]
        part = features[start : start + CHUNK].astype(np.float64) - shift
        total += (weights * part).sum(0)
        products += part.T @ (weights * part)
    mean = total / num
    return Statistics(shift + mean, (products - num * np.outer(mean, mean)) / (num - 1))


def part_distance(features: Array, num: int, num_splits: int = 10) -> float:
    """Fréchet distance that chance gives: of two disjoint random parts of one set.

    Mean over splits of fixed seeds.

    Args:
        features: float (M, D), M at least 4.
        num: vectors in each part, at most M / 2.
    """
    num = max(2, min(num, len(features) // 2))
    distances = []
    for seed in range(num_splits):
        order = np.random.default_rng(seed).permutation(len(features))
        first, second = np.sort(order[:num]), np.sort(order[num : 2 * num])
        parts = (SelectedRows(features, rows) for rows in (first, second))
        distances.append(frechet_distance(*parts))
    return float(np.mean(distances))


def sliced(samples: Array, reference: Array, num_directions: int = NUM_DIRECTIONS) -> Measured:
    """Sliced Wasserstein distance, squared, times D (after MIND, Berthet et al. 2026).

    The mean over random directions of the squared 2-Wasserstein distance between the two sets'
    projections, by sorting; times D, which gives it the Fréchet distance's unit: a shift by d
    alone measures |d|^2 in both. It makes no assumption of Gaussians, and needs far fewer samples.

    Args:
        samples, reference: float (N, D) and (M, D), read a piece at a time.
        num_directions: drawn by a fixed seed, the same for every call with that D.

    Returns:
        The distance, its error from the spread between ten blocks of the samples.
    """
    num, dim = samples.shape
    directions = np.random.default_rng(0).standard_normal((num_directions, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    blocks = np.array_split(np.random.default_rng(1).permutation(num), NUM_BLOCKS)
    blocks = blocks if num >= 2 * NUM_BLOCKS else []
    value, of_blocks = 0.0, np.zeros(len(blocks))
    for start in range(0, num_directions, DIRECTIONS_AT_A_TIME):
        chosen = directions[start : start + DIRECTIONS_AT_A_TIME].T.astype(np.float32)
        on_a = _projected(samples, chosen)  # (directions, N)
        on_b = _projected(reference, chosen).sort(dim=1).values
        value += _squared_wasserstein(on_a.sort(dim=1).values, on_b)
        for i, block in enumerate(blocks):
            on_block = on_a[:, torch.from_numpy(block)].sort(dim=1).values
            of_blocks[i] += _squared_wasserstein(on_block, on_b)
    scale = dim / num_directions
    error = scale * of_blocks.std(ddof=1) / math.sqrt(NUM_BLOCKS) if blocks else None
    return Measured(scale * value, None if error is None else float(error))


def _projected(features: Array, directions: np.ndarray) -> torch.Tensor:
    """float32 (K, N): a row for each direction, (D, K)."""
    parts = [
        features[start : start + CHUNK].astype(np.float32) @ directions
        for start in range(0, len(features), CHUNK)
    ]
    return torch.from_numpy(np.concatenate(parts).T.copy())


def _squared_wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sum over rows of the squared 2-Wasserstein distance between sorted values.

    (K, N) and (K, M): both quantile functions are constant between the merged multiples of 1/N
    and 1/M, so the sum is exact for any N and M.
    """
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return float((a - b).double().square().mean(dim=1).sum())
    # In units of 1 / (N M) the steps of a end at multiples of M, those of b at multiples of N.
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)
    gaps = a[:, (ends - 1) // m] - b[:, (ends - 1) // n]
    return float((gaps.double().square() * widths).sum())


def kid(samples: Array, reference: Array, subset_size: int = KID_SUBSET_SIZE) -> Measured:
    """Kernel distance (KID, Bińkowski et al. 2018) by torch-fidelity: unbiased, cubic kernel.

    The mean over 100 subsets, and between them the spread. Its error is that of the samples to
    first order, 2 sd(h) / sqrt(N) with h(x) = E k(x, x') - E k(x, y), and of the choice of
    subsets, spread / sqrt(100).

    Args:
        samples, reference: float (N, D) and (M, D), at least 2 of each.
        subset_size: vectors in a subset, at most the smaller set.
    """
    from torch_fidelity.defaults import DEFAULTS
    from torch_fidelity.metric_kid import kernel_mmd

    size = min(subset_size, len(samples), len(reference))
    generator = np.random.RandomState(DEFAULTS["rng_seed"])  # subsets as torch-fidelity draws them
    distances = []
    for _ in range(DEFAULTS["kid_subsets"]):
        a = samples[generator.choice(len(samples), size, replace=False)]
        b = reference[generator.choice(len(reference), size, replace=False)]
        distances.append(kernel_mmd(a.astype(np.float64), b.astype(np.float64)))
    spread = float(np.std(distances))
    few, real = _rows(samples, MOST_INFLUENCES), _rows(reference, MOST_INFLUENCES)
    of_itself = (np.square(few).sum(1, dtype=np.float64) / few.shape[1] + 1) ** 3
    within = (len(few) * _kernel_means(few, few) - of_itself) / (len(few) - 1)
    influence = within - _kernel_means(few, real)
    of_samples = 2 * float(influence.std()) / math.sqrt(len(samples))
    error = math.hypot(of_samples, spread / math.sqrt(len(distances)))
    return Measured(float(np.mean(distances)), error, spread)


def _kernel_means(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean of KID's kernel (x y / D + 1)^3 between each vector of a and all of b: (N,)."""
    return ((a @ b.T / a.shape[1] + 1) ** 3).mean(axis=1, dtype=np.float64)


def precision_recall(samples: Array, reference: Array) -> tuple[Measured, Measured]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) by torch-fidelity.

    Precision: the part of the samples that lie among the real images, each real image's reach
    being the distance to its third neighbour. Recall: the part of the real images that lie
    among the samples. Errors are those of a fraction. Values depend on the sizes of both sets.

    Args:
        samples, reference: float (N, D) and (M, D); of more than 10,000 a fixed random part.

    Raises ValueError for sets of fewer than 4.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = _rows(samples, MOST_NEIGHBOURS), _rows(reference, MOST_NEIGHBOURS)
    if min(len(a), len(b)) <= NEIGHBOURHOOD:
        raise ValueError(f"precision and recall need more than {NEIGHBOURHOOD} images of each kind")
    told = prc_features_to_metric(
        torch.from_numpy(a),
        torch.from_numpy(b),
        prc_neighborhood=NEIGHBOURHOOD,
        prc_batch_size=1000,
        save_cpu_ram=True,  # a thousand rows of distances at a time
        verbose=False,
    )
    return _fraction(told["precision"], len(a)), _fraction(told["recall"], len(b))


def _fraction(share: float, num: int) -> Measured:
    """A share of num images; its error after Agresti and Coull, which isn't 0 for none or all."""
    inner = (share * num + 2) / (num + 4)
    return Measured(share, math.sqrt(inner * (1 - inner) / (num + 4)))


def inception_score(logits: Array) -> Measured:
    """Inception score (Salimans et al. 2016) by torch-fidelity, over ten parts.

    Args:
        logits: float (N, classes) of the Inception network, N at least 10.
    """
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    told = isc_features_to_metric(torch.from_numpy(np.asarray(logits[:])))
    spread = told[KEY_METRIC_ISC_STD]
    return Measured(told[KEY_METRIC_ISC_MEAN], spread / math.sqrt(10), spread)


def _rows(features: Array, most: int) -> np.ndarray:
    """All vectors, or a fixed random part of them: float32 (n, D)."""
    if len(features) > most:
        chosen = np.random.default_rng(2).choice(len(features), most, replace=False)
        return np.ascontiguousarray(features[np.sort(chosen)], dtype=np.float32)
    return np.ascontiguousarray(features[:], dtype=np.float32)
