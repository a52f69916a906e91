"""The shape of a source's images, from the headers of some of them."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from maskdm.images.decode import opened
from maskdm.images.source import Item, Source

NUM_SURVEYED = 64
CHANNELS = {"1": 1, "L": 1, "I": 1, "F": 1, "I;16": 1, "LA": 2, "La": 2, "RGBA": 4, "RGBa": 4}
LOSSY = ("JPEG", "MPO", "JPEG2000")


@dataclass(frozen=True)
class Survey:
    """Facts about some images of a source."""

    shapes: Counter[tuple[int, int, int]]  # numbers of images by height, width and channels
    is_lossy: bool  # whether any is a file in a lossy format

    @property
    def shape(self) -> tuple[int, int, int]:
        """The commonest height, width and channels."""
        return self.shapes.most_common(1)[0][0]


def survey(source: Source) -> Survey:
    """Reads the headers of images all over a source, of a stream the first; skips unreadable ones.

    Raises ValueError where none of them can be read.
    """
    shapes, is_lossy = Counter[tuple[int, int, int]](), False
    for item in _some(source):
        with contextlib.suppress(Exception), opened(item.content) as image:  # of any kind
            is_transparent = image.mode == "P" and "transparency" in image.info
            channels = 4 if is_transparent else CHANNELS.get(image.mode, 3)
            shapes[image.height, image.width, channels] += 1
            is_lossy = is_lossy or image.format in LOSSY
    if not shapes:
        raise ValueError(f"none of {NUM_SURVEYED} images can be read")
    return Survey(shapes, is_lossy)


def _some(source: Source) -> Iterator[Item]:
    if source.num_images is None:
        yield from itertools.islice(source.items(), NUM_SURVEYED)
        return
    num = min(NUM_SURVEYED, source.num_images)
    for i in range(num):  # class folders follow one another
        yield from itertools.islice(source.items((i, num)), 1)
