"""`maskdm search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from maskdm.commands.common import (
    DONE,
    STOPPED,
    NoPrefix,
    OptionalFloat,
    RecipeName,
    quiet,
)
from maskdm.recipe import Recipe
from maskdm.search.space import How, Space
from maskdm.words import flops_text

HOW, SPACE = How(), Space()


def search(
    recipe: RecipeName,
    *,
    hours: OptionalFloat = None,
    flops: OptionalFloat = None,
    out: Annotated[Path | None, quiet(metavar="FOLDER")] = None,
    storage: Annotated[str | None, quiet(metavar="URL")] = None,
    how: How = HOW,
    space: Space = SPACE,
    settings: Annotated[Recipe, NoPrefix],
) -> int:
    """Search for the best schedule of a recipe: masks, shares, learning rates, batches.

    Successive halving: many short trials, of which the best go on to longer ones; dense training,
    at learning rates of its own, is always among them. The best masked and the best dense schedule
    are trained again on fresh seeds. FOLDER/winner.yaml is the masked one where it is better beyond
    the noise, else the dense one. The same command continues a search; started several times, with
    one FOLDER, the processes share its trials. Exit codes: as for train.

    Args:
        recipe: name of a packaged recipe, a YAML file, or a run's folder.
        hours: what all training of the search may take on this machine, measuring among it.
        flops: the same in floating-point operations of training.
        out: the search's folder. Default: searches/RECIPE-SOURCE.
        storage: URL of any storage of Optuna's. Default: SQLite in the folder.
    """
    settings, how, space = settings.checked(), how.checked(), space.checked()
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("a search needs Optuna: pip install 'maskdm[search]'") from None

    from maskdm.files import write_text
    from maskdm.search.report import save_tree, trials_json, verdict_text, winner_text
    from maskdm.search.search import search as run
    from maskdm.training.planning import named_folder

    folder = out or Path("searches") / named_folder(recipe, settings).name
    print(f"search  {folder}", flush=True)
    budget = {"hours": hours, "flops": flops}
    this, found = run(settings, folder, **budget, how=how, space=space, storage=storage, say=_say)
    if found is None:
        print(f"stopped after saving: call again to go on with {folder}")
        return STOPPED
    lines = verdict_text(found.verdict, this.plan, this.builder.full_flops)
    spent = (
        f"spent   {flops_text(found.spent)} of {flops_text(this.plan.budget)} in "
        f"{len(found.trials)} trials, those of dense schedules among them"
    )
    print("\n".join([*lines, spent]))
    title = f"Found by `maskdm search {recipe}`: {found.verdict.winner}."
    name = recipe if "/" not in recipe else None
    winner = folder / "winner.yaml"
    write_text(winner, winner_text(found.recipe, name, [title, *lines, spent]))
    write_text(folder / "result.json", trials_json(found.trials, found.verdict, found.spent))
    print(f"tree    {save_tree(this.forest.nodes(), found.trials, folder / 'tree.png')}")
    print(f"winner  {winner}")
    print(f"next    maskdm train {winner} --out runs/{folder.name}")
    return DONE


def _say(text: str) -> None:
    print(text, flush=True)
