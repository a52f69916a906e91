"""Images on their way out: a sheet to look at, an array, or a folder of files."""

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


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """uint8 (N, H, W, C), C = 1 or 3, as Pillow images of mode L or RGB."""
    return [Image.fromarray(i[..., 0] if i.shape[-1] == 1 else i) for i in images]


def refuse_output(out: Path) -> None:
    """Raises ValueError where `save_images` could not or should not write to `out`."""
    if out.suffix not in (".png", ".npz", ""):
        raise ValueError(f"--out {out}: end it in .png (a grid), .npz, or nothing (a folder)")
    if out.suffix == "" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder: name a new one")
    if out.suffix and out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")


def save_images(images: np.ndarray, out: Path, labels: np.ndarray | None = None) -> None:
    """Writes images as the name says, making folders on the way.

    Args:
        images: uint8 (N, H, W, C).
        out: `.png` = one sheet; `.npz` = the array as `arr_0`; no suffix = a folder of PNG
            files 000000.png, 000001.png, ...
        labels: int64 (N,), kept as `arr_1` of an `.npz`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        save_grid(images, out)
    elif out.suffix == ".npz":
        np.savez(out, *[images] if labels is None else [images, labels])
    else:
        out.mkdir(exist_ok=True)
        for i, image in enumerate(to_pil(images)):
            image.save(out / f"{i:06d}.png")
