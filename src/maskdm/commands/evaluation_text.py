"""The record of an evaluation as a person reads it."""

from __future__ import annotations

from typing import Any

from maskdm.commands.common import sampling_text
from maskdm.recipe import Sampling

TITLES = {
    "frechet": "Frechet distance",
    "kid": "kernel distance (KID)",
    "sliced": "sliced distance",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception score",
}
WIDTH = 10  # of the column of what the lines below the metrics are about


def evaluation_text(record: dict[str, Any]) -> str:
    """Metrics with their intervals, then all that they stand on; several lines, no last newline."""
    lines = []
    for name, one in record["metrics"].items():
        title, digits = metric_title(record, name), figure(one["value"])
        line = f"{title:24}{digits:>11}"
        if one["interval"] is not None:
            low, high = one["interval"]
            line += f"   95 %: {figure(low)} to {figure(high)}"
        if one["spread"] is not None:
            of = "seeds" if len(record["per_seed"]) > 1 else "subsets"
            line += f"   +- {figure(one['spread'])} between {of}"
        lines.append(line)
    if record["chance"] is not None:
        chance = record["chance"]
        lines.append(
            f"(by chance two disjoint parts of the real images, {chance['num']:,} each, measure "
            f"{figure(chance['frechet'])})"
        )
    if (memory := record.get("memorization")) is not None:
        lines += _wrapped("copies", memory["verdict"])
    parts = {
        "samples": _samples(record),
        "reference": _reference(record["reference"]),
        "features": _features(record),
        "by": _by(record),
    }
    for title, text in parts.items():
        lines += _wrapped(title, text)
    notes = [*record["notes"]]
    if memory is not None and memory["warning"]:
        notes.append(memory["warning"])
    for note in notes:
        lines += _wrapped("note", note)
    return "\n".join(lines)


def metric_title(record: dict[str, Any], name: str) -> str:
    """What a metric is called: the Fréchet distance is FID in the Inception network's features."""
    if name == "frechet" and record["features"]["name"] == "inception":
        return "FID"
    return TITLES[name]


def figure(value: float) -> str:
    """A figure with four digits that count."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _samples(record: dict[str, Any]) -> str:
    samples = record["samples"]
    num = f"{samples['num']:,} images"
    if "source" in samples:
        return f"{num} of {samples['source']}"
    seeds = samples["seeds"]
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}, of each"
    how = sampling_text(Sampling(**samples["sampling"]))
    trained = record.get("training")
    at = f", step {trained['step']:,}" if trained else ""
    return f"{num} from {samples['model']} ({samples['weights']}{at}), {named}, {how}"


def _reference(reference: dict[str, Any]) -> str:
    if reference.get("statistics") and "num" not in reference:
        return f"mean and covariance in {reference['source']}"
    shape = "x".join(map(str, reference["shape"]))
    text = f"{reference['num']:,} images of {reference['source']}, {shape}, crop "
    text += f"{reference['crop']}, not mirrored"
    return f"statistics of {text}" if reference.get("statistics") else text


def _features(record: dict[str, Any]) -> str:
    features = record["features"]
    text = f"{features['name']}, {features['dim']:,} values"
    if features["name"] == "pca":
        return f"{text}, of pixels from 0 to {features['pixel_max']:g}"
    return f"{text}, weights {features['sha256'][:12]}"


def _by(record: dict[str, Any]) -> str:
    libraries = {one["library"] for one in record["metrics"].values()}
    libraries |= {record["features"]["library"], f"torch {record['torch']}"}
    commit = f" at {record['commit'][:12]}" if record["commit"] else ""
    libraries.discard(f"maskdm {record['maskdm']}")
    precision = record["samples"].get("precision")
    told = [f"maskdm {record['maskdm']}{commit}", *sorted(libraries), record["device"]]
    told += [f"samples in {precision}"] if precision else []
    return ", ".join(told)


def _wrapped(title: str, text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(
        text,
        100,
        initial_indent=f"{title:{WIDTH}}",
        subsequent_indent=" " * WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )
