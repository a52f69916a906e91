"""Building a store: every image decoded, prepared and written once, or nothing left behind."""

from __future__ import annotations

import contextlib
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
from filelock import FileLock, Timeout
from tqdm import tqdm

import maskdm
from maskdm.files import whole_folder, write_text, write_whole
from maskdm.images.known import crop_of
from maskdm.images.labels import Group, are_partly_labelled, number_groups
from maskdm.images.prepare import prepare_contents
from maskdm.images.source import Source, part_of
from maskdm.images.unreadable import refuse_unreadable
from maskdm.images.workers import map_chunks
from maskdm.recipe import Data
from maskdm.words import size_text

HOST = socket.gethostname().replace("@", "-")
ABANDONED_SEC = 3600  # without a change, for a build of another machine
FORMAT = 4  # part of a store's name: raise it when the same settings would give other bytes


def store_key(source: Source, data: Data, part: tuple[int, int] | None = None) -> str:
    """Names a store, or part i of n of one, by all that determines its bytes."""
    how = [list(data.shape), crop_of(data), data.background, data.draft]
    parts = [FORMAT, source.fingerprint, *how, part]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def build_store(
    source: Source, data: Data, folder: Path, progress: bool, part: tuple[int, int] | None = None
) -> None:
    """Builds a store, or part i of n of one, at `folder`, unless it exists.

    It is built beside its place and renamed into it, so it is complete or does not exist. Where
    several processes need the same store, one builds it and the others wait.

    Raises ValueError for unreadable images (by `on_bad`) and where the disk has no room.
    """
    if (folder / "manifest.json").is_file():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError
    except OSError:
        raise ValueError(
            f"cannot write an image store into {folder.parent}: choose another folder (for "
            "training with the environment variable MASKDM_CACHE)"
        ) from None
    with _only_builder(folder):
        if (folder / "manifest.json").is_file():  # another process has built it
            return
        _remove_abandoned(folder.parent)
        building = folder.with_name(f"building-{os.getpid()}@{HOST}@{folder.name}")
        # Without locks another machine may be faster: its store may be in use, and stays.
        with whole_folder(folder, building, replace=False):
            manifest = _write_images(source, data, building, progress, part)
            write_text(building / "manifest.json", json.dumps(manifest, indent=1))


def _remove_abandoned(parent: Path) -> None:
    """Removes what killed builds left: by dead processes of this machine, or untouched for long."""
    for path in itertools.islice(parent.glob("building-*@*@*"), 100):
        pid, host, _ = path.name.removeprefix("building-").split("@", 2)
        try:
            changed = max(file.stat().st_mtime for file in [path, *path.iterdir()])
        except OSError:  # its process has just finished it
            continue
        is_dead = host == HOST and pid.isdigit() and not psutil.pid_exists(int(pid))
        if is_dead or time.time() - changed > ABANDONED_SEC:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Waits until no other process builds this store; a dead process holds no lock.

    The lock only saves work: builds write into folders of their own.
    """
    path = folder.with_name(f".{folder.name}.lock")
    # A soft lock is a file, which a killed process would leave behind.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is packing {folder}: waiting for it", file=sys.stderr)
            lock.acquire()
    except OSError:
        warnings.warn(
            f"{folder.parent} does not support locks: build only one store there", stacklevel=4
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows: `release` removes it
            path.unlink()
        lock.release()


def _write_images(
    source: Source, data: Data, building: Path, progress: bool, part: tuple[int, int] | None
) -> dict[str, Any]:
    """Writes images.bin and labels.npy; returns the manifest."""
    image_bytes, span, is_whole = math.prod(data.shape), part or (0, 1), part is None
    total = source.num_images
    expected = None if total is None else len(part_of(range(total), span))
    if problem := missing_room((expected or 0) * image_bytes, building.parent):
        raise ValueError(problem)
    num_seen, unreadable, digest = 0, list[tuple[str, str]](), hashlib.sha256()
    groups, of_image = dict[Group, int](), list[int]()  # number of each group, group of each image
    prepare = functools.partial(prepare_contents, data=data)
    hidden = None if progress else True  # None: hidden unless in a terminal
    with (
        (building / "images.bin").open("wb") as file,
        tqdm(None, f"packing {data.source}", expected, disable=hidden, unit="img") as bar,
        contextlib.closing(map_chunks(prepare, source.items(span), image_bytes)) as chunks,
    ):
        for items, (images, bad) in chunks:
            file.write(images.data)
            digest.update(images.data)
            num_seen += len(items)
            for i, item in enumerate(items):
                group = groups.setdefault((posixpath.dirname(item.name), item.label), len(groups))
                if i in bad:
                    unreadable.append((item.name, bad[i]))
                else:
                    of_image.append(group)
            if is_whole and (expected is not None or data.on_bad == "error"):
                refuse_unreadable(data, unreadable, expected or num_seen, is_final=False)
            bar.update(len(items))
    if is_whole:  # a part says nothing about the share of all images
        if not num_seen:
            raise ValueError(f"{data.source} has no images")
        refuse_unreadable(data, unreadable, num_seen)
    return {
        "format": FORMAT,
        "source": data.source,
        "kind": source.kind,
        "fingerprint": source.fingerprint,
        "shape": [len(of_image), *data.shape],
        "crop": crop_of(data),
        "background": data.background,
        "draft": data.draft,
        **_write_labels(building, list(groups), np.array(of_image, np.int64), source, is_whole),
        "num_seen": num_seen,
        "left_out": unreadable,
        "on_bad": data.on_bad,
        "notes": source.notes,
        "passed_over": dict(sorted(source.skipped.items())),
        "sha256": digest.hexdigest(),
        "maskdm": maskdm.__version__,
        "pillow": PIL.__version__,
        "key": store_key(source, data, part),
    }  # keys keep their names: stores and parts of earlier versions have them


def _write_labels(
    building: Path, groups: list[Group], of_image: np.ndarray, source: Source, is_whole: bool
) -> dict[str, Any]:
    """Writes labels.npy where there are classes; returns the manifest's entries about them.

    The classes of a part cannot be numbered before all parts exist: its labels are the numbers of
    its groups, which `store.load_store` turns into classes.
    """
    labels: np.ndarray | None = of_image
    entries: dict[str, Any] = {"groups": groups, "class_names": source.class_names}
    if is_whole:
        labels, class_names = number_groups(groups, of_image, source.class_names)
        entries = {"class_names": class_names, "partly_labelled": are_partly_labelled(groups)}
    if labels is not None:
        write_whole(building / "labels.npy", lambda file: np.save(file, labels))
    return entries


def missing_room(num_bytes: int, folder: Path) -> str | None:
    """What to do where a store of that size does not fit on a folder's disk; None where it does."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes <= free:
        return None
    return (
        f"the image store needs {size_text(num_bytes)}, but {folder} has {size_text(free)} free: "
        "free some space, or choose another folder with the environment variable MASKDM_CACHE"
    )
