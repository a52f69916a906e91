"""Distances between two sets of feature vectors, each with its error over samples.

The Fréchet and the sliced distance are ours; kernel distance, precision, recall and Inception score
are torch-fidelity's. `metrics.METRICS` calls the functions `measure_...`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from maskdm.evaluation.measure import Compared, Measured
from maskdm.evaluation.statistics import CHUNK, Statistics, statistics_of
from maskdm.images.joined import Array, SelectedRows

NUM_BLOCKS = 10  # of samples, whose spread gives the sliced distance's error
NUM_DIRECTIONS = 1000
DIRECTIONS_AT_A_TIME = 50
MOST_NEIGHBOURS = 10_000  # of a set, in precision and recall
NEIGHBOURHOOD = 3  # which neighbour gives the radius (Kynkäänniemi et al. 2019)
MOST_INFLUENCES = 4000  # of a set, in the kernel distance's error
KID_SUBSET_SIZE = 1000
QUICK_SUBSET_SIZE = 200  # in training: KID is unbiased at any size, and this is 25 times as fast
SCORE_PARTS = 10  # of samples, whose spread gives the Inception score's error


def measure_frechet(compared: Compared) -> Measured:
    """`frechet`, with as many resampled sets as the settings say."""
    return frechet(compared.vectors, compared.reference.statistics, compared.settings.bootstrap)


def measure_sliced(compared: Compared) -> Measured:
    """`sliced`."""
    return sliced(compared.vectors, compared.reference.vectors)


def measure_kid(compared: Compared) -> Measured:
    """`kid`, in training in small subsets."""
    size = QUICK_SUBSET_SIZE if compared.is_quick else KID_SUBSET_SIZE
    return kid(compared.vectors, compared.reference.vectors, size)


def measure_precision_recall(compared: Compared) -> dict[str, Measured]:
    """`precision_recall`, by name."""
    both = precision_recall(compared.vectors, compared.reference.vectors)
    return dict(zip(("precision", "recall"), both, strict=True))


def measure_inception_score(compared: Compared) -> Measured | dict[str, Measured]:
    """`inception_score`; nothing for fewer samples than parts."""
    assert compared.logits is not None  # needs: logits
    return inception_score(compared.logits) if len(compared.logits) >= SCORE_PARTS else {}


def frechet_distance(a: Array, b: Array) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017; FID).

    |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), the last term from the
    eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2). Unit: the features' unit, squared.

    Args:
        a, b: float (N, D) and (M, D).

    Raises ValueError for features of different length.
    """
    return frechet(a, statistics_of(b), num_bootstrap=0).value


def frechet(samples: Array, reference: Statistics, num_bootstrap: int = 50) -> Measured:
    """Fréchet distance of samples from a reference, with its error by the bootstrap.

    Resampled sets contain repeated vectors and therefore lie farther off: only their spread is
    used. The reference is not resampled.

    Args:
        samples: float (N, D).
        reference: mean and covariance of the real images' features.
        num_bootstrap: resampled sets; 0 = no error.

    Raises ValueError for features of different length.
    """
    own, num = statistics_of(samples), len(samples)
    if own.mean.shape != reference.mean.shape:
        raise ValueError(
            f"features of {len(own.mean)} values cannot be compared with features of "
            f"{len(reference.mean)} values"
        )
    eigenvalues, vectors = np.linalg.eigh(reference.cov)
    root = (vectors * np.sqrt(eigenvalues.clip(0))) @ vectors.T
    value = _frechet(own, reference, root)
    if num_bootstrap < 2:
        return Measured(value)
    generator, values = np.random.default_rng(0), []
    for _ in range(num_bootstrap):
        counts = generator.multinomial(num, np.full(num, 1 / num))
        values.append(_frechet(statistics_of(samples, counts=counts), reference, root))
    return Measured(value, float(np.std(values, ddof=1)))


def _frechet(a: Statistics, b: Statistics, root_b: np.ndarray) -> float:
    cross = np.sqrt(np.linalg.eigvalsh(root_b @ a.cov @ root_b).clip(0)).sum()
    gap = np.square(a.mean - b.mean).sum()
    return float(max(gap + np.trace(a.cov) + np.trace(b.cov) - 2 * cross, 0.0))


