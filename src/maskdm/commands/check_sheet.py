"""The doctor's contact sheet: images as the model sees them, plain and under a recipe's masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from maskdm.images.known import crop_of
from maskdm.images.look import on_grey
from maskdm.images.output import FONT_SIZE, GROUND, MIN_SIDE, font, tile
from maskdm.masks import draw_visible, effective_rate
from maskdm.recipe import Mask, Recipe
from maskdm.tokens import gather_patches, grid_shape, patchify, scatter_patches, unpatchify

COLUMNS = 6
ROWS_MASKED = 2  # of images under each mask
GAP = 4
HIDDEN = np.array([118, 138, 176])  # hidden patches are slate blue: no grey image has it


def draw_sheet(images: Sequence[np.ndarray], recipe: Recipe) -> Image.Image:
    """Lays out images, captioned; then some of them under the mask of each stage.

    Args:
        images: prepared, uint8 (H, W, C), at least one.
        recipe: its stages and the size of its patches; the masks are drawn by a fixed seed.
    """
    shown = on_grey(np.stack(images))  # (n, H, W, 3)
    height, width = shown.shape[1:3]
    patch_size = recipe.model.patch_size
    how = f"{width}x{height} pixels, crop {crop_of(recipe.data)}"
    parts = [_part(f"As the model sees them ({how})", shown)]
    generator = torch.Generator().manual_seed(0)
    few = shown[:: max(1, len(shown) // (COLUMNS * ROWS_MASKED))][: COLUMNS * ROWS_MASKED]
    for number, stage in enumerate(recipe.stages, 1):
        rate = effective_rate(stage.mask, grid_shape(height, width, patch_size))
        caption = f"Stage {number}, {stage.name}: {_mask_text(stage.mask, patch_size, rate)}"
        masked = hide(few, stage.mask, patch_size, generator) if rate else few[:0]
        parts.append(_part(caption, masked))
    size = max(part.width for part in parts), sum(part.height for part in parts) + GAP
    sheet = Image.new("RGB", size, GROUND)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def hide(images: np.ndarray, mask: Mask, patch_size: int, generator: torch.Generator) -> np.ndarray:
    """Paints over what a mask hides, drawn anew for each image: uint8 (n, H, W, 3), same out."""
    _, height, width, _ = images.shape
    grid = grid_shape(height, width, patch_size)
    visible = draw_visible(mask, grid, len(images), generator)  # (n, V)
    difference = torch.from_numpy(images.astype(np.int16) - HIDDEN)  # scattering fills with 0
    patches = gather_patches(patchify(difference, patch_size), visible)  # (n, V, P)
    patches = scatter_patches(patches, visible, grid[0] * grid[1])  # (n, N, P)
    return (unpatchify(patches, patch_size, grid).numpy() + HIDDEN).astype(np.uint8)


def _mask_text(mask: Mask, patch_size: int, rate: float) -> str:
    """`blocks of 8x8 pixels, 50 % hidden`."""
    if rate == 0:
        return "nothing hidden, as above"
    side = patch_size * (mask.block if mask.kind == "block" else 1)
    what = {"patch": "patches", "block": "blocks"}.get(mask.kind, "")
    kind = f"{what} of {side}x{side} pixels" if what else "all but one square"
    return f"{kind}, {100 * rate:.3g} % hidden"


def _part(caption: str, images: np.ndarray) -> Image.Image:
    """A caption over rows of images, uint8 (n, H, W, 3); the caption alone where there are none."""
    tiles = [tile(image) for image in images]
    width, height = tiles[0].size if tiles else (MIN_SIDE, 0)
    num_rows = math.ceil(len(tiles) / COLUMNS)
    across = max(COLUMNS * (width + GAP) + GAP, math.ceil(font().getlength(caption)) + 4 * GAP)
    title = FONT_SIZE + 4 * GAP
    part = Image.new("RGB", (across, title + num_rows * (height + GAP)), GROUND)
    ImageDraw.Draw(part).text((GAP, 2 * GAP), caption, "black", font())
    for i, shown in enumerate(tiles):
        row, column = divmod(i, COLUMNS)
        part.paste(shown, (GAP + column * (width + GAP), title + row * (height + GAP)))
    return part
