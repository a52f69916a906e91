"""Quality against cost: the curves of runs, and what each had spent when it reached a quality."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.evaluation.distances import NORMAL_95
from maskdm.evaluation.retrainings import group_names, retrainings, training_of_recipe
from maskdm.recipe_files import load_recipe

COSTS = {"images": "images", "flops": "flops", "time": "elapsed_sec"}  # --x -> key of a line
QUALITIES = ("sliced", "kid", "dense_loss")  # all lower for the better
Line = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a run's folder tells of its training, as far as it is known.

    Attributes:
        recipe: as JSON.
        images_sha256: of the images, prepared.
        devices: it was trained on, `2 x NVIDIA H100`.
    """

    recipe: dict[str, Any] | None = None
    images_sha256: str | None = None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A run's quality over its cost.

    Attributes:
        name: of the run.
        cost: so far, float64 (K,), increasing.
        quality: float64 (K,), lower for the better.
        error: standard errors of it, float64 (K,); None where they are unknown.
        stages: names (K,) of the stages.
        group: what it and its retrainings are called together.
    """

    name: str
    cost: np.ndarray
    quality: np.ndarray
    error: np.ndarray | None
    stages: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Reached:
    """What a run had spent when it first reached a quality.

    Attributes:
        name: of the run.
        cost: None where it never did.
        is_bound: it was reached at the first measurement already: the cost is at most that.
        ratio: the baseline's cost over this one; None where either is unknown or nothing.
        within: costs at which the quality was reached but for the noise of a measurement, or
            beyond it; None where unknown, the second None where never.
    """

    name: str
    cost: float | None
    is_bound: bool
    ratio: float | None
    within: tuple[float, float | None] | None


def read_facts(run: Path) -> Facts:
    """What a run's folder tells. Raises ValueError for a damaged file."""
    recipe, starts = None, []
    if (run / "recipe.yaml").is_file():
        recipe = load_recipe(run / "recipe.yaml").model_dump(mode="json")
    path = run / "environment.json"
    if path.is_file():
        try:
            starts = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    devices = [f"{one.get('num_ranks', 1)} x {one['device']}" for one in starts if "device" in one]
    sha = starts[-1].get("images_sha256") if starts else None
    return Facts(recipe, sha, tuple(dict.fromkeys(devices)))


def choose_quality(lines: Mapping[str, Sequence[Line]], wanted: str | None) -> str:
    """The quality that was asked for, or the first one that all runs have measured.

    Raises ValueError where a run has none of it; it says what there is.
    """
    has = {
        run: [q for q in QUALITIES if any(q in line for line in of)] for run, of in lines.items()
    }
    common = [q for q in QUALITIES if all(q in one for one in has.values())]
    if wanted is None and common:
        return common[0]
    if wanted in common:
        return str(wanted)
    told = "; ".join(f"{run}: {', '.join(one) or 'none'}" for run, one in has.items())
    if wanted is None:
        raise ValueError(f"no quality was measured in all of these runs ({told})")
    lacking = [run for run, one in has.items() if wanted not in one]
    why = "evaluation.quick_num 0" if wanted != "dense_loss" else "data.held_out 0"
    raise ValueError(
        f"{wanted} was not measured in {', '.join(lacking)} (trained with {why}?); measured are "
        f"{told}"
    )


def curves_of(
    lines: Mapping[str, Sequence[Line]], facts: Mapping[str, Facts], x: str, y: str
) -> tuple[list[Curve], list[str]]:
    """The curves of runs whose qualities compare, and notes of what a reader should know.

    Args:
        lines: name of a run -> lines of its quality.jsonl; lines without y are passed over.
        facts: name of a run -> what its folder tells.
        x: a key of `COSTS`.
        y: one of `QUALITIES`, measured in every run.

    Raises:
        ValueError: the qualities don't compare; it says what differs.
    """
    kept, notes = {}, []
    for run, of_run in lines.items():
        foreign = _foreign_stages(facts[run]) if y == "dense_loss" else ()
        usable = [line for line in of_run if isinstance(line.get(y), (int, float))]
        kept[run] = [one for one in usable if math.isfinite(one[y]) and one["stage"] not in foreign]
        if dropped := [stage for stage in foreign if any(one["stage"] == stage for one in usable)]:
            notes.append(
                f"{run}: {', '.join(dropped)} left out: under another noise schedule than the last "
                "stage's its loss doesn't compare"
            )
        if not kept[run]:
            raise ValueError(f"{run} has no {y} that is a number and compares within the run")
    _refuse_unlike(kept, facts, y)
    names = list(kept)
    groups, same_seed = retrainings([training_of_recipe(facts[run].recipe) for run in names])
    called: dict[str, str] = {}
    for name, group in zip(group_names(names, groups), groups, strict=True):
        called |= {names[i]: name for i in group}
    curves = [_curve(run, kept[run], x, y, called[run]) for run in names]
    notes += [
        f"{names[i]} has the recipe and the seed of {names[j]}: it isn't counted as a retraining"
        for i, j in same_seed
    ]
    alone = [names[group[0]] for group in groups if len(group) == 1]
    if alone and len(names) > 1:
        whose = "each" if len(alone) == len(names) else f"only of {', '.join(alone)}"
        notes.append(f"one training {whose}: another seed alone moves the cost too")
    return curves, notes + _notes(facts, x, y)


