"""What people are told of images: what is wrong, when it is too much, how large they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

TOLERATED = 0.01  # share of unreadable images that `auto` leaves out without a word of refusal
NUM_SHOWN = 5


def refuse_bad(
    source: str, bad: Sequence[Sequence[str]], num_images: int, on_bad: str, sure: bool = True
) -> None:
    """Raises ValueError where the unreadable images are more than `on_bad` allows.

    Args:
        source: as the user named it.
        bad: (name, reason) of each.
        num_images: of all, bad ones included, as far as is known.
        on_bad: `error` allows none, `auto` 1 %, `skip` any number but all.
        sure: whether all images were seen; else only what can't change any more is refused.
    """
    if not bad:
        return
    if sure and len(bad) == num_images:
        raise ValueError(f"{source}: none of its {num_images:,} images can be read: {listed(bad)}")
    allowed = {"error": 0, "auto": int(TOLERATED * num_images), "skip": num_images}[on_bad]
    if len(bad) > allowed:
        num = f"{'' if sure else 'at least '}{len(bad):,} of {num_images:,}"
        raise ValueError(
            f"{source}: {num} images cannot be read: {listed(bad)}. Mend or remove them (maskdm "
            "check lists all), or leave them out with --data.on-bad skip (of check and pack: "
            "--on-bad skip)"
        )


def listed(bad: Sequence[Sequence[str]], most: int = NUM_SHOWN) -> str:
    """The first few unreadable images with their reasons, and how many more there are."""
    shown = [f"{printable(name)} ({why})" for name, why in bad[:most]]
    more = [f"and {len(bad) - most:,} more"] if len(bad) > most else []
    return ", ".join(shown + more)


def printable(name: str) -> str:
    """A file's name for a terminal: bytes that are no UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def size_text(num_bytes: float) -> str:
    """`12.3 MB`."""
    power = min(4, int(math.log10(max(1, num_bytes))) // 3)
    return f"{num_bytes / 1000**power:.3g} {['bytes', 'kB', 'MB', 'GB', 'TB'][power]}"
