"""Which patches to draw: the marginal that a mask selects (Section 3.1, last paragraph)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskdm.images.prepare import convert, read_picture
from maskdm.masks import Grid, draw_visible
from maskdm.recipe import Mask
from maskdm.seeds import image_generator


def masks_of_images(mask: Mask, grid: Grid, indices: Sequence[int], seed: int) -> Tensor:
    """A mask drawn for each image by its number: visible patches, int64 (n, V).

    Raises ValueError for a mask that the grid cannot have.
    """
    drawn = [draw_visible(mask, grid, 1, image_generator(seed, "mask", index)) for index in indices]
    return torch.cat(drawn)


def patches_of_picture(picture: np.ndarray, patch_size: int) -> Tensor:
    """Patches that a black and white picture marks: their indices, int64 (V,), sorted.

    Args:
        picture: bool (H, W), True = to be drawn.
        patch_size: side of a patch in pixels.

    Raises:
        ValueError: a patch that is neither all True nor all False, or none that is True.
    """
    rows, columns = (side // patch_size for side in picture.shape)
    cells = picture.reshape(rows, patch_size, columns, patch_size)
    whole, any_of_it = cells.all((1, 3)), cells.any((1, 3))
    if (whole != any_of_it).any():
        row, column = np.argwhere(whole != any_of_it)[0]
        raise ValueError(
            f"the mask cuts through patches, the first at row {row}, column {column} of the "
            f"{rows}x{columns} grid: marginals are of whole patches of {patch_size} pixels"
        )
    if not whole.any():
        raise ValueError("the mask selects no patch: mark those to draw in white")
    return torch.from_numpy(np.flatnonzero(whole))


def read_mask(path: Path, height: int, width: int) -> np.ndarray:
    """A black and white picture of exactly that size: bool (H, W), True where it is light.

    Transparent parts count as black: painting programs save white strokes on a transparent layer.

    Raises ValueError where it does not exist, is not a picture, or has another size.
    """
    pixels = np.asarray(convert(read_picture(path), 1, "black"))
    if pixels.shape != (height, width):
        raise ValueError(
            f"{path} is {pixels.shape[0]} pixels high and {pixels.shape[1]} wide, but the model's "
            f"images are {height} high and {width} wide"
        )
    return pixels >= 128
