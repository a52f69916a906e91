"""Plots of a run, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskdm.evaluation.curves import Curve
from maskdm.evaluation.measure import NORMAL_95
from maskdm.metrics import METRICS
from maskdm.runs.lines import read_lines
from maskdm.words import COSTS
from maskdm.words import figure as figure_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 4.0  # largest over smallest value from which an axis has ticks at 1, 2, 5, 10 …


def plot_loss(run_dir: Path) -> Path:
    """Saves `loss_figure` as RUN/loss.png. Raises ValueError where the run has no metrics yet."""
    path = run_dir / "loss.png"
    loss_figure(run_dir).savefig(path, dpi=120)
    return path


def loss_figure(run_dir: Path) -> Figure:
    """Plots a run's loss over images seen, a colour for each stage.

    Losses of stages with different masks are means over different patches: comparable within a
    stage, not between stages.

    Raises ValueError where the run has no metrics yet.
    """
    lines = read_lines(run_dir / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{run_dir} has no metrics to plot yet")
    figure, axes = _empty()
    stage_start = 0
    for name in dict.fromkeys(line["stage"] for line in lines):
        rows = [line for line in lines if line["stage"] == name]
        hidden = rows[0]["hidden"]
        label = f"{name}, {100 * hidden:.3g} % hidden" if hidden else f"{name}, whole images"
        images, losses = ([row[key] for row in rows] for key in ("images", "loss"))
        marker = "." if len(rows) < 3 else ""
        (curve,) = axes.plot(images, losses, label=label, linewidth=1.5, marker=marker)
        axes.axvspan(stage_start, rows[-1]["images"], color=curve.get_color(), alpha=0.08, lw=0)
        stage_start = rows[-1]["images"]
    _log_scale(axes, [line["loss"] for line in lines])
    _cost_axis(axes, "images")
    axes.set_xlim(0, stage_start)
    axes.set_ylabel("denoising loss")
    axes.set_title(run_dir.resolve().name, loc="left")
    axes.legend(frameon=False)
    return figure


def plot_quality(
    curves: Sequence[Curve],
    x: str,
    y: str,
    target: float | None,
    path: Path,
    title: str | None = None,
) -> Path:
    """Saves `quality_figure` to a file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    quality_figure(curves, x, y, target, title).savefig(path, dpi=120)
    return path


def quality_figure(
    curves: Sequence[Curve], x: str, y: str, target: float | None, title: str | None = None
) -> Figure:
    """Plots quality over cost: a line for each run, its 95 % band, a dot at each stage's end.

    Retrainings of one recipe share a colour. Where they were measured at the same steps, they are
    thin lines around their mean, without bands.

    Args:
        curves: one or more.
        x: a key of `COSTS`; the unit of time is seconds, minutes or hours.
        y: a key of `METRICS`; its axis is logarithmic if lower is better and all are above 0.
        target: the value of a dotted line; None = no line.
        title: of the quality; None = the metric's own.
    """
    figure, axes = _empty()
    longest = max(float(curve.cost[-1]) for curve in curves)
    unit, unit_name = _time_unit(longest) if x == "time" else (1.0, "")
    groups = list(dict.fromkeys(curve.group for curve in curves))
    for number, group in enumerate(groups):
        members, colour = [c for c in curves if c.group == group], f"C{number % 10}"
        mean = _mean(members) if len(members) > 1 else None
        style = {"linewidth": 1.5} if mean is None else {"linewidth": 0.7, "alpha": 0.6}
        for curve in members:
            label = group if mean is None and curve is members[0] else "_retraining"
            _draw(axes, curve, unit, mean is None, label=label, color=colour, **style)
        if mean is not None:
            _draw(axes, mean, unit, True, label=group, color=colour, linewidth=2)
    if any(len(set(curve.stages)) > 1 for curve in curves):
        axes.plot([], [], color="0.4", marker="o", linestyle="", label="end of a stage")
    values = np.concatenate([curve.quality for curve in curves])
    if (values > 0).all() and not METRICS[y].higher_is_better:
        _log_scale(axes, values.tolist())
    if target is not None:
        label = f"target {figure_text(target)}"
        axes.axhline(target, color="0.4", linestyle=":", linewidth=1.2, label=label)
    _cost_axis(axes, x, unit_name)
    direction = "higher is better" if METRICS[y].higher_is_better else ""
    parts = (title or METRICS[y].title, METRICS[y].unit, direction)
    axes.set_ylabel("\n".join(filter(None, parts)))
    axes.legend(frameon=False)
    return figure


def _draw(axes: Any, curve: Curve, unit: float, with_band: bool, **style: Any) -> None:
    cost = curve.cost / unit
    axes.plot(cost, curve.quality, marker="." if len(cost) < 3 else "", **style)
    if not with_band:
        return
    if curve.error is not None:
        half = NORMAL_95 * curve.error
        low, high = curve.quality - half, curve.quality + half
        axes.fill_between(cost, low, high, color=style["color"], alpha=0.12, lw=0)
    if ends := [i for i in range(len(cost) - 1) if curve.stages[i] != curve.stages[i + 1]]:
        dots = {"linestyle": "", "marker": "o", "markersize": 6, "color": style["color"]}
        axes.plot(cost[ends], curve.quality[ends], label=f"_end of {curve.stages[ends[0]]}", **dots)


def _mean(curves: Sequence[Curve]) -> Curve | None:
    """The mean of retrainings that were measured at the same steps; else None."""
    if len({curve.stages for curve in curves}) > 1:
        return None
    cost = np.mean([curve.cost for curve in curves], axis=0)
    quality = np.mean([curve.quality for curve in curves], axis=0)
    return replace(curves[0], name=curves[0].group, cost=cost, quality=quality, error=None)


def _empty() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _log_scale(axes: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    # Over a small range 1, 2, 5, 10 … would be a tick or two: there, ticks are spaced evenly.
    is_wide = max(values) > WIDE * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(6))
    axes.yaxis.set_major_formatter(lambda value, place: figure_text(value))
    axes.yaxis.set_minor_locator(NullLocator())


def _cost_axis(axes: Any, x: str, unit_name: str = "") -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlim(left=0)
    if not unit_name:
        axes.xaxis.set_major_formatter(EngFormatter("FLOP" if x == "flops" else "", sep=" "))
    axes.set_xlabel(COSTS[x].title + (f", {unit_name}" if unit_name else ""))


def _time_unit(seconds: float) -> tuple[float, str]:
    """A unit of time for an axis up to so many seconds."""
    if seconds < 120:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 7200 else (3600.0, "hours")
