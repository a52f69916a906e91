"""Drawing images: how fast, and how much of it is not the network.

    python benchmarks/sampling.py [--model S-64] [--samplers ddim dpm-solver] [--steps 10]
                                  [--how eager compiled] [--batch-size auto] [--num 3]

A table for people on stderr, one JSON line a row on stdout: images per second of `generate`, from
the numbers of images to bytes, one batch at a time, and `other`, the share of that time outside the
network's forward passes (solver, noise, rounding, copies; target: 5 %). Compilation is left out.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import torch
from step import SIZES

from maskdm.engine import choose_precision
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Sampling
from maskdm.sampling.generate import generate
from maskdm.sampling.speed import images_at_a_time

TARGET_OTHER = 0.05


def main() -> None:
    """Measures each sampler."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="S-64")
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpm-solver"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--how", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--batch-size", default="auto", help="a number, or auto")
    parser.add_argument("--num", type=int, default=3)
    args = parser.parse_args()
    size, device = SIZES[args.model], common.device()
    model = UViT(size.image, size.patch, 3, size.width, num_heads=size.heads).to(device).eval()
    trained = TrainedModel(model, Diffusion(schedule="cosine"))
    precision = choose_precision("auto", device)[0]
    facts = common.facts("sampling") | {"precision": precision, "model": args.model}
    common.say("sampler          how      steps batch    img/s  other")
    for how in args.how:
        for sampler in args.samplers:
            settings = Sampling(
                sampler=sampler,
                steps=args.steps,
                batch_size=args.batch_size if args.batch_size == "auto" else int(args.batch_size),
                compile="on" if how == "compiled" else "off",
            )
            row = {"how": how, **measured(trained, settings, args.num, precision)}
            common.tell({**facts, **row})
            common.say(
                f"{sampler:16} {how:8} {args.steps:5} {row['batch_size']:5} "
                f"{row['images_per_sec']:8,.2f} {100 * row['other']:5.1f}%"
            )


def measured(trained: TrainedModel, settings: Sampling, num: int, precision: str) -> dict[str, Any]:
    """One row: a batch drawn, against as many forward passes alone."""
    model, device = trained.model, trained.model.device
    size = images_at_a_time(model, settings)
    patches = torch.randn(size, model.num_patches, model.patch_size**2 * 3, device=device)
    positions = torch.arange(model.num_patches, device=device).repeat(size, 1)
    t = torch.rand(size, device=device)

    def draw(i: int) -> None:
        generate(trained, settings, list(range(size)), seed=i)

    @torch.no_grad()
    def forwards(i: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for _ in range(settings.steps):
                model(patches, positions, t, None)

    draw(0)  # compiles
    # Alternately, so that a machine that is busy for a while is so for both.
    pairs = [(common.median_sec(draw, 1), common.median_sec(forwards, 1)) for _ in range(num)]
    seconds, of_network = (sorted(column)[num // 2] for column in zip(*pairs, strict=True))
    return {
        "sampler": settings.sampler,
        "steps": settings.steps,
        "batch_size": size,
        "images_per_sec": round(size / seconds, 3),
        "other": round(max(0.0, 1 - of_network / seconds), 4),
        "target_other": TARGET_OTHER,
    }


if __name__ == "__main__":
    main()
