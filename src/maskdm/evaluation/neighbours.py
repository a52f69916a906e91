"""Nearest neighbours among feature vectors: exact, one block of the base at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskdm.evaluation.statistics import finite
from maskdm.images.joined import Array, JoinedArrays

BLOCK_VALUES = 2**25  # numbers in a block of the base
PAIR_VALUES = 2**22  # numbers in the differences that are computed together
CHUNK_VALUES = 2**21  # numbers in each of scikit-learn's own buffers
SPARE = 8  # further candidates, whose exact distances decide which come first


def nearest(
    queries: Array, base: Array, num: int = 1, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `num` vectors of a base that are nearest to each query, nearest first.

    Gives Euclidean distances, float64 (n, num), and indices into the base, int64 (n, num).

    scikit-learn finds the candidates; their distances are then computed from differences in
    float64, so that near copies and large means cost no digits. Among equally near candidates the
    lower index comes first. Memory is bounded for bases of any size.

    Args:
        queries: float (n, D), in memory.
        base: float (M, D), read block by block.
        num: neighbours to find, at least 1.
        own: int64 (n,), the index in the base of each query itself, which is then left out.

    Raises ValueError for vectors of different length, NaN or infinite values, or too small a base.
    """
    from sklearn import config_context
    from sklearn.neighbors import NearestNeighbors

    if len(queries.shape) != 2 or len(base.shape) != 2 or queries.shape[1] != base.shape[1]:
        raise ValueError(f"vectors {queries.shape} and {base.shape} are not the same features")
    others = len(base) - (own is not None)
    if others < num:
        raise ValueError(f"{num} neighbours of a vector were requested, but there are {others}")
    vectors = np.ascontiguousarray(finite(queries[:]), np.float32)
    count, dim = vectors.shape
    size, most = max(1, BLOCK_VALUES // dim), num + (own is not None) + SPARE
    chunk = min(256, max(20, CHUNK_VALUES // dim))  # scikit-learn's default, and its least
    distances, indices = np.zeros((count, 0)), np.zeros((count, 0), np.int64)
    for start in range(0, len(base), size):
        block = np.ascontiguousarray(finite(base[start : start + size]), np.float32)
        search = NearestNeighbors(n_neighbors=min(most, len(block)), algorithm="brute").fit(block)
        with config_context(pairwise_dist_chunk_size=chunk):
            found, places = search.kneighbors(vectors)
        distances = np.concatenate([distances, found], axis=1)
        indices = np.concatenate([indices, start + places], axis=1)
        distances, indices = _first(distances, indices, most)
    squared = _squared(vectors, base, indices)
    if own is not None:
        squared[indices == own[:, None]] = np.inf
    squared, indices = _first(squared, indices, num)
    return np.sqrt(squared), indices


def _first(distances: np.ndarray, indices: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest num in each row, in order."""
    order = np.lexsort((indices, distances), axis=1)[:, :num]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(indices, order, 1)


def _squared(queries: np.ndarray, base: Array, indices: np.ndarray) -> np.ndarray:
    """Squared distances of queries (n, D) from rows of the base (n, k): float64 (n, k)."""
    (count, num), dim = indices.shape, queries.shape[1]
    size = max(1, PAIR_VALUES // (num * dim))
    squared = np.empty((count, num))
    for start in range(0, count, size):
        part = slice(start, start + size)
        rows = base[indices[part].ravel()].reshape(-1, num, dim)
        gaps = queries[part, None].astype(np.float64) - rows  # (n, k, D)
        squared[part] = np.einsum("nkd,nkd->nk", gaps, gaps)
    return squared


class NearInPixels(NamedTuple):
    """The image nearest to each of n samples by the difference of their pixels."""

    images: np.ndarray  # uint8 (n, H, W, C), mirrored where that was nearer
    difference: np.ndarray  # root of the mean squared difference, levels of 0 to 255, float64 (n,)


def nearest_in_pixels(samples: np.ndarray, images: Array, flip: bool) -> NearInPixels:
    """Finds the image that is most like each sample, pixel by pixel.

    Args:
        samples: uint8 (n, H, W, C), n at least 1.
        images: uint8 (N, H, W, C), N at least 1, read block by block.
        flip: whether their mirror images count too.
    """
    num, values = len(samples), samples[0].size
    turned = [samples, samples[:, :, ::-1]] if flip else [samples]
    queries = np.concatenate(turned).reshape(-1, values).astype(np.float32)
    distances, indices = nearest(queries, _Flat(images))
    nearer = distances[:, 0].reshape(-1, num).argmin(0)  # 0 = as it is, 1 = mirrored; (n,)
    rows = nearer * num + np.arange(num)
    found = images[indices[rows, 0]]
    found = np.where(nearer[:, None, None, None] == 1, found[:, :, ::-1], found)
    return NearInPixels(found, distances[rows, 0] / np.sqrt(values))


class _Flat(JoinedArrays):
    """Images (N, H, W, C) as vectors (N, H * W * C), each read when it is indexed."""

    def __init__(self, images: Array):
        self.images = images
        self.shape, self.dtype = (len(images), int(np.prod(images.shape[1:]))), images.dtype

    def __getitem__(self, where: int | slice | np.ndarray) -> np.ndarray:
        """A copy: (n, H * W * C), or without the first axis for a single index."""
        found = self.images[where]
        return found.reshape(-1) if found.ndim == 3 else found.reshape(len(found), -1)
