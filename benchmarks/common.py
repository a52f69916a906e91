"""What the benchmarks share: timing, the device's limits, facts for every line of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch

import torch
from torch import Tensor

from maskdm.engine import device_name
from maskdm.runs.environment import source_commit


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facts(benchmark: str) -> dict[str, Any]:
    """What every line of results begins with."""
    return {
        "benchmark": benchmark,
        "device": device_name(device()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": os.environ.get("MASKDM_COMMIT") or source_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def tell(line: dict[str, Any]) -> None:
    """Prints a line of results for machines, on stdout."""
    print(json.dumps(line), flush=True)


def results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; none without it."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def say(text: str) -> None:
    """Prints a line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def median_sec(run: Callable[[int], Any], num: int) -> float:
    """Median seconds of `run(i)` over `num` calls; see `seconds_of`."""
    return statistics.median(seconds_of([run], num)[0])


def spread(seconds: list[float]) -> float:
    """How much measurements differ: from the fastest to the slowest, over the median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def seconds_of(runs: list[Callable[[int], Any]], num: int) -> list[list[float]]:
    """Seconds of `num` calls `run(i)` of each, after two of each that don't count.

    They take turns, so that a machine that is slow for a while is so for all. On a GPU whole
    groups of calls are timed: the host isn't made to wait for each.
    """
    for run in runs:
        for i in range(2):
            run(i)
    seconds: list[list[float]] = [[] for _ in runs]
    for i in range(num):
        for run, own in zip(runs, seconds, strict=True):
            own.append(_once(run, i))
    return seconds


def _once(run: Callable[[int], Any], i: int) -> float:
    """Seconds of a call."""
    if device().type != "cuda":
        start = time.perf_counter()
        run(i)
        return time.perf_counter() - start
    group = 5
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for j in range(group):
        run(group * i + j)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / group


def matrix_product(dtype: torch.dtype) -> tuple[Callable[[int], Tensor], int]:
    """A product of large square matrices on this device, and its FLOPs."""
    side = 8192 if device().type == "cuda" else 2048
    a = torch.randn(side, side, device=device(), dtype=dtype)
    return (lambda i: a @ a), 2 * side**3


def copy_limit(num: int = 5) -> float:
    """Bytes per second that copying 1 GiB (on a CPU 256 MiB) within memory reads and writes."""
    size = 2**30 if device().type == "cuda" else 2**28
    a = torch.zeros(size, dtype=torch.uint8, device=device())
    b = torch.empty_like(a)
    return 2 * size / median_sec(lambda i: b.copy_(a), num)


def reset_peak() -> None:
    """Begins to watch the GPU's memory anew."""
    if device().type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mem_gib() -> float | None:
    """Most memory of the GPU in use since `reset_peak`; None on a CPU."""
    if device().type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)
