"""What a search reports: its verdict in words, the winner as a recipe, a picture of the tree."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from maskdm.metrics import METRICS
from maskdm.recipe import Recipe
from maskdm.recipe_files import load_recipe, merged, recipe_names
from maskdm.search.forest import Node
from maskdm.search.halving import Plan, Trial, Verdict
from maskdm.search.space import PROXIES
from maskdm.words import figure as figure_text
from maskdm.words import flops_text, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def verdict_text(verdict: Verdict, plan: Plan, full: float) -> list[str]:
    """What a search has found, in lines for people."""
    title = METRICS[verdict.metric].title
    lines = [f"dense   {verdict.dense}"]
    if verdict.masked is None:
        return [*lines, "result  no masked schedule could be trained: dense"]
    lines.append(f"masked  {verdict.masked}")
    for name, values, gain in (
        (title, verdict.distances, verdict.distance_gain),
        ("held-out loss", verdict.losses, verdict.loss_gain),
    ):
        sides = [", ".join(map(figure_text, side)) for side in values]
        lines.append(f"{name}: dense {sides[0]}; masked {sides[1]}; {_gain_text(*gain)}")
    if verdict.masks_pay:
        result = f"masks pay: the {title} is smaller beyond the noise"
    elif verdict.distance_gain[0] > 0:
        result = f"masks may pay, but the {title} is smaller by no more than the noise: dense"
    else:
        result = f"masks do not pay here: the {title} is no smaller: dense"
    lines.append(f"result  {result}")
    if verdict.distance_gain[0] * verdict.loss_gain[0] < 0:
        lines.append(f"note    {title} and held-out loss order the two finalists differently")
    if verdict.correlation is not None:
        lines.append(
            f"proxy   {PROXIES[plan.how.proxy].title}: rank correlation {verdict.correlation:.2f} "
            f"with the {title} over the {verdict.num_correlated} longest trials"
        )
    if plan.top < 0.99 * full:
        lines.append(
            f"note    the trials had at most {100 * plan.top / full:.3g} % of the recipe's FLOPs: "
            "whether the result holds at its full length was not tried"
        )
    return lines


def winner_text(recipe: Recipe, name: str | None, evidence: Sequence[str]) -> str:
    """A recipe's YAML with its evidence in comments.

    Args:
        recipe: the winner.
        name: of a packaged recipe that it is based on; None, or a file's = it is written whole.
        evidence: lines.
    """
    comment = [part for line in evidence for part in wrapped(line, "# ", 100)]
    comment = [line if line.startswith("#") else f"# {line.strip()}" for line in comment]
    settings: dict[str, Any] = _short(recipe)
    if name in recipe_names():
        base = load_recipe(name)
        own = _changes(base.model_dump(mode="json"), recipe) | {"stages": settings["stages"]}
        if Recipe(**merged(base.model_dump(), own)) == recipe:
            settings = {"base": name, **own}
    dumped = yaml.safe_dump(settings, sort_keys=False, width=100)
    return "\n".join([*comment, dumped])


def save_tree(nodes: Sequence[Node], trials: Sequence[Trial], path: Path) -> Path:
    """Saves `tree_figure` to a file."""
    tree_figure(nodes, trials).savefig(path, dpi=110)
    return path


def tree_figure(nodes: Sequence[Node], trials: Sequence[Trial]) -> Figure:
    """Draws what a search has trained: a line for each run, from where it begins to its end.

    The darker, the more is hidden. Each trial's end has its schedule and score; the better the
    score among those of its length, the higher it lies among its neighbours.

    Args:
        nodes: of the search's forest.
        trials: of the search that are over.
    """
    from matplotlib.figure import Figure

    by_run = {trial.outcome.run: trial for trial in trials if trial.outcome}
    places = _places(nodes, by_run)
    height = max(3.0, 0.2 * (1 + max(places.values(), default=0)))
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.add_subplot()
    known = {node.name: node for node in nodes}
    for node in nodes:
        parent = known.get(node.parent or "")
        begin = parent.flops if parent else 0
        rate = node.stages[-1]["mask"]["rate"]
        colour = f"{0.75 - 0.75 * rate:.2f}" if rate else "C0"
        axes.plot([begin, node.flops], [places[node.name]] * 2, color=colour, linewidth=1.6)
        if parent and places[parent.name] != places[node.name]:
            ends = [places[parent.name], places[node.name]]
            axes.plot([begin, begin], ends, color="0.7", linewidth=0.7, zorder=0)
        if trial := by_run.get(node.name):
            axes.plot(node.flops, places[node.name], marker=".", color=colour)
            seed = f", seed +{trial.job.seed}" if trial.job.seed else ""
            score = figure_text(trial.score) if math.isfinite(trial.score) else "diverged"
            text = f"  {score}  {trial.job.schedule}{seed}"
            axes.text(node.flops, places[node.name], text, fontsize=7, va="center")
    longest = max((node.flops for node in nodes), default=1)
    axes.set_xlim(0, 1.9 * longest)  # room for the texts
    axes.set_xticks([at for at in axes.get_xticks() if at <= longest])
    axes.xaxis.set_major_formatter(lambda value, place: flops_text(value))
    axes.set_xlabel("cost of training; blue: whole images, grey: masked, darker = more hidden")
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def trials_json(trials: Sequence[Trial], verdict: Verdict, spent: int) -> str:
    """Everything, for machines; what diverged, or was not measured, is null."""
    rows = [
        {"number": one.number, "rung": one.job.rung, "seed": one.job.seed}
        | {"schedule": one.job.schedule.as_json()}
        | (one.outcome.as_json() if one.outcome else {})
        for one in trials
    ]
    content = {
        "winner": verdict.winner.as_json(),
        "masks_pay": verdict.masks_pay,
        "metric": verdict.metric,
        "dense": verdict.dense.as_json(),
        "masked": verdict.masked and verdict.masked.as_json(),
        "distances": verdict.distances,
        "losses": verdict.losses,
        "distance_gain": verdict.distance_gain,
        "loss_gain": verdict.loss_gain,
        "rank_correlation": verdict.correlation,
        "spent_flops": spent,
        "trials": rows,
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """A value of JSON's types with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _places(nodes: Sequence[Node], by_run: dict[str, Trial]) -> dict[str, float]:
    """A height for each run: that of its best branch, branches side by side."""
    children: dict[str | None, list[Node]] = {}
    for node in nodes:
        children.setdefault(node.parent, []).append(node)
    places: dict[str, float] = {}

    def best(node: Node) -> float:
        own = by_run[node.name].score if node.name in by_run else math.inf
        return min([own, *(best(child) for child in children.get(node.name, []))])

    def place(node: Node, lowest: int) -> int:
        branches = sorted(children.get(node.name, []), key=best, reverse=True)
        for branch in branches:
            lowest = place(branch, lowest)
        places[node.name] = places[branches[-1].name] if branches else lowest
        return lowest if branches else lowest + 1

    lowest = 0
    for root in sorted(children.get(None, []), key=best, reverse=True):
        lowest = place(root, lowest)
    return places


def _gain_text(gain: float, half: float) -> str:
    if not math.isfinite(gain):
        return "one of them diverged"
    low, high = (figure_text(gain + sign * half) for sign in (-1, 1))
    return f"dense minus masked {figure_text(gain)} (95 % interval {low} to {high})"


def _short(recipe: Recipe) -> dict[str, Any]:
    """All settings that are not the defaults."""
    return recipe.model_dump(mode="json", exclude_defaults=True)


def _changes(old: dict[str, Any], new: Recipe | dict[str, Any]) -> dict[str, Any]:
    """Settings of `new` that `old` does not have, group by group."""
    values = new.model_dump(mode="json") if isinstance(new, Recipe) else new
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            if inner := _changes(old[name], value):
                found[name] = inner
        elif old.get(name) != value:
            found[name] = value
    return found
