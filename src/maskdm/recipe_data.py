"""The settings of a run's images; part of the recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from maskdm.choices import helped
from maskdm.families import CROPS, CropName
from maskdm.settings import Settings

MAX_SIDE = 8192  # of images, in pixels: their decoders read up to 89 million


class Data(Settings):
    """Where the images come from and how they are prepared."""

    source: str = "digits"
    """A folder, zip, tar, .npz or .npy of images, a packed store, WebDataset shards (a pattern or
    URLs), hf:OWNER/NAME[:SPLIT], faces (drawn by code; faces:N:SEED@SIDE), or a known set: digits,
    celeba, celebahq, ffhq, afhq, vggface2. Class folders give labels."""
    size: int | tuple[int, int] = 8
    """Side of the square images, in pixels; or their height and width."""
    channels: Literal[1, 2, 3, 4] = 3
    """1 = grey, 2 = grey and alpha, 3 = RGB, 4 = RGBA; every image is converted."""
    crop: CropName = Field("auto", description=helped("How images come to that size.", CROPS))
    background: str = "white"
    """Colour behind transparent images, a name or #rrggbb (channels 1 and 3)."""
    draft: bool = True
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size, but at least at twice data.size: up to
    twice as fast, pixels differ by a level or so."""
    flip: bool = False
    """Mirror each image left-right with probability 1/2."""
    on_bad: Literal["auto", "error", "skip"] = "auto"
    """Unreadable images. skip: skip and list them; error: stop at the first; auto: skip up to
    1 %, stop at more."""
    resident: Literal["auto", "on", "off"] = "auto"
    """Keep all images in the device's memory; auto: on a GPU, if they fill at most a quarter."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Part of the images to train on, drawn by subset_seed (evaluation uses all)."""
    limit: int | None = Field(None, gt=0)
    """Largest number of images to train on; None = no limit."""
    held_out: int | float = Field(0, ge=0)
    """Images held out from training, to measure the denoising loss and to check for memorisation:
    a number, or below 1 a part of all; drawn by subset_seed."""
    subset_seed: int = Field(0, ge=0)
    """Seed of the draw of fraction, limit and held_out; the run's seed does not change it."""

    @field_validator("source")
    @classmethod
    def _named(cls, source: str) -> str:
        if not source.strip():  # an unset variable of the shell, not the current folder
            raise ValueError("the name is empty: use a folder, an archive or a known set")
        return source

    @field_validator("size", mode="before")
    @classmethod
    def _height_and_width(cls, size: object) -> object:
        sides: list[Any] = list(size) if isinstance(size, (list, tuple)) else [size]
        if not 1 <= len(sides) <= 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"expected pixels above 0, or height and width, not {size!r}")
        if max(sides) > MAX_SIDE:
            raise ValueError(f"{max(sides):,} pixels are more than {MAX_SIDE:,}, the largest side")
        return sides[0] if len(set(sides)) == 1 else tuple(sides)

    @field_validator("held_out")
    @classmethod
    def _number_or_part(cls, held_out: int | float) -> int | float:
        if held_out >= 1 and held_out != int(held_out):
            raise ValueError(f"expected a number of images or a part below 1, not {held_out:g}")
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
