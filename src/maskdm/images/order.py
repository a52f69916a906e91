"""The endless order in which images are seen: a pure function of (seed, position)."""

from __future__ import annotations

import functools

import numpy as np

from maskdm.recipe import Data
from maskdm.seeds import derive_seed


def training_subset(num_images: int, data: Data) -> np.ndarray:
    """The images that `fraction`, `limit` and `held_out` leave for training: sorted int64 indices.

    Drawn by `subset_seed`, the same on every machine; a smaller part is a subset of a larger one.
    A fraction counts all images, also those held out. At least one image is left.

    Raises ValueError where the images held out would leave none.
    """
    most = num_images - num_held_out(num_images, data)
    if most < 1:
        raise ValueError(
            f"data.held_out {data.held_out} leaves none of {num_images} images to train on: use "
            f"{num_images - 1} or fewer"
        )
    count = min(max(1, int(data.fraction * num_images + 0.5)), most)
    if data.limit is not None:
        count = min(count, data.limit)
    return np.sort(_shuffled(num_images, data)[:count])


def held_out_subset(num_images: int, data: Data) -> np.ndarray:
    """The images held out from training: sorted int64 indices, `held_out` of them.

    Drawn by `subset_seed`: the same on every machine, whatever `fraction` and `limit` are.
    """
    return np.sort(_shuffled(num_images, data)[num_images - num_held_out(num_images, data) :])


def num_held_out(num_images: int, data: Data) -> int:
    """The number of images held out from training; a part is rounded to the nearest number."""
    if data.held_out < 1:
        return int(data.held_out * num_images + 0.5)
    return min(num_images, int(data.held_out))


def _shuffled(num_images: int, data: Data) -> np.ndarray:
    """All images in the order in which parts take them; those held out come last."""
    return _permutation(num_images, derive_seed(data.subset_seed, "subset"))


def _permutation(num_images: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).permutation(num_images)


class ImageOrder:
    """Endless shuffled passes over N images, a new permutation for each pass.

    Position p of the sequence is image `permutation(seed, p // N)[p % N]`, so any machine can
    start anywhere. Ranks share the sequence and take disjoint slices of it.

    Args:
        num_images: N, above zero.
        seed: of the permutations.
    """

    def __init__(self, num_images: int, seed: int):
        assert num_images > 0
        self.num_images, self.seed = num_images, seed
        self._permutation = functools.lru_cache(1)(_permutation)

    def indices(self, position: int, count: int) -> np.ndarray:
        """Images at `position` and the following places: int64 (count,)."""
        slices = [np.empty(0, np.int64)]
        while count > 0:
            number, offset = divmod(position, self.num_images)
            seed = derive_seed(self.seed, "order", number)
            slices.append(self._permutation(self.num_images, seed)[offset : offset + count])
            position, count = position + len(slices[-1]), count - len(slices[-1])
        return np.concatenate(slices)

    def rank_indices(self, position: int, batch_size: int, rank: int, num_ranks: int) -> np.ndarray:
        """A rank's share of the global batch that starts at `position`.

        Returns int64 (batch_size // num_ranks,); the ranks' shares, joined, are the batch.
        """
        share = batch_size // num_ranks
        return self.indices(position + rank * share, share)
