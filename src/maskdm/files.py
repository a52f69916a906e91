"""Paths as a user gives them; JSON; files and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

MOST_OPEN_FILES = 65_536  # that a process asks for


def expanded(name: str | Path) -> Path:
    """A path with the home folder for a leading `~`. Raises ValueError where it is unknown."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{name}: the home folder is unknown; set HOME, or write the path without ~"
        ) from None


def parsed_json(text: str | bytes) -> Any:
    """What a text of JSON holds. Raises ValueError where it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:  # a damaged or hostile file
        raise ValueError("it is nested too deeply") from None


def refuse_unwritable(path: Path, flag: str, is_folder: bool = False) -> None:
    """Raises ValueError where a file or folder cannot be written; folders above it may be missing.

    Args:
        path: of the file or folder.
        flag: that names another place, for the message.
        is_folder: whether it is to be a folder.
    """
    there = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    if (is_folder or there != path) and not there.is_dir():
        raise ValueError(f"{path} cannot be written: {there} is not a folder; name another {flag}")
    # A file is written beside its place and renamed into it.
    for place in [there] if there.is_dir() else [there, there.absolute().parent]:
        if not os.access(place, os.W_OK):
            raise ValueError(f"{path} cannot be written: {place} is read-only; name another {flag}")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside its place, flushes it to the disk, and renames it into place.

    A kill leaves the old file or the new one, and at most a `.writing-PID` beside it; an error, a
    full disk say, leaves the old one alone.

    Args:
        path: of the file; its folder is made if it does not exist.
        write: writes the content into the open file.

    Raises:
        ValueError: the folder cannot be made.
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


@contextlib.contextmanager
def whole_folder(folder: Path, writing: Path | None = None, replace: bool = True) -> Iterator[Path]:
    """Gives a new folder to write into, and renames it into place when the block ends.

    A kill leaves the old folder or the new one, and at most a `writing-NAME` or `removing-NAME`
    beside it; an error leaves the old one alone.

    Args:
        folder: its place.
        writing: the folder to write into, beside it; None = `writing-NAME`.
        replace: whether a folder with content gives way; else it stays, and the new one is removed.

    Raises:
        OSError: the disk refused (full, say).
    """
    writing = writing or folder.with_name(f"writing-{folder.name}")
    removing = folder.with_name(f"removing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        _give_usual_mode(writing)
        for path in [*writing.rglob("*"), writing]:
            _sync(path)  # the rename must not overtake the content
        shutil.rmtree(removing, ignore_errors=True)
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()  # Windows would not rename onto it
        elif folder.exists() and replace:
            folder.rename(removing)
        try:
            writing.rename(folder)
        except OSError:
            if removing.exists():
                removing.rename(folder)  # the old one comes back
            if replace or not (folder.is_dir() and any(folder.iterdir())):
                raise  # else another process was faster
        _sync(folder.parent)
    except SafetensorError as error:  # it wraps the system's error in one of its own
        code = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(code, os.strerror(code), str(writing)) from error
    finally:
        for path in (writing, removing):
            shutil.rmtree(path, ignore_errors=True)


def _give_usual_mode(folder: Path) -> None:
    """Gives files the mode of any new file: safetensors makes its own readable by their owner."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _sync(path: Path) -> None:
    """Waits until the content of a file or folder is on the disk."""
    if os.name == "nt":  # there folders cannot be opened, nor files flushed that are read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allow_open_files() -> None:
    """Lets this process open as many files as it may: a memory-mapped one counts, too."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MOST_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
