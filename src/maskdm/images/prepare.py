"""Preparing images: from an encoded image of any kind to uint8 pixels of one size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from maskdm.families import CROPS
from maskdm.images.colours import convert
from maskdm.images.decode import (
    MAX_TEXT_BYTES,
    Content,
    load,
    opened,
    orientation,
    upright,
)
from maskdm.images.known import crop_of
from maskdm.recipe import Data
from maskdm.words import one_line

T = TypeVar("T")
Size = tuple[int, int]  # height, width
LARGEST_COVERING = 2**22  # pixels of an enlarged image before it is cropped


def prepare_contents(contents: Sequence[Content], data: Data) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes and prepares images, except those that cannot be.

    Returns:
        uint8 (n, H, W, C): the prepared images in order; the reasons for the others, by index.
    """
    results = where_readable(lambda one: prepare_image(open_image(one, data), data), contents)
    good = [image for image in results if not isinstance(image, str)]
    bad = {i: why for i, why in enumerate(results) if isinstance(why, str)}
    return np.array(good, np.uint8).reshape(-1, *data.shape), bad


def where_readable(read: Callable[[Content], T], contents: Sequence[Content]) -> list[T | str]:
    """What `read` gives for each image, or the reason why it cannot be read."""
    results = list[T | str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders warn about much that they can read
        for content in contents:
            try:
                results.append(read(content))
            except Exception as error:  # damaged files make decoders raise nearly anything
                results.append(reason(error))
    return results


def reason(error: Exception) -> str:
    """Why an image cannot be read, in one line."""
    if isinstance(error, FileNotFoundError) and os.path.islink(error.filename or ""):
        return "dangling link: its target does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = one_line(error)
    if "MAX_TEXT_" in text:
        return f"decompression bomb: texts or a profile of more than {MAX_TEXT_BYTES >> 20} MiB"
    if "truncated" in text.lower():
        return "truncated: the file ends early"
    return "not an image" if text.startswith("cannot identify image file") else text


def open_image(content: Content, data: Data) -> Image.Image:
    """Decodes an image, the first frame of an animation; a large JPEG reduced where it may be.

    Raises exceptions of any kind where the decoder fails; ValueError for too many pixels.
    """
    with opened(content) as image:
        factor = draft_factor(image, data)
        width, height = image.size
        smaller = (width // factor, height // factor)
        if factor > 1:
            image.draft(None, smaller)
        image = load(image)
    if width % factor or height % factor:  # JPEG rounds sizes up, halving rounds them down
        box = (0.0, 0.0, width / factor, height / factor)
        image = image.resize(smaller, Image.Resampling.BILINEAR, box)
    return image


def read_picture(path: Path) -> Image.Image:
    """A picture with its pixels. Raises ValueError where the file cannot be read as one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in `where_readable`
            with opened(path) as image:
                return load(image)
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise ValueError(f"{path} cannot be read as an image: {reason(error)}") from None


def draft_factor(image: Image.Image, data: Data) -> int:
    """The factor by which a JPEG may be reduced while it is decoded: 1, 2, 4 or 8.

    The sides stay at least twice those of `data.size`, so that the last halving and the final
    resizing are done on pixels, with exact filters.
    """
    is_jpeg = image.format in ("JPEG", "MPO")
    if not (data.draft and is_jpeg and crop_of(data) in ("center", "resize")):
        return 1
    height, width, _ = data.shape
    if orientation(image) >= 5:  # EXIF will turn it by 90 degrees
        height, width = width, height
    most = min(image.width // (2 * width), image.height // (2 * height))
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(1, most))


def prepare_image(image: Image.Image, data: Data) -> np.ndarray:
    """Rotates an image by its EXIF data, converts, crops and resizes it: uint8 (H, W, C)."""
    image = convert(upright(image), data.channels, data.background)
    crop = CROPS[crop_of(data)].run
    assert crop is not None  # it is not `auto`
    return np.asarray(crop(image, data.shape[:2]), dtype=np.uint8).reshape(data.shape)


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Resizes an image until it just covers the size, and crops the middle.

    Large images are first halved by box filter as often as possible, then resized bicubically:
    the preparation of ADM (Dhariwal & Nichol 2021), whose statistics many papers use.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    if scale != 1:
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        if covering[0] * covering[1] > max(LARGEST_COVERING, image.width * image.height):
            return _enlarged_middle(image, size, covering)
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _enlarged_middle(image: Image.Image, size: Size, covering: Size) -> Image.Image:
    """The middle of a thin image enlarged to the width and height `covering`, without the rest."""
    height, width = size
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    x, y = image.width / covering[0], image.height / covering[1]  # pixels of the image in one
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return image.resize((width, height), Image.Resampling.BICUBIC, box)


def squeeze(image: Image.Image, size: Size) -> Image.Image:
    """Resizes the whole image to the size, without keeping its shape (bicubic, antialiased)."""
    return image.resize(size[::-1], Image.Resampling.BICUBIC)


def celeba(image: Image.Image, size: Size) -> Image.Image:
    """The 128 pixels round the face in CelebA's aligned images, centred at x 89, y 121.

    The preparation of the paper's lineage (Bao et al. 2022). Raises ValueError for other images.
    """
    return center_crop(_aligned(image).crop((89 - 64, 121 - 64, 89 + 64, 121 + 64)), size)


def celeba140(image: Image.Image, size: Size) -> Image.Image:
    """The middle 140 pixels of CelebA's aligned images (Song et al. 2020b), as `celeba`."""
    return center_crop(_aligned(image).crop((19, 39, 159, 179)), size)


def _aligned(image: Image.Image) -> Image.Image:
    if image.size != (178, 218):
        raise ValueError(
            "crops celeba and celeba140 are for CelebA's aligned images of 178x218 pixels, but "
            f"this one is {image.width}x{image.height}: use crop center"
        )
    return image


def exact(image: Image.Image, size: Size) -> Image.Image:
    """The image itself. Raises ValueError for another size."""
    if image.size != size[::-1]:
        raise ValueError(
            f"crop none requires images of {size[1]}x{size[0]} pixels, but this one is "
            f"{image.width}x{image.height}: use crop center or resize"
        )
    return image
