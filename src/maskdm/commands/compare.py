"""`maskdm compare`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from maskdm.choices import helped, named
from maskdm.commands.common import DONE, JsonFlag, quiet
from maskdm.files import expanded, parsed_json, refuse_unwritable
from maskdm.metrics import METRICS, qualities
from maskdm.runs.find import CONTROL
from maskdm.words import COSTS, listed

Runs = Annotated[tuple[str, ...], tyro.conf.Positional, quiet(metavar="RUN RUN ...")]
FIGURES = {
    name: row for name, row in METRICS.items() if not row.is_report and "model" not in row.needs
}
MetricFlag = Annotated[
    str | None, quiet(metavar="METRIC", help=helped("Only this metric.", FIGURES))
]
CostFlag = Annotated[str | None, quiet(metavar=f"{{{','.join(COSTS)}}}")]
QualityFlag = Annotated[str | None, quiet(metavar=f"{{{','.join(qualities())}}}")]


def compare(
    runs: Runs,
    *,
    metric: MetricFlag = None,
    features: Annotated[str | None, quiet(metavar="NAME")] = None,
    x: CostFlag = None,
    y: QualityFlag = None,
    target: Annotated[float | None, quiet(metavar="FLOAT")] = None,
    out: Annotated[Path | None, quiet(metavar="PNG")] = None,
    json_output: JsonFlag = False,
) -> int:
    """Compare evaluations, and say which differences are within the noise.

    Without --x: a table of the newest comparable evaluations (which `maskdm evaluate` wrote into
    RUN/evaluation.json), and which of their differences are real. Trainings of one recipe with
    several seeds are grouped.

    With --x: curves of the quality measured in training (RUN/quality.jsonl) against its cost, and
    how many times less each run cost to be as good as the first. With --x and --metric: curves of
    that metric in the evaluations of averages that were kept (maskdm evaluate RUN --curve).

    Args:
        runs: run folders, RUN@STAGE, or files of evaluations; with --x the first is the baseline. A
            single run is compared with its control, which train --control has put beside it.
        features: only evaluations in these features.
        x: draw curves against images seen, FLOPs or time of training.
        y: quality of the curves in training; default: the first of these that all runs have.
        target: the quality to reach; default: the last of the first run.
        out: file for the curves; default: quality-against-X.png.
        json_output: print everything as JSON instead.
    """
    runs = with_control(runs)
    if x is None:
        flags = {"--y": y, "--target": target, "--out": out}
        if useless := [flag for flag, value in flags.items() if value is not None]:
            raise ValueError(f"{useless[0]} is for curves: add --x {listed(COSTS)}")
        result, text = _evaluations(runs, metric, features)
    else:
        named(x, COSTS, "cost")
        if metric is not None and y is not None:
            raise ValueError("--y is of the training, --metric of evaluations: give one of them")
        if features is not None and metric is None:
            raise ValueError("--features are of evaluations: add --metric, or leave out --x")
        out = out or Path(f"quality-against-{x}.png")
        result, text = _curves(runs, x, y, target, out, metric, features)
    print(json.dumps(result) if json_output else text)
    if x is None and not json_output and all(map(_has_curve, runs)):
        print(f"next      maskdm compare {shlex.join(runs)} --x flops")
    return DONE


def _has_curve(run: str) -> bool:
    """Whether quality was measured in a run's training."""
    return (expanded(run) / "quality.jsonl").is_file()


def with_control(runs: tuple[str, ...]) -> tuple[str, ...]:
    """A single run together with its dense control, where it lies beside it; the control first."""
    if len(runs) != 1 or not Path(runs[0]).is_dir():
        return runs
    run = Path(runs[0])
    if (name := _controlled_by(run)) is not None:
        of = run.with_name(name)
        return (str(run), str(of)) if of.is_dir() else runs
    beside = sorted(run.parent.glob(f"{run.name}-*"))
    controls = [str(path) for path in beside if _controlled_by(path) == run.name]
    return (*controls, str(run))


def _controlled_by(run: Path) -> str | None:
    """The name of the run whose control a run is; None = of none."""
    path = run / CONTROL
    try:
        return str(parsed_json(path.read_text("utf-8"))["of"]) if path.is_file() else None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: remove it, and name both runs") from None


