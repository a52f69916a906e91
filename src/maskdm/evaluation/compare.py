"""Evaluations side by side: what is better, and which differences are within the noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from maskdm.evaluation.comparable import RecordsOfRuns, comparable, how_drawn, unlike_notes
from maskdm.evaluation.distances import NORMAL_95, Measured
from maskdm.evaluation.records import Record
from maskdm.evaluation.retrainings import (
    Training,
    group_names,
    retrainings,
    training_of_recipe,
)

METRICS = ("frechet", "kid", "sliced", "precision", "recall", "inception_score")  # columns' order
HIGHER_IS_BETTER = ("precision", "recall", "inception_score")
MOST_IN_PAIRS = 3  # up to so many, all pairs are told; of more, each against the best
ROUNDING = 1e-12  # relative: values that scatter by less are equal
ONE_TRAINING = "retraining with another seed alone moves FID by 1-2 %; a claim needs three seeds"


@dataclass(frozen=True)
class Difference:
    """A difference of one metric between two runs, or two groups of retrainings.

    Attributes:
        metric: its name in the records.
        first, second: names of the two.
        value: the first's minus the second's.
        half: half of its 95 % interval; None where an error is unknown.
    """

    metric: str
    first: str
    second: str
    value: float
    half: float | None

    @property
    def is_real(self) -> bool | None:
        """Whether zero lies outside the interval; None where there is none."""
        return None if self.half is None else abs(self.value) > self.half


@dataclass(frozen=True)
class Retrainings:
    """Two or more trainings of one recipe by different seeds.

    Attributes:
        name: what they are called together.
        runs: their names.
        values: metric -> value of each.
    """

    name: str
    runs: tuple[str, ...]
    values: dict[str, tuple[float, ...]]

    def mean_and_deviation(self, metric: str) -> tuple[float, float]:
        """Mean and standard deviation of a metric over the trainings."""
        values = self.values[metric]
        return float(np.mean(values)), float(np.std(values, ddof=1))


@dataclass(frozen=True)
class Comparison:
    """Evaluations that compare, and what can be said of their differences.

    Attributes:
        records: name of a run -> its record.
        metrics: those in all of the records.
        groups: retrainings of one recipe.
        differences: between runs, by their errors over samples.
        group_differences: between groups, by the scatter over trainings.
        notes: what a reader should know.
    """

    records: dict[str, Record]
    metrics: tuple[str, ...]
    groups: tuple[Retrainings, ...]
    differences: tuple[Difference, ...]
    group_differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def figures(self, metric: str) -> dict[str, Measured]:
        """A metric of every run."""
        return {run: _figure(record, metric) for run, record in self.records.items()}

    def best(self, metric: str) -> tuple[str, ...]:
        """The run with the best value, or those that share it."""
        values = {run: one.value for run, one in self.figures(metric).items()}
        return tuple(run for run in values if values[run] == values[_best(metric, values)])

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        of_run = {run: group.name for group in self.groups for run in group.runs}
        told = {}
        for run, record in self.records.items():
            figures = {m: _figure(record, m) for m in self.metrics}
            told[run] = {
                "metrics": {
                    m: {"value": one.value, "error": one.error, "interval": one.interval}
                    for m, one in figures.items()
                },
                "is_best": [m for m in self.metrics if run in self.best(m)],
                "retrainings": of_run.get(run),
                "training": record.get("training"),
                "samples": record["samples"],
                "date": record.get("date"),
            }
        first = next(iter(self.records.values()))
        groups = {}
        for group in self.groups:
            scattered = {m: group.mean_and_deviation(m) for m in self.metrics}
            groups[group.name] = {
                "runs": list(group.runs),
                "metrics": {m: {"mean": a, "std": b} for m, (a, b) in scattered.items()},
            }
        return {
            "features": first["features"],
            "reference": first["reference"],
            "num": first["samples"]["num"],
            "runs": told,
            "groups": groups,
            "differences": [_difference_json(one) for one in self.differences],
            "group_differences": [_difference_json(one) for one in self.group_differences],
            "notes": list(self.notes),
        }


def compare_records(
    found: RecordsOfRuns, features: str | None = None, metric: str | None = None
) -> Comparison:
    """Compares the newest evaluations that are alike.

    Args:
        found: name of a run -> its records, the newest last; two runs or more.
        features: only evaluations in features of that name.
        metric: only this metric.

    Raises:
        ValueError: a run has no (such) records, none compare between all runs, or no metric is in
            all of them.
    """
    records, older = comparable(found, features)
    metrics, left_out = _common_metrics(records, metric)
    names = list(records)
    sorted_runs, same_seed = retrainings([_training(record) for record in records.values()])
    groups = tuple(
        Retrainings(
            name,
            tuple(names[i] for i in group),
            {m: tuple(_figure(records[names[i]], m).value for i in group) for m in metrics},
        )
        for name, group in zip(group_names(names, sorted_runs), sorted_runs, strict=True)
        if len(group) > 1
    )
    alone = [names[group[0]] for group in sorted_runs if len(group) == 1]
    notes = [
        *unlike_notes(records),
        *left_out,
        *_training_notes(records, alone, [(names[i], names[j]) for i, j in same_seed]),
        *(note for record in records.values() for note in record.get("notes") or []),
        *older,
    ]
    return Comparison(
        records,
        metrics,
        groups,
        tuple(one for m in metrics for one in _between_runs(m, records)),
        tuple(one for m in metrics for one in _between_groups(m, groups)),
        tuple(dict.fromkeys(notes)),
    )


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Difference of two means and half of its 95 % interval, by Welch's t.

    The two may scatter differently. Each holds two values or more.
    """
    difference = float(np.mean(first) - np.mean(second))
    a, b = (float(np.var(values, ddof=1)) / len(values) for values in (first, second))
    if a + b <= (ROUNDING * max(map(abs, [*first, *second]))) ** 2:
        return difference, 0.0
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    return difference, float(stdtrit(freedom, 0.975)) * math.sqrt(a + b)


