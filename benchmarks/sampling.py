"""Drawing images: how fast, and how much of it is not the network.

    python benchmarks/sampling.py [--model S-64] [--samplers ddim dpm-solver] [--steps 10]
                                  [--how eager compiled] [--batch-size auto] [--num 3]

A table for people on stderr, one JSON line a row on stdout: images per second of `generate`, from
the numbers of images to bytes, one batch at a time, and `other`, the time of the same drawing by a
network that answers with its input at no cost, as a share (solver, noise, rounding, copies; target:
5 %). Compilation is left out.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
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
            row = {"how": how, **measured(trained, settings, args.num)}
            common.tell({**facts, **row})
            common.say(
                f"{sampler:16} {how:8} {args.steps:5} {row['batch_size']:5} "
                f"{row['images_per_sec']:8,.2f} {100 * row['other']:5.1f}%"
            )


def measured(trained: TrainedModel, settings: Sampling, num: int) -> dict[str, Any]:
    """One row: a batch drawn, with the network and without."""
    model = trained.model
    size = images_at_a_time(model, settings)

    def draw(i: int) -> None:
        generate(trained, settings, list(range(size)), seed=i)

    draw(0)  # compiles
    seconds = common.median_sec(draw, num)
    network = model.forward
    model.forward = lambda patches, *rest: patches
    settings = settings.model_copy(update={"compile": "off"})
    without = common.median_sec(draw, num)
    model.forward = network
    return {
        "sampler": settings.sampler,
        "steps": settings.steps,
        "batch_size": size,
        "images_per_sec": round(size / seconds, 3),
        "other": round(without / seconds, 4),
        "target_other": TARGET_OTHER,
    }


if __name__ == "__main__":
    main()
