"""Sources of images behind one interface: items in a fixed order, not yet decoded."""

from __future__ import annotations

import hashlib
import os
import posixpath
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import features

from maskdm.images.decode import HAS_HEIF, HEAD_BYTES, Content, is_common_image
from maskdm.images.labels import (
    Label,
    folder_notes,
    folders_above,
    is_label_file,
    labels_of,
    notes_key,
)
from maskdm.images.vector import HAS_SVG

T = TypeVar("T")
IMAGE_SUFFIXES = frozenset(
    ".bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pcx .pgm .png .pnm .ppm .tga .tif .tiff "
    ".webp".split()
)
if features.check("avif"):
    IMAGE_SUFFIXES |= {".avif"}
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
if HAS_HEIF:
    IMAGE_SUFFIXES |= HEIF_SUFFIXES
if HAS_SVG:
    IMAGE_SUFFIXES |= {".svg"}
# Folders of network disks, recycle bins and file systems, in small letters.
LITTER_FOLDERS = frozenset(
    "@eadir @recycle #recycle @recently-snapshot #snapshot @tmp $recycle.bin recycler "
    "lost+found".split()
) | {"system volume information"}
OTHER_SOURCES = {
    ".tar": "use a pattern in quotes, 'FOLDER/*.tar'",
    ".tgz": "use a pattern in quotes, 'FOLDER/*.tgz'",
    ".tar.gz": "use a pattern in quotes, 'FOLDER/*.tar.gz'",
    ".zip": "use the zip itself",
    ".npz": "use the .npz itself",
    ".npy": "use the .npy itself",
    ".parquet": "use hf:FOLDER, for Hugging Face's reader",
    ".arrow": "use the folder that save_to_disk wrote, which holds state.json",
}  # what to use instead of a folder that holds these and no images


@dataclass(frozen=True)
class Item:
    """An image as its source holds it."""

    name: str  # path in the source, with "/" between its parts: for messages and classes
    content: Content  # what `prepare.open_image` decodes
    label: Label = None  # name or number of its class, where the source gives one


class Source(ABC):
    """Images in a fixed order, the same on every machine."""

    kind: str  # in words: `folder`, `zip archive`, ...
    fingerprint: str  # hexadecimal, changes when the images do; known before any is read
    num_images: int | None = None  # None where only reading them all would show
    class_names: list[str] | None = None  # of class numbers, where the source names them
    has_folders: bool = False  # whether folders can be classes
    skipped: Counter[str]  # number of files that are neither images nor label files, by suffix
    notes: list[str]  # what else a user should know about it, in sentences

    def __init__(self) -> None:
        self.skipped, self.notes = Counter(), []

    @abstractmethod
    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        """Yields the images in order, or those of part i of n: parts, joined, are all.

        Raises ValueError where the source can be read no further, or not be split into n parts.
        """


class DigitsSource(Source):
    """scikit-learn's 1,797 real handwritten digits: 8x8 grey, values 0-16 scaled to 0-255."""

    kind = "scikit-learn's digits"

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        super().__init__()
        digits = load_digits()
        self._images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
        self._labels = digits.target
        self.num_images = len(self._images)
        self.class_names = [str(name) for name in digits.target_names]
        self.fingerprint = hashlib.sha256(self._images.tobytes()).hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        for i in part_of(range(len(self._images)), part):
            yield Item(f"digit-{i:04d}", self._images[i], int(self._labels[i]))


class ListedSource(Source):
    """Images whose names are known before any is read; class folders or a label file give labels.

    Args:
        files: names of all files.
        folders: names of all folders, as far as the source knows them.
        where: the source in messages.
    """

    has_folders = True

    def __init__(self, files: Collection[str], folders: Collection[str], where: str):
        super().__init__()
        self._names = images_among(files, where, self.skipped, self._is_image)
        own = [name for name in files if not litter_of(name)]
        self._labels, self.notes, remarks = labels_of(self._names, own, self._bytes)
        self.num_images = len(self._names)
        digest = hashlib.sha256(notes_key(self.notes))
        for name, label in zip(self._names, self._labels, strict=True):
            digest.update(f"{name}\0{label}".encode("utf-8", "surrogatepass") + self._state(name))
        self.fingerprint = digest.hexdigest()
        # What follows changes no image and no class, so it is no part of the fingerprint.
        filled = folders_above(files)
        folders = {one for one in {*folders, *filled} if one and not litter_of(f"{one}/")}
        self.notes += [*remarks, *folder_notes(self._names, folders, folders - filled)]

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        for i in part_of(range(len(self._names)), part):
            yield Item(self._names[i], self._content(self._names[i]), self._labels[i])

    @abstractmethod
    def _content(self, name: str) -> Path | bytes | Exception:
        """A file's content by its name."""

    @abstractmethod
    def _state(self, name: str) -> bytes:
        """Bytes that change when a file does."""

    def _bytes(self, name: str) -> bytes:
        content = self._content(name)
        if isinstance(content, Exception):
            raise ValueError(f"it cannot be read: {content}")
        return content.read_bytes() if isinstance(content, Path) else content

    def _head(self, name: str) -> bytes:
        """How a file begins: `HEAD_BYTES`, or more."""
        return self._bytes(name)

    def _is_image(self, name: str) -> bool:
        """Whether a file is an image by its suffix, or a HEIC only by its suffix."""
        if is_image(name) or not is_heif(name):
            return is_image(name)
        try:
            return is_common_image(self._head(name))
        except (OSError, ValueError):  # it stays skipped
            return False


