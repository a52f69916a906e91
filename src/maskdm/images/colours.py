"""Colours: from an image of any mode to 8 bits in sRGB."""

from __future__ import annotations

import contextlib
import functools
import io

import numpy as np
from PIL import Image, ImageCms

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
SRGB_LEVELS = 8  # by which colours in a profile named sRGB may differ from it


def convert(image: Image.Image, channels: int, background: str) -> Image.Image:
    """Converts an image of any mode to 1, 2, 3 or 4 channels of 8 bits in sRGB.

    16-bit grey is scaled; colour profiles are applied; transparent images are composited over
    `background` where the result has no alpha.

    Raises ValueError for 32-bit and float images, whose range is unknown.
    """
    image = eight_bits(image)
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


def eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey, which Pillow's own conversion cuts at 255; other images stay.

    The transparent colour becomes an alpha channel; the colour profile is kept.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"the range of images of mode {image.mode} (32 bits) is unknown")
    levels = (values.astype(np.uint32) + 128) // 257  # the nearest level
    grey = Image.fromarray(levels.astype(np.uint8))
    if "transparency" in image.info:
        visible = values != image.info["transparency"]
        grey.putalpha(Image.fromarray(visible.astype(np.uint8) * 255))
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


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
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
    if mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
        # The name alone does not show it: "GIMP built-in Linear sRGB" is linear.
        greys = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(-1, 3)
        primaries = [greys * one for one in np.eye(3, dtype=np.uint8)]
        colours = np.concatenate([greys, *primaries])
        result = np.asarray(transform.apply(Image.fromarray(colours[None])))
        if np.abs(result.astype(int) - colours).max() <= SRGB_LEVELS:
            return None
    return transform
