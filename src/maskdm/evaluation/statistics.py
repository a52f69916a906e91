"""Mean and covariance of features: streamed in float64, kept in files of the field's form."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.files import write_whole
from maskdm.images.joined import Array

CHUNK = 4096  # rows turned into float64 at a time


@dataclass(frozen=True)
class Statistics:
    """What the Fréchet distance knows of a set.

    Attributes:
        mean: float64 (D,).
        cov: float64 (D, D), unbiased (divided by N - 1).
        facts: what the features and images were, as far as is known.
    """

    mean: np.ndarray
    cov: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)


def statistics_of(features: Array, facts: dict[str, Any] | None = None) -> Statistics:
    """Mean and covariance of features, read a piece at a time.

    Values are taken relative to the first piece's mean, so that no digits are lost to a large
    mean. Needs memory for D x D and for CHUNK x D numbers, whatever N is.

    Args:
        features: float (N, D), N at least 2.
        facts: kept with the result.

    Raises:
        ValueError: another shape, or values that are no numbers.
    """
    if len(features.shape) != 2 or len(features) < 2:
        raise ValueError(f"need at least 2 vectors of features, got an array {features.shape}")
    num, dim = features.shape
    shift = features[:CHUNK].mean(axis=0, dtype=np.float64)
    total, products = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, num, CHUNK):
        part = features[start : start + CHUNK].astype(np.float64) - shift
        total += part.sum(0)
        products += part.T @ part
    if not np.isfinite(products).all():
        raise ValueError("features are infinite or no numbers: other weights, or other images?")
    mean = total / num
    cov = (products - num * np.outer(mean, mean)) / (num - 1)
    return Statistics(shift + mean, (cov + cov.T) / 2, facts or {})


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Writes an .npz with `mu` and `sigma`, as other tools read it, and `maskdm`: the facts."""
    mu, sigma, facts = statistics.mean, statistics.cov, np.array(json.dumps(statistics.facts))
    write_whole(path, lambda file: np.savez(file, mu=mu, sigma=sigma, maskdm=facts))


def holds_statistics(path: Path) -> bool:
    """Whether a file is an .npz with `mu` and `sigma`."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())


def load_statistics(path: Path) -> Statistics:
    """Reads an .npz with `mu` and `sigma`; of one that another tool wrote the facts are empty.

    Raises ValueError where the arrays don't fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, cov = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
            facts = json.loads(str(arrays["maskdm"])) if "maskdm" in arrays else {}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"the statistics in {path} can't be read: {error}") from None
    if mean.ndim != 1 or cov.shape != 2 * mean.shape:
        raise ValueError(f"{path}: mu of {mean.shape} and sigma of {cov.shape} don't fit together")
    return Statistics(mean, cov, facts)
