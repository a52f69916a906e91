"""Pictures that come to the page, and those that leave it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from maskdm.app.limits import Limits
from maskdm.images.decode import load, opened
from maskdm.images.output import image_grid, save_images
from maskdm.images.prepare import prepare_image, where_readable
from maskdm.recipe_data import Data
from maskdm.settings import changed

SHEET_SIDE, LARGEST_SHEET = 640, 1400  # pixels up to which small images are enlarged; and at most
CANVAS_SIDE = 512  # of the picture on which a mask is painted, about
LEAST_ALPHA = 64  # of 255, from which a pixel counts as painted
KEPT_SEC = 3600  # how long files can be downloaded


def uploaded(path: Path, data: Data, limits: Limits) -> np.ndarray:
    """An uploaded image, prepared as a model's training images were: uint8 (H, W, C).

    Crops that are for one kind of image only, such as CelebA's, give way to the middle of others.

    Raises ValueError where the file cannot be read as an image, or is too large.
    """
    limits.refuse_file(path)

    def read(content: object) -> np.ndarray:
        with opened(path) as image:
            limits.refuse_pixels(*image.size)
            picture = load(image)
        try:
            return prepare_image(picture, data)
        except ValueError:
            return prepare_image(picture, changed(data, crop="center"))

    prepared = where_readable(read, [path])[0]
    if isinstance(prepared, str):
        raise ValueError(f"{path.name} cannot be used: {prepared}")
    return prepared


def canvas(image: np.ndarray) -> Image.Image:
    """An image uint8 (H, W, C) enlarged without smoothing, to paint on: RGB."""
    sides = image.shape[:2]
    factor = math.ceil(CANVAS_SIDE / max(sides))
    return image_grid(image[None], factor * min(sides), gap=0).convert("RGB")


def painted(layers: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """The pixels over which somebody painted: bool (height, width).

    Args:
        layers: RGBA, uint8 (h, w, 4), of any size: what was painted, on a transparent ground.
        height, width: of the result; a pixel counts from a quarter of it on.
    """
    marked = np.zeros((height, width), bool)
    for layer in layers:
        if layer.ndim != 3 or layer.shape[-1] != 4:
            raise ValueError("the mask has no transparent ground: paint it on this page")
        alpha = Image.fromarray(np.ascontiguousarray(layer[..., 3]))
        marked |= np.asarray(alpha.resize((width, height), Image.Resampling.BOX)) >= LEAST_ALPHA
    return marked


def sheet(images: np.ndarray) -> Image.Image:
    """Images uint8 (N, H, W, C) as one picture for the page, enlarged or reduced to its size."""
    columns = math.ceil(math.sqrt(len(images)))
    drawn = image_grid(images, SHEET_SIDE // columns, columns=columns)
    factor = math.ceil(max(drawn.size) / LARGEST_SHEET)
    return drawn.reduce(factor) if factor > 1 else drawn


def download_files(
    images: np.ndarray, lead: np.ndarray, labels: np.ndarray | None, folder: Path, name: str
) -> tuple[Path, Path]:
    """Writes images as `sample` and `inpaint` do, a sheet and an array: NAME.png and NAME.npz.

    Each call gets a folder of its own in `folder`; those of an hour ago are removed.

    Args:
        images: uint8 (N, H, W, C).
        lead: what the sheet shows before them, uint8 (n, H, W, C).
        labels: int64 (N,), or None.
        folder: for all such files.
        name: without a suffix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if time.time() - old.stat().st_mtime > KEPT_SEC:
            shutil.rmtree(old, ignore_errors=True)
    own = folder / f"{time.time_ns()}"
    png, npz = own / f"{name}.png", own / f"{name}.npz"
    save_images(np.concatenate([lead, images]), png)
    save_images(images, npz, labels)
    return png, npz
