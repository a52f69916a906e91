"""Which runs are trainings of one recipe by other seeds, and what runs are called."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskdm.recipe import Recipe

# Settings in which two runs may differ and still be trainings of one recipe: the seed, and what
# touches no weight.
NO_PART_OF_TRAINING = (
    "seed sampling evaluation log_every checkpoint_every keep_checkpoints evaluate_every "
    "preview_every num_previews preview_steps"
).split()

Training = tuple[str, int]  # what was trained, and by which seed


def training_of_recipe(recipe: dict[str, Any] | None, *more: Any) -> Training | None:
    """What a run trained and its seed: equal but for the seed in retrainings of one recipe.

    Args:
        recipe: a run's recipe, as JSON; None = unknown.
        more: what else must be equal.

    Returns:
        None where the recipe is unknown.
    """
    if recipe is None:
        return None
    try:
        recipe = Recipe(**recipe).model_dump(mode="json")  # settings that came later: as they were
    except ValueError:  # another version's: taken as it is
        recipe = dict(recipe)
    kept = {name: value for name, value in recipe.items() if name not in NO_PART_OF_TRAINING}
    return json.dumps([kept, *more], sort_keys=True), recipe["seed"]


def retrainings(
    trainings: Sequence[Training | None],
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Sorts runs into groups whose trainings differ in nothing but the seed.

    Returns:
        The groups, as numbers of runs, in the order in which they are first met; and pairs of
        runs (later, earlier) that have even the seed in common: the later is a group of its own.
    """
    groups: list[list[int]] = []
    of_recipe: dict[str, list[int]] = {}
    same: list[tuple[int, int]] = []
    for number, training in enumerate(trainings):
        group = of_recipe.get(training[0]) if training else None
        if training is None or group is None:
            group = []
            groups.append(group)
            if training is not None:
                of_recipe[training[0]] = group
        else:
            seeds = {known[1]: i for i in group if (known := trainings[i]) is not None}
            if training[1] in seeds:
                same.append((number, seeds[training[1]]))
                groups.append([number])
                continue
        group.append(number)
    return groups, same


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that tell them apart: `dense`, or `a/dense`."""
    parts = [path.parts for path in paths]
    lengths = [1] * len(paths)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        longer = [
            min(length + (names.count(name) > 1), len(part))
            for name, length, part in zip(names, lengths, parts, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


def group_names(names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[str]:
    """What groups of runs are called: `dense-* (3)`; a group of one by its run."""
    starts = [os.path.commonprefix([names[i] for i in group]) for group in groups]
    called = []
    for group, start in zip(groups, starts, strict=True):
        first = names[group[0]]
        if len(group) == 1:
            called.append(first)
        elif start and starts.count(start) == 1:
            called.append(f"{start}* ({len(group)})")
        else:
            called.append(f"{first} and {len(group) - 1} more")
    return called
