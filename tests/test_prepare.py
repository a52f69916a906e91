from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from maskdm.images.prepare import (
    center_crop,
    convert,
    open_image,
    prepare_contents,
    prepare_image,
    read_picture,
)
from maskdm.images.store import open_store
from maskdm.recipe import Data

MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I I;16".split()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(value: object, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, value)


def prepared(content: bytes | Path, **data: object) -> np.ndarray:
    settings = Data(**{"size": 16, **data})
    images, bad = prepare_contents([content], settings)
    assert not bad, bad
    return images[0]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft colours, as a photograph has them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_comes_to_every_number_of_channels(mode, channels):
    if mode == "LAB":
        image = flat((255, 128, 128), mode="LAB")
    elif mode == "HSV":
        image = flat((0, 0, 255), mode="HSV")
    elif mode.startswith("I"):
        image = Image.fromarray(np.full((16, 16), 65535, np.uint16))
        image = image if mode == "I;16" else image.convert("I")
    elif mode in ("La", "PA", "RGBa"):
        image = (
            flat((255, 255), mode="LA").convert("RGBA").convert("PA" if mode == "PA" else "RGBA")
        )
        image = image if mode == "PA" else image.convert(mode if mode == "RGBa" else "LA")
        image = image.convert(mode)
    else:
        image = flat((255, 255, 255)).convert("RGBA").convert(mode)
    assert image.mode == mode
    whole = prepare_image(image, Data(size=8, channels=channels))
    assert whole.shape == (8, 8, channels) and whole.dtype == np.uint8
    assert whole.min() >= 254  # white, and opaque


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for image in (Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        got = prepared(encoded(image, "TIFF"), channels=1)
        assert np.array_equal(got[..., 0], np.round(ramp / 257))
    assert np.array_equal(prepared(encoded(Image.fromarray(ramp)), channels=1), got)
    for values in (ramp.astype(np.float32), ramp.astype(np.int32) * 2):
        _, bad = prepare_contents([encoded(Image.fromarray(values), "TIFF")], Data(size=16))
        assert "32 bits) is unknown" in bad[0]


def test_transparent_parts_show_the_background_or_are_kept():
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8] = (255, 0, 0, 255)
    pixels[:, 8:] = (0, 255, 0, 0)  # a hidden colour that must not come through
    content = encoded(Image.fromarray(pixels))
    assert (prepared(content)[:, 8:] == 255).all()
    assert (prepared(content, background="black")[:, 8:] == 0).all()
    assert (prepared(content, background="#102030")[:, 8:] == (16, 32, 48)).all()
    assert (prepared(content)[:, :8] == (255, 0, 0)).all()
    assert (prepared(content, channels=1, background="black")[:, 8:] == 0).all()
    kept = prepared(content, channels=4)
    assert (kept[..., 3] == pixels[..., 3]).all() and (kept[:, :8, 0] == 255).all()
    small = prepared(content, channels=4, size=6)  # the edge is mixed from visible colour alone
    edge = small[(small[..., 3] > 0) & (small[..., 3] < 255)]
    assert len(edge) and (edge[:, 1] < 10).all()
    assert (prepared(content, channels=2)[..., 1] == pixels[..., 3]).all()


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_one_transparent_colour_counts_as_transparency(mode):
    image = flat((255, 0, 0)).convert(mode)
    image.paste(flat((0, 0, 255), (8, 16)).convert(mode), (8, 0))
    clear = image.getpixel((15, 0))
    content = encoded(image, transparency=clear)
    assert Image.open(io.BytesIO(content)).has_transparency_data
    got = prepared(content, background="lime")
    assert (got[:, 8:] == (0, 255, 0)).all()
    assert (got[:, :8] == np.asarray(image.convert("RGB"))[:, :8]).all()
    assert (prepared(content, channels=4)[:, 8:, 3] == 0).all()


