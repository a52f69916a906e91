"""`maskdm train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from maskdm.commands.common import DONE, STOPPED, LengthFlags, NoPrefix, RecipeName, quiet
from maskdm.recipe import Recipe

AS_THE_RECIPE = LengthFlags()


def train(
    recipe: RecipeName,
    *,
    out: Annotated[Path | None, quiet(metavar="RUN")] = None,
    length: Annotated[LengthFlags, NoPrefix] = AS_THE_RECIPE,
    change: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    settings: Annotated[Recipe, NoPrefix],
    resume: Literal["auto", "never"] = "auto",
) -> int:
    """Run a recipe's stages. Every setting of the recipe is a flag, and the flag wins.

    A folder that holds an unfinished run of the same settings is continued, exactly; so does
    `maskdm train RUN`. A budget scales the run: hours on this machine (measured for some seconds),
    floating-point operations, images or passes over them; `maskdm train RUN --hours +2` extends
    it. Exit codes: 0 done, 1 failed, 2 wrong input, 3 stopped by a signal after saving.

    Args:
        recipe: name of a packaged recipe (`maskdm recipes`), a YAML file, or the folder of a run
            that goes on.
        out: the run's folder. Default: runs/RECIPE-SOURCE.
        change: go on with changed learning rates, batch sizes and the like.
        resume: auto continues a run in the folder; never refuses one.
    """
    settings = settings.checked()

    from maskdm.training.planning import named_folder
    from maskdm.training.trainer import train as run

    folder = out or named_folder(recipe, settings, length.control)
    if out is None:
        print(f"run     {folder}", flush=True)
    result = run(settings, folder, resume, change=change, **asdict(length))
    return DONE if result.finished else STOPPED
