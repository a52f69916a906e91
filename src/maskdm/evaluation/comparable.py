"""Which records of evaluations are comparable, and in what the others differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from maskdm.evaluation.records import Record, most_telling_last
from maskdm.recipe import Sampling
from maskdm.words import listed

SHA_SHOWN = 12  # digits
LONG_AGO = "0001-01-01 00:00:00 +0000"
RecordsOfRuns = Mapping[str, Sequence[Record]]


def comparable(
    records_of_runs: RecordsOfRuns, features: str | None = None
) -> tuple[dict[str, Record], list[str]]:
    """The newest comparable records by run, and notes about older sets that are comparable, too.

    Records are comparable if features, number of samples and reference are equal. If a run has
    several, one whose samples were drawn in the same way as the other runs' is preferred, then one
    of its own model (not of a sweep's or a curve's averages), then the newest.

    Args:
        records_of_runs: name of a run -> its records, the newest last.
        features: only records in features of that name.

    Raises ValueError where there are none; it says what differs, or that a run has no records.
    """
    named = {
        run: in_features(run, most_telling_last(rs), features)
        for run, rs in records_of_runs.items()
    }
    sets = []
    for equal in shared(named, properties_of):
        alike = shared(equal, how_drawn) or [equal]
        sets.append(max(({run: rs[-1] for run, rs in one.items()} for one in alike), key=_dates))
    if not sets:
        raise ValueError(_refusal({run: rs[-1] for run, rs in named.items()}))
    *older, newest = sorted(sets, key=_dates)
    notes = []
    for one in reversed(older):
        record = next(iter(one.values()))
        notes.append(
            f"older evaluations are comparable, too: features {record['features']['name']}, "
            f"{record['samples']['num']:,} samples, against {record['reference']['source']}"
        )
    return newest, notes


def how_drawn(record: Record) -> dict[str, Any]:
    """How samples were drawn, empty where unknown: differences are allowed, but noted."""
    samples = record["samples"]
    if not samples.get("sampling"):  # images of any origin
        return {}
    how = {k: v for k, v in samples["sampling"].items() if k not in Sampling.HOW_FAST}
    guidance, weak = how.pop("guidance", {}), samples.get("weak_sha256")
    if weak and guidance.get("weak") == "primer":  # each training has another
        weak = "its primer"
    if guidance.get("kind") == "none":
        guidance = {"kind": "none"}  # the other settings have no effect
    return {
        **how,
        **{f"guidance.{name}": value for name, value in guidance.items()},
        "weights": samples.get("weights"),
        "precision": samples.get("precision"),
        "average": samples.get("ema") or "its own",
        "weak model": weak or "none",
    }


def notes_of_differences(records: Mapping[str, Record]) -> list[str]:
    """Notes about differences between comparable records: in sampling, in the metrics' versions."""
    notes = []
    drawn = {run: how for run, record in records.items() if (how := how_drawn(record))}
    if differences := differing_in(drawn):
        notes.append(
            f"sampling differs: {'; '.join(differences)}; figures differ by model and sampling "
            "together"
        )
    if unknown := [run for run in records if run not in drawn]:
        notes.append(f"how the images of {listed(unknown)} were drawn is unknown")
    for name in dict.fromkeys(name for record in records.values() for name in record["metrics"]):
        figures = {run: record["metrics"].get(name, {}) for run, record in records.items()}
        libraries = {run: one["library"] for run, one in figures.items() if one.get("library")}
        if text := differing(libraries):
            notes.append(f"{name} was computed by {text}")
    return notes


def differing(values: Mapping[str, Any]) -> str:
    """Different values of runs, `pca (a, b), inception (c)`; empty where all are equal."""
    by_value: dict[str, list[str]] = {}
    for run, value in values.items():
        if isinstance(value, str) and len(value) == 64:  # a SHA-256
            value = value[:SHA_SHOWN]
        words = "unknown" if value is None else f"{value:,}" if type(value) is int else str(value)
        by_value.setdefault(words, []).append(run)
    if len(by_value) < 2:
        return ""
    return ", ".join(f"{value} ({', '.join(runs)})" for value, runs in by_value.items())


def differing_in(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`steps 10 (a), 50 (b)` for each fact in which those runs differ that have it."""
    texts = {}
    for name in dict.fromkeys(name for one in facts.values() for name in one):
        texts[name] = differing({run: one[name] for run, one in facts.items() if name in one})
    return [f"{name} {text}" for name, text in texts.items() if text]


def in_features(run: str, records: Sequence[Record], features: str | None) -> list[Record]:
    """A run's records in features of that name. Raises ValueError if there are none."""
    named = [record for record in records if features in (None, record["features"]["name"])]
    if named:
        return named
    if not records:
        raise ValueError(f"{run} has not been evaluated yet: run maskdm evaluate on it")
    has = dict.fromkeys(record["features"]["name"] for record in records)
    raise ValueError(
        f"{run} has not been evaluated in features {features}, but in {', '.join(has)}: run "
        f"maskdm evaluate on it with --features {features}"
    )


def shared(
    records_of_runs: RecordsOfRuns, key: Callable[[Record], Any]
) -> list[dict[str, list[Record]]]:
    """The records for each key that all runs have."""
    keyed: dict[str, dict[str, list[Record]]] = {}
    for run, records in records_of_runs.items():
        for record in records:
            of_runs = keyed.setdefault(json.dumps(key(record), sort_keys=True), {})
            of_runs.setdefault(run, []).append(record)
    return [one for _, one in sorted(keyed.items()) if len(one) == len(records_of_runs)]


def properties_of(record: Record) -> list[Any]:
    """What must be equal for the figures of two records to be comparable."""
    reference = record["reference"]
    images = reference.get("sha256")  # the prepared pixels': it depends on crop and shape
    if not images:
        origin = reference.get("fingerprint") or reference["source"]
        images = [origin, reference.get("crop"), reference.get("shape")]
    return [record["features"]["sha256"], record["samples"]["num"], images]


def _refusal(newest: Mapping[str, Record]) -> str:
    """Says in what the newest records of runs differ."""
    features, nums, references = {}, {}, {}
    for run, record in newest.items():
        features[run] = f"{record['features']['name']} {record['features']['sha256'][:SHA_SHOWN]}"
        nums[run] = record["samples"]["num"]
        one = record["reference"]
        references[run] = {
            "source": one["source"],
            "num": one.get("num"),
            "shape": "x".join(map(str, one.get("shape") or ["unknown"])),
            "crop": one.get("crop"),
            "fingerprint": one.get("sha256") or one.get("fingerprint"),
        }
    images = [properties_of(record)[2] for record in newest.values()]
    parts = {"features": differing(features), "number of samples": differing(nums)}
    if any(one != images[0] for one in images):
        parts["reference"] = ", ".join(differing_in(references))
    differences = "; in ".join(f"{name}: {text}" for name, text in parts.items() if text)
    return (
        f"these evaluations are not comparable: the newest differ in {differences}. Run maskdm "
        "evaluate on all of them with the same --features, --num and --reference"
    )


def _dates(records: Mapping[str, Record]) -> list[datetime]:
    """When the records of a set were measured, the newest first; long ago where unknown."""
    dates = [record.get("date") or LONG_AGO for record in records.values()]
    return sorted((datetime.strptime(one, "%Y-%m-%d %H:%M:%S %z") for one in dates), reverse=True)
