"""`maskdm reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from maskdm.commands.common import DONE, STOPPED, is_main_process, quiet
from maskdm.files import expanded, refuse_unwritable
from maskdm.words import flops_text

Target = Annotated[str, tyro.conf.Positional, quiet(metavar="TARGET")]


def reproduce(
    target: Target,
    *,
    scale: str = "smoke",
    out: Annotated[Path | None, quiet(metavar="FOLDER")] = None,
    source: Annotated[tuple[str, ...], quiet(metavar="SOURCE [OTHER]")] = (),
    flops: Annotated[float | None, quiet(metavar="FLOPS")] = None,
    seeds: int = 1,
    control: bool = True,
    only: Annotated[tuple[str, ...], quiet(metavar="RECIPE ...")] = (),
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Run a table or figure of the paper again, at a scale that one has.

    Trains each of its recipes and, for the same FLOPs, each one's dense control; evaluates them;
    writes a page with the paper's figures beside, and a picture, anew after each recipe. The same
    command goes on after a kill. Exit codes: 0 done, 3 stopped by a signal after saving.

    Args:
        target: table1 (or table1a, b, c), table2, table3, table4, fig2, fig4 (a, b, c), fig5a,
            fig5b, fig6 or fig7.
        scale: smoke = a minute or two on a CPU, shows that everything runs; small = 32 pixels, an
            evening on two cores; paper = as it is there.
        out: the folder of the runs and the page. Default: reproductions/TARGET-SCALE.
        source: other images for smoke and small; a second for experiments on other data. Default:
            drawn faces.
        flops: of the most expensive recipe, to which all others keep their ratio.
        seeds: trainings of each recipe.
        control: train the dense controls.
        only: train and measure these of the target's recipes. The page has all that are measured.
        verbose: show the trainings.
    """
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least one")

    from maskdm.paper import fig2
    from maskdm.paper.page import PAGE, PICTURE, write_page
    from maskdm.paper.reproduce import FIG2, Wanted, number, rows_of
    from maskdm.paper.reproduce import reproduce as run

    wanted = Wanted(target, scale, source, flops, seeds, control, only)
    folder = expanded(out or Path("reproductions") / f"{target}-{scale}")
    names = [] if target == FIG2 else wanted.recipes
    refuse_unwritable(folder, "--out", is_folder=True)
    page = folder / PAGE
    if page.is_file() and f"]({PICTURE})" not in page.read_text("utf-8", "replace"):
        raise ValueError(f"{folder} has a {PAGE} of its own: name a new folder with --out")
    if target == FIG2:
        drawn = list[fig2.Row]()
        for seed, one in enumerate(fig2.reproduce_fig2(wanted, folder, verbose)):
            if one is None:
                return _stopped()
            drawn.append(one)
            found = ", ".join(f"{name} {d.energy:.4f}" for name, d in one.distances.items())
            print(f"seed {seed}  {flops_text(one.flops)}  energy distance: {found}", flush=True)
        return _written(fig2.write_fig2(wanted, drawn, folder))
    paths = list[Path]()
    for done, row in enumerate(run(wanted, folder, verbose), start=1):
        if row is None:
            return _stopped()
        if is_main_process():
            dense = f", dense {number(row.control)}" if row.control else ""
            print(
                f"{done:3} of {len(names)}  {row.recipe:24} {flops_text(row.flops):>10}  "
                f"{number(row.found)}{dense}",
                flush=True,
            )
            rows = rows_of(wanted, folder)  # all that there are, should this be killed
            paths = write_page(wanted, rows, folder)
    return _written(paths)


def _stopped() -> int:
    print("stopped after saving: the same command goes on")
    return STOPPED


def _written(paths: Sequence[Path]) -> int:
    for path in paths:
        print(f"-> {path}")
    return DONE
