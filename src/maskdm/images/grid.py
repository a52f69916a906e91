"""Pictures that people look at: many small images on one sheet."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image


def image_grid(images: np.ndarray, min_side: int = 64, gap: int = 2) -> Image.Image:
    """Lays images out on a near-square sheet, row by row, over a mid-grey ground.

    Args:
        images: uint8 (N, H, W, C), C = 1 or 3, N > 0.
        min_side: smaller images are enlarged, pixel by pixel without smoothing, by the least
            whole factor that makes their sides at least this long.
        gap: pixels between images.
    """
    num, height, width, channels = images.shape
    factor = max(1, math.ceil(min_side / min(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    columns = math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = np.full(shape, 128, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def save_grid(images: np.ndarray, path: Path, min_side: int = 64) -> None:
    """Writes `image_grid(images)` to a PNG file, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, min_side).save(path, "PNG")
