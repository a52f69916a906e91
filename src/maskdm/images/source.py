"""Any source of images behind one face: a sorted list of names, labels, and a reader."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())


class Source(ABC):
    """Images in a fixed order, the same on every machine.

    Attributes:
        names: one name per image, sorted; used in messages.
        labels: int64 (N,), or None where the source has no classes.
        class_names: name of each label, sorted.
        fingerprint: hexadecimal digest that changes when the images do.
    """

    names: list[str]
    labels: np.ndarray | None = None
    class_names: list[str]
    fingerprint: str

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Decodes an image; safe to call from several threads.

        Raises an exception, of whatever kind its decoder raises, where it can't be decoded.
        """


class DigitsSource(Source):
    """scikit-learn's 1,797 real handwritten digits: 8x8 grey, values 0-16 scaled to 0-255."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
        self.names = [f"digit-{i:04d}" for i in range(len(self._images))]
        self.labels = digits.target.astype(np.int64)
        self.class_names = [str(name) for name in digits.target_names]
        self.fingerprint = hashlib.sha256(self._images.tobytes()).hexdigest()

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])


class FolderSource(Source):
    """All images below a folder. Class folders (root/class/x.png) give labels."""

    def __init__(self, root: Path):
        self._root = root
        self.names = _images_among(_files_below(root), f"folder {root}")
        self.labels, self.class_names = _labels_from_folders(self.names)
        digest = hashlib.sha256()
        for name in self.names:
            path = root / name
            state = path.stat() if path.exists() else None  # a dangling link: a bad image
            facts = f"{state.st_size}\0{state.st_mtime_ns}" if state else "missing"
            digest.update(os.fsencode(name) + f"\0{facts}\n".encode())
        self.fingerprint = digest.hexdigest()

    def read(self, index: int) -> Image.Image:
        with Image.open(self._root / self.names[index]) as image:
            image.load()
            return image


class ZipSource(Source):
    """All images in a zip archive. Class folders inside give labels."""

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path)
        infos = {info.filename: info for info in self._archive.infolist() if not info.is_dir()}
        self.names = _images_among(list(infos), f"zip {path}")
        self.labels, self.class_names = _labels_from_folders(self.names)
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0{infos[name].file_size}\0{infos[name].CRC}\n".encode())
        self.fingerprint = digest.hexdigest()

    def read(self, index: int) -> Image.Image:
        with Image.open(io.BytesIO(self._archive.read(self.names[index]))) as image:
            image.load()
            return image


def open_source(name: str) -> Source:
    """Opens the source that the user named: `digits`, a folder, or a zip file.

    Raises ValueError where there is none, or no image in it.
    """
    if name == "digits":
        return DigitsSource()
    path = Path(name).expanduser()
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return ZipSource(path)
    if path.is_file():
        raise ValueError(f"data.source {name} is a file, but not a zip: name a folder or a zip")
    raise ValueError(
        f"data.source {name} does not exist: name a folder or a zip of images, or digits"
    )


def _files_below(root: Path) -> list[str]:
    """Paths of all files below a folder, relative to it; links are followed, loops are not.

    Raises ValueError for a folder that may not be read: its images would be missed in silence.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read folder {error.filename}: {error.strerror}")

    names, seen = [], {root.resolve()}
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = {name: Path(folder, name).resolve() for name in subfolders}
        subfolders[:] = [name for name in sorted(subfolders) if real[name] not in seen]
        seen.update(real[name] for name in subfolders)
        names += [Path(folder, file).relative_to(root).as_posix() for file in files]
    return names


def _images_among(names: list[str], where: str) -> list[str]:
    """The names that look like images, sorted; hidden files and Mac litter left out."""
    images = sorted(
        name
        for name in names
        if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    )
    if not images:
        found = f"{len(names)} other files" if names else "it is empty"
        raise ValueError(
            f"no images in {where} ({found}): expected {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return images


def _labels_from_folders(names: list[str]) -> tuple[np.ndarray | None, list[str]]:
    """Class numbers from folder names, sorted; None unless every image lies in a class folder.

    Folders that all images share are no classes (an archive's top folder, say).
    """
    folders = [name.split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))
    if any(len(folder) <= depth for folder in folders):
        return None, []
    classes = [folder[depth] for folder in folders]
    class_names = sorted(set(classes))
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number[name] for name in classes], dtype=np.int64), class_names
