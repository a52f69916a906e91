"""Where a training step's time goes: the top operations, and how long the device idles.

    python benchmarks/profile_step.py [--model S-64] [--rate 0.9] [--batch-size 8] [--how eager]

A table for people on stderr, one JSON line on stdout. On a GPU `idle` is the share of the steps'
time in which no kernel ran; on a CPU there is none.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import common
import torch
from step import SIZES, our_step
from torch.profiler import ProfilerActivity, profile

from maskdm.engine import make_accelerator

NUM_SHOWN = 15


def busy_sec(events: list[Any]) -> float:
    """Seconds in which at least one kernel ran: the union of their spans."""
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    busy, end = 0.0, 0.0
    for span in sorted((e.time_range.start, e.time_range.end) for e in kernels):
        busy += max(0.0, span[1] - max(span[0], end))
        end = max(end, span[1])
    return busy / 1e6


def main() -> None:
    """Profiles some steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="S-64")
    parser.add_argument("--rate", type=float, default=0.9)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--how", choices=["eager", "compiled", "graphs"], default="eager")
    parser.add_argument("--num", type=int, default=5)
    args = parser.parse_args()
    accelerator, precision, _ = make_accelerator("auto")
    step, _, _ = our_step(SIZES[args.model], args.rate, args.batch_size, args.how, accelerator)
    for i in range(3):
        step(i)
    is_gpu = common.device().type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu
    if is_gpu:
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for i in range(args.num):
            step(i)
        if is_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    key = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda e: getattr(e, key), reverse=True)
    if is_gpu:  # the kernels themselves, not the operations that launched them
        rows = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(row, key) for row in rows) or 1.0
    top = [
        {
            "name": row.key[:90],
            "share": round(getattr(row, key) / total, 4),
            "calls_per_step": round(row.count / args.num, 1),
        }
        for row in rows[:NUM_SHOWN]
    ]
    idle = round(1 - busy_sec(list(profiler.events())) / seconds, 4) if is_gpu else None
    common.tell(
        common.facts("profile")
        | {
            "precision": precision,
            "model": args.model,
            "hidden": args.rate,
            "batch_size": args.batch_size,
            "how": args.how,
            "ms_per_step": round(1000 * seconds / args.num, 3),
            "idle": idle,
            "top": top,
        }
    )
    common.say(
        f"{args.model}, {100 * args.rate:g} % hidden, batch {args.batch_size}, {args.how}: "
        f"{1000 * seconds / args.num:,.1f} ms a step under the profiler"
        + ("" if idle is None else f", idle {100 * idle:.1f} %")
    )
    for row in top:
        common.say(f"{100 * row['share']:6.1f} %  {row['calls_per_step']:6g} x  {row['name']}")


if __name__ == "__main__":
    main()
