"""The record of an evaluation as a person reads it."""

from __future__ import annotations

from typing import Any

from maskdm.commands.common import sampling_text
from maskdm.metrics import METRICS
from maskdm.recipe import Sampling
from maskdm.words import counted, figure, with_error, wrapped


def evaluation_text(record: dict[str, Any]) -> str:
    """Metrics with their intervals, then what they depend on; several lines, no last newline."""
    titles = {m: METRICS[m].title_in(record["features"]["name"]) for m in record["metrics"]}
    width = max((len(title) for title in titles.values()), default=0)
    lines = []
    for name, one in record["metrics"].items():
        line = f"{titles[name]:{width}}{figure(one['value']):>11}"
        if one["interval"] is not None:
            low, high = one["interval"]
            line += f"   95 %: {figure(low)} to {figure(high)}"
        if one["spread"] is not None:
            between = "seeds" if len(record["per_seed"]) > 1 else "subsets"
            line += f"   +- {figure(one['spread'])} between {between}"
        lines.append(line)
    if (chance := record["chance"]) is not None and "frechet" in titles:
        lines.append(
            f"(by chance: two disjoint parts of the real images, {chance['num']:,} each, have a "
            f"{titles['frechet']} of {figure(chance['frechet'])})"
        )
    parts, notes = [], [*record["notes"]]
    for name, row in METRICS.items():
        if row.is_report and (report := record.get(name)) is not None:
            parts.append((row.short_title or row.title, report["verdict"]))
            notes += [report["warning"]] if report["warning"] else []
    parts += [*provenance(record), *(("note", note) for note in notes)]
    return "\n".join([*lines, *(line for t, text in parts for line in wrapped(text, f"{t:10}"))])


def provenance(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What a record's figures depend on, by a title: samples, reference, features, software."""
    return [
        ("samples", _samples(record)),
        ("reference", _reference(record["reference"])),
        ("features", _features(record["features"])),
        ("by", _software(record)),
    ]


def figures_text(record: dict[str, Any]) -> str:
    """The metrics of a record in a line, each with half of its 95 % interval where known."""
    from maskdm.evaluation.measure import NORMAL_95

    features = record["features"]["name"]
    return ", ".join(
        f"{METRICS[name].title_in(features, short=True)} "
        + with_error(one["value"], one["error"] and NORMAL_95 * one["error"])
        for name, one in record["metrics"].items()
    )


def _samples(record: dict[str, Any]) -> str:
    samples = record["samples"]
    num = counted(samples["num"], "image")
    if "source" in samples:
        return f"{num} from {samples['source']}"
    first, *others = samples["seeds"]
    drawn_by = f"for each of seeds {first} to {others[-1]}" if others else f"seed {first}"
    how = sampling_text(Sampling(**samples["sampling"]))
    trained = record.get("training")
    at = f", step {trained['step']:,}" if trained else ""
    return f"{num} from {samples['model']} ({samples['weights']}{at}), {drawn_by}, {how}"


def _reference(reference: dict[str, Any]) -> str:
    if "num" not in reference:
        return f"mean and covariance in {reference['source']}"
    shape, num = "x".join(map(str, reference["shape"])), counted(reference["num"], "image")
    text = f"{num} from {reference['source']}, {shape}, crop {reference['crop']}, not mirrored"
    return f"statistics of {text}" if reference.get("statistics") else text


def _features(features: dict[str, Any]) -> str:
    text = f"{features['name']}, {counted(features['dim'], 'value')}"
    if features["name"] == "pca":
        return f"{text}, of pixels from 0 to {features['pixel_max']:g}"
    return f"{text}, weights {features['sha256'][:12]}"


def _software(record: dict[str, Any]) -> str:
    own = f"maskdm {record['maskdm']}"
    others = {one["library"] for one in record["metrics"].values()}
    others |= {record["features"]["library"], f"torch {record['torch']}"}
    commit = f" at {record['commit'][:12]}" if record["commit"] else ""
    precision = record["samples"].get("precision")
    parts = [own + commit, *sorted(others - {own}), record["device"]]
    return ", ".join(parts + ([f"samples in {precision}"] if precision else []))
