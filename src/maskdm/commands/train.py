"""`maskdm train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from maskdm.commands.common import DONE, STOPPED, RecipeName
from maskdm.recipe import Recipe


def train(
    recipe: RecipeName,
    *,
    out: Path,
    settings: Annotated[Recipe, tyro.conf.arg(name="")],
    resume: Literal["auto", "never"] = "auto",
) -> int:
    """Run a recipe's stages. Every setting of the recipe is a flag, and the flag wins.

    A folder that holds an unfinished run of the same settings is continued, exactly.
    Exit codes: 0 done, 1 failed, 2 wrong input, 3 stopped by a signal after saving.

    Args:
        recipe: name of a packaged recipe (`maskdm recipes`), or a YAML file.
        out: the run's folder.
        resume: auto continues a run in the folder; never refuses one.
    """
    settings = settings.checked()

    from maskdm.training.trainer import train as run

    return DONE if run(settings, out, resume).finished else STOPPED
