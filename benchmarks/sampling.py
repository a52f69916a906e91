"""Drawing images: how fast, and how much of it is not the network.

    python benchmarks/sampling.py [--model S-64] [--samplers ddim dpm-solver] [--steps 10]
                                  [--batch-size 8] [--num 3]

A table for people on stderr, one JSON line a row on stdout: images per second of `generate`, from
the numbers of images to bytes, and `other`, the share of that time outside the network's forward
passes (solver, noise, rounding, copies; target: 5 %).
"""

from __future__ import annotations

import argparse

import common
import torch
from step import SIZES

from maskdm.engine import choose_precision
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Sampling
from maskdm.sampling.generate import generate

TARGET_OTHER = 0.05


def main() -> None:
    """Measures each sampler."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="S-64")
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpm-solver"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num", type=int, default=3)
    args = parser.parse_args()
    size, device = SIZES[args.model], common.device()
    model = UViT(size.image, size.patch, 3, size.width, num_heads=size.heads).to(device).eval()
    trained = TrainedModel(model, Diffusion(schedule="cosine"))
    precision = choose_precision("auto", device)[0]
    patches = torch.randn(args.batch_size, model.num_patches, 3 * size.patch**2, device=device)
    positions = torch.arange(model.num_patches, device=device).expand(args.batch_size, -1)
    t = torch.rand(args.batch_size, device=device)

    @torch.no_grad()
    def forwards(i: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for _ in range(args.steps):
                model(patches, positions, t)

    facts = common.facts("sampling") | {"precision": precision, "model": args.model}
    common.say("sampler          steps batch    img/s  other")
    for sampler in args.samplers:
        settings = Sampling(sampler=sampler, steps=args.steps, batch_size=args.batch_size)
        indices = list(range(args.batch_size))

        def draw(i: int, settings: Sampling = settings, indices: list[int] = indices) -> None:
            generate(trained, settings, indices, seed=i)

        # Alternately, so that a machine that is busy for a while is so for both.
        pairs = [
            (common.median_sec(draw, 1), common.median_sec(forwards, 1)) for _ in range(args.num)
        ]
        seconds, of_network = (sorted(column)[args.num // 2] for column in zip(*pairs, strict=True))
        row = {
            "sampler": sampler,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "images_per_sec": round(args.batch_size / seconds, 3),
            "other": round(max(0.0, 1 - of_network / seconds), 4),
            "target_other": TARGET_OTHER,
        }
        common.tell({**facts, **row})
        common.say(
            f"{sampler:16} {args.steps:5} {args.batch_size:5} {row['images_per_sec']:8,.2f} "
            f"{100 * row['other']:5.1f}%"
        )


if __name__ == "__main__":
    main()
