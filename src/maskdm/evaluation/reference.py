"""The real images: prepared as the samples were, or refused."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskdm.evaluation.features import Features, features_of
from maskdm.evaluation.statistics import (
    Statistics,
    holds_statistics,
    load_statistics,
    save_statistics,
    statistics_of,
)
from maskdm.images.arrays import ArraySource
from maskdm.images.joined import Array
from maskdm.images.known import crop_of
from maskdm.images.open import open_source
from maskdm.images.store import Store, cache_dir, is_store, load_store, open_store
from maskdm.images.survey import survey
from maskdm.recipe import Data
from maskdm.settings import changed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Reference:
    """The real images, or what another tool wrote down of them.

    Attributes:
        name: what the user calls them.
        store: the images; or None.
        statistics: of an .npz with `mu` and `sigma`; or None.
        notes: what a reader of the figures should know.
    """

    name: str
    store: Store | None
    statistics: Statistics | None
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """For the record: source, fingerprint, number, preparation, as far as they are known."""
        if self.store is None:
            assert self.statistics is not None
            return {"source": self.name, "statistics": True, **self.statistics.facts}
        manifest = self.store.manifest
        return {
            "source": manifest["source"],
            "fingerprint": manifest["fingerprint"],
            "sha256": manifest["sha256"],
            "crop": manifest["crop"],
            "num": len(self.store),
            "shape": list(self.store.images.shape[1:]),
            "flip": False,
        }


@dataclass(frozen=True)
class Known:
    """A reference in some features.

    Attributes:
        statistics: its mean and covariance.
        vectors: the features of its images, float32 (M, D); None where there are no images.
        dim: D.
    """

    statistics: Statistics
    vectors: Array | None

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self.statistics.mean)


def own_reference(data: Data, progress: bool) -> Reference:
    """All images of a run's own source, prepared as for training, never mirrored.

    Raises ValueError as `open_store`.
    """
    return Reference(data.source, open_store(data, progress), None)


def other_reference(name: str, data: Data, from_run: bool, progress: bool) -> Reference:
    """Other real images than a model was trained on.

    Files of pictures are prepared by the samples' settings. What was prepared before (packed
    stores, arrays, statistics) is taken as it is, and refused where it doesn't fit.

    Args:
        name: any source of images, or an .npz with `mu` and `sigma`.
        data: how the samples' images were prepared: size, channels, crop.
        from_run: whether a run tells how; else pictures that have other channels are refused too.
        progress: show a bar.

    Raises:
        ValueError: another resolution, other channels or another crop than the samples'.
    """
    path, shape = Path(name).expanduser(), data.shape
    if holds_statistics(path):
        return _from_statistics(name, path, shape)
    data = changed(data, source=name)
    if is_store(path):
        manifest = load_store(path).manifest
        _refuse_shape(name, tuple(manifest["shape"][1:]), shape)
        if from_run and manifest["crop"] != crop_of(data):
            raise ValueError(
                f"the reference {name} was packed by crop {manifest['crop']}, but the samples are "
                f"of crop {crop_of(data)}: pack it by the same"
            )
        return Reference(name, open_store(changed(data, crop="auto"), progress), None)
    source = open_source(name)
    seen, notes = survey(source), []
    if isinstance(source, ArraySource):
        _refuse_shape(name, seen.shape, shape)
        data = changed(data, crop="none")
    elif min(h - shape[0] for h, _, _ in seen.shapes) < 0 or (
        min(w - shape[1] for _, w, _ in seen.shapes) < 0
    ):
        height, width, _ = min(seen.shapes)
        raise ValueError(
            f"the reference {name} has images of {width}x{height} pixels, smaller than the "
            f"samples' {shape[1]}x{shape[0]}: enlarged ones would be no measure"
        )
    elif not from_run:
        if seen.shape[2] != shape[2]:
            _refuse_shape(name, seen.shape, shape)
        if seen.shape[:2] != shape[:2]:
            notes.append(
                f"the reference's images of up to {max(w for _, w, _ in seen.shapes)}x"
                f"{max(h for h, _, _ in seen.shapes)} pixels were cut and reduced by crop "
                f"{crop_of(data)}: were the samples' models trained on the same?"
            )
    return Reference(name, open_store(data, progress), None, tuple(notes))


def in_features(reference: Reference, features: Features, show: bool) -> Known:
    """A reference's features and their statistics, kept in the cache under a hash of both.

    To be called on every rank.

    Raises ValueError for statistics of features of other length, or of other features by name.
    """
    if reference.store is None:
        assert reference.statistics is not None
        known = reference.statistics.facts.get("features")
        if known is not None and known["sha256"] != features.sha256:
            raise ValueError(
                f"the statistics in {reference.name} are of features {known['name']} (weights "
                f"{known['sha256'][:12]}), not of {features.name} ({features.sha256[:12]})"
            )
        return Known(reference.statistics, None)
    store = reference.store
    folder = cache_dir() / f"images-{store.manifest['sha256'][:20]}"
    vectors = features.vectors(features_of(store.images, features, folder, show))
    file = folder / f"features-{features.sha256[:20]}" / "statistics.npz"
    facts = reference_facts(reference, features)
    if file.is_file():
        kept = load_statistics(file)
        if kept.facts.get("num") == len(store) and len(kept.mean) == vectors.shape[1]:
            return Known(Statistics(kept.mean, kept.cov, facts), vectors)
    statistics = statistics_of(vectors, facts)
    save_statistics(statistics, file)
    return Known(statistics, vectors)


def reference_facts(reference: Reference, features: Features) -> dict[str, Any]:
    """What statistics of a reference are of, to be kept with them."""
    return {
        **reference.facts(),
        "features": {"name": features.name, "sha256": features.sha256, "library": features.library},
    }


def _from_statistics(name: str, path: Path, shape: Shape) -> Reference:
    statistics = load_statistics(path)
    if "shape" in statistics.facts:
        _refuse_shape(name, tuple(statistics.facts["shape"]), shape)
        return Reference(name, None, statistics)
    seen = _foreign_shape(path)
    if seen is not None and seen[:2] != shape[:2]:
        raise ValueError(
            f"the statistics in {name} are of images of {seen[1]}x{seen[0]} pixels, but the "
            f"samples have {shape[1]}x{shape[0]}"
            + ("" if len(seen) == 3 else " (going by its name: if it is wrong, rename it)")
        )
    note = f"how the images behind {name} were cut, resized and saved is unknown"
    return Reference(name, None, statistics, (note,))


def _foreign_shape(path: Path) -> Shape | None:
    """Height and width of the images behind statistics: of images in the file, or by its name."""
    with contextlib.suppress(ValueError):  # no images in it
        return survey(ArraySource(path)).shape
    if match := re.search(r"(?<!\d)(\d{2,4})x(\d{2,4})(?!\d)", path.stem):
        return int(match[2]), int(match[1])
    return None


def _refuse_shape(name: str, seen: Shape, wanted: Shape) -> None:
    if tuple(seen) != tuple(wanted):
        raise ValueError(
            f"the reference {name} has images of {seen[0]}x{seen[1]}x{seen[2]} (height, width, "
            f"channels), but the samples have {'x'.join(map(str, wanted))}: a distance between "
            "them would measure the preparation"
        )
