"""Plots of a run, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskdm.evaluation.curves import Curve
from maskdm.evaluation.distances import NORMAL_95
from maskdm.training.monitor import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = {"images": "images seen", "flops": "cost of training", "time": "time of training"}
QUALITIES = {
    "sliced": "sliced Wasserstein distance",
    "kid": "kernel distance (KID)",
    "dense_loss": "dense denoising loss, held-out images",
}


def plot_loss(run_dir: Path) -> Path:
    """Draws the run's loss over images seen, a colour per stage, into RUN/loss.png.

    Losses of stages with different masks are means over different patches: they compare the
    steps of one stage, not the stages.

    Raises ValueError where the run has no metrics yet.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{run_dir} has no metrics to plot yet")
    figure, axes = _empty()
    stage_start = 0
    for name in dict.fromkeys(line["stage"] for line in lines):
        rows = [line for line in lines if line["stage"] == name]
        hidden = rows[0]["hidden"]
        label = f"{name}, {100 * hidden:.3g} % hidden" if hidden else f"{name}, whole images"
        (curve,) = axes.plot(
            [row["images"] for row in rows],
            [row["loss"] for row in rows],
            label=label,
            linewidth=1.5,
            marker="." if len(rows) < 3 else "",
        )
        axes.axvspan(stage_start, rows[-1]["images"], color=curve.get_color(), alpha=0.08, lw=0)
        stage_start = rows[-1]["images"]
    _log_scale(axes, spans_decades=False)
    _cost_axis(axes, "images")
    axes.set_ylabel("denoising loss")
    axes.set_title(run_dir.resolve().name, loc="left")
    axes.legend(frameon=False)
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def plot_quality(curves: Sequence[Curve], x: str, y: str, target: float | None, path: Path) -> Path:
    """Draws `quality_figure` into a file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    quality_figure(curves, x, y, target).savefig(path, dpi=120)
    return path


def quality_figure(curves: Sequence[Curve], x: str, y: str, target: float | None) -> Figure:
    """Quality over cost, a line a run; its 95 % band where errors are known; a dot at stages' ends.

    Retrainings of one recipe share a colour. Where they were measured at the same steps they are
    thin lines round their mean, and have the band of none.

    Args:
        curves: one or more.
        x: a key of `COSTS`; time is drawn in seconds, minutes or hours.
        y: a key of `QUALITIES`; a logarithmic axis where all values are above 0.
        target: a dotted line there.
    """
    figure, axes = _empty()
    longest = max(float(curve.cost[-1]) for curve in curves)
    unit, unit_name = _time_unit(longest) if x == "time" else (1.0, "")
    groups = list(dict.fromkeys(curve.group for curve in curves))
    for number, group in enumerate(groups):
        members, colour = [c for c in curves if c.group == group], f"C{number % 10}"
        mean = _mean(members) if len(members) > 1 else None
        for place, curve in enumerate(members):
            label = (group if place == 0 else "_retraining") if mean is None else "_retraining"
            style = {"linewidth": 1.5 if mean is None else 0.7, "alpha": 1 if mean is None else 0.6}
            _draw(axes, curve, unit, mean is None, label=label, color=colour, **style)
        if mean is not None:
            _draw(axes, mean, unit, True, label=group, color=colour, linewidth=2)
    if any(len(set(curve.stages)) > 1 for curve in curves):
        axes.plot([], [], color="0.4", marker="o", linestyle="", label="end of a stage")
    values = np.concatenate([curve.quality for curve in curves])
    if (values > 0).all():
        _log_scale(axes, spans_decades=values.max() > 10 * values.min())
    if target is not None:
        axes.axhline(
            target, color="0.4", linestyle=":", linewidth=1.2, label=f"target {target:.4g}"
        )
    _cost_axis(axes, x, unit_name)
    axes.set_ylabel(QUALITIES[y])
    axes.legend(frameon=False)
    return figure


def _draw(axes: Any, curve: Curve, unit: float, with_band: bool, **style: Any) -> None:
    cost = curve.cost / unit
    axes.plot(cost, curve.quality, marker="." if len(cost) < 3 else "", **style)
    if with_band and curve.error is not None:
        half = NORMAL_95 * curve.error
        low, high = curve.quality - half, curve.quality + half
        axes.fill_between(cost, low, high, color=style["color"], alpha=0.12, lw=0)
    ends = [i for i in range(len(cost) - 1) if curve.stages[i] != curve.stages[i + 1]]
    if with_band and ends:
        axes.plot(
            cost[ends],
            curve.quality[ends],
            linestyle="",
            marker="o",
            markersize=6,
            color=style["color"],
            label=f"_end of {curve.stages[ends[0]]}",
        )


def _mean(curves: Sequence[Curve]) -> Curve | None:
    """The mean of retrainings that were measured equally often; else None."""
    if len({curve.stages for curve in curves}) > 1:
        return None
    cost, quality = (
        np.mean([getattr(curve, name) for curve in curves], axis=0) for name in ("cost", "quality")
    )
    return Curve(curves[0].group, cost, quality, None, curves[0].stages, curves[0].group)


def _empty() -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _log_scale(axes: Any, spans_decades: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    # Within a decade ticks lie evenly in plain numbers: decades would leave one or two.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if spans_decades else MaxNLocator(6))
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _cost_axis(axes: Any, x: str, unit_name: str = "") -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlim(left=0)
    if not unit_name:
        axes.xaxis.set_major_formatter(EngFormatter("FLOP" if x == "flops" else "", sep=" "))
    axes.set_xlabel(COSTS[x] + (f", {unit_name}" if unit_name else ""))


def _time_unit(seconds: float) -> tuple[float, str]:
    """A unit in which so many seconds are a number of one or two digits, mostly."""
    if seconds < 120:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 7200 else (3600.0, "hours")
