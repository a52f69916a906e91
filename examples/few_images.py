"""A primer fine-tuned on 300 images: what pre-training on other images is worth.

    python examples/few_images.py [--out few-images] [--scale 1.0]

There are 300 images to learn from: handwritten digits 7, 8 and 9. The primer is pre-trained, with
half of the patches hidden, on other images of that kind, the digits 0 to 6. The same fine-tuning on
the 300 then starts once from the primer and once from fresh weights; a third run starts from fresh
weights, too, and takes as many FLOPs as primer and fine-tuning together. All are measured by the
denoising loss on 233 held-out images of 7, 8 and 9; each run's best step counts, since so few
images are learnt by heart in the end.

Two to three minutes on a CPU. It leaves a run's folder for each of the four, and OUT/samples.png:
some of the 300 images, and samples of the three fine-tunings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import maskdm  # isort: skip (before torch: it sets how threads wait)

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_TRAIN, SHOWN = 300, (6, 8)  # images; rows and columns of a panel
MEASURED_EVERY = "16%"  # of a run


def write_images(folder: Path) -> dict[str, Path]:
    """Two arrays of images, uint8 (N, 8, 8): `others` of the digits 0 to 6, `few` of the rest."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    paths = {"others": folder / "others.npy", "few": folder / "few.npy"}
    np.save(paths["others"], pixels[digits.target < 7])
    np.save(paths["few"], pixels[digits.target >= 7])
    return paths


def recipe_of(source: Path, stage: dict[str, Any], init: Path | None = None) -> maskdm.Recipe:
    """The settings of one of the runs; 233 of the few images are held out."""
    digits = maskdm.load_recipe("digits").model_dump()  # model, diffusion, sampling
    num = len(np.load(source))
    held_out = num - NUM_TRAIN if source.stem == "few" else 0
    stage = {"batch_size": 64, "lr": 3e-3, "warmup": "5%", "betas": (0.9, 0.99), **stage}
    changes = {
        "data": {"source": str(source), "size": 8, "channels": 1, "held_out": held_out},
        "stages": [{"clip": 1.0, "ema": {"decay": 0.99}, **stage}],
        "init": str(init) if init else None,
        "evaluation": {**digits["evaluation"], "quick_num": 0},  # the loss alone
        "evaluate_every": MEASURED_EVERY,
        "preview_every": "100%",
    }
    return maskdm.Recipe(**{**digits, **changes})


def held_out_losses(run: Path) -> dict[int, float]:
    """The denoising loss on held-out images at each step at which it was measured."""
    lines = map(json.loads, (run / "quality.jsonl").read_text("utf-8").splitlines())
    return {line["step"]: line["dense_loss"] for line in lines}


def flops_of(run: Path) -> float:
    """What a run has spent."""
    return json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])["flops"]


def panel(images: list[Image.Image], side: int = 32) -> Image.Image:
    """Grey pictures in rows, enlarged without smoothing."""
    rows, columns = SHOWN
    page = Image.new("L", (columns * (side + 2), rows * (side + 2)), 128)
    for number, image in enumerate(images[: rows * columns]):
        place = (1 + number % columns * (side + 2), 1 + number // columns * (side + 2))
        page.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    return page


def main(argv: list[str] | None = None) -> dict[str, dict[int, float]]:
    """Trains four times, measures, draws; returns the held-out losses of the fine-tunings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("few-images"), help="a folder")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    images = write_images(args.out)

    # The primer has never seen a 7, 8 or 9.
    half = {"name": "pre-train", "mask": {"kind": "patch", "rate": 0.5}}
    half["steps"] = max(8, round(500 * args.scale))
    primer = args.out / "primer"
    maskdm.train(recipe_of(images["others"], half), primer)

    # The same fine-tuning on 300 images, from fresh weights and from the primer; and a longer one.
    whole = {"name": "fine-tune", "steps": max(8, round(240 * args.scale))}
    runs = {name: args.out / name for name in ("fresh", "from-primer", "fresh-longer")}
    maskdm.train(recipe_of(images["few"], whole), runs["fresh"])
    maskdm.train(recipe_of(images["few"], whole, primer), runs["from-primer"])
    total = flops_of(primer) + flops_of(runs["from-primer"])
    maskdm.train(recipe_of(images["few"], whole), runs["fresh-longer"], flops=total)

    losses = {name: held_out_losses(run) for name, run in runs.items()}
    panels = [panel([Image.fromarray(one) for one in np.load(images["few"])])]
    for run in runs.values():
        panels.append(panel(maskdm.load(f"{run}@best")(SHOWN[0] * SHOWN[1], seed=0).images))
    for name, curve in losses.items():
        best = min(curve, key=curve.__getitem__)
        print(f"{name:12} lowest held-out loss {curve[best]:.4f} at step {best}, at the end "
              f"{curve[max(curve)]:.4f}")  # fmt: skip
    width, height = panels[0].size
    page = Image.new("L", (len(panels) * (width + 16) - 16, height), 255)
    for number, part in enumerate(panels):
        page.paste(part, (number * (width + 16), 0))
    page.save(args.out / "samples.png")
    print(f"-> {args.out / 'samples.png'}")
    return losses


if __name__ == "__main__":
    main()
