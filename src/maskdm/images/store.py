"""A packed store of prepared uint8 images: built once, memory-mapped ever after.

A store is a folder in the cache, named by a hash of all that determines its bytes:
`images.bin` (uint8 N, H, W, C), `labels.npy` where there are classes, `manifest.json`.
It is built beside its place and renamed into it, so it is whole or not there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from maskdm.images.source import Source, open_source
from maskdm.recipe import Data

FORMAT = 3  # goes into the name: raise it when the same settings would give other bytes


@dataclass(frozen=True)
class Store:
    """Prepared images, read by index.

    Attributes:
        images: uint8 (N, H, W, C), memory-mapped, read only.
        labels: int64 (N,), or None.
        manifest: source, fingerprint, shape, class names, names of images left out, and the
            SHA-256 of images.bin.
    """

    images: np.ndarray
    labels: np.ndarray | None
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)


def cache_dir() -> Path:
    """Where stores live: $MASKDM_CACHE, or maskdm in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("MASKDM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskdm"


def open_store(data: Data, progress: bool = True) -> Store:
    """Opens the store of these settings, building it first if it isn't there.

    Raises ValueError for a source that is missing, empty or (unless told to skip) has an
    unreadable image.
    """
    source = open_source(data.source)
    folder = cache_dir() / f"store-{_key(source, data)}"
    if not (folder / "manifest.json").is_file():
        _build(source, data, folder, progress)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    if (folder / "images.bin").stat().st_size != math.prod(manifest["shape"]):
        raise ValueError(f"the image store {folder} is damaged: remove it, to have it built again")
    images = np.memmap(folder / "images.bin", np.uint8, "r", shape=tuple(manifest["shape"]))
    labels = np.load(folder / "labels.npy") if manifest["class_names"] else None
    return Store(images, labels, manifest)


def _key(source: Source, data: Data) -> str:
    parts = [FORMAT, source.fingerprint, data.size, data.channels, data.crop, data.on_bad]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _build(source: Source, data: Data, folder: Path, progress: bool) -> None:
    """Decodes and prepares every image into a store at `folder`, atomically."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    building = folder.parent / f"building-{folder.name}-{uuid.uuid4().hex[:8]}"
    building.mkdir()
    try:
        manifest = _write_images(source, data, building, progress)
        (building / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
        try:
            building.rename(folder)
        except OSError:  # another process was faster: its store has the same bytes
            if not (folder / "manifest.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_images(source: Source, data: Data, building: Path, progress: bool) -> dict[str, Any]:
    kept, skipped, digest = [], [], hashlib.sha256()
    title = f"packing {data.source}"
    with (building / "images.bin").open("wb") as file, ThreadPoolExecutor() as pool:
        results = _map_in_order(pool, source, data)
        hidden = None if progress else True  # None: hidden where no terminal shows it
        bar = tqdm(results, title, len(source.names), disable=hidden, unit="img")
        for index, result in enumerate(bar):
            if isinstance(result, np.ndarray):
                content = result.tobytes()
                file.write(content)
                digest.update(content)
                kept.append(index)
            elif data.on_bad == "skip":
                skipped.append(source.names[index])
            else:
                raise ValueError(
                    f"{data.source}: {source.names[index]} cannot be read as an image ({result}): "
                    "mend or remove it, or leave such files out with --data.on-bad skip"
                )
        file.flush()
        os.fsync(file.fileno())  # the rename that follows must not overtake the content
    if not kept:
        raise ValueError(f"{data.source}: none of its {len(skipped)} images can be read")
    if source.labels is not None:
        np.save(building / "labels.npy", source.labels[kept])
    return {
        "source": data.source,
        "fingerprint": source.fingerprint,
        "crop": data.crop,
        "shape": [len(kept), data.size, data.size, data.channels],
        "class_names": source.class_names,
        "skipped": skipped,
        "sha256": digest.hexdigest(),
    }


def _map_in_order(
    pool: ThreadPoolExecutor, source: Source, data: Data
) -> Iterator[np.ndarray | str]:
    """Prepares images on all cores, yields them in order, holds a bounded number at a time."""

    def prepare(index: int) -> np.ndarray | str:
        try:
            return prepare_image(source.read(index), data)
        except Exception as error:  # damaged files make decoders raise nearly anything
            return " ".join(str(error).split()) or type(error).__name__

    chunk = 256
    for start in range(0, len(source.names), chunk):
        stop = min(start + chunk, len(source.names))
        yield from pool.map(prepare, range(start, stop))


def prepare_image(image: Image.Image, data: Data) -> np.ndarray:
    """Turns an image as its EXIF data say, converts, crops and resizes: uint8 (size, size, C)."""
    image = to_eight_bits(ImageOps.exif_transpose(image))
    image = CROPS[data.crop](image.convert("L" if data.channels == 1 else "RGB"), data.size)
    return np.asarray(image, dtype=np.uint8).reshape(data.size, data.size, data.channels)


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits, and lays transparent images on white.

    Pillow's own conversion cuts 16-bit values at 255, and shows what transparency hides.
    Raises ValueError for 32-bit and float images, whose range nothing tells.
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"images of mode {image.mode} (32 bits) have no known range")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image.convert("RGBA"))
    return image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` and cuts the middle square.

    Large images are halved by box filter as often as possible first, then bicubic: the
    preparation of ADM (Dhariwal & Nichol 2021), whose statistics many papers compare with.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        width, height = round(image.width * scale), round(image.height * scale)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def squeeze(image: Image.Image, size: int) -> Image.Image:
    """Resizes the whole image to a square, whatever its shape (bicubic, antialiased)."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def celeba(image: Image.Image, size: int) -> Image.Image:
    """The face in CelebA's aligned images: the 128-pixel square centred at x 89, y 121.

    The preparation of the paper's lineage (Bao et al. 2022). Raises ValueError for other images.
    """
    return center_crop(_aligned(image).crop((89 - 64, 121 - 64, 89 + 64, 121 + 64)), size)


def celeba140(image: Image.Image, size: int) -> Image.Image:
    """The middle 140 pixels of CelebA's aligned images (Song et al. 2020b); else as `celeba`."""
    return center_crop(_aligned(image).crop((19, 39, 159, 179)), size)


def _aligned(image: Image.Image) -> Image.Image:
    if image.size != (178, 218):
        raise ValueError(
            f"crops celeba and celeba140 are for CelebA's aligned images of 178x218 pixels, and "
            f"this one is {image.width}x{image.height}: use crop center"
        )
    return image


def exact(image: Image.Image, size: int) -> Image.Image:
    """The image as it is. Raises ValueError where it isn't of that size."""
    if image.size != (size, size):
        raise ValueError(
            f"crop none wants images of {size}x{size} pixels, and this one is "
            f"{image.width}x{image.height}: use crop center or resize"
        )
    return image


CROPS = {
    "center": center_crop,
    "resize": squeeze,
    "celeba": celeba,
    "celeba140": celeba140,
    "none": exact,
}


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed builds of this store left behind (untouched for an hour)."""
    for path in itertools.islice(folder.parent.glob(f"building-{folder.name}-*"), 100):
        try:
            changed = max(file.stat().st_mtime for file in [path, *path.iterdir()])
        except FileNotFoundError:  # its process has just finished it
            continue
        if time.time() - changed > 3600:
            shutil.rmtree(path, ignore_errors=True)
