"""Features in which generated and real images are compared."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from maskdm.recipe import Evaluation

Features = Callable[[np.ndarray], np.ndarray]
"""uint8 images (N, H, W, C) -> float64 features (N, D)."""

MAX_FIT = 10_000  # images that fix the components: bounds memory at 64 px to about 1 GiB
CHUNK = 2_000  # images turned into floats at a time


def pca_features(reference: np.ndarray, settings: Evaluation) -> Features:
    """The leading principal components of the reference set's pixels.

    Needs no download and no GPU; sees layout and contrast, but no semantics. Components come
    from the reference alone (a fixed random 10,000 of it where it is larger).

    Args:
        reference: uint8 (N, H, W, C).
        settings: number of components (at most N - 1 and H*W*C), scale of the pixels.
    """
    from sklearn.decomposition import PCA

    if len(reference) > MAX_FIT:
        chosen = np.random.default_rng(0).choice(len(reference), MAX_FIT, replace=False)
        reference = reference[np.sort(chosen)]
    scale = settings.pixel_max / 255
    pixels = _flat(reference) * scale
    components = min(settings.num_components, len(pixels) - 1, pixels.shape[1])
    pca = PCA(components, random_state=0).fit(pixels)

    def features(images: np.ndarray) -> np.ndarray:
        parts = [
            pca.transform(_flat(images[start : start + CHUNK]) * scale)
            for start in range(0, len(images), CHUNK)
        ]
        return np.concatenate(parts).astype(np.float64)

    return features


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


FEATURES: dict[str, Callable[[np.ndarray, Evaluation], Features]] = {"pca": pca_features}
