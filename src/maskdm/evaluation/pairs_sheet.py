"""The memorisation check's contact sheet: samples beside their nearest training images."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from maskdm.evaluation.records import Record
from maskdm.images.joined import Array
from maskdm.images.look import on_grey
from maskdm.images.output import FONT_SIZE, GROUND, font, tile

MOST_COLUMNS, MOST_WIDTH = 4, 1200  # of pairs; pixels, unless one pair alone is wider
SEAM, GAP = 2, 24  # pixels between the images of a pair, and between pairs
SUSPECT = (176, 0, 0)  # captions of what lies below the threshold


def draw_pairs(sample_images: Array, train_images: Array, record: Record) -> Image.Image:
    """Lays out the closest pairs: each sample left, its nearest training image right.

    Under each pair stands its distance in units of the threshold, in red below 1. Where the
    sample's mirror image was compared, the training image is shown mirrored. Transparent parts
    are mid-grey.

    Args:
        sample_images, train_images: uint8 (N, H, W, C) and (M, H, W, C), C = 1 to 4, those that
            the record is of.
        record: what `check_memorization` gave.

    Returns:
        An RGB image.
    """
    unit = record["threshold"] or 1.0
    drawn = []
    for pair in record["pairs"]:
        known = train_images[pair["train"]]
        images = [sample_images[pair["sample"]], known[:, ::-1] if pair["mirrored"] else known]
        notes = [name for name in ("mirrored", "equal") if pair[name]]
        caption = ", ".join([f"{pair['distance'] / unit:.2f}", *notes])
        drawn.append(_pair(images, caption, bool(record["threshold"]) and pair["distance"] < unit))
    return _laid_out(drawn, _title(record))


def _title(record: Record) -> list[str]:
    if not record["threshold"]:
        below = "Below: distance to it, over that to other training images."
    else:
        usual = f"{100 * (1 - record['expected']):.3g} %"
        below = f"Below: distance; under 1 (red) is nearer than {usual} of real images."
    return ["Left: sample. Right: training image nearest to it.", below]


def _pair(images: list[np.ndarray], caption: str, is_suspect: bool) -> Image.Image:
    """Two images uint8 (H, W, C) side by side, a caption under their middle."""
    left, right = [tile(image) for image in on_grey(np.stack(images))]
    both, long = left.width + SEAM + right.width, math.ceil(font().getlength(caption))
    width = max(both, long)
    pair = Image.new("RGB", (width, left.height + FONT_SIZE + 8), GROUND)
    pair.paste(left, ((width - both) // 2, 0))
    pair.paste(right, ((width - both) // 2 + left.width + SEAM, 0))
    place = (width - long) // 2, left.height + 4
    ImageDraw.Draw(pair).text(place, caption, SUSPECT if is_suspect else "black", font())
    return pair


def _laid_out(pairs: list[Image.Image], title: list[str]) -> Image.Image:
    """Lines of a title over rows of pairs."""
    width, height = max(pair.width for pair in pairs), max(pair.height for pair in pairs)
    fitting = max(1, (MOST_WIDTH - GAP) // (width + GAP))
    columns = min(MOST_COLUMNS, fitting, len(pairs))
    rows, line = math.ceil(len(pairs) / columns), FONT_SIZE + 6
    top = GAP + len(title) * line
    longest = max(math.ceil(font().getlength(text)) for text in title)
    across = max(columns * (width + GAP) + GAP, longest + 2 * GAP)
    sheet = Image.new("RGB", (across, top + rows * (height + GAP)), GROUND)
    for i, text in enumerate(title):
        ImageDraw.Draw(sheet).text((GAP, GAP // 2 + i * line), text, "black", font())
    for i, pair in enumerate(pairs):
        row, column = divmod(i, columns)
        sheet.paste(pair, (GAP + column * (width + GAP), top + row * (height + GAP)))
    return sheet
