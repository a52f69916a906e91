"""The report: one HTML file that needs no network, made from runs' folders."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import maskdm
from maskdm.evaluation.retrainings import short_names
from maskdm.files import write_text
from maskdm.report import facts, side_by_side
from maskdm.report.charts import NUM_TONES
from maskdm.report.facts import Run, read_run
from maskdm.report.pictures import embedded
from maskdm.runs.find import REPORT
from maskdm.words import one_line

if TYPE_CHECKING:
    from jinja2 import Environment

SHEETS = {
    "data.png": "Training images as the model sees them, then under the mask of each stage",
    "neighbours.png": "Samples of the finished model, each beside the training image that is most "
    "like it, pixel by pixel",
    "memorization.png": "The samples that come closest to training images, by the evaluation's "
    "features",
}


def write_report(run_dirs: Sequence[Path], path: Path) -> None:
    """Writes the report of runs, whole or not at all.

    Args:
        run_dirs: folders of one run or more; several are shown side by side.
        path: of the HTML file.

    Raises:
        ValueError: a folder holds no run, or a damaged file.
        OSError: the disk refused.
    """
    write_text(path, report_html(run_dirs))


def report_html(run_dirs: Sequence[Path]) -> str:
    """The report of runs as HTML. Raises ValueError where a folder holds no run."""
    names = [folder.resolve().name for folder in run_dirs]
    if len(run_dirs) > 1:
        names = short_names([folder.resolve() for folder in run_dirs])
    runs = [read_run(folder, name) for folder, name in zip(run_dirs, names, strict=True)]
    content = {
        "title": ", ".join(run.name for run in runs),
        "runs": [{**_shown(run), "tone": i % NUM_TONES} for i, run in enumerate(runs)],
        "together": _together(runs) if len(runs) > 1 else None,
        "version": maskdm.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
    }
    return _environment().get_template("report.html").render(content)


def update_report(run_dir: Path, say: Callable[[str], None]) -> None:
    """Writes RUN/report.html anew. Nothing that fails ends the caller: it is said instead."""
    try:
        write_report([run_dir], run_dir / REPORT)
    except Exception as error:  # noqa: BLE001  # a run of days is worth more than its report
        say(f"note: {run_dir / REPORT} could not be written: {one_line(error, 200)}")


def _shown(run: Run) -> dict[str, Any]:
    """What the page shows of a run."""
    return {
        "name": run.name,
        "state": run.state,
        "is_finished": run.is_finished,
        "summary": facts.summary(run),
        "tiles": facts.tiles(run),
        "warnings": facts.warnings(run),
        "charts": facts.charts(run),
        "previews": facts.previews(run),
        "sheets": {
            name.partition(".")[0]: embedded(run.folder / name, text)
            for name, text in SHEETS.items()
        },
        "evaluations": facts.evaluations(run),
        "stages": facts.stage_rows(run),
        "budget": facts.budget_text(run),
        "decisions": facts.decisions(run),
        "settings": facts.settings_of(run),
        "starts": facts.starts(run),
        "recipe": run.recipe.to_yaml(),
    }


def _together(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page shows of several runs side by side."""
    charts, notes = side_by_side.quality_charts(runs)
    return {
        "facts": side_by_side.fact_rows(runs),
        "charts": charts,
        "notes": notes,
        "metrics": side_by_side.metric_table(runs),
    }


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "page"
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
