from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from maskdm.images.prepare import center_crop, convert, open_image, prepare_contents, prepare_image
from maskdm.recipe import Data

MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I I;16".split()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(value: object, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, value)


def prepared(content: bytes, **data: object) -> np.ndarray:
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    pixels = np.asarray(photo(24, 16))
    turns = {  # what a viewer does, by the EXIF standard
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = turns[orientation](pixels)
    got = prepared(encoded(Image.fromarray(pixels), exif=exif), size=upright.shape[:2], crop="none")
    assert np.array_equal(got, upright)


def test_the_first_frame_of_an_animation_is_used():
    frames = [flat(value, mode="L") for value in (10, 200, 90)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (prepared(content) == 10).all(), kind


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        whole = name + body
        return struct.pack(">I", len(body)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


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
