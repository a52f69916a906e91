"""`maskdm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from maskdm.commands.common import DONE, quiet
from maskdm.files import expanded, refuse_unwritable
from maskdm.runs.find import REPORT
from maskdm.words import size_text

Runs = Annotated[tuple[str, ...], tyro.conf.Positional, quiet(metavar="RUN [RUN ...]")]


def report(runs: Runs, *, out: Annotated[Path | None, quiet(metavar="HTML")] = None) -> int:
    """Write a report of runs: one HTML file, complete in itself, which needs no network.

    What was trained and on what, losses and quality against images, FLOPs or time, previews,
    samples beside training images, evaluations in plain words, planned against spent, warnings.
    Several runs are shown side by side. Training writes RUN/report.html by itself, anew at each
    preview and measurement; so does `maskdm evaluate RUN`.

    Args:
        runs: run folders, finished or not.
        out: the file; default: RUN/report.html, for several runs ./report.html.
    """
    if not runs:
        raise ValueError("name a run, or several: maskdm report RUN [RUN ...] --out report.html")
    folders = [expanded(run) for run in runs]
    places = [folder.resolve() for folder in folders]
    if twice := next((run for run in places if places.count(run) > 1), None):
        raise ValueError(f"{twice} is named twice: name each run once")
    path = out or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"--out {path}: name a file that ends in .html")
    refuse_unwritable(path, "--out")

    from maskdm.report.page import write_report

    write_report(folders, path)
    print(f"-> {path} ({size_text(path.stat().st_size)})")
    return DONE
