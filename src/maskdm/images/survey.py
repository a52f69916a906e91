"""What shape the images of a source have, from the headers of the first ones."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass

from maskdm.images.prepare import opened
from maskdm.images.source import Source

NUM_LOOKED_AT = 64
CHANNELS = {"1": 1, "L": 1, "I": 1, "F": 1, "I;16": 1, "LA": 2, "La": 2, "RGBA": 4, "RGBa": 4}
LOSSY = ("JPEG", "MPO", "JPEG2000")


@dataclass(frozen=True)
class Survey:
    """What the first images of a source are.

    Attributes:
        shapes: how many have which height, width and channels, the commonest first.
        is_lossy: whether any is a file of a format that loses detail.
    """

    shapes: Counter[tuple[int, int, int]]
    is_lossy: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """The commonest height, width and channels."""
        return self.shapes.most_common(1)[0][0]


def survey(source: Source) -> Survey:
    """Looks at the headers of a source's first images; unreadable ones are passed over.

    Raises ValueError where none of them can be read.
    """
    shapes, is_lossy = Counter[tuple[int, int, int]](), False
    for item in itertools.islice(source.items(), NUM_LOOKED_AT):
        with contextlib.suppress(Exception), opened(item.content) as image:  # decoders raise all
            is_transparent = image.mode == "P" and "transparency" in image.info
            channels = 4 if is_transparent else CHANNELS.get(image.mode, 3)
            shapes[image.height, image.width, channels] += 1
            is_lossy = is_lossy or image.format in LOSSY
    if not shapes:
        raise ValueError(f"none of the first {NUM_LOOKED_AT} images can be read")
    return Survey(shapes, is_lossy)
