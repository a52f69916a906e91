"""Seconds of a training step by mask rate, against the tokens that the mask leaves.

    python benchmarks/step.py [--size 64] [--batch-size 8] [--rates 0 0.5 0.9] [--num 5]

Prints a table for people on stderr and one JSON line a row on stdout. A step is draw, forward,
backward, clipping, AdamW and moving average, as `maskdm train` runs it; warm-up left out, median
of `--num` steps. `matrix limit` is the speed of large fp32 (on a GPU with bf16 units: bf16)
matrix products on the same device in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from maskdm.diffusion.schedule import make_schedule
from maskdm.engine import device_name, make_accelerator
from maskdm.masks import num_visible
from maskdm.models.uvit import UViT
from maskdm.recipe import Data, Diffusion, Mask, Model, Recipe, Stage
from maskdm.training.ema import make_average, update_average
from maskdm.training.monitor import source_commit
from maskdm.training.optim import make_optimizer
from maskdm.training.step import backward, draw_batch


def median_sec(run: Callable[[int], Any], num: int, device: torch.device) -> float:
    """Median seconds of `run(i)` over `num` calls, after two that don't count."""
    seconds = []
    for i in range(num + 2):
        start = time.perf_counter()
        run(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def matrix_limit(device: torch.device, dtype: torch.dtype, num: int) -> float:
    """FLOP/s of a square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / median_sec(lambda i: a @ a, num, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    parser.add_argument("--num", type=int, default=5)
    args = parser.parse_args()

    accelerator, precision, _ = make_accelerator("auto")
    device = accelerator.device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    limit = matrix_limit(device, dtype, args.num)
    schedule, diffusion = make_schedule("cosine"), Diffusion()
    facts = {
        "benchmark": "step",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": source_commit(),
        "precision": precision,
        "size": args.size,
        "patch_size": args.patch_size,
        "embed_dim": args.embed_dim,
        "batch_size": args.batch_size,
        "matrix_limit_gflops": round(limit / 1e9, 1),
    }
    print(f"{facts['device']}, {precision}, limit {limit / 1e9:,.0f} GFLOP/s", file=sys.stderr)
    print("hidden  tokens      ms/step    img/s  of limit  of dense", file=sys.stderr)
    dense_sec = None
    for rate in args.rates:
        model = UViT(args.size, args.patch_size, 3, args.embed_dim, num_heads=args.num_heads)
        model.to(device)
        stage = Stage(
            name="bench",
            mask=Mask(kind="patch" if rate else "none", rate=rate),
            steps=1,
            batch_size=args.batch_size,
            lr=1e-4,
            clip=1.0,
        )
        recipe = Recipe(
            data=Data(size=args.size), model=Model(patch_size=args.patch_size), stages=(stage,)
        )
        average, optimizer = make_average(model), make_optimizer(model.parameters(), stage)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        shape = (args.batch_size, args.size, args.size, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)

        def step(i: int) -> None:
            batch = draw_batch(images, None, recipe, stage, schedule, i)  # noqa: B023
            backward(accelerator, wrapped, batch, schedule, diffusion, None)  # noqa: B023
            accelerator.clip_grad_norm_(model.parameters(), 1.0)  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            update_average(average, model, 0.999)  # noqa: B023

        seconds = median_sec(step, args.num, device)
        dense_sec = dense_sec or seconds
        visible = num_visible(stage.mask, model.grid)
        flops = 3 * model.forward_flops(visible) * args.batch_size
        row = {
            "hidden": rate,
            "tokens": visible,
            "ms_per_step": round(1000 * seconds, 2),
            "images_per_sec": round(args.batch_size / seconds, 2),
            "share_of_limit": round(flops / seconds / limit, 4),
            "share_of_first_row": round(seconds / dense_sec, 4),
        }
        print(json.dumps({**facts, **row}), flush=True)
        print(
            f"{100 * rate:5.3g} % {visible:7} {row['ms_per_step']:12,.1f} "
            f"{row['images_per_sec']:8,.1f} {100 * row['share_of_limit']:8.1f}% "
            f"{row['share_of_first_row']:9.3f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
