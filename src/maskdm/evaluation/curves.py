"""Quality against cost: the curves of runs, and the cost at which each reached a quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.evaluation.comparable import differing, differing_in
from maskdm.evaluation.measure import NORMAL_95
from maskdm.evaluation.retrainings import measured_in_all, retrainings, training_of_recipe
from maskdm.metrics import METRICS, qualities
from maskdm.recipe_files import load_recipe
from maskdm.runs.folder import images_sha256, read_starts
from maskdm.runs.lines import Line
from maskdm.words import COSTS, listed, suggestion

NUM_DRAWS = 1000  # of both curves, for the interval of a ratio


@dataclass(frozen=True)
class Facts:
    """What is known of a run's training from its folder."""

    recipe: dict[str, Any] | None = None  # as JSON
    images_sha256: str | None = None  # of the prepared images
    devices: tuple[str, ...] = ()  # those that it was trained on, `2 x NVIDIA H100`


@dataclass(frozen=True)
class Curve:
    """A run's quality over its cost."""

    name: str
    cost: np.ndarray  # so far, float64 (K,), increasing
    quality: np.ndarray  # float64 (K,)
    error: np.ndarray | None  # standard errors of the quality, float64 (K,); None = unknown
    stages: tuple[str, ...]  # names (K,)
    group: str  # the name of the run's group of retrainings
    higher_is_better: bool = False

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "x": self.cost.tolist(),
            "y": self.quality.tolist(),
            "error": None if self.error is None else self.error.tolist(),
            "stages": self.stages,
            "retrainings": self.group,
        }


@dataclass(frozen=True)
class Reached:
    """The cost at which a run first reached a quality."""

    name: str
    cost: float | None  # None = never
    is_bound: bool  # the first measurement already reached it: the cost is at most that
    ratio: float | None  # the baseline's cost over this one; None where either is unknown or 0
    # The costs at which the quality was reached within a measurement's noise, and beyond it;
    # None = unknown, the second None = never.
    within: tuple[float, float | None] | None
    # 95 % interval of the ratio over samples; None = unknown. A first 0: perhaps this one never
    # reaches the quality. A second None: perhaps the baseline never does.
    ratio_interval: tuple[float, float | None] | None = None


def read_facts(run: Path) -> Facts:
    """What is known of a run from its folder. Raises ValueError for a damaged file."""
    recipe, starts = run / "recipe.yaml", read_starts(run)
    settings = load_recipe(recipe).model_dump(mode="json") if recipe.is_file() else None
    devices = [f"{one.get('num_ranks', 1)} x {one['device']}" for one in starts if "device" in one]
    return Facts(settings, images_sha256(run), tuple(dict.fromkeys(devices)))


def choose_quality(lines: Mapping[str, Sequence[Line]], wanted: str | None) -> str:
    """The wanted quality, or the first one that was measured in all runs.

    Raises ValueError where a run lacks it; it lists what was measured.
    """
    known = qualities()
    if wanted is not None and wanted not in known:
        raise ValueError(f"{wanted} is not measured in training: {suggestion(wanted, known)}")
    hint = ""
    if wanted is not None:
        why = "data.held_out 0" if _is_loss(wanted) else "evaluation.quick_num 0"
        why += "" if METRICS[wanted].in_pca else " or features pca"
        hint = f" (trained with {why}?)"
    columns = {run: {name for line in of_run for name in line} for run, of_run in lines.items()}
    has = {run: [name for name in known if name in one] for run, one in columns.items()}
    return measured_in_all(has, wanted, hint)[0]


