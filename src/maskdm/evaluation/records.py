"""The records of evaluations: what was measured, and all that the figures depend on.

RUN/evaluation.json is a list of records, the newest last; one of equal samples, features and
reference is replaced. A record holds:

    metrics     name -> value, error (a standard error over samples, or null), interval (of 95 %),
                spread (between subsets or seeds, or null), library. Names: frechet, kid, sliced,
                precision, recall, inception_score.
    per_seed    name -> value, for each repetition of the drawing
    chance      frechet: of two disjoint random parts of the reference, num images each
    features    name, sha256, library, dim
    samples     num, shape (H, W, C), seeds; of a model: model, weights (ema), weights_sha256,
                sampling, precision; of images: source, fingerprint
    reference   source, fingerprint, crop, num, shape, flip (false)
    training    step, stage, images, flops, elapsed_sec of the model, where they are known
    recipe      the run's, whole, or null
    memorization    see `memorization.py`, where it was looked for
    notes       what a reader should know
    maskdm, commit, torch, device, num_ranks, date, generate_sec, measure_sec (reference_sec of it)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskdm.files import write_text

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records in a file; none where there is no file.

    Raises ValueError for a damaged one.
    """
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_text("utf-8"))
        if not isinstance(records, list) or not all("metrics" in record for record in records):
            raise ValueError("it holds no list of evaluations")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} can't be read ({error}): move it away") from None
    return records


def add_record(path: Path, record: Record) -> None:
    """Appends a record, in the place of one of equal samples, features and reference."""
    kept = [other for other in read_records(path) if _subject(other) != _subject(record)]
    text = json.dumps([*kept, record], indent=1) + "\n"
    write_text(path, text)


def _subject(record: Record) -> str:
    """What a record is of, as text."""
    parts = [record["features"]["sha256"], record["samples"], record["reference"]]
    return json.dumps(parts, sort_keys=True)
