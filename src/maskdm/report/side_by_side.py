"""Several runs in one report: what differs between them, and what that did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskdm.evaluation.compare import Comparison, compare_records, metric_of
from maskdm.evaluation.curves import Curve, curves_of, read_facts
from maskdm.evaluation.measure import NORMAL_95
from maskdm.metrics import METRICS, qualities
from maskdm.recipe_files import differences
from maskdm.report.charts import Chart, Series, draw_chart
from maskdm.report.facts import UNKNOWN, Run
from maskdm.report.judgement import direction
from maskdm.words import COSTS, decimals_of, figure, fixed, with_error


def fact_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """State and costs of each run, and the settings in which they differ: titles and cells."""
    rows = [("state", [run.state for run in runs])]
    for cost in COSTS.values():
        texts = [
            cost.text(run.spent[cost.key]) if cost.key in run.spent else UNKNOWN for run in runs
        ]
        rows.append((cost.title, texts))
    if any(run.plan for run in runs):
        nums = [f"{run.plan['num_params']:,}" if run.plan else UNKNOWN for run in runs]
        rows.append(("parameters", nums))
    first, *others = runs
    changed = [
        {one.name: one.now for one in differences(first.recipe, run.recipe)} for run in others
    ]
    own = {one.name: one.before for run in others for one in differences(first.recipe, run.recipe)}
    for name, value in own.items():
        cells = [value, *(one.get(name, value) for one in changed)]
        rows.append((name, [_setting(cell) for cell in cells]))
    return rows


def quality_charts(runs: Sequence[Run]) -> tuple[list[Chart], list[str]]:
    """The qualities that all runs measured, a line for each run; and what a reader should know."""
    charts, notes = list[Chart | None](), list[str]()
    lines = {run.name: run.qualities for run in runs}
    facts = {run.name: read_facts(run.folder) for run in runs}
    for name in qualities():
        if not all(any(name in line for line in of_run) for of_run in lines.values()):
            continue
        try:
            curves = {x: curves_of(lines, facts, x, name) for x in COSTS}
        except ValueError as error:
            notes.append(str(error))
            continue
        by_x = {x: found for x, (found, _) in curves.items()}
        notes += [note for _, of_x in curves.values() for note in of_x]
        series = [_series([by_x[x][number] for x in COSTS], number) for number in range(len(runs))]
        row = METRICS[name]
        title = f"{row.title[0].upper()}{row.title[1:]}"
        charts.append(draw_chart(title, series, (), direction(name), row.unit))
    return [chart for chart in charts if chart is not None], list(dict.fromkeys(notes))


def metric_table(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The newest comparable evaluations: `title`, `rows`, `differences` and `notes`.

    None where fewer than two runs have been evaluated. Where evaluations are not comparable, there
    are no rows, and a note says why.
    """
    records = {run.name: run.records for run in runs if run.records}
    if len(records) < 2:
        return None
    try:
        found = compare_records(records)
    except ValueError as error:
        return {"title": "", "runs": [], "rows": [], "differences": [], "notes": [str(error)]}
    first = next(iter(found.records.values()))
    features = first["features"]["name"]
    title = f"{first['samples']['num']:,} samples of each run, features {features}, against "
    title += first["reference"]["source"]
    rows = [_metric_row(found, metric, features) for metric in found.metrics]
    lacking = [run.name for run in runs if run.name not in records]
    notes = [f"{name} has not been evaluated" for name in lacking]
    return {
        "title": title,
        "runs": list(found.records),
        "rows": rows,
        "differences": _differences(found, features),
        "notes": [*notes, *found.notes],
    }


def _series(curves: Sequence[Curve], number: int) -> Series:
    """A run's line from its curves over each of the costs."""
    costs = {x: curve.cost.tolist() for x, curve in zip(COSTS, curves, strict=True)}
    errors = None if curves[0].error is None else curves[0].error.tolist()
    return Series(curves[0].name, costs, curves[0].quality.tolist(), errors, number)


def _metric_row(found: Comparison, metric: str, features: str) -> dict[str, Any]:
    figures, best = found.figures(metric), found.best(metric)
    halves = [one.error and NORMAL_95 * one.error for one in figures.values()]
    digits = decimals_of(half for half in halves if half)
    cells = [
        {"text": _plus_minus(one.value, half, digits), "is_best": run in best}
        for (run, one), half in zip(figures.items(), halves, strict=True)
    ]
    return {"title": metric_of(metric).heading_in(features), "cells": cells}


def _differences(found: Comparison, features: str) -> list[str]:
    """A sentence for each difference: which run is better, and whether that is more than noise."""
    sentences = []
    for one in found.differences:
        row = metric_of(one.metric)
        heading = row.heading_in(features)
        worse = (one.value > 0) != row.higher_is_better
        better, other = (one.second, one.first) if worse else (one.first, one.second)
        by = _plus_minus(abs(one.value), one.half, decimals_of([one.half] if one.half else []))
        if one.is_real is None:
            sentences.append(f"{heading}: {one.first} and {one.second} differ by {by}.")
        elif one.is_real:
            sentences.append(f"{heading}: {better} is better than {other} by {by}.")
        else:
            sentences.append(f"{heading}: {one.first} and {one.second} differ by less than noise.")
    return sentences


def _plus_minus(value: float, half: float | None, digits: int | None) -> str:
    if half is None:
        return figure(value) if digits is None else fixed(value, digits)
    return with_error(value, half, digits).replace("+-", "±")


def _setting(value: Any) -> str:
    return UNKNOWN if value is None else str(value)
