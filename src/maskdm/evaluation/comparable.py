"""Which records of evaluations compare, and in what the others differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from maskdm.evaluation.records import Record
from maskdm.recipe import Sampling

SHA_SHOWN = 12  # digits
RecordsOfRuns = Mapping[str, Sequence[Record]]


def comparable(
    found: RecordsOfRuns, features: str | None = None
) -> tuple[dict[str, Record], list[str]]:
    """The newest set of records, one of each run, of equal features, samples' number, reference.

    Of several records of a run that would do, one is taken that was drawn as the other runs'
    were, where there is one, else the newest.

    Args:
        found: name of a run -> its records, the newest last.
        features: only records of features of that name.

    Returns:
        Name of a run -> its record; notes of older sets that could have been compared.

    Raises:
        ValueError: a run has no records, or none that compares; it says what differs.
    """
    named = {name: _in_features(name, records, features) for name, records in found.items()}
    alike = _shared(named, lambda record: _text(list(_properties(record).values())))
    if not alike:
        raise ValueError(_refusal(named))
    sets = []
    for same in alike:
        drawn_alike = _shared(same, lambda record: _text(how_drawn(record)))
        newest = [{name: rs[-1] for name, rs in one.items()} for one in drawn_alike or [same]]
        sets.append(max(newest, key=_dates))
    sets.sort(key=_dates)
    notes = []
    for other in reversed(sets[:-1]):
        record = next(iter(other.values()))
        notes.append(
            f"comparable too, but older: features {record['features']['name']}, "
            f"{record['samples']['num']:,} samples, against {record['reference']['source']}"
        )
    return sets[-1], notes


def how_drawn(record: Record) -> dict[str, Any]:
    """How samples were drawn from their model, which may differ, but should be said.

    Empty where it is unknown.
    """
    samples = record["samples"]
    if not samples.get("sampling"):  # images of any origin
        return {}
    return {
        **{k: v for k, v in samples["sampling"].items() if k not in Sampling.HOW_FAST},
        "weights": samples.get("weights"),
        "precision": samples.get("precision"),
        "weak model": samples.get("weak_sha256") or "none",
    }


def unlike_notes(records: Mapping[str, Record]) -> list[str]:
    """Notes of what differs between records that compare: sampling, versions of the metrics."""
    notes, unlike = [], []
    drawn = {run: how for run, record in records.items() if (how := how_drawn(record))}
    for name in dict.fromkeys(name for one in drawn.values() for name in one):
        values = {run: _plain(one.get(name)) for run, one in drawn.items()}
        if len(set(values.values())) > 1:
            unlike.append(f"{name} {_who(values)}")
    if unlike:
        notes.append(
            f"other sampling: {'; '.join(unlike)}: differences are of models and sampling together"
        )
    if unknown := [run for run in records if run not in drawn]:
        notes.append(f"how the images of {', '.join(unknown)} were drawn is unknown")
    for name in dict.fromkeys(name for record in records.values() for name in record["metrics"]):
        versions = {
            run: str(record["metrics"][name]["library"])
            for run, record in records.items()
            if record["metrics"].get(name, {}).get("library")
        }
        if len(set(versions.values())) > 1:
            notes.append(f"{name} was measured by {_who(versions)}")
    return notes


def _in_features(run: str, records: Sequence[Record], features: str | None) -> list[Record]:
    """A run's records in features of that name. Raises ValueError where there are none."""
    named = [record for record in records if features in (None, record["features"]["name"])]
    if named:
        return named
    if not records:
        raise ValueError(f"{run} has no evaluation yet: run maskdm evaluate on it")
    has = dict.fromkeys(record["features"]["name"] for record in records)
    raise ValueError(
        f"{run} has no evaluation in features {features}, but in {', '.join(has)}: run maskdm "
        f"evaluate on it with --features {features}"
    )


def _shared(found: RecordsOfRuns, key: Callable[[Record], str]) -> list[dict[str, list[Record]]]:
    """The records for each key that all runs have."""
    keys = [{key(record) for record in records} for records in found.values()]
    return [
        {run: [r for r in records if key(r) == wanted] for run, records in found.items()}
        for wanted in sorted(set.intersection(*keys))
    ]