def _evaluations(
    runs: Sequence[str], metric: str | None, features: str | None
) -> tuple[dict[str, Any], str]:
    """Compares evaluations; returns everything for machines, and the text for people."""
    if len(runs) < 2:
        raise ValueError("name two runs or more: maskdm compare RUN RUN ...")
    files = _by_name(runs, _evaluation_file)

    from maskdm.commands.compare_text import comparison_text
    from maskdm.evaluation.compare import compare_records
    from maskdm.evaluation.records import read_records

    records = {name: read_records(path) for name, path in files.items()}
    comparison = compare_records(records, features, metric.replace("-", "_") if metric else None)
    return comparison.as_json(), comparison_text(comparison)


def _curves(
    runs: Sequence[str],
    x: str,
    y: str | None,
    target: float | None,
    path: Path,
    metric: str | None,
    features: str | None,
) -> tuple[dict[str, Any], str]:
    """Compares costs and plots the curves; returns as `_evaluations` does."""
    if not runs:
        raise ValueError("name the runs, the baseline first: maskdm compare RUN RUN ... --x flops")
    metric = None if metric is None else metric.replace("-", "_")
    if metric is not None:
        named(metric, FIGURES, "metric")
    files = _by_name(runs, _quality_file if metric is None else _evaluation_file)
    if path.suffix not in (".png", ".pdf", ".svg") or path.is_dir():
        raise ValueError(f"--out {path}: name a file that ends in .png, .pdf or .svg")
    refuse_unwritable(path, "--out")

    from maskdm.commands.compare_text import notes_text, reached_text
    from maskdm.evaluation.curve_points import points_of, title_of
    from maskdm.evaluation.curves import choose_quality, costs_to_quality, curves_of, read_facts
    from maskdm.evaluation.records import read_records
    from maskdm.report.plots import plot_quality
    from maskdm.runs.lines import read_lines

    facts = {name: read_facts(file.parent) for name, file in files.items()}
    if metric is None:
        lines = {name: read_lines(file) for name, file in files.items()}
        y = title = choose_quality(lines, y.replace("-", "_") if y else None)
    else:
        records = {name: read_records(file) for name, file in files.items()}
        lines = points_of(records, metric, features)
        y, title = metric, title_of(metric, lines)
    curves, notes = curves_of(lines, facts, x, y, in_training=metric is None)
    goal, reached = costs_to_quality(curves, target)
    plot_quality(curves, x, y, goal, path, None if metric is None else title)
    result = {"x": x, "y": y, "target": goal, "notes": notes, "figure": str(path)}
    result["curves"] = {curve.name: curve.as_json() for curve in curves}
    result["reached"] = [dataclasses.asdict(one) for one in reached]
    text = reached_text(reached, goal, target is not None, x, title)
    return result, "\n".join([text, *notes_text(notes), f"-> {path}"])


def _evaluation_file(run: str) -> Path:
    """The file of a run's evaluations. Raises ValueError if there is none."""
    from maskdm.evaluation.records import records_file

    path = expanded(run)
    file = records_file(run) or (path if path.suffix == ".json" else None)
    if file is None:
        why = "" if path.exists() else " (it does not exist)"
        raise ValueError(f"{run} is not a run's folder, RUN@STAGE or a .json of evaluations{why}")
    if not file.is_file():
        raise ValueError(f"{run} has no evaluation yet ({file}): run maskdm evaluate {run}")
    return file


def _quality_file(run: str) -> Path:
    """The file of a run's qualities in training. Raises ValueError if there is none."""
    path = expanded(run)
    file = path / "quality.jsonl" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ValueError(
            f"{run} has no quality.jsonl: no quality was measured in its training (evaluate_every)"
        )
    if not file.is_file() or file.suffix != ".jsonl":
        whole = ": curves are of whole runs (RUN/quality.jsonl)"
        why = whole if path.exists() else " (it does not exist)"
        raise ValueError(f"{run} is not a run's folder{why}")
    return file


def _by_name(runs: Sequence[str], file_of: Callable[[str], Path]) -> dict[str, Path]:
    """The files by short names of their runs. Raises ValueError where one is given twice."""
    from maskdm.evaluation.retrainings import short_names

    run_of: dict[Path, str] = {}
    for run in runs:
        file = file_of(run).resolve()
        if file in run_of:
            raise ValueError(f"{run_of[file]} and {run} are the same run: name each once")
        run_of[file] = run
    return dict(zip(short_names([_place(file) for file in run_of]), run_of, strict=True))


def _place(file: Path) -> Path:
    """A path that ends in the run's name: RUN, or RUN@STAGE."""
    kind, _, stage = file.stem.partition("-")
    if kind not in ("evaluation", "quality"):
        return file.with_suffix("")
    return file.parent.with_name(file.parent.name + (f"@{stage}" if stage else ""))
