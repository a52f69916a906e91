"""Features in which images are compared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskdm.evaluation.networks import load_file, load_named
from maskdm.evaluation.pieces import in_pieces
from maskdm.files import write_whole
from maskdm.images.joined import Array, columns
from maskdm.images.store import Store, cache_dir
from maskdm.recipe import Evaluation

MAX_FIT = 10_000  # images that fix the principal components,
MAX_FIT_BYTES = 2**29  # or as many as these bytes of float32 pixels hold
BATCH = 64  # images a network sees at a time: always the same, so that answers are too
PIECE = 2048  # images whose features go into one file


@dataclass(frozen=True)
class Features:
    """A way to turn images into vectors.

    Attributes:
        name: `inception`, `dinov2`, `clip`, `pca`, or a file.
        sha256: of the network's weights; of `pca`, of all that its components depend on.
        library: whose code computes them.
        extract: uint8 (n, H, W, C) -> float32 (n, D), and logits after them where there are any.
        num_logits: how many.
    """

    name: str
    sha256: str
    library: str
    extract: Callable[[np.ndarray], np.ndarray]
    num_logits: int = 0

    def dim_of(self, shape: tuple[int, ...]) -> int:
        """D, of images of a shape (H, W, C). Raises ValueError where it takes no such images."""
        return self.extract(np.zeros((1, *shape), np.uint8)).shape[1] - self.num_logits

    def vectors(self, answers: Array) -> Array:
        """The features of what `extract` gave, without the logits."""
        return columns(answers, slice(-self.num_logits)) if self.num_logits else answers

    def logits(self, answers: Array) -> Array | None:
        """The logits of what `extract` gave, where there are any."""
        return columns(answers, slice(-self.num_logits, None)) if self.num_logits else None


def make_features(settings: Evaluation, reference: Store | None, device: torch.device) -> Features:
    """The features that the settings ask for.

    Args:
        settings: their name, the file of weights, the number of components.
        reference: the real images, from which `pca` takes its components.
        device: where networks run.

    Raises:
        ValueError: no weights, no images to take components from, more components than these
            have, or a network that answers images differently in other company.
    """
    name = settings.features
    if name == "pca":
        if settings.weights is not None:
            raise ValueError("features pca have no weights: leave --weights out")
        if reference is None:
            raise ValueError(
                "features pca come from the reference images: name images, or other features"
            )
        return _pca(reference, settings)
    if name in Evaluation.known_features():
        weights = None if settings.weights is None else Path(settings.weights).expanduser()
        network, sha256, num_logits = load_named(name, weights, device)
        library = f"torch-fidelity {metadata.version('torch-fidelity')}"
    else:
        if settings.weights is not None:
            raise ValueError(f"features {name} hold their weights: leave --weights out")
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"features {name}: there is no such file")
        network, sha256 = load_file(path, device)
        library, num_logits = f"torch {torch.__version__}", 0
    is_own = name not in Evaluation.known_features()

    @torch.inference_mode()
    def extract(images: np.ndarray) -> np.ndarray:
        with _exact():
            parts = [
                network(_to_network(images[i : i + BATCH], device, is_own)).float().cpu()
                for i in range(0, len(images), BATCH)
            ]
        return torch.cat(parts).numpy()

    return Features(name, sha256, library, extract, num_logits)


def features_of(
    images: Array, features: Features, folder: Path | None, show: bool = False
) -> Array:
    """The features of images: float32 (N, D), and logits after them where there are any.

    On every rank of a distributed run, which share the work, and continue it after a kill.

    Args:
        images: uint8 (N, H, W, C).
        features: which.
        folder: where they are kept, below a folder of the features' own; None = they are not,
            and every rank computes all.
        show: show the progress.

    Raises:
        ValueError: the network gives an image other features in other company.
    """
    _refuse_company(images, features)
    if folder is None:
        return features.extract(images[:])
    return in_pieces(
        folder / f"features-{features.sha256[:20]}",
        len(images),
        PIECE,
        lambda start, stop: features.extract(images[start:stop]),
        f"features of {len(images):,} images",
        show,
    )


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """No TF32, by which GPUs round the inputs of products and convolutions to ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _refuse_company(images: Array, features: Features) -> None:
    """A network left in training mode compares an image with its batch: no distance would hold."""
    few = images[:BATCH]
    if len(few) < 2:
        return
    alone, together = features.extract(few[:1])[0], features.extract(few)[0]
    if np.abs(alone - together).max() > 0.02 * np.abs(together).max():
        raise ValueError(
            f"features {features.name}: an image's features depend on the others in its batch: "
            "save the network in evaluation mode"
        )


def _to_network(images: np.ndarray, device: torch.device, is_own: bool) -> Tensor:
    """uint8 (n, H, W, C) as (n, C, H, W) on the device; grey three times for RGB networks."""
    channels = images.shape[3]
    if not is_own and channels == 1:
        images = images.repeat(3, axis=3)
    elif not is_own and channels != 3:
        raise ValueError(
            f"these features are of RGB or grey images, not of {channels} channels: use pca, or a "
            "network of your own"
        )
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)


def _pca(reference: Store, settings: Evaluation) -> Features:
    """The leading principal components of the reference set's pixels.

    Needs no download and no GPU; sees layout and contrast, but no semantics. Components come
    from the reference alone (a fixed random part of it where it is large).
    """
    images = reference.images
    num_values = int(np.prod(images.shape[1:]))
    most = min(len(images) - 1, num_values)
    if settings.num_components > most:
        raise ValueError(
            f"evaluation.num_components {settings.num_components} is more than {len(images)} "
            f"images of {num_values} values have: use {most} or fewer"
        )
    num_fit = max(settings.num_components + 1, min(MAX_FIT, MAX_FIT_BYTES // (4 * num_values)))
    facts = [reference.manifest["sha256"], settings.num_components, settings.pixel_max, num_fit]
    sha256 = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    file = cache_dir() / f"pca-{sha256[:20]}.npz"
    mean, components = _load_pca(file) or _fit_pca(images, settings, num_fit, file)
    scale = np.float32(settings.pixel_max / 255)

    def extract(images: np.ndarray) -> np.ndarray:
        pixels = images.reshape(len(images), -1).astype(np.float32) * scale
        vectors: np.ndarray = (pixels - mean) @ components.T
        return vectors

    return Features("pca", sha256, f"scikit-learn {metadata.version('scikit-learn')}", extract)


def _load_pca(file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and components that were fitted before: float32 (H*W*C,) and (K, H*W*C)."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            return kept["mean"], kept["components"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _fit_pca(
    images: Array, settings: Evaluation, num_fit: int, file: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Fits them to at most num_fit of the images, and keeps them in a file."""
    from sklearn.decomposition import PCA

    chosen = images[:]
    if len(images) > num_fit:
        indices = np.random.default_rng(0).choice(len(images), num_fit, replace=False)
        chosen = images[np.sort(indices)]
    scale = np.float32(settings.pixel_max / 255)
    pixels = chosen.reshape(len(chosen), -1).astype(np.float32) * scale
    pca = PCA(settings.num_components, random_state=0).fit(pixels)
    mean, components = pca.mean_.astype(np.float32), pca.components_.astype(np.float32)
    write_whole(file, lambda stream: np.savez(stream, mean=mean, components=components))
    return mean, components
