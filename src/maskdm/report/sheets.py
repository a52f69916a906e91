"""Picture sheets: a run's previews, the doctor's contact sheet, samples beside training images."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features

from maskdm.evaluation.neighbours import NearInPixels
from maskdm.evaluation.records import Record
from maskdm.images.known import crop_of
from maskdm.images.output import image_grid, on_grey
from maskdm.masks import draw_visible, effective_rate, mask_text
from maskdm.recipe import Mask, Recipe
from maskdm.tokens import gather_patches, grid_shape, patchify, scatter_patches, unpatchify

FONT_SIZE, LINE_HEIGHT, WORD_GAP, TEXT_MARGIN = 16, 24, 18, 8  # in pixels
GROUND = (232, 232, 232)  # neither an image's white nor the blue of hidden patches
BLACK, GREY, RED = (20, 20, 20), (90, 90, 90), (176, 0, 0)
MIN_SIDE, MAX_SIDE = 96, 256  # of a tile: smaller images are enlarged, larger ones reduced
GAP = 4  # between tiles

PREVIEW_SIDE = 64  # least side of a preview
DOCTOR_COLUMNS, DOCTOR_ROWS = 6, 2  # the rows are those under each mask
HIDDEN = np.array([118, 138, 176])  # hidden patches are slate blue: no grey image has it
PAIR_COLUMNS, PAIR_SEAM, PAIR_GAP = 4, 2, 24
PAIRS_WIDTH = 1200  # of a sheet of pairs, unless a single pair is wider


@dataclass(frozen=True)
class Part:
    """A part of a sheet: a title, further texts beside it, then tiles in rows."""

    title: str = ""  # in black; may be empty
    texts: Sequence[str] = ()  # in grey; wrapped between texts, none is broken
    tiles: Sequence[Image.Image] = ()  # RGB; there may be none
    columns: int = 1  # tiles in a row

    @property
    def tile_size(self) -> tuple[int, int]:
        """Width of the widest tile, and height of the highest, in pixels."""
        width = max((tile.width for tile in self.tiles), default=0)
        return width, max((tile.height for tile in self.tiles), default=0)


def preview_sheet(images: np.ndarray, title: str, parts: Sequence[str]) -> Image.Image:
    """The previews of a run at one of its steps, near-square, with texts below.

    Args:
        images: uint8 (N, H, W, C), N > 0, C = 1 to 4; transparent ones show a checkerboard.
        title: which stage and step.
        parts: what was measured there.
    """
    tiles = [_enlarged(image, PREVIEW_SIDE) for image in images]
    columns = math.ceil(math.sqrt(len(tiles)))
    return sheet_of([Part(tiles=tiles, columns=columns), Part(title, parts)])


def draw_sheet(images: Sequence[np.ndarray], recipe: Recipe) -> Image.Image:
    """The doctor's contact sheet: images as the model sees them, then under each stage's mask.

    Args:
        images: prepared, uint8 (H, W, C), at least one.
        recipe: its stages and the size of its patches; masks are drawn with a fixed seed.
    """
    shown = on_grey(np.stack(images))  # (n, H, W, 3)
    height, width = shown.shape[1:3]
    patch_size = recipe.model.patch_size
    title = f"As the model sees them ({width}x{height} pixels, crop {crop_of(recipe.data)})"
    parts = [Part(title, (), _visible(shown), DOCTOR_COLUMNS)]
    generator = torch.Generator().manual_seed(0)
    num_masked = DOCTOR_COLUMNS * DOCTOR_ROWS
    few = shown[:: max(1, len(shown) // num_masked)][:num_masked]
    for number, stage in enumerate(recipe.stages, 1):
        mask = stage.mask
        rate = effective_rate(mask, grid_shape(height, width, patch_size))
        text = (
            f"{mask_text(mask)}, {100 * rate:.3g} % hidden" if rate else "nothing hidden, as above"
        )
        tiles = _visible(hide(few, mask, patch_size, generator)) if rate else []
        parts.append(Part(f"Stage {number}, {stage.name}: {text}", (), tiles, DOCTOR_COLUMNS))
    return sheet_of(parts)


def pairs_sheet(samples: np.ndarray, train: np.ndarray, record: Record) -> Image.Image:
    """The closest pairs of the check for copies: samples left, training images right.

    The distance is below each pair, in units of the threshold, in red if under 1. Transparent
    parts are mid-grey.

    Args:
        samples, train: the pairs' images, uint8 (n, H, W, C), C = 1 to 4; training images are
            mirrored where the sample's mirror image was compared.
        record: what `check_memorization` gave.
    """
    unit = record["threshold"] or 1.0
    below = "Below: distance to it, over that to other training images."
    if record["threshold"]:
        usual = f"{100 * (1 - record['expected']):.3g} %"
        below = f"Below: distance; under 1 (red) is nearer than {usual} of real images."
    tiles = []
    shown = (_visible(on_grey(images)) for images in (samples, train))
    for sample, near, pair in zip(*shown, record["pairs"], strict=True):
        notes = [name for name in ("mirrored", "equal") if pair[name]]
        text = ", ".join([f"{pair['distance'] / unit:.2f}", *notes])
        is_close = bool(record["threshold"]) and pair["distance"] < unit
        tiles.append(_pair(sample, near, text, RED if is_close else BLACK))
    title = "Left: sample. Right: training image nearest to it."
    return sheet_of([Part(title, [below], tiles, _pair_columns(tiles))], PAIR_GAP)


def neighbours_sheet(samples: np.ndarray, near: NearInPixels) -> Image.Image:
    """Samples left, the training images nearest to them by their pixels right.

    Args:
        samples: uint8 (n, H, W, C), C = 1 to 4; transparent parts are mid-grey.
        near: what `nearest_in_pixels` gave for these.
    """
    shown = (_visible(on_grey(images)) for images in (samples, near.images))
    tiles = [
        _pair(sample, image, f"{difference:.3g}", BLACK)
        for sample, image, difference in zip(*shown, near.difference, strict=True)
    ]
    title = "Left: sample. Right: training image most like it, pixel by pixel."
    below = "Below: difference of their pixels, of 255."
    return sheet_of([Part(title, [below], tiles, _pair_columns(tiles))], PAIR_GAP)


def sheet_of(parts: Sequence[Part], gap: int = GAP) -> Image.Image:
    """Lays parts out below each other, their texts, then their tiles with gaps between: RGB.

    The sheet is as wide as the widest row of tiles, or as the longest single text.
    """
    widest = max(part.columns * (part.tile_size[0] + gap) for part in parts)
    longest = max(_width(text) for part in parts for text in (part.title, *part.texts))
    width = gap + max(widest, longest + gap)
    tiles: list[tuple[Image.Image, tuple[int, int]]] = []
    texts: list[tuple[tuple[int, int], str, tuple[int, int, int]]] = []
    top = 0
    for part in parts:
        if part.title:
            left, top = gap, top + TEXT_MARGIN
            for text in (part.title, *part.texts):
                if left > gap and left + _width(text) > width - gap:
                    left, top = gap, top + LINE_HEIGHT
                texts.append(((left, top), text, BLACK if text is part.title else GREY))
                left += _width(text) + WORD_GAP
            top += LINE_HEIGHT
        else:
            top += gap
        across, down = part.tile_size
        for i, tile in enumerate(part.tiles):
            middle = gap + i % part.columns * (across + gap) + across // 2
            tiles.append((tile, (middle - tile.width // 2, top + i // part.columns * (down + gap))))
        top += math.ceil(len(part.tiles) / part.columns) * (down + gap)
    sheet = Image.new("RGB", (width, top + GAP), GROUND)
    for tile, place in tiles:
        sheet.paste(tile, place)
    for place, text, colour in texts:
        ImageDraw.Draw(sheet).text(place, text, colour, _font())
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


def _pair_columns(tiles: Sequence[Image.Image]) -> int:
    """How many pairs stand beside each other."""
    widest = max(tile.width for tile in tiles)
    fitting = max(1, (PAIRS_WIDTH - PAIR_GAP) // (widest + PAIR_GAP))
    return min(PAIR_COLUMNS, fitting, len(tiles))


def _pair(
    a: Image.Image, b: Image.Image, caption: str, colour: tuple[int, int, int]
) -> Image.Image:
    """Two images side by side, and a caption below them."""
    both = a.width + PAIR_SEAM + b.width
    width = max(both, _width(caption))
    tile = Image.new("RGB", (width, a.height + LINE_HEIGHT), GROUND)
    tile.paste(a, ((width - both) // 2, 0))
    tile.paste(b, ((width - both) // 2 + a.width + PAIR_SEAM, 0))
    place = (width - _width(caption)) // 2, a.height + GAP
    ImageDraw.Draw(tile).text(place, caption, colour, _font())
    return tile


def _visible(images: np.ndarray) -> list[Image.Image]:
    """Images uint8 (n, H, W, C) between MIN_SIDE and MAX_SIDE, by a whole factor."""
    factor = math.ceil(max(images.shape[1:3]) / MAX_SIDE)
    if factor > 1:
        return [_enlarged(image, 1).reduce(factor) for image in images]
    return [_enlarged(image, MIN_SIDE) for image in images]


def _enlarged(image: np.ndarray, min_side: int) -> Image.Image:
    """An image uint8 (H, W, C) with sides of at least min_side, enlarged without smoothing."""
    return image_grid(image[None], min_side, gap=0).convert("RGB")


def _width(text: str) -> int:
    return math.ceil(_font().getlength(text))


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE if features.check("freetype2") else None)
