"""`make fuzz`: damaged and strange files of all kinds, for a time or a number of cases."""

from __future__ import annotations

import maskdm  # noqa: F401  # isort: skip (before torch: it sets how threads wait)

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from fuzz.child import run_case
from fuzz.kinds import KINDS
from fuzz.runs import make_fixtures

VALID_EVERY = 8  # each such case is valid, and must be answered rightly


def main() -> int:
    """Runs the cases; 0 = no finding."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cases", type=int, help="a number of cases, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", metavar="KIND[,KIND][/NUMBER]", help="kinds, or one case")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="for findings")
    args = parser.parse_args()
    kind, _, number = (args.only or "").partition("/")
    kinds = kind.split(",") if kind else list(KINDS)
    if unknown := [name for name in kinds if name not in KINDS]:
        parser.error(f"unknown kind {unknown[0]}: {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="maskdm-fuzz-") as place:
        _import_all()
        if any(KINDS[name].needs_runs for name in kinds):
            make_fixtures(Path(place, "fixtures"))
        if number:
            result = one_case(kind, int(number), args.seed, Path(place), args.keep)
            print(result.pop("report"), json.dumps(result, indent=1), sep="\n")
            return 1 if result["problems"] else 0
        start = time.monotonic()
        deadline = start + 60 * args.minutes if args.cases is None else float("inf")
        most = args.cases if args.cases is not None else sys.maxsize
        results = list(_all_cases(kinds, most, deadline, args, Path(place)))
    print(summary(results, args.seed, time.monotonic() - start))
    return 1 if any(one["problems"] for one in results) else 0


def order(kinds: list[str]) -> Iterator[tuple[str, int]]:
    """An endless order of cases: kinds by their shares, each counted by itself."""
    numbers = Counter[str]()
    rows = [name for name in kinds for _ in range(KINDS[name].share)]
    Random(0).shuffle(rows)
    while True:
        for name in rows:
            yield name, numbers[name]
            numbers[name] += 1


def one_case(kind: str, number: int, seed: int, place: Path, keep: Path) -> dict:
    """Makes a case and runs it; what goes wrong is kept with its files."""
    random = Random(f"{seed} {kind} {number}")
    folder = place / f"{kind}-{number}"
    folder.mkdir()
    case = KINDS[kind].make(folder, random, number % VALID_EVERY == 0, place / "fixtures")
    inputs = place / f"inputs-{kind}-{number}"
    shutil.copytree(folder, inputs, ignore=shutil.ignore_patterns("cache"))
    result = run_case(case, folder)
    if result.problems:
        kept = keep / f"{kind}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(inputs, kept)
        (kept / "report.txt").write_text("\n".join([*result.problems, "", result.report]))
    shutil.rmtree(inputs)
    shutil.rmtree(folder)
    return {"kind": kind, "number": number, **vars(result)}


def _all_cases(
    kinds: list[str], most: int, deadline: float, args: argparse.Namespace, place: Path
) -> Iterator[dict]:
    """The results of all cases: each worker takes every n-th of the order."""
    workers, files = list[int](), [place / f"results-{i}" for i in range(args.workers)]
    for worker, file in enumerate(files):
        if (child := os.fork()) == 0:
            try:
                _work(worker, file, kinds, most, deadline, args, place)
                os._exit(0)
            except BaseException:  # else this copy of the parent would go on
                traceback.print_exc()
                os._exit(1)
        workers.append(child)
    for child, file in zip(workers, files, strict=True):
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("a worker died")
        yield from map(json.loads, file.read_text().splitlines())


def _work(
    worker: int,
    file: Path,
    kinds: list[str],
    most: int,
    deadline: float,
    args: argparse.Namespace,
    place: Path,
) -> None:
    """Runs every n-th case, and writes its result as a line."""
    with file.open("w") as lines:
        for index, (kind, number) in enumerate(order(kinds)):
            if index >= most or time.monotonic() > deadline:
                break
            if index % args.workers == worker:
                result = one_case(kind, number, args.seed, place, args.keep)
                result.pop("report")
                lines.write(json.dumps(result) + "\n")
                for problem in result["problems"]:
                    print(f"{kind}/{number}  {problem}", flush=True)


def summary(results: list[dict], seed: int, seconds: float) -> str:
    """Figures by kind, as a table of Markdown."""
    lines = [
        f"seed {seed}, {len(results):,} cases, {seconds / 60:.1f} min",
        "",
        "| kind | cases | findings | peak above its share, MiB | slowest, s of CPU |",
        "|---|---|---|---|---|",
    ]
    for name, kind in KINDS.items():
        own = [one for one in results if one["kind"] == name]
        if own:
            bad = sum(bool(one["problems"]) for one in own)
            peak = max(one["peak"] for one in own) / 2**20
            slowest = max(one["cpu_sec"] for one in own)
            lines.append(f"| {kind.what} | {len(own):,} | {bad} | {peak:.0f} | {slowest:.1f} |")
    return "\n".join(lines)


def _import_all() -> None:
    """Imports what the commands need, so that a forked child has it at once."""
    import maskdm.cli
    import maskdm.evaluation.evaluate
    import maskdm.export.pipeline
    import maskdm.images.check
    import maskdm.images.huggingface
    import maskdm.plan
    import maskdm.report.plots
    import maskdm.report.sheets
    import maskdm.sampling.inpaint
    import maskdm.training.trainer  # noqa: F401
    from maskdm.recipe_files import recipe_names

    recipe_names()  # reads and keeps the packaged recipes
    gc.collect()
    gc.freeze()  # or each child's first collection would copy all that is there


if __name__ == "__main__":
    sys.exit(main())
