"""Preparing images: from an encoded image of any kind to uint8 pixels of one size."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from maskdm.families import CROPS
from maskdm.images.known import crop_of
from maskdm.recipe import Data
from maskdm.words import one_line

T = TypeVar("T")
Content = Path | bytes | np.ndarray | Exception
"""An image as a source holds it: a file, an encoded file's bytes, uint8 or uint16 pixels (H, W) or
(H, W, C), or the error that reading it raised."""

# Pillow has more formats, but one of them, EPS, runs another program on the file's content.
FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PCX PNG PPM SGI TGA TIFF WEBP".split()
MAX_PIXELS = 89_478_485  # of a decoded image; Pillow warns of decompression bombs above
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
ORIENTATION = ExifTags.Base.Orientation
Size = tuple[int, int]  # height, width


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
    if isinstance(error, Image.DecompressionBombError):
        return "decompression bomb: far too many pixels"
    text = one_line(error)
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
        load(image)
    if width % factor or height % factor:  # JPEG rounds sizes up, halving rounds them down
        box = (0.0, 0.0, width / factor, height / factor)
        image = image.resize(smaller, Image.Resampling.BILINEAR, box)
    return image


@contextlib.contextmanager
def opened(content: Content) -> Iterator[Image.Image]:
    """An image of which only the header has been read; `load` reads its pixels."""
    if isinstance(content, Exception):
        raise content
    if isinstance(content, np.ndarray):
        yield Image.fromarray(content[..., 0] if content.shape[2:] == (1,) else content)
        return
    if isinstance(content, Path) and not stat.S_ISREG(content.stat().st_mode):
        raise ValueError("not a regular file")
    if not (content.stat().st_size if isinstance(content, Path) else content):
        raise ValueError("empty file")
    file = content if isinstance(content, Path) else io.BytesIO(content)
    with Image.open(file, formats=_formats()) as image:
        yield image


def load(image: Image.Image) -> None:
    """Decodes the pixels of an image. Raises ValueError where there are too many."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"decompression bomb: {image.width}x{image.height} pixels")
    image.load()


def read_picture(path: Path) -> Image.Image:
    """A picture with its pixels. Raises ValueError where the file cannot be read as one."""
    try:
        with opened(path) as image:
            load(image)
            return image
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {reason(error)}") from None


@functools.cache
def _formats() -> list[str]:
    """The members of FORMATS that this build of Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def draft_factor(image: Image.Image, data: Data) -> int:
    """The factor by which a JPEG may be reduced while it is decoded: 1, 2, 4 or 8.

    The sides stay at least twice those of `data.size`, so that the last halving and the final
    resizing are done on pixels, with exact filters.
    """
    is_jpeg = image.format in ("JPEG", "MPO")
    if not (data.draft and is_jpeg and crop_of(data) in ("center", "resize")):
        return 1
    height, width, _ = data.shape
    if image.getexif().get(ORIENTATION, 1) >= 5:  # EXIF will turn it by 90 degrees
        height, width = width, height
    most = min(image.width // (2 * width), image.height // (2 * height))
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(1, most))


def prepare_image(image: Image.Image, data: Data) -> np.ndarray:
    """Rotates an image by its EXIF data, converts, crops and resizes it: uint8 (H, W, C)."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image = convert(image, data.channels, data.background)
    crop = CROPS[crop_of(data)].run
    assert crop is not None  # it is not `auto`
    return np.asarray(crop(image, data.shape[:2]), dtype=np.uint8).reshape(data.shape)


def convert(image: Image.Image, channels: int, background: str) -> Image.Image:
    """Converts an image of any mode to 1, 2, 3 or 4 channels of 8 bits in sRGB.

    16-bit grey is scaled; colour profiles are applied; transparent images are composited over
    `background` where the result has no alpha.

    Raises ValueError for 32-bit and float images, whose range is unknown.
    """
    image = _to_eight_bits(image)
    colours, alpha = image, None
    if image.has_transparency_data:
        base = "L" if image.mode in ("L", "LA", "La") else "RGB"
        colours = image if image.mode == f"{base}A" else image.convert(f"{base}A")
        alpha = colours.getchannel("A")
        colours = colours.convert(base)
    colours = _to_srgb(colours, image.info.get("icc_profile"))
    if alpha is None:
        return colours.convert(MODES[channels])
    whole = colours if colours.mode == "RGB" else colours.convert("RGB")
    whole.putalpha(alpha)
    if channels in (1, 3):
        whole = Image.alpha_composite(Image.new("RGBA", image.size, background), whole)
    return whole.convert(MODES[channels])


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey: Pillow's own conversion cuts it at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"the range of images of mode {image.mode} (32 bits) is unknown")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours of an image without alpha as sRGB, mode L or RGB; a broken profile is ignored."""
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile or image.mode == "LAB":
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
            transform = _transform(profile, image.mode)
            image = transform.apply(image) if transform else image
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where they are sRGB already."""
    srgb = ImageCms.createProfile("sRGB")
    if profile is None:
        return ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, mode, "RGB")
    source = ImageCms.getOpenProfile(io.BytesIO(profile))
    if mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
        return None
    return ImageCms.buildTransform(source, srgb, mode, "RGB")


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
        image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


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
