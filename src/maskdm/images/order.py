"""The endless order in which images are seen: a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np

from maskdm.recipe import Data
from maskdm.seeds import derive_seed


def training_subset(num_images: int, data: Data) -> np.ndarray:
    """The images that `fraction`, `limit` and `held_out` leave for training: sorted int64 indices.

    Drawn by `subset_seed`, the same on every machine; a smaller part lies within a larger one.
    A fraction is one of all images, held out or not. At least one image is left.

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
    if count == num_images:
        return np.arange(num_images)
    return np.sort(_shuffled(num_images, data)[:count])


def held_out_subset(num_images: int, data: Data) -> np.ndarray:
    """The images that are never trained on: sorted int64 indices, `held_out` of them.

    Drawn by `subset_seed`: the same on every machine, whatever `fraction` and `limit` are.
    """
    return np.sort(_shuffled(num_images, data)[num_images - num_held_out(num_images, data) :])


def num_held_out(num_images: int, data: Data) -> int:
    """How many images are never trained on; of a part the nearest number."""
    if data.held_out < 1:
        return int(data.held_out * num_images + 0.5)
    return min(num_images, int(data.held_out))


def _shuffled(num_images: int, data: Data) -> np.ndarray:
    """All images in the order in which parts take them; those held out are its last."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(data.subset_seed, "subset")))
    return generator.permutation(num_images)


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
