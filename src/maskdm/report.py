"""Plots of a run, for people."""

from __future__ import annotations

from pathlib import Path

from maskdm.training.monitor import read_metrics


def plot_loss(run_dir: Path) -> Path:
    """Draws the run's loss over images seen, a colour per stage, into RUN/loss.png.

    Losses of stages with different masks are means over different patches: they compare the
    steps of one stage, not the stages.

    Raises ValueError where the run has no metrics yet.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{run_dir} has no metrics to plot yet")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(6))  # plain numbers: losses span less than a decade
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel("images seen")
    axes.set_ylabel("denoising loss")
    axes.set_title(run_dir.resolve().name, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=120)
    return path
