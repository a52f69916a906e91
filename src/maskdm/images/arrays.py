"""Images in one array: .npy files, and .npz files as samplers write them."""

from __future__ import annotations

import hashlib
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from maskdm.images.archives import DAMAGED, edges_and_state
from maskdm.images.prepare import MAX_PIXELS
from maskdm.images.source import Item, Source

IMAGE_KEYS = ("arr_0", "images", "x")
LABEL_KEYS = ("arr_1", "labels", "y")


class ArraySource(Source):
    """An array of images, uint8 or uint16 (N, H, W) or (N, H, W, C), C = 1 to 4.

    Of an `.npz` the first of arr_0, images and x is taken, and for labels, int (N,), of arr_1,
    labels and y. Read image by image: it may be larger than memory.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.kind = f"{path.suffix} array"
        self._path = path
        try:
            keys = [] if path.suffix == ".npy" else _keys(path)
            self._key = next((key for key in IMAGE_KEYS if key in keys), None)
            if path.suffix == ".npz" and self._key is None:
                raise ValueError(f"it has no {', '.join(IMAGE_KEYS)} among {', '.join(keys)}")
            with self._open() as file:
                self._shape, self._type = _header(file)
            label_key = next((key for key in LABEL_KEYS if key in keys), None)
            self._labels = None
            if label_key is not None:
                with np.load(path, allow_pickle=False) as arrays:
                    self._labels = _class_numbers(arrays[label_key], self._shape[0])
        except (*DAMAGED, ValueError, SyntaxError, OverflowError, tokenize.TokenError) as error:
            raise ValueError(f"{path} is no array of images: {error}") from None
        self.num_images = self._shape[0]
        self.fingerprint = hashlib.sha256(edges_and_state(path)).hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        number, count = part
        start, stop = (self._shape[0] * i // count for i in (number, number + 1))
        num_bytes = int(np.prod(self._shape[1:])) * self._type.itemsize
        with self._open() as file:
            _header(file)
            file.seek(start * num_bytes, 1)
            for i in range(start, stop):
                values = np.frombuffer(_read(file, num_bytes, self._path), self._type)
                label = None if self._labels is None else int(self._labels[i])
                yield Item(f"{i:08d}", values.reshape(self._shape[1:]), label)

    def _open(self) -> IO[bytes]:
        if self._key is None:
            return self._path.open("rb")
        return zipfile.ZipFile(self._path).open(f"{self._key}.npy")


def _keys(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array whose values come next. Raises ValueError for no images."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"format version {version} of .npy is not known")
    shape, is_fortran, dtype = read[version](file)
    if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ValueError(f"its type is {dtype}: save uint8 values from 0 to 255")
    if len(shape) == 4 and shape[3] not in (1, 2, 3, 4) and shape[1] in (1, 3, 4):
        raise ValueError(f"its shape {shape} is (N, C, H, W): transpose it to (N, H, W, C)")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 2, 3, 4)):
        raise ValueError(f"its shape is {shape}: (N, H, W) or (N, H, W, C) is needed, C = 1 to 4")
    if 0 in shape:
        raise ValueError("it is empty")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise ValueError(f"its images have {shape[1] * shape[2]:,} pixels each")
    if dtype.itemsize == 2 and shape[3:] not in ((), (1,)):
        raise ValueError("16-bit images must be grey: save colours as uint8")
    if is_fortran:
        raise ValueError("its values lie in Fortran order: save np.ascontiguousarray of it")
    return shape, dtype


def _read(file: IO[bytes], num_bytes: int, path: Path) -> bytes:
    """Exactly so many bytes."""
    try:
        content = file.read(num_bytes)
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if len(content) != num_bytes:
        raise ValueError(f"{path} ends early")
    return content


def _class_numbers(labels: np.ndarray, num_images: int) -> np.ndarray:
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"its labels are {labels.dtype} {labels.shape}, not whole numbers ({num_images},)"
        )
    return labels
