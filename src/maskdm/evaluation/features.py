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
from maskdm.evaluation.shards import in_shards
from maskdm.files import expanded, write_whole
from maskdm.images.joined import Array, columns
from maskdm.images.store import Store, cache_dir
from maskdm.recipe import Evaluation
from maskdm.settings import changed
from maskdm.words import counted, one_line

MAX_FIT = 10_000  # images from which principal components are fitted,
MAX_FIT_BYTES = 2**29  # or as many as fit into these bytes of float32 pixels
BATCH = 64  # images that a network gets at a time: always as many, so that features are equal
SHARD = 2048  # images whose features go into one file


@dataclass(frozen=True)
class Features:
    """A way to turn images into vectors."""

    name: str  # `inception`, `dinov2`, `clip`, `pca`, or a file
    sha256: str  # of the network's weights; for `pca`, of all that its components depend on
    library: str  # whose code computes them
    # uint8 (n, H, W, C) -> float32 (n, D), followed by the logits where available
    extract: Callable[[np.ndarray], np.ndarray]
    num_logits: int = 0  # 0 = none
    note: str = ""  # what a reader of the figures should know

    @property
    def facts(self) -> dict[str, str]:
        """For records: name, hash, library."""
        return {"name": self.name, "sha256": self.sha256, "library": self.library}

    @property
    def folder_name(self) -> str:
        """The folder, below one for the images, in which such features are kept."""
        return f"features-{self.sha256[:20]}"

    def dim_of(self, shape: tuple[int, ...]) -> int:
        """D, for images of a shape (H, W, C). Raises ValueError where such images are refused."""
        return self.extract(np.zeros((1, *shape), np.uint8)).shape[1] - self.num_logits

    def vectors(self, answers: Array) -> Array:
        """The features in what `extract` gave, without the logits."""
        return columns(answers, slice(-self.num_logits)) if self.num_logits else answers

    def logits(self, answers: Array) -> Array | None:
        """The logits in what `extract` gave, where available."""
        return columns(answers, slice(-self.num_logits, None)) if self.num_logits else None


def available_features(
    settings: Evaluation, reference: Store | None, device: torch.device
) -> tuple[Features, str | None]:
    """The features that the settings name, and for `auto` a note if they are not inception.

    Arguments and errors as for `make_features`.
    """
    if settings.features != "auto":
        return make_features(settings, reference, device), None
    try:
        if reference is not None and reference.images.shape[3] not in (1, 3):
            raise ValueError("features inception require RGB or grey images")
        return make_features(changed(settings, features="inception"), reference, device), None
    except ValueError as error:
        features = make_features(changed(settings, features="pca"), reference, device)
        return features, f"measured in features pca, which is no FID: {one_line(error, 200)}"


def make_features(settings: Evaluation, reference: Store | None, device: torch.device) -> Features:
    """The features that the settings name.

    Args:
        settings: name, file of weights (`pca` has none), number of components.
        reference: the real images, from which the components of `pca` are fitted.
        device: where networks run.

    Raises ValueError where weights are missing, or `pca` has fewer than two images.
    """
    name, num_logits = settings.features, 0
    weights = None if settings.weights is None else expanded(settings.weights)
    is_own = name not in Evaluation.known_features()
    if name == "pca":
        if reference is None:
            raise ValueError(
                "features pca are fitted to the reference's images: give images as the reference, "
                "or choose other features"
            )
        return _pca(reference, settings)
    if is_own:
        if weights is not None:
            raise ValueError(f"the file of features {name} contains weights: leave out --weights")
        path = expanded(name)
        if not path.is_file():
            raise ValueError(f"features {name}: no such file")
        network, sha256 = load_file(path, device)
        library = f"torch {torch.__version__}"
    else:
        network, sha256, num_logits = load_named(name, weights, device)
        library = f"torch-fidelity {metadata.version('torch-fidelity')}"

    @torch.inference_mode()
    def extract(images: np.ndarray) -> np.ndarray:
        parts = []
        with _exact():
            for start in range(0, len(images), BATCH):
                few = _to_network(images[start : start + BATCH], device, is_own)
                parts.append(network(few).float().cpu())
        return torch.cat(parts).numpy()

    return Features(name, sha256, library, extract, num_logits)