def rgb_profile(space: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def swapped_profile() -> bytes:
    """An sRGB profile whose red and blue primaries have changed places."""
    profile = bytearray(rgb_profile("sRGB"))
    count = struct.unpack(">I", profile[128:132])[0]
    tags = {profile[p : p + 4].decode(): p for p in range(132, 132 + 12 * count, 12)}
    red, blue = (bytes(profile[tags[t] + 4 : tags[t] + 12]) for t in ("rXYZ", "bXYZ"))
    for tag, value in (("rXYZ", blue), ("bXYZ", red)):
        profile[tags[tag] + 4 : tags[tag] + 12] = value
    text = profile.find("sRGB".encode("utf-16-be"))
    profile[text : text + 8] = "swap".encode("utf-16-be")
    return bytes(profile)


def test_colour_profiles_are_applied():
    pixels = np.asarray(photo(16, 16))
    plain = prepared(encoded(Image.fromarray(pixels)))
    assert np.array_equal(plain, pixels)
    tagged = encoded(Image.fromarray(pixels), icc_profile=rgb_profile("sRGB"))
    assert np.array_equal(prepared(tagged), pixels)
    swapped = encoded(Image.fromarray(pixels), icc_profile=swapped_profile())
    difference = prepared(swapped).astype(int) - pixels[..., ::-1]
    assert np.abs(difference).max() <= 2
    alpha = np.dstack([pixels, np.arange(256, dtype=np.uint8).reshape(16, 16)])
    both = prepared(encoded(Image.fromarray(alpha), icc_profile=swapped_profile()), channels=4)
    assert np.abs(both[..., :3].astype(int) - pixels[..., ::-1]).max() <= 2
    assert np.array_equal(both[..., 3], alpha[..., 3])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_a_broken_or_foreign_colour_profile_is_ignored(mode):
    image = photo(16, 16).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    plain = prepared(encoded(image, kind))
    for profile in (b"no profile", rgb_profile("LAB"), rgb_profile("sRGB")[:200]):
        assert np.array_equal(prepared(encoded(image, kind, icc_profile=profile)), plain)


def test_cmyk_becomes_rgb():
    colours = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 255, 0): (255, 0, 0)}
    for cmyk, rgb in {**colours, (0, 0, 0, 255): (0, 0, 0)}.items():
        image = flat(cmyk, mode="CMYK")
        for kind in ("TIFF", "JPEG"):
            assert np.abs(prepared(encoded(image, kind)).astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind, tmp_path):
    pixels = np.asarray(photo(24, 16).convert("L"))[..., None]  # Pillow maps no RGB
    turns = {  # what a viewer does, by the EXIF standard
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = turns[orientation](pixels)
    content = encoded(Image.fromarray(pixels[..., 0]), kind, exif=exif)
    (tmp_path / "a").write_bytes(content)
    for one in (content, tmp_path / "a"):  # Pillow maps the latter into memory
        got = prepared(one, size=upright.shape[:2], channels=1, crop="none")
        assert np.array_equal(got, upright)


def test_the_first_frame_of_an_animation_is_used():
    frames = [flat(value, mode="L") for value in (10, 200, 90)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (prepared(content) == 10).all(), kind


def png(
    width: int,
    height: int,
    rows: bytes,
    bits: int = 8,
    colour: int = 2,
    chunks: dict[bytes, bytes] | None = None,
    late: dict[bytes, bytes] | None = None,
) -> bytes:
    """A PNG file; colour 0 = grey, 2 = RGB; chunks before and after its pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        whole = name + body
        return struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *(chunks or {}).items(), (b"IDAT", zlib.compress(rows))]
    parts += [*(late or {}).items(), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_claiming(width: int, height: int) -> bytes:
    return png(width, height, bytes(10_000))


def test_reasons_why_images_cannot_be_decoded_differ():
    jpeg, png = encoded(photo(64, 64), "JPEG"), encoded(photo(64, 64))
    contents = {
        b"no image": "not an image",
        b"": "empty file",
        jpeg[: len(jpeg) // 2]: "truncated",
        png[: len(png) // 2]: "truncated",
        png_claiming(20_000, 20_000): "decompression bomb",
        png_claiming(13_000, 13_000): "decompression bomb: 13000x13000 pixels",
        png_claiming(9_000, 9_000): "truncated",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n": "not an image",  # would be run
    }
    images, bad = prepare_contents([*contents, png], Data(size=16))
    assert len(images) == 1
    for number, expected in enumerate(contents.values()):
        assert expected in bad[number]


def test_center_crop_keeps_the_middle():
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    assert np.asarray(center_crop(Image.fromarray(pixels), (16, 16))).min() == 255
    halved = np.asarray(center_crop(Image.fromarray(pixels), (8, 8)))  # an exact box reduction
    assert halved.shape == (8, 8, 3) and halved.min() == 255
    wide = np.asarray(center_crop(Image.fromarray(pixels), (8, 24)))
    assert wide.shape == (8, 24, 3) and wide[:, 8:16].min() == 255 and wide[:, :8].max() == 0
    tall = np.asarray(center_crop(Image.fromarray(pixels), (16, 8)))
    assert tall.shape == (16, 8, 3) and tall.min() == 255


def test_large_images_are_halved_by_averages():
    pixels = np.asarray(photo(64, 48)).astype(int)
    got = prepared(encoded(Image.fromarray(pixels.astype(np.uint8))), size=(12, 16))
    means = pixels.reshape(12, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(got - means).max() <= 2  # four roundings


@pytest.mark.parametrize(("crop", "box"), [("celeba", (25, 57, 128)), ("celeba140", (19, 39, 140))])
def test_faces_are_cropped_from_celebas_aligned_images(crop, box):
    left, top, side = box
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[top : top + side, left : left + side] = 255
    data = Data(size=64, crop=crop)
    assert (prepare_image(Image.fromarray(pixels), data) == 255).all()
    outside = 255 - pixels  # a pixel more on any side would show
    assert (prepare_image(Image.fromarray(outside), data) == 0).all()
    if crop == "celeba":  # centred at x 89, y 121, halved by exact averages
        ramp = np.arange(218 * 178).reshape(218, 178) % 251
        image = Image.fromarray(ramp.astype(np.uint8))
        middle = prepare_image(image, Data(size=64, channels=1, crop=crop))[32, 32, 0]
        assert abs(int(middle) - ramp[121:123, 89:91].mean()) <= 1
    with pytest.raises(
        ValueError, match="aligned images of 178x218.*this one is 218x178: use crop"
    ):
        prepare_image(Image.fromarray(pixels.transpose(1, 0, 2)), data)


def test_images_of_the_exact_size_stay_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    data = Data(size=(16, 24), crop="none")
    assert np.array_equal(prepare_image(Image.fromarray(pixels), data), pixels)
    with pytest.raises(ValueError, match="requires images of 24x16 pixels, but this one is 24x8"):
        prepare_image(Image.fromarray(pixels[:8]), data)


@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(["center", "resize"]),
    st.sampled_from([1, 2, 3, 4]),
)
def test_every_shape_is_brought_to_every_other(size, target, crop, channels):
    image = flat((77, 77, 77), size)
    whole = prepare_image(image, Data(size=target, channels=channels, crop=crop))
    assert whole.shape == (*target, channels)
    assert (whole[..., : 1 if channels < 3 else 3] == 77).all()


@pytest.mark.parametrize("size", [(512, 384), (501, 375), (333, 501), (130, 2000), (1024, 1024)])
@pytest.mark.parametrize("crop", ["center", "resize"])
def test_jpegs_decoded_at_a_fraction_hardly_differ(size, crop):
    content = encoded(photo(*size), "JPEG", quality=95)
    exact, quick = (prepared(content, size=32, crop=crop, draft=draft) for draft in (False, True))
    assert not np.array_equal(exact, quick) or min(size) < 4 * 32  # it did something
    difference = np.abs(exact.astype(int) - quick)
    assert difference.mean() < 2 and difference.max() <= 10


def test_jpegs_are_decoded_at_a_fraction_only_where_enough_is_left():
    content = encoded(photo(500, 375), "JPEG")
    sizes = {side: open_image(content, Data(size=side)).size for side in (20, 46, 47, 93, 94, 300)}
    assert sizes == {20: (62, 46), 46: (125, 93), 47: (250, 187), 93: (250, 187),
                     94: (500, 375), 300: (500, 375)}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    turned = encoded(photo(500, 375), "JPEG", exif=exif)
    assert open_image(turned, Data(size=(100, 10))).size == (250, 187)
    assert open_image(content, Data(size=(100, 10))).size == (500, 375)
    assert open_image(content, Data(size=20, crop="none")).size == (500, 375)
    assert open_image(encoded(photo(500, 375)), Data(size=20)).size == (500, 375)


def test_converting_twice_changes_nothing():
    for channels in (1, 2, 3, 4):
        once = convert(photo(9, 9), channels, "white")
        assert np.array_equal(np.asarray(convert(once, channels, "white")), np.asarray(once))


@pytest.mark.parametrize("kind", ["BMP", "DIB", "TGA"])
def test_an_alpha_that_was_never_set_does_not_hide_the_colours(kind):
    pixels = np.dstack([np.asarray(photo(16, 16)), np.zeros((16, 16), np.uint8)])
    content = encoded(Image.fromarray(pixels), "TGA" if kind == "TGA" else "BMP")
    assert Image.open(io.BytesIO(content)).mode == ("RGBA" if kind == "TGA" else "RGB")
    if kind != "TGA":  # Pillow writes no alpha mask: a header of 108 bytes has one
        body = content[54:]
        head = struct.pack("<IiiHHIIiiII", 108, 16, 16, 1, 32, 3, len(body), 2835, 2835, 0, 0)
        head += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
        start = b"BM" + struct.pack("<IHHI", 122 + len(body), 0, 0, 122)
        content = (start if kind == "BMP" else b"") + head + body
    assert np.array_equal(prepared(content), pixels[..., :3])
    assert (prepared(content, channels=4)[..., 3] == 255).all()
    clear = encoded(Image.fromarray(pixels))  # a PNG means it
    assert (prepared(clear) == 255).all() and not prepared(clear, channels=4)[..., 3].any()


def exif_with(kind: int, count: int, value: bytes) -> bytes:
    """EXIF data of one tag, the orientation, of any TIFF type."""
    entry = struct.pack("<HHHI", 1, 0x112, kind, count) + value.ljust(4, b"\0") + bytes(4)
    return b"Exif\0\0II*\0\x08\0\0\0" + entry


@pytest.mark.parametrize(
    "exif",
    [
        exif_with(2, 2, b"1\0"),  # a text
        exif_with(2, 2, b"6\0"),
        exif_with(3, 2, b"\1\0\1\0"),  # two numbers
        exif_with(3, 1, b"\x63\0"),  # 99
        exif_with(7, 1, b"\6"),  # bytes
        exif_with(12, 1, b"\xff\xff\xff\xff"),  # a number that lies nowhere
        b"Exif\0\0garbage!",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_do_no_harm(kind, exif):
    image = flat((10, 200, 30), (48, 32))
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    got = prepared(encoded(image, kind, exif=exif, **options), size=(32, 48), crop="none")
    assert np.abs(got.astype(int) - (10, 200, 30)).max() < 3


def test_damaged_tags_beside_the_orientation_do_not_stop_the_turn():
    entries = struct.pack("<HHHI", 2, 0x112, 3, 1) + b"\6\0\0\0"
    entries += struct.pack("<HHI", 0x131, 250, 9) + b"\xff\xff\xff\x7f" + bytes(4)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries
    pixels = np.asarray(photo(24, 16))
    got = prepared(encoded(Image.fromarray(pixels), exif=exif), size=(24, 16), crop="none")
    assert np.array_equal(got, np.rot90(pixels, -1))


@pytest.mark.parametrize("place", ["chunks", "late"])
@pytest.mark.parametrize(
    "chunk",
    [
        {b"zTXt": b"workflow\0\0" + zlib.compress(b"x" * 2_000_000)},
        {b"iTXt": b"workflow\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)},
        {b"iCCP": b"profile\0\0" + zlib.compress(bytes(2_000_000))},
    ],
)
def test_pngs_may_carry_long_texts_and_profiles(place, chunk):
    rows = b"".join(b"\0" + bytes((10, 200, 30)) * 16 for _ in range(16))
    assert (prepared(png(16, 16, rows, **{place: chunk})) == (10, 200, 30)).all()


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_texts_and_profiles_that_unpack_to_very_much_are_bombs(name):
    """A file of 100 kB would take 100 MB of memory, whatever its size in pixels."""
    chunk = {name: b"key\0\0" + zlib.compress(bytes(100_000_000))}
    why = "decompression bomb: texts or a profile of more than 16 MiB"
    assert prepare_contents([png(1, 1, bytes(4), chunks=chunk)], Data(size=4))[1] == {0: why}


def test_a_picture_that_decoders_warn_of_is_refused_without_a_warning(tmp_path):
    (tmp_path / "x.tif").write_bytes(b"II*\0\x08\0\0\0")  # the directory is missing
    with pytest.raises(ValueError, match=r"x\.tif cannot be read as an image: not an image"):
        read_picture(tmp_path / "x.tif")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("is_light", [False, True])
def test_the_transparent_grey_of_a_png_counts_at_every_depth(bits, is_light):
    most = 2**bits - 1
    levels = np.array([0] * 8 + [most] * 8)
    packed = np.array([[int(b) for b in f"{level:0{bits}b}"] for level in levels], np.uint8)
    rows = (b"\0" + np.packbits(packed).tobytes()) * 16
    clear = struct.pack(">H", most if is_light else 0)
    content = png(16, 16, rows, bits, 0, {b"tRNS": clear})
    got = prepared(content, background="#646464")[0, :, 0].tolist()
    assert got == ([0] * 8 + [100] * 8 if is_light else [100] * 8 + [255] * 8)
    assert (prepared(content, channels=2)[0, :, 1] == 0).tolist() == [
        (level > 0) == is_light for level in levels
    ]


def test_the_transparent_colour_of_a_png_of_16_bits_counts():
    colours = [(30000, 500, 65535)] * 8 + [(500, 500, 500)] * 8
    rows = (b"\0" + b"".join(struct.pack(">3H", *colour) for colour in colours)) * 16
    content = png(16, 16, rows, 16, 2, {b"tRNS": struct.pack(">3H", *colours[0])})
    got = prepared(content, background="lime")
    assert (got[:, :8] == (0, 255, 0)).all() and (got[:, 8:] == 1).all()


def icc(name: str, gamma: float, space: bytes = b"RGB ") -> bytes:
    """A smallest ICC profile: sRGB's primaries, or grey, and a plain gamma."""

    def number(x: float) -> bytes:
        return struct.pack(">i", round(x * 65536))

    def point(*xyz: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, xyz))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, int(gamma * 256))
    text = struct.pack(">I", len(name) + 1) + name.encode() + bytes(79)
    tags = {b"desc": b"desc" + bytes(4) + text, b"wtpt": point(0.9642, 1, 0.8249)}
    tags[b"cprt"] = b"text\0\0\0\0none\0"
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rXYZ": point(0.4360, 0.2225, 0.0139), b"gXYZ": point(0.3851, 0.7169, 0.0971)}
        tags[b"bXYZ"] = point(0.1431, 0.0606, 0.7139)
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">I", start + len(body)) + b"lcms" + struct.pack(">I", 0x02400000)
    head += b"mntr" + space + b"XYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acspAPPL"
    head += bytes(24) + number(0.9642) + number(1) + number(0.8249) + b"lcms" + bytes(44)
    return head + table + body


