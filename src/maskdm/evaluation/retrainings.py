"""Which runs are trainings of one recipe with different seeds, and short names of runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskdm.recipe import Recipe
from maskdm.recipe_files import migrated
from maskdm.runs.changes import FREE, FREE_OF_STAGE
from maskdm.words import listed

Training = tuple[str, int]  # what was trained, as text, and the seed


def training_of_recipe(recipe: dict[str, Any] | None, *more: Any) -> Training | None:
    """What a run trained, and its seed: retrainings of one recipe differ in the seed alone.

    Args:
        recipe: a run's recipe, as JSON; None = unknown, which gives None.
        more: what else must be equal.
    """
    if recipe is None:
        return None
    try:
        recipe = Recipe(**migrated(recipe)).model_dump(mode="json")  # with settings added later
    except ValueError:  # another version's: used as it is
        recipe = dict(recipe)
    return json.dumps([_trained(recipe), *more], sort_keys=True), recipe["seed"]


def _trained(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the seed, and without what changes no weight."""
    kept = {name: value for name, value in recipe.items() if name not in ("seed", *FREE)}
    kept["data"] = {name: value for name, value in recipe["data"].items() if name != "resident"}
    kept["stages"] = [
        {name: value for name, value in stage.items() if name not in FREE_OF_STAGE}
        for stage in recipe["stages"]
    ]
    return kept


def retrainings(
    trainings: Mapping[str, Training | None], caution: str | None = None
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Sorts runs into groups whose trainings differ in the seed alone.

    Args:
        trainings: name of a run -> what it trained; None = unknown.
        caution: noted for runs without retrainings.

    Gives the runs of each group by its name, `dense-* (3)`, and notes. A single run keeps its own
    name; runs with equal seeds, too, are not retrainings.
    """
    groups: dict[Any, list[str]] = {}
    first: dict[Training, str] = {}
    notes = []
    for run, training in trainings.items():
        if training is None:
            groups[run, None] = [run]
        elif training in first:
            groups[run, None] = [run]
            same = f"{run} has the same recipe and seed as {first[training]}"
            notes.append(f"{same}: it is not counted as a retraining")
        else:
            first[training] = run
            groups.setdefault(training[0], []).append(run)
    alone = [runs[0] for runs in groups.values() if len(runs) == 1]
    if caution and alone and len(trainings) > 1:
        whose = "each run" if len(alone) == len(trainings) else listed(alone)
        notes.append(f"one training of {whose}: {caution}")
    starts = [os.path.commonprefix(runs) for runs in groups.values()]
    named = {}
    for runs, start in zip(groups.values(), starts, strict=True):
        others = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        is_clear = others and start and starts.count(start) == 1
        named[f"{start}* ({len(runs)})" if is_clear else runs[0] + others] = tuple(runs)
    return named, notes


def measured_in_all(
    has: Mapping[str, Sequence[str]], wanted: str | None, hint: str = ""
) -> tuple[str, ...]:
    """The metrics that all runs have, or only the wanted one.

    Args:
        has: name of a run -> its metrics.
        wanted: one of them; None = all.
        hint: why a run may lack the wanted one.

    Raises ValueError where there is none, or a run lacks the wanted one; it lists what there is.
    """
    first, *others = has.values()
    common = [name for name in first if all(name in one for one in others)]
    if wanted in common:
        return (str(wanted),)
    if wanted is None and common:
        return tuple(common)
    measured = "; ".join(f"{run}: {', '.join(one) or 'none'}" for run, one in has.items())
    if wanted is None:
        raise ValueError(f"no metric was measured for all of these runs ({measured})")
    lacking = listed(run for run, one in has.items() if wanted not in one)
    raise ValueError(f"{wanted} was not measured for {lacking}{hint}; measured were {measured}")


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that are different: `dense`, or `a/dense`."""
    parts, names = [path.parts for path in paths], []
    for own in parts:
        lengths = range(1, len(own))
        unique = (n for n in lengths if [other[-n:] for other in parts].count(own[-n:]) == 1)
        names.append("/".join(own[-next(unique, len(own)) :]))
    return names
