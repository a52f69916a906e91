"""Images that are in a source twice: the same pixels, or nearly the same picture.

Near duplicates are found by a hash of 64 bits: two that differ in at most 3 have at least one of
four bands of 16 bits in common, so only images that share a band are compared (the pigeonhole
principle). Thumbnails decide.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_BITS = 3  # in which the hashes of near duplicates differ
MAX_LEVELS = 3.0  # of 255, by which their thumbnails differ in the mean,
MAX_CONTRAST_PART = 0.15  # and at most this part of their contrast: faint images are alike
MIN_CONTRAST = 2.0  # standard deviation of a thumbnail below which an image is flat: its hash is
# that of noise, or empty
MAX_IMAGES = 2**20  # whose thumbnails are kept: 256 MiB, twice where some images are equal
MAX_NEIGHBOURS = 512  # that an image is compared with in each band: a million that share two
# bands took 21 s
MAX_VERIFIED = 10_000_000  # pairs of thumbnails
BLOCK = 2**14  # of them at a time


def exact_groups(digests: np.ndarray) -> list[np.ndarray]:
    """Groups of two or more equal digests, by first member.

    Args:
        digests: of the images, uint64 (N, 2).

    Returns:
        Indices of each group's images, int64, ascending.
    """
    if not len(digests):
        return []
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable
    same = (digests[order][1:] == digests[order][:-1]).all(axis=1)
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    groups = [group for group in np.split(order, starts[1:]) if len(group) > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def near_groups(hashes: np.ndarray, thumbnails: np.ndarray) -> tuple[list[np.ndarray], bool]:
    """Groups of images that show the same: joined by pairs that differ by a little.

    Args:
        hashes: uint64 (N,).
        thumbnails: uint8 (N, 256).

    Returns:
        Indices of each group's images, int64, ascending; by first member. Whether all pairs were
        looked at: not where very many images look so alike that it would take too long.
    """
    mean, contrast = _mean_and_contrast(thumbnails)
    chosen = np.flatnonzero(contrast >= MIN_CONTRAST)
    parent = np.arange(len(hashes))
    left, is_whole = MAX_VERIFIED, True
    for band in range(4):
        pairs = _pairs_of_a_band(hashes[chosen], mean[chosen], band)
        for one, other, is_last_chance in pairs:
            is_whole &= not is_last_chance
            for start in range(0, len(one), BLOCK):
                i, j = (chosen[side[start : start + BLOCK]] for side in (one, other))
                if left <= 0:
                    return _groups(parent), False
                left -= len(i)
                alike = _are_alike(thumbnails, contrast, i, j)
                _join(parent, i[alike], j[alike])
    return _groups(parent), is_whole


def _mean_and_contrast(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each thumbnail, float64 (N,); in blocks, to spare memory."""
    mean, contrast = np.empty(len(thumbnails)), np.empty(len(thumbnails))
    for start in range(0, len(thumbnails), BLOCK):
        block = slice(start, start + BLOCK)
        mean[block], contrast[block] = thumbnails[block].mean(1), thumbnails[block].std(1)
    return mean, contrast


def _pairs_of_a_band(
    hashes: np.ndarray, means: np.ndarray, band: int
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Pairs that share a band, differ in few bits, and in their mean by at most MAX_LEVELS.

    Ordered by band and mean, each image is compared with its next neighbour, then with the one
    after that, and so on.

    Yields:
        Indices of pairs, int64 (n,) each; and whether more would have come.
    """
    bands = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
    order = np.lexsort((means, bands))
    hashes, means, bands = hashes[order], means[order], bands[order]
    active = np.arange(len(order))
    for step in range(1, MAX_NEIGHBOURS + 1):
        active = active[active < len(order) - step]
        other = active + step
        goes_on = (bands[active] == bands[other]) & (means[other] - means[active] <= MAX_LEVELS)
        active, other = active[goes_on], other[goes_on]
        if not len(active):
            return
        bits = hashes[active] ^ hashes[other]
        for _ in range(MAX_BITS):
            bits &= bits - np.uint64(1) * (bits > 0)  # takes the lowest 1 away
        close = bits == 0
        yield order[active[close]], order[other[close]], step == MAX_NEIGHBOURS


def _are_alike(
    thumbnails: np.ndarray, contrast: np.ndarray, i: np.ndarray, j: np.ndarray
) -> np.ndarray:
    """Whether the thumbnails of pairs show the same: bool (n,)."""
    difference = np.abs(thumbnails[i].astype(np.int16) - thumbnails[j]).mean(axis=1)
    allowed = np.minimum(MAX_LEVELS, MAX_CONTRAST_PART * np.minimum(contrast[i], contrast[j]))
    return difference <= allowed


def _join(parent: np.ndarray, i: np.ndarray, j: np.ndarray) -> None:
    """Unites the groups of each pair, in a forest whose roots are the groups' first members."""
    for one, other in zip(i.tolist(), j.tolist(), strict=True):
        first, second = sorted((_root(parent, one), _root(parent, other)))
        parent[second] = first


def _root(parent: np.ndarray, i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = int(parent[i])
    return i


def _groups(parent: np.ndarray) -> list[np.ndarray]:
    members: dict[int, list[int]] = {}
    # Only members of groups point elsewhere: a million images alone cost nothing here.
    for i in np.flatnonzero(parent != np.arange(len(parent))).tolist():
        root = _root(parent, i)
        members.setdefault(root, [root]).append(i)
    return [np.array(sorted(members[root])) for root in sorted(members)]
