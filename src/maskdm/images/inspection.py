"""Inspecting images for the doctor: facts about each, and hashes that find duplicates."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from maskdm.images import prepare
from maskdm.images.colours import eight_bits
from maskdm.images.decode import (
    Content,
    is_too_large,
    load,
    opened,
    orientation,
    raw_mode,
    upright,
)
from maskdm.images.output import on_grey
from maskdm.recipe import Data

THUMBNAIL = 16  # side of the grey thumbnails
DARKEST = 16  # level of 255 that a nearly black image does not exceed: 12 bits stored as 16
STRIP_BYTES = 2**22  # of pixels hashed at a time


class ImageFacts(NamedTuple):
    """Facts about a readable image."""

    width: int  # in pixels after rotation by EXIF
    height: int
    format: str  # of the file, by Pillow's name; `array` for pixels from an array
    mode: str  # of the file's pixels, by Pillow's name
    traits: list[str]  # transparent (wholly or not), 16-bit, CMYK, colour profile, EXIF rotation,
    # several frames, nearly black
    digest: bytes  # 16 bytes, equal for equal pixels
    difference_hash: int  # 64 bits: where the prepared image gets brighter to the right, 8x8
    thumbnail: bytes  # uint8 (16, 16): the prepared image in grey


def inspect_images(
    contents: Sequence[Content], data: Data, with_images: bool
) -> tuple[list[ImageFacts | str], float, np.ndarray]:
    """Decodes images at full size, prepares them, and collects facts about them.

    Returns:
        Facts about each image, or the reason why it cannot be read or prepared; an estimate of
        the seconds in which one core prepares them for a store; and the prepared images, uint8
        (n, H, W, C), none unless requested.
    """
    results = prepare.where_readable(functools.partial(_inspect, data=data), contents)
    facts = [one if isinstance(one, str) else one[0] for one in results]
    images = [one[1] for one in results if with_images and not isinstance(one, str)]
    good = [i for i, one in enumerate(results) if not isinstance(one, str)]
    start = time.perf_counter()
    prepare.prepare_contents([contents[i] for i in good[-1:]], data)  # by now all is warmed up
    sec = (time.perf_counter() - start) * len(good)
    return facts, sec, np.array(images, np.uint8).reshape(-1, *data.shape)


def _inspect(content: Content, data: Data) -> tuple[ImageFacts, np.ndarray]:
    """Facts about an image, and the prepared image, uint8 (H, W, C)."""
    with opened(content) as image:
        mode, kind, traits = image.mode, image.format or "array", _header_traits(image)
        width, height = image.size
        if is_too_large(image):  # as for training, which reduces all JPEGs
            factor = prepare.draft_factor(image, data)
            image.draft(None, (width // factor, height // factor))
        image = load(image)
    # Not before: Pillow decodes a PNG to find its EXIF data, and an error then would be lost.
    is_turned = orientation(image) >= 5 and kind != "TIFF"  # of which Pillow turns the header
    turned = upright(image)
    if turned is not image:
        traits.append("EXIF rotation")
    image = turned
    if is_turned:
        width, height = height, width
    if image.info.get("icc_profile"):
        traits.append("colour profile")
    if image.has_transparency_data:
        levels = eight_bits(image).convert("RGBA").getchannel("A").histogram()
        if any(levels[:255]):
            traits.append("transparent" if any(levels[1:]) else "wholly transparent")
    prepared = prepare.prepare_image(image, data)
    colours = on_grey(prepared[None])[0].astype(np.float32)
    if colours.max() <= DARKEST:
        traits.append("nearly black, of 16 bits" if "16-bit" in traits else "nearly black")
    grey = Image.fromarray(colours @ np.array([0.299, 0.587, 0.114], np.float32))
    columns = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    number = int.from_bytes(np.packbits(columns[:, 1:] > columns[:, :-1]).tobytes(), "big")
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    thumbnail = np.round(np.asarray(small)).astype(np.uint8).tobytes()
    digest = _digest(image)
    return ImageFacts(width, height, kind, mode, traits, digest, number, thumbnail), prepared


def _header_traits(image: Image.Image) -> list[str]:
    """Traits of an image that has not been loaded."""
    traits = []
    # Pillow keeps the 16 bits of grey, but 8 of colours: only the raw mode shows that they had 16.
    if ";16" in image.mode or ";16" in raw_mode(image):
        traits.append("16-bit")
    if image.mode == "CMYK":
        traits.append("CMYK")
    with contextlib.suppress(Exception):  # a damaged second frame does no harm
        if getattr(image, "is_animated", False):
            traits.append("several frames")
    return traits


def _digest(image: Image.Image) -> bytes:
    """16 bytes that are equal for equal pixels; palettes are resolved."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    header = f"{image.mode} {image.size} {image.info.get('transparency')}"
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    num_rows = max(1, STRIP_BYTES // (4 * image.width))
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.digest()