def part_distance(features: Array, num: int, num_splits: int = 10) -> float:
    """Fréchet distance by chance: between two disjoint random parts of one set, on average.

    Args:
        features: float (M, D), M at least 4.
        num: vectors in each part; at most M / 2 are used.
        num_splits: repetitions, with fixed seeds.
    """
    num, distances = max(2, min(num, len(features) // 2)), []
    for seed in range(num_splits):
        order = np.random.default_rng(seed).permutation(len(features))
        parts = (np.sort(order[:num]), np.sort(order[num : 2 * num]))
        distances.append(frechet_distance(*(SelectedRows(features, rows) for rows in parts)))
    return float(np.mean(distances))


def sliced(samples: Array, reference: Array, num_directions: int = NUM_DIRECTIONS) -> Measured:
    """Sliced Wasserstein distance, squared, times D (after MIND, Berthet et al. 2026).

    The mean over random directions of the squared 2-Wasserstein distance between the two sets'
    projections, by sorting; times D, so that it has the Fréchet distance's unit: a shift by d
    alone gives |d|^2 in both. It does not assume Gaussians, and needs far fewer samples. The error
    follows from the spread between ten blocks of the samples.

    Args:
        samples, reference: float (N, D) and (M, D), read in chunks.
        num_directions: drawn with a fixed seed, the same in every call for one D.
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
        on_b = np.sort(_projected(reference, chosen), axis=1)
        value += _squared_wasserstein(np.sort(on_a, axis=1), on_b)
        for i, block in enumerate(blocks):
            of_blocks[i] += _squared_wasserstein(np.sort(on_a[:, block], axis=1), on_b)
    scale = dim / num_directions
    error = scale * of_blocks.std(ddof=1) / math.sqrt(NUM_BLOCKS) if blocks else None
    return Measured(scale * value, error)


def _projected(features: Array, directions: np.ndarray) -> np.ndarray:
    """Projections of features (N, D) on directions (D, K): float32 (K, N)."""
    parts = [
        features[start : start + CHUNK].astype(np.float32) @ directions
        for start in range(0, len(features), CHUNK)
    ]
    return np.concatenate(parts).T.copy()


def _squared_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Sum over rows of the squared 2-Wasserstein distance between sorted values.

    (K, N) and (K, M): both quantile functions are constant between the merged multiples of 1/N
    and 1/M, so the sum is exact for any N and M.
    """
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return float(np.square((a - b).astype(np.float64)).mean(axis=1).sum())
    # In units of 1 / (N M), the steps of a end at multiples of M, those of b at multiples of N.
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    widths = np.diff(ends, prepend=0) / (n * m)
    gaps = a[:, (ends - 1) // m] - b[:, (ends - 1) // n]
    return float((np.square(gaps.astype(np.float64)) @ widths).sum())


def kid(samples: Array, reference: Array, subset_size: int = KID_SUBSET_SIZE) -> Measured:
    """Kernel distance (KID, Bińkowski et al. 2018) by torch-fidelity: unbiased, cubic kernel.

    The mean over 100 subsets, and the spread between them. The error combines that over samples
    to first order, 2 sd(h) / sqrt(N) with h(x) = E k(x, x') - E k(x, y), and that over the choice
    of subsets, spread / sqrt(100).

    Args:
        samples, reference: float (N, D) and (M, D), at least 2 of each.
        subset_size: vectors in a subset; at most those of the smaller set.
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

    Precision is the share of the samples that lie among the real images: nearer to one of them
    than its third neighbour is. Recall is the share of the real images that lie among the samples.
    Errors and intervals are those of a share. Values depend on the sizes of both sets.

    Args:
        samples, reference: float (N, D) and (M, D); a fixed random part of more than 10,000.

    Raises ValueError for sets of fewer than 4.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = _rows(samples, MOST_NEIGHBOURS), _rows(reference, MOST_NEIGHBOURS)
    if min(len(a), len(b)) <= NEIGHBOURHOOD:
        raise ValueError(
            f"precision and recall need more than {NEIGHBOURHOOD} samples and real images"
        )
    # Far from the origin its squared distances would lose their digits in fp32.
    centre = b.mean(axis=0, dtype=np.float64)
    a, b = ((one - centre).astype(np.float32) for one in (a, b))
    how = {"prc_neighborhood": NEIGHBOURHOOD, "prc_batch_size": 1000, "verbose": False}
    how["save_cpu_ram"] = True  # a thousand rows of distances at a time
    shares = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), **how)
    return _share(shares["precision"], len(a)), _share(shares["recall"], len(b))


def _share(share: float, num: int) -> Measured:
    """A share of num images, with Wilson's interval, which lies in 0 to 1.

    The error is that of Agresti and Coull: above 0 for none or all, too.
    """
    from scipy.stats import binomtest

    inner = (share * num + 2) / (num + 4)
    error = math.sqrt(inner * (1 - inner) / (num + 4))
    ends = binomtest(round(share * num), num).proportion_ci(0.95, "wilson")
    return Measured(share, error, ends=(float(ends.low), float(ends.high)))


def inception_score(logits: Array) -> Measured:
    """Inception score (Salimans et al. 2016) by torch-fidelity, over ten parts.

    Args:
        logits: float (N, classes) of the Inception network, N at least 10.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    score = isc_features_to_metric(torch.from_numpy(np.asarray(logits[:])))
    spread = score["inception_score_std"]
    return Measured(score["inception_score_mean"], spread / math.sqrt(SCORE_PARTS), spread)


def _rows(features: Array, most: int) -> np.ndarray:
    """All vectors, or a fixed random part of them: float32 (n, D)."""
    chosen: slice | np.ndarray = slice(None)
    if len(features) > most:
        chosen = np.sort(np.random.default_rng(2).choice(len(features), most, replace=False))
    return np.ascontiguousarray(features[chosen], dtype=np.float32)
