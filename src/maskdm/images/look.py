"""One image as the doctor sees it: what it is, and what tells whether it is there twice."""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from maskdm.images.prepare import Content, load, open_image, opened, prepare_image, reason
from maskdm.recipe import Data

THUMBNAIL = 16  # side of the grey thumbnails that are compared
STRIP_BYTES = 2**22  # of pixels that are hashed at a time
ORIENTATION = 0x0112  # EXIF's tag


class Look(NamedTuple):
    """What is told of an image that can be read.

    Attributes:
        width, height: in pixels, turned as EXIF says.
        format: of the file, as Pillow calls it; `array` for pixels of no file.
        mode: of the file's pixels, as Pillow calls it.
        traits: which of `transparent` (somewhere), `16-bit`, `CMYK`, `colour profile`,
            `EXIF rotation` and `several frames` it has.
        digest: 16 bytes, equal for equal pixels.
        difference_hash: 64 bits: where, on an 8x8 grid of the prepared image, brightness rises to
            the right.
        thumbnail: uint8 (16, 16) as bytes: the prepared image in grey.
    """

    width: int
    height: int
    format: str
    mode: str
    traits: tuple[str, ...]
    digest: bytes
    difference_hash: int
    thumbnail: bytes


class Looks(NamedTuple):
    """What a worker tells of some images.

    Attributes:
        looks: of each, or why it can't be read or prepared.
        build_sec: seconds in which a core would prepare them for a store.
        prepared: uint8 (n, H, W, C), those that can be, if they were asked for.
    """

    looks: list[Look | str]
    build_sec: float
    prepared: np.ndarray


def look_at(contents: Sequence[Content], data: Data, with_images: bool) -> Looks:
    """Decodes images at full size, prepares them, and tells what they are."""
    looks: list[Look | str] = []
    prepared = [np.empty((0, *data.shape), np.uint8)]
    last = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders grumble at much that they can read
        for content in contents:
            try:
                look, image = _look(content, data)
            except Exception as error:  # damaged files make decoders raise nearly anything
                looks.append(reason(error))
                continue
            looks.append(look)
            last = content
            if with_images:
                prepared.append(image[None])
        sec = 0.0
        if last is not None:  # the last one: by now nothing is done for the first time
            start = time.perf_counter()
            prepare_image(open_image(last, data), data)
            sec = time.perf_counter() - start
    num_good = sum(isinstance(look, Look) for look in looks)
    return Looks(looks, sec * num_good, np.concatenate(prepared))


def _look(content: Content, data: Data) -> tuple[Look, np.ndarray]:
    """Also the prepared image, uint8 (H, W, C)."""
    with opened(content) as image:
        mode, kind = image.mode, image.format or "array"
        traits = _header_traits(image)
        load(image)
    if image.getexif().get(ORIENTATION, 1) != 1:
        traits.append("EXIF rotation")
        image = ImageOps.exif_transpose(image)
    if image.info.get("icc_profile"):
        traits.append("colour profile")
    if image.has_transparency_data and _is_transparent(image):
        traits.append("transparent")
    prepared = prepare_image(image, data)
    grey = Image.fromarray(_grey(prepared))
    columns = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    rises = np.packbits(columns[:, 1:] > columns[:, :-1])  # 64 bits
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    thumbnail = np.round(np.asarray(small)).astype(np.uint8).tobytes()
    number = int.from_bytes(rises.tobytes(), "big")
    look = Look(*image.size, kind, mode, tuple(traits), _digest(image), number, thumbnail)
    return look, prepared


def _header_traits(image: Image.Image) -> list[str]:
    """Traits of an image that has not been loaded."""
    traits = []
    # Pillow reads the 16 bits of grey as they are; of colours it keeps 8, which the tile tells.
    if ";16" in image.mode or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        traits.append("16-bit")
    if image.mode == "CMYK":
        traits.append("CMYK")
    with contextlib.suppress(Exception):  # a damaged second frame is nobody's loss
        if getattr(image, "is_animated", False):
            traits.append("several frames")
    return traits


def _is_transparent(image: Image.Image) -> bool:
    histogram = image.convert("RGBA").getchannel("A").histogram()
    return sum(histogram[:255]) > 0


def _digest(image: Image.Image) -> bytes:
    """16 bytes that tell an image's pixels from others; palettes are resolved."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    header = f"{image.mode} {image.size} {image.info.get('transparency')}"
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    num_rows = max(1, STRIP_BYTES // (4 * image.width))
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    return digest.digest()


def _grey(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) -> float32 (H, W) of 0 to 255; transparent parts are mid-grey."""
    colours = on_grey(image[None])[0].astype(np.float32)
    return colours @ np.array([0.299, 0.587, 0.114], np.float32)


def on_grey(images: np.ndarray) -> np.ndarray:
    """uint8 (n, H, W, C), C = 1 to 4, as RGB: uint8 (n, H, W, 3); alpha laid on mid-grey."""
    channels = images.shape[-1]
    if channels in (1, 3):
        return images if channels == 3 else images.repeat(3, axis=-1)
    alpha = images[..., -1:].astype(np.float32) / 255
    colours = images[..., :-1]
    if channels == 2:
        colours = colours.repeat(3, axis=-1)
    return np.round(colours * alpha + 128 * (1 - alpha)).astype(np.uint8)
