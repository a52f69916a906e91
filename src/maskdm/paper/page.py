"""What came of a repeated table or figure: a page of Markdown and a picture, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskdm.evaluation.curve_points import points_of, title_of
from maskdm.evaluation.curves import curves_of, read_facts
from maskdm.evaluation.records import RECORDS, read_records
from maskdm.metrics import METRICS
from maskdm.paper.reproduce import Row, Wanted, number, recipes_of
from maskdm.paper.scales import SCALES
from maskdm.paper.tables import experiments, paper_fid
from maskdm.recipe_files import load_recipe
from maskdm.report.plots import plot_quality
from maskdm.words import flops_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, PICTURE = "README.md", "picture.png"


def write_page(wanted: Wanted, rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes a page and its picture into the folder of the runs; gives their paths.

    The picture has curves where averages were kept along the runs, else a dot for each row.
    """
    page, picture = out / PAGE, out / PICTURE
    curved = [row for row in rows if any((run / "kept").is_dir() for run in row.runs)]
    if curved:
        _plot_curves(curved, picture)
    else:
        figure_of(rows).savefig(picture, dpi=120)
    page.write_text("\n".join(page_lines(wanted, rows)) + "\n", "utf-8")
    return [page, picture]


def page_lines(wanted: Wanted, rows: Sequence[Row]) -> list[str]:
    """The page in lines of Markdown."""
    scale = SCALES[wanted.scale]
    titles = [
        one.title
        for name, one in experiments().items()
        if wanted.target in (name, name.rstrip("abc"))
    ]
    recipe = load_recipe(rows[0].runs[0] / "recipe.yaml")
    sources = dict.fromkeys(row.source for row in rows)
    title = METRICS["frechet"].title_in(rows[0].features)
    nums = {len(row.found) for row in rows}
    seeds = f"{min(nums)} to {max(nums)} seeds" if len(nums) > 1 else f"{max(nums)} seeds"
    seeds = "one seed" if nums == {1} else f"{seeds}, ± their standard deviation"
    names = recipes_of(wanted.target)
    missing = len(names) - len(rows)
    lines = [
        f"# {'; '.join(titles)}",
        "",
        *([f"**Still missing: {missing} of {len(names)} recipes.**", ""] if missing else []),
        f"{scale.means} Images: {', '.join(sources)}, {recipe.data.shape[0]} pixels; "
        f"{recipe.evaluation.num:,} samples; {seeds}.",
        "",
        f"| recipe | FID in the paper | {title} | dense, same FLOPs | FLOPs |",
        "|---|---|---|---|---|",
    ]
    best = {source: min(row.mean for row in rows if row.source == source) for source in sources}
    for row in rows:
        fid = paper_fid(row.recipe)
        found = number(row.found)
        found = f"**{found}**" if row.mean == best[row.source] else found
        lines.append(
            f"| {row.recipe} | {'' if fid is None else fid} | {found} | {number(row.control)} | "
            f"{flops_text(row.flops)} |"
        )
    return [*lines, "", f"![{titles[0]}]({PICTURE})"]


def figure_of(rows: Sequence[Row]) -> Figure:
    """A dot for each row: the paper's FID at the left, what was found here at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    fids = [paper_fid(row.recipe) for row in rows]
    panels: Any = figure.subplots(1, 2 if any(fids) else 1, sharey=True, squeeze=False)[0]
    places = range(len(rows))
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if any(fids):
        known = [(fid, place) for fid, place in zip(fids, places, strict=True) if fid is not None]
        panels[0].plot(*zip(*known, strict=True), "o", color="0.4")
        panels[0].set_title("FID in the paper", loc="left", fontsize=10)
    axes = panels[-1]
    for place, row in zip(places, rows, strict=True):
        for value, half in zip(row.found, row.half, strict=True):
            axes.errorbar(value, place, xerr=half, fmt="o", color="C0", markersize=5, elinewidth=1)
        axes.plot(row.control, [place] * len(row.control), "D", color="C1", markersize=4)
    axes.plot([], [], "o", color="C0", label="the recipe")
    if any(row.control for row in rows):
        axes.plot([], [], "D", color="C1", label="dense, same FLOPs")
        figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    title = METRICS["frechet"].title_in(rows[0].features)
    axes.set_title(f"{title} here", loc="left", fontsize=10)
    panels[0].set_yticks(list(places), [row.recipe for row in rows])
    panels[0].invert_yaxis()
    return figure


def _plot_curves(rows: Sequence[Row], path: Path) -> None:
    """Saves the distances of kept averages against FLOPs, the controls' too."""
    runs, groups = dict[str, Path](), dict[str, str]()
    for row in rows:
        for run in [*row.runs, *row.controls]:
            runs[run.name] = run
            groups[run.name] = f"{row.recipe}{', dense' * (run in row.controls)}"
    lines = points_of({name: read_records(run / RECORDS) for name, run in runs.items()}, "frechet")
    facts = {name: read_facts(run) for name, run in runs.items()}
    curves, _ = curves_of(lines, facts, "flops", "frechet", in_training=False)
    curves = [replace(curve, group=groups[curve.name]) for curve in curves]
    plot_quality(curves, "flops", "frechet", None, path, title_of("frechet", lines))
