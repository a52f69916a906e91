"""Writing images: as a sheet to look at, as an array, or as a folder of files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from maskdm.files import refuse_unwritable
from maskdm.images.source import IMAGE_SUFFIXES

# Grey levels and least side, in pixels, of the squares behind transparent images.
CHECKER_DARK, CHECKER_LIGHT, CHECKER_SIDE = 102, 153, 8
# Suffixes of files that a user may expect, but that are not written. (`samples.v2` is a folder.)
OTHER_FILES = {f".{name}" for name in "npy tar zip pt safetensors gif mp4 webm avi mov pdf".split()}
OTHER_FILES |= IMAGE_SUFFIXES - {".png"}


def image_grid(
    images: np.ndarray, min_side: int = 64, gap: int = 2, columns: int | None = None
) -> Image.Image:
    """Lays images out on a sheet, row by row, over a mid-grey ground.

    Transparent images are drawn on a checkerboard, so that the sheet itself has no alpha.

    Args:
        images: uint8 (N, H, W, C), N > 0; the last axis is grey, grey and alpha, RGB or RGBA.
        min_side: smaller images are enlarged, without smoothing, by the least whole factor that
            makes their sides at least this long.
        gap: pixels between images.
        columns: images in a row; None = as many as make a near-square sheet.

    Raises ValueError for another number of channels.
    """
    refuse_channels(images)
    num, height, width, channels = images.shape
    factor = max(1, math.ceil(min_side / min(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    if channels in (2, 4):
        cell_rows, cell_columns = np.indices(images.shape[1:3]) // max(CHECKER_SIDE, factor)
        is_dark = (cell_rows + cell_columns) % 2
        images = _over(images, np.where(is_dark, CHECKER_DARK, CHECKER_LIGHT)[..., None])
    _, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = np.full(shape, 128, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return to_pil(sheet[None])[0]


def on_grey(images: np.ndarray) -> np.ndarray:
    """Converts images to RGB, transparent parts over mid-grey.

    uint8 (n, H, W, 1 to 4) -> uint8 (n, H, W, 3).
    """
    if images.shape[-1] in (2, 4):
        images = _over(images, np.array(128))
    return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)


def _over(images: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Draws images whose last channel is alpha over grey levels of 0 to 255."""
    colours, alpha = images[..., :-1].astype(np.uint32), images[..., -1:].astype(np.uint32)
    return ((colours * alpha + ground * (255 - alpha) + 127) // 255).astype(np.uint8)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """uint8 (N, H, W, C) as Pillow images of mode L, LA, RGB or RGBA for C = 1, 2, 3 or 4.

    Raises ValueError for another number of channels.
    """
    refuse_channels(images)
    return [Image.fromarray(i[..., 0] if i.shape[-1] == 1 else i) for i in images]


def refuse_channels(images: np.ndarray) -> None:
    """Raises ValueError unless the last axis is grey, grey and alpha, RGB or RGBA."""
    if images.ndim != 4 or not 1 <= images.shape[-1] <= 4:
        raise ValueError(
            f"images of shape {images.shape} cannot be drawn, only (N, H, W, C) with 1 channel "
            "(grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA): save others as .npz"
        )


def refuse_output(out: Path) -> None:
    """Raises ValueError where `save_images` cannot or should not write to `out`."""
    suffix = out.suffix.lower()
    if suffix in (".gif", ".mp4"):
        raise ValueError(
            f"--out {out}: videos are written by `maskdm sample --video`; end --out in .png"
        )
    if suffix in OTHER_FILES:
        raise ValueError(f"--out {out}: end it in .png (a grid), .npz, or no suffix (a folder)")
    is_file = suffix in (".png", ".npz")
    if not is_file and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder: use a new one")
    if is_file and out.is_dir():
        raise ValueError(f"--out {out} is a folder: use the name of a file")
    refuse_unwritable(out, "--out")


def save_images(
    images: np.ndarray, out: Path, labels: np.ndarray | None = None, columns: int | None = None
) -> None:
    """Writes images in the form that the suffix chooses; folders are made as needed.

    Args:
        images: uint8 (N, H, W, C); the last axis is grey, grey and alpha, RGB or RGBA.
        out: `.png` = one sheet, transparent images on a checkerboard; `.npz` = the array as
            `arr_0`; any other name = a folder of 000000.png, ... with all their channels.
        labels: int64 (N,), saved as `arr_1` of an `.npz`.
        columns: of a sheet; see `image_grid`.

    Raises ValueError for another number of channels, except in an `.npz`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() == ".png":
        image_grid(images, columns=columns).save(out, "PNG")
    elif out.suffix.lower() == ".npz":
        with out.open("wb") as file:  # to a name in capitals NumPy would append .npz
            np.savez(file, *[images] if labels is None else [images, labels])
    else:
        pictures = to_pil(images)
        out.mkdir(exist_ok=True)
        for i, image in enumerate(pictures):
            image.save(out / f"{i:06d}.png")