def srgb_of_linear(level: int) -> float:
    """The 8-bit sRGB level of an 8-bit linear one, by the standard's formula."""
    x = level / 255
    return 255 * (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["GIMP built-in Linear sRGB", "sRGB-elle-V2-g10.icc", "linear"])
def test_a_linear_profile_is_linear_whatever_its_name(name):
    for level in (3, 55, 200):
        content = encoded(flat((level,) * 3), icc_profile=icc(name, 1.0))
        assert np.abs(prepared(content) - srgb_of_linear(level)).max() < 3


def test_profiles_of_16_bit_grey_are_applied():
    profile = icc("linear grey", 1.0, b"GRAY")
    for level in (55, 200):
        deep = Image.fromarray(np.full((16, 16), level * 257, np.uint16))
        for image in (flat(level, mode="L"), deep):
            for kind in ("PNG", "TIFF"):
                got = prepared(encoded(image, kind, icc_profile=profile), channels=1)
                assert np.abs(got - srgb_of_linear(level)).max() < 3


def retagged(tiff: bytes, **values: int) -> bytes:
    """A little-endian TIFF with other values of some tags, by their numbers: t262=0."""
    content = bytearray(tiff)
    start = struct.unpack_from("<I", content, 4)[0]
    for i in range(struct.unpack_from("<H", content, start)[0]):
        place = start + 2 + 12 * i
        if (value := values.get(f"t{struct.unpack_from('<H', content, place)[0]}")) is not None:
            struct.pack_into("<H", content, place + 8, value)
    return bytes(content)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiffs_in_which_white_is_zero_are_no_negatives(compression):
    ramp = np.tile(np.arange(16, dtype=np.uint16) * 4000, (16, 1))
    for values in (ramp, (ramp / 257).astype(np.uint8)):
        content = encoded(Image.fromarray(values), "TIFF", compression=compression)
        got = prepared(retagged(content, t262=0), channels=1)[0, :, 0]
        assert np.abs(got - (255 - ramp[0] / 257)).max() <= 1


