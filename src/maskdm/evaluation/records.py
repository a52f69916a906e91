"""The records of evaluations: what was measured, and all that the figures depend on.

RUN/evaluation.json is a list of records, the newest last; a new record takes in one with equal
samples, features and reference. A record contains:

    metrics     name -> value, error (a standard error over samples, or null), interval (95 %),
                spread (between subsets or seeds, or null), library
    per_seed    name -> value, for each repetition of the drawing
    chance      frechet: between two disjoint random parts of the reference, num images each
    features    name, sha256, library, dim
    samples     num, shape (H, W, C), seeds; from a model: model, weights (ema), weights_sha256,
                sampling, precision, and class_counts where classes are not drawn in turn;
                other images: source, fingerprint
    reference   source, fingerprint, crop, num, shape, flip (false)
    training    step, stage, images, flops, elapsed_sec of the model, where known
    recipe      the run's, whole, or null
    memorization    see `memorization.py`; null where it was not measured. So for every metric
                that is a report
    notes       what a reader should know
    maskdm, commit, torch, device, num_ranks, date, generate_sec, measure_sec (which includes
                reference_sec)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskdm.files import expanded, parsed_json, write_text
from maskdm.metrics import METRICS
from maskdm.recipe import Evaluation, Sampling
from maskdm.recipe_files import migrated
from maskdm.runs.find import KEPT

Record = dict[str, Any]
RECORDS = "evaluation.json"  # in a run's folder


def records_file(run: str) -> Path | None:
    """The file for the records of RUN or RUN@STAGE; None for names of other things.

    Those of RUN/model are RUN's, and those of a checkpoint lie in RUN too: either is replaced or
    removed in time.
    """
    path = expanded(run)
    if path.is_dir():
        place = path.resolve()
        if place.name == "model" and (place.parent / "recipe.yaml").is_file():
            return place.parent / RECORDS
        if place.parent.name in ("checkpoints", KEPT):
            return place.parent.parent / f"evaluation-{place.name}.json"
        return path / RECORDS
    if "@" in path.name and not path.exists():
        folder, stage = str(path).rsplit("@", 1)
        return Path(folder) / f"evaluation-{stage}.json"
    return None


def read_records(path: Path) -> list[Record]:
    """A file's records in today's form; none without it. Raises ValueError for a damaged one."""
    if not path.is_file():
        return []
    try:
        records = parsed_json(path.read_text("utf-8"))
        if not isinstance(records, list) or not all(map(_is_record, records)):
            raise ValueError("it does not contain a list of evaluations")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): move it away") from None
    return [_migrated(record) for record in records]


def add_record(path: Path, record: Record) -> None:
    """Appends a record, and takes into it one with equal samples, features and reference.

    What only the older one has was measured of the same images, and stays.
    """
    kept = []
    for other in read_records(path):
        if _subject(other) == _subject(record):
            record = _joined(other, record)
        else:
            kept.append(other)
    write_text(path, json.dumps([*kept, record], indent=1) + "\n")


def is_recorded(
    records: Sequence[Record],
    weights_sha256: str,
    sampling: Sampling,
    settings: Evaluation,
    seeds: Sequence[int],
    against: Record,
) -> bool:
    """Whether a model was evaluated so before: there is a record of it with all wanted metrics.

    Args:
        records: those that there are.
        weights_sha256: of the model.
        sampling, settings, seeds: how it is to be evaluated.
        against: `features` and `reference`, as a record has them.
    """
    how = sampling.model_dump(mode="json", exclude=set(Sampling.HOW_FAST))
    wanted = {"weights_sha256": weights_sha256, "sampling": how, "num": settings.num}
    wanted["seeds"] = [*seeds]
    return any(
        all(record["samples"].get(name) == value for name, value in wanted.items())
        and _measured_in(record) == _measured_in(against)
        and all(record["metrics"].get(name) or record.get(name) for name in settings.metrics)
        for record in records
    )


def _is_record(value: Any) -> bool:
    parts = ("metrics", "features", "samples", "reference")
    return isinstance(value, dict) and all(isinstance(value.get(part), dict) for part in parts)


def _migrated(record: Record) -> Record:
    """A record whose settings have today's form."""
    parts = {name: record.get(name) for name in ("samples", "recipe")}
    return record | {name: migrated(part) for name, part in parts.items() if part}


def _subject(record: Record) -> str:
    """What a record is about, as text."""
    return json.dumps([record["samples"], *_measured_in(record)], sort_keys=True)


def _measured_in(record: Record) -> list[str]:
    """Features and reference, as text; images are known by their prepared pixels."""
    features = [record["features"].get(name) for name in ("sha256", "pixel_max")]
    real = record["reference"]
    known = [real.get("sha256"), real.get("statistics", False)] if real.get("sha256") else real
    return [json.dumps(part, sort_keys=True) for part in (features, known)]


def _joined(older: Record, newer: Record) -> Record:
    """A record with the figures that only an older one of the same images has."""
    joined = {**newer, "metrics": {**older["metrics"], **newer["metrics"]}}
    seeds = newer.get("per_seed") or []
    before = older.get("per_seed") or [{} for _ in seeds]  # an earlier version had none
    joined["per_seed"] = [{**one, **now} for one, now in zip(before, seeds, strict=True)]
    for name in ("chance", *(name for name, row in METRICS.items() if row.is_report)):
        joined[name] = newer.get(name) or older.get(name)
    joined["notes"] = [*dict.fromkeys([*older.get("notes", []), *newer.get("notes", [])])]
    return joined


def most_telling_last(records: Sequence[Record]) -> list[Record]:
    """A run's records, those of its own model after those of a sweep's or a curve's averages."""
    return sorted(records, key=_is_of_its_model)


def _is_of_its_model(record: Record) -> bool:
    samples = record["samples"]
    return samples.get("ema") is None and Path(samples.get("model", "")).parent.name != KEPT