def features_of(
    images: Array, features: Features, folder: Path | None, show: bool = False
) -> Array:
    """The features of images: float32 (N, D), followed by the logits where available.

    To be called on every rank: they share the work, and continue it after a kill.

    Args:
        images: uint8 (N, H, W, C).
        features: those to compute.
        folder: where they are kept, in a subfolder of their own; None = they are not kept, and
            every rank computes all.
        show: show the progress.

    Raises ValueError where an image's features depend on the others in its batch.
    """
    _refuse_batch_dependence(images, features)
    if folder is None:
        return features.extract(images[:])
    kept, what = folder / features.folder_name, f"features of {len(images):,} images"

    def compute(start: int, stop: int) -> np.ndarray:
        return features.extract(images[start:stop])

    return in_shards(kept, len(images), SHARD, compute, what, show)


def features_folder(images_sha256: str) -> Path:
    """The folder in the cache for the features of images with this hash."""
    return cache_dir() / f"images-{images_sha256[:20]}"


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Switches TF32 off, with which GPUs round the inputs of products and convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _refuse_batch_dependence(images: Array, features: Features) -> None:
    """Raises ValueError for a network in training mode, say: distances would mean nothing."""
    few = images[:BATCH]
    if len(few) < 2:
        return
    alone, together = features.extract(few[:1])[0], features.extract(few)[0]
    if np.abs(alone - together).max() > 0.02 * np.abs(together).max():
        raise ValueError(
            f"features {features.name}: an image's features depend on the others in its batch; "
            "save the network in evaluation mode"
        )


def _to_network(images: np.ndarray, device: torch.device, is_own: bool) -> Tensor:
    """uint8 (n, H, W, C) as (n, C, H, W) on the device; grey ones three times for RGB networks."""
    channels = images.shape[3]
    if not is_own and channels == 1:
        images = images.repeat(3, axis=3)
    elif not is_own and channels != 3:
        raise ValueError(
            f"these features require RGB or grey images, not {channels} channels: use pca, or a "
            "network of your own"
        )
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)


def _pca(reference: Store, settings: Evaluation) -> Features:
    """The leading principal components of the reference set's pixels.

    They need no download and no GPU; they capture layout and contrast, but no semantics. They are
    fitted to the reference alone (a fixed random part of it where it is large). A small reference
    has fewer components than the settings say.
    """
    images, wanted, note = reference.images, settings.num_components, ""
    num_values = int(np.prod(images.shape[1:]))
    num = min(wanted, len(images) - 1, num_values)
    if num < 1:
        raise ValueError(f"features pca need at least 2 images, but there are {len(images)}")
    if num < wanted:
        few = f"{counted(len(images), 'image')} of {counted(num_values, 'value')}"
        note = f"features pca have {num} components instead of {wanted}: {few} have no more"
    num_fit = max(num + 1, min(MAX_FIT, MAX_FIT_BYTES // (4 * num_values)))
    facts = [reference.manifest["sha256"], num, settings.pixel_max, num_fit]
    sha256 = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    file = cache_dir() / f"pca-{sha256[:20]}.npz"

    def pixels(images: np.ndarray) -> np.ndarray:
        scale = np.float32(settings.pixel_max / 255)
        return images.reshape(len(images), -1).astype(np.float32) * scale

    try:
        with np.load(file, allow_pickle=False) as kept:
            mean, components = kept["mean"], kept["components"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # missing, or damaged
        from sklearn.decomposition import PCA

        chosen: slice | np.ndarray = slice(None)
        if len(images) > num_fit:
            indices = np.random.default_rng(0).choice(len(images), num_fit, replace=False)
            chosen = np.sort(indices)
        pca = PCA(num, random_state=0).fit(pixels(images[chosen]))
        mean, components = pca.mean_.astype(np.float32), pca.components_.astype(np.float32)
        write_whole(file, lambda stream: np.savez(stream, mean=mean, components=components))

    def extract(images: np.ndarray) -> np.ndarray:
        at_once = max(1, MAX_FIT_BYTES // (4 * num_values))
        parts = [
            (pixels(images[i : i + at_once]) - mean) @ components.T
            for i in range(0, len(images), at_once)
        ]
        return np.concatenate(parts)

    library = f"scikit-learn {metadata.version('scikit-learn')}"
    return Features("pca", sha256, library, extract, note=note)
