"""What `maskdm compare` prints: tables of at most WIDTH columns, in ASCII."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from maskdm.evaluation.compare import Comparison, Difference
from maskdm.evaluation.curves import Reached
from maskdm.evaluation.distances import NORMAL_95, Measured
from maskdm.training.monitor import clock, flops_text

WIDTH = 100
NAME_WIDTH = 32
TITLES = {"inception_score": "IS", "precision": "precision", "recall": "recall"}
REAL = {
    True: "a real difference of these models' samples",
    False: "within the noise",
    None: "not known: an error is missing",
}
REAL_OF_RECIPES = {**REAL, True: "a real difference of these recipes"}
UNITS = {"images": "images", "flops": "FLOPs", "time": "time"}


def comparison_text(comparison: Comparison) -> str:
    """The table of a comparison, and what is said of it below."""
    first = next(iter(comparison.records.values()))
    reference, features = first["reference"], first["features"]["name"]
    num_real = f"{reference['num']:,} " if reference.get("num") else ""
    parts = [
        f"{first['samples']['num']:,} samples of each, in features {features}, against {num_real}"
        f"real images from {reference['source']};\nvalues with half of their 95 % interval; * = "
        "best",
        _table(comparison, features),
    ]
    chance = first.get("chance") or {}
    if "frechet" in chance and "frechet" in comparison.metrics:
        size = f", {chance['num']:,} each" if chance.get("num") else ""
        parts.append(
            f"\nby chance (two disjoint random parts of the real images{size}): "
            f"{title('frechet', features)} {chance['frechet']:.4g}"
        )
    for m in comparison.metrics:
        told = [one for one in comparison.differences if one.metric == m]
        parts.append(f"\n{title(m, features)}, differences with their 95 % intervals over samples:")
        parts.append(_differences(told, REAL))
        if told := [one for one in comparison.group_differences if one.metric == m]:
            parts.append(f"{title(m, features)}, differences of means over trainings (Welch's t):")
            parts.append(_differences(told, REAL_OF_RECIPES))
    notes = notes_text(comparison.notes)
    return "\n".join([*parts, *([""] if notes else []), *notes])


def title(metric: str, features: str) -> str:
    """A metric's name to people: FID and KID are those of Inception's features."""
    if metric == "frechet":
        return "FID" if features == "inception" else f"Frechet ({features})"
    if metric == "kid":
        return "KID" if features == "inception" else f"KID ({features})"
    return TITLES.get(metric, metric)


def notes_text(notes: Sequence[str]) -> list[str]:
    """Notes, each wrapped."""
    return [
        textwrap.fill(f"note: {note}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for note in notes
    ]


def reached_text(reached: Sequence[Reached], target: float, named: bool, x: str, y: str) -> str:
    """What each run had spent when it reached the target, and how many times less that is.

    Args:
        reached: of the runs, the first is the baseline.
        target: the quality.
        named: whether the user named it; else it is the baseline's last.
        x, y: cost and quality.
    """
    base = reached[0]
    of = "" if named else f", the last value of {shortened(base.name)},"
    lines = [f"{y} {target:.4g}{of} is reached after:"]
    names = [shortened(one.name) for one in reached]
    costs = ["-" if one.cost is None else _cost(one.cost, x) for one in reached]
    noise = [_within(one, x) for one in reached]
    for i, one in enumerate(reached):
        parts = [f"{names[i]:<{_width(names)}}", f"{costs[i]:>{_width(costs)}}"]
        if any(noise):
            parts.append(f"{noise[i]:<{_width(noise)}}")
        parts.append(_ratio_text(one, base, x))
        lines.append("  " + "  ".join(parts).rstrip())
    if any(noise):
        lines.append(
            "(in brackets: by the 95 % interval of a single measurement; the target taken as exact)"
        )
    if bound := [shortened(one.name) for one in reached if one.is_bound]:
        lines.append(
            f"(at their first measurement already, so perhaps for less: {', '.join(bound)})"
        )
    return "\n".join(lines)


def shortened(name: str) -> str:
    """A name of at most NAME_WIDTH characters, cut in the middle."""
    if len(name) <= NAME_WIDTH:
        return name
    kept = (NAME_WIDTH - 3) // 2
    return f"{name[: NAME_WIDTH - 3 - kept]}...{name[-kept:]}"


def _table(comparison: Comparison, features: str) -> str:
    """A row a run, retrainings together with their mean below; columns that don't fit go below."""
    order: list[str] = []
    rows = ["run"]
    for run in comparison.records:
        group = next((one for one in comparison.groups if run in one.runs), None)
        if run in order:
            continue
        order += group.runs if group else (run,)
        rows += [shortened(one) for one in (group.runs if group else (run,))]
        rows += [f"  mean of {len(group.runs)}, deviation"] if group else []
    columns = [rows]
    for m in comparison.metrics:
        figures, best = comparison.figures(m), comparison.best(m)
        digits = _decimals([half for one in figures.values() if (half := _half(one))])
        cells = [f"{title(m, features)}  "]
        for run in order:
            cells.append(_cell(figures[run], digits) + (" *" if run in best else "  "))
            for group in comparison.groups:
                if run == group.runs[-1]:
                    mean, deviation = group.mean_and_deviation(m)
                    more = digits if digits is not None else _decimals([deviation])
                    cells.append(f"{_number(mean, more)} sd {_number(deviation, more)}  ")
        columns.append(cells)
    columns += _training_columns(comparison, order)
    return _in_blocks(columns)


