"""The settings of a run's images; part of the recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from maskdm.settings import Settings


class Data(Settings):
    """Where the images come from and how they are prepared."""

    source: str = "digits"
    """A folder, zip, tar, .npz or .npy of images, a packed store, WebDataset shards (a pattern or
    URLs), hf:OWNER/NAME[:SPLIT], or a known set's name: digits, celeba, celebahq, ffhq, afhq,
    vggface2. Class folders give labels."""
    size: int | tuple[int, int] = 8
    """Side of the square images, in pixels; or their height and width."""
    channels: Literal[1, 2, 3, 4] = 3
    """1 = grey, 2 = grey and alpha, 3 = RGB, 4 = RGBA; every image is converted."""
    crop: Literal["auto", "center", "resize", "celeba", "celeba140", "none"] = "auto"
    """auto: the known set's own, else center; center: resize to cover, cut the middle; resize:
    squeeze the whole image; celeba, celeba140: squares of 128 or 140 pixels of CelebA's aligned
    images; none: already that size."""
    background: str = "white"
    """Colour under transparent images, a name or #rrggbb (channels 1 and 3)."""
    draft: bool = True
    """Decode large JPEGs at a half to an eighth of their size while twice the size asked for is
    left: up to twice as fast, pixels differ by a level or so."""
    flip: bool = False
    """Mirror each image left-right with probability 1/2."""
    on_bad: Literal["auto", "error", "skip"] = "auto"
    """What unreadable images do. skip: they are left out and listed; error: the first one stops
    the run; auto: skip, but stop where they are more than 1 %."""
    resident: Literal["auto", "on", "off"] = "auto"
    """Keep all images in the device's memory; auto: on a GPU, where they fill at most a quarter."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Part of the images that is trained on, drawn by subset_seed (evaluation uses all)."""
    limit: int | None = Field(None, gt=0)
    """At most so many of them; None = no limit."""
    held_out: int | float = Field(0, ge=0)
    """Images kept out of training, to measure the denoising loss on and to check for
    memorisation: so many, or below 1 that part of all; drawn by subset_seed."""
    subset_seed: int = Field(0, ge=0)
    """Names the draw of fraction, limit and held_out: the same images on every machine, for any
    seed."""

    @field_validator("size", mode="before")
    @classmethod
    def _height_and_width(cls, size: object) -> object:
        sides = list(size) if isinstance(size, (list, tuple)) else [size]
        if not 1 <= len(sides) <= 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"a number of pixels above 0, or height and width, not {size!r}")
        return sides[0] if len(set(sides)) == 1 else tuple(sides)

    @field_validator("held_out")
    @classmethod
    def _number_or_part(cls, held_out: int | float) -> int | float:
        if held_out >= 1 and held_out != int(held_out):
            raise ValueError(f"a number of images, or a part of them below 1, not {held_out:g}")
        return int(held_out) if held_out >= 1 or held_out == 0 else held_out

    @field_validator("background")
    @classmethod
    def _known_colour(cls, name: str) -> str:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(name)
        except ValueError:
            raise ValueError(f"unknown colour {name!r}: a name such as black, or #rrggbb") from None
        return name

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the prepared images."""
        height, width = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return height, width, self.channels
