"""Evaluations side by side: which is better, and which differences are within the noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from maskdm.evaluation.comparable import RecordsOfRuns, comparable, how_drawn, notes_of_differences
from maskdm.evaluation.measure import NORMAL_95, Measured
from maskdm.evaluation.records import Record
from maskdm.evaluation.retrainings import Training, measured_in_all, retrainings, training_of_recipe
from maskdm.metrics import METRICS, Metric
from maskdm.words import listed

MOST_IN_PAIRS = 3  # up to so many runs, all pairs are compared; of more, each with the best
ROUNDING = 1e-12  # relative: values that scatter by less are equal
ONE_TRAINING = "retraining with another seed alone moves FID by 1-2 %; a claim needs three seeds"


@dataclass(frozen=True)
class Difference:
    """A difference in one metric between two runs, or two groups of retrainings."""

    metric: str  # its name in the records
    first: str
    second: str
    value: float  # the first's minus the second's
    half: float | None  # half of its 95 % interval; None where an error is unknown

    @property
    def is_real(self) -> bool | None:
        """Whether zero lies outside the interval; None without an interval."""
        return None if self.half is None else abs(self.value) > self.half

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        lowest, highest = metric_of(self.metric).limits
        half = math.nan if self.half is None else self.half
        both = Measured(self.value, ends=(self.value - half, self.value + half))
        ends = None if self.half is None else both.interval((lowest - highest, highest - lowest))
        named = {"metric": self.metric, "first": self.first, "second": self.second}
        return {**named, "difference": self.value, "interval": ends, "is_real": self.is_real}


@dataclass(frozen=True)
class Comparison:
    """Comparable evaluations, and their differences."""

    records: dict[str, Record]  # by name of the run
    metrics: tuple[str, ...]  # those in all of the records
    groups: dict[str, tuple[str, ...]]  # two or more retrainings of one recipe, by name
    notes: tuple[str, ...]  # what a reader should know

    def figures(self, metric: str) -> dict[str, Measured]:
        """A metric for every run."""
        figures = {run: record["metrics"][metric] for run, record in self.records.items()}
        return {
            run: Measured(
                one["value"], one.get("error"), one.get("spread"), ends=one.get("interval")
            )
            for run, one in figures.items()
        }

    def values(self, metric: str, group: str) -> list[float]:
        """A metric's values for retrainings."""
        return [self.figures(metric)[run].value for run in self.groups[group]]

    def mean_and_deviation(self, metric: str, group: str) -> tuple[float, float]:
        """Mean and standard deviation of a metric over retrainings."""
        values = self.values(metric, group)
        return float(np.mean(values)), float(np.std(values, ddof=1))

    def best(self, metric: str) -> tuple[str, ...]:
        """The run with the best value, or those that share it."""
        values = {run: one.value for run, one in self.figures(metric).items()}
        best = values[_best(metric, values)]
        return tuple(run for run, value in values.items() if value == best)

    @property
    def differences(self) -> list[Difference]:
        """Those between runs, with errors over samples, which are independent between runs."""
        differences = []
        for metric in self.metrics:
            figures = self.figures(metric)
            for first, second in _pairs(metric, {run: one.value for run, one in figures.items()}):
                a, b = figures[first], figures[second]
                half = None
                if a.error is not None and b.error is not None:
                    half = NORMAL_95 * math.hypot(a.error, b.error)
                differences.append(Difference(metric, first, second, a.value - b.value, half))
        return differences

    @property
    def group_differences(self) -> list[Difference]:
        """Those between the means of groups, with errors over trainings."""
        differences = []
        for metric in self.metrics:
            values = {group: self.values(metric, group) for group in self.groups}
            means = {group: float(np.mean(each)) for group, each in values.items()}
            for first, second in _pairs(metric, means):
                welchs = welch(values[first], values[second])
                differences.append(Difference(metric, first, second, *welchs))
        return differences

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        runs: dict[str, Any] = {}
        for run, record in self.records.items():
            runs[run] = {
                "metrics": {
                    m: self.figures(m)[run].as_json(metric_of(m).limits) for m in self.metrics
                },
                "is_best": [m for m in self.metrics if run in self.best(m)],
                "retrainings": next((name for name, g in self.groups.items() if run in g), None),
                "training": record.get("training"),
                "samples": record["samples"],
                "date": record.get("date"),
            }
        groups: dict[str, Any] = {}
        for name, members in self.groups.items():
            spreads = {m: self.mean_and_deviation(m, name) for m in self.metrics}
            metrics = {m: {"mean": mean, "std": std} for m, (mean, std) in spreads.items()}
            groups[name] = {"runs": members, "metrics": metrics}
        first = next(iter(self.records.values()))
        return {
            "features": first["features"],
            "reference": first["reference"],
            "num": first["samples"]["num"],
            "runs": runs,
            "groups": groups,
            "differences": [one.as_json() for one in self.differences],
            "group_differences": [one.as_json() for one in self.group_differences],
            "notes": self.notes,
        }


