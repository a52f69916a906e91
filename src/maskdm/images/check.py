"""The doctor: one pass over a source, and what there is to know before training on it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import posixpath
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from maskdm.images.build import Seen, number_groups
from maskdm.images.diagnosis import Report, Span, findings_of, lengths, some
from maskdm.images.duplicates import MAX_IMAGES, exact_groups, near_groups
from maskdm.images.known import crop_of
from maskdm.images.look import THUMBNAIL, Look, Looks, look_at
from maskdm.images.open import open_source
from maskdm.images.source import Item, Source
from maskdm.images.workers import map_chunks, num_cores
from maskdm.recipe import Data

NUM_SIZES = 5  # commonest ones told
HALF = 0.5  # of an image: what a crop should at least leave


class Samples:
    """Some of the prepared images, evenly spread over a source whose length isn't known.

    Args:
        most: how many to keep; none if 0.
    """

    def __init__(self, most: int):
        self.most = most
        self._kept: list[np.ndarray] = []
        self._num_seen, self._every = 0, 1

    def add(self, images: np.ndarray) -> None:
        """uint8 (n, H, W, C): the next ones."""
        for image in images:
            if self._num_seen % self._every == 0:
                self._kept.append(image.copy())
            self._num_seen += 1
            if len(self._kept) > 2 * self.most:  # thins them out, and takes half as many on
                self._kept, self._every = self._kept[::2], 2 * self._every

    def images(self) -> list[np.ndarray]:
        """uint8 (H, W, C) each, at most `most` of them, from the first to about the last."""
        num = min(self.most, len(self._kept))
        places = np.linspace(0, len(self._kept) - 1, num).round().astype(int) if num else []
        return [self._kept[place] for place in places]


def examine(data: Data, progress: bool = True, samples: Samples | None = None) -> Report:
    """Reads a source through, and tells what is in it; nothing is written.

    An image costs some 300 bytes of memory besides its name (a digest, a thumbnail);
    of more than 1,048,576 near duplicates are not looked for.

    Args:
        data: source, size, channels, crop, background and on_bad.
        progress: show a bar.
        samples: is given the prepared images.

    Raises:
        ValueError: a source that can't be opened, has no images, or breaks off before its first.
    """
    source = open_source(data.source)
    seen = _Gathered(data)
    num_kept = samples.most if samples else 0
    look = functools.partial(look_at, data=data, with_images=num_kept > 0)
    hidden = None if progress else True  # None: hidden where no terminal shows it
    breaks = list[str]()
    image_bytes = int(np.prod(data.shape))
    with (
        tqdm(
            desc=f"checking {data.source}", total=source.num_images, disable=hidden, unit="img"
        ) as bar,
        contextlib.closing(
            map_chunks(look, _up_to_a_break(source.items(), breaks), image_bytes)
        ) as chunks,
    ):
        for items, looks in chunks:
            seen.add(items, looks)
            if samples is not None:
                samples.add(looks.prepared)
            bar.update(len(items))
    if not seen.num_images:
        raise ValueError(f"{data.source} has no images")
    report = seen.report(source, breaks[0] if breaks else None)
    return dataclasses.replace(report, findings=findings_of(report, data))


def _up_to_a_break(items: Iterator[Item], breaks: list[str]) -> Iterator[Item]:
    """Items for as long as the source can be read; adds why it can't any more to `breaks`.

    Raises ValueError where not even the first can be.
    """
    is_empty = True
    try:
        for item in items:
            yield item
            is_empty = False
    except ValueError as error:
        if is_empty:
            raise
        breaks.append(str(error))


class _Gathered:
    """What has been seen of a source so far."""

    def __init__(self, data: Data):
        self._data = data
        self._crop = crop_of(data)
        self.num_images = 0
        self._names: list[str] = []  # of the readable ones
        self._widths, self._heights = array("l"), array("l")
        self._formats, self._modes = Counter[str](), Counter[str]()
        self._traits, self._sizes = Counter[str](), Counter[tuple[int, int]]()
        self._digests, self._thumbnails, self._hashes = bytearray(), bytearray(), array("Q")
        self._unreadable: list[tuple[str, str]] = []
        self._enlarged: list[str] = []
        self._extreme: list[str] = []
        self._groups: dict[Seen, str] = {}  # first image of each folder and label
        self._of_group = Counter[Seen]()  # readable ones
        self._build_sec = 0.0

    def add(self, items: list[Item], looks: Looks) -> None:
        """The next images."""
        self.num_images += len(items)
        self._build_sec += looks.build_sec
        for item, look in zip(items, looks.looks, strict=True):
            group = posixpath.dirname(item.name), item.label
            self._groups.setdefault(group, item.name)
            if isinstance(look, str):
                self._unreadable.append((item.name, look))
            else:
                self._of_group[group] += 1
                self._add_look(item.name, look)

    def _add_look(self, name: str, look: Look) -> None:
        self._names.append(name)
        self._widths.append(look.width)
        self._heights.append(look.height)
        self._sizes[look.width, look.height] += 1
        self._formats[look.format] += 1
        self._modes[look.mode] += 1
        self._traits.update(look.traits)
        self._digests += look.digest
        if len(self._hashes) <= MAX_IMAGES:  # one more tells that there are too many
            self._hashes.append(look.difference_hash)
            self._thumbnails += look.thumbnail
        height, width, _ = self._data.shape
        if _is_enlarged(look, self._crop, height, width):
            self._enlarged.append(name)
        if self._crop in ("center", "resize"):
            shape = look.width * height / (look.height * width)
            if min(shape, 1 / shape) < HALF:
                self._extreme.append(name)

    def report(self, source: Source, broke_off: str | None) -> Report:
        """All of it, without findings."""
        groups = list(self._groups.items())
        classes, no_classes, bad_labels = dict[str, int](), None, None
        try:
            classes, no_classes = _classes(groups, self._of_group, source.class_names)
            if no_classes and not source.has_folders:
                no_classes = "the source tells none"
        except ValueError as error:
            bad_labels = str(error)
        exact, near, is_whole = self._copies()
        num_readable, cores = len(self._names), num_cores()
        return Report(
            source=self._data.source,
            kind=source.kind,
            shape=self._data.shape,
            crop=self._crop,
            background=self._data.background,
            on_bad=self._data.on_bad,
            num_images=self.num_images,
            num_readable=num_readable,
            broke_off=broke_off,
            notes=source.notes,
            classes=classes,
            no_classes=no_classes,
            bad_labels=bad_labels,
            width=lengths(list(self._widths)),
            height=lengths(list(self._heights)),
            sizes=[Span(*size, num) for size, num in self._sizes.most_common(NUM_SIZES)],
            formats=_commonest_first(self._formats),
            modes=_commonest_first(self._modes),
            traits=_commonest_first(self._traits),
            unreadable=self._unreadable,
            passed_over=_commonest_first(source.passed_over),
            duplicates=exact,
            near_duplicates=near,
            near_duplicates_all=is_whole,
            enlarged=self._enlarged,
            extreme=self._extreme,
            store_bytes=num_readable * int(np.prod(self._data.shape)),
            build_sec=self._build_sec / cores,
            num_cores=cores,
        )

    def _copies(self) -> tuple[list[list[str]], list[list[str]], bool]:
        """Names of equal images, of alike ones, and whether all of the latter were found."""
        groups = exact_groups(np.frombuffer(self._digests, np.uint64).reshape(-1, 2))
        exact = [[self._names[i] for i in group] for group in groups]
        if len(self._hashes) > MAX_IMAGES:
            return exact, [], False
        is_first = np.ones(len(self._names), bool)  # of its equals
        for group in groups:
            is_first[group[1:]] = False
        firsts = np.flatnonzero(is_first)
        hashes = np.frombuffer(self._hashes, np.uint64)
        thumbnails = np.frombuffer(self._thumbnails, np.uint8).reshape(-1, THUMBNAIL**2)
        if len(firsts) < len(hashes):
            hashes, thumbnails = hashes[firsts], thumbnails[firsts]
        alike, is_whole = near_groups(hashes, thumbnails)
        return exact, [[self._names[firsts[i]] for i in group] for group in alike], is_whole


def _commonest_first(counter: Counter[Any]) -> dict[Any, int]:
    return dict(sorted(counter.items(), key=lambda entry: (-entry[1], str(entry[0]))))


def _is_enlarged(look: Look, crop: str, height: int, width: int) -> bool:
    """Whether pixels have to be made up to fill the size asked for."""
    if crop in ("celeba", "celeba140"):
        side = 128 if crop == "celeba" else 140
        return max(height, width) > side
    return look.width < width or look.height < height


def _classes(
    groups: list[tuple[Seen, str]], num_readable: dict[Seen, int], class_names: list[str] | None
) -> tuple[dict[str, int], str | None]:
    """Numbers of readable images by class; or why there are no classes.

    Args:
        groups: folder and label of images that share both, and the name of the first.
        num_readable: of each group.
        class_names: names of the numbers, where the source knows them.

    Raises ValueError for labels that can't be class numbers.
    """
    if not groups:
        return {}, "there are no images"
    keys = [key for key, _ in groups]
    numbers, names = number_groups(keys, np.arange(len(keys)), class_names)
    if numbers is not None:
        counts = Counter[int]()
        for key, number in zip(keys, numbers.tolist(), strict=True):
            counts[number] += num_readable.get(key, 0)
        return {name: counts[i] for i, name in enumerate(names)}, None
    without = [name for (_, label), name in groups if label is None]
    if len(without) < len(groups):
        return {}, f"some images have a label and some have none, such as {some(without[:1])}"
    folders = [folder.split("/") if folder else [] for folder, _ in keys]
    depth = len(os.path.commonprefix(folders))
    outside = [
        name for folder, (_, name) in zip(folders, groups, strict=True) if len(folder) <= depth
    ]
    if len(groups) == 1:
        return {}, "all images lie in one folder"
    return {}, f"some images lie outside of the class folders, such as {some(outside[:1])}"
