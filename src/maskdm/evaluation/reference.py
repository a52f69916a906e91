"""The real images: prepared as the samples were, or refused."""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.evaluation.features import Features, features_folder, features_of
from maskdm.evaluation.statistics import (
    Statistics,
    holds_statistics,
    load_statistics,
    save_statistics,
    statistics_of,
)
from maskdm.files import expanded
from maskdm.images.arrays import ArraySource
from maskdm.images.joined import Array
from maskdm.images.known import KNOWN, crop_of
from maskdm.images.open import open_source
from maskdm.images.store import Store, is_store, load_store, open_store
from maskdm.images.survey import survey
from maskdm.recipe import Data
from maskdm.runs.folder import images_sha256, own_sources
from maskdm.settings import changed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Reference:
    """The real images, or the statistics that another tool kept of them."""

    name: str  # the user's name for them
    store: Store | None
    statistics: Statistics | None  # those of an .npz with `mu` and `sigma`
    notes: tuple[str, ...] = ()  # what a reader of the figures should know

    def facts(self) -> dict[str, Any]:
        """For the record: source, fingerprint, number and preparation, as far as known."""
        if self.store is None:
            assert self.statistics is not None
            return {"source": self.name, "statistics": True, **self.statistics.facts}
        num, *shape = self.store.images.shape
        kept = ("source", "fingerprint", "sha256", "crop")
        known = {key: self.store.manifest[key] for key in kept}
        return {**known, "num": num, "shape": shape, "flip": False}


@dataclass(frozen=True)
class ReferenceFeatures:
    """A reference in some features: images uint8 (M, H, W, C), their vectors float32 (M, D).

    Without both where only statistics are available.
    """

    images: Array = field(default_factory=lambda: np.empty((0, 0, 0, 0), np.uint8))
    vectors: Array = field(default_factory=lambda: np.empty((0, 0), np.float32))
    kept: Statistics | None = None  # mean and covariance, where they were computed before

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance of the features."""
        return self.kept if self.kept is not None else statistics_of(self.vectors)


def own_reference(data: Data, progress: bool) -> Reference:
    """All images of a run's own source, prepared as for training, never mirrored."""
    return Reference(data.source, open_store(data, progress), None)


def reference_of_run(run: Path, data: Data, progress: bool) -> tuple[Reference, bool]:
    """All images of a run's own source, wherever it is now, and whether the run was trained on
    these.

    They are known by their SHA-256, which the run keeps; without it, what is there is taken.

    Args:
        run: its folder.
        data: its settings.
        progress: show a bar.

    Raises ValueError where no images are found, or environment.json is damaged.
    """
    wanted, changed_ones, problem = images_sha256(run), None, None
    for source in own_sources(run):
        there = data if source == data.source else changed(data, source=source)
        if data.source in KNOWN:  # whose crop belongs to the name
            there = changed(there, crop=crop_of(data))
        try:
            reference = own_reference(there, progress)
        except ValueError as error:
            problem = problem or error
            continue
        assert reference.store is not None
        if wanted in (None, reference.store.manifest["sha256"]):
            return reference, True
        changed_ones = changed_ones or reference
    if changed_ones is not None:
        return changed_ones, False
    assert problem is not None
    raise problem


def other_reference(name: str, data: Data, from_run: bool, progress: bool) -> Reference:
    """Real images other than those that a model was trained on.

    Image files are prepared with the samples' settings. What was prepared before (packed stores,
    arrays, statistics) is used as it is, or refused where it does not fit.

    Args:
        name: any source of images, or an .npz with `mu` and `sigma`.
        data: how the samples' images were prepared: size, channels, crop.
        from_run: whether these are a run's settings; otherwise image files with other channels
            are refused as well.
        progress: show a bar.

    Raises ValueError for a resolution, number of channels or crop other than the samples'.
    """
    path, shape = expanded(name), data.shape
    if holds_statistics(path):
        return _from_statistics(name, path, shape)
    data = changed(data, source=name)
    if is_store(path):
        manifest = load_store(path).manifest
        _refuse_shape(name, tuple(manifest["shape"][1:]), shape)
        if from_run and manifest["crop"] != crop_of(data):
            raise ValueError(
                f"the reference {name} was packed with crop {manifest['crop']}, but the samples "
                f"have crop {crop_of(data)}: pack it with the same"
            )
        return Reference(name, open_store(changed(data, crop="auto"), progress), None)
    source = open_source(name)
    seen, notes = survey(source), []
    if isinstance(source, ArraySource):
        _refuse_shape(name, seen.shape, shape)
        data = changed(data, crop="none")
    elif small := [one for one in seen.shapes if one[0] < shape[0] or one[1] < shape[1]]:
        height, width, _ = small[0]
        raise ValueError(
            f"the reference {name} has images of {width}x{height} pixels, smaller than the "
            f"samples' {shape[1]}x{shape[0]}: enlarged ones are not comparable"
        )
    elif not from_run:
        if seen.shape[2] != shape[2]:
            _refuse_shape(name, seen.shape, shape)
        if seen.shape[:2] != shape[:2]:
            widest, highest = (max(one[i] for one in seen.shapes) for i in (1, 0))
            notes.append(
                f"the reference's images of up to {widest}x{highest} pixels were cut and reduced "
                f"with crop {crop_of(data)}: make sure that the samples' model was trained on "
                "images prepared in the same way"
            )
    return Reference(name, open_store(data, progress), None, tuple(notes))


def reference_features(reference: Reference, features: Features, show: bool) -> ReferenceFeatures:
    """A reference's features and their statistics, kept in the cache under a hash of both.

    To be called on every rank.

    Raises ValueError for statistics that are known to be of other features.
    """
    facts = {**reference.facts(), "features": features.facts}
    if reference.store is None:
        kept = reference.statistics
        assert kept is not None
        other = kept.facts.get("features")
        if other is not None and other["sha256"] != features.sha256:
            raise ValueError(
                f"the statistics in {reference.name} are of features {other['name']} (weights "
                f"{other['sha256'][:12]}), not of {features.name} ({features.sha256[:12]})"
            )
        return ReferenceFeatures(kept=replace(kept, facts=facts))
    images = reference.store.images
    folder = features_folder(reference.store.manifest["sha256"])
    vectors = features.vectors(features_of(images, features, folder, show))
    file = folder / features.folder_name / "statistics.npz"
    if not file.is_file():
        save_statistics(statistics_of(vectors, facts), file)
    return ReferenceFeatures(images, vectors, replace(load_statistics(file), facts=facts))


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
            + ("" if len(seen) == 3 else " (judged by its name: if that is wrong, rename the file)")
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
            f"the reference {name} has images of {'x'.join(map(str, seen))} (height, width, "
            f"channels), but the samples have {'x'.join(map(str, wanted))}: a distance between "
            "them would measure the preparation"
        )