def test_a_damaged_tiff_is_unreadable_without_a_line_of_its_librarys(capfd):
    content = bytearray(encoded(Image.new("L", (16, 16)), "TIFF", compression="tiff_lzw"))
    start = struct.unpack_from("<I", content, 4)[0]
    tags = [start + 2 + 12 * i for i in range(struct.unpack_from("<H", content, start)[0])]
    rows = next(place for place in tags if struct.unpack_from("<H", content, place)[0] == 278)
    struct.pack_into("<I", content, rows + 4, 2**28)  # how many numbers of rows per strip follow
    _, bad = prepare_contents(
        [bytes(content), encoded(Image.new("L", (16, 16)), "TIFF")], Data(size=16)
    )
    assert list(bad) == [0]
    os.write(2, b"the stream still works")
    assert capfd.readouterr() == ("", "the stream still works")


def test_grey_tiffs_of_an_unknown_range_are_unreadable_and_12_bits_are_scaled():
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.int32), (16, 1))
    narrow = encoded(Image.fromarray(ramp), "TIFF")  # of 32 bits, which may be of any range
    deep = encoded(Image.fromarray((ramp * 100).astype(np.uint16)), "TIFF")
    for content in (narrow, retagged(narrow, t258=32), with_tag(deep, 339, 2)):  # 339, 2: signed
        _, bad = prepare_contents([content], Data(size=16))
        assert "range of" in bad[0] and "unknown" in bad[0]
    levels = np.tile(np.linspace(0, 4095, 16).astype(np.uint16), (16, 1))
    bits = ((levels.reshape(-1, 1) >> np.arange(11, -1, -1)) & 1).astype(np.uint8)
    blank = encoded(Image.new("L", (16, 16)), "TIFF")
    content = retagged(blank, t258=12, t273=len(blank), t279=384) + np.packbits(bits).tobytes()
    got = prepared(content, channels=1)[0, :, 0]
    assert np.abs(got - levels[0] / 4095 * 255).max() <= 1


