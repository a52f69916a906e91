"""What `maskdm compare` prints: tables of at most WIDTH columns, in ASCII."""

from __future__ import annotations

from collections.abc import Sequence

from maskdm.evaluation.compare import Comparison, Difference, metric_of
from maskdm.evaluation.curves import Reached
from maskdm.evaluation.measure import NORMAL_95
from maskdm.words import COSTS, decimals_of, figure, fixed, with_error, wrapped

WIDTH = 100
NAME_WIDTH = 32
REAL = {
    True: "a real difference of these models' samples",
    False: "within the noise",
    None: "unknown: an error is missing",
}
REAL_OF_RECIPES = {**REAL, True: "a real difference of these recipes"}


def comparison_text(comparison: Comparison) -> str:
    """The table of a comparison, and its differences and notes below."""
    first = next(iter(comparison.records.values()))
    reference, features = first["reference"], first["features"]["name"]
    num_real = f"{reference['num']:,} " if reference.get("num") else ""
    lines = [
        f"{first['samples']['num']:,} samples of each run, in features {features}, against "
        f"{num_real}real images from {reference['source']};",
        "values with half of their 95 % interval; * = best",
        "",
        *_runs(comparison, features),
    ]
    chance = first.get("chance") or {}
    for m in comparison.metrics:
        heading = metric_of(m).heading_in(features)
        differences = [one for one in comparison.differences if one.metric == m]
        lines += ["", f"{heading}, differences with their 95 % intervals over samples:"]
        lines += _differences(differences, REAL)
        if differences := [one for one in comparison.group_differences if one.metric == m]:
            lines.append(f"{heading}, differences of means over trainings (Welch's t):")
            lines += _differences(differences, REAL_OF_RECIPES)
        if m in chance:
            size = f", {chance['num']:,} each" if chance.get("num") else ""
            what = f"(two disjoint random parts of the real images{size})"
            lines.append(f"by chance {what}: {heading} {figure(chance[m])}")
    notes = notes_text(comparison.notes)
    return "\n".join([*lines, *([""] if notes else []), *notes])


def notes_text(notes: Sequence[str]) -> list[str]:
    """Notes, wrapped."""
    return [line for note in notes for line in wrapped(note, "note: ", WIDTH)]


def reached_text(reached: Sequence[Reached], target: float, named: bool, x: str, y: str) -> str:
    """The cost at which each run reached the target, and how many times less that is.

    Args:
        reached: for each run; the first is the baseline.
        target, named: the quality, and whether the user gave it; else it is the baseline's last.
        x, y: cost and quality.
    """
    names = [shortened(one.name) for one in reached]
    whose = "" if named else f", the last value of {names[0]},"
    costs = ["-" if one.cost is None else COSTS[x].text(one.cost) for one in reached]
    noise = [_within(one, x) for one in reached]
    ratios = [_ratio_text(one, reached[0], x) for one in reached]
    intervals = [_ratio_interval_text(one) for one in reached]
    columns = [costs, *(_padded(one) for one in (noise, ratios, intervals) if any(one))]
    lines = [f"{y} {figure(target)}{whose} is reached after:"]
    lines += _table([[f"  {name}" for name in names], *columns])
    if any(noise):
        lines.append(
            "(in brackets: within the 95 % interval of a single measurement; the target is exact)"
        )
    if any(intervals):
        lines += [
            "[in square brackets: 95 % interval, over samples, of the baseline's cost divided by",
            " this run's: above 1 = this run is cheaper; 0 = it may never be as good]",
        ]
    if bound := [name for name, one in zip(names, reached, strict=True) if one.is_bound]:
        lines.append(
            f"(at their first measurement, so possibly at a lower cost: {', '.join(bound)})"
        )
    return "\n".join(lines)


def shortened(name: str) -> str:
    """A name of at most NAME_WIDTH characters, cut in the middle."""
    if len(name) <= NAME_WIDTH:
        return name
    kept = (NAME_WIDTH - 3) // 2
    return f"{name[: NAME_WIDTH - 3 - kept]}...{name[-kept:]}"