def _common_metrics(
    records: Mapping[str, Record], wanted: str | None
) -> tuple[tuple[str, ...], list[str]]:
    """Metrics that all records have, in the columns' order; notes of those that some have."""
    has = {run: record["metrics"] for run, record in records.items()}
    every = list(dict.fromkeys([*METRICS, *(m for one in has.values() for m in one)]))
    common = [m for m in every if all(m in one for one in has.values())]
    if wanted is not None and wanted not in common:
        lacking = [run for run, one in has.items() if wanted not in one]
        raise ValueError(
            f"--metric {wanted} is not in the evaluation of {', '.join(lacking)}: all have "
            f"{', '.join(common) or 'none'}"
        )
    if not common:
        told = "; ".join(f"{run}: {', '.join(one) or 'none'}" for run, one in has.items())
        raise ValueError(f"no metric was measured on all of these runs ({told})")
    if wanted is not None:
        return (wanted,), []
    notes = []
    for m in every:
        lacking = [run for run, one in has.items() if m not in one]
        if 0 < len(lacking) < len(has):
            notes.append(f"{m} is left out: not measured on {', '.join(lacking)}")
    return tuple(common), notes


def _training(record: Record) -> Training | None:
    """What a record's model was trained as: by its recipe, up to its step, drawn in its way."""
    place = record.get("training") or {}
    how = [place.get("step"), place.get("stage"), how_drawn(record)]
    return training_of_recipe(record.get("recipe"), *how)


def _training_notes(
    records: Mapping[str, Record], alone: Sequence[str], same_seed: Sequence[tuple[str, str]]
) -> list[str]:
    notes = [
        f"{run} has the recipe and the seed of {other}: it isn't counted as a retraining"
        for run, other in same_seed
    ]
    weights = [record["samples"].get("weights_sha256") for record in records.values()]
    is_one_model = None not in weights and len(set(weights)) == 1
    if alone and not is_one_model:
        whose = "each" if len(alone) == len(records) else f"only of {', '.join(alone)}"
        notes.append(f"one training {whose}: {ONE_TRAINING}")
    return notes


def _between_runs(metric: str, records: Mapping[str, Record]) -> list[Difference]:
    """Differences by the errors over samples, which are independent between runs."""
    figures = {run: _figure(record, metric) for run, record in records.items()}
    told = []
    for first, second in _pairs(metric, {run: one.value for run, one in figures.items()}):
        a, b = figures[first], figures[second]
        half = None
        if a.error is not None and b.error is not None:
            half = NORMAL_95 * math.hypot(a.error, b.error)
        told.append(Difference(metric, first, second, a.value - b.value, half))
    return told


def _between_groups(metric: str, groups: Sequence[Retrainings]) -> list[Difference]:
    values = {group.name: group.values[metric] for group in groups}
    means = {name: float(np.mean(of_group)) for name, of_group in values.items()}
    return [
        Difference(metric, first, second, *welch(values[first], values[second]))
        for first, second in _pairs(metric, means)
    ]


def _pairs(metric: str, values: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of a few names; of more, each against the best."""
    names = list(values)
    if len(names) <= MOST_IN_PAIRS:
        return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    best = _best(metric, values)
    return [(name, best) for name in names if name != best]


def _best(metric: str, values: Mapping[str, float]) -> str:
    choose = max if metric in HIGHER_IS_BETTER else min
    return choose(values, key=lambda name: values[name])


def _figure(record: Record, metric: str) -> Measured:
    told = record["metrics"][metric]
    return Measured(told["value"], told["error"])


def _difference_json(one: Difference) -> dict[str, Any]:
    interval = None if one.half is None else [one.value - one.half, one.value + one.half]
    return {
        "metric": one.metric,
        "first": one.first,
        "second": one.second,
        "difference": one.value,
        "interval": interval,
        "is_real": one.is_real,
    }
