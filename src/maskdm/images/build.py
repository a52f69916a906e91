"""Building a store: every image decoded, prepared and written once, or nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import posixpath
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import psutil
from tqdm import tqdm

import maskdm
from maskdm.images.known import crop_of
from maskdm.images.labels import Label, number_labels
from maskdm.images.prepare import prepare_contents
from maskdm.images.problems import refuse_bad, size_text
from maskdm.images.source import Source, piece
from maskdm.images.workers import map_chunks
from maskdm.recipe import Data

Seen = tuple[str, Label]
"""An image's folder and label, as its source tells."""
ABANDONED_SEC = 3600  # without a change, for a build of another machine
FORMAT = 4  # goes into a store's name: raise it when the same settings would give other bytes


def build_store(
    source: Source,
    data: Data,
    folder: Path,
    progress: bool,
    part: tuple[int, int] = (0, 1),
    key: str = "",
) -> None:
    """Builds a store at `folder`, unless it is there.

    It is built beside its place and renamed into it, so it is whole or not there. Of several
    processes that want the same store one builds it and the others wait.

    Raises ValueError for unreadable images (by `on_bad`) and where the disk has no room.
    """
    if (folder / "manifest.json").is_file():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(
            f"cannot write an image store into {folder.parent}: name another place (for training "
            "with the environment variable MASKDM_CACHE)"
        )
    with _only_builder(folder):
        if (folder / "manifest.json").is_file():  # another process has built it
            return
        _remove_abandoned(folder.parent)
        building = folder.with_name(f"building-{os.getpid()}@{_host()}@{folder.name}")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            manifest = _write_images(source, data, building, progress, part)
            manifest["key"] = key
            _write(building / "manifest.json", json.dumps(manifest, indent=1).encode())
            try:
                building.rename(folder)
            except OSError:  # where locks don't reach, another machine may have been faster
                if not (folder / "manifest.json").is_file():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _host() -> str:
    return socket.gethostname().replace("@", "-")


def _remove_abandoned(parent: Path) -> None:
    """Removes what killed builds left: of dead processes of this machine, or untouched for long."""
    for path in itertools.islice(parent.glob("building-*@*@*"), 100):
        pid, host, _ = path.name.removeprefix("building-").split("@", 2)
        try:
            changed = max(file.stat().st_mtime for file in [path, *path.iterdir()])
        except OSError:  # its process has just finished it
            continue
        is_dead = host == _host() and pid.isdigit() and not psutil.pid_exists(int(pid))
        if is_dead or time.time() - changed > ABANDONED_SEC:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Waits until no other process builds this store; the system releases the lock of a dead one.

    It saves work, no more: without locks, or where they don't reach, builds don't meet.
    """
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is packing {folder}: waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            warnings.warn(f"{folder.parent} has no locks: build only one store there", stacklevel=4)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _write_images(
    source: Source, data: Data, building: Path, progress: bool, part: tuple[int, int]
) -> dict[str, Any]:
    """Writes images.bin and labels.npy; gives the manifest."""
    image_bytes, whole, expected = math.prod(data.shape), part == (0, 1), None
    if source.num_images is not None:
        expected = len(piece(range(source.num_images), part))
    _refuse_full_disk(building, expected, image_bytes)
    seen, kept, left_out = list[Seen](), list[int](), list[tuple[str, str]]()
    digest = hashlib.sha256()
    prepare = functools.partial(prepare_contents, data=data)
    hidden = None if progress else True  # None: hidden where no terminal shows it
    with (
        (building / "images.bin").open("wb") as file,
        tqdm(desc=f"packing {data.source}", total=expected, disable=hidden, unit="img") as bar,
        contextlib.closing(map_chunks(prepare, source.items(part), image_bytes)) as chunks,
    ):
        for items, (images, bad) in chunks:
            file.write(images.data)
            digest.update(images.data)
            left_out += [(items[place].name, why) for place, why in bad.items()]
            kept += [len(seen) + place for place in range(len(items)) if place not in bad]
            seen += [(posixpath.dirname(item.name), item.label) for item in items]
            if whole and (expected is not None or data.on_bad == "error"):
                refuse_bad(data.source, left_out, expected or len(seen), data.on_bad, sure=False)
            bar.update(len(items))
        file.flush()
        os.fsync(file.fileno())  # the rename that follows must not overtake the content
    if whole:  # of a part the share of bad images says nothing
        if not seen:
            raise ValueError(f"{data.source} has no images")
        refuse_bad(data.source, left_out, len(seen), data.on_bad)
    classes = _write_labels(building, seen, kept, source.class_names, not whole)
    return {
        "format": FORMAT,
        "source": data.source,
        "kind": source.kind,
        "fingerprint": source.fingerprint,
        "shape": [len(kept), *data.shape],
        "crop": crop_of(data),
        "background": data.background,
        "draft": data.draft,
        **classes,
        "num_seen": len(seen),
        "left_out": left_out,
        "notes": source.notes,
        "passed_over": dict(sorted(source.passed_over.items())),
        "sha256": digest.hexdigest(),
        "maskdm": maskdm.__version__,
        "pillow": PIL.__version__,
    }


def _write_labels(
    building: Path, seen: list[Seen], kept: list[int], class_names: list[str] | None, is_part: bool
) -> dict[str, Any]:
    """Writes labels.npy where there are classes; gives what the manifest says of them.

    A part of a store can't number its classes: it numbers its groups of images that share folder
    and label, for `number_groups` to do that when all parts are there.
    """
    groups = {group: i for i, group in enumerate(dict.fromkeys(seen))}
    of_group = np.array([groups[seen[i]] for i in kept], dtype=np.int64)
    if is_part:
        told: dict[str, Any] = {"groups": list(groups), "class_names": class_names}
        labels: np.ndarray | None = of_group
    else:
        labels, class_names = number_groups(list(groups), of_group, class_names)
        told = {"class_names": class_names}
    if labels is not None:
        with (building / "labels.npy").open("wb") as file:
            np.save(file, labels)
            file.flush()
            os.fsync(file.fileno())
    return told


def number_groups(
    groups: list[Seen], of_group: np.ndarray, class_names: list[str] | None
) -> tuple[np.ndarray | None, list[str]]:
    """Class numbers of images from the folder and label that groups of them share.

    Args:
        groups: folder and label of each.
        of_group: each image's group, int64 (N,).
        class_names: names of the numbers, where the source knows them.

    Returns what `number_labels` returns.
    """
    names = [f"{folder}/x" if folder else "x" for folder, _ in groups]
    numbers, class_names = number_labels(names, [label for _, label in groups], class_names)
    return None if numbers is None else numbers[of_group], class_names


def _refuse_full_disk(folder: Path, num_images: int | None, image_bytes: int) -> None:
    """Raises ValueError where the images, as far as is known, will not fit on the disk."""
    needed, free = (num_images or 0) * image_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the image store needs {size_text(needed)}, but {folder.parent} has "
            f"{size_text(free)} free: make room, or name another place with the environment "
            "variable MASKDM_CACHE"
        )


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
