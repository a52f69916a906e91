"""Charts of a report: lines over images, FLOPs or time, in a box that a page of any width fills.

The curves are paths in a square of 1000 by 1000 units that is stretched to the box; ticks and names
are text at percentages of it, so that they stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskdm.evaluation.measure import NORMAL_95
from maskdm.words import COSTS, clock, figure, flops_text, images_text

SIDE = 1000.0  # of the square
MOST_POINTS = 240  # of a line; more are averaged
MOST_TICKS = 6
WIDE = 4.0  # largest over smallest value from which an axis is logarithmic
NUM_TONES = 6  # colours of the page
MARGIN = 0.06  # of the height, above and below the lines
TEXTS = {"images": images_text, "flops": flops_text, "time": clock}
THOUSANDS = {
    "images": ["", "thousands", "millions", "billions"],
    "flops": [f"{prefix}FLOP" for prefix in ("", "k", "M", "G", "T", "P", "E", "Z")],
}
TIMES = ((120.0, 1.0, "seconds"), (7200.0, 60.0, "minutes"), (math.inf, 3600.0, "hours"))


@dataclass(frozen=True)
class Series:
    """A line: a quantity over what training has cost.

    Attributes:
        name: in the legend.
        costs: key of `COSTS` -> costs so far, (K,), increasing.
        values: (K,); those that are not finite are left out.
        errors: standard errors of the values, (K,); None = no band is drawn.
        tone: number of its colour; from 6 on they come again.
        is_dashed: how it is drawn.
    """

    name: str
    costs: Mapping[str, Sequence[float]]
    values: Sequence[float]
    errors: Sequence[float] | None = None
    tone: int = 0
    is_dashed: bool = False


@dataclass(frozen=True)
class Band:
    """A stage as a shaded part of the chart: key of `COSTS` -> where it begins and ends."""

    name: str
    ends: Mapping[str, tuple[float, float]]
    tone: int = 0


@dataclass(frozen=True)
class Panel:
    """A chart over one of the costs. Places are percentages of the box, from left and from top."""

    x: str
    x_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bands: list[dict[str, Any]]  # name, tone, left, width
    areas: list[dict[str, Any]]  # path, tone
    lines: list[dict[str, Any]]  # name, path, tone, is_dashed
    points: list[dict[str, Any]]  # name, tone, x (percent), cost and value in words


@dataclass(frozen=True)
class Chart:
    """A titled chart over each of the costs."""

    title: str
    note: str
    unit: str
    legend: list[dict[str, Any]]  # name, tone, is_dashed
    panels: list[Panel]


def draw_chart(
    title: str, series: Sequence[Series], bands: Sequence[Band] = (), note: str = "", unit: str = ""
) -> Chart | None:
    """A chart over images, FLOPs and time; None where no line has a finite value.

    Args:
        title: what is drawn.
        series: at least one line.
        bands: stages, in their order.
        note: what a reader should know.
        unit: of the values.
    """
    lines = [one for one in (_finite(one) for one in series) if len(one.values)]
    if not lines:
        return None
    legend = [{"name": s.name, "tone": s.tone % NUM_TONES, "is_dashed": s.is_dashed} for s in lines]
    return Chart(title, note, unit, legend, [_panel(x, lines, bands) for x in COSTS])


def _finite(one: Series) -> Series:
    """A line without values that are not finite, its points averaged down to MOST_POINTS."""
    values = np.array(one.values, float)
    kept = np.isfinite(values)
    parts = np.array_split(np.arange(kept.sum()), min(MOST_POINTS, max(1, int(kept.sum()))))

    def thinned(column: Sequence[float]) -> list[float]:
        numbers = np.array(column, float)[kept]
        return [float(numbers[part].mean()) for part in parts if len(part)]

    costs = {x: thinned(column) for x, column in one.costs.items()}
    errors = None if one.errors is None else thinned(one.errors)
    return Series(one.name, costs, thinned(one.values), errors, one.tone, one.is_dashed)


def _panel(x: str, lines: Sequence[Series], bands: Sequence[Band]) -> Panel:
    last = max([*(one.costs[x][-1] for one in lines), *(band.ends[x][1] for band in bands)])
    last = last if last > 0 else 1.0
    unit, unit_name = _unit(x, last)
    x_title = COSTS[x].title + (f", {unit_name}" if unit_name else "")
    scale = _Scale.of(lines)
    places = [[100 * cost / last for cost in one.costs[x]] for one in lines]
    heights = [[scale.place(value) for value in one.values] for one in lines]
    drawn, areas, points = [], [], []
    for one, left, top in zip(lines, places, heights, strict=True):
        drawn.append(
            {
                "name": one.name,
                "path": _path(left, top),
                "tone": one.tone % NUM_TONES,
                "is_dashed": one.is_dashed,
            }
        )
        if one.errors is not None:
            areas.append({"path": _area(one, left, scale), "tone": one.tone % NUM_TONES})
        points.append(
            {
                "name": one.name,
                "tone": one.tone % NUM_TONES,
                "x": [round(place, 2) for place in left],
                "cost": [TEXTS[x](cost) for cost in one.costs[x]],
                "value": [figure(value) for value in one.values],
            }
        )
    shaded = [
        {
            "name": band.name,
            "tone": band.tone % NUM_TONES,
            "left": round(100 * band.ends[x][0] / last, 3),
            "width": round(100 * (band.ends[x][1] - band.ends[x][0]) / last, 3),
        }
        for band in bands
    ]
    ticks = [(100 * tick * unit / last, _plain(tick)) for tick in nice_ticks(0, last / unit)]
    return Panel(x, x_title, ticks, scale.ticks(), shaded, areas, drawn, points)


@dataclass(frozen=True)
class _Scale:
    """From values to percentages of the height, from the top."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, lines: Sequence[Series]) -> _Scale:
        """A scale that shows all lines and their bands, logarithmic where values are far apart."""
        values = np.concatenate([np.array(one.values) for one in lines])
        spans = [values, *(_ends(one)[end] for one in lines if one.errors for end in (0, 1))]
        low, high = (float(f(np.concatenate(spans))) for f in (np.min, np.max))
        is_log = bool(values.min() > 0 and values.max() > WIDE * values.min())
        if is_log:
            low = max(low, float(values.min()) / 2)  # a band may reach below zero
            room = (high / low) ** MARGIN
            return cls(low / room, high * room, True)
        room = MARGIN * (high - low) or abs(high) * MARGIN or 1.0
        return cls(0.0 if low >= 0 > low - room else low - room, high + room, False)

    def place(self, value: float) -> float:
        """The place of a value; those below the scale lie on its edge."""
        if self.is_log:
            value = max(value, self.low)
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return 100 * (1 - min(max(part, 0.0), 1.0))

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts."""
        ticks = log_ticks(self.low, self.high) if self.is_log else []
        ticks = ticks if len(ticks) > 1 else nice_ticks(self.low, self.high)
        return [(self.place(tick), figure(tick)) for tick in ticks]


def nice_ticks(low: float, high: float) -> list[float]:
    """At most 6 round numbers between two ends, evenly spaced by 1, 2 or 5 times a power of ten."""
    raw = (high - low) / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between two ends above 0; only powers of ten where those are enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= MOST_TICKS:
            return ticks
    return ticks[:: math.ceil(len(ticks) / MOST_TICKS)]


def _unit(x: str, last: float) -> tuple[float, str]:
    """The unit of an axis that ends there, and its name."""
    if x == "time":
        return next((unit, name) for end, unit, name in TIMES if last < end)
    power = 0
    while power + 1 < len(THOUSANDS[x]) and last / 1000**power >= 2000:
        power += 1
    return 1000.0**power, THOUSANDS[x][power]


def _plain(tick: float) -> str:
    return f"{tick:,.10g}"


def _path(left: Sequence[float], top: Sequence[float]) -> str:
    """An SVG path through places in percent; of a single one, a dot."""
    at = [f"{x * SIDE / 100:.1f} {y * SIDE / 100:.1f}" for x, y in zip(left, top, strict=True)]
    return f"M{at[0]}h0.01" if len(at) == 1 else "M" + "L".join(at)


def _ends(one: Series) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the values' 95 % intervals."""
    assert one.errors is not None
    values, half = np.array(one.values), NORMAL_95 * np.nan_to_num(np.array(one.errors))
    return values - half, values + half


def _area(one: Series, left: Sequence[float], scale: _Scale) -> str:
    """The band of a line as a closed path."""
    low, high = ([scale.place(value) for value in end] for end in _ends(one))
    return _path([*left, *left[::-1]], [*high, *low[::-1]]) + "Z"
