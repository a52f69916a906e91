"""Controls: what a recipe trains without masks, for as much compute as with them."""

from __future__ import annotations

from typing import Any

from maskdm.models.build import weightless_model
from maskdm.recipe import Budget, Recipe
from maskdm.settings import changed
from maskdm.training.speed import Machine
from maskdm.training.work import stage_work

# What a stage of a control has not.
BARE: dict[str, Any] = {
    "mask": {"kind": "none", "rate": 0.0},
    "until": "steps",
    "restarts": (),
    "probe_flops": 0,
}


def dense_control(recipe: Recipe, equal: str = "flops", machine: Machine | None = None) -> Recipe:
    """A planned recipe's control: its last stage's settings alone, without a mask.

    Args:
        equal: `flops`, `time` or `steps`, to within a step.
        machine: needed for equal time.
    """
    control = changed(recipe, stages=[recipe.stages[-1].model_dump() | BARE], budget=Budget())
    (price,) = _prices_of_steps(control, equal, machine)
    steps = max(1, round(sum(_spent(recipe, equal, machine)) / price))
    return changed(
        control, stages=[control.stages[0].model_dump() | {"name": "dense", "steps": steps}]
    )


def unmasked_control(
    recipe: Recipe, equal: str = "flops", machine: Machine | None = None
) -> Recipe:
    """A planned recipe's control that differs in the masks alone: its stages, on whole images.

    Each keeps its learning rate and batch, of which a masked recipe's gain may come.

    Args:
        equal: what each stage has in common with its masked one: `flops`, `time` or `steps`.
        machine: needed for equal time.
    """
    stages = [stage.model_dump() | BARE for stage in recipe.stages]
    control = changed(recipe, stages=stages, budget=Budget())
    prices = _prices_of_steps(control, equal, machine)
    for stage, spent, price in zip(stages, _spent(recipe, equal, machine), prices, strict=True):
        stage["steps"] = max(1, round(spent / price))
        if isinstance(stage["warmup"], int):
            stage["warmup"] = min(stage["warmup"], stage["steps"])
    return changed(control, stages=stages)


def _prices_of_steps(recipe: Recipe, equal: str, machine: Machine | None) -> list[float]:
    """What a step of each stage takes of what a control has in common with its recipe."""
    if equal == "steps":
        return [1.0 for _ in recipe.stages]
    if equal == "time":
        assert machine is not None
        return list(machine.speed(recipe).step_sec)
    return [float(work.step_flops) for work in stage_work(recipe, weightless_model(recipe))]


def _spent(recipe: Recipe, equal: str, machine: Machine | None) -> list[float]:
    """What each stage takes of it in all: FLOPs with those of the forks that were made."""
    rows = zip(recipe.stages, _prices_of_steps(recipe, equal, machine), strict=True)
    forks = equal == "flops"
    return [stage.steps * price + forks * stage.probe_flops for stage, price in rows]
