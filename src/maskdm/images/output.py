"""Images on their way out: a sheet to look at, an array, or a folder of files."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

# Grey levels and least side, in pixels, of the squares that show through transparent images.
CHECKER_DARK, CHECKER_LIGHT, CHECKER_SIDE = 102, 153, 8
# Of captioned sheets.
MIN_SIDE, MAX_SIDE = 96, 256  # of an image on one: smaller ones are enlarged, others reduced
FONT_SIZE = 16
GROUND = (232, 232, 232)  # neither an image's white nor the doctor's blue of what is hidden
STRIP, STRIP_TITLE, STRIP_TEXT = (238, 238, 238), (20, 20, 20), (90, 90, 90)  # of a caption
STRIP_MARGIN, WORD_GAP, LINE_HEIGHT = 8, 18, 22  # in pixels


def image_grid(images: np.ndarray, min_side: int = 64, gap: int = 2) -> Image.Image:
    """Lays images out on a near-square sheet, row by row, over a mid-grey ground.

    Transparent images are laid on a checkerboard, so that the sheet itself has no alpha.

    Args:
        images: uint8 (N, H, W, C), N > 0; the last axis is grey, grey and alpha, RGB or RGBA.
        min_side: smaller images are enlarged, pixel by pixel without smoothing, by the least
            whole factor that makes their sides at least this long.
        gap: pixels between images.

    Raises:
        ValueError: another number of channels.
    """
    refuse_channels(images)
    num, height, width, channels = images.shape
    factor = max(1, math.ceil(min_side / min(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    if channels in (2, 4):
        images = on_checkerboard(images, max(CHECKER_SIDE, factor))
    _, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = np.full(shape, 128, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def tile(image: np.ndarray) -> Image.Image:
    """An image for a captioned sheet, brought to a size that can be looked at by whole factors.

    uint8 (H, W, C), grey or RGB. Small ones are enlarged without smoothing.
    """
    factor = math.ceil(max(image.shape[:2]) / MAX_SIDE)
    shown = image_grid(image[None], MIN_SIDE if factor == 1 else 1, gap=0)
    return shown.reduce(factor) if factor > 1 else shown


@functools.cache
def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Of the captions."""
    return ImageFont.load_default(FONT_SIZE if features.check("freetype2") else None)


def on_checkerboard(images: np.ndarray, side: int) -> np.ndarray:
    """Lays images whose last channel is alpha on grey squares of `side` pixels.

    uint8 (N, H, W, 2 or 4) -> uint8 (N, H, W, 1 or 3).
    """
    rows, columns = np.indices(images.shape[1:3]) // side
    ground = np.where((rows + columns) % 2, CHECKER_DARK, CHECKER_LIGHT)[..., None]  # (H, W, 1)
    colours, alpha = images[..., :-1].astype(np.uint32), images[..., -1:].astype(np.uint32)
    return ((colours * alpha + ground * (255 - alpha) + 127) // 255).astype(np.uint8)


def with_caption(sheet: Image.Image, title: str, parts: Sequence[str] = ()) -> Image.Image:
    """A sheet with a light strip below it: a title, then short texts, wrapped to its width.

    Args:
        sheet: of mode L or RGB, which is kept; widened where a single text is longer.
        title: in black.
        parts: in grey; none is broken.
    """
    lengths = [math.ceil(font().getlength(text)) for text in (title, *parts)]
    width = max(sheet.width, max(lengths) + 2 * STRIP_MARGIN)
    places, x, line = [], STRIP_MARGIN, 0
    for length in lengths:
        if x > STRIP_MARGIN and x + length > width - STRIP_MARGIN:
            x, line = STRIP_MARGIN, line + 1
        places.append((x, sheet.height + STRIP_MARGIN + line * LINE_HEIGHT))
        x += length + WORD_GAP
    height = sheet.height + (line + 1) * LINE_HEIGHT + 2 * STRIP_MARGIN
    whole = Image.new("RGB", (width, height), STRIP)
    whole.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(whole)
    for place, text in zip(places, (title, *parts), strict=True):
        draw.text(place, text, STRIP_TITLE if text is title else STRIP_TEXT, font())
    return whole.convert(sheet.mode)


def save_grid(images: np.ndarray, path: Path, min_side: int = 64) -> None:
    """Writes `image_grid(images)` to a PNG file, making its folder if need be."""
    save_sheet(image_grid(images, min_side), path)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Writes a PNG file, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """uint8 (N, H, W, C) as Pillow images of mode L, LA, RGB or RGBA for C = 1, 2, 3 or 4.

    Raises ValueError for another number of channels.
    """
    refuse_channels(images)
    return [Image.fromarray(i[..., 0] if i.shape[-1] == 1 else i) for i in images]


def refuse_channels(images: np.ndarray) -> None:
    """Raises ValueError where the last axis isn't grey, grey and alpha, RGB or RGBA."""
    if images.ndim != 4 or not 1 <= images.shape[-1] <= 4:
        raise ValueError(
            f"images of shape {images.shape} can't be shown: (N, H, W, C) with 1 channel (grey), "
            "2 (grey and alpha), 3 (RGB) or 4 (RGBA) can; keep others in an .npz"
        )


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
        images: uint8 (N, H, W, C); the last axis is grey, grey and alpha, RGB or RGBA.
        out: `.png` = one sheet, transparent images on a checkerboard; `.npz` = the array as
            `arr_0`; no suffix = a folder of PNG files 000000.png, 000001.png, ... with all
            their channels.
        labels: int64 (N,), kept as `arr_1` of an `.npz`.

    Raises:
        ValueError: another number of channels, but in an `.npz`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        save_grid(images, out)
    elif out.suffix == ".npz":
        np.savez(out, *[images] if labels is None else [images, labels])
    else:
        pictures = to_pil(images)
        out.mkdir(exist_ok=True)
        for i, image in enumerate(pictures):
            image.save(out / f"{i:06d}.png")
