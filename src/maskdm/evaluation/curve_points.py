"""Points of curves from evaluations: what `maskdm evaluate RUN --curve` measured, by cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maskdm.evaluation.comparable import in_features, properties_of, shared
from maskdm.evaluation.records import Record
from maskdm.metrics import METRICS
from maskdm.runs.lines import Line


def points_of(
    records_of_runs: Mapping[str, Sequence[Record]], metric: str, features: str | None = None
) -> dict[str, list[Line]]:
    """For each run the points of a metric, by cost, as lines that `curves_of` takes.

    All were measured alike: in the same features, on as many samples, drawn in the same way,
    against the same images. Where runs share several ways, that with the most points counts.

    Args:
        records_of_runs: name of a run -> its evaluations, the newest last.
        metric: one of `METRICS`.
        features: only evaluations in these; None = any.

    Raises ValueError where a run has none whose cost is known, or they have no way in common.
    """
    usable = {}
    for run, records in records_of_runs.items():
        known = in_features(run, records, features)
        usable[run] = [one for one in known if metric in one["metrics"] and one.get("training")]
        if not usable[run]:
            raise ValueError(
                f"{run} has no evaluation with {metric} at a known cost: run maskdm evaluate {run} "
                "--curve"
            )
    ways = shared(usable, lambda record: [properties_of(record), _how_drawn(record)])
    if not ways:
        raise ValueError(
            "these runs were not evaluated alike (features, number of samples, reference, "
            "sampling): run maskdm evaluate RUN --curve with the same flags for each"
        )
    chosen = max(ways, key=lambda way: min(len(_steps(records)) for records in way.values()))
    return {run: _lines(chosen[run], metric) for run in records_of_runs}


def title_of(metric: str, lines: Mapping[str, Sequence[Line]]) -> str:
    """A metric's name in print, in the features of these points: `FID`."""
    first = next(iter(lines.values()))[0]
    return METRICS[metric].title_in(str(first.get("features", "")))


def _lines(records: Sequence[Record], metric: str) -> list[Line]:
    lines: dict[int, Line] = {}
    for record in records:  # the newest last, which wins
        figure, features = record["metrics"][metric], record["features"]
        lines[record["training"]["step"]] = {
            **record["training"],
            metric: figure["value"],
            f"{metric}_error": figure.get("error"),
            "num": record["samples"]["num"],
            "features": features["name"],
            "features_sha256": features["sha256"],
        }
    return [lines[step] for step in sorted(lines)]


def _steps(records: Sequence[Record]) -> set[int]:
    return {record["training"]["step"] for record in records}


def _how_drawn(record: Record) -> list[Any]:
    """What must be equal within a curve, besides what makes records comparable."""
    samples = record["samples"]
    return [samples.get(name) for name in ("sampling", "seeds", "ema")]
