"""The endless order in which images are seen: a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np

from maskdm.recipe import Data
from maskdm.seeds import derive_seed


def training_subset(num_images: int, data: Data) -> np.ndarray:
    """The images that `fraction` and `limit` leave for training: sorted int64 indices.

    Drawn by `subset_seed`, the same on every machine; a smaller part lies within a larger one.
    At least one image is left.
    """
    count = max(1, int(data.fraction * num_images + 0.5))
    if data.limit is not None:
        count = min(count, data.limit)
    if count == num_images:
        return np.arange(num_images)
    generator = np.random.Generator(np.random.PCG64(derive_seed(data.subset_seed, "subset")))
    return np.sort(generator.permutation(num_images)[:count])


class ImageOrder:
    """Endless shuffled passes over N images, a new permutation for each pass.

    Position p of the sequence is image `permutation(seed, p // N)[p % N]`, so any machine can
    start anywhere. Ranks share the sequence and take disjoint pieces of it.

    Args:
        num_images: N, above zero.
        seed: names the sequence.
    """

    def __init__(self, num_images: int, seed: int):
        assert num_images > 0
        self.num_images = num_images
        self.seed = seed
        self._pass = -1
        self._permutation = np.empty(0, np.int64)

    def indices(self, position: int, count: int) -> np.ndarray:
        """Images at `position` and the following places: int64 (count,)."""
        pieces = []
        while count > 0:
            number, offset = divmod(position, self.num_images)
            piece = self._permutation_of(number)[offset : offset + count]
            pieces.append(piece)
            position, count = position + len(piece), count - len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def rank_indices(self, position: int, batch_size: int, rank: int, num_ranks: int) -> np.ndarray:
        """A rank's share of the global batch that starts at `position`.

        Returns int64 (batch_size // num_ranks,); the ranks' shares, joined, are the batch.
        """
        share = batch_size // num_ranks
        return self.indices(position + rank * share, share)

    def _permutation_of(self, number: int) -> np.ndarray:
        if number != self._pass:
            generator = np.random.Generator(
                np.random.PCG64(derive_seed(self.seed, "order", number))
            )
            self._permutation = generator.permutation(self.num_images)
            self._pass = number
        return self._permutation
