"""`maskdm compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from maskdm.commands.common import DONE, quiet

Runs = Annotated[tuple[str, ...], tyro.conf.Positional, quiet(metavar="RUN RUN ...")]
Cost = Annotated[Literal["images", "flops", "time"] | None, quiet(metavar="{images,flops,time}")]
Quality = Annotated[
    Literal["sliced", "kid", "dense_loss"] | None, quiet(metavar="{sliced,kid,dense_loss}")
]


def compare(
    runs: Runs,
    *,
    metric: Annotated[str | None, quiet(metavar="METRIC")] = None,
    features: Annotated[str | None, quiet(metavar="NAME")] = None,
    x: Cost = None,
    y: Quality = None,
    target: Annotated[float | None, quiet(metavar="FLOAT")] = None,
    out: Annotated[Path | None, quiet(metavar="PNG")] = None,
    json_output: Annotated[bool, quiet(name="json"), tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Set evaluations side by side, and say which differences are within the noise.

    Without --x: a table of the newest evaluations that compare (what `maskdm evaluate` wrote into
    RUN/evaluation.json), and which of their differences are real. Trainings of one recipe by
    several seeds are told together.

    With --x: curves of the quality that was measured in training (RUN/quality.jsonl) against what
    it had cost, and how many times less each run spent to be as good as the first.

    Args:
        runs: run folders, RUN@STAGE, or files of evaluations; with --x the first is the baseline.
        metric: only this one: frechet, kid, sliced, precision, recall, inception_score.
        features: only evaluations in these features.
        x: draw curves against images seen, FLOPs or time of training.
        y: quality of the curves; default: the first of the three that all runs have.
        target: quality to be reached; default: the last of the first run.
        out: file of the curves; default: quality-against-X.png.
        json_output: print everything as JSON instead.
    """
    if x is None:
        given = {"--y": y, "--target": target, "--out": out}
        useless = [flag for flag, value in given.items() if value is not None]
        if useless:
            raise ValueError(f"{useless[0]} is of curves: give --x images, flops or time as well")
        return _compare_evaluations(runs, metric, features, json_output)
    for flag, value in (("--metric", metric), ("--features", features)):
        if value is not None:
            raise ValueError(f"{flag} is of the table: leave it out, or leave out --x")
    return _compare_curves(runs, x, y, target, out, json_output)


def _compare_evaluations(
    runs: Sequence[str], metric: str | None, features: str | None, json_output: bool
) -> int:
    if len(runs) < 2:
        raise ValueError("name two runs or more to compare: maskdm compare RUN RUN ...")
    named = _named(runs, [_evaluation_file(run) for run in runs])

    from maskdm.commands.compare_text import comparison_text
    from maskdm.evaluation.compare import compare_records
    from maskdm.evaluation.records import read_records

    found = {name: read_records(path) for name, path in named.items()}
    comparison = compare_records(found, features, metric.replace("-", "_") if metric else None)
    print(json.dumps(comparison.as_json()) if json_output else comparison_text(comparison))
    return DONE


def _compare_curves(
    runs: Sequence[str],
    x: str,
    y: str | None,
    target: float | None,
    out: Path | None,
    json_output: bool,
) -> int:
    if not runs:
        raise ValueError("name the runs, the baseline first: maskdm compare RUN RUN ... --x flops")
    named = _named(runs, [_quality_file(run) for run in runs])
    path = out or Path(f"quality-against-{x}.png")
    if path.suffix not in (".png", ".pdf", ".svg") or path.is_dir():
        raise ValueError(f"--out {path}: name a file that ends in .png, .pdf or .svg")

    import dataclasses

    from maskdm.commands.compare_text import notes_text, reached_text
    from maskdm.evaluation.curves import choose_quality, costs_to_quality, curves_of, read_facts
    from maskdm.report import plot_quality
    from maskdm.training.monitor import read_metrics

    lines = {name: read_metrics(file) for name, file in named.items()}
    facts = {name: read_facts(file.parent) for name, file in named.items()}
    y = choose_quality(lines, y)
    curves, notes = curves_of(lines, facts, x, y)
    goal, reached = costs_to_quality(curves, target)
    plot_quality(curves, x, y, goal, path)
    if json_output:
        told = {
            "x": x,
            "y": y,
            "target": goal,
            "curves": {
                curve.name: {
                    "x": curve.cost.tolist(),
                    "y": curve.quality.tolist(),
                    "error": None if curve.error is None else curve.error.tolist(),
                    "stages": curve.stages,
                    "retrainings": curve.group,
                }
                for curve in curves
            },
            "reached": [dataclasses.asdict(one) for one in reached],
            "notes": notes,
            "figure": str(path),
        }
        print(json.dumps(told))
        return DONE
    print(reached_text(reached, goal, target is not None, x, y))
    print("\n".join([*notes_text(notes), f"-> {path}"]))
    return DONE


def _evaluation_file(run: str) -> Path:
    """The file of a run's evaluations. Raises ValueError where there is none."""
    path = Path(run)
    if path.is_dir():
        file = path / "evaluation.json"
    elif "@" in path.name and not path.exists():
        folder, stage = run.rsplit("@", 1)
        file = Path(folder) / f"evaluation-{stage}.json"
    elif path.suffix == ".json":
        file = path
    else:
        missing = "" if path.exists() else " (it does not exist)"
        raise ValueError(f"{run} is no run's folder, RUN@STAGE or .json of evaluations{missing}")
    if not file.is_file():
        raise ValueError(f"{run} has no evaluation yet ({file}): run maskdm evaluate {run}")
    return file


def _quality_file(run: str) -> Path:
    """The file of a run's qualities while training. Raises ValueError where there is none."""
    path = Path(run)
    file = path / "quality.jsonl" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ValueError(
            f"{run} has no quality.jsonl: no quality was measured in its training (evaluate_every)"
        )
    if not file.is_file() or file.suffix != ".jsonl":
        raise ValueError(
            f"{run} is no run's folder"
            + (": curves are of whole runs (RUN/quality.jsonl)" * path.exists())
            + (" (it does not exist)" * (not path.exists()))
        )
    return file


def _named(runs: Sequence[str], files: Sequence[Path]) -> dict[str, Path]:
    """The files by short names of their runs. Raises ValueError where one comes twice."""
    from maskdm.evaluation.retrainings import short_names

    given: dict[Path, str] = {}
    for run, file in zip(runs, files, strict=True):
        if other := given.get(file.resolve()):
            raise ValueError(f"{other} and {run} are the same run: name each once")
        given[file.resolve()] = run
    return dict(zip(short_names([_place(file) for file in given]), given, strict=True))


def _place(file: Path) -> Path:
    """A path that ends in what the run is called: RUN, or RUN@STAGE."""
    kind, _, stage = file.stem.partition("-")
    if kind not in ("evaluation", "quality"):
        return file.with_suffix("")
    return file.parent.with_name(file.parent.name + (f"@{stage}" if stage else ""))
