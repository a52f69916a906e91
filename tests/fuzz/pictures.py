"""Pictures in every format that the decoder takes, and damage that knows their structure."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin, features

from fuzz.damage import EXTREMES, damaged
from maskdm.images.decode import MAX_PIXELS

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # turned by 90°
TIFF_COMPRESSIONS = "raw packbits tiff_lzw tiff_adobe_deflate".split()

# Format by Pillow's name, suffix, mode, how it is saved.
Form = tuple[str, str, str, dict[str, Any]]
FORMS: list[Form] = [
    *[("PNG", "png", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    ("PNG", "png", "L", {"transparency": 7}),
    ("PNG", "png", "RGB", {"icc_profile": SRGB, "exif": EXIF}),
    ("PNG", "png", "P", {"save_all": True, "append_images": 2}),
    *[("JPEG", "jpg", mode, {}) for mode in ("L", "RGB", "CMYK")],
    ("JPEG", "jpeg", "RGB", {"progressive": True, "exif": EXIF, "icc_profile": SRGB}),
    ("JPEG", "jpg", "RGB", {"restart_marker_rows": 1, "subsampling": 0}),
    ("MPO", "jpg", "RGB", {"save_all": True, "append_images": 1}),
    ("WEBP", "webp", "RGB", {"exif": EXIF[6:], "icc_profile": SRGB}),
    ("WEBP", "webp", "RGBA", {"lossless": True}),
    ("WEBP", "webp", "RGBA", {"save_all": True, "append_images": 2}),
    ("GIF", "gif", "P", {}),
    ("GIF", "gif", "L", {"interlace": 0, "transparency": 3}),
    ("GIF", "gif", "P", {"save_all": True, "append_images": 3}),
    *[("BMP", "bmp", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
    ("DIB", "dib", "RGB", {}),
    *[
        ("TIFF", "tif", mode, {"compression": one})
        for mode in ("L", "RGB", "RGBA", "I;16", "P", "CMYK", "LAB", "1", "LA")
        for one in TIFF_COMPRESSIONS
    ],
    ("TIFF", "tiff", "I", {}),
    ("TIFF", "tiff", "F", {}),
    ("TIFF", "tiff", "1", {"compression": "group4"}),
    ("TIFF", "tiff", "RGB", {"compression": "jpeg"}),
    ("TIFF", "tiff", "YCbCr", {"compression": "raw"}),
    ("TIFF", "tiff", "L", {"tiffinfo": {262: 0}}),
    ("TIFF", "tiff", "RGB", {"tiffinfo": {274: 6, 33432: "x" * 99}, "icc_profile": SRGB}),
    ("TIFF", "tiff", "RGB", {"save_all": True, "append_images": 2, "big_tiff": True}),
    *[("TGA", "tga", mode, {}) for mode in ("L", "LA", "P", "RGB", "RGBA")],
    ("TGA", "tga", "RGB", {"compression": "tga_rle"}),
    *[("PPM", suffix, mode, {}) for suffix, mode in (("pbm", "1"), ("pgm", "L"), ("ppm", "RGB"))],
    ("PPM", "pgm", "I;16", {}),
    ("PCX", "pcx", "P", {}),
    ("PCX", "pcx", "RGB", {}),
    ("SGI", "png", "RGB", {}),  # formats without a suffix of their own, under another's name
    ("ICO", "png", "RGBA", {"sizes": [(16, 16)]}),
]
if features.check("jpg_2000"):
    FORMS += [("JPEG2000", "jp2", mode, {}) for mode in ("L", "LA", "RGB", "RGBA", "I;16")]
if features.check("avif"):
    FORMS += [("AVIF", "avif", mode, {"speed": 10}) for mode in ("RGB", "RGBA")]
UNKNOWN_RANGE = ("I", "F")  # 32 bits, which are refused
CHUNKS = (
    b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"gAMA", b"acTL", b"fcTL", b"fdAT", b"zTXt", b"iTXt",
    b"tEXt", b"pHYs", b"tIME", b"IDAT", b"IEND",
)  # fmt: skip
SHAPES = ((1, 1), (8, 8), (16, 16), (17, 9), (33, 64), (64, 64), (1, 300), (300, 1), (120, 90))
THIN = ((1, 20_000), (30_000, 1), (3, 9_000))  # width, height


def picture(random: Random, form: Form | None = None) -> tuple[str, bytes]:
    """A valid picture of any format that Pillow writes: its suffix, and the file's content."""
    kind, suffix, mode, options = form or random.choice(FORMS)
    options = dict(options)
    width, height = (16, 16) if kind == "ICO" else random.choice(SHAPES)
    numbers = np.random.default_rng(random.getrandbits(32))

    def image() -> Image.Image:
        if mode.startswith(("I", "F")):
            values = numbers.integers(0, 65536, (height, width))
            types = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
            return Image.fromarray(values.astype(types[mode]))
        colours = Image.fromarray(numbers.integers(0, 256, (height, width, 4), dtype=np.uint8))
        if mode == "LAB":
            return Image.merge("LAB", colours.split()[:3])
        between = {"P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "1": "L"}.get(mode, mode)
        return colours.convert(between).convert(mode)

    if num := options.pop("append_images", 0):
        options["append_images"] = [image() for _ in range(num)]
    if "tiffinfo" in options:
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in options["tiffinfo"].items():
            info[tag] = value
        options["tiffinfo"] = info
    file = io.BytesIO()
    image().save(file, kind, **options)
    return suffix, file.getvalue()


def sound_picture(random: Random) -> tuple[str, bytes]:
    """A picture that every reader takes, as `picture` gives it.

    Some that Pillow writes it does not read, which ones depends on its version: a YCbCr TIFF, a
    PCX of one pixel.
    """
    while True:
        form = random.choice([form for form in FORMS if form[2] not in UNKNOWN_RANGE])
        suffix, content = picture(random, form)
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
        except OSError:
            continue
        return suffix, content


def damaged_picture(random: Random) -> tuple[str, bytes]:
    """A picture that is damaged, strange, or a bomb."""
    how = random.random()
    if how < 0.03:
        return bomb(random)
    suffix, content = picture(random)
    if how < 0.06:
        suffix = random.choice(("png", "jpg", "tif", "tga", "webp", "gif", "jp2", "avif"))
    elif content.startswith(b"\x89PNG") and how < 0.8:
        content = damaged_png(content, random)
    else:
        content = damaged(content, random)
    return suffix, content


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with its length and checksum."""
    sum_ = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", sum_)


def damaged_png(content: bytes, random: Random) -> bytes:
    """A PNG with a chunk that is damaged, moved, doubled or missing; its checksums are right."""
    chunks, place = list[tuple[bytes, bytes]](), 8
    while place + 8 <= len(content):
        (num,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + num]))
        place += 12 + num
    number, how = random.randrange(len(chunks)), random.random()
    kind, inner = chunks[number]
    if how < 0.4:
        chunks[number] = kind, damaged(inner, random)
    elif how < 0.6:
        header = bytearray(chunks[0][1])
        if random.random() < 0.5:
            struct.pack_into(">I", header, random.choice((0, 4)), random.choice(EXTREMES))
        else:
            header[random.randrange(8, 13)] = random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        chunks[0] = b"IHDR", bytes(header)
    elif how < 0.7:
        chunks.insert(random.randrange(len(chunks) + 1), chunks.pop(number))
    elif how < 0.8:
        chunks.insert(random.randrange(len(chunks) + 1), (kind, inner))
    elif how < 0.85:
        del chunks[number]
    else:
        name = random.choice(CHUNKS)
        chunks.insert(random.randrange(1, len(chunks) + 1), (name, _strange_chunk(name, random)))
    return content[:8] + b"".join(chunk(*one) for one in chunks)


def _strange_chunk(name: bytes, random: Random) -> bytes:
    packed = zlib.compress(bytes(random.choice((0, 100, 2**20, 2**24))))
    forms = {b"zTXt": b"key\0\0", b"iCCP": b"name\0\0", b"iTXt": b"key\0\x01\0en\0key\0"}
    if name in forms and random.random() < 0.7:
        return forms[name] + packed
    return random.randbytes(random.choice((0, 1, 2, 4, 13, 26, 768, 1000)))


def bomb(random: Random) -> tuple[str, bytes]:
    """A small file that claims or holds much: pixels, texts, frames."""
    zeros = zlib.compress(bytes(2**24), 9)
    how = random.choice(("header", "pixels", "text", "texts", "profile", "thin", "gif", "ppm"))
    if how == "ppm":
        width, height = random.choice(((65535, 65535), (9000, 9000), (10**9, 10**9), (10**9, 1)))
        return "ppm", f"P6 {width} {height} 255\n".encode() + bytes(300)
    if how == "gif":
        return "gif", b"GIF89a\xff\xff\xff\xff\xf0\0\0" + random.randbytes(600)
    width, height, extra = 40, 30, b""
    if how == "header":
        width, height = random.choice(
            ((65535, 65535), (2**31 - 1, 1), (9000, 9000), (30000, 30000))
        )
    elif how == "pixels":
        width, height = random.choice(((5000, 5000), (4000, 100), (9400, 9400)))
    elif how == "thin":
        width, height = random.choice(THIN)
    elif how == "text":
        extra = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2**26), 9))
    elif how == "texts":
        extra = chunk(b"zTXt", b"key\0\0" + zeros) * 12
    elif how == "profile":
        extra = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2**26), 9))
    depth, colour = random.choice(((1, 0), (8, 0), (8, 2), (8, 6), (16, 2)))
    values = {0: 1, 2: 3, 6: 4}[colour]
    row = 1 + (width * values * depth + 7) // 8
    rows = zeros if how == "header" else zlib.compress(bytes(row * height), 6)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return "png", b"\x89PNG\r\n\x1a\n" + chunks


def declared_pixels(content: Path | bytes) -> int:
    """Pixels that decoding a file may take, by its header; 0 where there are too many to begin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(
                io.BytesIO(content) if isinstance(content, bytes) else content
            ) as image:
                num = image.width * image.height
                if image.format in ("JPEG", "MPO"):  # those too large are decoded at a part
                    return min(num, MAX_PIXELS)
                return num if num <= MAX_PIXELS else 0
        except Exception:  # whatever the damage made of it
            return 0
