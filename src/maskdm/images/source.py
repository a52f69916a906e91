"""Any source of images behind one face: items in a fixed order, not yet decoded."""

from __future__ import annotations

import hashlib
import os
import posixpath
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import features

from maskdm.images.labels import Label, is_label_file, labels_of
from maskdm.images.prepare import Content

T = TypeVar("T")
IMAGE_SUFFIXES = frozenset(
    ".bmp .dib .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pcx .pgm .png .pnm .ppm .tga .tif .tiff "
    ".webp".split()
)
if features.check("avif"):
    IMAGE_SUFFIXES |= {".avif"}


OTHER_SOURCES = {
    ".tar": "name the tars by a pattern in quotes, 'FOLDER/*.tar'",
    ".zip": "name the zip itself",
    ".npz": "name the .npz itself",
    ".npy": "name the .npy itself",
    ".parquet": "say hf:FOLDER, for Hugging Face's reader",
    ".arrow": "name the folder that save_to_disk wrote, which holds state.json",
}  # what to name instead of a folder that holds these, and no images


@dataclass(frozen=True)
class Item:
    """An image as its source holds it.

    Attributes:
        name: path in the source, with "/" between its parts; used in messages and for classes.
        content: what `prepare.open_image` decodes.
        label: name or number of its class, where the source tells.
    """

    name: str
    content: Content
    label: Label = None


class Source(ABC):
    """Images in a fixed order, the same on every machine.

    Attributes:
        kind: what it is, for people: `folder`, `zip archive`, ...
        fingerprint: hexadecimal digest that changes when the images do; known before any is read.
        num_images: how many there are, or None where only reading it through can tell.
        class_names: names of class numbers, where the source gives numbers with names.
        has_folders: whether folders may tell classes.
        passed_over: how many files are neither images nor label files, by suffix.
        notes: what else a user should know of it, in sentences.
    """

    kind: str
    fingerprint: str
    num_images: int | None = None
    class_names: list[str] | None = None
    has_folders: bool = False
    passed_over: Counter[str]
    notes: list[str]

    def __init__(self) -> None:
        self.passed_over, self.notes = Counter(), []

    @abstractmethod
    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        """Gives the images in order, or those of part i of n (0 <= i < n): parts, joined, are all.

        Raises ValueError where the source can't be read on, or not be cut in so many parts.
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
        for i in piece(range(len(self._images)), part):
            yield Item(f"digit-{i:04d}", self._images[i], int(self._labels[i]))


class FolderSource(Source):
    """All images below a folder. Class folders (root/class/x.png) or a label file give labels."""

    kind = "folder"
    has_folders = True

    def __init__(self, root: Path):
        super().__init__()
        self._root = root
        files = _files_below(root)
        self._names = images_among(files, f"folder {root}", self.passed_over)
        self._labels, self.notes = labels_of(
            self._names, files, lambda name: (root / name).read_text("utf-8")
        )
        self.num_images = len(self._names)
        digest = hashlib.sha256(repr(self.notes).encode("utf-8", "surrogatepass"))
        for name, label in zip(self._names, self._labels, strict=True):
            facts = f"{name}\0{label}".encode("utf-8", "surrogatepass")
            digest.update(facts + file_state(root / name))
        self.fingerprint = digest.hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        for i in piece(range(len(self._names)), part):
            yield Item(self._names[i], self._root / self._names[i], self._labels[i])


def piece(sequence: Sequence[T], part: tuple[int, int]) -> Sequence[T]:
    """Part i of n of a sequence: consecutive, as even as possible."""
    number, count = part
    return sequence[len(sequence) * number // count : len(sequence) * (number + 1) // count]


def file_state(path: Path) -> bytes:
    """What tells whether a file has changed: its size and time of change."""
    try:
        state = path.stat()
    except OSError:  # a dangling link: a bad image
        return b"\0missing\n"
    return f"\0{state.st_size}\0{state.st_mtime_ns}\n".encode()


def images_among(names: list[str], where: str, passed_over: Counter[str]) -> list[str]:
    """The names that look like images, sorted; hidden files and Mac litter left out.

    Counts the others, by suffix, in `passed_over`. Raises ValueError where there is no image.
    """
    images, others = [], Counter[str]()
    for name in sorted(names):
        suffix = posixpath.splitext(name)[1].lower()
        if any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
            others["hidden"] += 1
        elif suffix in IMAGE_SUFFIXES:
            images.append(name)
        elif not is_label_file(name):
            others[suffix or "no suffix"] += 1
    passed_over.update(others)
    if not images:
        found = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(5))
        way_out = next(
            (hint for suffix, hint in OTHER_SOURCES.items() if others[suffix]),
            f"expected {' '.join(sorted(IMAGE_SUFFIXES))}",
        )
        raise ValueError(
            f"no images in {where} ({f'other files: {found}' if found else 'it is empty'}): "
            f"{way_out}"
        )
    return images


def _files_below(root: Path) -> list[str]:
    """Paths of all files below a folder, relative to it; links are followed, loops are not.

    Raises ValueError for a folder that may not be read: its images would be missed in silence.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read folder {error.filename}: {error.strerror}")

    names, seen = [], {root.resolve()}
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        # Folders themselves before links to them, else a link's name would be the class.
        real = {name: Path(folder, name).resolve() for name in subfolders}
        subfolders[:] = []
        for name in sorted(real, key=lambda name: (Path(folder, name).is_symlink(), name)):
            if real[name] not in seen:
                seen.add(real[name])
                subfolders.append(name)
        names += [Path(folder, file).relative_to(root).as_posix() for file in files]
    return names