def costs_to_quality(curves: Sequence[Curve], target: float | None) -> tuple[float, list[Reached]]:
    """What each run had spent when it first was as good as a target, next to the first run.

    Args:
        curves: the first is the baseline.
        target: the quality; None = the baseline's last.

    Returns:
        The target, and a cost for each curve, by straight lines between its best so far.
    """
    goal = float(curves[0].quality[-1]) if target is None else target
    base = first_reaching(curves[0].cost, curves[0].quality, goal)
    found = []
    for curve in curves:
        cost = first_reaching(curve.cost, curve.quality, goal)
        is_bound = bool(curve.quality[0] <= goal)
        ratio = base / cost if base and cost else None
        within = None
        if cost is not None and curve.error is not None:
            half = NORMAL_95 * float(np.median(curve.error))
            early = first_reaching(curve.cost, curve.quality, goal + half)
            assert early is not None  # what is lower was reached
            within = early, first_reaching(curve.cost, curve.quality, goal - half)
        found.append(Reached(curve.name, cost, is_bound, ratio, within))
    return goal, found


def first_reaching(cost: np.ndarray, quality: np.ndarray, target: float) -> float | None:
    """The cost at which the best quality so far first is at most the target; None = never.

    Between two measurements by a straight line; before the first one nothing is known, so that
    it is the earliest.

    Args:
        cost, quality: float (K,).
    """
    best = np.minimum.accumulate(quality)
    if best[-1] > target:
        return None
    i = int(np.argmax(best <= target))
    if i == 0:
        return float(cost[0])
    part = (best[i - 1] - target) / (best[i - 1] - best[i])
    return float(cost[i - 1] + part * (cost[i] - cost[i - 1]))


def _curve(run: str, lines: Sequence[Line], x: str, y: str, group: str) -> Curve:
    errors = [line.get(f"{y}_error") for line in lines]
    return Curve(
        run,
        np.array([line[COSTS[x]] for line in lines], float),
        np.array([line[y] for line in lines], float),
        None if any(error is None for error in errors) else np.array(errors, float),
        tuple(line["stage"] for line in lines),
        group,
    )


def _schedules(facts: Facts) -> dict[str, list[Any]]:
    """The noise schedule of each stage of a run, where its recipe is known."""
    if facts.recipe is None:
        return {}
    diffusion = facts.recipe["diffusion"]
    return {
        stage["name"]: [stage["schedule"] or diffusion["schedule"], diffusion["base_size"]]
        for stage in facts.recipe["stages"]
    }


def _foreign_stages(facts: Facts) -> list[str]:
    """Stages under another noise schedule than the last one's."""
    schedules = _schedules(facts)
    last = list(schedules.values())[-1:]
    return [stage for stage, schedule in schedules.items() if [schedule] != last]


def _refuse_unlike(lines: Mapping[str, Sequence[Line]], facts: Mapping[str, Facts], y: str) -> None:
    """Raises ValueError where qualities don't compare. What is unknown is not held against them."""
    properties: dict[str, dict[str, Any]] = {
        run: {"images (SHA-256)": facts[run].images_sha256} for run in lines
    }
    for run, told in properties.items():
        recipe = facts[run].recipe
        if y == "dense_loss" and recipe is not None:
            told["data.held_out"] = recipe["data"].get("held_out")
            told["data.subset_seed"] = recipe["data"]["subset_seed"]
            told["last stage's noise schedule"] = " ".join(
                str(part) for part in list(_schedules(facts[run]).values())[-1] if part is not None
            )
        elif y != "dense_loss":
            for key in ("features", "features_sha256", "num"):
                values = {line.get(key) for line in lines[run]} - {None}
                if len(values) > 1:
                    raise ValueError(
                        f"{run}: {y} was measured in several ways ({key} "
                        f"{', '.join(sorted(map(str, values)))}), and they don't compare"
                    )
                told[key] = next(iter(values), None)
    for key in dict.fromkeys(key for told in properties.values() for key in told):
        known = {run: told[key] for run, told in properties.items() if told.get(key) is not None}
        if len(set(known.values())) > 1:
            shown = ", ".join(f"{str(value)[:24]} ({run})" for run, value in known.items())
            raise ValueError(
                f"{y} doesn't compare between these runs: they differ in {key}: {shown}"
            )


def _notes(facts: Mapping[str, Facts], x: str, y: str) -> list[str]:
    notes = []
    unknown = [run for run, one in facts.items() if one.images_sha256 is None]
    if unknown:
        notes.append(f"on which images {', '.join(unknown)} trained is unknown")
    recipes = {run: one.recipe for run, one in facts.items() if one.recipe is not None}
    for run, recipe in recipes.items():
        if recipe["init"] is not None:
            notes.append(f"{run} began from {recipe['init']}, whose cost is not counted")
    steps = {run: str(recipe["preview_steps"]) for run, recipe in recipes.items()}
    if y != "dense_loss" and len(set(steps.values())) > 1:
        told = ", ".join(f"{num} ({run})" for run, num in steps.items())
        notes.append(f"other sampling: preview_steps {told}")
    devices = {run: ", ".join(one.devices) for run, one in facts.items() if one.devices}
    if x == "time" and len(set(devices.values())) > 1:
        told = "; ".join(f"{run}: {names}" for run, names in devices.items())
        notes.append(f"times compare the machines too ({told})")
    return notes
