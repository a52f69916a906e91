"""Mean and covariance of features: computed in chunks, kept in files that other tools read."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.files import parsed_json, write_whole
from maskdm.images.joined import Array

CHUNK = 4096  # rows turned into float64 at a time


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of features: the Gaussian that the Fréchet distance compares."""

    mean: np.ndarray  # float64 (D,)
    cov: np.ndarray  # float64 (D, D), unbiased (divided by N - 1)
    facts: dict[str, Any] = field(default_factory=dict)  # about features and images, where known


def statistics_of(
    features: Array, facts: dict[str, Any] | None = None, counts: np.ndarray | None = None
) -> Statistics:
    """Mean and covariance of features, read in chunks: memory is D x D and CHUNK x D numbers.

    Values are taken relative to the first chunk's mean, so that a large mean costs no digits.

    Args:
        features: float (N, D), N at least 2.
        facts: kept with the result.
        counts: how often each vector occurs, int (N,); None = once.

    Raises ValueError for another shape, NaN or infinite values.
    """
    if len(features.shape) != 2 or len(features) < 2:
        raise ValueError(f"expected at least 2 vectors of features, got shape {features.shape}")
    num, dim = features.shape
    shift = features[:CHUNK].mean(axis=0, dtype=np.float64)
    total, products = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, num, CHUNK):
        part = features[start : start + CHUNK].astype(np.float64) - shift
        weighted = part if counts is None else counts[start : start + CHUNK, None] * part
        total += weighted.sum(0)
        products += part.T @ weighted
    finite(products)
    num = num if counts is None else int(counts.sum())
    mean = total / num
    cov = (products - num * np.outer(mean, mean)) / (num - 1)
    return Statistics(shift + mean, (cov + cov.T) / 2, facts or {})


def finite(values: np.ndarray) -> np.ndarray:
    """The values themselves. Raises ValueError where one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise ValueError(
            "features contain NaN or infinite values: check the network's weights and the images"
        )
    return values


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Writes an .npz with `mu` and `sigma`, which other tools read, and the facts as `maskdm`."""
    mu, sigma, facts = statistics.mean, statistics.cov, np.array(json.dumps(statistics.facts))
    write_whole(path, lambda file: np.savez(file, mu=mu, sigma=sigma, maskdm=facts))


def holds_statistics(path: Path) -> bool:
    """Whether a file is an .npz with `mu` and `sigma`."""
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):  # whoever reads it as images says so
        return False


def _real(values: np.ndarray) -> np.ndarray:
    """Numbers as float64. Raises ValueError for complex ones and other things."""
    if values.dtype.kind not in "fiu":
        raise ValueError(f"it holds values of type {values.dtype}, not numbers")
    return values.astype(np.float64)


def load_statistics(path: Path) -> Statistics:
    """Reads an .npz with `mu` and `sigma`; another tool's file has no facts.

    Raises ValueError where it cannot be read, the two do not fit together, one has NaN or infinite
    values, or sigma is no covariance: not symmetric, or with negative variances.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, cov = (_real(arrays[name]) for name in ("mu", "sigma"))
            facts = parsed_json(str(arrays["maskdm"])) if "maskdm" in arrays else {}
        if not isinstance(facts, dict):
            raise ValueError("its facts are no settings")
    except (ValueError, OSError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"the statistics in {path} cannot be read: {error}") from None
    if mean.ndim != 1 or cov.shape != 2 * mean.shape:
        raise ValueError(f"{path}: mu {mean.shape} and sigma {cov.shape} do not fit together")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path}: mu or sigma contains NaN or infinite values")
    rounding = 1e-6 * np.abs(cov).max(initial=0.0)
    if not np.allclose(cov, cov.T, rtol=1e-3, atol=rounding):
        raise ValueError(f"{path}: sigma is not symmetric, so it is not a covariance")
    if (np.diag(cov) < -rounding).any():
        raise ValueError(f"{path}: sigma has negative variances, so it is not a covariance")
    return Statistics(mean, cov, facts)
