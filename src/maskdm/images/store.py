"""A packed store of prepared uint8 images: built once, memory-mapped ever after.

A store is a folder: `images.bin` (uint8 N, H, W, C), `labels.npy` where there are classes,
`manifest.json`. Those that training builds lie in the cache, named by a hash of all that
determines their bytes; `maskdm pack` puts them where the user says, in parts if asked to.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.images.build import FORMAT, build_store, number_groups
from maskdm.images.joined import Array, JoinedArrays
from maskdm.images.known import crop_of
from maskdm.images.open import open_source
from maskdm.images.problems import refuse_bad
from maskdm.images.source import Source
from maskdm.recipe import Data

MAX_PARTS = 99_999
PART = re.compile(r"part-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Store:
    """Prepared images, read by index.

    Attributes:
        images: uint8 (N, H, W, C), memory-mapped; what is written into it stays in memory.
        labels: int64 (N,), or None.
        manifest: source, kind, fingerprint, crop and other settings, shape, class names, images
            left out and why, files passed over, the SHA-256 of images.bin.
    """

    images: Array = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    def labels_sha256(self) -> str:
        """SHA-256 of the class numbers, hexadecimal. There must be some."""
        assert self.labels is not None
        return hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()


def cache_dir() -> Path:
    """Where stores live: $MASKDM_CACHE, or maskdm in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("MASKDM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskdm"


def open_store(data: Data, progress: bool = True) -> Store:
    """Opens the store of these settings, building it first if it isn't there.

    Raises ValueError for a source that is missing, empty or (by `on_bad`) has unreadable images,
    for a packed store of other settings, and where the disk has no room.
    """
    packed = Path(data.source).expanduser()
    if is_store(packed):
        store = load_store(packed)
        _refuse_other_settings(store, data)
    else:
        source = open_source(data.source)
        folder = cache_dir() / f"store-{store_key(source, data)}"
        build_store(source, data, folder, progress)
        store = load_store(folder)
    manifest = store.manifest
    refuse_bad(data.source, manifest["left_out"], manifest["num_seen"], data.on_bad)
    return store


def pack(
    data: Data, folder: Path, part: tuple[int, int] | None = None, progress: bool = True
) -> Store:
    """Builds a store, or one part of it, where the user wants it; an equal one is left as it is.

    Args:
        data: source, size, channels, crop and the rest.
        folder: of the store; parts go into folders of their own in it.
        part: i of n, 0 <= i < n: only this part of the source. The n parts may be built at the
            same time by n processes, on as many machines.
        progress: show a bar.

    Raises ValueError as `open_store`, and where the folder holds anything else.
    """
    source, folder = open_source(data.source), folder.resolve()
    if folder.exists() and not _is_store_or_empty(folder, part is not None):
        raise ValueError(f"{folder} exists and is no store: name a new folder")
    if part is not None:
        if part[1] > MAX_PARTS:
            raise ValueError(f"{part[1]} parts are too many: use at most {MAX_PARTS:,}")
        folder = folder / f"part-{part[0]:05d}-of-{part[1]:05d}"
    key = store_key(source, data, part)
    build_store(source, data, folder, progress, part or (0, 1), key)
    store = _load(folder)  # raises ValueError for a damaged one
    if store.manifest["key"] != key:
        raise ValueError(
            f"{folder} holds the store of another source, or of other settings: name a new folder"
        )
    return store


def _is_store_or_empty(folder: Path, has_parts: bool) -> bool:
    """Whether a store, or a part of one, may be built in a folder that is there already."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    if has_parts:
        return all(PART.fullmatch(name) or name.startswith(("building-", ".")) for name in names)
    return not names or "manifest.json" in names


def store_key(source: Source, data: Data, part: tuple[int, int] | None = None) -> str:
    """Names a store by all that determines its bytes."""
    how = [list(data.shape), crop_of(data), data.background, data.draft]
    parts = [FORMAT, source.fingerprint, *how, part]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def is_store(folder: Path) -> bool:
    """Whether a folder holds a packed store, or parts of one."""
    if not folder.is_dir():
        return False
    if (folder / "manifest.json").is_file() and (folder / "images.bin").is_file():
        return True
    return any(PART.fullmatch(path.name) for path in folder.iterdir())


def load_store(folder: Path) -> Store:
    """Opens a store, of one piece or of parts.

    Raises ValueError where it is damaged, where a part is missing, or where parts don't belong
    together.
    """
    if (folder / "manifest.json").is_file():
        return _load(folder)
    found = {path.name for path in folder.iterdir() if PART.fullmatch(path.name)}
    match = PART.fullmatch(max(found))
    assert match is not None
    count = int(match[2])
    wanted = [f"part-{i:05d}-of-{count:05d}" for i in range(count)]
    missing = [
        name
        for name in wanted
        if name not in found or not (folder / name / "manifest.json").is_file()
    ]
    if others := sorted(found.difference(wanted)):
        raise ValueError(
            f"the store {folder} is cut into {count} parts, but {others[0]} is there too: remove "
            "what doesn't belong, or pack into a new folder"
        )
    if missing:
        raise ValueError(f"the store {folder} lacks {', '.join(missing[:5])}: pack what is missing")
    return _joined(folder, [_load(folder / name) for name in wanted])


def _load(folder: Path) -> Store:
    damaged = ValueError(f"the image store {folder} is damaged: remove it, and have it built again")
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        shape, version = tuple(manifest["shape"]), manifest["format"]
    except (ValueError, OSError, KeyError, TypeError):
        raise damaged from None
    if version != FORMAT:
        raise ValueError(f"the image store {folder} is of another version: remove it, pack again")
    images, labels, path = np.empty((0, *shape[1:]), np.uint8), None, folder / "images.bin"
    try:
        if path.stat().st_size != math.prod(shape):
            raise damaged
        if shape[0]:  # a part may have none
            images = np.memmap(path, np.uint8, "c", shape=shape)  # "c": torch wants it writable
        if manifest["class_names"] or "groups" in manifest:
            labels = np.load(folder / "labels.npy")
    except (ValueError, OSError, EOFError):
        raise damaged from None
    if labels is not None and len(labels) != len(images):
        raise damaged
    return Store(images, labels, manifest)


def _joined(folder: Path, parts: list[Store]) -> Store:
    """One store of parts: images in order, classes numbered over all of them."""
    manifests = [part.manifest for part in parts]
    same = ("fingerprint", "crop", "background", "draft", "kind")
    first = manifests[0]
    if any(
        m[name] != first[name] or m["shape"][1:] != first["shape"][1:]
        for m in manifests
        for name in same
    ):
        raise ValueError(f"the parts in {folder} are of other sources or settings: pack them again")
    groups = [(folder, label) for m in manifests for folder, label in m["groups"]]
    before = np.cumsum([0] + [len(m["groups"]) for m in manifests[:-1]])
    of_group = [part.labels + i for part, i in zip(parts, before, strict=True)]
    if not groups:
        raise ValueError(f"the parts in {folder} hold no images")
    labels, class_names = number_groups(groups, np.concatenate(of_group), first["class_names"])
    digest = hashlib.sha256("".join(m["sha256"] for m in manifests).encode()).hexdigest()
    passed_over: dict[str, int] = {}
    for manifest in manifests:  # files of a folder or zip are counted by every part
        for suffix, number in manifest["passed_over"].items():
            passed_over[suffix] = max(number, passed_over.get(suffix, 0))
    manifest = {
        **first,
        "shape": [sum(map(len, parts)), *first["shape"][1:]],
        "num_seen": sum(m["num_seen"] for m in manifests),
        "left_out": [entry for m in manifests for entry in m["left_out"]],
        "passed_over": passed_over,
        "class_names": class_names,
        "sha256": digest,
    }
    return Store(JoinedArrays([np.asarray(part.images) for part in parts]), labels, manifest)


def _refuse_other_settings(store: Store, data: Data) -> None:
    """Raises ValueError for a packed store that isn't what the settings ask for."""
    _, *shape = store.manifest["shape"]
    if tuple(shape) != data.shape:
        height, width, channels = shape
        size = f"{height}" if height == width else f"{height} {width}"
        raise ValueError(
            f"{data.source} holds images of {height}x{width}x{channels}, but the settings ask for "
            f"{'x'.join(map(str, data.shape))}: use --data.size {size} --data.channels {channels}, "
            "or pack again"
        )
    if data.crop not in ("auto", store.manifest["crop"]):
        raise ValueError(
            f"{data.source} was packed by crop {store.manifest['crop']}, but the settings ask for "
            f"{data.crop}: use --data.crop auto, or pack again"
        )
