"""`maskdm recipes`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import tyro

from maskdm.commands.common import DONE, quiet
from maskdm.recipe_files import load_recipe, recipe_names, recipe_text, whole_text
from maskdm.words import printable_lines

OptionalName = Annotated[str | None, tyro.conf.Positional, quiet(metavar="[NAME]")]
WIDTH = 80
FIXED = "\u00a0%"


def recipes(
    name: OptionalName = None,
    *,
    gpu: Annotated[str | None, quiet(metavar="GPU")] = None,
    share: Annotated[float | None, quiet(metavar="FLOAT")] = None,
) -> int:
    """List the packaged recipes, or print one (save it to a file, change it, and train that).

    Those of the paper are grouped by its tables and figures, with the FID that it prints.

    Args:
        name: the recipe to print.
        gpu: also list the hours of training on one such GPU, in bf16 (t4, v100: fp16): t4, v100,
            l4, rtx3090, rtx4090, rtx5090, a100, h100, h200 or b200.
        share: of the GPU's peak that training reaches. Default: 0.22, as the paper's runs.
    """
    if share is not None and gpu is None:
        raise ValueError("--share is of a GPU's peak: add --gpu")
    if name is not None:
        if gpu is not None:
            raise ValueError(f"--gpu is for the list: maskdm plan {name} --gpu {gpu} plans one")
        print(printable_lines(whole_text(name)), end="")
        return DONE
    print("\n".join(listing(gpu, share)))
    return DONE


def listing(gpu: str | None = None, share: float | None = None) -> list[str]:
    """The packaged recipes in lines of at most WIDTH columns.

    Args:
        gpu, share: for a column of hours; None = none, and the share that the paper's runs had.

    Raises ValueError for an unknown GPU, or a share that is none.
    """
    from maskdm.paper.tables import experiments, paper_fid

    groups = {one.title: one.recipes for one in experiments().values()}
    of_paper = {name for names in groups.values() for name in names}
    hours = {} if gpu is None else _hours(sorted(of_paper), gpu, share)
    others = [name for name in recipe_names() if name not in of_paper]
    lines = ["Images of your own, and first steps", *_rows(others, {})]
    for title, names in groups.items():
        columns = {}
        if fids := {name: f"{fid:.2f}" for name in names if (fid := paper_fid(name))}:
            columns["FID"] = fids
        if gpu is not None:
            columns[f"{gpu.upper()} hours"] = {name: hours_text(hours[name]) for name in names}
        heads = "".join(f"  {head}" for head in columns)
        lines += ["", f"{title:{WIDTH - len(heads)}}{heads}".rstrip(), *_rows(names, columns)]
    return lines


def _rows(names: Sequence[str], columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each recipe, and more where its description is long; columns stand at the end."""
    width, lines = max(map(len, names)), []
    for name in names:
        ends = "".join(f"  {cells.get(name, ''):>{len(h)}}" for h, cells in columns.items())
        room = WIDTH - width - 4 - len(ends)
        text = _about(name).replace(" %", FIXED)  # no line begins with a sign
        parts = textwrap.wrap(text, room, subsequent_indent="  ", break_on_hyphens=False)
        parts = [part.replace(FIXED, " %") for part in parts]
        lines.append(f"  {name:{width}}  {parts[0]:{room}}{ends}".rstrip())
        lines += [f"  {'':{width}}  {part}" for part in parts[1:]]
    return lines


def hours_text(hours: float) -> str:
    """Hours with a digit behind the point below a hundred."""
    return f"{hours:,.1f}" if hours < 100 else f"{hours:,.0f}"


def _about(name: str) -> str:
    """The first line of a recipe's comment, without the number of its table or figure."""
    text = recipe_text(name).splitlines()[0].removeprefix("# ").removesuffix(".")
    return re.sub(r"^(Table|Figure|Section) [\d.]+[abc]?('s )?(?:, )?", "", text)


def _hours(names: Sequence[str], gpu: str, share: float | None) -> dict[str, float]:
    """Hours of training on one GPU, in bf16, or in fp16 where it has no bf16 units."""
    from maskdm.models.build import Backbone, weightless_model
    from maskdm.training.gpus import PAPERS_SHARE, Gpus

    where = Gpus(gpu, 1, PAPERS_SHARE if share is None else share)
    if not where.has_bf16:
        where = replace(where, precision="fp16")
    models, hours = dict[str, Backbone](), {}
    for name in names:
        recipe = load_recipe(name)
        sizes = f"{recipe.model} {recipe.data.shape}"
        if sizes not in models:
            models[sizes] = weightless_model(recipe)
        step_sec = where.speed(recipe, models[sizes]).step_sec
        pairs = zip(recipe.stages, step_sec, strict=True)
        hours[name] = sum(stage.steps * sec for stage, sec in pairs) / 3600
    return hours