def curves_of(
    lines: Mapping[str, Sequence[Line]],
    facts: Mapping[str, Facts],
    x: str,
    y: str,
    in_training: bool = True,
) -> tuple[list[Curve], list[str]]:
    """The curves of runs with comparable qualities, and notes about what a reader should know.

    Args:
        lines: name of a run -> lines of its quality.jsonl; lines without y are skipped.
        facts: name of a run -> what is known of its training.
        x: a key of `COSTS`.
        y: one of `metrics.qualities`, measured in every run; or any metric of evaluations.
        in_training: whether y was measured in training, else by evaluations (`points_of`).

    Raises ValueError for qualities that are not comparable; it says what differs.
    """
    kept, notes = {}, []
    for run, of_run in lines.items():
        foreign = _foreign_stages(facts[run]) if _is_loss(y) else ()
        usable = [line for line in of_run if isinstance(line.get(y), (int, float))]
        kept[run] = [one for one in usable if math.isfinite(one[y]) and one["stage"] not in foreign]
        if skipped := [one for one in foreign if one in {line["stage"] for line in usable}]:
            notes.append(
                f"{run}: {', '.join(skipped)} left out: its noise schedule differs from the last "
                "stage's, so losses are not comparable"
            )
        if not kept[run]:
            raise ValueError(f"{run} has no finite {y} that is comparable within the run")
    properties = {run: _properties(run, kept[run], facts[run], y) for run in kept}
    if differences := differing_in(properties):
        raise ValueError(
            f"{y} is not comparable between these runs: they differ in {'; in '.join(differences)}"
        )
    trainings = {run: training_of_recipe(facts[run].recipe) for run in kept}
    groups, alone = retrainings(trainings, "another seed alone changes the cost, too")
    group_of = {run: name for name, runs in groups.items() for run in runs}
    curves = [_curve(run, kept[run], x, y, group_of[run]) for run in kept]
    return curves, notes + alone + _notes(facts, x, y, in_training)


def costs_to_quality(curves: Sequence[Curve], target: float | None) -> tuple[float, list[Reached]]:
    """The cost at which each run first was as good as a target, relative to the first run.

    Args:
        curves: the first is the baseline.
        target: the quality; None = the baseline's last.

    Gives the target, and a cost for each curve, by straight lines between its best so far.
    """
    sign = -1 if curves[0].higher_is_better else 1  # a quality times this: lower is better
    goal = float(curves[0].quality[-1]) if target is None else target
    base, reached = None, []
    for curve in curves:
        quality = sign * curve.quality
        cost = first_reaching(curve.cost, quality, sign * goal)
        base = cost if curve is curves[0] else base
        ratio = base / cost if base and cost else None
        within = None
        if cost is not None and curve.error is not None:
            half = NORMAL_95 * float(np.median(curve.error))
            early = first_reaching(curve.cost, quality, sign * goal + half)
            assert early is not None  # the stricter target was reached
            within = early, first_reaching(curve.cost, quality, sign * goal - half)
        is_bound = bool(quality[0] <= sign * goal)
        interval = None if curve is curves[0] else _ratio_interval(curves[0], curve, target)
        reached.append(Reached(curve.name, cost, is_bound, ratio, within, interval))
    return goal, reached


def _ratio_interval(
    base: Curve, curve: Curve, target: float | None
) -> tuple[float, float | None] | None:
    """The 95 % interval of the ratio of costs to equal quality, over samples.

    Both curves are drawn anew with independent normal errors of their points; a target that is the
    baseline's last value moves with it. None where errors are unknown, or too few draws have a
    ratio.
    """
    if base.error is None or curve.error is None:
        return None
    sign = -1 if curve.higher_is_better else 1
    rng, ratios = np.random.default_rng(0), []
    for _ in range(NUM_DRAWS):
        first = sign * rng.normal(base.quality, base.error)
        other = sign * rng.normal(curve.quality, curve.error)
        goal = first[-1] if target is None else sign * target
        costs = first_reaching(base.cost, first, goal), first_reaching(curve.cost, other, goal)
        if costs[1] is None:
            ratios += [] if costs[0] is None else [0.0]
        else:
            ratios.append(math.inf if costs[0] is None else costs[0] / costs[1])
    if len(ratios) < NUM_DRAWS / 2:
        return None
    low, high = np.quantile(ratios, [0.025, 0.975], method="inverted_cdf").tolist()
    return (low, high if math.isfinite(high) else None) if math.isfinite(low) else None


