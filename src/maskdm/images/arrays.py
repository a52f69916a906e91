"""Images in one array: .npy files, and .npz files as samplers write them."""

from __future__ import annotations

import hashlib
import math
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from maskdm.images.archives import READ_ERRORS, edges_and_state
from maskdm.images.decode import MAX_PIXELS
from maskdm.images.source import Item, Source

IMAGE_KEYS = ("arr_0", "images", "x")
LABEL_KEYS = ("arr_1", "labels", "y")


class ArraySource(Source):
    """An array of images, uint8 or uint16 (N, H, W) or (N, H, W, C), C = 1 to 4.

    In an `.npz`, images are the first of arr_0, images and x, and labels, int (N,), the first of
    arr_1, labels and y. Read image by image, so it may be larger than memory.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.kind, self._path = f"{path.suffix.lower()} array", path
        self._key: str | None = None
        self._labels: np.ndarray | None = None
        try:
            if path.suffix.lower() == ".npz":
                self._choose_members()
            with self._open() as file:
                self._shape, self._type = _header(file)
            labels, num_images = self._labels, self._shape[0]
            if labels is not None and (
                labels.shape != (num_images,) or labels.dtype.kind not in "iu"
            ):
                raise ValueError(
                    f"its labels are {labels.dtype} {labels.shape}, not integers ({num_images},)"
                )
        except (*READ_ERRORS, ValueError, SyntaxError, OverflowError, tokenize.TokenError) as error:
            raise ValueError(f"{path} is not an array of images: {error}") from None
        self.num_images = num_images
        self.fingerprint = hashlib.sha256(edges_and_state(path)).hexdigest()

    def items(self, part: tuple[int, int] = (0, 1)) -> Iterator[Item]:
        start, stop = (self._shape[0] * i // part[1] for i in (part[0], part[0] + 1))
        num_bytes = math.prod(self._shape[1:]) * self._type.itemsize
        with self._open() as file:
            _header(file)
            file.seek(start * num_bytes, 1)
            for i in range(start, stop):
                try:
                    content = file.read(num_bytes)
                except READ_ERRORS as error:
                    raise ValueError(f"{self._path} is damaged: {error}") from None
                if len(content) != num_bytes:
                    raise ValueError(f"{self._path} ends early")
                values = np.frombuffer(content, self._type)
                label = None if self._labels is None else int(self._labels[i])
                yield Item(f"{i:08d}", values.reshape(self._shape[1:]), label)

    def _choose_members(self) -> None:
        with zipfile.ZipFile(self._path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
        self._key = next((key for key in IMAGE_KEYS if key in keys), None)
        if self._key is None:
            raise ValueError(f"it has {', '.join(keys)}, not {' or '.join(IMAGE_KEYS)}")
        if label_key := next((key for key in LABEL_KEYS if key in keys), None):
            with np.load(self._path, allow_pickle=False) as arrays:
                self._labels = arrays[label_key]

    def _open(self) -> IO[bytes]:
        if self._key is None:
            return self._path.open("rb")
        return zipfile.ZipFile(self._path).open(f"{self._key}.npy")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array whose values come next.

    Raises ValueError for an array that does not hold images.
    """
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"unknown version {version} of the .npy format")
    shape, is_fortran, dtype = read(file)
    if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ValueError(f"its type is {dtype}: save uint8 values from 0 to 255")
    if len(shape) == 4 and shape[3] not in (1, 2, 3, 4) and shape[1] in (1, 3, 4):
        raise ValueError(f"its shape {shape} is (N, C, H, W): transpose it to (N, H, W, C)")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 2, 3, 4)):
        raise ValueError(f"its shape is {shape}, not (N, H, W) or (N, H, W, C) with C = 1 to 4")
    if len(shape) == 3 and shape[2] <= 4 < shape[1]:
        raise ValueError(
            f"its shape {shape} looks like that of a single image, (H, W, C): add an axis, (N, H, "
            "W, C), also for narrow grey images, (N, H, W, 1)"
        )
    if 0 in shape:
        raise ValueError("it is empty")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise ValueError(f"its images have {shape[1] * shape[2]:,} pixels each")
    if dtype.itemsize == 2 and shape[3:] not in ((), (1,)):
        raise ValueError("16-bit images must be grey: save colours as uint8")
    if is_fortran:
        raise ValueError("its values are in Fortran order: save np.ascontiguousarray of it")
    return shape, dtype
