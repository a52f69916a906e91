"""Features in which generated and real images are compared."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from maskdm.images.store import Images
from maskdm.recipe import Evaluation

Features = Callable[[Images], np.ndarray]
"""uint8 images (N, H, W, C) -> float64 features (N, D)."""

MAX_FIT = 10_000  # images that fix the components,
MAX_FIT_BYTES = 2**29  # or as many as these bytes of float32 pixels hold
CHUNK = 2_000  # images turned into floats at a time


def pca_features(reference: Images, settings: Evaluation) -> Features:
    """The leading principal components of the reference set's pixels.

    Needs no download and no GPU; sees layout and contrast, but no semantics. Components come
    from the reference alone (a fixed random part of it where it is large).

    Args:
        reference: uint8 (N, H, W, C).
        settings: number of components, scale of the pixels.

    Raises:
        ValueError: more components than N - 1 or H*W*C.
    """
    from sklearn.decomposition import PCA

    num_values = reference[0].size
    most = min(len(reference) - 1, num_values)
    if settings.num_components > most:
        raise ValueError(
            f"evaluation.num_components {settings.num_components} is more than {len(reference)} "
            f"images of {num_values} values have: use {most} or fewer"
        )
    num_fit = max(settings.num_components + 1, min(MAX_FIT, MAX_FIT_BYTES // (4 * num_values)))
    if len(reference) > num_fit:
        chosen = np.random.default_rng(0).choice(len(reference), num_fit, replace=False)
        reference = reference[np.sort(chosen)]
    scale = settings.pixel_max / 255
    pixels = _flat(reference[:]) * scale
    pca = PCA(settings.num_components, random_state=0).fit(pixels)

    def features(images: Images) -> np.ndarray:
        parts = [
            pca.transform(_flat(images[start : start + CHUNK]) * scale)
            for start in range(0, len(images), CHUNK)
        ]
        return np.concatenate(parts).astype(np.float64)

    return features


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


FEATURES: dict[str, Callable[[Images, Evaluation], Features]] = {"pca": pca_features}