class FolderSource(ListedSource):
    """All images below a folder."""

    kind = "folder"

    def __init__(self, root: Path):
        self._root = root
        super().__init__(*_files_below(root), f"folder {root}")

    def _content(self, name: str) -> Path:
        return self._root / name

    def _head(self, name: str) -> bytes:
        with (self._root / name).open("rb") as file:
            return file.read(HEAD_BYTES)

    def _state(self, name: str) -> bytes:
        return file_state(self._root / name)


def part_of(sequence: Sequence[T], part: tuple[int, int]) -> Sequence[T]:
    """Part i of n of a sequence, 0 <= i < n: consecutive, as even as possible."""
    number, count = part
    return sequence[len(sequence) * number // count : len(sequence) * (number + 1) // count]


def file_state(path: Path) -> bytes:
    """Bytes that change when a file does: its size and time of change."""
    try:
        state = path.stat()
    except OSError:  # a dangling link: a bad image
        return b"\0missing\n"
    return f"\0{state.st_size}\0{state.st_mtime_ns}\n".encode()


def is_image(name: str) -> bool:
    """Whether a file is an image, by its suffix."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_heif(name: str) -> bool:
    """Whether a file is a HEIC, by its suffix."""
    return posixpath.splitext(name)[1].lower() in HEIF_SUFFIXES


def litter_of(name: str) -> str | None:
    """What a file belongs to that is none of the user's images; None for other files.

    `hidden` for hidden files and folders and Mac litter, else the folder of a network disk or a
    recycle bin in which it lies.
    """
    *folders, base = name.split("/")
    if any(part.startswith((".", "__MACOSX")) for part in (*folders, base)):
        return "hidden"
    return next((folder for folder in folders if folder.lower() in LITTER_FOLDERS), None)


def images_among(
    names: Collection[str],
    where: str,
    skipped: Counter[str],
    accepts: Callable[[str], bool] = is_image,
) -> list[str]:
    """The names of images, sorted; counts files that are skipped, by suffix or litter folder.

    Raises ValueError where there is no image.
    """
    images = []
    for name in sorted(names):
        if litter := litter_of(name):
            skipped[litter] += 1
        elif accepts(name):
            images.append(name)
        elif not is_label_file(name):
            skipped[posixpath.splitext(name)[1].lower() or "no suffix"] += 1
    if not images:
        raise ValueError(without_images(where, names, skipped))
    return images


def without_images(where: str, names: Collection[str], skipped: Counter[str]) -> str:
    """What to do where a source has no images."""
    counts = ", ".join(f"{count:,} {suffix}" for suffix, count in skipped.most_common(5))
    way_out = f"expected {' '.join(sorted(IMAGE_SUFFIXES))}"
    for suffix, hint in OTHER_SOURCES.items():
        inner = [n for n in sorted(names) if n.lower().endswith(suffix) and not litter_of(n)]
        if inner and where.startswith("folder"):
            way_out = hint
        elif inner:
            way_out = f"it holds {inner[0]}: unpack it first, then use what it holds"
        if inner:
            break
    what = f"other files: {counts}" if counts else "it is empty"
    return f"no images in {where} ({what}): {way_out}"


def _files_below(root: Path) -> tuple[list[str], list[str]]:
    """Paths of all files and folders below a folder, relative to it.

    Links are followed, loops are not.

    Raises ValueError for a folder without read permission: its images would silently be missing.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read folder {error.filename}: {error.strerror}")

    names, folders, seen = list[str](), list[str](), {root.resolve()}
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        # Folders come before links to them, or a link's name would become the class.
        real = {name: Path(folder, name).resolve() for name in subfolders}
        subfolders[:] = []
        for name in sorted(real, key=lambda name: (Path(folder, name).is_symlink(), name)):
            if real[name] not in seen:
                seen.add(real[name])
                subfolders.append(name)
        folders += [Path(folder, name).relative_to(root).as_posix() for name in subfolders]
        names += [Path(folder, file).relative_to(root).as_posix() for file in files]
    return names, folders