def _training_columns(comparison: Comparison, order: Sequence[str]) -> list[list[str]]:
    """Images, FLOPs and time of the trainings, where any is known."""
    columns = []
    for head, key, text in (
        ("images", "images", _images_text),
        ("FLOPs", "flops", flops_text),
        ("time", "elapsed_sec", clock),
    ):
        cells, is_known = [head], False
        for run in order:
            value = (comparison.records[run].get("training") or {}).get(key)
            is_known |= value is not None
            cells.append("-" if value is None else text(value))
            cells += [""] * sum(run == group.runs[-1] for group in comparison.groups)
        columns += [cells] if is_known else []
    return columns


def _in_blocks(columns: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left; those that don't fit follow below it again."""
    names, *others = columns
    blocks: list[list[Sequence[str]]] = [[]]
    width = _width(names)
    for column in others:
        used = width + sum(2 + _width(one) for one in blocks[-1])
        if blocks[-1] and used + 2 + _width(column) > WIDTH:
            blocks.append([])
        blocks[-1].append(column)
    lines: list[str] = []
    for block in blocks:
        lines += [""] if lines else []
        for i, name in enumerate(names):
            if any(one[i] for one in block):
                cells = [f"{name:<{width}}", *(f"{one[i]:>{_width(one)}}" for one in block)]
                lines.append("  ".join(cells).rstrip())
    return "\n".join(["", *lines])


def _differences(told: Sequence[Difference], verdicts: dict[bool | None, str]) -> str:
    names = [f"{shortened(one.first)} - {shortened(one.second)}" for one in told]
    digits = _decimals([one.half for one in told if one.half])
    cells = [
        _number(one.value, digits)
        + (f" +- {_number(one.half, digits)}" if one.half is not None else "")
        for one in told
    ]
    lines = []
    for one, name, cell in zip(told, names, cells, strict=True):
        line = f"  {name:<{_width(names)}}  {cell:>{_width(cells)}}"
        verdict = verdicts[one.is_real]
        fits = len(line) + 2 + len(verdict) <= WIDTH
        lines.append(f"{line}  {verdict}" if fits else f"{line}\n      {verdict}")
    return "\n".join(lines)


def _ratio_text(one: Reached, base: Reached, x: str) -> str:
    if one.cost is None:
        return "never reached"
    if one is base:
        return "the baseline"
    if one.ratio is None:
        return ""
    less, much = ("less", "much") if x == "time" else ("fewer", "many")
    if f"{one.ratio:.2f}" == "1.00":
        return f"{'at most ' if one.is_bound else ''}as {much} {UNITS[x]}"
    if one.ratio > 1:
        return f"{'at least ' if one.is_bound else ''}{_times(one.ratio)} {less} {UNITS[x]}"
    return f"{'at most ' if one.is_bound else ''}{_times(1 / one.ratio)} more {UNITS[x]}"


def _times(ratio: float) -> str:
    return f"{ratio:#.3g}".rstrip(".") + " times"


def _within(one: Reached, x: str) -> str:
    if one.within is None:
        return ""
    early, late = one.within
    return f"({_cost(early, x)} to {'never' if late is None else _cost(late, x)})"


def _cost(value: float, x: str) -> str:
    return {"images": _images_text, "flops": flops_text, "time": clock}[x](value)


def _images_text(num: float) -> str:
    """`1.28 M`."""
    power = min(3, int(math.log10(max(1.0, num))) // 3)
    return f"{num / 1000**power:.3g} {['', 'k', 'M', 'G'][power]}".rstrip()


def _half(one: Measured) -> float | None:
    return None if one.error is None else NORMAL_95 * one.error


def _decimals(halves: Sequence[float]) -> int | None:
    """Decimals that show two digits of the smallest interval; None where there is none."""
    known = [half for half in halves if half > 0]
    if not known:
        return None
    return min(8, max(0, 1 - math.floor(math.log10(min(known)))))


def _number(value: float, decimals: int | None) -> str:
    if decimals is None:
        return f"{value:.4g}"
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"  # + 0.0: no minus before a zero


def _cell(one: Measured, decimals: int | None) -> str:
    half = _half(one)
    return _number(one.value, decimals) + ("" if half is None else f" +- {_number(half, decimals)}")


def _width(cells: Sequence[str]) -> int:
    return max(len(cell) for cell in cells)
