"""Unreadable images: how many of them a source may have."""

from __future__ import annotations

from collections.abc import Sequence

from maskdm.recipe import Data
from maskdm.words import NUM_LISTED, listed

TOLERATED = 0.01  # share of unreadable images that `auto` skips


def most_unreadable(num_images: int, on_bad: str) -> int:
    """How many images may be unreadable: `error` none, `auto` 1 %, `skip` any number."""
    return {"error": 0, "auto": int(TOLERATED * num_images), "skip": num_images}[on_bad]


def refuse_unreadable(
    data: Data, unreadable: Sequence[Sequence[str]], num_images: int, is_final: bool = True
) -> None:
    """Raises ValueError where all images are unreadable, or more than `on_bad` allows.

    Args:
        data: source and on_bad.
        unreadable: (name, reason) of each.
        num_images: of all images, unreadable ones included, as far as is known.
        is_final: whether all images were read; else only what is certain already is refused.
    """
    num, images = len(unreadable), listed_unreadable(unreadable)
    if num and is_final and num == num_images:
        raise ValueError(f"{data.source}: none of its {num:,} images can be read: {images}")
    if num > most_unreadable(num_images, data.on_bad):
        raise ValueError(
            f"{data.source}: {'' if is_final else 'at least '}{num:,} of {num_images:,} images "
            f"cannot be read: {images}. Fix or remove them (maskdm check lists all), or skip them "
            "with --data.on-bad skip (check and pack: --on-bad skip)"
        )


def listed_unreadable(unreadable: Sequence[Sequence[str]], most: int = NUM_LISTED) -> str:
    """The first few unreadable images with their reasons: `a.png (empty file) and 3 more`."""
    return listed([f"{name} ({why})" for name, why in unreadable], most)
