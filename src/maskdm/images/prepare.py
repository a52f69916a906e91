"""From an encoded image of any kind to uint8 pixels of the size and channels asked for."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from maskdm.images.known import crop_of
from maskdm.recipe import Data

Content = Path | bytes | np.ndarray | Exception
"""An image as a source holds it: a file, an encoded file's bytes, uint8 or uint16 pixels (H, W) or
(H, W, C), or why it could not be had."""

FORMATS = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PCX PNG PPM SGI TGA TIFF WEBP".split()
# Pillow knows more; of those EPS runs another program on what the file says.
MAX_PIXELS = (
    89_478_485  # more, when decoded, are taken for a decompression bomb: Pillow warns there
)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
Size = tuple[int, int]  # height, width


def prepare_contents(contents: Sequence[Content], data: Data) -> tuple[np.ndarray, dict[int, str]]:
    """Decodes and prepares images, passing over those that can't be.

    Returns:
        uint8 (n, H, W, C): the good ones in order; and for each bad one, by its place, why.
    """
    good, bad = [np.empty((0, *data.shape), np.uint8)], {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders grumble at much that they can read
        for i, content in enumerate(contents):
            try:
                good.append(prepare_image(open_image(content, data), data)[None])
            except Exception as error:  # damaged files make decoders raise nearly anything
                bad[i] = reason(error)
    return np.concatenate(good), bad


def reason(error: Exception) -> str:
    """What went wrong with an image, in one line."""
    if isinstance(error, FileNotFoundError) and os.path.islink(error.filename or ""):
        return "dangling link: what it points to isn't there"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError):
        return "decompression bomb: far too many pixels"
    text = " ".join(str(error).split()) or type(error).__name__
    if "truncated" in text.lower():
        return "truncated: the file ends early"
    return "not an image" if text.startswith("cannot identify image file") else text


def open_image(content: Content, data: Data | None = None) -> Image.Image:
    """Decodes an image; of an animation the first frame.

    Args:
        content: where it is, or what it is.
        data: lets a large JPEG be decoded at a fraction of its size (`draft`). None = never.

    Raises:
        Exception: of whatever kind the decoder raises, where it can't be decoded; ValueError for
            more than 89 million pixels.
    """
    with opened(content) as image:
        factor = draft_factor(image, data) if data is not None and data.draft else 1
        size = image.size
        if factor > 1:
            image.draft(None, (size[0] // factor, size[1] // factor))
        load(image)
    if any(side % factor for side in size):  # JPEG rounds sizes up, halving rounds them down
        box = (0.0, 0.0, size[0] / factor, size[1] / factor)
        smaller = (size[0] // factor, size[1] // factor)
        image = image.resize(smaller, Image.Resampling.BILINEAR, box)
    return image


@contextlib.contextmanager
def opened(content: Content) -> Iterator[Image.Image]:
    """An image of which only the header is read so far; its `load` reads the pixels.

    Raises what `open_image` does.
    """
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
    """Decodes the pixels of an image. Raises ValueError where they are too many."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"decompression bomb: {image.width}x{image.height} pixels")
    image.load()


@functools.cache
def _formats() -> list[str]:
    """Those of FORMATS that this build of Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def draft_factor(image: Image.Image, data: Data) -> int:
    """By how much a JPEG may be reduced while it is decoded: 1, 2, 4 or 8.

    The sides stay at least twice those asked for, so that the last halving and the final resizing
    are done on pixels, with exact filters.
    """
    if image.format not in ("JPEG", "MPO") or crop_of(data) not in ("center", "resize"):
        return 1
    height, width, _ = data.shape
    if image.getexif().get(0x0112, 1) >= 5:  # EXIF will turn it by 90 degrees
        height, width = width, height
    factor = 1
    while (
        factor < 8
        and image.width // (2 * factor) >= 2 * width
        and (image.height // (2 * factor) >= 2 * height)
    ):
        factor *= 2
    return factor


def prepare_image(image: Image.Image, data: Data) -> np.ndarray:
    """Turns an image as its EXIF data say, converts, crops and resizes it: uint8 (H, W, C)."""
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image = convert(image, data.channels, data.background)
    image = CROPS[crop_of(data)](image, data.shape[:2])
    return np.asarray(image, dtype=np.uint8).reshape(data.shape)


def convert(image: Image.Image, channels: int, background: str) -> Image.Image:
    """Brings an image of any mode to 1, 2, 3 or 4 channels of 8 bits in sRGB.

    16-bit grey is scaled; colour profiles are applied; transparency is laid on `background`
    where the result has no alpha, and kept where it has.

    Raises ValueError for 32-bit and float images, whose range nothing tells.
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
        raise ValueError(f"images of mode {image.mode} (32 bits) have no known range")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours of an image without alpha as sRGB, mode L or RGB; a broken profile is passed over."""
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile or image.mode == "LAB":
        try:
            transform = _transform(profile, image.mode)
            image = transform.apply(image) if transform else image
        except (ImageCms.PyCMSError, OSError, ValueError):
            if image.mode == "LAB":
                image = image.convert("RGB")
    return image.convert("RGB") if image.mode == "CMYK" else image


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
    """Resizes an image until it just covers the size, and cuts the middle.

    Large images are halved by box filter as often as possible first, then bicubic: the
    preparation of ADM (Dhariwal & Nichol 2021), whose statistics many papers compare with.
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
    """Resizes the whole image to the size, whatever its shape (bicubic, antialiased)."""
    return image.resize(size[::-1], Image.Resampling.BICUBIC)


def celeba(image: Image.Image, size: Size) -> Image.Image:
    """The face in CelebA's aligned images: the 128-pixel square centred at x 89, y 121.

    The preparation of the paper's lineage (Bao et al. 2022). Raises ValueError for other images.
    """
    return center_crop(_aligned(image).crop((89 - 64, 121 - 64, 89 + 64, 121 + 64)), size)


def celeba140(image: Image.Image, size: Size) -> Image.Image:
    """The middle 140 pixels of CelebA's aligned images (Song et al. 2020b); else as `celeba`."""
    return center_crop(_aligned(image).crop((19, 39, 159, 179)), size)


def _aligned(image: Image.Image) -> Image.Image:
    if image.size != (178, 218):
        raise ValueError(
            f"crops celeba and celeba140 are for CelebA's aligned images of 178x218 pixels, and "
            f"this one is {image.width}x{image.height}: use crop center"
        )
    return image


def exact(image: Image.Image, size: Size) -> Image.Image:
    """The image as it is. Raises ValueError where it isn't of that size."""
    if image.size != size[::-1]:
        raise ValueError(
            f"crop none wants images of {size[1]}x{size[0]} pixels, and this one is "
            f"{image.width}x{image.height}: use crop center or resize"
        )
    return image


CROPS = {
    "center": center_crop,
    "resize": squeeze,
    "celeba": celeba,
    "celeba140": celeba140,
    "none": exact,
}
