"""Writes pictures as a video: .gif by Pillow, .mp4 by PyAV."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from maskdm.files import refuse_unwritable, write_whole

FRAMES_PER_SEC = 12
LAST_SEC = 1.5  # how long a finished picture stays
QUALITY = "16"  # x264's constant rate factor: 0 = without loss, 23 = its default


def refuse_video(path: Path, flag: str) -> None:
    """Raises ValueError where `save_video` cannot or should not write to a path."""
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"{flag} {path}: end it in {' or '.join(WRITERS)}")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: use the name of a file")
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("av") is None:
        raise ValueError(f"{flag} {path}: .mp4 needs PyAV: pip install av, or end it in .gif")
    refuse_unwritable(path, flag)


def save_video(frames: Sequence[Image.Image], path: Path, hold: bool) -> None:
    """Writes a video of 12 frames a second; a .gif repeats endlessly.

    Args:
        frames: pictures of one size, mode L or RGB, at least one.
        path: ends in .gif or .mp4; its folder is made if it does not exist.
        hold: whether the last frame stays for a while.

    Raises OSError where the disk refuses.
    """
    last = round(LAST_SEC * FRAMES_PER_SEC) if hold else 1  # in frames
    write = WRITERS[path.suffix.lower()]
    write_whole(path, lambda file: write(file, frames, last))


def _write_gif(file: BinaryIO, frames: Sequence[Image.Image], last: int) -> None:
    times = [1000 // FRAMES_PER_SEC] * (len(frames) - 1) + [1000 * last // FRAMES_PER_SEC]
    options: dict[str, Any] = {"append_images": frames[1:], "duration": times, "loop": 0}
    frames[0].save(file, "GIF", save_all=True, **options)


def _write_mp4(file: BinaryIO, frames: Sequence[Image.Image], last: int) -> None:
    import av

    width, height = frames[0].size
    more = ((0, height % 2), (0, width % 2), (0, 0))  # H.264 halves the colours' resolution
    how = {"width": width + width % 2, "height": height + height % 2, "pix_fmt": "yuv420p"}
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": QUALITY}
        stream = container.add_stream("libx264", rate=FRAMES_PER_SEC, options=options, **how)
        for frame in [*frames, *[frames[-1]] * (last - 1)]:
            pixels = np.pad(np.asarray(frame.convert("RGB")), more, mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())


WRITERS = {".gif": _write_gif, ".mp4": _write_mp4}
