"""Duplicates among the images of a source: the same pixels, or nearly the same picture.

Near duplicates are found by a hash of 64 bits: two hashes that differ in at most 3 bits agree in
at least one of four bands of 16 bits, so only images that share a band are compared (the
pigeonhole principle). Their thumbnails decide.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_BITS = 3  # differing bits in the hashes of near duplicates
MAX_LEVELS = 3.0  # mean difference of their thumbnails, in levels of 255,
MAX_CONTRAST_PART = 0.15  # and as a part of their contrast: faint images differ by few levels
MIN_CONTRAST = 2.0  # standard deviation of a thumbnail: a flatter image's hash is noise or empty
MAX_IMAGES = 2**20  # whose thumbnails are kept: 256 MiB, twice that where some images are equal
# Comparisons of an image in each band. A million images that shared two bands took 21 s.
MAX_NEIGHBOURS = 512
MAX_VERIFIED = 10_000_000  # pairs of thumbnails
BLOCK = 2**14  # thumbnails, or pairs of them, that are converted at a time


def exact_groups(digests: np.ndarray) -> list[np.ndarray]:
    """Groups of equal digests, void (N,): ascending indices of two or more; by first member."""
    return _groups(np.unique(digests, return_inverse=True)[1])


def near_groups(hashes: np.ndarray, thumbnails: np.ndarray) -> tuple[list[np.ndarray], bool]:
    """Groups of images that look the same, joined by pairs that differ a little.

    Args:
        hashes: uint64 (N,).
        thumbnails: uint8 (N, 256).

    Returns the groups, as `exact_groups`, and whether all pairs were compared: not where so many
    images look alike that it would take too long.
    """
    blocks = np.split(thumbnails, range(BLOCK, len(thumbnails), BLOCK))
    contrast = np.concatenate([block.std(axis=1) for block in blocks])
    chosen = np.flatnonzero(contrast >= MIN_CONTRAST)
    mean = thumbnails.mean(axis=1)
    alike, left, is_whole = [np.empty((2, 0), np.int64)], MAX_VERIFIED, True
    for pairs, is_last_chance in _candidates(hashes[chosen], mean[chosen]):
        pairs, left = chosen[pairs[:, :left]], left - pairs.shape[1]
        is_whole &= left >= 0 and not is_last_chance
        for start in range(0, pairs.shape[1], BLOCK):
            i, j = block = pairs[:, start : start + BLOCK]
            difference = np.abs(thumbnails[i].astype(np.int16) - thumbnails[j]).mean(axis=1)
            most = np.minimum(MAX_LEVELS, MAX_CONTRAST_PART * contrast[block].min(axis=0))
            alike.append(block[:, difference <= most])
        if left < 0:
            break
    i, j = np.concatenate(alike, axis=1)
    graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(len(hashes), len(hashes)))
    return _groups(connected_components(graph, directed=False)[1]), is_whole


def _candidates(hashes: np.ndarray, means: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
    """Pairs that share a band, differ in few bits, and in their mean by at most MAX_LEVELS.

    Ordered by band and mean, each image is compared with its next neighbour, then with the one
    after that, and so on. Yields the indices of pairs, int64 (2, n), and whether more would have
    followed in this band.
    """
    for band in range(4):
        bands = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.lexsort((means, bands))
        bands, in_order, brightness = bands[order], hashes[order], means[order]
        active = np.arange(len(order))
        for step in range(1, MAX_NEIGHBOURS + 1):
            active = active[active < len(order) - step]
            other = active + step
            near = brightness[other] - brightness[active] <= MAX_LEVELS
            near &= bands[active] == bands[other]
            active, other = active[near], other[near]
            if not len(active):
                break
            bits = in_order[active] ^ in_order[other]
            for _ in range(MAX_BITS):
                bits &= bits - np.uint64(1) * (bits > 0)  # clears the lowest 1
            close = bits == 0
            yield order[np.stack([active[close], other[close]])], step == MAX_NEIGHBOURS


def _groups(numbers: np.ndarray) -> list[np.ndarray]:
    """Places of each number that occurs more than once, ascending; by first place."""
    members = np.flatnonzero(np.bincount(numbers)[numbers] > 1)
    members = members[np.argsort(numbers[members], kind="stable")]
    groups = np.split(members, np.flatnonzero(np.diff(numbers[members])) + 1)
    return sorted(groups, key=lambda group: int(group[0])) if len(members) else []
