"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside its place, flushes it to the disk, and renames it into place.

    A kill leaves the old file or the new one, and at most a `.writing-PID` beside it; an error, a
    full disk say, leaves the old one alone.

    Args:
        path: of the file; its folder is made if it isn't there.
        write: writes the content into the open file.

    Raises:
        ValueError: the folder can't be made.
        OSError: the disk refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    writing = path.with_name(f"{path.name}.writing-{os.getpid()}")
    try:
        with writing.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, path)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8, as `write_whole` does."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))
