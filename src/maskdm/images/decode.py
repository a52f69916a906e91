"""Decoding: from a file of any format to a Pillow image whose pixels mean what the file says."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from maskdm.images.vector import HAS_SVG, SVG_START, is_svg, rendered

Content = Path | bytes | np.ndarray | Exception
"""An image as a source holds it: a file, an encoded file's bytes, uint8 or uint16 pixels (H, W) or
(H, W, C), or the error that reading it raised."""

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs it also raises

# Pillow has more formats, but one of them, EPS, runs another program on the file's content.
FORMATS = "AVIF BMP DIB GIF HEIF ICO JPEG JPEG2000 PCX PNG PPM SGI TGA TIFF WEBP".split()
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None  # the extra `heif`
MAX_PIXELS = 89_478_485  # of a decoded image; Pillow warns of decompression bombs above
# Of a text or profile of a PNG, unpacked, and of all its texts: Pillow refuses images with 1 MiB.
MAX_TEXT_BYTES, MAX_TEXTS_BYTES = 2**24, 2**25
ALPHA_OFTEN_UNUSED = ("BMP", "DIB", "TGA")
PNG_TRANSPARENT_SCALE = {"L;2": 85, "L;4": 17}  # of grey levels, which Pillow scales to 8 bits
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# What files hold instead of an image or archive, by how they begin, and what to do.
PLACEHOLDERS = {
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull",
    rb"\s*(<!doctype html|<html|<head|<body)": "a web page (an error message of a server?): "
    "download the file again",
    SVG_START: "vector graphics "
    "(SVG): render it to PNG, for example with rsvg-convert, or pip install resvg-py",
    rb"\s*<(\?xml|error)": "an XML file (an error message of a server?): download the file again",
}
HEIF_BRANDS = b"heic|heix|heim|heis|hevc|hevx|mif1|msf1"
FOREIGN = {
    **PLACEHOLDERS,
    rb"....ftyp(%s)" % HEIF_BRANDS: "HEIC: convert it to JPEG or PNG, for example with "
    "heif-convert, or pip install pillow-heif",
    rb"....ftyp(avif|avis)": "AVIF, which this Pillow cannot read: convert it to PNG",
    rb"....ftyp": "a video: extract frames, for example with ffmpeg",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL: convert it to PNG, for example with djxl",
    rb"%PDF": "a PDF file: export its pages as PNG",
    rb"8BPS": "a Photoshop file: export it as PNG",
    rb"PK\x03\x04": "a zip archive: unpack it",
    rb"\x1f\x8b": "a gzip file: unpack it",
    rb"\0+\Z": "zero bytes, at least at its beginning: its content is lost",
}
HEAD_BYTES = 512  # of a file, of which `foreign_kind` is judged


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
    with _own_limits():
        try:
            image: Image.Image = Image.open(file, formats=_formats())
        except UnidentifiedImageError:
            if HAS_SVG and is_svg(content):
                image = rendered(content)
            elif kind := foreign_kind(content):
                raise ValueError(f"not an image, but {kind}") from None
            else:
                raise
        with image:
            yield image


def load(image: Image.Image) -> Image.Image:
    """Decodes the pixels of an opened image.

    Raises ValueError where there are too many, or where the range of their values is unknown.
    """
    if is_too_large(image):
        raise ValueError(f"decompression bomb: {image.width}x{image.height} pixels")
    kind, raw = image.format, raw_mode(image)  # the latter is gone once it is loaded
    is_negative = kind == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0  # white is zero
    if isinstance(image, TiffImagePlugin.TiffImageFile) and orientation(image) >= 5:
        image.filename = ""  # else Pillow maps the file in the shape that it has after the turn
    with _without_messages() if kind == "TIFF" else contextlib.nullcontext():
        image.load()
    if kind in ALPHA_OFTEN_UNUSED and image.mode in ("LA", "RGBA"):
        if image.getchannel("A").getextrema() == (0, 0):  # its writer left the alpha unset
            return image.convert(image.mode[:-1])
    elif kind == "PNG" and "transparency" in image.info:
        _scale_transparent_colour(image, raw)
    elif kind == "TIFF" and image.mode.startswith("I"):
        return _grey_of_tiff(image, raw, is_negative)
    return image


@contextlib.contextmanager
def _without_messages() -> Iterator[None]:
    """Sends what a library of C writes to the terminal nowhere: what matters it raises as well."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no such stream
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def is_too_large(image: Image.Image) -> bool:
    """Whether an image has too many pixels to be decoded at its size."""
    return image.width * image.height > MAX_PIXELS


def _grey_of_tiff(image: Image.Image, raw: str, is_negative: bool) -> Image.Image:
    """Grey of more than 8 bits with black at 0 and white at 65535, as far as the file tells."""
    if raw.endswith("S") and ";16" in raw:
        raise ValueError("the range of signed 16-bit images is unknown: save them as unsigned")
    values = np.asarray(image)
    if image.mode == "I" and values.max() <= 255:
        raise ValueError("the range of images of mode I (32 bits) is unknown: save 8 or 16 bits")
    if raw == "I;12":
        values = (values.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    elif not (is_negative and image.mode.startswith("I;16")):  # Pillow inverts 8 bits, but not 16
        return image
    if is_negative:
        values = 65535 - values
    grey = Image.fromarray(values)
    grey.info = image.info
    return grey


def _scale_transparent_colour(image: Image.Image, raw: str) -> None:
    """Brings the transparent colour of a PNG to the 8 bits to which Pillow scales its pixels."""
    colour = image.info["transparency"]
    if raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif raw in PNG_TRANSPARENT_SCALE:
        image.info["transparency"] = colour * PNG_TRANSPARENT_SCALE[raw]


def raw_mode(image: Image.Image) -> str:
    """How the file of an opened image that has not been loaded stores pixels, in Pillow's words."""
    tiles = getattr(image, "tile", None)
    how = tiles[0][3] if tiles else None
    return str(how[0] if isinstance(how, tuple | list) and how else how)


def orientation(image: Image.Image) -> int:
    """How a camera was held, 1 to 8, by EXIF; 1, upright, where that is missing or damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data make Pillow raise nearly anything
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """Rotates an image by its EXIF data, which it then no longer has."""
    if (turn := TURNS.get(orientation(image))) is None:
        return image
    image = image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)
    return image


def is_common_image(content: bytes) -> bool:
    """Whether a file is a JPEG or PNG, by how it begins."""
    return content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n"))


def foreign_kind(content: Path | bytes, kinds: dict[bytes, str] = FOREIGN) -> str | None:
    """What a file holds instead of what is expected, and what to do; None where that is unknown."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            content = file.read(HEAD_BYTES)
    head = content[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    found = (what for start, what in kinds.items() if re.match(start, head, re.I | re.S))
    return next(found, None)


@functools.cache
def _formats() -> list[str]:
    """The members of FORMATS that this build of Pillow can read."""
    Image.init()
    if HAS_HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def _own_limits() -> Iterator[None]:
    """Lets Pillow read PNGs whose texts or profile are longer than its limit, and open any size.

    `load` judges the number of pixels, which for a JPEG may have been reduced by then.
    """
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT_BYTES
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXTS_BYTES
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = limits[:2]
        Image.MAX_IMAGE_PIXELS = limits[2]
