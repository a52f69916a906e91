"""Sources of images behind one interface: items in a fixed order, not yet decoded."""

from __future__ import annotations

import hashlib
import os
import posixpath
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import features

from maskdm.images.decode import HAS_HEIF, Content
from maskdm.images.labels import Label, is_label_file, labels_of, notes_key

T = TypeVar("T")
IMAGE_SUFFIXES = frozenset(
    ".bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pcx .pgm .png .pnm .ppm .tga .tif .tiff "
    ".webp".split()
)
if features.check("avif"):
    IMAGE_SUFFIXES |= {".avif"}
if HAS_HEIF:
    IMAGE_SUFFIXES |= {".heic", ".heif", ".hif"}
OTHER_SOURCES = {
    ".tar": "use a pattern in quotes, 'FOLDER/*.tar'",
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

    `files` are the names of all files, `where` is the source in messages.
    """

    has_folders = True

    def __init__(self, files: Collection[str], where: str):
        super().__init__()
        self._names = images_among(files, where, self.skipped)
        self._labels, self.notes = labels_of(self._names, files, self._text)
        self.num_images = len(self._names)
        digest = hashlib.sha256(notes_key(self.notes))
        for name, label in zip(self._names, self._labels, strict=True):
            digest.update(f"{name}\0{label}".encode("utf-8", "surrogatepass") + self._state(name))
        self.fingerprint = digest.hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        for i in part_of(range(len(self._names)), part):
            yield Item(self._names[i], self._content(self._names[i]), self._labels[i])

    @abstractmethod
    def _content(self, name: str) -> Path | bytes | Exception:
        """A file's content by its name."""

    @abstractmethod
    def _state(self, name: str) -> bytes:
        """Bytes that change when a file does."""

    def _text(self, name: str) -> str:
        content = self._content(name)
        if isinstance(content, Exception):
            raise ValueError(f"it cannot be read: {content}")
        return (content.read_bytes() if isinstance(content, Path) else content).decode("utf-8")


class FolderSource(ListedSource):
    """All images below a folder."""

    kind = "folder"

    def __init__(self, root: Path):
        self._root = root
        super().__init__(_files_below(root), f"folder {root}")

    def _content(self, name: str) -> Path:
        return self._root / name

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


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, lies in a hidden folder, or is Mac litter."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def images_among(names: Collection[str], where: str, skipped: Counter[str]) -> list[str]:
    """The names of images, sorted; counts files that are skipped, by suffix.

    Raises ValueError where there is no image.
    """
    images = []
    for name in sorted(names):
        if is_hidden(name):
            skipped["hidden"] += 1
        elif is_image(name):
            images.append(name)
        elif not is_label_file(name):
            skipped[posixpath.splitext(name)[1].lower() or "no suffix"] += 1
    if not images:
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in skipped.most_common(5))
        way_out = next(
            (hint for suffix, hint in OTHER_SOURCES.items() if skipped[suffix]),
            f"expected {' '.join(sorted(IMAGE_SUFFIXES))}",
        )
        raise ValueError(
            f"no images in {where} ({f'other files: {counts}' if counts else 'it is empty'}): "
            f"{way_out}"
        )
    return images


def _files_below(root: Path) -> list[str]:
    """Paths of all files below a folder, relative to it; links are followed, loops are not.

    Raises ValueError for a folder without read permission: its images would silently be missing.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read folder {error.filename}: {error.strerror}")

    names, seen = [], {root.resolve()}
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        # Folders come before links to them, or a link's name would become the class.
        real = {name: Path(folder, name).resolve() for name in subfolders}
        subfolders[:] = []
        for name in sorted(real, key=lambda name: (Path(folder, name).is_symlink(), name)):
            if real[name] not in seen:
                seen.add(real[name])
                subfolders.append(name)
        names += [Path(folder, file).relative_to(root).as_posix() for file in files]
    return names