def _properties(record: Record) -> dict[str, Any]:
    """What must be equal for the figures of two records to compare."""
    reference = record["reference"]
    if reference.get("sha256"):
        images: Any = reference["sha256"]  # of the prepared pixels: cut and shape are in it
    else:
        origin = reference.get("fingerprint") or reference["source"]
        images = [origin, reference.get("crop"), reference.get("shape")]
    return {
        "features": record["features"]["sha256"],
        "number of samples": record["samples"]["num"],
        "reference": images,
    }


def _refusal(found: RecordsOfRuns) -> str:
    """Which properties differ between which runs, told of the records that are most alike."""

    def likeness(record: Record, wanted: dict[str, Any]) -> int:
        own = _properties(record)
        return sum(own[name] == wanted[name] for name in own)

    def nearest(wanted: dict[str, Any]) -> dict[str, Record]:
        return {
            run: max(reversed(records), key=lambda record: likeness(record, wanted))
            for run, records in found.items()
        }

    every = [_properties(record) for records in found.values() for record in reversed(records)]
    wanted = max(every, key=lambda one: sum(likeness(r, one) for r in nearest(one).values()))
    records = nearest(wanted)
    told = []
    for name in wanted:
        if len({_text(_properties(record)[name]) for record in records.values()}) > 1:
            told.append(f"{name}: {_who(_shown(name, records))}")
    return (
        f"these evaluations don't compare, for they differ in {'; in '.join(told)}. Run maskdm "
        "evaluate on all of them with the same --features, --num and --reference"
    )


def _shown(name: str, records: Mapping[str, Record]) -> dict[str, str]:
    """A property in which runs differ, as people know it: name of a run -> what it has."""
    if name == "number of samples":
        return {run: f"{record['samples']['num']:,}" for run, record in records.items()}
    if name == "features":
        features = {run: record["features"] for run, record in records.items()}
        shown = {run: str(one["name"]) for run, one in features.items()}
        if len(set(shown.values())) == len({one["sha256"] for one in features.values()}):
            return shown
        return {run: f"{shown[run]} {one['sha256'][:SHA_SHOWN]}" for run, one in features.items()}
    facts = {run: _reference_facts(record) for run, record in records.items()}
    names = list(next(iter(facts.values())))
    unlike = [one for one in names if len({of_run[one] for of_run in facts.values()}) > 1]
    return {run: ", ".join(f"{one} {facts[run][one]}" for one in unlike) for run in facts}


def _reference_facts(record: Record) -> dict[str, str]:
    reference = record["reference"]
    identity = reference.get("sha256") or reference.get("fingerprint") or "unknown"
    return {
        "source": str(reference["source"]),
        "num": _plain(reference.get("num")),
        "shape": "x".join(map(str, reference.get("shape") or ["unknown"])),
        "crop": _plain(reference.get("crop")),
        "fingerprint": identity[:SHA_SHOWN],
    }


def _who(shown: Mapping[str, str]) -> str:
    """`pca (a, b), inception (c)`."""
    by_value: dict[str, list[str]] = {}
    for run, value in shown.items():
        by_value.setdefault(value, []).append(run)
    return ", ".join(f"{value} ({', '.join(runs)})" for value, runs in by_value.items())


def _plain(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a SHA-256
        return value[:SHA_SHOWN]
    return "unknown" if value is None else f"{value:,}" if type(value) is int else str(value)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _dates(records: Mapping[str, Record]) -> tuple[datetime, datetime]:
    """When the newest and the oldest of a set were measured."""
    dates = [_date(record) for record in records.values()]
    return max(dates), min(dates)


def _date(record: Record) -> datetime:
    """When a record was measured; long ago where it doesn't say."""
    try:
        return datetime.strptime(record["date"], "%Y-%m-%d %H:%M:%S %z")
    except (KeyError, TypeError, ValueError):
        return datetime.min.replace(tzinfo=timezone.utc)
