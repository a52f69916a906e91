"""How fast images are compared, and whether worse images measure worse.

    python benchmarks/evaluation.py [--zip IMAGES.zip --features NETWORK.torchscript] [--num 10000]

Half of the images (every other one) are the reference; the samples are as many of the other half
as asked for: as they are, JPEG-compressed at quality 30, blurred by 1 pixel, without one class,
without half of the classes, and noise. Each is compared by `maskdm evaluate`'s own functions. A
table for people on stderr, one JSON line a row on stdout. The last row is one whole evaluation in
a process of its own with nothing kept from before, start of Python included.

Without --zip handwritten digits serve; without --features principal components.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch

import numpy as np
import torch
from PIL import Image, ImageFilter

from maskdm.evaluation.features import features_of, make_features
from maskdm.evaluation.measure import Compared, measure, metrics_to_measure
from maskdm.evaluation.reference import ReferenceFeatures
from maskdm.images.store import Store, open_store
from maskdm.recipe import Data, Evaluation
from maskdm.runs.environment import source_commit

TARGET_SEC = 180  # of a whole evaluation of 10,000 images of 32 pixels


def blurred(image: np.ndarray) -> np.ndarray:
    """Blurred by a Gaussian of one pixel: uint8 (H, W, C)."""
    squeezed = Image.fromarray(image.squeeze())
    return np.asarray(squeezed.filter(ImageFilter.GaussianBlur(1))).reshape(image.shape)


def compressed(image: np.ndarray) -> np.ndarray:
    """Saved as JPEG of quality 30 and read again: uint8 (H, W, C)."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=30)
    return np.asarray(Image.open(file)).reshape(image.shape)


def kinds_of_samples(store: Store, num: int) -> dict[str, np.ndarray]:
    """Samples by name, all from images that are not the reference's."""
    generator = np.random.default_rng(0)
    assert store.labels is not None
    chosen = generator.permutation(np.arange(1, len(store), 2))
    labels = store.labels[chosen]
    images = {
        "other half": chosen[:num],
        "without one class": chosen[labels != 3][:num],
        "without five classes": chosen[labels < 5][:num],
    }
    samples = {name: store.images[np.sort(where)] for name, where in images.items()}
    plain = samples["other half"]
    return {
        "other half": plain,
        "JPEG quality 30": np.stack([compressed(image) for image in plain]),
        "without one class": samples["without one class"],
        "blurred": np.stack([blurred(image) for image in plain]),
        "without five classes": samples["without five classes"],
        "noise": generator.integers(0, 256, plain.shape, dtype=np.uint8),
    }


def whole_evaluation(source: str, data: Data, num: int, features: str) -> float:
    """Seconds of `maskdm evaluate IMAGES --reference SOURCE` from nothing."""
    store = open_store(data, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        chosen = np.random.default_rng(0).permutation(len(store))[:num]
        np.savez(f"{folder}/samples.npz", store.images[np.sort(chosen)])
        command = [sys.executable, "-m", "maskdm", "evaluate", f"{folder}/samples.npz"]
        command += ["--reference", source, "--features", features, "--out", f"{folder}/e.json"]
        environment = {**os.environ, "MASKDM_CACHE": f"{folder}/cache"}
        start = time.perf_counter()
        subprocess.run(command, check=True, env=environment, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    """Runs all comparisons and prints their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zip", type=Path, help="images in class folders")
    parser.add_argument("--features", default="pca")
    parser.add_argument("--num", type=int, default=10_000)
    args = parser.parse_args()
    source = str(args.zip) if args.zip else "digits"
    data = Data(source=source, size=32) if args.zip else Data(source="digits", channels=1)
    store = open_store(data, progress=False)
    facts = {
        "benchmark": "evaluation",
        "features": Path(args.features).name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": source_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    settings = Evaluation(features=args.features)
    device = torch.device("cpu")
    half = np.arange(0, len(store), 2)
    reference = Store(store.images[half], None, {**store.manifest, "sha256": "every other image"})
    features = make_features(settings, reference, device)
    vectors = features_of(reference.images, features, None)
    real = ReferenceFeatures(reference.images, vectors)
    assert len(real.statistics.mean)  # computed before the clock starts
    wanted = metrics_to_measure(Compared(settings, features, reference=real))
    print(f"against {len(reference):,} of {source}, {features.name}", file=sys.stderr)
    names: list[str] = []
    for what, images in kinds_of_samples(store, args.num).items():
        start = time.perf_counter()
        of_samples = features_of(images, features, None)
        middle = time.perf_counter()
        compared = Compared(settings, features, images, of_samples, reference=real)
        found = measure(compared, wanted)
        if not names:
            names = list(found)
            print(f"{'samples':22}{'num':>7}" + "".join(f"{n:>18}" for n in names), file=sys.stderr)
        cells = "".join(f"{m.value:11.4g} +-{1.96 * (m.error or 0):5.2g}" for m in found.values())
        print(f"{what:22}{len(images):7,}{cells}", file=sys.stderr)
        line: dict[str, Any] = {**facts, "what": what, "num": len(images)}
        line["features_sec"] = round(middle - start, 2)
        line["metrics_sec"] = round(time.perf_counter() - middle, 2)
        line |= {name: [one.value, one.error] for name, one in found.items()}
        print(json.dumps(line), flush=True)
    num = min(args.num, len(store))
    seconds = whole_evaluation(source, data, num, args.features)
    print(
        f"a whole evaluation of {num:,} images against {len(store):,}: {seconds:.0f} s "
        f"(target {TARGET_SEC})",
        file=sys.stderr,
    )
    line = {**facts, "what": "whole evaluation", "num": num, "num_reference": len(store)}
    print(json.dumps({**line, "seconds": round(seconds, 1), "target_sec": TARGET_SEC}), flush=True)


if __name__ == "__main__":
    main()
