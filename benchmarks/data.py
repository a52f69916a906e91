"""How fast images are packed and fed, and in how much memory.

    python benchmarks/data.py [--zip cifar10-train.zip] [--num 20000] [--num-photos 1500]

Three measurements, a table for people on stderr and one JSON line each on stdout:
pack small: a zip of 32x32 JPEGs (the one given, else made here) into a store of 64x64;
pack photos: 500x375 JPEGs, made here, into a store of 64x64, with and without reduced decoding;
feed: batches of 256 of a 64x64 store in random order, half of them mirrored, as floats in [-1, 1],
from memory-mapped and from resident images, median of five runs.
Peak memory is that of all processes of a build together (their proportional shares, by the second).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch

import numpy as np
import PIL
import torch
from PIL import Image

from maskdm.images.feed import Feed
from maskdm.images.order import ImageOrder
from maskdm.images.store import open_store
from maskdm.images.workers import num_cores
from maskdm.recipe import Data
from maskdm.runs.environment import source_commit
from maskdm.training.step import mirror

TARGETS = {
    "pack small": 3000,
    "pack photos": 500,
    "pack photos, full decoding": None,
    "feed mapped": 40_000,
    "feed resident": 40_000,
}
BATCH = 256


def photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG of soft shapes with some grain, of quality 90: 50 kB at 500x375."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for side, strength in ((4, 90), (16, 40), (64, 20)):
        coarse = generator.normal(0, strength, (side, side, 3)).astype(np.float32)
        planes = [Image.fromarray(coarse[..., c]) for c in range(3)]
        wide = [np.asarray(p.resize((width, height), Image.Resampling.BICUBIC)) for p in planes]
        pixels += np.stack(wide, -1)
    pixels += 128 + generator.normal(0, 4, pixels.shape)
    file = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def folder_of_photos(folder: Path, num: int) -> Path:
    """So many 500x375 JPEGs, 100 different ones over and over."""
    folder.mkdir()
    kinds = [photo(seed, 500, 375) for seed in range(min(num, 100))]
    for i in range(num):
        (folder / f"{i:05d}.jpg").write_bytes(kinds[i % len(kinds)])
    return folder


def small_zip(path: Path, given: Path | None, num: int) -> Path:
    """The first images of a zip, evenly spread, or as many made here."""
    with zipfile.ZipFile(path, "w") as archive:
        if given is None:
            kinds = [photo(seed, 32, 32) for seed in range(200)]
            for i in range(num):
                archive.writestr(f"{i % 10}/{i:05d}.jpg", kinds[i % len(kinds)])
            return path
        with zipfile.ZipFile(given) as source:
            names = [name for name in source.namelist() if name.endswith(".jpg")]
            for name in names[:: max(1, len(names) // num)][:num]:
                archive.writestr(name, source.read(name))
    return path


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Puts the peak memory of this process and its children, above that at the start, in MiB."""
    peak, over = [0.0], threading.Event()
    before = memory_mib()

    def watch() -> None:
        while not over.wait(0.2):
            peak[0] = max(peak[0], memory_mib() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield peak
    over.set()
    thread.join()


def memory_mib() -> float:
    """Proportional memory of this process and its children, without file pages, in MiB."""
    total, family = 0, {os.getpid()}
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has just ended
            continue
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total / 1024


def packing(name: str, source: Path, **data: Any) -> dict[str, Any]:
    """Builds a store of 64x64 in a cache of its own; images a second, start of workers included."""
    with tempfile.TemporaryDirectory() as cache, peak_memory() as peak:
        os.environ["MASKDM_CACHE"] = cache
        start = time.perf_counter()
        store = open_store(Data(source=str(source), size=64, **data), progress=False)
        seconds = time.perf_counter() - start
        num = len(store)
    return {
        "what": name,
        "num": num,
        "images_per_sec": round(num / seconds),
        "peak_mib": round(peak[0]),
    }


def feeding(name: str, resident: str, source: Path, num_batches: int) -> dict[str, Any]:
    """Batches as floats: gather, mirror, cast."""
    store = open_store(Data(source=str(source), size=64), progress=False)
    subset = np.arange(len(store))
    feed = Feed(store, subset, ImageOrder(len(store), 0), 0, 1, torch.device("cpu"), resident)
    # One buffer: 12 MB taken from the system anew for each batch cost more than all the rest.
    floats, speeds = torch.empty(BATCH, 64, 64, 3), []
    generator = torch.Generator().manual_seed(0)
    for run in range(6):
        start = time.perf_counter()
        for i in range(num_batches):
            images, _ = feed.next((run * num_batches + i) * BATCH, BATCH)
            images = mirror(images, torch.rand(BATCH, generator=generator) < 0.5)
            floats.copy_(images).div_(127.5).sub_(1)
        speeds.append(num_batches * BATCH / (time.perf_counter() - start))
    feed.close()
    median = statistics.median(speeds[1:])  # the first warms up
    return {"what": name, "num": num_batches * BATCH, "images_per_sec": round(median)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zip", type=Path, help="a zip of 32x32 JPEGs; default: made here")
    parser.add_argument("--num", type=int, default=20_000, help="of its images")
    parser.add_argument("--num-photos", type=int, default=1500)
    parser.add_argument("--num-batches", type=int, default=60)
    args = parser.parse_args()
    facts = {
        "benchmark": "data",
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "pillow": PIL.__version__,
        "torch": torch.__version__,
        "commit": source_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(f"{facts['cores']} cores, Pillow {PIL.__version__}", file=sys.stderr)
    print("                               images/s   target  peak MiB", file=sys.stderr)

    def tell(row: dict[str, Any]) -> None:
        target = TARGETS[row["what"]]
        print(json.dumps({**facts, **row, "target": target}), flush=True)
        print(
            f"{row['what']:28} {row['images_per_sec']:10,} {target or '':>8} "
            f"{row.get('peak_mib', ''):>9}",
            file=sys.stderr,
        )

    with tempfile.TemporaryDirectory() as folder:
        small = small_zip(Path(folder) / "small.zip", args.zip, args.num)
        photos = folder_of_photos(Path(folder) / "photos", args.num_photos)
        tell(packing("pack small", small))
        tell(packing("pack photos", photos))
        tell(packing("pack photos, full decoding", photos, draft=False))
        os.environ["MASKDM_CACHE"] = str(Path(folder) / "cache")
        tell(feeding("feed mapped", "off", small, args.num_batches))
        tell(feeding("feed resident", "on", small, args.num_batches))


if __name__ == "__main__":
    main()
