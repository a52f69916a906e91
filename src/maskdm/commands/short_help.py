"""The settings that a beginner needs, for the help of a command that takes a recipe's settings.

`--help-all` shows the rest.
"""

from __future__ import annotations

from maskdm.recipe import Recipe, Stage
from maskdm.recipe_data import Data
from maskdm.recipe_evaluation import Evaluation
from maskdm.settings import Settings
from maskdm.words import wrapped

WIDTH, INDENT = 80, 24
# Flag -> (the group of settings that holds it, its name there, or its help text).
SETTINGS: dict[str, tuple[type[Settings], str]] = {
    "--data.source": (Data, "source"),
    "--data.size": (Data, "size"),
    "--data.flip": (Data, "flip"),
    "--data.held-out": (Data, "held_out"),
    "--stages.all.batch-size": (Stage, "batch_size"),
    "--stages.all.lr": (Stage, "lr"),
    "--evaluation.features": (Evaluation, "features"),
    "--init": (Recipe, "init"),
    "--seed": (Recipe, "seed"),
    "--precision": (Recipe, "precision"),
    "--log-to": (Recipe, "log_to"),
}
_BOTH = {
    "--hours N": "How long the run may take here, with previews and measuring. Also --minutes, "
    "--flops, --images, --epochs; +N extends a run.",
    "--shrink 0.01": "Scales the length of all stages, for a quick try of any recipe.",
    "--control dense": "The recipe's control instead: no masks, the same FLOPs.",
}
FLAGS = {
    "train": {
        "--out RUN": "The run's folder. Default: runs/RECIPE-SOURCE.",
        **_BOTH,
        "--change": "Go on with changed learning rates, batch sizes and the like.",
    },
    "plan": {
        "--gpu h200": "Plan for a named GPU instead of this machine; --gpus 8 for several, "
        "--share 0.22 for the part of its peak that training reaches.",
        **_BOTH,
        "--json": "Print the plan as JSON.",
    },
    "search": {
        "--hours N": "What all training of the search may take, the dense control's among it; or "
        "--flops N.",
        "--out FOLDER": "The search's folder. Default: searches/RECIPE-SOURCE.",
        "--storage URL": "Any storage of Optuna's. Default: SQLite in the folder.",
        "--how.candidates N": "Schedules tried at the shortest length. Default: 27.",
        "--how.proxy NAME": "What orders the trials: dense_loss, sliced or kid.",
        "--space.rates ...": "Fractions hidden. Also --space.kinds, --space.shares, --space.lrs, "
        "--space.masked-lrs, --space.batches, --space.masked-stages.",
    },
}
HEAD = """\
usage: maskdm {command} RECIPE [--hours N] [settings]

{what}

RECIPE is a packaged recipe (`maskdm recipes` lists them), a YAML file, or the
folder of a run{which}. Every setting of the recipe is a flag.
"""
WHAT = {
    "train": "Run a recipe's stages. The same command continues an unfinished run.",
    "plan": "Say what a run will cost (time, memory, disk); train nothing.",
    "search": "Search for the best schedule: which masks, for how long, at which learning\nrates. "
    "The same command continues a search, alone or beside others.",
}
WHICH = {"train": " that goes on", "plan": " that goes on", "search": ", for its recipe"}


def short_help(command: str) -> str:
    """Help of `train`, `plan` or `search` on one screen."""
    lines = [HEAD.format(command=command, what=WHAT[command], which=WHICH[command])]
    for flag, text in FLAGS[command].items():
        lines += _entry(flag, text)
    lines.append("\nThe most useful settings (`maskdm recipes NAME` shows a recipe's values):")
    for flag, (group, name) in SETTINGS.items():
        lines += _entry(flag, group.model_fields[name].description or "")
    lines.append(
        f"\n`maskdm {command} RECIPE --help-all` lists all settings of a recipe, stage by stage."
    )
    return "\n".join(lines)


def _entry(flag: str, text: str) -> list[str]:
    start = f"  {flag}".ljust(INDENT)
    if len(start) > INDENT:
        return [start.rstrip(), *wrapped(text, " " * INDENT, WIDTH)]
    return wrapped(text, start, WIDTH)
