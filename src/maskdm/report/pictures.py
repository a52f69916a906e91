"""Pictures of a run as text that stands in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, features

MOST_BYTES = 120_000  # of a picture that is embedded as it is; larger ones lose some exactness
QUALITY = 85  # of those
MOST_FRAMES = 24  # previews in a report
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A picture in a page.

    Attributes:
        source: its content, as a `data:` address.
        width, height: in pixels.
        text: what it shows, for those who cannot see it.
    """

    source: str
    width: int
    height: int
    text: str


def embedded(path: Path, text: str) -> Picture | None:
    """A picture file as a part of a page; None where there is none, or it is damaged.

    Files above 120 kB are compressed again, as WebP or JPEG.

    Args:
        path: of a PNG file.
        text: what it shows.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            width, height = image.size
            kind = "png"
            if len(content) > MOST_BYTES:
                kind = "webp" if features.check("webp") else "jpeg"
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, kind, quality=QUALITY)
                content, kind = min((buffer.getvalue(), kind), (content, "png"), key=_size)
    except (OSError, SyntaxError):  # Pillow's words for a damaged file
        return None
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(source, width, height, text)


def _size(candidate: tuple[bytes, str]) -> int:
    return len(candidate[0])


def spread(items: Sequence[T], most: int = MOST_FRAMES) -> list[T]:
    """At most so many items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
