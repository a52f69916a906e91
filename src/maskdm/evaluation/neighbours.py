"""Nearest neighbours among feature vectors: exact, and a block of the base at a time."""

from __future__ import annotations

import numpy as np

from maskdm.images.joined import Array

BLOCK_VALUES = 2**24  # float32 numbers in a block of the base, and of distances to it
PAIR_VALUES = 2**22  # float64 numbers in the differences that are looked at together


def nearest(
    queries: Array, base: Array, num: int = 1, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `num` vectors of a base that are nearest to each query, nearest first.

    float32 products tell which may be; their distances are then computed from differences in
    float64, so that neither near copies nor a large mean cost digits. Of equally near ones the
    lower index comes first. Memory is bounded, whatever the size of the base.

    Args:
        queries: float (n, D), in memory.
        base: float (M, D), read block by block.
        num: neighbours wanted, at least 1.
        own: int64 (n,), each query's own index in the base, which is then no neighbour of it.

    Returns:
        Euclidean distances, float64 (n, num), and indices into the base, int64 (n, num).

    Raises:
        ValueError: vectors of unlike length or that are no numbers, or too small a base.
    """
    if len(queries.shape) != 2 or len(base.shape) != 2 or queries.shape[1] != base.shape[1]:
        raise ValueError(f"vectors {queries.shape} and {base.shape} are not the same features")
    if len(base) - (own is not None) < num:
        raise ValueError(f"{num} neighbours can't be found among {len(base)} vectors")
    vectors = _finite(queries[:])
    count, dim = vectors.shape
    size = max(1, BLOCK_VALUES // max(count, dim, 1))
    # Distances don't feel a shift, and the products of small vectors have small errors.
    shift = _finite(base[:size]).mean(axis=0, dtype=np.float64).astype(np.float32)
    best = np.full((count, num), np.inf), np.full((count, num), len(base))
    for start in range(0, len(base), size):
        block = _finite(base[start : start + size])
        inside = np.arange(0), np.arange(0)  # queries whose own vectors are here, and where
        if own is not None:
            (rows,) = np.nonzero((own >= start) & (own < start + len(block)))
            inside = rows, own[rows] - start
        row, column = _candidates(vectors, block, shift, inside, best[0])
        best = _merged(best, row, start + column, _squared(vectors, block, row, column))
    return np.sqrt(best[0]), best[1]


def _finite(vectors: np.ndarray) -> np.ndarray:
    if not np.isfinite(vectors).all():
        raise ValueError("features are infinite or no numbers: other weights, or other images?")
    return vectors


def _candidates(
    queries: np.ndarray,
    block: np.ndarray,
    shift: np.ndarray,
    own: tuple[np.ndarray, np.ndarray],
    best: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of all pairs that may be among the nearest, by bounds of float32's error."""
    a, b = queries.astype(np.float32) - shift, block.astype(np.float32) - shift
    norms_a, norms_b = _norms(a), _norms(b)
    squared = a @ b.T  # (n, m)
    squared *= -2
    squared += np.square(norms_a)[:, None].astype(np.float32)
    squared += np.square(norms_b).astype(np.float32)
    squared[own] = np.inf
    # The worst error of a product of D terms, and of a few roundings more.
    epsilon = np.finfo(np.float32).eps
    slack = (queries.shape[1] + 8) * epsilon * np.square(norms_a + norms_b.max())  # (n,)
    bound, num = best[:, -1], best.shape[1]
    if num <= len(block):
        bound = np.minimum(bound, np.partition(squared, num - 1, axis=1)[:, num - 1] + slack)
    bound = np.minimum(bound + slack, np.finfo(np.float32).max)  # never the query itself
    row, column = np.nonzero(squared <= bound[:, None].astype(np.float32))
    return row, column


def _norms(vectors: np.ndarray) -> np.ndarray:
    """Lengths, float64 (n,)."""
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))


def _squared(
    queries: np.ndarray, block: np.ndarray, row: np.ndarray, column: np.ndarray
) -> np.ndarray:
    """Squared distances of pairs, from their differences: float64 (pairs,)."""
    size = max(1, PAIR_VALUES // max(1, queries.shape[1]))
    parts = [np.empty(0)]
    for i in range(0, len(row), size):
        few = slice(i, i + size)
        gap = queries[row[few]].astype(np.float64) - block[column[few]]
        parts.append(np.einsum("pd,pd->p", gap, gap))
    return np.concatenate(parts)


def _merged(
    best: tuple[np.ndarray, np.ndarray], row: np.ndarray, index: np.ndarray, squared: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of those known so far, (n, num) each, and of further pairs."""
    count, num = best[0].shape
    rows = np.concatenate([np.repeat(np.arange(count), num), row])
    distances = np.concatenate([best[0].ravel(), squared])
    indices = np.concatenate([best[1].ravel(), index])
    order = np.lexsort((indices, distances, rows))
    first = np.searchsorted(rows[order], np.arange(count))
    kept = order[first[:, None] + np.arange(num)]  # (n, num): each row has its num old ones
    return distances[kept], indices[kept]
