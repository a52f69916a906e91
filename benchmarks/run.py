"""All benchmarks with one command: tables on the terminal, lines of JSON in one file.

    python benchmarks/run.py [--quick | --full | --try] [--out results.jsonl] [--limit-sec 380]

quick: for a CPU, three minutes. full: for a GPU, meant to take eight. try: tiny sizes, to see
that every script runs; its figures mean nothing. Without a flag: full on a GPU, else quick. A
benchmark that fails is said at the end, and the rest runs; so is what the time limit cut off.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import common

STEPS = ["--num", "3", "--models", "S-64"]
OTHERS = ["S-64-vit", "S-64-muon", "S-64-middle"]  # against S-64: do new parts cost their FLOPs?
PLANS = {
    "quick": [
        ["step.py", *STEPS],
        ["step.py", "--num", "3", "--models", *OTHERS, "--rates", "0", "0.5"],
        ["sampling.py", "--steps", "4", "--num", "3", "--batch-size", "2"],
        ["data.py", "--num", "5000", "--num-photos", "300", "--num-batches", "20"],
        ["evaluation.py"],
    ],
    "full": [  # what matters most comes first: each compilation takes a while
        ["step.py", *STEPS, "--batch-size", "256", "--rates", "0", "0.9", "0.5", "0.75"]
        + ["--how", "compiled", "eager", "baseline"],
        ["step.py", *STEPS, "--batch-size", "256", "--rates", "0.9", "--how", "graphs"],
        ["step.py", "--num", "3", "--models", "B-256-16", "--batch-size", "256"]
        + ["--rates", "0", "0.9", "--how", "compiled"],
        ["step.py", "--num", "3", "--models", "B-256", "--batch-size", "16"]
        + ["--rates", "0", "--how", "compiled"],
        ["step.py", *STEPS, "--batch-size", "128", "--how", "unet"],
        ["step.py", "--num", "3", "--models", *OTHERS, "--batch-size", "256"]
        + ["--rates", "0", "0.5", "--how", "compiled"],
        ["sampling.py", "--steps", "10", "--how", "eager", "compiled"],
        ["data.py", "--num", "20000", "--num-photos", "1000"],
        ["evaluation.py"],
    ],
    "try": [
        ["step.py", "--num", "1", "--models", "tiny", "--batch-size", "2", "--how"]
        + ["eager", "baseline"],
        ["sampling.py", "--model", "tiny", "--steps", "2", "--num", "1", "--batch-size", "2"],
        ["data.py", "--num", "64", "--num-photos", "8", "--num-batches", "2"],
        ["evaluation.py", "--num", "200"],
    ],
}


def main() -> int:
    """Runs a plan; gives 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    for name in PLANS:
        which.add_argument(f"--{name}", action="store_const", dest="plan", const=name)
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--limit-sec", type=float, help="end by then, with what there is")
    args = parser.parse_args()
    plan = args.plan or ("full" if common.device().type == "cuda" else "quick")
    out = args.out or Path(f"benchmark-{plan}-{time.strftime('%Y-%m-%d')}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    failed, cut_off, start = [], [], time.perf_counter()
    with out.open("w") as file:
        for script, *arguments in PLANS[plan]:
            title = " ".join([script, *arguments])
            before = time.perf_counter()
            left = None if args.limit_sec is None else args.limit_sec - (before - start)
            if left is not None and left <= 0:
                cut_off.append(title)
                continue
            common.say(f"\n== {title}")
            command = [sys.executable, str(Path(__file__).parent / script), *arguments]
            with subprocess.Popen(command, stdout=file) as process:
                try:
                    if process.wait(left):
                        failed.append(title)
                except subprocess.TimeoutExpired:
                    process.kill()
                    cut_off.append(title)
            common.say(f"   ({time.perf_counter() - before:.0f} s)")
    common.say(f"\n{time.perf_counter() - start:.0f} s; lines of JSON in {out}")
    for what, titles in (("failed", failed), ("cut off by the time limit", cut_off)):
        for title in titles:
            common.say(f"{what}: {title}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
