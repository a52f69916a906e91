"""The doctor: one pass over a source, and what a user should know before training on it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import posixpath
import statistics
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from maskdm.images.diagnosis import Report, Spread, findings_of
from maskdm.images.duplicates import MAX_IMAGES, exact_groups, near_groups
from maskdm.images.inspection import THUMBNAIL, ImageFacts, inspect_images
from maskdm.images.known import crop_of
from maskdm.images.labels import Group, folder_labels, number_groups
from maskdm.images.open import open_source
from maskdm.images.source import Item, Source
from maskdm.images.workers import map_chunks, num_cores
from maskdm.recipe import Data
from maskdm.words import printable

NUM_SIZES = 5  # commonest ones in the report
LEAST_KEPT = 0.5  # of an image: a crop that keeps less is extreme


class Samples:
    """Some of the prepared images, at most `most`, evenly spread over a source of any length."""

    def __init__(self, most: int):
        self.most = most
        self._kept: list[np.ndarray] = []
        self._num_seen, self._every = 0, 1

    def add(self, images: np.ndarray) -> None:
        """Adds the next images, uint8 (n, H, W, C)."""
        for image in images:
            if self._num_seen % self._every == 0:
                self._kept.append(image.copy())
            self._num_seen += 1
            if len(self._kept) > 2 * self.most:  # keeps every other one, now and from here on
                self._kept, self._every = self._kept[::2], 2 * self._every

    def images(self) -> list[np.ndarray]:
        """uint8 (H, W, C) each, from the first to about the last."""
        num = min(self.most, len(self._kept))
        places = np.linspace(0, len(self._kept) - 1, num).round().astype(int)
        return [self._kept[place] for place in places]


def examine(data: Data, progress: bool = True, samples: Samples | None = None) -> Report:
    """Reads all of a source and reports what it holds; nothing is written.

    An image takes some 300 bytes of memory besides its name (a digest, a thumbnail). Near
    duplicates are searched for among up to 1,048,576 images. `samples` receives the prepared ones.

    Raises ValueError for a source that cannot be opened, has no images, or fails before its first.
    """
    source = open_source(data.source)
    samples = samples or Samples(0)
    inspect = functools.partial(inspect_images, data=data, with_images=samples.most > 0)
    collected, errors = _Collected(data), list[str]()
    items = _until_error(source.items(), errors)
    hidden = None if progress else True  # None: hidden unless in a terminal
    with (
        tqdm(None, f"checking {data.source}", source.num_images, disable=hidden, unit="img") as bar,
        contextlib.closing(map_chunks(inspect, items, math.prod(data.shape))) as chunks,
    ):
        for chunk, (facts, build_sec, prepared) in chunks:
            collected.add(chunk, facts, build_sec)
            samples.add(prepared)
            bar.update(len(chunk))
    if not collected.num_images:
        raise ValueError(errors[0] if errors else f"{data.source} has no images")
    report = collected.report(source, errors[0] if errors else None)
    return dataclasses.replace(report, findings=findings_of(report))


def _until_error(items: Iterator[Item], errors: list[str]) -> Iterator[Item]:
    """Yields items until the source can be read no further, and adds the reason to `errors`."""
    try:
        yield from items
    except ValueError as error:
        errors.append(str(error))


class _Collected:
    """What has been read of a source so far."""

    def __init__(self, data: Data):
        self._data, self._crop = data, crop_of(data)
        self.num_images, self._build_sec = 0, 0.0
        self._names: list[str] = []  # of the readable ones
        self._formats, self._modes, self._traits = Counter[str](), Counter[str](), Counter[str]()
        self._sizes = Counter[tuple[int, int]]()
        self._digests, self._thumbnails, self._hashes = bytearray(), bytearray(), array("Q")
        self._unreadable: list[tuple[str, str]] = []
        self._enlarged: list[str] = []
        self._extreme: list[str] = []
        self._groups: dict[Group, str] = {}  # first image of each
        self._num_in_group = Counter[Group]()  # readable ones

    def add(self, items: list[Item], facts: Sequence[ImageFacts | str], build_sec: float) -> None:
        """Adds the next images."""
        self.num_images += len(items)
        self._build_sec += build_sec
        for item, known in zip(items, facts, strict=True):
            group = posixpath.dirname(item.name), item.label
            self._groups.setdefault(group, item.name)
            if isinstance(known, str):
                self._unreadable.append((item.name, known))
            else:
                self._num_in_group[group] += 1
                self._add_readable(item.name, known)

    def _add_readable(self, name: str, facts: ImageFacts) -> None:
        self._names.append(name)
        self._sizes[facts.width, facts.height] += 1
        self._formats[facts.format] += 1
        self._modes[facts.mode] += 1
        self._traits.update(facts.traits)
        self._digests += facts.digest
        if len(self._hashes) <= MAX_IMAGES:  # one more shows that there are too many
            self._hashes.append(facts.difference_hash)
            self._thumbnails += facts.thumbnail
        height, width, _ = self._data.shape
        side = {"celeba": 128, "celeba140": 140}.get(self._crop)  # cut from each image
        if (side or facts.width) < width or (side or facts.height) < height:
            self._enlarged.append(name)
        shape = facts.width * height / (facts.height * width)
        if self._crop in ("center", "resize") and min(shape, 1 / shape) < LEAST_KEPT:
            self._extreme.append(name)

    def report(self, source: Source, read_error: str | None) -> Report:
        """The report on all images, without findings."""
        classes, no_classes, label_error = dict[str, int](), None, None
        try:
            classes, no_classes = self._classes(source)
        except ValueError as error:
            label_error = str(error)
        exact, near, near_all = self._copies()
        num_readable, cores = len(self._names), num_cores()
        sizes = list(self._sizes.elements())
        return Report(
            source=self._data.source,
            kind=source.kind,
            shape=self._data.shape,
            crop=self._crop,
            background=self._data.background,
            on_bad=self._data.on_bad,
            num_images=self.num_images,
            num_readable=num_readable,
            read_error=read_error,
            notes=source.notes,
            classes=classes,
            no_classes=no_classes,
            label_error=label_error,
            width=_spread([width for width, _ in sizes]),
            height=_spread([height for _, height in sizes]),
            sizes=[(*size, num) for size, num in self._sizes.most_common(NUM_SIZES)],
            formats=_commonest_first(self._formats),
            modes=_commonest_first(self._modes),
            traits=_commonest_first(self._traits),
            unreadable=self._unreadable,
            skipped=_commonest_first(source.skipped),
            duplicates=exact,
            near_duplicates=near,
            near_duplicates_all=near_all,
            enlarged=self._enlarged,
            extreme=self._extreme,
            store_bytes=num_readable * math.prod(self._data.shape),
            build_sec=self._build_sec / cores,
            num_cores=cores,
        )

    def _classes(self, source: Source) -> tuple[dict[str, int], str | None]:
        """Numbers of readable images by class; or why there are no classes.

        Raises ValueError for labels that cannot be class numbers.
        """
        groups = list(self._groups)
        numbers, names = number_groups(groups, np.arange(len(groups)), source.class_names)
        if numbers is not None:
            counts = Counter[int]()
            for group, number in zip(groups, numbers.tolist(), strict=True):
                counts[number] += self._num_in_group[group]
            return {name: counts[i] for i, name in enumerate(names)}, None
        if not source.has_folders:
            return {}, "the source has no labels"
        without = [name for (_, label), name in self._groups.items() if label is None]
        if len(without) < len(groups):
            return {}, f"some images have a label and some do not, such as {printable(without[0])}"
        if len(groups) == 1:
            return {}, "all images are in one folder"
        images = list(self._groups.values())
        outside = images[folder_labels(images).index(None)]
        return {}, f"some images are outside the class folders, such as {printable(outside)}"

    def _copies(self) -> tuple[list[list[str]], list[list[str]], bool]:
        """Names of equal images, of alike ones, and whether all of the latter were found."""
        groups = exact_groups(np.frombuffer(self._digests, "V16"))
        exact = [[self._names[i] for i in group] for group in groups]
        if len(self._hashes) > MAX_IMAGES:
            return exact, [], False
        copies = [i for group in groups for i in group[1:]]
        firsts = np.delete(np.arange(len(self._names)), copies)
        hashes = np.frombuffer(self._hashes, np.uint64)
        thumbnails = np.frombuffer(self._thumbnails, np.uint8).reshape(-1, THUMBNAIL**2)
        if len(firsts) < len(hashes):
            hashes, thumbnails = hashes[firsts], thumbnails[firsts]
        alike, is_all = near_groups(hashes, thumbnails)
        return exact, [[self._names[firsts[i]] for i in group] for group in alike], is_all


def _commonest_first(counter: Counter[Any]) -> dict[Any, int]:
    return dict(sorted(counter.items(), key=lambda entry: (-entry[1], str(entry[0]))))


def _spread(lengths: list[int]) -> Spread | None:
    if not lengths:
        return None
    return min(lengths), statistics.median_low(lengths), max(lengths)