def first_reaching(cost: np.ndarray, quality: np.ndarray, target: float) -> float | None:
    """The cost at which the lowest quality so far first is at most the target; None = never.

    Between two measurements it follows a straight line; the first one's cost is the earliest.

    Args:
        cost: float (K,), increasing.
        quality: float (K,), lower is better.
        target: the quality to reach.
    """
    best = np.minimum.accumulate(quality)
    if best[-1] > target:
        return None
    i = int(np.argmax(best <= target))
    if i == 0:
        return float(cost[0])
    part = (best[i - 1] - target) / (best[i - 1] - best[i])
    return float(cost[i - 1] + part * (cost[i] - cost[i - 1]))


def _is_loss(y: str) -> bool:
    """Whether a quality is the model's own: it depends on noise and held-out images."""
    return "model" in METRICS[y].needs


def _curve(run: str, lines: Sequence[Line], x: str, y: str, group: str) -> Curve:
    cost, quality = (np.array([line[key] for line in lines], float) for key in (COSTS[x].key, y))
    error = np.array([line.get(f"{y}_error") for line in lines], float)  # None becomes NaN
    stages = tuple(line["stage"] for line in lines)
    known = None if np.isnan(error).any() else error
    return Curve(run, cost, quality, known, stages, group, METRICS[y].higher_is_better)


def _schedules(facts: Facts) -> dict[str, str]:
    """The noise schedule of each stage of a run, in words; empty if its recipe is unknown."""
    if facts.recipe is None:
        return {}
    usual, size = facts.recipe["diffusion"]["schedule"], facts.recipe["diffusion"]["base_size"]
    shift = "" if size is None else f" {size}"
    return {one["name"]: (one["schedule"] or usual) + shift for one in facts.recipe["stages"]}


def _foreign_stages(facts: Facts) -> list[str]:
    """Stages with another noise schedule than the last one's."""
    schedules = _schedules(facts)
    return [one for one, kind in schedules.items() if kind != list(schedules.values())[-1]]


def _properties(run: str, lines: Sequence[Line], facts: Facts, y: str) -> dict[str, Any]:
    """What must be equal for a quality to be comparable between runs, as far as is known."""
    known: dict[str, Any] = {"images (SHA-256)": facts.images_sha256}
    for name in (f"{y}_num",) if _is_loss(y) else ("features", "features_sha256", "num"):
        values = {line.get(name) for line in lines} - {None}
        if len(values) > 1:
            raise ValueError(
                f"{run}: {y} was measured in several ways that are not comparable ({name} "
                f"{', '.join(sorted(map(str, values)))})"
            )
        known[name] = next(iter(values), None)
    if _is_loss(y) and facts.recipe is not None:
        known["data.held_out"] = facts.recipe["data"].get("held_out")
        known["data.subset_seed"] = facts.recipe["data"]["subset_seed"]
        known["last stage's noise schedule"] = list(_schedules(facts).values())[-1]
    return {name: value for name, value in known.items() if value is not None}


def _notes(facts: Mapping[str, Facts], x: str, y: str, in_training: bool) -> list[str]:
    notes = []
    if unknown := [run for run, one in facts.items() if one.images_sha256 is None]:
        notes.append(f"the training images of {listed(unknown)} are unknown")
    recipes = {run: one.recipe for run, one in facts.items() if one.recipe is not None}
    for run, recipe in recipes.items():
        if recipe["init"] is not None:
            notes.append(f"{run} began from {recipe['init']}, whose cost is not counted")
    steps = differing({run: recipe["preview_steps"] for run, recipe in recipes.items()})
    if steps and in_training and not _is_loss(y):
        notes.append(f"sampling differs: preview_steps {steps}")
    devices = {run: ", ".join(one.devices) for run, one in facts.items() if one.devices}
    if x == "time" and (names := differing(devices)):
        notes.append(f"times depend on the machines, too: {names}")
    return notes