def compare_records(
    records_of_runs: RecordsOfRuns, features: str | None = None, metric: str | None = None
) -> Comparison:
    """Compares the newest evaluations that are comparable.

    Args:
        records_of_runs: name of a run -> its records, the newest last; two runs or more.
        features: only evaluations in features of that name.
        metric: only this metric.

    Raises ValueError as `comparable` and `measured_in_all`.
    """
    records, older = comparable(records_of_runs, features)
    others = (m for record in records.values() for m in record["metrics"])
    every = list(dict.fromkeys([*METRICS, *others]))
    has = {run: [m for m in every if m in one["metrics"]] for run, one in records.items()}
    metrics = measured_in_all(has, metric)
    notes = notes_of_differences(records)
    for m in every if metric is None else []:
        lacking = [run for run in records if m not in has[run]]
        if 0 < len(lacking) < len(records):
            notes.append(f"{m} is left out: not measured for {listed(lacking)}")
    weights = {record["samples"].get("weights_sha256") for record in records.values()}
    is_one_model = len(weights) == 1 and None not in weights
    trainings = {run: _training(record) for run, record in records.items()}
    groups, alone = retrainings(trainings, None if is_one_model else ONE_TRAINING)
    notes += [
        *alone,
        *(note for one in records.values() for note in one.get("notes") or []),
        *older,
    ]
    several = {name: runs for name, runs in groups.items() if len(runs) > 1}
    return Comparison(records, metrics, several, tuple(dict.fromkeys(notes)))


def metric_of(name: str) -> Metric:
    """The row of a metric; a bare one for a name that only another installation knows."""
    return METRICS.get(name) or Metric(name, "", lambda compared: {})


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Difference of two means and half of its 95 % interval, by Welch's t.

    The variances of the two may differ. Each has two values or more.
    """
    difference = float(np.mean(first) - np.mean(second))
    a, b = (float(np.var(values, ddof=1)) / len(values) for values in (first, second))
    rounding = ROUNDING * max(map(abs, [*first, *second]))
    if a + b <= rounding**2:
        return difference if abs(difference) > rounding else 0.0, 0.0
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    return difference, float(stdtrit(freedom, 0.975)) * math.sqrt(a + b)


def _training(record: Record) -> Training | None:
    """What a record's model is: a recipe's, at a step, with a way of sampling."""
    place = record.get("training") or {}
    how = [place.get("step"), place.get("stage"), how_drawn(record)]
    return training_of_recipe(record.get("recipe"), *how)


def _pairs(metric: str, values: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of a few names; for more, each with the best."""
    if len(values) <= MOST_IN_PAIRS:
        return list(itertools.combinations(values, 2))
    best = _best(metric, values)
    return [(name, best) for name in values if name != best]


def _best(metric: str, values: Mapping[str, float]) -> str:
    choose = max if metric_of(metric).higher_is_better else min
    return choose(values, key=lambda name: values[name])
