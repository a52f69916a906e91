"""A packed store of prepared uint8 images: built once, memory-mapped ever after.

A store is a folder: `images.bin` (uint8 N, H, W, C), `labels.npy` where there are classes,
`manifest.json`. Training builds its stores in the cache, named by a hash of all that determines
their bytes; `maskdm pack` builds them anywhere, as a whole or in parts.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.files import expanded, parsed_json
from maskdm.images.build import FORMAT, build_store, store_key
from maskdm.images.joined import Array, JoinedArrays
from maskdm.images.labels import Group, are_partly_labelled, number_groups, split_note
from maskdm.images.open import open_source
from maskdm.images.unreadable import refuse_unreadable
from maskdm.recipe import Data
from maskdm.words import listed, printable

MAX_PARTS = 99_999
PART = re.compile(r"part-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Store:
    """Prepared images, read by index.

    The manifest holds source, kind, fingerprint, crop and other settings, shape, class names;
    `left_out`: names of the unreadable images with the reasons; `passed_over`: numbers of files
    that are not images, by suffix; the SHA-256 of images.bin.
    """

    images: Array = field(repr=False)  # uint8 (N, H, W, C), memory-mapped; changes stay in memory
    labels: np.ndarray | None = field(repr=False)  # int64 (N,)
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    def labels_sha256(self) -> str:
        """SHA-256 of the class numbers, hexadecimal. The store must have classes."""
        assert self.labels is not None
        return hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()


def cache_dir() -> Path:
    """The folder of the stores: $MASKDM_CACHE, or maskdm in $XDG_CACHE_HOME or ~/.cache.

    For a user without a home folder (a container's, say) it is in the folder of temporary files.
    """
    if own := os.environ.get("MASKDM_CACHE"):
        return expanded(own)
    if own := os.environ.get("XDG_CACHE_HOME"):
        return Path(own) / "maskdm"
    try:
        return Path.home() / ".cache" / "maskdm"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "maskdm"


def store_folder(key: str) -> Path:
    """Where the store of a source and settings (`store_key`) is cached."""
    return cache_dir() / f"store-{key}"


def open_store(data: Data, progress: bool = True) -> Store:
    """Opens the store of these settings, which is built first if it does not exist.

    Raises ValueError for a source that is missing or empty, or has more unreadable images than
    `on_bad` allows (or did when it was packed), for a packed store of other settings, and where the
    disk has no room.
    """
    packed = expanded(data.source)
    if is_store(packed):
        store = load_store(packed)
        _refuse_other_settings(store, data)
    else:
        source = open_source(data.source)
        folder = store_folder(store_key(source, data))
        build_store(source, data, folder, progress)
        store = load_store(folder)
    manifest = store.manifest
    was_accepted = is_store(packed) and manifest.get("on_bad") == "skip"
    if not was_accepted or data.on_bad == "error":
        refuse_unreadable(data, manifest["left_out"], manifest["num_seen"])
    return store


def pack(
    data: Data, folder: Path, part: tuple[int, int] | None = None, progress: bool = True
) -> Store:
    """Builds a store, or one part of it, in a folder; an equal store there is left as it is.

    Args:
        data: source, size, channels, crop and the rest.
        folder: of the store; each part goes into a folder of its own in it.
        part: i of n, 0 <= i < n. Parts may be built at the same time, on as many machines.
        progress: show a bar.

    Raises ValueError as `open_store`, and where the folder holds anything else.
    """
    source, folder = open_source(data.source), folder.resolve()
    if folder.exists() and not _is_store_or_empty(folder, part is not None):
        raise ValueError(f"{folder} exists and is not a store: use a new folder")
    if part is not None:
        if part[1] > MAX_PARTS:
            raise ValueError(f"{part[1]} parts are too many: use at most {MAX_PARTS:,}")
        folder = folder / f"part-{part[0]:05d}-of-{part[1]:05d}"
    key = store_key(source, data, part)
    build_store(source, data, folder, progress, part)
    store = _load(folder)  # raises ValueError for a damaged one
    if store.manifest["key"] != key:
        raise ValueError(
            f"{folder} holds a store of another source or of other settings: use a new folder"
        )
    return store


def _is_store_or_empty(folder: Path, has_parts: bool) -> bool:
    """Whether a store, or a part of one, may be built in an existing path."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    if has_parts:
        return all(PART.fullmatch(name) or name.startswith(("building-", ".")) for name in names)
    return not names or "manifest.json" in names


def is_store(folder: Path) -> bool:
    """Whether a folder holds a packed store, or parts of one."""
    if not folder.is_dir():
        return False
    if (folder / "manifest.json").is_file() and (folder / "images.bin").is_file():
        return True
    return any(PART.fullmatch(path.name) for path in folder.iterdir())


def load_store(folder: Path) -> Store:
    """Opens a store, packed as a whole or in parts.

    Raises ValueError where it is damaged, a part is missing, or parts do not belong together.
    """
    if (folder / "manifest.json").is_file():
        return _with_split_note(_load(folder))
    present = {path.name for path in folder.iterdir() if PART.fullmatch(path.name)}
    count = int(max(present)[-5:])
    names = [f"part-{i:05d}-of-{count:05d}" for i in range(count)]
    if others := sorted(present.difference(names)):
        raise ValueError(
            f"the store {folder} has {count} parts, but also holds {others[0]}: remove it, or "
            "pack into a new folder"
        )
    if missing := [name for name in names if not (folder / name / "manifest.json").is_file()]:
        raise ValueError(f"the store {folder} lacks {listed(missing)}: pack the missing parts")
    return _with_split_note(_joined(folder, [_load(folder / name) for name in names]))


def _with_split_note(store: Store) -> Store:
    """A store that says so, in its notes, where its classes are splits of a data set."""
    if note := split_note(store.manifest["class_names"] or ()):
        store.manifest["notes"] = [*store.manifest["notes"], note]
    return store


def _load(folder: Path) -> Store:
    damaged = ValueError(f"the image store {folder} is damaged: remove it and build it again")
    try:
        manifest = parsed_json((folder / "manifest.json").read_text("utf-8"))
        shape, version = tuple(manifest["shape"]), manifest["format"]
        if names := manifest["class_names"]:  # those of folders could be no UTF-8
            manifest["class_names"] = [printable(name) for name in names]
    except (ValueError, OSError, KeyError, TypeError):
        raise damaged from None
    if version != FORMAT:
        raise ValueError(f"the image store {folder} has another format: remove it, build it again")
    images, labels, path = np.empty((0, *shape[1:]), np.uint8), None, folder / "images.bin"
    try:
        if path.stat().st_size != math.prod(shape):
            raise damaged
        if shape[0]:  # a part may have none
            images = np.memmap(path, np.uint8, "c", shape=shape)  # "c": torch wants it writable
        if manifest["class_names"] or "groups" in manifest:
            labels = np.load(folder / "labels.npy")
            if len(labels) != len(images):
                raise damaged
    except (ValueError, OSError, EOFError):
        raise damaged from None
    return Store(images, labels, manifest)


def _joined(folder: Path, parts: list[Store]) -> Store:
    """Joins parts into one store: images in order, classes numbered over all parts."""
    manifests = [part.manifest for part in parts]
    first = manifests[0]
    same = ("fingerprint", "crop", "background", "draft", "kind")
    settings = [[m["shape"][1:], *(m[name] for name in same)] for m in manifests]
    if any(one != settings[0] for one in settings):
        raise ValueError(f"the parts in {folder} differ in source or settings: pack them again")
    groups, of_image, skipped = list[Group](), list[np.ndarray](), Counter[str]()
    for part, manifest in zip(parts, manifests, strict=True):
        of_image.append(np.asarray(part.labels) + len(groups))
        groups += [(folder, label) for folder, label in manifest["groups"]]
        skipped |= Counter(manifest["passed_over"])  # each part counts all files of a folder or zip
    if not groups:
        raise ValueError(f"the parts in {folder} hold no images")
    labels, class_names = number_groups(groups, np.concatenate(of_image), first["class_names"])
    manifest = {
        **first,
        "shape": [sum(map(len, parts)), *first["shape"][1:]],
        "num_seen": sum(m["num_seen"] for m in manifests),
        "notes": list(dict.fromkeys(note for m in manifests for note in m["notes"])),
        "left_out": [entry for m in manifests for entry in m["left_out"]],
        "passed_over": dict(skipped),
        "class_names": class_names,
        "partly_labelled": are_partly_labelled(groups),
        "sha256": hashlib.sha256("".join(m["sha256"] for m in manifests).encode()).hexdigest(),
    }
    return Store(JoinedArrays([np.asarray(part.images) for part in parts]), labels, manifest)


def _refuse_other_settings(store: Store, data: Data) -> None:
    """Raises ValueError for a packed store that differs from the settings."""
    _, *shape = store.manifest["shape"]
    if tuple(shape) != data.shape:
        height, width, channels = shape
        size = f"{height}" if height == width else f"{height} {width}"
        raise ValueError(
            f"{data.source} holds images of {height}x{width}x{channels}, but the settings are for "
            f"{'x'.join(map(str, data.shape))}: use --data.size {size} --data.channels {channels}, "
            "or pack again"
        )
    if data.crop not in ("auto", store.manifest["crop"]):
        raise ValueError(
            f"{data.source} was packed with crop {store.manifest['crop']}, but the settings have "
            f"crop {data.crop}: use --data.crop auto, or pack again"
        )