def with_tag(tiff: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with one more tag, a number of 16 bits."""
    start = struct.unpack_from("<I", tiff, 4)[0]
    count = struct.unpack_from("<H", tiff, start)[0]
    entries = [tiff[start + 2 + 12 * i :][:12] for i in range(count)]
    entries.append(struct.pack("<HHIHH", tag, 3, 1, value, 0))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
    table = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + table


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC: convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a video"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer.*pull"),
        (b"\xef\xbb\xbf\r\n<!DOCTYPE html>\n<html>", "a web page"),
        (b"<html><body>404", "a web page"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied', "an XML file"),
        (b"%PDF-1.7", "a PDF file"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"\xff\x0a\xfa", "JPEG XL"),
        (b"PK\3\4", "a zip archive"),
        (bytes(16), "zero bytes"),
    ],
)
def test_files_that_bear_an_images_name_say_what_they_are(tmp_path, head, kind):
    path = tmp_path / "IMG_1.jpg"
    path.write_bytes(head + (bytes(600) if head[:1] == b"\0" else b" rest" * 9))
    _, bad = prepare_contents([path, path.read_bytes()], Data(size=16))
    assert bad[0] == bad[1]
    assert re.match(f"not an image, but .*{kind}", bad[0])


def test_thin_images_are_cropped_before_they_are_enlarged():
    rows = np.random.default_rng(0).integers(0, 256, (4000, 1, 3), dtype=np.uint8)
    middle = np.ascontiguousarray(rows[1980:2020])
    for turn in (lambda a: a, lambda a: a.transpose(1, 0, 2)):
        long, short = (Image.fromarray(np.ascontiguousarray(turn(a))) for a in (rows, middle))
        got = np.asarray(center_crop(long, (256, 256))).astype(int)
        assert got.shape == (256, 256, 3)
        assert np.abs(got - np.asarray(center_crop(short, (256, 256)))).max() <= 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_memory_of_thin_images_follows_their_pixels():
    code = """
import re
from pathlib import Path
from PIL import Image
from maskdm.images.prepare import prepare_image
from maskdm.recipe import Data

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

prepare_image(Image.new("RGB", (64, 64)), Data(size=256))
before = peak()
prepare_image(Image.new("RGB", (1, 4000)), Data(size=256))
prepare_image(Image.new("RGB", (4000, 1)), Data(size=256))
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(result.stdout) < 100  # MiB; a gigabyte where the whole was enlarged first


SVG = """<?xml version="1.0"?><!-- drawn by hand -->
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 4">
<rect width="4" height="4" fill="#c00000"/>%s</svg>"""


def test_svg_is_drawn_where_its_renderer_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    folder = tmp_path / "drawings"
    folder.mkdir()
    (folder / "a.svg").write_text(SVG % "")
    (folder / "b.SVG").write_bytes(b"\xef\xbb\xbf" + (SVG % "").encode())
    store = open_store(Data(source=str(folder), size=(4, 8)))
    assert len(store) == 2
    expected = np.full((4, 8, 3), 255, dtype=np.uint8)
    expected[:, :4] = (0xC0, 0, 0)
    assert (np.asarray(store.images) == expected).all()
    _, bad = prepare_contents([(SVG % "<rect")[:-8].encode()], Data(size=16))
    assert bad[0].startswith("damaged SVG")
    monkeypatch.setattr("maskdm.images.decode.HAS_SVG", False)
    _, bad = prepare_contents([(SVG % "").encode()], Data(size=16))
    assert re.match("not an image, but vector graphics .*: render it to PNG", bad[0])


@pytest.mark.parametrize(
    "shown",
    [
        '<image href="FILE" width="8" height="4"/>',
        '<image id="a>b" href="FILE" width="8" height="4"/>',
        '<s:image xmlns:s="http://www.w3.org/2000/svg" href="FILE" width="8" height="4"/>',
        '<image xmlns:x="http://www.w3.org/1999/xlink" x:href=" FILE" width="8" height="4"/>',
        '<filter id="f"><feImage href="FILE"/></filter><rect width="8" filter="url(#f)"/>',
        '<image width="8" height="4" href="data:image/svg+xml,%3Csvg%3E"/>',
    ],
)
def test_an_svg_shows_no_other_file(tmp_path, shown):
    """Else a visitor of the web page would see pictures of this machine."""
    pytest.importorskip("resvg_py")
    Image.new("RGB", (8, 4), "blue").save(tmp_path / "mine.png")
    content = (SVG % shown.replace("FILE", str(tmp_path / "mine.png"))).encode()
    _, bad = prepare_contents([content], Data(size=16))
    assert bad[0].startswith("SVG that shows another file")
    link = '<a href="https://example.org"><rect x="4" width="4" height="4"/></a>'
    assert not prepare_contents([(SVG % link).encode()], Data(size=16))[1]


def test_a_jpeg_of_any_size_is_read_where_it_is_reduced(monkeypatch):
    """Pillow refuses to open what has more than twice its own limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    monkeypatch.setattr("maskdm.images.decode.MAX_PIXELS", 64 * 64)
    content = encoded(photo(256, 256), "JPEG")
    assert not prepare_contents([content], Data(size=16))[1]
    _, bad = prepare_contents([content, encoded(photo(256, 256), "PNG")], Data(size=128))
    assert bad == dict.fromkeys((0, 1), "decompression bomb: 256x256 pixels")
    assert Image.MAX_IMAGE_PIXELS == 64 * 64


def test_heic_is_read_where_its_reader_is_installed():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    pixels = np.asarray(photo(64, 48))
    content = encoded(Image.fromarray(pixels), "HEIF", quality=-1)
    got = prepared(content, size=(48, 64), crop="none")
    assert np.abs(got.astype(int) - pixels).mean() < 10
