"""`maskdm train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from maskdm.commands.common import DONE, STOPPED, RecipeName, quiet
from maskdm.recipe import Recipe

Amount = Annotated[str | None, quiet(metavar="N|+N")]


def train(
    recipe: RecipeName,
    *,
    out: Annotated[Path | None, quiet(metavar="RUN")] = None,
    hours: Amount = None,
    minutes: Amount = None,
    flops: Amount = None,
    images: Amount = None,
    epochs: Amount = None,
    shrink: float = 1.0,
    control: Literal["none", "dense"] = "none",
    control_equal: Literal["flops", "time", "steps"] = "flops",
    change: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    settings: Annotated[Recipe, tyro.conf.arg(name="")],
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
        hours: how long the run may take on this machine, with previews and measuring.
        minutes: the same in minutes.
        flops: floating-point operations of all training steps.
        images: images seen in all stages together.
        epochs: passes over the training images.
        shrink: scales all stages, and warm-ups, averages and intervals with them.
        control: dense = train the recipe's control instead: its last stage's settings alone,
            without masks.
        control_equal: what the control has in common with the recipe.
        change: go on with changed learning rates, batch sizes and the like.
        resume: auto continues a run in the folder; never refuses one.
    """
    settings = settings.checked()

    from maskdm.training.planning import named_folder
    from maskdm.training.trainer import train as run

    folder = out or named_folder(recipe, settings, control)
    if out is None:
        print(f"run     {folder}", flush=True)
    return (
        DONE
        if run(
            settings,
            folder,
            resume,
            hours=hours,
            minutes=minutes,
            flops=flops,
            images=images,
            epochs=epochs,
            shrink=shrink,
            control=control,
            control_equal=control_equal,
            change=change,
        ).finished
        else STOPPED
    )