def _runs(comparison: Comparison, features: str) -> list[str]:
    """A row for each run, retrainings together with their mean below."""
    groups, rows = comparison.groups, list[str]()
    for run in comparison.records:
        name = next((name for name, runs in groups.items() if run in runs), None)
        if run not in rows:
            rows += [run] if name is None else [*groups[name], name]
    means = {name: f"  mean of {len(runs)}, deviation" for name, runs in groups.items()}
    columns = [["run", *(means.get(row) or shortened(row) for row in rows)]]
    for m in comparison.metrics:
        figures, best = comparison.figures(m), comparison.best(m)
        halves = {run: one.error and NORMAL_95 * one.error for run, one in figures.items()}
        digits = decimals_of(half for half in halves.values() if half)
        column = [f"{metric_of(m).heading_in(features)}  "]
        for row in rows:
            if row in groups:
                mean, deviation = comparison.mean_and_deviation(m, row)
                more = digits if digits is not None else decimals_of([deviation])
                column.append(f"{fixed(mean, more)} sd {fixed(deviation, more)}  ")
            else:
                star = " *" if row in best else "  "
                column.append(with_error(figures[row].value, halves[row], digits) + star)
        columns.append(column)
    trainings = {run: record.get("training") or {} for run, record in comparison.records.items()}
    for cost in COSTS.values():
        known = {run: one[cost.key] for run, one in trainings.items() if cost.key in one}
        texts = {run: cost.text(value) for run, value in known.items() if value is not None}
        if texts:
            cells = ["" if row in groups else texts.get(row, "-") for row in rows]
            columns.append([cost.unit.split()[-1], *cells])
    return _table(columns)


def _differences(differences: Sequence[Difference], verdicts: dict[bool | None, str]) -> list[str]:
    """A line for each; a verdict for which there is no room goes below."""
    names = [f"  {shortened(one.first)} - {shortened(one.second)}" for one in differences]
    digits = decimals_of(one.half for one in differences if one.half)
    cells = [with_error(one.value, one.half, digits) for one in differences]
    lines = []
    for one, line in zip(differences, _table([names, cells]), strict=True):
        verdict = verdicts[one.is_real]
        fits = len(line) + 2 + len(verdict) <= WIDTH
        lines += [f"{line}  {verdict}"] if fits else [line, f"      {verdict}"]
    return lines


def _table(columns: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, the first to the left; those that do not fit go below, beside it.

    In such a block, rows without content are left out.
    """
    first, *others = columns
    names = _padded(first)
    blocks: list[list[list[str]]] = [[]]
    for column in others:
        width = max(map(len, column))
        cells = [cell.rjust(width) for cell in column]
        used = sum(2 + len(one[0]) for one in blocks[-1])
        if blocks[-1] and len(names[0]) + used + 2 + width > WIDTH:
            blocks.append([])
        blocks[-1].append(cells)
    lines: list[str] = []
    for block in blocks:
        rows = [cells for cells in zip(names, *block, strict=True) if "".join(cells[1:]).strip()]
        lines += ([""] if lines else []) + ["  ".join(cells).rstrip() for cells in rows]
    return lines


def _padded(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells))
    return [cell.ljust(width) for cell in cells]


def _ratio_text(one: Reached, base: Reached, x: str) -> str:
    if one.cost is None:
        return "never reached"
    if one is base:
        return "the baseline"
    if one.ratio is None:
        return ""
    less, unit = COSTS[x].unit.split()  # `fewer images`
    least, most = ("at least ", "at most ") if one.is_bound else ("", "")
    if f"{one.ratio:.2f}" == "1.00":
        return f"{most}as {'much' if less == 'less' else 'many'} {unit}"
    if one.ratio > 1:
        return f"{least}{_times(one.ratio)} {less} {unit}"
    return f"{most}{_times(1 / one.ratio)} more {unit}"


def _ratio_interval_text(one: Reached) -> str:
    if one.ratio_interval is None:
        return ""
    low, high = one.ratio_interval
    return f"[{low:.3g} or more]" if high is None else f"[{low:.3g} to {high:.3g}]"


def _times(ratio: float) -> str:
    return f"{ratio:#.3g}".rstrip(".") + " times"


def _within(one: Reached, x: str) -> str:
    if one.within is None:
        return ""
    early, late = (None if cost is None else COSTS[x].text(cost) for cost in one.within)
    return f"({early} to {late or 'never'})"
